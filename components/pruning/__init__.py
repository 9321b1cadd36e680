"""Pruning: fewer weights (magnitude) or fewer blocks (depth)."""
