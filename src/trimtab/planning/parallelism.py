"""The ways to spread one copy of a model over devices, in the order to try them."""

from __future__ import annotations

from collections.abc import Iterator

#: Devices that NVLink or one PCIe switch joins: tensor parallelism, which talks in every layer, stays among them.
GPUS_PER_NODE = 8


def worlds(gpus: int, gpus_per_node: int = GPUS_PER_NODE) -> Iterator[tuple[int, int]]:
    """Yields (tensor, pipeline) parallel sizes for at most `gpus` devices: small worlds first, tensor before pipeline.

    Inside a node worlds are powers of two, as devices are rented and joined; beyond it they are whole nodes.
    """
    inside = [2**n for n in range(gpus_per_node.bit_length()) if 2**n <= min(gpus, gpus_per_node)]
    beyond = [nodes * gpus_per_node for nodes in range(2, gpus // gpus_per_node + 1)]
    for world in inside + beyond:
        for tensor in sorted((n for n in range(1, gpus_per_node + 1) if world % n == 0), reverse=True):
            if tensor & (tensor - 1) == 0:
                yield tensor, world // tensor
