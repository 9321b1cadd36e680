"""Documents of text: a text file, JSON lines, conversations written with a chat template."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from trimtab.errors import InputError

_LINE = 'a JSON object with a field "text" (a string) or "messages" (a list of {"role": …, "content": …})'


def read(source: str, builtin: tuple[str, str], tokenizer: Any = None, field: str = "text") -> list[str]:
    """Returns the documents of a file, or trimtab's own text: a .txt file is one, each line of a .jsonl file one.

    A line holds "text", or "messages", which the tokenizer's chat template writes out; empty ones are left out.

    Args:
        source: a path, or "builtin".
        builtin: the package and file name of trimtab's own text.
        tokenizer: has the chat template; without one, "messages" are refused.
        field: the field of the recipe, for messages.

    Raises:
        InputError: the file does not exist, is not UTF-8 or is empty, or a line of it is no document; names the line.
    """
    if source == "builtin":
        package, name = builtin
        return [resources.files(package).joinpath(name).read_text(encoding="utf-8")]
    path = Path(source)
    if not path.is_file():
        raise InputError(
            f"{field}: '{source}' is not a file; write 'builtin' or the path of a .txt or .jsonl file"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{field}: '{source}' cannot be read ({error}); write the path of a UTF-8 file") from None
    found = _lines(text, source, tokenizer, field) if path.suffix == ".jsonl" else [text]
    found = [document for document in found if document.strip()]
    if not found:
        raise InputError(f"{field}: '{source}' is empty; write the path of a file with text in it")
    return found


def _lines(text: str, source: str, tokenizer: Any, field: str) -> list[str]:
    found = []
    # Not splitlines(): JSON may hold the other line separators of Unicode as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{field}: line {number} of '{source}'"
        try:
            value = json.loads(line)
        except ValueError:
            value = None
        kind, name = (str, "text") if isinstance(value, dict) and "text" in value else (list, "messages")
        if not isinstance(value, dict) or not isinstance(value.get(name), kind):
            raise InputError(f"{where} must be {_LINE}")
        try:
            found.append(document(value[name], tokenizer))
        except ValueError as error:
            raise InputError(f"{where} {error}") from None
    return found


def document(value: Any, tokenizer: Any = None) -> str:
    """Returns a text as it is, and a list of {"role", "content"} as the tokenizer's chat template writes it.

    Raises:
        ValueError: neither of them, or no template that takes these messages; says what it is and what it must be.
    """
    if isinstance(value, str):
        return value
    if not _is_conversation(value):
        raise ValueError(f'holds {_short(value)}; it must be a string, or a list of {{"role": …, "content": …}}')
    if tokenizer is None:
        raise ValueError('holds "messages", which are not read here; write "text"')
    if not tokenizer.chat_template:
        raise ValueError("holds messages, and the model's tokenizer has no chat template; write them out as text")
    try:
        return tokenizer.apply_chat_template(value, tokenize=False)
    except (jinja2.TemplateError, ValueError, TypeError) as error:
        raise ValueError(f"holds messages that the model's chat template refuses: {error}") from None


def _is_conversation(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
        and all(isinstance(m.get("content"), str) for m in value)
    )


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:60]}…"
