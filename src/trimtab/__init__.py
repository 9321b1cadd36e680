"""The vocabulary and the decisions of trimtab: no torch and no kfp, so a laptop imports it at once."""

__version__ = "0.1.0"
