"""What each stage of a recipe needs before it runs: devices and their memory, the machine's memory, disk, time.

Memory is `model.working_memory`'s and `model.memory`'s. Time is an estimate: bytes that are read over a disk's speed,
and products over a part of what the device multiplies; it tells minutes from hours.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from trimtab.base.schema import Document
from trimtab.model import working_memory
from trimtab.model.facts import ModelFacts
from trimtab.model.hardware import GB, Hardware, machine_memory
from trimtab.model.working_memory import CONTEXT, PROCESS, SLACK, Held, Work
from trimtab.recipe import MovementPruning, Recipe, SparsePruning
from trimtab.recipe.evaluation import Evaluation

#: Bytes a second that a disk reads, and the seconds in which a process begins.
_DISK, _START = 1.5e9, {"cpu": 8.0, "cuda": 15.0}
#: Products a second, for each byte a second of a GPU's memory: data sheets have 200 (A100, H200) to 400 (L4) of them in
#: 16 bits, of which training and prefill reach about 40 %. For each core of a CPU, in float32.
_PER_BYTE, _PER_CORE = 100, 15e9
#: Bytes a second that a core of a CPU moves.
_CORE_BANDWIDTH = 4e9
#: Tokens that an item of a task has with its answers; and how many answers, for each of which an engine that goes block
#: by block reads the context.
_ITEM_TOKENS, _ANSWERS = 150, 4


class Resources(Document):
    """What a stage needs, or has used: `gpus`, and of each of them `gpu_bytes`; of the machine `host_bytes` of memory
    and `disk_bytes` of scratch; `seconds`, before it runs an estimate."""

    gpus: int = 0
    gpu_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    seconds: float = 0.0


class _Row(NamedTuple):
    """When a recipe asks for a stage, what its work holds, and its cost: bytes that are read, and products (a
    multiplication and an addition are two)."""

    wanted: Callable[[Recipe], bool]
    held: Callable[[Work], Held]
    read: Callable[[Work], float]
    products: Callable[[Work], float]
    devices: Callable[[Recipe], int] = lambda recipe: 1


def _needs_statistics(recipe: Recipe) -> bool:
    return (recipe.prune is not None and recipe.prune.needs_statistics) or _quantize(recipe, "needs_statistics")


def _quantize(recipe: Recipe, what: str) -> bool:
    return recipe.quantize is not None and getattr(recipe.quantize, what)


def _text(work: Work) -> tuple[int, int]:
    calibrate = work.recipe.calibrate
    return calibrate.samples * calibrate.length, calibrate.length


def _forward(facts: ModelFacts, tokens: float) -> float:
    """Products of a pass; of experts a token passes as many as it is given to."""
    active = facts.linear_parameters
    if facts.experts:
        active *= (facts.experts_per_token + 1) / (facts.experts + 1)
    return 2 * tokens * active


def _pruning(work: Work) -> Held:
    facts, left = work.facts, work.left
    if isinstance(work.recipe.prune, SparsePruning) and work.recipe.prune.method == "sparsegpt":
        grams = working_memory.gram_bytes(facts, block=True)
        tokens, length = _text(work)
        between = work.width * tokens * facts.hidden_size
        return work.measuring(facts, tokens, length, 3 * grams, disk=facts.bytes * 2 + 2 * between)
    if isinstance(work.recipe.prune, SparsePruning) and work.recipe.prune.allocation == "sensitivity":
        return working_memory.measuring_gradients(work, *_text(work))._replace(disk=2 * facts.bytes)
    return work.rewriting(facts, left.bytes)


def _quantizing(work: Work) -> Held:
    rewriting = work.rewriting(work.left, work.export_bytes)
    if not _quantize(work.recipe, "needs_grams"):
        return rewriting
    return Held(*map(max, working_memory.rounding_by_gptq(work, *_text(work)), rewriting))


def _quantizing_products(work: Work) -> float:
    """Of GPTQ a factorization and updates, of each of its sweeps updates, and passes over the text: two at once; in
    order three, since a block runs up to each group of its layers, and once more where inputs are rounded, and as many
    of the dense model. Of a search of scales some sixty roundings of each weight."""
    row, facts = work.recipe.quantize.row, work.left
    if not row.parts:
        return 0.0
    found = 40 * facts.linear_parameters
    if any(part.channels == "awq" for part in row.parts):
        found += 60 * 10 * facts.linear_parameters
    if _quantize(work.recipe, "needs_grams"):
        tokens, quantize = _text(work)[0], work.recipe.quantize
        streams = 1 + quantize.follows_dense(tokens)
        again = 2 if any(part.storage.inputs for part in row.parts) else 1
        passes = 3 * again * streams if quantize.is_sequential(tokens) else 2
        updates = 2 * (1 + quantize.sweeps_with(tokens))
        found += passes * _forward(facts, tokens) + streams * tokens * working_memory.gram_bytes(facts)
        sizes = ((layer.in_features, layer.parameters) for layer in facts.linears)
        found += sum(2 * inputs**3 + updates * inputs * weights for inputs, weights in sizes)
    return found


def _opening(work: Work) -> Held:
    """An engine, and a short prompt."""
    recipe = work.recipe
    return work.by_block(recipe, _ITEM_TOKENS) if recipe.engine.by_block else Held(work.opened(recipe))


def _world(recipe: Recipe) -> int:
    return recipe.engine.world_size


def _trained_tokens(work: Work) -> float:
    return work.recipe.distill.tokens


def _training_products(work: Work) -> float:
    tokens = _trained_tokens(work)
    return 3 * _forward(work.left, tokens) + _forward(work.facts, tokens)


#: By the names of `stages.STAGES`, in the order of an attempt.
ROWS: dict[str, _Row] = {
    "calibrate": _Row(
        _needs_statistics,
        lambda work: work.measuring(work.facts, *_text(work)),
        lambda work: work.facts.bytes,
        lambda work: _forward(work.facts, _text(work)[0]),
    ),
    "prune": _Row(
        lambda recipe: recipe.prune is not None and not isinstance(recipe.prune, MovementPruning),
        _pruning,
        lambda work: 2 * work.facts.bytes,
        lambda work: 2 * _forward(work.facts, _text(work)[0]) + 100 * work.facts.linear_parameters,
    ),
    "generate": _Row(
        lambda recipe: recipe.distill is not None and recipe.distill.generate > 0,
        Work.written_text,
        lambda work: work.facts.bytes,
        lambda work: 3 * _forward(work.facts, work.recipe.distill.generate),
    ),
    "teach": _Row(
        lambda recipe: recipe.distill is not None and recipe.distill.stored_logits > 0,
        Work.stored_logits,
        lambda work: work.facts.bytes,
        lambda work: _forward(work.facts, _trained_tokens(work)),
    ),
    "distill": _Row(
        lambda recipe: recipe.distill is not None,
        working_memory.training,
        lambda work: work.facts.bytes + work.left.bytes,
        lambda work: _training_products(work) / (work.recipe.distill.processes if work.device == "cuda" else 1),
        lambda recipe: recipe.distill.processes,
    ),
    "recalibrate": _Row(
        lambda recipe: _quantize(recipe, "needs_statistics"),
        lambda work: work.measuring(work.left, *_text(work)),
        lambda work: work.left.bytes,
        lambda work: _forward(work.left, _text(work)[0]),
    ),
    "sensitivity": _Row(
        lambda recipe: _quantize(recipe, "needs_sensitivity"),
        lambda work: working_memory.measuring_gradients(work, *_text(work)),
        lambda work: work.left.bytes,
        lambda work: 4 * _forward(work.left, min(_text(work)[0], 4096)) + 2000 * work.left.linear_parameters,
    ),
    "quantize": _Row(
        lambda recipe: recipe.quantize is not None,
        _quantizing,
        lambda work: work.left.bytes + 2 * work.export_bytes,
        _quantizing_products,
    ),
    "engine": _Row(
        lambda recipe: True,
        _opening,
        lambda work: work.export_bytes,
        lambda work: 0.0,
        _world,
    ),
}
JUDGE = "validate"


def needs(
    facts: ModelFacts,
    recipe: Recipe,
    hardware: Hardware,
    baseline: Recipe | None = None,
    evaluation: Evaluation | None = None,
) -> dict[str, Resources]:
    """Returns what each stage needs that the recipe asks for, and validation, in their order.

    Args:
        facts: of the model before anything is done to it.
        baseline: the unchanged model, as it is served: validation measures both. None where it is the recipe itself.
        evaluation: what is measured; the default if absent.
    """
    work = Work(facts, recipe, hardware)
    found = {}
    for name, row in ROWS.items():
        if row.wanted(recipe):
            found[name] = _need(work, row.held(work), row.read(work), row.products(work), row.devices(recipe))
    found[JUDGE] = _judging(work, baseline, evaluation or Evaluation())
    return found


def _judging(work: Work, baseline: Recipe | None, evaluation: Evaluation) -> Resources:
    """Both engines where they have room beside each other, else the larger; the first look and the confirmation."""
    engines = [work.recipe, *([baseline] if baseline else [])]
    whole = [recipe for recipe in engines if not recipe.engine.by_block]
    sizes = [work.served(recipe) for recipe in whole]
    weights = sum(sizes)
    half = work.hardware.memory_bytes / 2
    held = Held(weights if weights <= half else max(sizes, default=0))
    items = evaluation.items[0] + evaluation.confirm_items
    windows = evaluation.windows[0] + evaluation.confirm_windows
    tokens = items * _ITEM_TOKENS + windows * evaluation.window_tokens
    read = 2 * work.export_bytes + work.facts.bytes * len(whole)
    products = _forward(work.facts, tokens) * len(whole)
    for recipe in engines:
        if recipe.engine.by_block:
            asked = max(evaluation.items[0], evaluation.confirm_items) * _ANSWERS * _ITEM_TOKENS
            blocks = work.by_block(recipe, asked)
            beside = held.device if held.device <= half else 0
            held = Held(max(held.device, beside + blocks.device), blocks.host)
            read += 2 * 2 * work.facts.bytes  # a look, and the confirmation, ask it for windows and for items
            products += _forward(work.facts, tokens * _ANSWERS)
    # Decoding reads the weights for every token: some four hundred steps a measurement of speed.
    steps = 400 * len(whole) * work.facts.bytes / _bandwidth(work.hardware)
    devices = max(recipe.engine.world_size for recipe in engines)
    need = _need(work, held, read, products, devices)
    return need.model_copy(update={"seconds": round(need.seconds + steps, 1)})


def _need(work: Work, held: Held, read: float, products: float, devices: int) -> Resources:
    seconds = _START[work.device] + read / _DISK + products / _speed(work.hardware)
    process, on_gpu = PROCESS[work.device], work.device == "cuda"
    return Resources(
        gpus=devices if on_gpu else 0,
        gpu_bytes=round(CONTEXT + SLACK * held.device) if on_gpu else 0,
        host_bytes=round(process + held.host + (0 if on_gpu else held.device)),
        disk_bytes=round(held.disk),
        seconds=round(seconds, 1),
    )


def _bandwidth(hardware: Hardware) -> float:
    return hardware.bandwidth or _CORE_BANDWIDTH * min(os.cpu_count() or 1, 16)


def _speed(hardware: Hardware) -> float:
    return hardware.bandwidth * _PER_BYTE if hardware.bandwidth else _PER_CORE * (os.cpu_count() or 1)


def lacking(need: Resources, memory_bytes: int, free_disk_bytes: int) -> str | None:
    """Returns what a machine lacks for a stage, with figures, or None.

    Args:
        memory_bytes: that a process of the machine may use.
        free_disk_bytes: where scratch is written.
    """
    for what, asked, there in (
        ("of this machine's memory", need.host_bytes, memory_bytes),
        ("of scratch disk", need.disk_bytes, free_disk_bytes),
    ):
        if asked > there:
            return f"needs {asked / GB:,.1f} GB {what}, and there are {there / GB:,.1f} GB"
    return None


def lacking_here(found: Mapping[str, Resources], scratch: Path) -> tuple[str, str] | None:
    """Returns the first stage that this machine cannot do, and what it lacks for it; None where it can do all.

    Args:
        scratch: a folder, which need not be there yet.
    """
    there = next(folder for folder in (scratch, *scratch.absolute().parents) if folder.is_dir())
    memory_bytes, free = machine_memory(), shutil.disk_usage(there).free
    for stage, need in found.items():
        if lack := lacking(need, memory_bytes, free):
            return stage, lack
    return None


def quantity(size: int) -> str:
    """Returns bytes of memory as Kubernetes has them, with a quarter more than is forecast: '12Gi'."""
    return f"{math.ceil(1.25 * size / 2**30)}Gi"


def columns(need: Resources) -> tuple[str, str, str, str]:
    """Returns what people read: devices with their memory, the machine's memory, scratch disk, and time."""
    devices = f"{need.gpus} x {_gigabytes(need.gpu_bytes)}" if need.gpus else "–"
    minutes = need.seconds / 60
    time = f"{minutes:.0f} min" if minutes >= 9.5 else f"{minutes:.1f} min"
    return devices, _gigabytes(need.host_bytes), _gigabytes(need.disk_bytes) if need.disk_bytes else "–", time


def _gigabytes(size: int) -> str:
    return f"{size / GB:.0f} GB" if size >= 9.5 * GB else f"{size / GB:.1f} GB"
