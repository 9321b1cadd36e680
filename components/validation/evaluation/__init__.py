"""What an engine scores, and how fast it is."""
