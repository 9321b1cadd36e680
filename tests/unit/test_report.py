"""The report of made-up runs: every outcome renders, numbers are there, hostile text stays text."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from trimtab.recipe import Recipe
from trimtab.report import attempt_html, console_table, figures, rows, summary_html, summary_markdown
from trimtab.report.rows import DASH, fraction, number
from trimtab.stages import STAGES
from trimtab.state import Brief, State
from trimtab.store.tree import Tree
from trimtab.verdict import Confirmation, Interval, Measurements, Verdict

HOSTILE = '<script>alert("x")</script> | [x](javascript:1) \x1b[31m & \'"'


def tree(name: str, size: int = 0) -> Tree:
    digest = (name.encode().hex() * 64)[:64]
    return Tree(uri=f"s3://models/trimtab/trees/{digest}", digest=digest, bytes=size)


def interval(estimate: float, half: float) -> Interval:
    return Interval(estimate=estimate, low=estimate - half, high=estimate + half)


def brief(
    recipe: dict,
    outcome: str,
    reason: str,
    *,
    failure: str | None = None,
    why: str = "",
    recovery: tuple[float, float] | None = None,
    ratio: tuple[float, float] | None = None,
    megabytes: float = 0,
    share: float = 1.0,
    decode: float = 0,
    peak: float = 0,
    seconds: dict[str, float] | None = None,
    **more,
) -> Brief:
    measured = Measurements(
        bytes=int(megabytes * 1e6),
        quantized_share=share,
        decode_tokens_per_second=decode,
        throughput_tokens_per_second=4.1 * decode,
        peak_memory_bytes=int(peak * 1e6),
        max_context_tokens=8192 if megabytes else 0,
    )
    quality = {}
    if recovery and ratio:
        quality = {
            "looks": 2,
            "items": 1000,
            "windows": 32,
            "accuracy": interval(0.66 * recovery[0], 0.029),
            "recovery": interval(*recovery),
            "perplexity": 25.63 * ratio[0],
            "perplexity_ratio": interval(*ratio),
            "mcnemar_p": 0.0004 if recovery[0] < 0.9 else 0.213,
        }
    verdict = Verdict(
        outcome=outcome, failure_class=failure, reason=reason, measurements=measured, **{**quality, **more}
    )
    return Brief(recipe=Recipe.parse(recipe), why=why, verdict=verdict, seconds=seconds or {})


BASELINE = brief(
    {},
    "baseline",
    "the model unchanged, which every attempt is compared with",
    megabytes=269.1,
    decode=27.2,
    peak=912,
    looks=1,
    items=400,
    windows=16,
    accuracy=interval(0.672, 0.046),
    perplexity=25.63,
    seconds={"engine": 6.1, "validate": 61.0},
)
INT4 = brief(
    {"quantize": {"format": "int4_rtn"}},
    "rejected",
    "perplexity ratio 1.396 (1.352 to 1.440) is above the limit 1.1",
    failure="perplexity",
    why="the first rung of the ladder",
    recovery=(0.868, 0.051),
    ratio=(1.396, 0.044),
    megabytes=117.3,
    share=0.281,
    decode=54.8,
    peak=640,
    gain=0.564,
    seconds={"quantize": 21.4, "engine": 4.8, "validate": 58.3},
)
DOES_NOT_FIT = brief(
    {"prune": {"method": "depth", "blocks": 6}, "distill": {"tokens": 2_000_000}, "quantize": {"format": "int8_wo"}},
    "rejected",
    "distillation needs 7.9 GB (weights 0.5, optimizer 4.3, activations 3.1), the target has 5.0 GB",
    failure="does_not_fit",
    why="int4_rtn failed (perplexity): next is fewer blocks, which takes less away from each weight",
    seconds={"calibrate": 12.7, "prune": 3.2},
)
AWQ = brief(
    {"quantize": {"format": "int4_awq"}},
    "rejected",
    "recovery 0.913 (0.889 to 0.937) is below the limit 0.95",
    failure="accuracy",
    why="depth failed (does_not_fit): next is int4_awq, which needs less memory",
    recovery=(0.913, 0.024),
    ratio=(1.181, 0.021),
    megabytes=119.9,
    share=0.284,
    decode=53.9,
    peak=655,
    gain=0.554,
    seconds={"calibrate": 0.0, "sensitivity": 44.0, "quantize": 9.0, "engine": 4.9, "validate": 59.9},
)
ACCEPTED = brief(
    {"name": "mixed 6 bits", "quantize": {"format": "mixed", "effective_bits": 6}},
    "accepted",
    "recovery 0.986 (0.961 to 1.011) is at least 0.95 and perplexity ratio 1.047 (1.036 to 1.058) at most 1.1",
    why="int4_awq failed (accuracy): next is mixed 6 bits, which takes less away",
    recovery=(0.986, 0.025),
    ratio=(1.047, 0.011),
    megabytes=146.8,
    share=0.413,
    decode=49.1,
    peak=701,
    gain=1 - 146.8 / 269.1,
    confirmed=True,
    confirmation=Confirmation(
        items=960, windows=12, level=0.8, recovery=interval(0.979, 0.012), perplexity_ratio=interval(1.051, 0.008)
    ),
    seconds={"calibrate": 0.0, "sensitivity": 0.0, "quantize": 12.2, "engine": 5.2, "validate": 104.6},
).model_copy(update={"engine": tree("engine"), "evaluation": tree("evidence")})
UNDECIDED = brief(
    {"quantize": {"format": "int8_sq"}},
    "indeterminate",
    "2000 items are too few to tell: recovery 0.955 (0.942 to 0.968) is not shown to be at least 0.95",
    failure="accuracy",
    why="the verdicts so far ask for eight bits",
    recovery=(0.955, 0.013),
    ratio=(1.082, 0.012),
    megabytes=163.0,
    share=0.51,
    decode=44.0,
    peak=731,
    seconds={"quantize": 11.0, "engine": 5.0, "validate": 160.0},
)


def state(*history: Brief, **fields) -> State:
    given = {
        "store": "s3://models/trimtab",
        "name": "SmolLM2-135M-Instruct",
        "goal": "fit_larger_model",
        "target": "cpu",
        "model": tree("model", 269_060_552),
        "baseline": BASELINE,
        "history": history,
        "attempt": len(history),
    }
    if history:
        last = history[-1]
        given |= {"recipe": last.recipe, "why": last.why, "verdict": last.verdict, "seconds": last.seconds}
    return State(**(given | fields))


RELEASED = state(
    INT4,
    DOES_NOT_FIT,
    AWQ,
    ACCEPTED,
    trees={"calibration": tree("calibration", 90_000), "export": tree("export", 146_800_000), "engine": tree("engine")},
)
NOTHING_ACCEPTED = state(INT4, UNDECIDED, max_attempts=2)
BROKEN = brief(
    {"quantize": {"format": "fp8"}},
    "rejected",
    "the candidate's log-likelihood is not finite in 3 of 16 windows",
    failure="degenerate_output",
    megabytes=140,
    decode=30,
)
STAGE_FAILED = state(DOES_NOT_FIT)
EXTREME = state(
    INT4.model_copy(
        update={
            "verdict": INT4.verdict.model_copy(
                update={
                    "perplexity_ratio": Interval(estimate=4800, low=0.0, high=float("inf")),
                    "recovery": Interval(estimate=-0.12, low=float("-inf"), high=float("inf")),
                }
            )
        }
    ),
    BROKEN,
)
BASELINE_FAILED = state(
    baseline=brief({}, "rejected", "weights need 160 GB, the target has 5", failure="does_not_fit"),
)
EMPTY = state(baseline=None)
STATES = {
    "released": RELEASED,
    "nothing accepted": NOTHING_ACCEPTED,
    "stage failed": STAGE_FAILED,
    "extreme": EXTREME,
    "baseline failed": BASELINE_FAILED,
    "no attempt": state(),
    "empty": EMPTY,
}
KERNELS = {
    **{f"model.layers.{i}.mlp.down_proj": {"kernel": "_weight_int8pack_mm", "emulated": False} for i in range(30)},
    **{f"model.layers.{i}.mlp.up_proj": {"kernel": "dequantise", "emulated": True} for i in range(7)},
}
LAYERS = [
    {"layer": f"model.layers.{i}.self_attn.q_proj", "relative_error": 0.01 * i, "cosine": 1 - 0.0005 * i}
    for i in range(30)
]
CALIBRATION = {
    "samples": 1024,
    "length": 2048,
    "tokens": 2_097_152,
    "vocabulary_coverage": 0.3456,
    "document_tokens": {"p10": 41, "median": 512, "p90": 7321},
    "sources": [
        {"source": "hf:owner/name train", "samples": 768, "documents": 612, "tokens_available": 6_300_000},
        {"source": "notes.txt", "samples": 256, "documents": 1, "tokens_available": 812_345},
    ],
}
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


def hostile(given: State) -> State:
    """The same run, with hostile text wherever people or other programs write."""

    def poison(brief: Brief) -> Brief:
        recipe = brief.recipe.model_copy(update={"name": HOSTILE})
        verdict = brief.verdict.model_copy(update={"reason": HOSTILE})
        return brief.model_copy(update={"recipe": recipe, "why": HOSTILE, "verdict": verdict})

    history = tuple(poison(brief) for brief in given.history)
    bad = Tree(uri=HOSTILE, digest=HOSTILE)
    return given.model_copy(
        update={
            "name": HOSTILE,
            "store": HOSTILE,
            "target": HOSTILE,
            "model": bad,
            "trees": {HOSTILE: bad},
            "history": history,
            "recipe": history[-1].recipe,
            "verdict": history[-1].verdict,
            "why": HOSTILE,
            "seconds": {HOSTILE: 3.0},
        }
    )


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
    colours = re.findall(r"--s\d+: (#\w+);", page)
    assert len(set(colours)) == len(colours) == len(shown)


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
    assert "The accepted recipe" not in text


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
