"""Pruning: fewer weights (magnitude), fewer blocks (depth) or narrower ones (width)."""
