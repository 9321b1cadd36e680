"""GPTQ's way through a model: a block's Gram matrices are measured, used and dropped, and so to the next block.

Where it is `sequential` they are those of the model as quantized so far, activations too: a layer is rounded for the
inputs that its product will see. Its weights are then first moved towards those that give the dense model's outputs at
these inputs: with x what the product sees and d what x lacks, W d is what its output lacks, and W E[d xᵀ] E[x xᵀ]⁻¹ the
linear function of x that is nearest to that. What rounding took from the layer's input is in d as a whole; what the
input lacks beside the dense model's with a part, `asymmetry`, since much of it is this text's. Li et al. 2025, "GPTAQ:
Efficient Finetuning-Free Quantization for Asymmetric Calibration", moves each column's part into those behind it
instead; this is the whole problem's solution by least squares, and rounding it is GPTQ's own problem. Experts are not
moved, for the dense model may give them other tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from trimtab.base.errors import Failure
from trimtab.catalog.formats import FORMATS
from trimtab.components.quantization.groups import GroupQuantizer, Quantized
from trimtab.components.quantization.methods import gptq
from trimtab.families.fusion import Group, block_of
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.measure import blockwise, grams, routing
from trimtab.runtime.measure.block import Block, Rounding
from trimtab.runtime.measure.block_calls import NotByBlock
from trimtab.runtime.rounding import hessian


@torch.inference_mode()
def quantize(
    source: Path,
    calibration: Path,
    groups: Sequence[Group],
    quantizer: GroupQuantizer,
    scratch: Path,
    is_done: bool = False,
) -> None:
    """Writes the tensors of quantized groups of each block into the scratch folder, where `read` finds them.

    Args:
        groups: of all of the model's layers.
        quantizer: its settings are given what a recipe leaves to the calibration.
        scratch: what an earlier try left there is used.
        is_done: an earlier try went through all blocks, of which some may have been read and removed.

    Raises:
        InputError: a weight that is not finite.
        Failure: `unsupported`, activations that are not finite, or a model that cannot be run a block at a time.
    """
    tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()
    quantizer.settings = settings = gptq.with_defaults(quantizer.settings, tokens.numel())
    if is_done:
        return
    with_dense = settings.follows_dense(tokens.numel())
    try:
        runner = blockwise.Runner(
            source, tokens, "quantize", "quantizing blocks", scratch, with_dense=with_dense
        )
    except NotByBlock as reason:
        what = f"GPTQ cannot run this model a block at a time: {reason}"
        raise Failure("unsupported", f"quantize.format: {what}; write int4_awq") from None
    by_number: dict[int, list[Group]] = {}
    for group in groups:
        if quantizer.form(group):
            by_number.setdefault(block_of(group.layers[0]), []).append(group)
    rare = routing.recorded(calibration)

    def work(block: Block) -> dict[str, torch.Tensor]:
        way = _in_order if settings.is_sequential(tokens.numel()) else _at_once
        found = way(block, by_number.get(block.number, []), quantizer, Export(source), rare)
        # Layers of a group share scalars, and safetensors wants memory of its own for each tensor.
        return {name: tensor.clone() if tensor.numel() == 1 else tensor for name, tensor in found.items()}

    with runner:
        for _ in runner.run(work):
            pass


def read(scratch: Path, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Returns the tensors that `quantize` wrote for the blocks of tensors of these names; {} where it did not run."""
    numbers = {block_of(name) for name in names} - {None}
    files = [path for path in (blockwise.result(scratch, number) for number in sorted(numbers)) if path.exists()]
    return {name: tensor for path in files for name, tensor in load_file(path).items()}


def _at_once(
    block: Block,
    groups: Sequence[Group],
    quantizer: GroupQuantizer,
    shard: Export,
    rare: Mapping[str, Sequence[int]],
) -> dict[str, torch.Tensor]:
    """Quantizes the groups of a block by Gram matrices of the unchanged model. Other formats than GPTQ's wait for the
    pass over the shards."""
    found: dict[str, torch.Tensor] = {}
    for quantized in _by_grams(block, _with_gptq(groups, quantizer), quantizer, shard, rare, advance=True):
        found |= quantized.tensors
    return found


def _in_order(
    block: Block,
    groups: Sequence[Group],
    quantizer: GroupQuantizer,
    shard: Export,
    rare: Mapping[str, Sequence[int]],
) -> dict[str, torch.Tensor]:
    """Quantizes the groups of a block in the order in which it comes to them, of all formats, each for what comes out
    of those before it. Those of more bits, which are rounded to nearest, make up for the errors of the others."""
    found: dict[str, torch.Tensor] = {}
    for stage in _stages(block, groups):
        experts = [group for group in stage if block.family.is_expert(group.layers[0])]
        by_gram = _with_gptq(experts, quantizer)
        made = [_moved(block, group, quantizer, shard) for group in stage if group not in experts]
        made += [quantizer.quantize(shard, g, quantizer.seen(g)) for g in experts if g.layers[0] not in by_gram]
        made += _by_grams(block, by_gram, quantizer, shard, rare)
        for quantized in made:
            found |= quantized.tensors
            for name, weight in quantized.weights.items():
                block.replace(name, weight, quantized.reads)
    return found


def _by_grams(
    block: Block,
    by_first: Mapping[str, Group],
    quantizer: GroupQuantizer,
    shard: Export,
    rare: Mapping[str, Sequence[int]],
    advance: bool = False,
) -> Iterator[Quantized]:
    """Yields groups, given by their first layer, quantized by Gram matrices that are held while they are used.

    Args:
        advance: what comes out of the block after the last of them, the next one reads.
    """
    chunks = list(grams.chunks(block, list(by_first)))
    for chunk in chunks:
        measured = grams.measure(block, chunk, rare, advance=advance and chunk is chunks[-1])
        for first in chunk:
            group = by_first[first]
            seen = replace(quantizer.seen(group), gram=measured.pop(first))
            yield quantizer.quantize(shard, group, seen)


def _with_gptq(groups: Sequence[Group], quantizer: GroupQuantizer) -> dict[str, Group]:
    """Those of the groups that are rounded by Gram matrices, by their first layer."""
    return {g.layers[0]: g for g in groups if quantizer.settings.rounding(quantizer.form(g)) == "gptq"}


def _moved(block: Block, group: Group, quantizer: GroupQuantizer, shard: Export) -> Quantized:
    """A group that every token is given to, quantized."""
    settings, first = quantizer.settings, group.layers[0]
    # How inputs are rounded goes by how large they are; what they lack is then measured of the rounded ones.
    is_rounded = FORMATS[quantizer.form(group)].storage.inputs is not None
    plain = grams.measure_beside(block, first, 0.0 if is_rounded else settings.asymmetry)
    seen = replace(quantizer.seen(group), second_moment=plain[0].diagonal().clone())

    def measure(reads: Rounding | None) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        gram, lack = plain if reads is None else grams.measure_beside(block, first, settings.asymmetry, reads)
        weights = {name: block.layers[name].weight.float() for name in quantizer.layers(group)}
        if lack is not None:
            for name, weight in weights.items():
                weights[name] = weight + hessian.solve(gram, settings.damping, weight @ lack)
        return gram, weights

    return quantizer.quantize(shard, group, seen, measure)


def _stages(block: Block, groups: Sequence[Group]) -> list[list[Group]]:
    """The groups in the order in which a block comes to them; those of experts, which stand side by side, together."""
    place: dict[str, int] = {}
    for layer, number in block.order().items():
        place.setdefault(block.family.layer(layer).name, number)
    stages: dict[float, list[Group]] = {}
    for group in groups:
        kinds = (block.family.layer(layer).name for layer in group.layers)
        stages.setdefault(min((place[kind] for kind in kinds if kind in place), default=math.inf), []).append(group)
    return [stage for _, stage in sorted(stages.items())]
