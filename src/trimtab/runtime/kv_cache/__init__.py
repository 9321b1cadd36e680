"""The KV cache: emulated in few bits, or paged and held in them.

| file | idea |
|---|---|
| `emulated` | keys and values rounded as a format would, and held in 16 bits |
| `paged` | keys and values in blocks, in the bits of their format |
| `paged_attention` | the attention that reads and writes it |
| `block_pool` | which blocks belong to which sequence |
"""
