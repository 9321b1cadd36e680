"""The run in Markdown, for KFP's Markdown artifact."""

from __future__ import annotations

import html
import re

from trimtab.loop.state import State
from trimtab.report import costs
from trimtab.report.advice import next_steps, serving
from trimtab.report.quality import markdown_lines
from trimtab.report.rows import COLUMNS, rows
from trimtab.report.story import explanation, headline


def summary_markdown(state: State) -> str:
    """Returns headline, explanation and table; text that people wrote is escaped, for Markdown and HTML."""
    table = rows(state)
    lines = [f"# {_escape(headline(state))}", "", _escape(" ".join(explanation(state))), ""]
    if table:
        lines += [_line(["", *COLUMNS.values()]), _line(["---"] * (len(COLUMNS) + 1))]
    for row in table:
        cells = [f"{text} ({ends})" if ends else text for text, ends in row.cells.values()]
        cells = [_escape(cell) for cell in (row.label, *cells)]
        lines.append(_line([f"**{cell}**" for cell in cells[:2]] + cells[2:] if row.accepted else cells))
    for line in ["", *markdown_lines(state)]:
        lines.append(f"- {_escape(line[2:])}" if line.startswith("- ") else _escape(line))
    lines += ["", *(_escape(line) for line in costs.sentences(state))]
    if steps := next_steps(state):
        lines += ["", "## What to try next", "", *(f"{n}. {_escape(step)}" for n, step in enumerate(steps, start=1))]
    if commands := serving(state):
        lines += ["", "## How to serve it", "", *(f"    {_escape(command)}" for command in commands)]
    about = f"Goal {state.goal} on {state.target}; model {state.name}, digest {state.model.digest[:12]}."
    return "\n".join([*lines, "", _escape(about), ""])


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _escape(text: str) -> str:
    """Escapes what Markdown or HTML would read as markup; an underscore inside a word is none."""
    text = html.escape(text, quote=False)
    return re.sub(r"([\\`*\[\]|~#]|(?<!\w)_|_(?!\w))", r"\\\1", text)
