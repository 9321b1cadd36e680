"""What trimtab does, as functions: `import trimtab` offers them, and the command and the notebooks call them.

A recipe or an evaluation is given as a document (`trimtab.Recipe`), as a mapping of its fields, as YAML or JSON text,
or as the `pathlib.Path` of a file.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console

from trimtab.base import signing
from trimtab.base.errors import InputError
from trimtab.model import hardware
from trimtab.pipelines.inputs import ATTEMPTS, GOAL, TARGET, Asked, text_of
from trimtab.planning import dealing, drawing, task_sizes
from trimtab.planning.dealing import Deal
from trimtab.planning.matrix import Outline
from trimtab.recipe import Prices, Recipe
from trimtab.recipe.evaluation import Evaluation

if TYPE_CHECKING:
    from trimtab.pipelines.local import Outcome
    from trimtab.release.shelf import Listed
    from trimtab.release.verification import Verified
    from trimtab.store import Store

#: Where results and logs go where nothing is said.
STORE, RUNS = "trimtab-store", "trimtab-runs"


def plan(
    model: str | Path,
    *,
    goal: str = GOAL,
    target: str = TARGET,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    evaluation: Evaluation | Mapping[str, Any] | str | Path | None = None,
    max_attempts: int = ATTEMPTS,
    name: str = "",
) -> Outline:
    """Returns what a run would do: how the unchanged model is served, the recipes in the order tried, what is left out.

    Nothing is fetched but a config, and nothing is written. All that `run` refuses before it works on the model is
    refused here.

    Args:
        model: what `run` takes, or a config.json alone.
        goal: one of `trimtab.catalog.goals.GOALS`.
        target: one of `trimtab.model.hardware.TARGETS`.
        recipe: one to try first.
        evaluation: what is measured.
        max_attempts: the most attempts, 1 to 10.
        name: of the release; the model's if "".

    Raises:
        InputError: a value that is not valid, a model that cannot be read, a task with too few items, or nothing that
            the target could serve or the goal gain.
    """
    from trimtab.components.fetch.facts import facts
    from trimtab.loop import decisions

    asked, dealt = checked(model, goal, target, recipe, evaluation, max_attempts, name)
    machine = hardware.on_this_machine(hardware.target(target))
    outline = decisions.outline(goal, facts(asked.model), machine, asked.wanted, asked.evaluation)
    power = drawing.assumed(dealt, asked.evaluation, asked.wanted.accept, max_attempts)
    return {**outline, "power": {"told": power.sentence, **power.model_dump(mode="json")}}


def run(
    model: str | Path,
    store: str | Path = STORE,
    *,
    goal: str = GOAL,
    target: str = TARGET,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    evaluation: Evaluation | Mapping[str, Any] | str | Path | None = None,
    max_attempts: int = ATTEMPTS,
    name: str = "",
    require_signature: bool = False,
    runs: str | Path = RUNS,
    console: Console | None = None,
    events: TextIO | None = None,
    prices: Prices | Mapping[str, Any] | None = None,
) -> Outcome:
    """Optimizes a model on this machine and returns how that ended; a stage that failed is part of the outcome.

    What was complete is found again when the run is repeated.

    Args:
        model: a folder, a .gguf file, s3://…, or a hub id org/name.
        store: s3://bucket/prefix or a folder.
        goal: one of `trimtab.catalog.goals.GOALS`.
        target: one of `trimtab.model.hardware.TARGETS`.
        recipe: one to try first.
        evaluation: what is measured.
        max_attempts: the most attempts, 1 to 10.
        name: of the release; the model's if "".
        require_signature: release nothing that cannot be signed.
        runs: the folder for logs and reports, in which each run makes its own.
        console: where progress is printed; the standard output if None.
        events: where each event of progress is written too, as a line of JSON.
        prices: what an hour costs here, for the ledger and for limits of money.

    Raises:
        InputError: anything that can be refused before work on the model begins.
        StoreError: the store cannot be reached or written.
    """
    from trimtab.components.fetch.source import check
    from trimtab.loop import decisions
    from trimtab.pipelines import local, local_backend
    from trimtab.serving import traffic
    from trimtab.store import cache, open_store
    from trimtab.store.address import folder_of

    console = console or Console()
    with _signing(require_signature):
        asked, _ = checked(model, goal, target, recipe, evaluation, max_attempts, name)
        asked = replace(asked, model=check(asked.model))
        known = Path(asked.model).is_dir()  # of any other model nothing is known before it is fetched
        if not known:
            traffic.of(asked.wanted.workload)
        ladder = (lambda text: _outline(asked, text)) if known else None
        chosen, said = local_backend.choose(asked.recipe, hardware.target(target), ladder)
        prices = Prices.parse(prices) if isinstance(prices, Mapping) else prices
        decisions.check_limits(asked.wanted, prices)
        opened = open_store(str(store))
        opened.check()
        if not opened.uri.startswith("s3://") and (near := cache.beside(folder_of(opened.uri))):
            os.environ[cache.FOLDER] = str(near)  # the stages, which are processes of their own, inherit it
        console.print(f"engine   {said}", soft_wrap=True, highlight=False)
        parameters = asked.parameters(recipe=chosen, store=opened.uri)
        return local.run(parameters, Path(runs).absolute(), console, events=events, prices=prices)


def verify(
    release: str,
    store: str | Path = "",
    keys: Sequence[str | Path] = (),
    max_age: timedelta | None = None,
    validation_keys: Sequence[str | Path] = (),
) -> Verified:
    """Checks a release: signed, whole, and accepted when it is judged anew from its evidence.

    Args:
        release: its URI, name/version, or a name for its newest.
        store: where it is; the place that the URI names if "", and ./trimtab-store for a name.
        keys: public keys of which one must have signed it, PEM or the path of a PEM file; without any, its signature is
            not checked.
        max_age: how long ago it may have been signed at most.
        validation_keys: public keys of which validation must have signed the answers with one.

    Raises:
        NotVerified: it must not be used; the message says why.
        InputError: there is no such release, or a key is none.
        StoreError: the store could not be read.
    """
    from trimtab.release import shelf, verification

    trusted = [signing.public_key(key) for key in keys]
    validation = [signing.public_key(key) for key in validation_keys]
    opened = store_of(release, store)
    uri = shelf.located(opened, release)
    return verification.verify(opened, uri, trusted, max_age, validation_keys=validation)


def releases(name: str = "", store: str | Path = "") -> list[Listed]:
    """Returns the releases of a store, newest first: those of a name, one of its versions, or all.

    Raises:
        InputError: no such name is possible, or the store cannot be opened.
        StoreError: the store could not be read.
    """
    from trimtab.release import shelf
    from trimtab.store.address import split_release

    _, found, version = split_release(name) or ("", *name.partition("/")[::2])
    rows = shelf.releases(store_of(name, store), found)
    return [row for row in rows if version in ("", row.version)]


def withdraw(
    release: str, store: str | Path = "", *, keep: int | None = None, reason: str = "withdrawn by hand"
) -> list[str]:
    """Takes a release back, or with `keep` all of a name but the newest; returns the URIs.

    What serves, as `deploy` wrote down, is never withdrawn. A withdrawn version is not given again.

    Raises:
        InputError: there is no such release, or it serves.
        StoreError: the store could not be read or written.
    """
    from trimtab.release import shelf

    opened = store_of(release, store)
    if keep is not None:
        return shelf.keep_newest(opened, release, keep, reason)
    if "/" not in release:
        raise InputError(f"release: '{release}' has several versions; write {release}/VERSION, or keep: N")
    uri = shelf.located(opened, release)
    shelf.withdraw(opened, uri, reason)
    return [uri]


def pull(
    release: str, folder: str | Path, store: str | Path = "", keys: Sequence[str | Path] = ()
) -> tuple[Verified, list[str]]:
    """Verifies a release and lays its files and papers into a new folder, ready to be served; returns their names too.

    Args:
        release, store, keys: as for `verify`.
        folder: a new one.

    Raises:
        NotVerified: it must not be used; nothing is written.
        InputError: there is no such release, a key is none, or the folder is not new.
        StoreError: the store could not be read.
    """
    from trimtab.release import shelf

    found = verify(release, store, keys)
    return found, shelf.pull(store_of(release, store), found, Path(folder))


def store_of(release: str, store: str | Path) -> Store:
    """Opens the store of a release: a store beside a URI is a copy of the URI's."""
    from trimtab.store import open_store
    from trimtab.store.address import split_release

    parts = split_release(release)
    return open_store(str(store) or (parts[0] if parts else "") or STORE)


def serve_config(
    artifact: str | Path,
    folder: str | Path,
    *,
    recipe: Recipe | Mapping[str, Any] | str | Path | None = None,
    model_path: str = "",
    engine_path: str = "",
    model_uri: str = "",
    image: str = "",
) -> list[Path]:
    """Writes what serves an artifact, with TensorRT-LLM, vLLM or trimtab's own server, and returns the files.

    Args:
        artifact: STORE/releases/NAME/VERSION, or the folder of an export.
        folder: a new folder.
        recipe: one whose `engine` serves, instead of the artifact's.
        model_path: the checkpoint on the server; the folder itself, of a release /models/<name>, if "".
        engine_path: the built engines on the server, for trtllm-legacy; /engines/<name> if "".
        model_uri: the checkpoint for KServe: s3://…, pvc://… or oci://…; pvc://<name>/ if "".
        image: the container image for KServe; NVIDIA's of the version that serves if "".

    Raises:
        InputError: the back end does not serve the artifact, or the folder is not new.
    """
    from trimtab.serving import artifact as artifacts
    from trimtab.serving.write import write

    text = text_of(recipe, "recipe")
    served = artifacts.find(str(artifact), Recipe.parse(text) if text else None, model_path, engine_path)
    return [Path(folder) / path for path in write(served, Path(folder), model_uri, image)]


def checked(
    model: str | Path,
    goal: str,
    target: str,
    recipe: Recipe | Mapping[str, Any] | str | Path | None,
    evaluation: Evaluation | Mapping[str, Any] | str | Path | None,
    max_attempts: int,
    name: str,
) -> tuple[Asked, Deal]:
    """Checks all that can be checked in a second without the model, as `run` and `plan` do before anything long begins;
    returns what is asked, and which items besides.

    Raises:
        InputError: a value that is not valid, a text that is missing or empty, or a task that does not exist or has too
            few items.
    """
    measured = Evaluation.parse(text_of(evaluation, "evaluation") or "{}")
    if measured.task_path:  # stages run elsewhere
        measured = measured.model_copy(update={"task_path": str(Path(measured.task_path).absolute())})
    asked = Asked(str(model), goal, target, text_of(recipe, "recipe"), max_attempts, name, measured)
    _check_texts(asked)
    return asked, dealing.deal(task_sizes.of(measured), measured, asked.wanted.accept, max_attempts)


def _check_texts(asked: Asked) -> None:
    """Text that is missing or empty is refused now rather than after the baseline."""
    from trimtab.runtime.text import documents

    recipe, heldout = asked.wanted, asked.evaluation.heldout
    texts = [("calibrate.text", source.text) for source in recipe.calibrate.sources if source.dataset is None]
    texts += [("distill.text", name) for name in recipe.distill.texts] if recipe.distill else []
    for field, name in texts:
        documents.check(name, field)
    if heldout != "builtin":
        documents.read(heldout, ("", ""), field="heldout")


def _outline(asked: Asked, recipe: str) -> Outline:
    """Plans the run with a recipe; refuses one that the model or the target does not allow."""
    from trimtab.components.fetch.source import facts
    from trimtab.loop import decisions

    wanted = Recipe.parse(recipe or "{}")
    machine = hardware.on_this_machine(hardware.target(asked.target))
    return decisions.outline(asked.goal, facts(asked.model), machine, wanted, asked.evaluation)


@contextlib.contextmanager
def _signing(required: bool) -> Iterator[None]:
    """Has the gate release nothing unsigned; a key that it could not use is refused now rather than after hours."""
    before = os.environ.get(signing.REQUIRED)
    if required:
        os.environ[signing.REQUIRED] = "1"  # the gate's process inherits it
    try:
        if signing.signer() is None and signing.is_required():
            raise InputError(
                f"{signing.KEY}: is not set, and releases must be signed; `trimtab keygen FILE` makes a key"
            )
        yield
    finally:
        if required and before is None:
            del os.environ[signing.REQUIRED]
        elif required:
            os.environ[signing.REQUIRED] = before
