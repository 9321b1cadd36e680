"""Generate the items of the evaluation suite from the fact tables.

The items are a pure function of the tables in ``facts/`` and of :data:`SEED`: the same sources give the same
bytes.

Usage: ``python -m trimtab.components.validation.suite.generate [--output FOLDER]``
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from trimtab.components.validation.suite.grammar import pronoun_agreement, subject_verb_agreement
from trimtab.components.validation.suite.items import Item, Section, Tables
from trimtab.components.validation.suite.knowledge import categories, common_sense, geography
from trimtab.components.validation.suite.series import arithmetic, sequences
from trimtab.components.validation.suite.words import antonyms, plurals, verb_forms

SEED = 20240607
ITEMS_PER_TASK = 540
FOLDER = Path(__file__).resolve().parent

BUILDERS: dict[str, Callable[[Tables, random.Random], Iterator[Section]]] = {
    builder.__name__: builder
    for builder in (
        subject_verb_agreement,
        pronoun_agreement,
        antonyms,
        geography,
        arithmetic,
        plurals,
        verb_forms,
        common_sense,
        categories,
        sequences,
    )
}


def queue(section: Section, rng: random.Random) -> Iterator[Item]:
    """Yield the items of a section: one variant of every fact, then the next variant of every fact."""
    facts = rng.sample(section, len(section))
    for variants in itertools.zip_longest(*facts):
        yield from (item for item in variants if item is not None)


def select(sections: Sequence[Section], count: int, rng: random.Random) -> list[Item]:
    """Take items from the sections in turn, none twice, until there are enough."""
    chosen: dict[tuple[str, str], Item] = {}
    queues = [queue(section, rng) for section in sections]
    while len(chosen) < count and queues:
        for items in list(queues):
            fresh = next((item for item in items if item.key not in chosen), None)
            if fresh is None:
                queues.remove(items)
            elif len(chosen) < count:
                chosen[fresh.key] = fresh
    if len(chosen) < count:
        raise ValueError(f"the tables give only {len(chosen)} of {count} items")
    return list(chosen.values())


def read_tables(task: str) -> Tables:
    """Read the fact tables of a task."""
    return yaml.safe_load((FOLDER / "facts" / f"{task}.yaml").read_text(encoding="utf-8"))


def rows(task: str) -> list[dict[str, Any]]:
    """Return the lines of a task's data file, in a random but fixed order."""
    rng = random.Random(f"{SEED}/{task}")
    items = select(list(BUILDERS[task](read_tables(task), rng)), ITEMS_PER_TASK, rng)
    # Any prefix of the file is then a random sample of the task, as tests that stop early need it.
    rng.shuffle(items)
    lines = []
    for number, item in enumerate(items, start=1):
        choices = rng.sample((item.right, *item.wrong), 1 + len(item.wrong))
        lines.append(
            {
                "id": f"{task}-{number:04d}",
                "context": item.context,
                "choices": choices,
                "answer": choices.index(item.right),
            }
        )
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Write the data file of every task."""
    parser = argparse.ArgumentParser(description="Generate the items of the evaluation suite.")
    parser.add_argument("--output", type=Path, default=FOLDER / "data", help="folder of the data files")
    output: Path = parser.parse_args(argv).output
    output.mkdir(parents=True, exist_ok=True)
    for task in BUILDERS:
        text = "".join(json.dumps(row) + "\n" for row in rows(task))
        (output / f"{task}.jsonl").write_bytes(text.encode("ascii"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
