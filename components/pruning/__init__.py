"""Pruning: fewer weights (magnitude, Wanda, SparseGPT) or fewer blocks (depth)."""
