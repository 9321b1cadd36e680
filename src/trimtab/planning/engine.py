"""Sizes an engine: the smallest world in which a workload fits, and its limits, each with its reason."""

from __future__ import annotations

import math

from trimtab.base.errors import InputError
from trimtab.base.schema import Document
from trimtab.model.facts import ModelFacts
from trimtab.model.hardware import GB, Hardware
from trimtab.model.memory import Memory, memory
from trimtab.planning.checks import refusal
from trimtab.planning.parallelism import GPUS_PER_NODE, worlds
from trimtab.recipe import Engine, Recipe
from trimtab.recipe.workload import Workload

#: What stays free beside the KV cache, in bytes: CUDA's context and graphs, NCCL's buffers, the allocator's waste.
HEADROOM = 2 * GB
MAX_FRACTION = 0.9


class Line(Document):
    """One decision: a setting of the engine, its value, and why."""

    setting: str
    value: str
    why: str


class EnginePlan(Document):
    """The recipe with its engine, what that needs on each device, and the reasons."""

    recipe: Recipe
    memory: Memory
    lines: tuple[Line, ...]


def plan_engine(
    facts: ModelFacts,
    recipe: Recipe,
    hardware: Hardware,
    workload: Workload,
    gpus: int = GPUS_PER_NODE,
    gpus_per_node: int = GPUS_PER_NODE,
) -> EnginePlan:
    """Returns the engine for a workload: the smallest world that holds it, tensor before pipeline parallelism.

    Where no world of at most `gpus` devices holds all concurrent requests, the largest batch that one holds is planned,
    and the rest waits.

    Args:
        recipe: format and back end; what its `engine` says of sizes is planned anew, and its `workload` is dropped.

    Raises:
        InputError: the workload is longer than the model's context, the target cannot run the recipe, or not even one
            request fits.
    """
    check_length(facts, workload)
    if gpus < 1:
        raise InputError(f"gpus: {gpus} is not valid; write 1 or more")
    refused: dict[str, str] = {}  # world -> why not
    batches = [workload.concurrency // 2**n for n in range(workload.concurrency.bit_length())]
    for batch in batches:
        for tensor, pipeline in worlds(gpus if recipe.engine.backend != "torch" else 1, gpus_per_node):
            engine = _engine(recipe, workload.of_batch(batch), tensor, pipeline)
            placed = recipe.model_copy(update={"engine": engine, "workload": None})
            name = f"{tensor} x {pipeline}"
            if reason := refusal(placed, hardware, facts):
                refused.setdefault(name, reason)
                continue
            placed, need = _with_fraction(placed, facts, hardware)
            if need.fits:
                lines = _explain(placed, need, facts, hardware, workload, refused)
                return EnginePlan(recipe=placed, memory=need, lines=tuple(lines))
            refused.setdefault(name, need.explanation)
    name, reason = list(refused.items())[-1]
    raise InputError(f"target: not one request fits on {gpus} {hardware.name}; on {name}: {reason}")


def check_length(facts: ModelFacts, workload: Workload) -> None:
    """Refuses a workload that is longer than the model's context."""
    longest = facts.max_position_embeddings
    if workload.longest > longest:
        lengths = f"input.max {workload.input.max:,} and output.max {workload.output.max:,} make"
        what = "total is" if workload.total else lengths
        raise InputError(
            f"workload: {what} {workload.longest:,} tokens, and the model reads {longest:,}; write shorter ones"
        )


def _engine(recipe: Recipe, workload: Workload, tensor: int, pipeline: int) -> Engine:
    chunked = workload.input.max > workload.step and recipe.engine.backend != "torch"
    return recipe.engine.model_copy(
        update={
            "tensor_parallel_size": tensor,
            "pipeline_parallel_size": pipeline,
            "max_batch_size": workload.concurrency,
            "max_seq_len": workload.longest,
            # Without chunks a prompt must fit into one step.
            "max_num_tokens": workload.step if chunked else max(workload.step, workload.input.max),
            "enable_chunked_prefill": chunked,
            "kv_cache_fraction": MAX_FRACTION,
            "kv_cache_tokens": workload.held,
        }
    )


def _with_fraction(recipe: Recipe, facts: ModelFacts, hardware: Hardware) -> tuple[Recipe, Memory]:
    """Gives the KV cache what leaves `HEADROOM` free, nine tenths at most."""
    need = memory(facts, recipe, hardware)
    free = need.free
    share = math.floor(100 * (free - HEADROOM) / free) / 100 if free > HEADROOM else 0.01
    engine = recipe.engine.model_copy(update={"kv_cache_fraction": min(max(share, 0.01), MAX_FRACTION)})
    recipe = recipe.model_copy(update={"engine": engine})
    return recipe, memory(facts, recipe, hardware)


def _explain(
    recipe: Recipe, need: Memory, facts: ModelFacts, hardware: Hardware, workload: Workload, refused: dict[str, str]
) -> list[Line]:
    engine = recipe.engine
    free = need.free
    each = need.kv_cache // engine.kv_cache_tokens
    tokens = int(free * engine.kv_cache_fraction) // max(each, 1)
    waiting = workload.concurrency - engine.max_batch_size
    ways = f"{facts.heads} attention heads, {facts.kv_heads} KV heads, {facts.layers} blocks"
    chosen = f"{engine.tensor_parallel_size} x {engine.pipeline_parallel_size}"
    smaller = [f"{name}: {why}" for name, why in refused.items() if name != chosen]
    lines = [
        ("tensor x pipeline", chosen,
         f"the smallest world of {hardware.name} that holds it, of {ways}" if smaller else "one device holds it"),
        *(("", "", f"not {reason}") for reason in smaller),
        ("weights", f"{need.weights / GB:.2f} GB", f"of {need.available / GB:.0f} GB on each device"),
        ("activations", f"{need.activations / GB:.2f} GB", f"an estimate, a step of {engine.max_num_tokens:,} tokens"),
        ("max_batch_size", f"{engine.max_batch_size:,}",
         f"{workload.concurrency:,} requests at a time" + (f", of which {waiting:,} wait for room" if waiting else "")),
        ("max_seq_len", f"{engine.max_seq_len:,}",
         "the longest prompt with its answer" if workload.total else
         f"the longest prompt, {workload.input.max:,}, and the longest answer, {workload.output.max:,}"),
        ("max_num_tokens", f"{engine.max_num_tokens:,}",
         f"a token for each of {engine.max_batch_size:,} requests and a long prompt of {workload.input.p95:,}"),
        ("enable_chunked_prefill", str(engine.enable_chunked_prefill).lower(),
         "longer prompts are read in parts" if engine.enable_chunked_prefill else "every prompt fits into a step"),
        ("kv_cache_tokens", f"{engine.kv_cache_tokens:,}",
         f"needed: {engine.max_batch_size:,} x ({workload.input.p95:,} + {workload.output.p95:,}) or one of "
         f"{workload.longest:,}, at {each:,} bytes {need.kv_cache / GB:.2f} GB"),
        ("kv_cache_fraction", f"{engine.kv_cache_fraction:.2f}",
         f"of {free / GB:.2f} GB free, {HEADROOM / GB:.0f} GB stay for CUDA and NCCL: room for {tokens:,} tokens, "
         f"{tokens // engine.max_seq_len:,} requests of the longest"),
    ]  # fmt: skip
    return [Line(setting=setting, value=value, why=why) for setting, value, why in lines]
