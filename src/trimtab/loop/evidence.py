"""The evidence of a verdict: what was measured, bound to digests, so that the gate can judge anew."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trimtab import judge
from trimtab.base import environment
from trimtab.base.errors import InputError
from trimtab.judge import Scores, Verdict
from trimtab.loop.documents import read_plan
from trimtab.loop.state import Brief, State
from trimtab.recipe import Recipe
from trimtab.store import Store, Tree

#: The number of looks at most; the look after the last is the confirmation on fresh items.
LOOKS = 3
CONFIRMATION = LOOKS + 1


def look_name(look: int, baseline: bool = False, kv_cache: str = "export") -> str:
    """The name under which the evidence files what one model scored at one look.

    `kv_cache` "none" is the candidate with its KV cache in 16 bits, whatever its export asks for.
    """
    return f"{'baseline-' if baseline else ''}look-{look}{'-kv-16-bits' if kv_cache == 'none' else ''}"


def read_scores(store: Store, trees: Sequence[Tree]) -> Scores:
    """Joins what one model scored at several looks, in their order.

    Raises:
        InputError: the tasks have no items left, or the text no windows.
    """
    items, nll, tokens, windows = [], [], [], []
    for tree in trees:
        folder = store.get(tree)
        items += [
            json.loads(line) for line in (folder / "items.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        document = json.loads((folder / "windows.json").read_text(encoding="utf-8"))
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
    )


def judge_looks(
    store: Store, measured: Mapping[str, Tree], recipe: Recipe, look: int, kv_cache: str = "export"
) -> Verdict:
    """Judges from everything that was measured up to this look; `kv_cache` as in `look_name`."""
    looks = range(1, look + 1)
    return judge.judge(
        baseline=read_scores(store, [measured[look_name(n, baseline=True)] for n in looks]),
        candidate=read_scores(store, [measured[look_name(n, kv_cache=kv_cache)] for n in looks]),
        accept=recipe.accept,
        look=look,
        looks=LOOKS,
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
) -> Tree:
    """Stores the evidence of an attempt as a tree with one file, `evidence.json`: also where all of it was measured,
    which is here."""
    document = {
        "model": state.model.model_dump(),
        "export": export.model_dump(),
        "recipe": state.recipe.to_dict(),
        "goal": state.goal,
        "target": state.target,
        "max_attempts": state.max_attempts,
        "evaluation": state.evaluation.to_dict(),
        "materials": read_plan(store, state.plan).materials if state.plan else None,
        "trees": {name: tree.model_dump() for name, tree in state.trees.items()},
        "measured": {name: tree.model_dump() for name, tree in measured.items()},
        "verdict": result.to_dict(),
        "versions": environment.versions(),
        "device": environment.device(),
    }
    return store.put_json("evidence", document)


def read(store: Store, tree: Tree) -> dict[str, Any]:
    """Reads what `write` stored; the store verifies its digest."""
    return store.get_json("evidence", tree)


def refusal(store: Store, state: State, brief: Brief) -> str | None:
    """Returns why the evidence does not support releasing this attempt, or None when it does.

    Everything is read again from the store: nothing of the state is believed but the names of its trees.
    """
    if brief.evaluation is None:
        return "there is no evidence for the accepted attempt"
    document = read(store, brief.evaluation)
    if document["model"]["digest"] != state.model.digest:
        return (
            f"the evidence is of model {document['model']['digest'][:12]}, not of {state.model.digest[:12]}"
        )
    recipe = Recipe.parse(document["recipe"])
    if recipe.digest != brief.recipe.digest or recipe.accept != brief.recipe.accept:
        return "the evidence is of another recipe"
    store.manifest(Tree.model_validate(document["export"]))
    return judge_anew(store, document)


def judge_anew(store: Store, document: Mapping[str, Any]) -> str | None:
    """Judges the stored answers that a document of evidence names; returns why they do not suffice, or None."""
    recipe = Recipe.parse(document["recipe"])
    filed = Verdict.model_validate(document["verdict"])
    measured = {name: Tree.model_validate(tree) for name, tree in document["measured"].items()}
    again = judge_looks(store, measured, recipe, filed.looks)
    if again.outcome == "accepted" and look_name(CONFIRMATION) in measured:
        again = confirm(store, measured, recipe, again, document["max_attempts"])
    if again.outcome != "accepted":
        return f"judged anew, the stored answers say: {again.outcome}, {again.reason}"
    if filed.outcome != "accepted":
        return f"the evidence says: {filed.outcome}, {filed.reason}"
    return None
