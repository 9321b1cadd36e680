"""Weights that become zero: magnitude, Wanda, SparseGPT; and how sparsity is shared out."""
