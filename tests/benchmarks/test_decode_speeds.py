"""The catalog's table of decoding speeds against the page that it is written from."""

from __future__ import annotations

import re
from pathlib import Path

from trimtab.catalog.decode_speeds import TABLES

RESULTS = Path(__file__).parents[2] / "benchmarks/results"


def test_the_tables_are_the_benchmark_s():
    page = (RESULTS / "h200.md").read_text()
    found = re.findall(r"^\| (torch|vLLM), `(\w+)` \| (.*) \|$", page, re.MULTILINE)
    assert len(found) == sum(len(table.speeds) for table in TABLES.values()) == 8
    for engine, form, cells in found:
        numbers = [int(cell.split()[0].replace(",", "")) for cell in cells.split("|")]
        assert TABLES["h200", engine.lower()].speeds[form] == dict(zip((1, 8, 64), numbers, strict=True))
