"""What the user gave, checked in a second before anything long begins: the same for this machine and for a cluster."""

from __future__ import annotations

from pathlib import Path

from trimtab.errors import InputError, nearest
from trimtab.profile import Profile


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


def read_profile(path: str) -> Profile:
    """Returns the profile of the cluster in a YAML file; the empty one for no path."""
    return Profile.parse(read(path, "profile") or "{}")


def release_name(model: str) -> str:
    """A release name out of the model's: its last part without the ending, in the characters a name may have."""
    stem = Path(model.rstrip("/")).name.removesuffix(".gguf")
    return "".join(c if c.isalnum() or c in "._-" else "-" for c in stem).strip("._-")[:100] or "model"
