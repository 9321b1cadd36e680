"""Engine: makes an exported checkpoint servable, and shows that it serves."""
