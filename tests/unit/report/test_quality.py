"""The damage card in the pages, in Markdown and below the console's table."""

from __future__ import annotations

from runs import ACCEPTED, DAMAGE, INT4, NOTHING_ACCEPTED, RELEASED, state

from trimtab.report import attempt_html, console_lines, quality, summary_html, summary_markdown

WORST = "Of 4 tasks geography keeps least: 0.900 (0.838 to 0.962), 12 of 200 answers lost and 3 gained."
TEXT = (
    "The next token's distribution is 0.041 nats from the baseline's, and 91.4 % of the likeliest tokens are the same; "
    "the perplexity ratio is 1.061 within 63 tokens and 1.042 from 64 on."
)


def test_the_worst_task_is_named_everywhere():
    assert console_lines(RELEASED)[:2] == [WORST, TEXT]
    page = summary_html(RELEASED)
    assert "What it costs in quality" in page and WORST in page and TEXT.replace("'", "&#39;") in page
    assert "What was lost" in attempt_html(RELEASED)
    told = summary_markdown(RELEASED)
    assert "What attempt 4, mixed 6 bits, kept by task:" in told
    assert (
        "- geography (supporting): recovery 0.900 (0.838 to 0.962); 0.700 → 0.655, 12 lost and 3 gained of 200" in told
    )
    assert "- KL divergence of the next token, nats: 0.0412 (0.0381 to 0.0443)" in told


def test_tasks_stand_by_tier_and_the_worst_of_each_first():
    rows = quality.task_rows(DAMAGE)
    assert [row[:2] for row in rows] == [
        ("arithmetic", "critical, at least 0.9"),
        ("geography", "supporting"),
        ("antonyms", "supporting"),
        ("sequences", "advisory"),
    ]
    assert rows[3][-1] == "baseline at chance" and rows[1][5:7] == ("12", "3")
    page = attempt_html(RELEASED)
    assert page.index("arithmetic") < page.index("geography <small>the worst</small>") < page.index("sequences")


def test_a_run_without_cards_shows_none():
    for given in (NOTHING_ACCEPTED, state(INT4)):
        assert console_lines(given) == [] and "cost in quality" not in summary_html(given)
        assert "kept by task" not in summary_markdown(given)


def test_the_last_card_stands_for_a_run_that_accepted_nothing():
    rejected = ACCEPTED.model_copy(update={"verdict": ACCEPTED.verdict.model_copy(update={"outcome": "rejected"})})
    assert quality.shown(state(rejected, INT4)) == (1, rejected)
    assert "What attempt 1 cost in quality" in summary_html(state(rejected, INT4))
