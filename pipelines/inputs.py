"""What the user gave, checked in a second before anything long begins: the same for this machine and for a cluster."""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import InputError, nearest
from trimtab.profile import Profile
from trimtab.schema import mapping
from trimtab.state import Evaluation


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
    if document.get("task_path"):
        document["task_path"] = str(Path(document["task_path"]).absolute())
    return Evaluation.parse(document)


def read_profile(path: str) -> Profile:
    """Returns the profile of the cluster in a YAML file; the empty one for no path."""
    return Profile.parse(read(path, "profile") or "{}")


def release_name(model: str) -> str:
    """A release name out of the model's: its last part without the ending, in the characters a name may have."""
    stem = Path(model.rstrip("/")).name.removesuffix(".gguf")
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in stem).strip("._-")[:100] or "model"
