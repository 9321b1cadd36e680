"""The targets, and why a target cannot run a recipe.

| file | idea |
|---|---|
| `targets` | each device and what a back end runs there, as data |
| `layers` | the layers that a format applies to, and what a rank holds of them |
| `checks` | why a recipe cannot run, in one sentence |
"""

from trimtab.hardware.checks import check, check_packing
from trimtab.hardware.layers import largest_group_size, quantized_layers, splits
from trimtab.hardware.targets import (
    GB,
    GPUS,
    TARGETS,
    TENSORRT_LLM_FORMATS,
    TENSORRT_LLM_KV_CACHES,
    Hardware,
    gpu,
    machine_memory,
    target,
)

__all__ = [
    "GB",
    "GPUS",
    "Hardware",
    "TARGETS",
    "TENSORRT_LLM_FORMATS",
    "TENSORRT_LLM_KV_CACHES",
    "check",
    "check_packing",
    "gpu",
    "largest_group_size",
    "machine_memory",
    "quantized_layers",
    "splits",
    "target",
]
