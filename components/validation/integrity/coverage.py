"""Does the export hold what the recipe asks for: these layers in this format, these tensors, so many bytes?"""

from __future__ import annotations

from collections.abc import Sequence
from glob import escape
from pathlib import Path

import torch

from trimtab import families
from trimtab.base.errors import Failure
from trimtab.catalog.kv_caches import KV_CACHES
from trimtab.families import Family
from trimtab.families.fusion import Group
from trimtab.model import linear_layers, memory
from trimtab.model.facts import ModelFacts
from trimtab.model.files import is_computed
from trimtab.model.headers import read_header
from trimtab.recipe import Quantization, Recipe
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.layer_layout import Layout
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.kv_cache import emulated

#: How far the bytes of all tensors may be from what planning predicts, which counts a scale as two bytes and those of
#: inputs not at all. Measured over all formats: 0.1 % in SmolLM2-135M, 3.0 % where layers are 64 wide.
BYTES_TOLERANCE = 0.05


def check_layers(export: Export, facts: ModelFacts, groups: Sequence[Group], settings: Quantization | None) -> None:
    """Compares the quantized layers with those of the recipe, and each layer's format with the recipe's.

    Args:
        facts: of the source.
        groups: all linear layers of the model.
        settings: the recipe's `quantize`, or None.

    Raises:
        Failure: `export_damaged`; names the layer that is quantized and should not be, is not and should be, or is
            stored in another way than asked for.
    """
    found = export.layers
    asked = settings is not None and not settings.row.is_cast
    wanted = {layer.name for layer in linear_layers.quantized_layers(facts, settings)} if asked else set()
    for layer in sorted(found.keys() - wanted):
        form = f"{settings.format} without it" if asked else "no quantized layer"
        raise _damaged(layer, f"is quantized ({found[layer].algo}), the recipe asks for {form}")
    if not asked:
        return
    _check_left_out(found, wanted, groups, None if settings.row.keeps_plain else settings.exclude_sensitive)
    for layer in sorted(found):
        _check_layout(layer, found[layer], settings)
    if settings.row.mixes:
        for group in groups:
            layouts = [found[layer] for layer in group.layers if layer in found]
            if len(set(layouts)) > 1:
                algos = ", ".join(layout.algo for layout in layouts)
                raise _damaged(group.layers[0], f"is fused with {', '.join(group.layers[1:])}, but they have {algos}")
        counted = sorted(wanted if settings.row.keeps_plain else found)
        bits = layer_layout.mean_bits(facts, found, counted)
        if bits > settings.effective_bits + 1e-6:
            each = {layer: found[layer].bits if layer in found else 16 for layer in counted}
            widest = max(counted, key=each.__getitem__)
            what = f"weights have {bits:.2f} bits in the mean, the recipe allows {settings.effective_bits:g}"
            raise Failure("export_damaged", f"{what}; {widest} is one of those with {each[widest]}")


def _check_left_out(found: dict[str, Layout], wanted: set[str], groups: Sequence[Group], number: int | None) -> None:
    """Whole groups are left out, and as many as the recipe says; any where that is None."""
    left_out = []
    for group in groups:
        layers = [layer for layer in group.layers if layer in wanted]
        left = [layer for layer in layers if layer not in found]
        if left and (len(left) < len(layers) or number == 0):
            total = len(wanted - found.keys())
            raise _damaged(left[0], f"is not quantized ({total} layer{'s' * (total != 1)} in all)")
        left_out += [left[0]] if left else []
    if number is not None and len(left_out) != number:
        names = f" ({', '.join(left_out)})" if left_out else ""
        what = f"{len(left_out)} groups of layers are not quantized{names}, the recipe leaves {number} out"
        raise Failure("export_damaged", what)


def _check_layout(layer: str, layout: Layout, settings: Quantization) -> None:
    asked = [layer_layout.layout_of(form, settings) for form in settings.layer_formats]
    sizes = {other.algo: other.group_size for other in asked}
    if layout.algo not in sizes:
        raise _damaged(layer, f"is stored as {layout.algo}, {settings.format} is {' or '.join(sizes)}")
    if layout.group_size != sizes[layout.algo]:
        raise _damaged(layer, f"has groups of {layout.group_size}, the recipe asks for {sizes[layout.algo]}")


def check_tensors(export: Export, source: Export, facts: ModelFacts) -> None:
    """Compares the names of the tensors: those of the source, and the scales of quantized layers and KV cache.

    Raises:
        Failure: `export_damaged`; names a tensor that is missing, superfluous, or a second output head that differs
            from the embedding which it is.
    """
    family = families.named(facts.model_type)
    head = f"{family.head}.weight"
    needed = set(source.names) - ({head} if facts.tied_embeddings else set())
    needed |= {f"{layer}.{scale}" for layer, layout in export.layers.items() for scale in layout.scales}
    allowed = {f"{layer}.pre_quant_scale" for layer in export.layers}
    if export.kv_cache_algo:
        allowed |= {scale for layer in attention_layers(facts) for scale in emulated.scales(export, family, layer)}
    for name in sorted(needed):
        if not export.has(name):
            raise Failure("export_damaged", f"{name}: is missing")
    for name in sorted(set(export.names) - needed - allowed):
        if name == head and facts.tied_embeddings:
            _check_head(export, family)
        else:
            raise Failure("export_damaged", f"{name}: is superfluous, neither its source nor its format has it")


def _check_head(export: Export, family: Family) -> None:
    """A tied head that is stored all the same must be the embedding: engines differ in which of the two they use."""
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    if not torch.equal(export.tensor(head), export.tensor(embedding)):
        what = f"is tied to {embedding}, but stored a second time with other numbers"
        raise Failure("export_damaged", f"{head}: {what}")


def attention_layers(facts: ModelFacts) -> list[str]:
    """Returns the modules that have a KV cache with scales: those with a layer of its own for keys."""
    attention = families.named(facts.model_type).attention
    keys = f".{attention.scaled[0]}" if attention.scaled else None
    return sorted(layer.name.rpartition(".")[0] for layer in facts.linears if keys and layer.name.endswith(keys))


def check_kv_cache(asked: str, export: Export, facts: ModelFacts) -> None:
    """Compares the KV cache of an export with the one that its recipe asks for.

    Both scales of every attention layer must be there, in FP8 too: an export holds whatever was calibrated,
    however small, so a scale that is absent was never measured, and TensorRT-LLM would take it for 1 in silence.

    Args:
        asked: the recipe's `kv_cache`.
        facts: of what the export was made from.

    Raises:
        Failure: `export_damaged`; names the layer: another format than asked for, or a scale that is missing or
            not one finite, positive number. `unsupported`; a model without such layers.
    """
    layers, family = attention_layers(facts), families.named(facts.model_type)
    wanted, found = KV_CACHES[asked].algorithm, export.kv_cache_algo
    if found != wanted:
        where = f"{layers[0]} ({len(layers)} layers in all)" if layers else "the config"
        reason = f"{where}: the export says {found or '16 bits'} of its KV cache, the recipe asks for {asked}"
        raise Failure("export_damaged", reason)
    if wanted is None:
        return
    if not layers:
        raise Failure("unsupported", f"a KV cache in {asked}: the model has no attention layer with keys of its own")
    for layer in layers:
        for name, scale in emulated.scales(export, family, layer).items():
            if scale is None:
                raise emulated.missing_scale(name, wanted)


def check_bytes(
    export: Export, facts: ModelFacts, groups: Sequence[Group], settings: Quantization | None
) -> tuple[int, int]:
    """Returns the bytes of all tensors in the folder's safetensors, and those that planning predicts.

    Files that the index does not name count too: they would travel with the model. Of a model unchanged, what
    transformers computes, and a head that is the embedding once more, count as little as in planning.

    Args:
        facts, groups, settings: as of `check_layers`, which has passed.

    Raises:
        Failure: `export_damaged`; they differ by more than `BYTES_TOLERANCE`.
    """
    tensors = [tensor for path in _weight_files(export.folder) for tensor in read_header(path)]
    if settings is None:
        again = f"{families.named(facts.model_type).head}.weight" if facts.tied_embeddings else None
        tensors = [t for t in tensors if t.name != again and not is_computed(t.name, t.shape)]
    found = sum(tensor.end - tensor.begin for tensor in tensors)
    predicted = _predicted(export, facts, groups, settings)
    if abs(found - predicted) > BYTES_TOLERANCE * predicted:
        form = settings.format if settings else "the model unchanged"
        what = f"its tensors take {found:,} bytes, {predicted:,} are predicted for {form}"
        raise Failure("export_damaged", f"{what}: a difference of {found / predicted - 1:+.0%}")
    return found, predicted


def _weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _predicted(export: Export, facts: ModelFacts, groups: Sequence[Group], settings: Quantization | None) -> int:
    if settings is None:
        return facts.bytes
    if not settings.row.is_cast:  # which groups are left out, and the bits that a budget left, planning cannot know
        left_out = [layer for group in groups for layer in group.layers if layer not in export.layers]
        patterns = (*settings.exclude, *(escape(layer) for layer in left_out))
        bits = layer_layout.mean_bits(facts, export.layers) if settings.effective_bits else None
        settings = settings.model_copy(update={"exclude": patterns, "effective_bits": bits})
    return sum(memory.weight_bytes(facts, Recipe(quantize=settings)))


def _damaged(layer: str, what: str) -> Failure:
    return Failure("export_damaged", f"{layer}: {what}")
