"""The card of a released model, README.md in the Hugging Face hub's format, written from its evidence alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from trimtab.judge import Verdict
from trimtab.judge.statistics import Interval
from trimtab.recipe import Recipe
from trimtab.release.task_scores import TaskScore


def card(
    name: str, version: str, evidence: Mapping[str, Any], architecture: str, scores: Sequence[TaskScore]
) -> str:
    """Returns the text: what was done, what was kept, where that was measured, how to serve it, what it does not show.

    Args:
        architecture: the class of the model.
        scores: by task, what the unchanged model and this one answer rightly.
    """
    recipe, verdict = Recipe.parse(evidence["recipe"]), Verdict.model_validate(evidence["verdict"])
    about = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["trimtab", evidence["goal"], *([recipe.quantize.format] if recipe.quantize else [])],
        "model-index": [{"name": f"{name}/{version}", "results": [_result(score) for score in scores]}],
    }
    return _TEXT.format(
        about=_yaml(about),
        name=name,
        version=version,
        architecture=architecture,
        goal=evidence["goal"],
        target=evidence["target"],
        model=evidence["model"]["digest"],
        recipe=_yaml(evidence["recipe"]),
        kept=_kept(verdict),
        tasks="\n".join(_row(score) for score in scores),
        backend=recipe.engine.backend,
        device=", ".join(f"{key} {value}" for key, value in sorted(evidence["device"].items())),
        versions=", ".join(f"{package} {number}" for package, number in sorted(evidence["versions"].items())),
        accept=recipe.accept,
    )


_TEXT = """---
{about}
---

# {name} {version}

{architecture}, made by trimtab for the goal `{goal}` on `{target}`, from the model whose tree in the store is
`{model}`. Its licence is that of this model.

## What was done

```yaml
{recipe}
```

## What it kept

{kept}

| task | items | unchanged | this model |
|---|---|---|---|
{tasks}

Shares of right answers with 95 % intervals, each task by itself. The verdict is about all items together.

## Where that was measured

Back end `{backend}` on {device}; {versions}.

## How to serve it

```sh
trimtab pull STORE/releases/{name}/{version} FOLDER
trimtab serve FOLDER
trimtab serve-config STORE/releases/{name}/{version} CONFIG
```

## What this must not be used to claim

- Nothing of tasks, languages, lengths and prompts that were not asked, nor of safety: compression may change what a
  model refuses, and nobody looked at that here.
- Speeds and memory of any device or version but those above.
- That nothing was lost: the limits were a recovery of {accept.min_recovery:g} and a perplexity ratio of
  {accept.max_perplexity_ratio:g}, at confidence {accept.confidence:g}.
"""


def _kept(verdict: Verdict) -> str:
    gained = f"{verdict.gain:+.1%}" if verdict.gain is not None else "not measured"
    told = (
        f"Recovery {_span(verdict.recovery)} and perplexity ratio {_span(verdict.perplexity_ratio)}, on "
        f"{verdict.items} items and {verdict.windows} windows of text; gain at the goal {gained}."
    )
    if fresh := verdict.confirmation:
        told += (
            f" On {fresh.items} items that no look had used: recovery {_span(fresh.recovery)}, perplexity ratio "
            f"{_span(fresh.perplexity_ratio)}."
        )
    return told


def _row(score: TaskScore) -> str:
    return f"| {score.task} | {score.items} | {_share(score.baseline)} | {_share(score.candidate)} |"


def _yaml(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).rstrip()


def _result(score: TaskScore) -> dict[str, Any]:
    metric = {"type": "accuracy", "value": round(score.candidate.estimate, 4), "name": "accuracy"}
    return {
        "task": {"type": "text-generation"},
        "dataset": {"name": score.task, "type": score.task},
        "metrics": [metric],
    }


def _span(interval: Interval | None) -> str:
    return f"{interval.estimate:.3f} ({interval.low:.3f} to {interval.high:.3f})" if interval else "not measured"


def _share(interval: Interval) -> str:
    return f"{interval.estimate:.3f} ({interval.low:.3f}–{interval.high:.3f})"
