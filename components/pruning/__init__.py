"""Pruning: fewer weights (magnitude, Wanda, SparseGPT), fewer blocks (depth) or narrower ones (width)."""
