"""What the user gave, checked in a second before anything long begins: the same for this machine and for a cluster."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trimtab.base.errors import InputError, nearest
from trimtab.base.schema import Document, mapping
from trimtab.catalog.goals import DEFAULT_GOAL, GOALS
from trimtab.model import hardware
from trimtab.recipe import Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.stages.profile import Profile
from trimtab.store.address import check_name

#: What a run has where nothing is said.
GOAL, TARGET, ATTEMPTS = DEFAULT_GOAL, "cpu", 5


@dataclass(frozen=True)
class Asked:
    """What a run is asked for, checked as far as that goes without its model and its store.

    `recipe` is its text, "" for none: which fields were written counts, not the values alone.
    """

    model: str
    goal: str
    target: str
    recipe: str
    max_attempts: int
    name: str
    evaluation: Evaluation

    def __post_init__(self) -> None:
        check_attempts(self.max_attempts)
        check_choice("goal", self.goal, GOALS)
        release_name(self.name, self.model)
        hardware.target(self.target)
        Recipe.parse(self.recipe or "{}")

    @property
    def wanted(self) -> Recipe:
        """The recipe; the empty one for none."""
        return Recipe.parse(self.recipe or "{}")

    def parameters(self, **others: Any) -> dict[str, Any]:
        """Returns the parameters of the pipeline by name: what was asked for, and others or in its place."""
        asked = {**vars(self), **others}
        return {**asked, "name": release_name(self.name, asked["model"]), "evaluation": self.evaluation.to_json()}


def text_of(document: Document | Mapping[str, Any] | Path | str | None, field: str) -> str:
    """Returns a document as the text that was or might have been written: YAML or JSON, "" for None.

    Args:
        document: a document, a mapping of its fields, the path of a file, or its text.
        field: what it is called in a message.

    Raises:
        InputError: the file cannot be read.
    """
    if document is None:
        return ""
    if isinstance(document, Path):
        return read(str(document), field)
    if isinstance(document, Document):  # its defaults are left out, but not where somebody wrote them
        document = document.model_dump(mode="json", exclude_unset=True)
    return document if isinstance(document, str) else json.dumps(dict(document), ensure_ascii=False)


def check_attempts(number: int) -> None:
    """Refuses a number of attempts that the pipeline is not unrolled for."""
    if not 1 <= number <= 10:
        raise InputError(f"max_attempts: {number} is not valid; write 1 to 10")


def check_choice(field: str, value: str, valid: tuple[str, ...]) -> None:
    """Refuses a value outside a closed list; names the nearest."""
    if value not in valid:
        raise InputError(f"{field}: '{value}' is not valid; {nearest(value, valid)}")


def read(path: str, field: str) -> str:
    """Returns the text of a file, "" for no path."""
    if not path:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{field}: '{path}' cannot be read ({error.__class__.__name__}); write a YAML file") from None


def read_evaluation(path: str, tasks: str | None = None, task_path: str = "") -> Evaluation:
    """Returns what is measured: a YAML file's, "" for none, with the tasks that were named beside it.

    Args:
        tasks: names of tasks, separated by commas; None where none are named beside the file.
        task_path: the folder of their YAMLs; "" where none is named beside the file.

    Raises:
        InputError: the file is none, or has a bad value, or names what is named beside it too.
    """
    document = dict(mapping(read(path, "evaluation") or "{}", "evaluation"))
    for option, field, value in (("--tasks", "tasks", tasks), ("--task-path", "task_path", task_path or None)):
        if value is None:
            continue
        if field in document:
            raise InputError(f"{option}: '{path}' has '{field}' too; name them there or here, not in both places")
        document[field] = value
    if tasks is not None:
        document["tasks"] = [task.strip() for task in tasks.split(",") if task.strip()]
        if not document["tasks"]:
            raise InputError("--tasks: names no task; write names separated by commas, such as trimtab_suite")
    return Evaluation.parse(document)


def read_profile(path: str) -> Profile:
    """Returns the profile of the cluster in a YAML file; the empty one for no path."""
    return Profile.parse(read(path, "profile") or "{}")


def release_name(given: str, model: str) -> str:
    """Returns the name that a user gave the release, or one out of the model's.

    That is the last part of the model's path without its ending and without accents. Where letters of another script
    are lost, eight digits of the whole name's checksum stand for them, so that two models keep two names.

    Raises:
        InputError: the given name is not valid.
    """
    if given:
        return check_name(given, "release")
    stem = re.sub(r"\.gguf$", "", Path(model.rstrip("/")).name, flags=re.IGNORECASE)
    letters = [c for c in unicodedata.normalize("NFKD", stem) if not unicodedata.combining(c)]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", "".join(c for c in letters if c.isascii() or not c.isalnum()))
    name = name.strip("._-")[:100] or "model"
    if all(c.isascii() or not c.isalnum() for c in letters):
        return name
    return f"{name}-{hashlib.sha256(stem.encode(errors='surrogatepass')).hexdigest()[:8]}"
