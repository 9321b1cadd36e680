"""Calibration: the data that activations are measured on, and what one pass over it tells."""
