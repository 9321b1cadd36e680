"""The report of made-up runs: every outcome renders, numbers are there, hostile text stays text."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console
from runs import (
    ACCEPTED,
    BASELINE,
    BLOCK_BY_BLOCK,
    CALIBRATION,
    DOES_NOT_FIT,
    EMPTY,
    HOSTILE,
    INT4,
    KERNELS,
    LAYERS,
    NOTHING_ACCEPTED,
    RELEASED,
    STAGE_FAILED,
    STATES,
    UNHELD,
    hostile,
    interval,
    state,
)

from trimtab.judge import Measurements
from trimtab.loop.ledger import savings
from trimtab.loop.state import State
from trimtab.report import (
    SideBySide,
    attempt_html,
    console_table,
    figures,
    next_steps,
    rows,
    serving,
    summary_html,
    summary_markdown,
)
from trimtab.report.compared import measured
from trimtab.report.rows import DASH, fraction, number
from trimtab.stages import STAGES

VOID = {"meta", "br", "hr", "img", "input", "link"}


class Page(HTMLParser):
    """Checks that elements nest, and collects text, tags and attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.text = [], [], [], ""
        self.feed(page)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.text += data


def test_a_training_is_drawn():
    curve = {"train": [(4096, 1.2), (8192, 0.6)], "heldout": [(0, 1.5), (8192, 0.7)]}
    told = {"tokens": 8192, "steps": 2, "heldout_loss_before": 1.5, "heldout_loss_after": 0.7, "improved": 1.0,
            "stopped_early": 0.0, "curve": curve}  # fmt: skip
    text = attempt_html(RELEASED, distillation=told)
    assert "8,192 tokens in 2 steps. Held-out loss 1.5000 before, 0.7000 after.</p>" in text
    assert "distillation loss: held out 1.5000 before and 0.7000 after" in text and text.count("held-out loss ") == 2
    assert "training did not help" in attempt_html(RELEASED, distillation={**told, "improved": 0.0})
    assert "Distillation</h2>" not in attempt_html(RELEASED)


def test_every_stage_has_a_colour_of_its_own():
    seconds = dict.fromkeys([*reversed(STAGES), "validate", "another"], 1.0)
    page = attempt_html(state(verdict=BASELINE.verdict, seconds=seconds))
    shown = re.findall(r'<i class="s(\d+)" style="[^"]*" title="(\w+) ', page)
    assert shown == [(str(n), name) for n, name in enumerate([*STAGES, "validate", "another"])]
    light, dark = (dict(re.findall(r"--(s\d+): (#\w+);", part)) for part in page.split("prefers-color-scheme: dark"))
    for colours in (light, light | dark):
        assert len(set(colours.values())) == len(colours) == len(shown)


def printed(given: State, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(console_table(given))
    return console.file.getvalue()


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("render", (summary_html, attempt_html))
def test_a_page_is_complete_and_loads_nothing(name, render):
    text = render(STATES[name])
    page = Page(text)
    assert page.tags.count("h1") == 1
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onload", "onclick"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?://|url\(|@import", text)
    assert "None" not in page.text and "nan" not in page.text.split()
    assert len(text) < 200_000


@pytest.mark.parametrize("name", STATES)
def test_every_run_has_a_table_and_markdown(name):
    text = printed(STATES[name])
    assert max(map(len, text.splitlines())) <= 120
    told = summary_markdown(STATES[name])
    lines = [line for line in told.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) <= 1
    for row in rows(STATES[name]):
        assert row.what in told


def test_rows_are_the_baseline_and_each_attempt():
    table = rows(RELEASED)
    assert [row.label for row in table] == ["baseline", "1", "2", "3", "4"]
    assert [row.accepted for row in table] == [False, False, False, False, True]
    accepted = table[-1]
    assert (accepted.what, accepted.megabytes, accepted.share, accepted.decode) == ("mixed 6 bits", 146.8, 0.413, 49.1)
    assert accepted.seconds == pytest.approx(122.0)
    assert accepted.verdict == "accepted, confirmed"
    assert rows(EMPTY) == []


def test_of_a_baseline_that_is_scored_block_by_block_it_says_why_there_is_no_speed():
    base, attempt = rows(BLOCK_BY_BLOCK)
    assert (base.cells["decode"], base.cells["peak_megabytes"]) == ((DASH, ""), (DASH, ""))
    assert "not measured: scored block by block" in base.reason and attempt.decode == 49.1
    lines = {line.what: line for line in measured(BLOCK_BY_BLOCK.history[0].verdict, UNHELD.verdict)}
    for what in ("decode at batch 1, tokens/s", "throughput at batch 8, tokens/s", "peak memory, MB"):
        assert (lines[what].theirs, lines[what].change) == ("not measured: block by block", DASH)
    assert lines["size, MB"].theirs == "141,107" and lines["perplexity"].theirs == "25.9"
    text = summary_html(BLOCK_BY_BLOCK)
    assert "not measured: block by block" in text and "NaN" not in text
    assert savings(BLOCK_BY_BLOCK, BLOCK_BY_BLOCK.history[0]) is None


def test_what_was_not_measured_is_a_dash():
    failed = rows(RELEASED)[2]
    missing = ("accuracy", "recovery", "perplexity_ratio", "megabytes", "share", "decode", "peak_megabytes")
    assert {failed.cells[name] for name in missing} == {(DASH, "")}
    assert failed.verdict == "rejected: does_not_fit"
    assert failed.cells["seconds"] == ("16", "")


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, DASH), (float("nan"), DASH), (0.0, "0.0"), (3.14159, "3.14"), (27.21, "27.2"), (1234.5, "1,234")]
    + [(99.96, "100"), (float("inf"), "∞"), (float("-inf"), "-∞")],
)
def test_numbers(value, text):
    assert number(value) == text


@pytest.mark.parametrize(("value", "text"), [(0.98567, "0.986"), (12.345, "12.3"), (-0.12, "-0.120"), (None, DASH)])
def test_fractions(value, text):
    assert fraction(value) == text


@pytest.mark.parametrize("render", (summary_html, summary_markdown, printed))
def test_numbers_and_verdicts_are_shown(render):
    text = render(RELEASED)
    for shown in ("0.986", "0.961", "1.047", "1.396", "147", "41.3", "49.1", "701", "does_not_fit", "mixed 6 bits"):
        assert shown in text, shown
    assert "mixed 6 bits is accepted on attempt 4: 45.4 % fewer bytes." in text


def test_the_summary_tells_the_story():
    page = Page(summary_html(RELEASED))
    for brief_ in RELEASED.history:
        assert brief_.why in page.text and brief_.verdict.reason in page.text
    for shown in (
        "confirmed on 960 fresh items",
        "effective_bits: 6",
        RELEASED.model.digest,
        RELEASED.trees["export"].uri,
        RELEASED.history[-1].evaluation.digest,
        RELEASED.history[-1].recipe.digest,
        "< 0.001",
        "found in the store: calibrate, sensitivity",
        "Not in the picture, for want of measurements: 2 ",
    ):
        assert shown in page.text, shown
    assert page.tags.count("figure") == 4


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nothing accepted", "none of the 2 recipes tried was shown to be good enough"),
        ("stage failed", "the one recipe tried was not shown to be good enough"),
        ("baseline failed", "the baseline itself could not be measured"),
        ("no attempt", "no recipe was tried"),
        ("empty", "no recipe was tried"),
    ],
)
def test_when_nothing_is_accepted_the_page_says_why(name, said):
    text = Page(summary_html(STATES[name])).text
    assert said in text and "is accepted on" not in text
    assert "What to ship" not in text


def test_causes_are_counted():
    text = Page(summary_html(NOTHING_ACCEPTED)).text
    assert "2 of at most 2 attempts were made; they ended in: 1 × perplexity, 1 × undecided accuracy." in text


@pytest.mark.parametrize("render", (summary_html, attempt_html))
def test_hostile_text_is_escaped(render):
    text = render(hostile(RELEASED))
    page = Page(text)
    assert "<script" not in text and "script" not in page.tags
    assert "&lt;script&gt;alert(" in text
    assert "<script>alert" in page.text


def test_hostile_kernels_and_layers_are_escaped():
    kernels = {HOSTILE: {"kernel": HOSTILE, "emulated": True}}
    layers = [{"layer": HOSTILE, "relative_error": 0.1, "cosine": 0.9}]
    calibration = {**CALIBRATION, "sources": [{**CALIBRATION["sources"][0], "source": HOSTILE}]}
    text = attempt_html(RELEASED, kernels, layers, calibration)
    assert "<script" not in text and Page(text).text.count("<script>alert") == 4


def test_hostile_text_does_not_steer_markdown_or_terminal():
    told = summary_markdown(hostile(RELEASED))
    assert "<script" not in told and not re.search(r"(?<!\\)\[x", told)
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in told.splitlines() if line.startswith("|")}) == 1
    assert "\x1b" not in printed(hostile(RELEASED))


def test_an_attempt_shows_what_it_was_calibrated_on():
    text = " ".join(Page(attempt_html(RELEASED, calibration=CALIBRATION)).text.split())
    for shown in ("hf:owner/name train", "768", "612", "6,300,000", "notes.txt", "256", "812,345"):
        assert shown in text, shown
    assert "1,024 samples of 2,048 tokens, in which 34.6 % of the vocabulary occurs." in text
    assert "Length of a document in tokens: median 512, p10 41, p90 7,321." in text
    assert "Calibration data" not in attempt_html(RELEASED)


def test_an_export_that_was_not_loaded_is_said_to_be():
    text = attempt_html(RELEASED, reload={"skipped": "a head that caps <its> logits", "outputs": {}})
    assert "Not loaded by the embedded engine before it was measured: a head that caps &lt;its&gt; logits." in text
    assert "Not loaded" not in attempt_html(RELEASED, reload={"skipped": None, "outputs": {}})


def cut(brief_, count: int):
    return brief_.model_copy(update={"verdict": brief_.verdict.model_copy(update={"truncated": count})})


def cells(text: str, what: str) -> list[str]:
    (line,) = re.findall(rf'<tr><th scope="row">{what}</th>(.*?)</tr>', text)
    return re.findall(r"<td[^>]*>(.*?)</td>", line)


def test_an_attempt_stands_beside_the_baseline_on_the_same_items():
    """The baseline's own page is of its first look; what an attempt is compared with was asked the same."""
    measured = Measurements(decode_tokens_per_second=31.5, throughput_tokens_per_second=120.0)
    beside = ACCEPTED.verdict.beside.model_copy(update={"measurements": measured})
    verdict = ACCEPTED.verdict.model_copy(update={"beside": beside})
    text = attempt_html(RELEASED.model_copy(update={"verdict": verdict}))
    ours, theirs, grown = cells(text, "perplexity")
    assert (theirs, grown) == ("25.9", "+4.7 %") and f"{float(ours) / float(theirs):.3f}" == "1.046"  # of 27.1
    assert cells(text, "decode at batch 1, tokens/s") == ["49.1", "31.5", "+55.9 %"]
    assert "baseline 0.660 (0.631 to 0.689)" in text  # the first look of the baseline had 0.672
    row = rows(RELEASED)[-1]
    assert row.cells["accuracy"] == ("0.651", "0.622 to 0.680; baseline 0.660")
    assert "of 0.660" in printed(RELEASED)
    unknown = verdict.model_copy(update={"beside": None})
    text = attempt_html(RELEASED.model_copy(update={"verdict": unknown}))
    assert cells(text, "perplexity")[1:] == [DASH, DASH] and "0.672" not in text


def test_the_page_answers_first():
    texts = [SideBySide("Once upon a time", "there was a boat", "there was a boat"), SideBySide("Tea", HOSTILE, "hot")]
    text = summary_html(RELEASED, texts)
    page = Page(text)
    questions = ["What to ship", "What it costs in quality", "What both write", "What it buys", "How to serve it"]
    places = [page.text.index(question) for question in (*questions, "What was tried", "The frontier")]
    assert places == sorted(places)
    assert "trimtab pull SmolLM2-135M-Instruct served --store s3://models/trimtab" in page.text
    assert "the same" in page.text and "<script" not in text
    assert cells(text, "perplexity of 32 windows") == ["25.9", "27.1", "1.047 (1.036 to 1.058)", "at most 1.1"]
    assert cells(text, "size, MB") == ["269", "147", "-45.4 %"]
    assert "What to try next" not in page.text


STEPS = [
    ("nothing accepted", "int8_sq stood on the right side of its limit, and 1,000 items were too few to show it"),
    ("nothing accepted", "All 2 attempts were used: --max-attempts 5 goes on behind them"),
    ("nothing accepted", "int8_sq came nearest. It would meet accept: {min_recovery: 0.94, max_perplexity_ratio: 1.1}"),
    ("no gain", "gained nothing at lower_latency"),
    ("baseline failed", "name a larger target, write fewer tokens"),
    ("no attempt", "it goes on from the stages that were complete"),
]


@pytest.mark.parametrize(("name", "said"), STEPS, ids=[said[:40] for _, said in STEPS])
def test_where_nothing_is_accepted_it_says_what_to_try(name, said):
    assert any(said in step for step in next_steps(STATES[name])), next_steps(STATES[name])
    page = Page(summary_html(STATES[name]))
    assert "What to try next" in page.text and said in " ".join(page.text.split())
    assert "What to ship" not in page.text and serving(STATES[name]) == []
    assert "## What to try next" in summary_markdown(STATES[name])


def test_items_that_would_decide_are_counted():
    """An interval of 1,000 items reaches 0.013 down and the limit lies 0.005 below: (0.013 / 0.005)² times as many."""
    (step,) = [step for step in next_steps(NOTHING_ACCEPTED) if "too few" in step]
    assert "about 6,800 would be enough" in step
    assert next_steps(RELEASED) == []


def test_requests_that_were_cut_are_told_of():
    run = state(INT4, cut(DOES_NOT_FIT, 1), cut(ACCEPTED, 1234), baseline=cut(BASELINE, 7))
    text = "1,234 requests were longer than can be read and lost the beginning, as in lm-eval."
    assert text in attempt_html(run)
    failed = state(cut(DOES_NOT_FIT, 1))
    assert "1 request was longer than can be read" in attempt_html(failed)
    for render in (summary_html, summary_markdown):
        told = render(run)
        assert "as in lm-eval: 7 of the baseline, 1 of attempt 2, 1,234 of attempt 3." in told
    for render in (summary_html, summary_markdown, attempt_html):
        assert "lm-eval" not in render(RELEASED)


def test_an_attempt_shows_intervals_kernels_and_the_worst_layers():
    page = Page(attempt_html(RELEASED, KERNELS, LAYERS))
    for shown in ("0.986 (0.961 to 1.011)", "0.979 (0.967 to 0.991)", "at least 0.950", "at most 1.100", "-45.4 %"):
        assert shown in page.text, shown
    assert "_weight_int8pack_mm" in page.text and "emulated" in page.text
    assert "10 of 30 layers" in page.text
    assert "layers.29.self_attn" in page.text and "layers.19.self_attn" not in page.text


def test_an_attempt_without_measurements_shows_its_reason():
    page = Page(attempt_html(STAGE_FAILED))
    assert "is rejected for does_not_fit" in page.text and DOES_NOT_FIT.verdict.reason[1:] in page.text
    assert not {"Kernels", "Quality", "Size and speed"} & set(page.text.splitlines())


def test_an_attempt_that_is_not_judged_yet():
    assert "not judged yet" in attempt_html(RELEASED.model_copy(update={"verdict": None}))


def test_the_page_of_the_baseline():
    page = Page(attempt_html(state(verdict=BASELINE.verdict, seconds=BASELINE.seconds), {}, []))
    assert "The baseline" in page.text and "269" in page.text and "this attempt" not in page.text


SIZE, RATIO = figures.Dimension("MB", True), figures.Dimension("ratio", True)


def points(*pairs: tuple[float, float]) -> list[figures.Point]:
    return [figures.Point(str(i), "", "rejected", x, interval(y, 0.01)) for i, (x, y) in enumerate(pairs)]


def test_the_frontier_has_what_nothing_beats():
    tried = points((269, 1.0), (117, 1.4), (120, 1.2), (147, 1.05), (160, 1.08), (120, 1.3))
    assert [p.label for p in figures.pareto(tried, SIZE, RATIO)] == ["1", "2", "3", "0"]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0, 9), [0, 5]),
        ((1.0, 1.4), [1.0, 1.1, 1.2, 1.3, 1.4]),
        ((1, 40), [1, 2, 5, 10, 20]),
        ((1, 5000), [1, 10, 100, 1000]),
        ((5, 5), [4.8, 4.9, 5.0, 5.1, 5.2]),
    ],
)
def test_ticks_are_round(values, ticks):
    found = figures.Axis(values, 0, 100).ticks()
    assert [tick for tick in found if min(ticks) <= tick <= max(ticks)] == ticks
    assert len(found) <= 8


def test_an_axis_keeps_infinity_at_its_end():
    axis = figures.Axis([1.0, 2.0, float("inf")], 0, 100)
    assert axis(float("inf")) == 100 and axis(float("-inf")) == 0
