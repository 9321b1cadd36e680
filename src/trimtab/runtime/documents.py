"""Documents of text, out of the files that people keep them in.

| ending | what is read |
|---|---|
| .jsonl, .ndjson | each line is a record |
| .json | a list of records, one record, or a record on each line |
| .csv, .tsv | each row under the header is a record |
| .parquet, .arrow, .gz, .zip, … | refused: a dataset reads these |
| any other | the file is one document |

A record has "text", or "messages" with their roles, which the tokenizer's chat template writes out; in JSON it may be a
text by itself. `conversations` says what messages may be.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from trimtab.errors import InputError
from trimtab.runtime.conversations import normalized, render

_RECORD = 'a JSON object with a field "text" (a string) or "messages" (a list of {"role": …, "content": …})'
_LINES, _TABLES = (".jsonl", ".ndjson"), {".csv": ",", ".tsv": "\t"}
#: Endings of files that are no text; where the content is text after all, it is refused all the same.
_DATASETS = (".parquet", ".arrow", ".feather", ".gz", ".zst", ".xz", ".bz2", ".zip", ".tar", ".xlsx", ".pdf", ".docx")
#: Half of a UTF-16 pair without its other half, which JSON can hold and no text can.
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def read(source: str, builtin: tuple[str, str], tokenizer: Any = None, field: str = "text") -> list[str]:
    """Returns the documents of a file, or trimtab's own text; empty ones are left out.

    Args:
        source: a path, or "builtin".
        builtin: the package and file name of trimtab's own text.
        tokenizer: has the chat template; without one, "messages" are refused.
        field: the field of the recipe, for messages.

    Raises:
        InputError: the file does not exist, is not UTF-8, is no text or is empty, or a record of it is no document;
            names the record.
    """
    if source == "builtin":
        package, name = builtin
        return [resources.files(package).joinpath(name).read_text(encoding="utf-8")]
    found = []
    for where, record in _records(source, field):
        try:
            found.append(_document(record, tokenizer))
        except ValueError as error:
            raise InputError(f"{where} {error}") from None
    return _filled(found, source, field)


def check(source: str, field: str) -> None:
    """Refuses a file that `read` would refuse with any tokenizer: whether it has a chat template is not looked at.

    Raises:
        InputError: as `read`.
    """
    if source == "builtin":
        return
    found = []
    for where, record in _records(source, field):
        try:
            text = record if isinstance(record, str) else _text(record)
            found.append(str(normalized(_messages(record))) if text is None else text)
        except ValueError as error:
            raise InputError(f"{where} {error}") from None
    _filled(found, source, field)


def document(value: Any, tokenizer: Any = None, tools: Any = None) -> str:
    """Returns a text as it is, and a list of {"role", "content"} as the tokenizer's chat template writes it.

    Half a UTF-16 pair, which no tokenizer takes, becomes U+FFFD, as where a file is decoded.

    Args:
        tools: the functions that a conversation could call, as the template takes them.

    Raises:
        ValueError: neither of them, or no template that takes these messages; says what it is and what it must be.
    """
    text = value if isinstance(value, str) else render(value, tokenizer, tools)
    return _LONE_SURROGATE.sub("\ufffd", text)


def _filled(found: list[str], source: str, field: str) -> list[str]:
    found = [document for document in found if document.strip()]
    if not found:
        raise InputError(f"{field}: '{source}' is empty; write the path of a file with text in it")
    return found


def _document(record: Any, tokenizer: Any) -> str:
    if isinstance(record, str):
        return document(record)
    text = _text(record)
    return document(text) if text is not None else document(_messages(record), tokenizer, record.get("tools"))


def _text(record: Any) -> str | None:
    """Returns the text of a record, None where it has messages."""
    if not isinstance(record, dict) or "text" not in record:
        return None
    if not isinstance(record["text"], str):
        raise ValueError(f"must be {_RECORD}")
    return record["text"]


def _messages(record: Any) -> list[Any]:
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError(f"must be {_RECORD}")
    return record["messages"]


def _records(source: str, field: str) -> Iterator[tuple[str, Any]]:
    """Yields what a record is called in messages, and the record: a text, or whatever the file holds in its place."""
    path, of = Path(source), f"of '{source}'"
    suffix = path.suffix.lower()
    text = _content(path, suffix, source, field)
    if suffix in _LINES:
        yield from ((f"{field}: line {number} {of}", record) for number, record in _lines(text))
    elif suffix == ".json":
        yield from ((f"{field}: {name} {of}", record) for name, record in _json(text, f"{field}: '{source}'"))
    elif suffix in _TABLES:
        rows = _table(text, _TABLES[suffix], f"{field}: '{source}'")
        yield from ((f"{field}: line {number} {of}", record) for number, record in rows)
    else:
        yield f"{field}: '{source}'", text


def _content(path: Path, suffix: str, source: str, field: str) -> str:
    if not path.is_file():
        what = "a folder; write hf: before it where it is a dataset, or" if path.is_dir() else "not a file;"
        raise InputError(
            f"{field}: '{source}' is {what} write 'builtin' or the path of a .txt, .jsonl, .json or .csv file"
        )
    if suffix in _DATASETS:
        raise InputError(
            f"{field}: '{source}' is no file of text; write its rows as .jsonl with a field \"text\", or give their "
            f"folder as a dataset where the recipe takes one, text: 'hf:{path.parent}'"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        remedy = "write the path of a UTF-8 file, such as `iconv -t UTF-8` makes"
        raise InputError(f"{field}: '{source}' cannot be read ({error}); {remedy}") from None


def _lines(text: str) -> Iterator[tuple[int, Any]]:
    # Not splitlines(): JSON may hold the other line separators of Unicode as they are.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError):
                yield number, None


def _json(text: str, where: str) -> Iterable[tuple[str, Any]]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        lines = list(_lines(text))
        if len(lines) > 1 and isinstance(lines[0][1], dict):  # JSON lines by another name
            return [(f"line {number}", record) for number, record in lines]
        what = f"a list of records or records on lines, each of them {_RECORD}"
        raise InputError(f"{where} is no JSON ({error}); write {what}, or name a text file .txt") from None
    if isinstance(found, list):
        return [(f"entry {number}", record) for number, record in enumerate(found, start=1)]
    return [("the record", found)]


def _table(text: str, delimiter: str, where: str) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(sys.maxsize)  # a document is longer than the 131,072 characters that csv allows a cell
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        if "text" not in header:
            have = f"'{', '.join(header)}'" if header else "nothing"
            raise InputError(f"{where} has no column 'text' in its first line, which has {have}; name the column so")
        column = header.index("text")
        for row in rows:
            if row and len(row) <= column:
                few = f"{len(row)} columns in line {rows.line_num}, too few for 'text'"
                raise InputError(f"{where} has {few}; add them")
            if row:
                yield rows.line_num, {"text": row[column]}
    except csv.Error as error:
        raise InputError(
            f"{where} is no CSV: line {rows.line_num}: {error}; write quotes around a text that has commas, line ends "
            f"or quotes, and two quotes for one inside"
        ) from None
