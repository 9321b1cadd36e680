"""The GPUs that a run may be planned for, as rows.

Memory and bandwidth are NVIDIA's datasheet figures, in decimal bytes. Compute capabilities:
developer.nvidia.com/cuda-gpus. No prices: they differ by provider and day, so a ledger gets them from its user.
"""

from __future__ import annotations

from typing import NamedTuple


class Target(NamedTuple):
    """A GPU: memory in GB, bandwidth in GB/s, compute capability, and the product whose datasheet says so."""

    name: str
    memory_gb: int
    bandwidth_gb: float
    compute_capability: tuple[int, int]
    product: str


#: By name.
TARGETS = {
    row.name: row
    for row in (
        Target("a100-40", 40, 1555, (8, 0), "A100 PCIe, 40 GB"),
        Target("a100-80", 80, 1935, (8, 0), "A100 PCIe, 80 GB"),
        Target("l4", 24, 300, (8, 9), "L4"),
        Target("l40s", 48, 864, (8, 9), "L40S"),
        Target("h100", 80, 3350, (9, 0), "H100 SXM"),
        Target("h200", 141, 4800, (9, 0), "H200"),
        Target("b200", 180, 8000, (10, 0), "DGX B200: 1,440 GB and 64 TB/s over eight GPUs"),
        Target("rtx4090", 24, 1008, (8, 9), "GeForce RTX 4090"),
    )
}
