"""The HTML pages: one self-contained file each, everything escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trimtab.judge import Interval, Measurements, Verdict
from trimtab.loop.state import Brief, State
from trimtab.report import curves, figures, story
from trimtab.report.figures import Dimension, Point
from trimtab.report.rows import COLUMNS, DASH, INTERVALS, AttemptRow, fraction, interval_text, number, rows, spent
from trimtab.stages import STAGES
from trimtab.store.tree import Tree

WORST_LAYERS = 10

_SIZE = Dimension("size in MB", less_is_better=True)
_SPEED = Dimension("tokens/s at batch 1", less_is_better=False)
_RATIO = Dimension("perplexity ratio", less_is_better=True, positive=True)
_RECOVERY = Dimension("recovery", less_is_better=False)
_ACCURACY = Dimension("accuracy", less_is_better=False)
#: Stages in the order of an attempt: each has its colour.
_STAGES = (*STAGES, "validate")


def summary_html(state: State) -> str:
    """Returns the page of a whole run: verdict, table, frontier, story, certainty, time, recipe, digests."""
    table, found = rows(state), story.accepted(state)
    briefs = ([(0, state.baseline)] if state.baseline else []) + list(enumerate(state.history, start=1))
    longest = max((sum(brief.seconds.values()) for _, brief in briefs), default=0.0)
    unmeasured = [row for row in table if not (row.megabytes and (row.perplexity_ratio or not row.number))]
    return _render(
        "summary.html.j2",
        state=state,
        title=f"{state.name}: {state.goal} on {state.target}",
        outcome="accepted" if found else "rejected",
        headline=story.headline(state),
        explanation=story.explanation(state),
        accepted=found,
        rows=table,
        briefs=briefs,
        charts=_charts(state, table),
        unmeasured=unmeasured,
        bars=[(number, brief, _bar(brief.seconds, longest)) for number, brief in briefs if brief.seconds],
        references=_references(state, found),
    )


def attempt_html(
    state: State,
    kernels: Mapping[str, Mapping[str, Any]] | None = None,
    layers: Sequence[Mapping[str, Any]] | None = None,
    calibration: Mapping[str, Any] | None = None,
    reload: Mapping[str, Any] | None = None,
    distillation: Mapping[str, Any] | None = None,
    arithmetic: str = "",
) -> str:
    """Returns the page of the current attempt: verdict, intervals, measurements, kernels, layers, data, trees.

    Args:
        state: `recipe`, `verdict`, `trees` and `seconds` are of the attempt.
        kernels: layer → {"kernel": name, "emulated": bool}.
        layers: {"layer", "relative_error", "cosine"} at least of each, source against dequantised weights.
        calibration: the report of what the attempt was calibrated on: `sources`, `samples`, `length` and
            `document_tokens` in tokens, `vocabulary_coverage` as a share.
        distillation: the metrics of the training, `curve` among them, or None.
        reload: `skipped`, why the embedded engine could not run the export, or None.
        arithmetic: in which numbers the engine computed, and on what.
    """
    verdict = state.verdict
    baseline = state.baseline.verdict if state.baseline and state.attempt else None
    reason = verdict.reason if verdict else ""
    return _render(
        "attempt.html.j2",
        state=state,
        title=f"{state.name}: {f'attempt {state.attempt}' if state.attempt else 'baseline'}",
        outcome=verdict.outcome if verdict else "open",
        headline=story.attempt_headline(state),
        reason=story.sentence(reason) if reason and not (verdict and verdict.outcome == "baseline") else "",
        plots=_plots(state, verdict, baseline) if verdict else [],
        measured=_measured(verdict, baseline) if verdict else [],
        bar=_bar(state.seconds, sum(state.seconds.values())),
        kernels=_kernels(kernels or {}),
        arithmetic=arithmetic,
        layer_count=len(layers or ()),
        layers=sorted(layers or (), key=lambda layer: layer["relative_error"], reverse=True)[:WORST_LAYERS],
        calibration=calibration,
        skipped=(reload or {}).get("skipped"),
        distillation=distillation,
        curve=curves.loss_curve(**distillation["curve"]) if distillation else "",
        trees=[(name, tree) for name, tree in {"model": state.model, **state.trees}.items()],
    )


@cache
def _templates() -> Environment:
    environment = Environment(
        loader=PackageLoader("trimtab.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": number,
        "fraction": fraction,
        "interval": interval_text,
        "seconds": spent,
        "p_value": _p_value,
    }
    environment.globals |= {
        "COLUMNS": COLUMNS,
        "INTERVALS": INTERVALS,
        "DASH": DASH,
        "key": figures.key,
        "confirmation": story.confirmation_text,
        "gain": story.gain_text,
        "truncated": story.truncated_text,
    }
    return environment


def _render(template: str, **values: Any) -> str:
    return _templates().get_template(template).render(**values)


def _charts(state: State, table: Sequence[AttemptRow]) -> list[dict[str, Any]]:
    """Quality against size and against speed; the baseline is exactly 1 in both qualities."""
    last = state.history[-1].recipe if state.history else state.recipe
    qualities = (
        (_RATIO, "perplexity_ratio", last.accept.max_perplexity_ratio),
        (_RECOVERY, "recovery", last.accept.min_recovery),
    )
    charts = []
    for quality, field, limit in qualities:
        for cost, x in ((_SIZE, "megabytes"), (_SPEED, "decode")):
            points = [
                Point(row.label if row.number else "base", row.what, row.outcome, getattr(row, x), y)
                for row in table
                if getattr(row, x) and (y := _quality(row, field))
            ]
            if any(point.outcome != "baseline" for point in points):
                against = "size" if cost is _SIZE else "decode speed"
                note = "less is better" if quality.less_is_better else "more is better"
                picture = figures.scatter(points, cost, quality, limit)
                words = {"quality": quality.name.capitalize(), "note": note, "cost": against}
                charts.append({**words, "svg": picture})
    return charts


def _quality(row: AttemptRow, field: str) -> Interval | None:
    return Interval(estimate=1, low=1, high=1) if row.outcome == "baseline" else getattr(row, field)


def _bar(seconds: Mapping[str, float], longest: float) -> dict[str, Any]:
    """Returns the segments of a stacked bar (percent of the longest attempt), and the stages found ready."""
    order = {stage: place for place, stage in enumerate(_STAGES)}
    stages = sorted(seconds.items(), key=lambda item: order.get(item[0], len(order)))
    return {
        "total": sum(seconds.values()),
        "segments": [
            {
                "stage": stage,
                "seconds": spent,
                "percent": round(100 * spent / longest, 2),
                "color": f"s{order.get(stage, len(order))}",
            }
            for stage, spent in stages
            if spent > 0
        ],
        "found": [stage for stage, spent in stages if spent <= 0],
    }


def _plots(state: State, verdict: Verdict, baseline: Verdict | None) -> list[dict[str, Any]]:
    accept, fresh = state.recipe.accept, verdict.confirmation
    compared = (
        ("Recovery", _RECOVERY, "recovery", accept.min_recovery),
        ("Perplexity ratio", _RATIO, "perplexity_ratio", accept.max_perplexity_ratio),
    )
    plots = []
    for title, quantity, field, limit in compared:
        lines = [("looks", getattr(verdict, field)), ("fresh items", getattr(fresh, field) if fresh else None)]
        plots.append((title, quantity, lines, limit))
    models = [("this attempt" if state.attempt else "baseline", verdict.accuracy)]
    if baseline and verdict.accuracy:
        models.append(("baseline", baseline.accuracy))
    plots.append(("Accuracy", _ACCURACY, models, None))
    drawn = [(t, q, [(name, i) for name, i in lines if i], limit) for t, q, lines, limit in plots]
    return [{"title": t, "svg": figures.interval_plot(lines, limit, q)} for t, q, lines, limit in drawn if lines]


def _both(ours: int, theirs: int) -> str:
    return f"{ours}" if ours == theirs else f"{ours} (baseline {theirs})"


def _measured(verdict: Verdict, baseline: Verdict | None) -> list[tuple[str, str, str, str]]:
    """Returns (what, this attempt, baseline, change) of everything the engine measured."""
    if not verdict.measurements.bytes and verdict.perplexity is None:
        return []
    ours, theirs = verdict.measurements, baseline.measurements if baseline else Measurements()
    lines = (
        ("size, MB", ours.bytes / 1e6, theirs.bytes / 1e6),
        ("decode at batch 1, tokens/s", ours.decode_tokens_per_second, theirs.decode_tokens_per_second),
        (f"throughput at batch {_both(ours.batch, theirs.batch)}, tokens/s",
         ours.throughput_tokens_per_second, theirs.throughput_tokens_per_second),
        ("peak memory, MB", ours.peak_memory_bytes / 1e6, theirs.peak_memory_bytes / 1e6),
        ("longest context that fits, tokens", ours.max_context_tokens, theirs.max_context_tokens),
        ("perplexity", verdict.perplexity, baseline.perplexity if baseline else None),
    )  # fmt: skip
    found = [
        (what, number(a or None), number(b or None), f"{a / b - 1:+.1%}".replace("%", " %") if a and b else DASH)
        for what, a, b in lines
        if a or b
    ]
    if ours.devices != 1 or theirs.devices != 1:
        found.append(("devices of one copy", number(ours.devices), number(theirs.devices) if baseline else DASH, DASH))
    if ours.bytes:
        share = f"{100 * ours.quantized_share:.1f}"
        found.insert(1, ("quantized tensors, % of their BF16 bytes", share, DASH, DASH))
    return found


def _kernels(kernels: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, bool, int, str]]:
    """Returns (kernel, emulated, layers, an example), the most frequent kernel first."""
    keys = {name: (str(entry["kernel"]), bool(entry["emulated"])) for name, entry in kernels.items()}
    example = {key: name for name, key in reversed(keys.items())}
    return [(*key, count, example[key]) for key, count in Counter(keys.values()).most_common()]


def _references(state: State, found: tuple[int, Brief] | None) -> list[tuple[str, str, str]]:
    """Returns (what, digest, URI) of the model and of what is offered for release."""
    trees: dict[str, Tree | None] = {"model": state.model}
    references = []
    if found:
        place, brief = found
        if state.attempt == place:
            trees["accepted artifact"] = state.trees.get("export") or state.trees.get("checkpoint") or state.model
        trees |= {"engine": brief.engine, "evidence": brief.evaluation}
        references.append(("accepted recipe", brief.recipe.digest, ""))
    trees["plan"] = state.plan
    shown = [(name, tree.digest, tree.uri) for name, tree in trees.items() if tree]
    return [*shown[:1], *references, *shown[1:]]


def _p_value(value: float | None) -> str:
    if value is None:
        return DASH
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
