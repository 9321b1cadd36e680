"""The KV cache: emulated in few bits, or paged and held in them."""
