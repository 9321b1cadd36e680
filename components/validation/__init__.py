"""Validation: judges the artifact that was exported, in the engine that will serve it, against the baseline."""
