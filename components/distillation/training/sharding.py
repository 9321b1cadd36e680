"""A model over several processes, each of which holds a part of every weight: FSDP2, block by block.

A process holds its rows of each parameter, as `torch.chunk` deals them out, and so of the student, which it keeps in
float32, the gradients and the optimizer's moments of those rows alone. A block is whole only while it computes, in the
type that it computes in; so is what stands outside the blocks while a loss does. Gradients are averaged in float32 as
they are dealt out again. What several processes train is what one does, but for the order of sums.

Source: Zhao et al. 2023, "PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel" (arXiv 2304.11277).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from trimtab.base.errors import Failure
from trimtab.components.distillation.training import data_parallel
from trimtab.runtime.checkpoint import experts, skeleton
from trimtab.runtime.checkpoint.finite import check_finite
from trimtab.runtime.measure import observe


def shard(model: Any, device: torch.device) -> None:
    """Leaves of a loaded model this process's part, on the device; on a GPU it then computes in bfloat16.

    A model that is trained is kept in float32, one that is not in the type that it computes in. Numbers that the
    architecture keeps in float32, single numbers, and what a reparametrization adds are whole in every process.

    Raises:
        Failure: `unsupported`, blocks that share weights.
        InputError: a weight that is not finite; in the process that has it.
    """
    _check_shared(model)
    computed = torch.bfloat16 if device.type == "cuda" else torch.float32
    trained = any(parameter.requires_grad for parameter in model.parameters())
    policy = MixedPrecisionPolicy(computed, torch.float32) if trained else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (data_parallel.count(),))
    undivided = {parameter for name, parameter in model.named_parameters() if _is_whole(model, name, parameter)}
    for parameter in undivided:
        parameter.data = parameter.data.to(device, torch.float32 if parameter.dim() else computed)
    for part in parts(model):
        for parameter in part.parameters():
            if parameter not in undivided and not isinstance(parameter, DTensor):
                moved = parameter.data.to(device).to(computed)
                parameter.data = moved.float() if trained else moved
        fully_shard(part, mesh=mesh, mp_policy=policy, ignored_params=undivided)
        if device.type == "cpu":
            part.set_force_sum_reduction_for_comms(True)  # gloo has no mean
    for name, parameter in model.named_parameters():
        check_finite(name, local(parameter.detach()))
    for mixture in experts.mixtures(model).values():
        mixture.runs_without_tokens = True


def parts(model: Any) -> list[nn.Module]:
    """Returns the modules that are gathered each by itself: the blocks, an embedding that is not the head once more,
    and the model with all that is left."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return [*observe.blocks(model), *([] if embedding.weight is head.weight else [embedding]), model]


def through(model: Any, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns the function, during which what stands outside the blocks is whole; it is still whole afterwards, until a
    backward pass or `release`."""
    if not isinstance(model, FSDPModule):
        return function
    name = f"_through_{len(vars(model))}"
    setattr(model, name, function)
    register_fsdp_forward_method(model, name)
    return getattr(model, name)


def release(model: Any) -> None:
    """Lets go of what `through` left whole."""
    if isinstance(model, FSDPModule):
        model.reshard()


def is_shard(tensor: torch.Tensor) -> bool:
    """Whether this process holds a part of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Returns what of a tensor this process holds, in the same memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Returns a tensor of which each process holds a part; all processes call this together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(parameter: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Returns the tensor of which each process holds a part as it holds one of the parameter, in the same memory."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=parameter.shape, stride=parameter.stride())


@torch.no_grad()
def copy_into(plain: nn.Module | None, student: Any, weight: Callable[[nn.Module, str], torch.Tensor]) -> None:
    """Copies a sharded student into a model that is not; all processes call this together.

    Args:
        plain: the same model without reparametrizations, in the process that keeps it, None in the others.
        weight: returns of a module, which is whole, the parameter of that name.
    """
    left = dict(plain.named_parameters()) if plain is not None else {}
    for part in parts(student):
        inside = set(part.modules())
        part.unshard()
        for name in list(left):
            module, _, leaf = name.rpartition(".")
            if (holder := student.get_submodule(module)) in inside:
                left.pop(name).copy_(weight(holder, leaf))
        part.reshard()


def _is_whole(model: Any, name: str, parameter: nn.Parameter) -> bool:
    added = ".parametrizations." in name and not name.endswith(".original")
    return added or parameter.dim() == 0 or skeleton.kept_in_float32(model, name)


def _check_shared(model: Any) -> None:
    def counted(module: nn.Module) -> Counter[int]:
        return Counter(id(parameter) for _, parameter in module.named_parameters(remove_duplicate=False))

    everywhere = counted(model)
    if any(everywhere[key] > count for part in parts(model)[:-1] for key, count in counted(part).items()):
        what = f"distill.processes: {type(model).__name__} shares weights between its blocks"
        raise Failure("unsupported", f"{what}, so several processes cannot hold a part of it each; write 1")
