"""The engine that serves a recipe: sized for a workload, or within a goal's limits as far as there is memory."""

from __future__ import annotations

from collections.abc import Iterator

from trimtab.base.errors import InputError
from trimtab.catalog.formats import FORMATS
from trimtab.catalog.goals import GOALS
from trimtab.model.facts import ModelFacts
from trimtab.model.hardware import GB, GPUS, Hardware
from trimtab.model.memory import least_training, memory, trainable
from trimtab.model.working_memory import Work
from trimtab.planning.checks import refusal
from trimtab.planning.engine import plan_engine
from trimtab.planning.parallelism import worlds
from trimtab.recipe import Engine, Recipe
from trimtab.recipe.workload import Workload

MAX_GPUS = 8
#: The shortest context worth serving, in tokens: a plan reduces the batch, then the context down to it.
MIN_CONTEXT = 2048


def place(
    recipe: Recipe, goal: str, facts: ModelFacts, hardware: Hardware, workload: Workload | None = None
) -> tuple[Recipe | None, str]:
    """Gives a recipe its engine: the workload's, or the goal's limits, then a smaller batch, a shorter context,
    more devices.

    Returns the recipe and a note for its reason; or None, and why nothing fits. An emulated format, of weights
    or of the KV cache, is placed only when the user asks for it: it judges accuracy and makes nothing smaller
    or faster. A training gets the devices, the accumulation and the checkpointing with which the target holds it, or is
    not placed.
    """
    if hardware.is_emulated(recipe) or hardware.is_kv_cache_emulated(recipe):
        return None, f"{recipe.title}: only emulated on {hardware.name}"
    if recipe.distill:
        most = most_devices(recipe, hardware)
        trained = trainable(facts, recipe, hardware, most)
        if trained is None:
            return None, f"{recipe.title}: {least_training(facts, recipe, hardware, most).explanation}"
        recipe = trained
    if workload:
        try:
            placed = sized(recipe, facts, hardware, workload)
        except InputError as error:
            return None, f"{recipe.title}: {error}"
        return placed, "; ".join([*_devices(placed, hardware), for_workload(workload, placed)])
    reason = ""
    for engine in _engines(goal, recipe, facts, hardware):
        placed = recipe.model_copy(update={"engine": engine})
        if cannot := refusal(placed, hardware, facts):
            reason = reason or cannot
            continue
        need = memory(facts, placed, hardware)
        if need.fits:
            return placed, "; ".join(_devices(placed, hardware))
        reason = need.explanation
    return None, f"{recipe.title}: {reason}"


def sized(recipe: Recipe, facts: ModelFacts, hardware: Hardware, workload: Workload) -> Recipe:
    """Returns the recipe with an engine for the workload.

    Its context is `MIN_CONTEXT` at least, however short requests are: what is measured before a release needs some.

    Raises:
        InputError: the workload is beyond the model's context, or does not fit.
    """
    total = max(workload.longest, min(MIN_CONTEXT, facts.max_position_embeddings))
    asked, gpus = workload.model_copy(update={"total": total}), _most_devices(hardware)
    return plan_engine(facts, recipe, hardware, asked, gpus).recipe


def baseline(
    goal: str,
    facts: ModelFacts,
    hardware: Hardware,
    like: Engine,
    workload: Workload | None = None,
    devices: int = 1,
) -> tuple[Recipe, str]:
    """Returns the unchanged model with an engine of its own: the smallest world of the target that serves it; where
    none does, and the goal needs no speed of it, one that scores it a block at a time.

    It is served as an attempt is, as far as there is memory: on as many devices as 16 bits take (tensor before
    pipeline parallelism), there with the longest context, then the largest batch that fits. Where the goal is made of
    large batches the world holds its least batch, if any does: starved of memory for requests, the model would be slow
    for want of devices, and every recipe would seem to gain. A workload sizes it as it sizes every other engine.

    Args:
        like: the engine of the first attempt, whose back end, batch and lengths are the most that is asked for.
        devices: the least that the user asks for.

    Returns:
        The recipe, and a sentence on how the model is served.

    Raises:
        InputError: no world of at most `MAX_GPUS` devices holds the model in 16 bits, and the goal needs its speed, or
            one device does not even hold two blocks of it; says what does.
    """
    if workload:
        try:
            placed = sized(Recipe(engine=Engine(backend=like.backend)), facts, hardware, workload)
            return placed, _served(placed, hardware)
        except InputError:  # it may be served all the same, by more devices than `sized` asks for or in parts of it
            pass
    reason, least = "", min(GOALS[goal].least_batch, like.max_batch_size)
    for engine in (*_smaller(like, hardware, facts, devices, least), *_smaller(like, hardware, facts, devices)):
        placed = Recipe(engine=engine)
        if cannot := refusal(placed, hardware, facts):
            reason = reason or cannot
            continue
        need = memory(facts, placed, hardware)
        if need.fits:
            return placed, _served(placed, hardware)
        reason = need.explanation
    blocks = _by_block(like, facts)
    goals = [row.name for row in GOALS.values() if not row.measure.timed] if _holds_two(blocks, facts, hardware) else []
    if goal not in goals:
        raise InputError(_holds_not(facts, hardware, like.backend, reason, goals))
    return blocks, (
        f"in 16 bits block by block on one {hardware.name}, for {_those(hardware)} not hold its "
        f"{2 * facts.parameters / GB:,.0f} GB: likelihoods alone, and no speed"
    )


def _by_block(like: Engine, facts: ModelFacts) -> Recipe:
    engine = Engine(
        by_block=True,
        max_batch_size=like.max_batch_size,
        max_seq_len=min(like.max_seq_len, facts.max_position_embeddings),
        max_num_tokens=like.max_num_tokens,
    )
    return Recipe(engine=engine)


def _holds_two(recipe: Recipe, facts: ModelFacts, hardware: Hardware) -> bool:
    return Work(facts, recipe, hardware).by_block(recipe, MIN_CONTEXT).device <= hardware.memory_bytes


def _smaller(
    like: Engine, hardware: Hardware, facts: ModelFacts, devices: int = 1, least: int = 1
) -> Iterator[Engine]:
    """The same engine on every world of so many devices or more, with shorter contexts and smaller batches."""
    longest = min(like.max_seq_len, facts.max_position_embeddings)
    for tensor, pipeline in worlds(_most_devices(hardware)):
        if tensor * pipeline < devices:
            continue
        for length in _halved(longest, min(MIN_CONTEXT, longest)):
            for batch in _halved(like.max_batch_size, least):
                held = like.kv_cache_tokens
                yield like.model_copy(
                    update={
                        "tensor_parallel_size": tensor,
                        "pipeline_parallel_size": pipeline,
                        "max_batch_size": batch,
                        "max_seq_len": length,
                        "kv_cache_tokens": held and min(held, batch * length),
                    }
                )


def _halved(most: int, least: int) -> list[int]:
    """`most` and its halves, down to `least`."""
    return [most // 2**n for n in range(most.bit_length()) if n == 0 or most // 2**n >= least]


def _most_devices(hardware: Hardware) -> int:
    if hardware.compute_capability is None:
        return 1  # its ranks share its memory
    return min(MAX_GPUS, hardware.devices or MAX_GPUS)


def _those(hardware: Hardware) -> str:
    """All devices that one copy of a model may take, as the beginning of a sentence on what they do not."""
    if hardware.compute_capability is None:
        return f"this machine's {hardware.memory_bytes / GB:,.0f} GB of memory do"
    count, name = _most_devices(hardware), hardware.name
    if hardware.devices is None:
        return f"{count} {name} do"
    return f"the {count} {name} of this machine do" if count > 1 else f"this machine's one {name} does"


def _served(recipe: Recipe, hardware: Hardware) -> str:
    engine = recipe.engine
    where = f"{engine.world_size if engine.world_size > 1 else 'one'} {hardware.name}"
    return f"in 16 bits on {where}, at most {engine.max_batch_size:,} x {engine.max_seq_len:,} tokens"


def _holds_not(facts: ModelFacts, hardware: Hardware, backend: str, reason: str, goals: list[str]) -> str:
    """Says why nothing of the target serves the unchanged model, and on what it would be served.

    Args:
        goals: those for which it would not have to be served.
    """
    needed = f"the unchanged model, which every attempt is compared with, has {2 * facts.parameters / GB:,.0f} GB"
    ways = [f"write target: {names}" if (names := holders(facts, hardware, backend)) else "use a smaller model"]
    ways += [f"goal: {' or '.join(goals)}, for which its speed is not measured"] if goals else []
    return f"target: {needed} in 16 bits, and {_those(hardware)} not serve it ({reason}); {', or '.join(ways)}"


def holders(facts: ModelFacts, hardware: Hardware, backend: str) -> str:
    """Says what serves the unchanged model where a target does not, as "'h200' or 'b200', of which 8 hold it"; "" where
    nothing does."""
    if hardware.compute_capability is None:
        return "'cpu' on a machine with more memory"
    if hardware.devices and _holds(facts, GPUS[hardware.name], backend):
        return f"'{hardware.name}' on a machine with more of them"
    others = [gpu for gpu in GPUS.values() if backend in gpu.formats and _holds(facts, gpu, backend)]
    names = " or ".join(f"'{gpu.name}'" for gpu in sorted(others, key=lambda gpu: gpu.memory_bytes))
    return f"{names}, of which {MAX_GPUS} hold it" if names else ""


def _holds(facts: ModelFacts, hardware: Hardware, backend: str) -> bool:
    for engine in _smaller(Engine(backend=backend, max_batch_size=1), hardware, facts):
        recipe = Recipe(engine=engine)
        if not refusal(recipe, hardware, facts) and memory(facts, recipe, hardware).fits:
            return True
    return False


def for_workload(workload: Workload, recipe: Recipe) -> str:
    held = recipe.engine.max_batch_size
    waiting = f", of which {held:,} are served at once" if held < workload.concurrency else ""
    return f"for {workload.concurrency:,} requests at a time{waiting}, of at most {workload.longest:,} tokens"


def _engines(goal: str, recipe: Recipe, facts: ModelFacts, hardware: Hardware) -> Iterator[Engine]:
    row, backend, on_gpu = GOALS[goal], recipe.engine.backend, hardware.compute_capability is not None
    batch, length, tokens, least = row.batch, row.length, row.step_tokens, row.least_batch
    chunked = row.chunked_prefill
    if backend == "torch":  # its packed kernels serve so many rows, and it has no chunked prefill
        batch, length, tokens, least = min(batch, 64 if on_gpu else 16), min(length, MIN_CONTEXT), 8192, 1
        chunked = False
    elif row.at_batch_1 and FORMATS[recipe.weight_format].is_four_bit_weight_only:
        batch = 1  # weight-only INT4 is faster at batch 1 and slower at 8 (`catalog.formats`)
    longest = facts.max_position_embeddings
    length = min(length or longest, longest)
    lengths = [length // 2**n for n in range(32) if n == 0 or length // 2**n >= MIN_CONTEXT]
    batches = [batch // 2**n for n in range(batch.bit_length()) if batch // 2**n >= min(least, batch)]
    # The embedded engine spreads a model where a recipe says so: it serves on one device.
    for tensor, pipeline in worlds(most_devices(recipe, hardware)):
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


def most_devices(recipe: Recipe, hardware: Hardware) -> int:
    """Returns how many devices a plan may give a recipe, to serve it or to train on."""
    return 1 if recipe.engine.backend == "torch" else _most_devices(hardware)


def _devices(recipe: Recipe, hardware: Hardware) -> list[str]:
    devices, trained = recipe.engine.world_size, recipe.distill.processes if recipe.distill else 1
    needed = [f"needs {devices} {hardware.name}"] if devices > 1 else []
    return needed + ([f"trained on {trained} {hardware.name}"] if trained > 1 else [])
