"""Fetch: brings a model into the store, once."""
