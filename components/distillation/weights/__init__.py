"""What changes the student's weights while it trains: masks, movement pruning, rounding."""
