"""The engine that serves a recipe: sized for a workload, or within a goal's limits as far as there is memory."""

from __future__ import annotations

from collections.abc import Iterator

from trimtab.catalog.formats import FORMATS
from trimtab.errors import InputError
from trimtab.hardware import Hardware, check
from trimtab.memory import memory
from trimtab.model import ModelFacts
from trimtab.recipe import Engine, Recipe
from trimtab.serving.parallelism import worlds
from trimtab.serving.plan import plan_engine
from trimtab.serving.workload import Workload

MAX_GPUS = 8
#: The shortest context worth serving, in tokens: a plan reduces the batch, then the context down to it.
MIN_CONTEXT = 2048

#: goal -> (max_batch_size, max_seq_len, max_num_tokens, least batch); a length of 0 is the model's own.
SERVING = {
    "lower_latency": (8, 4096, 8192, 1),
    "higher_throughput": (256, 4096, 16384, 16),
    "fit_larger_model": (8, 2048, 8192, 1),
    "long_context": (4, 0, 8192, 1),
    "lower_cost": (128, 4096, 8192, 16),
}


def place(
    recipe: Recipe, goal: str, facts: ModelFacts, hardware: Hardware, workload: Workload | None = None
) -> tuple[Recipe | None, str]:
    """Gives a recipe its engine: the workload's, or the goal's limits, then a smaller batch, a shorter context,
    more devices.

    Returns the recipe and a note for its reason; or None, and why nothing fits. An emulated format, of weights
    or of the KV cache, is placed only when the user asks for it: it judges accuracy and makes nothing smaller
    or faster.
    """
    if hardware.is_emulated(recipe) or hardware.is_kv_cache_emulated(recipe):
        return None, f"{recipe.title}: only emulated on {hardware.name}"
    if workload:
        try:
            placed = sized(recipe, facts, hardware, workload)
        except InputError as error:
            return None, f"{recipe.title}: {error}"
        return placed, "; ".join([*_devices(placed, hardware), for_workload(workload, placed)])
    reason = ""
    for engine in _engines(goal, recipe, facts, hardware.compute_capability is not None):
        placed = recipe.model_copy(update={"engine": engine})
        if cannot := check(placed, hardware, facts):
            reason = reason or cannot
            continue
        need = memory(facts, placed, hardware)
        if need.fits:
            return placed, "".join(_devices(placed, hardware))
        reason = need.explanation
    return None, f"{recipe.title}: {reason}"


def sized(recipe: Recipe, facts: ModelFacts, hardware: Hardware, workload: Workload) -> Recipe:
    """Returns the recipe with an engine for the workload.

    Its context is `MIN_CONTEXT` at least, however short requests are: what is measured before a release needs some.

    Raises:
        InputError: the workload is beyond the model's context, or does not fit.
    """
    total = max(workload.longest, min(MIN_CONTEXT, facts.max_position_embeddings))
    return plan_engine(facts, recipe, hardware, workload.model_copy(update={"total": total}), MAX_GPUS).recipe


def for_workload(workload: Workload, recipe: Recipe) -> str:
    held = recipe.engine.max_batch_size
    waiting = f", of which {held:,} are served at once" if held < workload.concurrency else ""
    return f"for {workload.concurrency:,} requests at a time{waiting}, of at most {workload.longest:,} tokens"


def _engines(goal: str, recipe: Recipe, facts: ModelFacts, on_gpu: bool) -> Iterator[Engine]:
    batch, length, tokens, least = SERVING[goal]
    backend = recipe.engine.backend
    chunked = goal in ("higher_throughput", "long_context", "lower_cost")
    if backend == "torch":  # its packed kernels serve so many rows, and it has no chunked prefill
        batch, length, tokens, least = min(batch, 64 if on_gpu else 16), min(length, MIN_CONTEXT), 8192, 1
        chunked = False
    elif goal == "lower_latency" and FORMATS[recipe.weight_format].is_four_bit_weight_only:
        batch = 1  # weight-only INT4 is faster at batch 1 and slower at 8 (`catalog.formats`)
    longest = facts.max_position_embeddings
    length = min(length or longest, longest)
    lengths = [length // 2**n for n in range(32) if n == 0 or length // 2**n >= MIN_CONTEXT]
    batches = [batch // 2**n for n in range(batch.bit_length()) if batch // 2**n >= min(least, batch)]
    # The embedded engine spreads a model where a recipe says so: it serves on one device.
    for tensor, pipeline in worlds(1 if backend == "torch" else MAX_GPUS):
        for length_ in lengths:
            for batch_ in batches:
                yield Engine(
                    backend=backend,
                    tensor_parallel_size=tensor,
                    pipeline_parallel_size=pipeline,
                    max_batch_size=batch_,
                    max_seq_len=length_,
                    # Without chunks a prompt must fit into one step.
                    max_num_tokens=tokens if chunked else max(tokens, length_),
                    enable_chunked_prefill=chunked,
                )


def _devices(recipe: Recipe, hardware: Hardware) -> list[str]:
    devices = recipe.engine.world_size
    return [f"needs {devices} {hardware.name}"] if devices > 1 else []
