"""What people see of a run: a table for the command line, an HTML page, Markdown.

Pure functions of a state, but for `side_by_side`.

| function | for |
|---|---|
| `rows` | the table as data: baseline, then each attempt |
| `console_table`, `console_lines` | the command line, 120 columns |
| `serving`, `next_steps` | how to serve what was accepted; what to try where nothing was |
| `side_by_side` | what the unchanged model and the accepted one write, out of the store |
| `summary_html` | the run's page: one file, nothing loaded from elsewhere |
| `summary_markdown` | the same in brief |
| `attempt_html` | one attempt's page: intervals, kernels, layers |
"""

from trimtab.report.advice import next_steps, serving
from trimtab.report.console import console_lines, console_table
from trimtab.report.generations import SideBySide, side_by_side
from trimtab.report.markdown import summary_markdown
from trimtab.report.pages import attempt_html, summary_html
from trimtab.report.rows import AttemptRow, rows

__all__ = [
    "AttemptRow",
    "SideBySide",
    "attempt_html",
    "console_lines",
    "console_table",
    "next_steps",
    "rows",
    "serving",
    "side_by_side",
    "summary_html",
    "summary_markdown",
]
