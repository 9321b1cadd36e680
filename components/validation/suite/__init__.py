"""The evaluation suite: fact tables, the generator of the items and the lm-eval tasks."""
