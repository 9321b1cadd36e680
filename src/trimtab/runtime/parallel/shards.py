"""One model over several processes: which part each holds, and where they talk.

Tensor parallelism (Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053): every rank has some heads of each attention
and some neurons of each MLP, and the outputs of `o_proj` and `down_proj` are summed over the ranks. Pipeline
parallelism (Huang et al. 2018, GPipe, arXiv 1811.06965): every stage has some blocks, and hands on what leaves the last
of them. One batch is on its way at a time, so stages save memory and no time.

Rank r has part r mod t of stage r div t, as TensorRT-LLM counts. Embedding, norms and head are whole in every rank, and
what leaves a stage goes to all: so each rank scores and chooses tokens as one process would, and all the same ones.

Which layers can be split is what transformers says in `base_model_tp_plan`. Its own `tp_plan="auto"` is not used: it
splits parameters of `nn.Linear` as DTensors, and packed weights are neither.

With FP8 scales that are found for each token, a rank finds the scale of its own part of a row, which is finer than the
whole row's, as other engines do it; every other format computes what one process computes, but for the order of sums.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel

from trimtab.base.errors import Failure
from trimtab.recipe import Engine as Settings
from trimtab.runtime.checkpoint.layer_layout import Layout
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.checkpoint.skeleton import family_of
from trimtab.runtime.parallel import split, torchrun

_SPLIT = ("colwise", "rowwise")
#: Of transformers' styles, those of what every rank has whole: norms of a head, and the embedding.
_WHOLE = ("replicated_with_grad_allreduce", "embedding_rowwise")


@dataclass(frozen=True)
class Place:
    """Where a rank stands: part `tensor` of `tensors`, in stage `stage` of `stages`; and those it talks with."""

    tensor: int
    tensors: int
    stage: int = 0
    stages: int = 1
    tensor_group: distributed.ProcessGroup | None = None
    pipeline_group: distributed.ProcessGroup | None = None


def place(settings: Settings, device: torch.device) -> Place:
    """Returns the place of this process among `settings.world_size` ones; all must call this at the same time."""
    tensors, stages = settings.tensor_parallel_size, settings.pipeline_parallel_size
    mesh = init_device_mesh(device.type, (stages, tensors), mesh_dim_names=("pipeline", "tensor"))
    stage, tensor = divmod(torchrun.rank(), tensors)
    return Place(tensor, tensors, stage, stages, mesh.get_group("tensor"), mesh.get_group("pipeline"))


def agreement(place: Place, device: torch.device) -> Callable[[bool], bool]:
    """Returns a function that all ranks call together: whether each of them says True."""

    def agree(fine: bool) -> bool:
        said = torch.tensor(int(fine), device=device)
        distributed.all_reduce(said, distributed.ReduceOp.MIN)
        return bool(said.item())

    return agree if place.tensors * place.stages > 1 else bool


@dataclass
class Cut:
    """What a rank holds: `units` of its column-parallel layers (heads, say) which are split between whole ones,
    `rows` are its row-parallel layers, `absent` the blocks of other stages, `last` the last block of each stage."""

    place: Place
    units: dict[str, int] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    last: list[str] = field(default_factory=list)

    def holds(self, name: str) -> bool:
        """Whether a layer or tensor is in a block of this rank, or in no block."""
        return not any(name.startswith(f"{block}.") for block in self.absent)

    def part(self, layer: str, part: str, tensor: torch.Tensor) -> torch.Tensor:
        """Returns this rank's part of what a layer stores as `part`.

        Raises:
            Failure: `unsupported`, it does not come out even.
        """
        rank, ranks = self.place.tensor, self.place.tensors
        try:
            if layer in self.units:
                return split.column_parallel(part, tensor, self.units[layer], rank, ranks)
            if layer not in self.rows:
                return tensor
            if part == "bias" and rank:  # what is added once
                return torch.zeros_like(tensor)
            return split.row_parallel(part, tensor, rank, ranks)
        except ValueError as error:
            raise _unsupported(ranks, f"{layer}.{part}: {error}") from None


def cut(model: PreTrainedModel, place: Place) -> Cut:
    """Takes out of a model on the meta device what is other ranks', and returns what is left.

    Raises:
        Failure: `unsupported`, its layers cannot be split so, or its blocks not be shared out.
    """
    found = Cut(place)
    if place.stages > 1:
        _cut_blocks(model, found)
    if place.tensors > 1:
        _cut_layers(model, found)
    return found


def _cut_blocks(model: PreTrainedModel, found: Cut) -> None:
    """Leaves the blocks of this stage, and counts them from 0 for the KV cache, which has no others."""
    place, prefix = found.place, family_of(model).blocks
    blocks = model.get_submodule(prefix)
    kinds = set(getattr(model.config, "layer_types", None) or ())
    field = f"engine.pipeline_parallel_size: {place.stages}"
    if not family_of(model).pipeline_parallel:
        raise Failure("unsupported", f"{field}: blocks of {type(model).__name__} hand on more than one tensor; write 1")
    if len(blocks) % place.stages:
        what = f"does not divide {len(blocks)} blocks of {type(model).__name__}"
        raise Failure("unsupported", f"{field}: {what}; write 1")
    if len(kinds) > 1:  # masks and caches are chosen by the number of a block
        named = " and ".join(sorted(kinds))
        raise Failure("unsupported", f"{field}: {type(model).__name__} has blocks of {named}; write 1")
    each = len(blocks) // place.stages
    for number, block in enumerate(blocks):
        name, (stage, local) = f"{prefix}.{number}", divmod(number, each)
        if local == each - 1:
            found.last.append(name)
        if stage != place.stage:
            found.absent.append(name)
            blocks[number] = Absent(block)
            continue
        for module in block.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = local


def _cut_layers(model: PreTrainedModel, found: Cut) -> None:
    """Leaves this rank's part of each linear layer."""
    place, config, family = found.place, model.config, family_of(model)
    prefix = family.wrapper.within if family.wrapper else model.base_model_prefix
    plan = {f"{prefix}.{pattern}": style for pattern, style in (config.base_model_tp_plan or {}).items()}
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    units = {"attention": heads, "kv": kv_heads}
    for pattern, style in plan.items():
        if style not in _SPLIT + _WHOLE:
            raise _unsupported(place.tensors, f"{type(model).__name__} splits {pattern} as '{style}'")
    for name, layer in list(model.base_model.named_modules(prefix=prefix)):
        if not isinstance(layer, nn.Linear):
            continue
        style = next((style for pattern, style in plan.items() if fnmatchcase(name, pattern)), None)
        if style == "colwise":
            side = family.layer(name)
            found.units[name] = units.get(side.outputs if side else "", place.tensors)
        elif style == "rowwise":
            found.rows.append(name)
        else:
            raise _unsupported(place.tensors, f"{type(model).__name__} has no way to split {name}")
        for part, tensor in list(layer.named_parameters()):
            setattr(layer, part, nn.Parameter(found.part(name, part, tensor), requires_grad=False))
        layer.out_features, layer.in_features = layer.weight.shape
    for name, tensor in model.named_parameters():
        if family.place(name)[1].rpartition(".")[0] in family.attention.norms_of_heads and tensor.dim() > 1:
            raise _unsupported(place.tensors, f"{name} has a row for each head, of which a rank has some")
    for module in model.modules():
        if hasattr(module, "num_key_value_groups"):  # less than before where ranks share a KV head
            query, keys = (getattr(module, name) for name in (family.attention.query, family.attention.key))
            module.num_key_value_groups = query.out_features // keys.out_features


def _unsupported(ranks: int, reason: str) -> Failure:
    return Failure("unsupported", f"engine.tensor_parallel_size: {ranks}: {reason}; write 1")


def join(model: PreTrainedModel, cut: Cut) -> None:
    """Makes the finished parts of a model talk with those of the other ranks whenever it is called."""
    place = cut.place

    def add_up(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        output = output.contiguous()
        distributed.all_reduce(output, group=place.tensor_group)
        return output

    for name in cut.rows:
        model.get_submodule(name).register_forward_hook(add_up)

    def hand_on(stage: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            output = output.contiguous() if stage == place.stage else torch.empty_like(output)
            distributed.broadcast(output, group=place.pipeline_group, group_src=stage)
            return output

        return hook

    for stage, name in enumerate(cut.last):
        model.get_submodule(name).register_forward_hook(hand_on(stage))


class Absent(nn.Module):
    """A block that another stage has: hidden states pass."""

    def __init__(self, block: nn.Module):
        super().__init__()
        if hasattr(block, "attention_type"):  # by which some models choose the mask
            self.attention_type = block.attention_type

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


class ShardedExport(Export):
    """An export of which a rank reads what it holds."""

    def __init__(self, folder: Path, cut: Cut):
        super().__init__(folder)
        self._cut = cut

    @property
    def names(self) -> list[str]:
        return [name for name in super().names if self._cut.holds(name)]

    @cached_property
    def layers(self) -> dict[str, Layout]:
        return {name: layout for name, layout in Export(self.folder).layers.items() if self._cut.holds(name)}

    def tensor(self, name: str) -> torch.Tensor:
        layer, _, part = name.rpartition(".")
        whole = self.view(name)
        if part == "weight_scale" and layer in self.layers and not self.layers[layer].group_size:
            whole = whole.flatten()  # one a row, which some exports keep as a column
        return self._cut.part(layer, part, whole).clone(memory_format=torch.contiguous_format)
