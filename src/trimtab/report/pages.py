"""The HTML pages: one self-contained file each, everything escaped."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from trimtab.judge import Interval, Verdict
from trimtab.loop.state import Brief, State
from trimtab.planning import resources
from trimtab.planning.resources import Resources
from trimtab.report import advice, compared, costs, curves, figures, quality, story
from trimtab.report.figures import Dimension, Point
from trimtab.report.generations import SideBySide
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


def summary_html(state: State, texts: Sequence[SideBySide] = ()) -> str:
    """Returns the page of a whole run: what to ship, what it costs and buys, how to serve it, or what to try next; then
    what was tried, the frontier, the story, certainty, time and digests.

    Args:
        texts: what the unchanged model and the accepted one write after the same prompts.
    """
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
        carded=quality.shown(state),
        power=(state.baseline.verdict.power.sentence if state.baseline and state.baseline.verdict.power else ""),
        ledger=costs.rows(state),
        paid=costs.sentences(state),
        kept=compared.kept(found[1].verdict, found[1].recipe.accept) if found else [],
        bought=compared.bought(found[1].verdict, state.baseline and state.baseline.verdict) if found else [],
        texts=texts,
        serving=advice.serving(state),
        next_steps=advice.next_steps(state),
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
    forecast: Mapping[str, Resources] | None = None,
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
        forecast: what each stage was forecast to need.
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
        measured=compared.measured(verdict, baseline) if verdict else [],
        bar=_bar(state.seconds, sum(state.seconds.values())),
        used=_used(state.used, forecast or {}),
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
        "LEDGER_COLUMNS": costs.COLUMNS,
        "TASK_COLUMNS": quality.TASK_COLUMNS,
        "task_rows": quality.task_rows,
        "text_rows": quality.text_rows,
        "quality": quality.sentences,
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
    for dimension, field, limit in qualities:
        for cost, x in ((_SIZE, "megabytes"), (_SPEED, "decode")):
            points = [
                Point(row.label if row.number else "base", row.what, row.outcome, getattr(row, x), y)
                for row in table
                if getattr(row, x) and (y := _quality(row, field))
            ]
            if any(point.outcome != "baseline" for point in points):
                against = "size" if cost is _SIZE else "decode speed"
                note = "less is better" if dimension.less_is_better else "more is better"
                picture = figures.scatter(points, cost, dimension, limit)
                words = {"quality": dimension.name.capitalize(), "note": note, "cost": against}
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


def _used(used: Mapping[str, Resources], forecast: Mapping[str, Resources]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Returns for each stage its name, and of memory of a GPU, of the machine, disk and time what was used and what was
    forecast."""
    found = []
    for stage in (name for name in _STAGES if name in used):
        ours, theirs = (resources.columns(each) for each in (used[stage], forecast.get(stage, Resources())))
        found.append((stage, list(zip(ours, theirs if stage in forecast else [DASH] * 4, strict=True))))
    return found


def _plots(state: State, verdict: Verdict, baseline: Verdict | None) -> list[dict[str, Any]]:
    accept, fresh = state.recipe.accept, verdict.confirmation
    criteria = (
        ("Recovery", _RECOVERY, "recovery", accept.min_recovery),
        ("Perplexity ratio", _RATIO, "perplexity_ratio", accept.max_perplexity_ratio),
    )
    plots = []
    for title, quantity, field, limit in criteria:
        lines = [("looks", getattr(verdict, field)), ("fresh items", getattr(fresh, field) if fresh else None)]
        plots.append((title, quantity, lines, limit))
    models = [("this attempt" if state.attempt else "baseline", verdict.accuracy)]
    models.append(("baseline", compared.baseline_of(verdict, baseline)[0]))
    plots.append(("Accuracy", _ACCURACY, models, None))
    drawn = [(t, q, [(name, i) for name, i in lines if i], limit) for t, q, lines, limit in plots]
    return [{"title": t, "svg": figures.interval_plot(lines, limit, q)} for t, q, lines, limit in drawn if lines]


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
