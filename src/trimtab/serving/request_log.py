"""A log of requests: when each came and how long it was, and nothing of what it said.

`trimtab serve --record FOLDER` writes JSON lines, a file for each day and server::

    {"time": 1732790000.123, "input_tokens": 512, "output_tokens": 87, "seconds": 1.93, "first_token_seconds": 0.12,
     "outcome": "stop"}

`time` is the arrival, in seconds since 1970 or in ISO 8601, UTC where no zone is given; `seconds` is from there to the
end of the answer. Only the first four fields are read, of which `seconds` may be absent; whatever else a line holds is
passed over. What other programs write is read too, see `FORMS`: JSON lines in files that end in .jsonl, tables with a
head in .csv, both also with .gz behind.
"""

from __future__ import annotations

import csv
import gzip
import json
import math
import tempfile
from array import array
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from trimtab.base import progress
from trimtab.base.errors import InputError

SUFFIXES = (".jsonl", ".csv", ".jsonl.gz", ".csv.gz")


@dataclass(frozen=True)
class Form:
    """What a program calls the fields of a request.

    `seconds` is the field with how long it took, `end` the one with when it ended, of which a form has one at most;
    `unit` the seconds that its numbers of time count.
    """

    time: str
    input: str
    output: str
    seconds: str = ""
    end: str = ""
    unit: float = 1.0


FORMS = {
    "trimtab": Form("time", "input_tokens", "output_tokens", seconds="seconds"),
    # docs.litellm.ai/docs/proxy/logging_spec
    "LiteLLM": Form("startTime", "prompt_tokens", "completion_tokens", end="endTime"),
    # docs.nvidia.com/aiperf, trace replay; github.com/kvcache-ai/Mooncake
    "Mooncake": Form("timestamp", "input_length", "output_length", unit=1e-3),
    # github.com/Azure/AzurePublicDataset, AzureLLMInferenceTrace
    "Azure": Form("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    # github.com/HPMLL/BurstGPT
    "BurstGPT": Form("Timestamp", "Request tokens", "Response tokens"),
}


@dataclass(frozen=True)
class Requests:
    """Recorded requests, in the order of their arrival; the arrays have shape (requests,).

    `time` is in seconds, `input` and `output` in tokens, `seconds` NaN where it was not recorded.
    """

    time: np.ndarray
    input: np.ndarray
    output: np.ndarray
    seconds: np.ndarray

    def __len__(self) -> int:
        return len(self.time)

    def newest(self, days: float) -> Requests:
        """Returns the requests that came within so many days before the last one."""
        first = int(np.searchsorted(self.time, self.time[-1] - days * 86400, side="left"))
        return Requests(self.time[first:], self.input[first:], self.output[first:], self.seconds[first:])


def read(address: str) -> Requests:
    """Reads a log, or all logs that lie directly in a folder; a path or s3://bucket/key.

    Raises:
        InputError: no log is there, or a line is none of a request; names the file, the line, the field and the value.
        StoreError: S3 could not be read.
    """
    values = array("d")
    with _files(address) as files:
        for path in progress.track(files, "traffic", f"reading {address}", len(files)):
            for row in _rows(path):
                values.extend(row)
    if not values:
        raise InputError(f"recorded: '{address}' holds no request; record some with `trimtab serve --record FOLDER`")
    table = np.frombuffer(values).reshape(-1, 4)
    table = table[np.argsort(table[:, 0], kind="stable")]
    return Requests(table[:, 0], table[:, 1].astype(np.int64), table[:, 2].astype(np.int64), table[:, 3])


@contextmanager
def _files(address: str) -> Iterator[list[Path]]:
    """Gives the logs as local files."""
    if not address.startswith("s3://"):
        yield _logs(Path(address.removeprefix("file://")), address)
        return
    from trimtab.store.s3 import S3Back

    bucket, _, key = address.removeprefix("s3://").partition("/")
    with tempfile.TemporaryDirectory(prefix="trimtab-traffic-") as folder:
        prefix, _, name = key.rpartition("/") if key.endswith(SUFFIXES) else (key.rstrip("/"), "", "")
        S3Back(bucket, prefix).download(Path(folder), (name,) if name else SUFFIXES)
        yield _logs(Path(folder) / name, address)


def _logs(path: Path, address: str) -> list[Path]:
    found = [path] if path.is_file() else sorted(p for p in path.glob("*") if p.name.endswith(SUFFIXES))
    if not found:
        known = ", ".join(SUFFIXES)
        raise InputError(f"recorded: '{address}' is no log and no folder of logs; write one that ends in {known}")
    if not found[0].name.endswith(SUFFIXES):
        raise InputError(f"recorded: '{address}' does not end like a log; name it {path.name}.jsonl, or .csv")
    return found


def _rows(path: Path) -> Iterator[tuple[float, int, int, float]]:
    """Yields (time, input tokens, output tokens, seconds) of each request of a file."""
    form = None
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            for number, record in _records(file, path):
                form = form or _form(record, f"{path.name}, line {number}")
                try:
                    yield _row(record, form)
                except ValueError as error:
                    raise InputError(f"recorded: {path.name}, line {number}: {error}") from None
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"recorded: {path.name} cannot be read ({error}); record it anew") from None


def _records(file: TextIO, path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Yields line numbers and records. A last JSON line without its end is still being written, and passed over."""
    if path.name.removesuffix(".gz").endswith(".csv"):
        table = csv.DictReader(file)
        for record in table:
            yield table.line_num, record
        return
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            if not line.endswith("\n"):
                return
            raise InputError(f"recorded: {path.name}, line {number} is not JSON: {error}") from None
        if not isinstance(record, dict):
            raise InputError(f"recorded: {path.name}, line {number} is no object; write {{\"time\": …}}")
        yield number, record


def _form(record: Mapping[str, Any], where: str) -> Form:
    for form in FORMS.values():
        if form.time in record and form.input in record:
            return form
    fields = ", ".join(map(str, list(record)[:8]))
    known = f"{', '.join(FORMS)} are read"
    raise InputError(f"recorded: {where} has the fields {fields}; write time, input_tokens, output_tokens ({known})")


def _row(record: Mapping[str, Any], form: Form) -> tuple[float, int, int, float]:
    time = _time(record, form.time, form.unit)
    seconds = math.nan
    if form.end and record.get(form.end) not in (None, ""):
        seconds = _time(record, form.end, form.unit) - time
        if seconds < 0:
            raise ValueError(f"{form.end}: {record[form.end]!r} is before {form.time}; write a later time")
    elif form.seconds and record.get(form.seconds) not in (None, ""):
        seconds = _number(record, form.seconds, "0 or more seconds")
    return time, _tokens(record, form.input), _tokens(record, form.output), seconds


def _number(record: Mapping[str, Any], field: str, remedy: str) -> float:
    value = record.get(field)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0:
        raise ValueError(f"{field}: {value!r} is not valid; write {remedy}")
    return number


def _tokens(record: Mapping[str, Any], field: str) -> int:
    number = _number(record, field, "a whole number, 0 or more")
    if number != int(number):
        raise ValueError(f"{field}: {record[field]!r} is not valid; write a whole number, 0 or more")
    return int(number)


def _time(record: Mapping[str, Any], field: str, unit: float) -> float:
    value = record.get(field)
    if isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value.strip())
            return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()
        except ValueError:
            pass  # a number in a table
    return unit * _number(record, field, "seconds, or a moment as 2026-11-28T09:30:00Z")
