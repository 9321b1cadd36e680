"""The table for the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trimtab.loop.state import State
from trimtab.report import costs, quality
from trimtab.report.rows import COLUMNS, INTERVALS, AttemptRow, rows
from trimtab.report.story import headline

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

_STYLES = {"accepted": "bold green", "rejected": "red", "indeterminate": "yellow"}
_HEADINGS = COLUMNS | {
    "what": "recipe",
    "perplexity_ratio": "perplexity\nratio",
    "share": "% of\nBF16",
    "peak_megabytes": "peak\nMB",
    "decode": "tok/s",
    "seconds": "sec",
    "verdict": "verdict and reason",
}


def console_table(state: State) -> Table:
    """Returns the table of the run, at most 120 columns wide; an interval stands below its estimate."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    names = [name for name in _HEADINGS if name != "reason"]
    table = Table(title=Text(headline(state)), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.title_justify, table.title_style = "left", "bold"
    table.add_column(Text("#"))
    for name in names:
        numeric = name not in ("what", "verdict")
        table.add_column(
            Text(_HEADINGS[name]),
            justify="right" if numeric else "left",
            no_wrap=numeric,
            min_width={"what": 14, "verdict": 22}.get(name),
            overflow="fold",
        )
    found = rows(state)
    for row in found:
        style = _STYLES.get(row.outcome, "")
        mark = Text("✓" if row.accepted else str(row.number), style if row.accepted else "")
        table.add_row(mark, *(_cell(row, name, style) for name in names))
        if row is not found[-1]:
            table.add_row()
    return table


def console_lines(state: State) -> list[str]:
    """Returns what stands below the table, a sentence a line."""
    found = quality.shown(state)
    return [*(quality.sentences(found[1].verdict) if found else []), *costs.sentences(state)]


def _cell(row: AttemptRow, name: str, style: str) -> Text:
    from rich.text import Text

    text, ends = row.cells[name]
    if name == "what":
        return Text(text, style if row.accepted else "")
    if name == "verdict":
        reason = f"\n{row.reason}" if row.reason else ""
        return Text.assemble((text, style), (reason, "" if row.accepted else "dim"))
    below = ends.replace(" to ", "–").replace("; baseline", "\nof").replace("; ", "\n")
    return Text.assemble(text, (f"\n{below}", "dim")) if name in INTERVALS and ends else Text(text)
