"""Which blocks of a KV cache belong to which sequence: numbers only, no tensors.

A block holds the keys and values of `block_size` tokens. A sequence takes blocks as it grows, wherever they are free,
and its table lists them in order; so at most one block a sequence is partly empty. Source of the idea: PagedAttention,
Kwon et al. 2023, arXiv 2309.06180. A contiguous cache is the case of one block as long as the longest sequence.
"""

from __future__ import annotations

from collections.abc import Hashable


class BlockPool:
    """Hands out blocks; `tables` are those of every owner, in the order of its tokens."""

    def __init__(self, blocks: int, block_size: int):
        self.blocks, self.block_size = blocks, block_size
        self.tables: dict[Hashable, list[int]] = {}
        self._free = list(range(blocks))[::-1]

    @property
    def free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    @property
    def used(self) -> int:
        """Blocks that are owned."""
        return self.blocks - len(self._free)

    def needed(self, tokens: int) -> int:
        """Blocks for so many tokens."""
        return -(-tokens // self.block_size)

    def grow(self, owner: Hashable, tokens: int) -> bool:
        """Gives an owner room for so many tokens in all; returns False, and gives nothing, if there is too little."""
        table = self.tables.get(owner, [])
        more = self.needed(tokens) - len(table)
        if more > len(self._free):
            return False
        if more > 0:
            self.tables[owner] = table + [self._free.pop() for _ in range(more)]
        return True

    def release(self, owner: Hashable) -> None:
        """Takes all blocks of an owner back."""
        self._free += reversed(self.tables.pop(owner, []))
