"""Which layer gets which format, by how much each harms it."""
