"""The text that a student learns from, some of it written by the teacher."""
