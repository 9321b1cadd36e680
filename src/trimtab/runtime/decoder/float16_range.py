"""Whether a model overflows in float16, found where it is computed in a type of larger range.

The engine computes in bfloat16 or float32, which hold 3e38, and float16 ends at 65,504: an export in float16 whose
activations go beyond would be judged well and serve nothing but NaN. So what passes between the modules, which an
engine stores in the model's type, is watched; sums inside products are float32 there too.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trimtab.base.errors import Failure

LARGEST = torch.finfo(torch.float16).max


@contextmanager
def checked(model: nn.Module) -> Iterator[None]:
    """Looks at the inputs and outputs of all modules without parts of their own, while the body runs the model.

    Raises:
        Failure: `unsupported`, one is more than float16 holds, or no number; names the first module.
    """
    largest: dict[str, torch.Tensor] = {}

    def see(name: str, *values: Any) -> None:
        for value in values:
            if isinstance(value, torch.Tensor) and value.is_floating_point() and value.numel():
                found = torch.stack(value.detach().aminmax()).abs().amax().float()
                largest[name] = torch.maximum(largest[name], found) if name in largest else found

    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: see(name, *args, output))
        for name, module in model.named_modules()
        if not any(module.children())
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not largest:
        return
    for name, value in zip(largest, torch.stack(list(largest.values())).tolist(), strict=True):
        if not value <= LARGEST:  # NaN is not
            raise Failure(
                "unsupported",
                f"{name}: reaches {value:,.0f} in float16, which ends at {LARGEST:,.0f}: served in this type, the "
                f"model gives no numbers; write a format that is served in bfloat16, or, for the model itself, "
                f'"dtype": "bfloat16" in its config.json',
            )
