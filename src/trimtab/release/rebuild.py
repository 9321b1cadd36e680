"""What a rebuild has to do: nothing, when the last release is made of the same materials as this run would be.

Otherwise it is an ordinary run, in which stages whose results exist are not run again. Where only the base model or the
data changed, and the last release holds a distilled student, its recipe is tried first and training goes on from that
student instead of from a newly pruned model. Where only the traffic changed, so that engines have other sizes, its
recipe is tried first as well: all its stages but the engine's and those after it are in the store.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from trimtab.base import progress, signing
from trimtab.base.errors import Damaged, InputError, NotVerified
from trimtab.loop import decisions
from trimtab.loop.documents import read_plan
from trimtab.loop.provenance import DRIFT, Provenance, differences
from trimtab.loop.state import State
from trimtab.planning.matrix import Rung
from trimtab.recipe import MovementPruning, Recipe
from trimtab.recipe.workload import Recorded
from trimtab.release import statement
from trimtab.release.statement import Predicate
from trimtab.serving.traffic import drift
from trimtab.store import Store, Tree, open_store

#: What the sizes of the engine alone depend on.
_SIZES = {"workload", "traffic"}
#: What may change while a student remains worth going on from, and what makes going on worth it.
_SAME_TASK = {"model", "calibration_data", "distillation_data", "measured_data", "images", "versions"} | _SIZES
_NEW_LESSONS = {"model", "distillation_data"}


@dataclass(frozen=True)
class Review:
    """What is to be done, and why.

    `outcome` is 'rebuild' or 'keep'; `release` the URI of the last release, if there is one. `first` is its recipe,
    where that is tried first: with its student, where distillation goes on from that.
    """

    outcome: str
    reasons: tuple[str, ...]
    release: str | None = None
    first: Rung | None = None

    @property
    def markdown(self) -> str:
        """The review for the page of the run."""
        title = "Rebuild" if self.outcome == "rebuild" else f"Nothing changed: {self.release} stands"
        said = ["", f"First is {self.first.why}."] if self.first else []
        return "\n".join([f"# {title}", "", *(f"- {reason}" for reason in self.reasons), *said, ""])


def plan(*, store_uri: str, name: str, **wanted: Any) -> tuple[Review, State]:
    """Reviews a run that would begin now, and plans it; the arguments and errors are those of `decisions.begin`."""
    store = open_store(store_uri)
    state = decisions.begin(store_uri=store_uri, name=name, **wanted)
    now = Provenance.parse(read_plan(store, state.plan).materials)
    found = review(store, name, now, _drift(wanted["recipe"]))
    if found.first:
        state = decisions.begin(store_uri=store_uri, name=name, **wanted, released=found.first, traffic=now.traffic)
    progress.report("review", "; ".join([found.outcome, *found.reasons]))
    return found, state


def _drift(recipe: str) -> float:
    """How far the recorded traffic may have moved."""
    workload = Recipe.parse(recipe or "{}").workload
    return workload.drift if isinstance(workload, Recorded) else DRIFT


def review(store: Store, name: str, now: Provenance, most: float = DRIFT) -> Review:
    """Compares a run that would begin now with the newest release of its name.

    Args:
        most: how many times as large or small a measure of the recorded traffic may be before it is built anew.

    Raises:
        Damaged: the record of that release is not what was written; a run would end at the gate for it.
    """
    uri = store.newest(name)
    if uri is None:
        return Review("rebuild", (f"there is no release '{name}' yet",))
    record = store.read_release(uri)
    try:
        last = _valid(record)
        before = _materials(last.evidence)
        for tree in last.trees:
            store.manifest(store.tree(tree.digest))
    except (NotVerified, Damaged) as error:
        return Review("rebuild", (f"{uri}: {error}",), uri)
    changed = differences(before, now, most)
    if not changed:
        return Review("keep", ("the materials of a run are those of this release", *_steady(before, now, most)), uri)
    if changed.keys() & _SIZES and not (now.workload or now.traffic):
        first = None  # its engine has sizes of a workload that is no more
    elif changed.keys() <= _SIZES:
        first = Rung(recipe=Recipe.parse(last.evidence["recipe"]), why="the recipe of the last release, sized anew")
    else:
        first = going_on(store, last.evidence, now.model, set(changed))
    return Review("rebuild", tuple(line for lines in changed.values() for line in lines), uri, first)


def going_on(store: Store, evidence: Mapping[str, Any], model: str, changed: set[str]) -> Rung | None:
    """Returns the released recipe with the student that its training goes on from; None where all begins anew.

    Going on is for new data or a new version of the base model, of the same shape and tokenizer. A student of movement
    pruning is not gone on from: its scores were learned together with its weights, and are not kept.
    """
    recipe = Recipe.parse(evidence["recipe"])
    if recipe.distill is None or isinstance(recipe.prune, MovementPruning) or "checkpoint" not in evidence["trees"]:
        return None
    if not changed & _NEW_LESSONS or changed - _SAME_TASK:
        return None
    student = store.tree(evidence["trees"]["checkpoint"]["digest"], evidence["trees"]["checkpoint"]["bytes"])
    try:
        store.manifest(student)
        if not _alike(store, store.tree(evidence["model"]["digest"]), store.tree(model)):
            return None
    except Damaged:  # a copy of a store may lack what no release consists of
        return None
    why = "the recipe of the last release, and distillation goes on from the student of it"
    return Rung(recipe=recipe, why=why, student=student)


def _steady(before: Provenance, now: Provenance, most: float) -> list[str]:
    """Says how far the traffic has moved that counts as the same, by what moved farthest."""
    if not (before.traffic and now.traffic):
        return []
    _, sentence = max(drift(before.traffic, now.traffic).values())
    return [f"the recorded traffic is the same to within {most:g} times: {sentence}"]


def _valid(record: Mapping[str, Any]) -> Predicate:
    envelope = record.get("attestation")
    if envelope is None:
        raise NotVerified("it carries no statement of what it was made of")
    predicate = statement.read(signing.unseal(envelope)).predicate
    statement.check_time(predicate, datetime.now(UTC))
    return predicate


def _materials(evidence: Mapping[str, Any]) -> Provenance:
    if not evidence.get("materials"):
        raise NotVerified("it does not say what it was made of")
    try:
        return Provenance.parse(evidence["materials"])
    except InputError as error:
        raise NotVerified(f"another version of trimtab wrote what it was made of ({error})") from None


def _alike(store: Store, before: Tree, now: Tree) -> bool:
    """Whether two models have the same layers and tokenizer, so that a student of one can learn from the other."""
    old, new = store.manifest(before), store.manifest(now)
    tokenizers = [{path: blob for path, blob in m.files.items() if path.startswith("tokenizer")} for m in (old, new)]
    return old.metadata.get("facts") == new.metadata.get("facts") and tokenizers[0] == tokenizers[1]
