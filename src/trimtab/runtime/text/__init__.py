"""Texts and conversations, read and cut into windows of tokens."""
