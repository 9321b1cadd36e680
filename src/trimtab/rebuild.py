"""What a rebuild has to do: nothing, when the last release is made of the same materials as this run would be.

Otherwise it is an ordinary run, in which stages whose results exist are not run again. Where only the base model or the
data changed, and the last release holds a distilled student, its recipe is tried first and training goes on from that
student instead of from a newly pruned model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from trimtab import flow, progress, signing, statement
from trimtab.errors import Damaged, InputError, NotVerified
from trimtab.materials import Materials, differences
from trimtab.plan import Rung
from trimtab.recipe import MovementPruning, Recipe
from trimtab.state import State
from trimtab.statement import Predicate
from trimtab.store import Store, Tree, open_store

#: What may change while a student remains worth going on from, and what makes going on worth it.
_SAME_TASK = {"model", "calibration_data", "distillation_data", "measured_data", "images", "versions"}
_NEW_LESSONS = {"model", "distillation_data"}


@dataclass(frozen=True)
class Review:
    """What is to be done, and why.

    `outcome` is 'rebuild' or 'keep'; `release` the URI of the last release, if there is one. `first` is its recipe with
    its student, where distillation goes on from that.
    """

    outcome: str
    reasons: tuple[str, ...]
    release: str | None = None
    first: Rung | None = None

    @property
    def markdown(self) -> str:
        """The review for the page of the run."""
        title = "Rebuild" if self.outcome == "rebuild" else f"Nothing changed: {self.release} stands"
        went_on = ["", "Distillation goes on from the student of the last release."] if self.first else []
        return "\n".join([f"# {title}", "", *(f"- {reason}" for reason in self.reasons), *went_on, ""])


def plan(*, store_uri: str, name: str, **wanted: Any) -> tuple[Review, State]:
    """Reviews a run that would begin now, and plans it; the arguments and errors are those of `flow.begin`."""
    store = open_store(store_uri)
    state = flow.begin(store_uri=store_uri, name=name, **wanted)
    found = review(store, name, Materials.parse(store.get_json("materials", state.ladder)))
    if found.first:
        state = flow.begin(store_uri=store_uri, name=name, **wanted, released=found.first)
    progress.report("review", "; ".join([found.outcome, *found.reasons]))
    return found, state


def review(store: Store, name: str, now: Materials) -> Review:
    """Compares a run that would begin now with the newest release of its name.

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
    changed = differences(before, now)
    if not changed:
        return Review("keep", ("the materials of a run are those of this release",), uri)
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
    return Rung(recipe=recipe, why="the recipe of the last release, whose student learns on", student=student)


def _valid(record: Mapping[str, Any]) -> Predicate:
    envelope = record.get("attestation")
    if envelope is None:
        raise NotVerified("it carries no statement of what it was made of")
    predicate = statement.read(signing.unseal(envelope)).predicate
    statement.check_time(predicate, datetime.now(UTC))
    return predicate


def _materials(evidence: Mapping[str, Any]) -> Materials:
    if not evidence.get("materials"):
        raise NotVerified("it does not say what it was made of")
    try:
        return Materials.parse(evidence["materials"])
    except InputError as error:
        raise NotVerified(f"another version of trimtab wrote what it was made of ({error})") from None


def _alike(store: Store, before: Tree, now: Tree) -> bool:
    """Whether two models have the same layers and tokenizer, so that a student of one can learn from the other."""
    old, new = store.manifest(before), store.manifest(now)
    tokenizers = [{path: blob for path, blob in m.files.items() if path.startswith("tokenizer")} for m in (old, new)]
    return old.metadata.get("facts") == new.metadata.get("facts") and tokenizers[0] == tokenizers[1]
