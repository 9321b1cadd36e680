"""What is measured of a model while it runs on calibration text: statistics, Gram matrices, gradients."""
