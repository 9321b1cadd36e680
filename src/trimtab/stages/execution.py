"""A stage's result, from the store or from its work in a child process, and what it makes of the state."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trimtab.base import child, progress
from trimtab.base.errors import Failure
from trimtab.base.transient import insist
from trimtab.loop.state import State, fail
from trimtab.stages import checkpoints, signatures, usage
from trimtab.stages.registry import MAKE_A_STUDENT, STAGES, Stage
from trimtab.store import Store, cache, open_store
from trimtab.store.tree import Tree

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner

#: The file of a tree that holds what its work measured, where a verdict rests on it.
METRICS = "metrics.json"


@dataclass(frozen=True)
class Result:
    """What a stage made: its tree, its metrics, the seconds its work took, and whether it was found ready.

    `signature` vouches for the tree as the stage's result, where it was made for somebody who signs.
    """

    tree: Tree
    metrics: dict[str, Any]
    seconds: float
    hit: bool
    signature: dict[str, Any] | None = None


def cached(
    store: Store,
    stage: Stage,
    parameters: dict[str, Any],
    inputs: Mapping[str, Tree | None],
    backend: str = "torch",
    signer: CryptoSigner | None = None,
    call: Callable[..., child.Done] | None = None,
) -> Result:
    """Returns the stage's result from the store, or does its work in a child process and stores it.

    The index is written after the tree, and the tree's manifest after its files: a kill at any moment leaves
    either the whole result or nothing that anyone can see. The environment in the key is this process's, which is its
    child's too.

    Args:
        backend: the engine that the work measures or builds, where it does.
        signer: signs what is made; then only what it has signed counts as found.
        call: does the work, in a process that stays (`base.session`); by default in one of its own.

    Raises:
        Failure: an expected failure of the work.
        StageError: infrastructure trouble; in a pod, what passes is tried again first.
    """
    environment = stage.environment(parameters).here(backend)
    key = stage.key(parameters, inputs, environment)
    if found := _found(store, stage, key, signer):
        return found
    folders = insist(stage.name, lambda: {name: tree and str(store.get(tree)) for name, tree in inputs.items()})
    metadata = {"key": key, "environment": environment}

    def waiting() -> None:
        progress.report(stage.name, "another run on this machine is making the same; waiting until it has ended")

    with cache.scratch(key, waiting) as scratch, store.workspace() as folder:
        if found := _found(store, stage, key, signer):
            return found

        def work() -> tuple[Path, child.Done]:
            output = tempfile.mkdtemp(dir=folder)
            with checkpoints.kept(store, stage.name, key, scratch):
                work_in = call or child.call
                done = work_in(stage.work, **folders, output=output, scratch=str(scratch), parameters=parameters)
            return Path(output), done

        with usage.disk_watched(folder, scratch) as disk:
            output, done = insist(stage.name, work)
        metrics = {**done.value, "peak_memory_bytes": done.peak_memory_bytes, "peak_disk_bytes": disk.bytes}
        metrics |= {"cpu_seconds": round(done.cpu_seconds, 1)} if done.cpu_seconds else {}
        metrics |= {"peak_gpu_bytes": done.peak_gpu_bytes} if done.peak_gpu_bytes else {}
        if stage.keeps_metrics:
            (output / METRICS).write_text(json.dumps(metrics, sort_keys=True), encoding="utf-8")
        tree = insist(stage.name, lambda: store.put(output, kind=stage.output, metadata=metadata, move=True))
        signature = signatures.sign(key, tree, signer) if signer else None
        record = {"tree": tree.model_dump(), "metrics": metrics, "seconds": done.seconds, "environment": environment}
        record |= {"signature": signature} if signature else {}
        insist(stage.name, lambda: store.record(key, record))
    checkpoints.forget(store, key)
    return Result(tree, metrics, done.seconds, False, signature)


def _found(store: Store, stage: Stage, key: str, signer: CryptoSigner | None) -> Result | None:
    """Returns the result that the store has, or None; with a signer only one that it has signed."""
    record = insist(stage.name, lambda: store.lookup(key))
    if not record or (signer and not signatures.is_signed(record, key, signer.public_key)):
        return None
    tree = Tree.model_validate(record["tree"])
    return Result(tree, record["metrics"], record["seconds"], True, record.get("signature") if signer else None)


def tree_of(name: str, state: State) -> Tree | None:
    """Returns a tree of the attempt. What no stage has made yet is the model itself, or None."""
    known = {"model": state.model, "checkpoint": state.model, **state.trees}
    known.setdefault("export", known["checkpoint"])  # a recipe that does not quantize serves the checkpoint
    return known.get(name)


def is_asked(stage: Stage, state: State) -> bool:
    """Whether the recipe wants the stage; what makes a student is not done where the attempt begins with one."""
    return stage.wanted(state.recipe) and not (stage.name in MAKE_A_STUDENT and "checkpoint" in state.trees)


def inputs_of(stage: Stage, state: State) -> dict[str, Tree | None]:
    """Returns the trees that the stage reads."""
    return {name: tree_of(name, state) for name in stage.inputs}


def key_here(stage: Stage, state: State) -> str:
    """Returns the key of the result that the stage would have in this image, on this machine."""
    parameters = stage.parameters(state.recipe)
    environment = stage.environment(parameters).here(state.recipe.engine.backend)
    return stage.key(parameters, inputs_of(stage, state), environment)


def advance(name: str, state: State) -> tuple[State, Result | None]:
    """Takes the state through one stage. Passes it on untouched when it has a verdict or the recipe does not ask.

    An expected failure becomes the state's verdict; only infrastructure trouble raises.
    """
    stage = STAGES[name]
    if state.verdict or not is_asked(stage, state):
        return state, None
    started = time.monotonic()
    try:
        store, backend = open_store(state.store), state.recipe.engine.backend
        result = cached(store, stage, stage.parameters(state.recipe), inputs_of(stage, state), backend)
    except Failure as failure:
        return fail(state, name, failure), None
    progress.report(name, "found in the store" if result.hit else f"done in {time.monotonic() - started:.0f} s")
    trees = {**state.trees, stage.output: result.tree}
    seconds, busy = (0.0, 0.0) if result.hit else (result.seconds, result.metrics.get("cpu_seconds", 0.0))
    spent = {
        "seconds": {**state.seconds, name: round(seconds, 1)},
        "cpu_seconds": {**state.cpu_seconds, name: round(busy, 1)},
        "used": {**state.used, name: usage.used(result.metrics, result.seconds)},
    }
    return state.model_copy(update={"trees": trees, **spent}), result
