"""The card of a released model, README.md in the Hugging Face hub's format, written from its evidence alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from trimtab.judge import Damage, Verdict
from trimtab.judge.statistics import Interval
from trimtab.model.licence import title
from trimtab.recipe import Recipe
from trimtab.release.task_scores import TaskScore


def card(
    name: str,
    version: str,
    evidence: Mapping[str, Any],
    architecture: str,
    scores: Sequence[TaskScore],
    licence: Mapping[str, str],
    damage: Damage | None = None,
) -> str:
    """Returns the text: what was done, what was kept, where that was measured, how to serve it, what it does not show.

    Args:
        architecture: the class of the model.
        scores: by task, what the unchanged model and this one answer rightly.
        licence: that of the model it was made from, as `model.licence` has it; {} where nothing is known.
        damage: what was lost by task and by place in the text.
    """
    recipe, verdict = Recipe.parse(evidence["recipe"]), Verdict.model_validate(evidence["verdict"])
    about = {
        **{_CARD_FIELDS[key]: value for key, value in licence.items()},
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
        licence=title(licence) or "unknown, for neither its card nor its config names one",
        goal=evidence["goal"],
        target=evidence["target"],
        model=evidence["model"]["digest"],
        recipe=_yaml(evidence["recipe"]),
        kept=_kept(verdict),
        tasks="\n".join(_row(score, damage, recipe) for score in scores),
        judged=_judged(scores, recipe),
        text=_text(damage),
        backend=recipe.engine.backend,
        device=", ".join(f"{key} {value}" for key, value in sorted(evidence["device"].items())),
        versions=", ".join(f"{package} {number}" for package, number in sorted(evidence["versions"].items())),
        accept=recipe.accept,
    )


#: Fields of the hub's cards for what is known of a licence.
_CARD_FIELDS = {"id": "license", "name": "license_name", "link": "license_link"}

_TEXT = """---
{about}
---

# {name} {version}

{architecture}, made by trimtab for the goal `{goal}` on `{target}`, from the model whose tree in the store is
`{model}`. Its licence is that of this model: {licence}.

## What was done

```yaml
{recipe}
```

## What it kept

{kept}

| task | tier | items | unchanged | this model | lost | gained | recovery |
|---|---|---|---|---|---|---|---|
{tasks}

Shares of right answers with 95 % intervals, each task by itself; recovery is the share of what the unchanged model has
above chance. {judged}

{text}

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


def _row(score: TaskScore, card: Damage | None, recipe: Recipe) -> str:
    told = next((task for task in card.tasks if task.task == score.task), None) if card else None
    flips = f"{told.lost} | {told.gained}" if told else "– | –"
    kept = _span(told.recovery) if told and told.recovery else "baseline at chance" if told else "–"
    limit, tier = recipe.accept.limit(score.task), recipe.accept.tier(score.task)
    tier = tier if limit is None else f"{tier}, at least {limit:g}"
    shares = f"{_share(score.baseline)} | {_share(score.candidate)}"
    return f"| {score.task} | {tier} | {score.items} | {shares} | {flips} | {kept} |"


def _judged(scores: Sequence[TaskScore], recipe: Recipe) -> str:
    """Says what of the table decided."""
    tiers = {recipe.accept.tier(score.task) for score in scores}
    told = "The verdict is about the items of all supporting tasks together"
    if "critical" in tiers:
        told += ", and about each critical task by itself"
    return f"{told}; advisory tasks decided nothing." if "advisory" in tiers else f"{told}."


def _text(card: Damage | None) -> str:
    """Says what the held-out text told beside its perplexity."""
    if card is None:
        return "What was lost by place in the text was not measured."
    lines = [] if not card.worst else [f"- The task that keeps least: {card.worst}."]
    lines += [
        f"- Perplexity ratio of the tokens {place.first} to {place.last} of a window: {_span(place.perplexity_ratio)}."
        for place in card.places
    ]
    if card.kl and card.agreement:
        lines.append(
            f"- KL divergence of the next token from the unchanged model's, in nats: {_span(card.kl)}; the same "
            f"likeliest token at a share of {_span(card.agreement)} of the places."
        )
    return "\n".join(lines) or "What was lost by place in the text was not measured."


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
