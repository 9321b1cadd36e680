"""What people see of a run: a table for the command line, an HTML page, Markdown. Pure functions of a state.

| function | for |
|---|---|
| `rows` | the table as data: baseline, then each attempt |
| `console_table` | the command line, 120 columns |
| `summary_html` | the run's page: one file, nothing loaded from elsewhere |
| `summary_markdown` | the same in brief |
| `attempt_html` | one attempt's page: intervals, kernels, layers |
"""

from trimtab.report.console import console_table
from trimtab.report.markdown import summary_markdown
from trimtab.report.pages import attempt_html, summary_html
from trimtab.report.rows import AttemptRow, rows

__all__ = ["AttemptRow", "attempt_html", "console_table", "rows", "summary_html", "summary_markdown"]
