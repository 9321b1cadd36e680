"""The evidence of a verdict: what was measured, bound to digests, so that the gate can judge anew.

All of it is read from the store itself. The cache of a node may be written by every task that runs there.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab import judge
from trimtab.base import environment
from trimtab.base.errors import InputError
from trimtab.judge import Measurements, Scores, Text, Verdict
from trimtab.loop.documents import read_plan
from trimtab.loop.state import State
from trimtab.model import hardware, memory
from trimtab.model.facts import ModelFacts
from trimtab.planning.dealing import LOOKS
from trimtab.recipe import Recipe
from trimtab.store import Store, Tree

#: The look after the last is the confirmation on fresh items.
CONFIRMATION = LOOKS + 1
#: The file of a look that has what was predicted at each place of the text.
TEXT = "text.npz"
#: What a rebuild goes on from: the student of a release that was distilled.
KEPT = ("checkpoint",)


def look_name(look: int, baseline: bool = False, kv_cache: str = "export") -> str:
    """The name under which the evidence files what one model scored at one look.

    `kv_cache` "none" is the candidate with its KV cache in 16 bits, whatever its export asks for.
    """
    return f"{'baseline-' if baseline else ''}look-{look}{'-kv-16-bits' if kv_cache == 'none' else ''}"


def measurements(
    facts: ModelFacts, recipe: Recipe, target: str, integrity: Mapping[str, Any], measured: Mapping[str, Any]
) -> Measurements:
    """Returns what one engine costs, out of the metrics of its integrity check and of its first look.

    One that goes block by block serves nobody: its speed and its memory are those of nothing.
    """
    return Measurements(
        bytes=integrity["bytes"],
        quantized_share=round(integrity["quantized_share"], 4),
        decode_tokens_per_second=round(measured.get("decode_tokens_per_second", 0.0), 2),
        throughput_tokens_per_second=round(measured.get("throughput_tokens_per_second", 0.0), 2),
        peak_memory_bytes=0 if recipe.engine.by_block else measured["peak_memory_bytes"],
        max_context_tokens=memory.max_context_tokens(facts, recipe, hardware.target(target), integrity["bytes"]),
        devices=recipe.engine.world_size,
        batch=recipe.engine.max_batch_size,
        cores=measured.get("cores", 0),
        by_block=recipe.engine.by_block,
    )


def with_speed(measured: Measurements, speed: Mapping[str, float], baseline: bool = False) -> Measurements:
    """Returns the measurements with the speeds that candidate and baseline showed in turn."""
    prefix = "baseline_" if baseline else ""
    names = ("decode_tokens_per_second", "throughput_tokens_per_second")
    return measured.model_copy(update={name: round(speed[prefix + name], 2) for name in names})


def began_to_repeat(baseline: Mapping[str, Any], candidate: Mapping[str, Any]) -> str | None:
    """Returns what is wrong with the text of a candidate, by the metrics of the first looks; None where nothing is.

    A model whose own text goes round in a loop cannot be blamed for it; one that began to can. Of a baseline that was
    measured block by block nobody knows.
    """
    if candidate["degenerate"] > 0.5 >= baseline.get("degenerate", 1.0):
        return f"{candidate['degenerate']:.0%} of the continuations are empty or repeat themselves"
    return None


def read_scores(store: Store, trees: Sequence[Tree]) -> Scores:
    """Joins what one model scored at several looks, in their order.

    Raises:
        InputError: the tasks have no items left, or the text no windows.
    """
    items, nll, tokens, windows = [], [], [], []
    for tree in trees:
        items += [json.loads(line) for line in store.read(tree, "items.jsonl").decode().splitlines()]
        document = json.loads(store.read(tree, "windows.json"))
        nll += document["nll"]
        tokens += document["tokens"]
        windows += [str(document["start"] + i) for i in range(len(document["nll"]))]
    if not items or not nll:
        raise InputError("tasks: there are no items left to judge on; name more tasks or ask for fewer items")
    return Scores(
        items=np.array([item["score"] for item in items]),
        chance=np.array([item["chance"] for item in items]),
        nll=np.array(nll),
        tokens=np.array(tokens),
        item_ids=[item["id"] for item in items],
        window_ids=windows,
        tasks=[item["id"].partition("/")[0] for item in items],
    )


def read_text(store: Store, trees: Sequence[Tree]) -> Text | None:
    """Joins what one model predicted token by token at several looks; None where its engine did not tell."""
    parts = []
    for tree in trees:
        if TEXT not in store.manifest(tree).files:  # a look without windows, or evidence from before it was kept
            continue
        with np.load(io.BytesIO(store.read(tree, TEXT)), allow_pickle=False) as file:
            parts.append([file[name] for name in ("nll", "tokens", "log_probs")])
    return Text(*(np.concatenate(part) for part in zip(*parts, strict=True))) if parts else None


def _both_texts(store: Store, *both: Sequence[Tree]) -> tuple[Text, Text] | None:
    baseline, candidate = (read_text(store, trees) for trees in both)
    return (baseline, candidate) if baseline and candidate else None


def judge_looks(
    store: Store, measured: Mapping[str, Tree], recipe: Recipe, look: int, kv_cache: str = "export"
) -> Verdict:
    """Judges from everything that was measured up to this look; `kv_cache` as in `look_name`."""
    looks = range(1, look + 1)
    before = [measured[look_name(n, baseline=True)] for n in looks]
    after = [measured[look_name(n, kv_cache=kv_cache)] for n in looks]
    return judge.judge(
        baseline=read_scores(store, before),
        candidate=read_scores(store, after),
        accept=recipe.accept,
        look=look,
        looks=LOOKS,
        text=_both_texts(store, before, after),
    )


def confirm(
    store: Store,
    measured: Mapping[str, Tree],
    recipe: Recipe,
    accepted: Verdict,
    max_attempts: int,
    kv_cache: str = "export",
) -> Verdict:
    """Asks the fresh items whether an accepted attempt stands; `kv_cache` as in `look_name`."""
    return judge.confirm(
        accepted,
        read_scores(store, [measured[look_name(CONFIRMATION, baseline=True)]]),
        read_scores(store, [measured[look_name(CONFIRMATION, kv_cache=kv_cache)]]),
        recipe.accept,
        attempts=max_attempts,
    )


def write(
    store: Store,
    state: State,
    result: Verdict,
    export: Tree,
    measured: Mapping[str, Tree],
    signatures: Mapping[str, Any] | None = None,
    validation_key: str = "",
    keyed_by: str = "",
) -> Tree:
    """Stores the evidence of an attempt as a tree with one file, `evidence.json`: also where all of it was measured,
    which is here.

    Under `intermediate` are trees that the artifact was made of and that nothing reads again; they may be collected.

    Args:
        signatures: the envelopes of what validation signed, by name.
        validation_key: the public key of these, PEM; "" where nothing was signed.
        keyed_by: the rules that made the keys of what was measured, as `stages.looks.keyed_by` names them.
    """
    kept = KEPT if state.recipe.distill else ()
    document = {
        "model": state.model.model_dump(),
        "plan": state.plan and state.plan.model_dump(),
        "export": export.model_dump(),
        "engine": (engine := state.trees.get("engine")) and engine.model_dump(),
        "baseline_engine": (before := state.baseline and state.baseline.engine) and before.model_dump(),
        "recipe": state.recipe.to_dict(),
        "goal": state.goal,
        "target": state.target,
        "max_attempts": state.max_attempts,
        "confirmations": confirmations(state),
        "evaluation": state.evaluation.to_dict(),
        "materials": read_plan(store, state.plan).materials if state.plan else None,
        "trees": {name: tree.model_dump() for name, tree in state.trees.items() if name in kept},
        "intermediate": {name: tree.model_dump() for name, tree in state.trees.items() if name not in kept},
        "measured": {name: tree.model_dump() for name, tree in measured.items()},
        "signatures": dict(signatures or {}),
        "validation_key": validation_key,
        "keyed_by": keyed_by,
        "verdict": result.to_dict(),
        "versions": environment.versions(),
        "device": environment.device(),
    }
    return store.put_json("evidence", document)


def confirmations(state: State) -> int:
    """Returns how many attempts before the current one were asked to confirm."""
    return sum(brief.verdict.confirmation is not None for brief in state.history[: max(0, state.attempt - 1)])


def read(store: Store, tree: Tree) -> dict[str, Any]:
    """Reads what `write` stored; the store verifies its digest."""
    return store.get_json("evidence", tree)
