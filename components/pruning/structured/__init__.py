"""Whole blocks or channels that go, and the smaller checkpoint that is left."""
