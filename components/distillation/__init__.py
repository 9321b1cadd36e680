"""Distillation: the pruned student learns from the logits of the unpruned teacher."""
