"""The training loop, its optimizer, its checkpoints, and its processes."""
