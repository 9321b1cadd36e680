"""Many sequences served at once: a scheduler, a step over a paged KV cache, and the choice of tokens."""
