"""What the unchanged model and a candidate write after the same prompts, as validation stored it at the first look."""

from __future__ import annotations

import json
from dataclasses import dataclass

from trimtab.base import progress
from trimtab.base.errors import TrimtabError
from trimtab.loop import evidence
from trimtab.loop.state import State
from trimtab.report.rows import one_line
from trimtab.report.story import accepted
from trimtab.store import Store, Tree

#: The file of a look that holds them: {prompt: text}.
FILE = "outputs.json"


@dataclass(frozen=True)
class SideBySide:
    """A prompt and what both models write after it."""

    prompt: str
    before: str
    after: str


def side_by_side(store: Store, state: State) -> list[SideBySide]:
    """Returns the texts of the accepted attempt beside the baseline's; [] where nothing is accepted or stored.

    A page without them is better than no page, so trouble of the store is only told.
    """
    found = accepted(state)
    if found is None or found[1].evaluation is None:
        return []
    try:
        measured = evidence.read(store, found[1].evaluation)["measured"]
        before, after = (
            _texts(store, measured.get(evidence.look_name(1, baseline=baseline))) for baseline in (True, False)
        )
    except (TrimtabError, ValueError) as error:
        progress.report("summary", f"the page shows no texts: {error}")
        return []
    return [SideBySide(one_line(p), one_line(before[p]), one_line(after[p])) for p in before if p in after]


def _texts(store: Store, tree: dict[str, str] | None) -> dict[str, str]:
    if tree is None:
        return {}
    found = store.tree(tree["digest"])
    return json.loads(store.read(found, FILE)) if _has(store, found) else {}


def _has(store: Store, tree: Tree) -> bool:
    return FILE in store.manifest(tree).files
