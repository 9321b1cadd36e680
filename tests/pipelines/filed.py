"""Runs in which no model is touched: a stage whose result is in the store's index is not run.

So each case files beforehand what every stage and every measurement would find for each recipe of the ladder, and then
says what must follow from it: through the real DAG, or by the functions that its tasks call.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trimtab import stages
from trimtab.components.validation.stage import run as validate
from trimtab.loop import decisions, evidence
from trimtab.loop.documents import load, read_plan, save
from trimtab.loop.state import State
from trimtab.planning import dealing, matrix, task_sizes
from trimtab.planning.dealing import Spans
from trimtab.recipe import Acceptance, Quantization, Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.stages import looks as validation
from trimtab.store import Store, Tree

EVALUATION = Evaluation()
BASELINE_BYTES = 1_000_000
TOKENS = EVALUATION.window_tokens - 1


@dataclass(frozen=True)
class Scores:
    """What an artifact scores: the share of the baseline's right answers that it loses in looks 1, 2, 3 and on
    the fresh items, its perplexity over the baseline's, and its bytes over the baseline's."""

    lost: tuple[float, float, float, float] = (0, 0, 0, 0)
    ratio: float = 1.02
    bytes: float = 0.5
    degenerate: float = 0.0


GOOD = Scores()
BAD = Scores(lost=(0.3, 0.3, 0.3, 0.3))  # recovery about 0.56
OPEN = Scores(lost=(0.03, 0, 0, 0))  # recovery about 0.96 of 400 items: above the limit, not surely
UNDECIDED = Scores(lost=(0.035, 0.035, 0.035, 0))  # at the limit in every look
LUCKY = Scores(lost=(0, 0, 0, 0.3))  # passes every look, and fails on items that no look has used
USELESS = Scores(bytes=1.0)
LOOPING = Scores(degenerate=0.75)


class Script:
    """Files results in a store under the keys that a run will ask for."""

    def __init__(self, store: Store, model: Tree, folder: Path, recipe: str = ""):
        self.store, self.model, self.folder, self.recipe = store, model, folder, recipe
        self.ladder = [rung.recipe for rung in self._rungs()]

    def _rungs(self) -> list[matrix.Rung]:
        return list(read_plan(self.store, self.begin().plan).ladder)

    def begin(self, max_attempts: int = 1) -> State:
        return decisions.begin(
            model=self.model,
            store_uri=self.store.uri,
            name="tiny",
            goal="fit_larger_model",
            target="cpu",
            recipe=self.recipe,
            max_attempts=max_attempts,
            evaluation=EVALUATION,
        )

    def file(
        self,
        scores: Mapping[str, Scores],
        fails: str = "",
        kv_cache_apart: Scores | None = None,
        recipes: Sequence[Recipe] | None = None,
    ) -> None:
        """Files everything for the baseline and the ladder's recipes, and for these without their KV cache.

        Args:
            scores: by title or format; other recipes score GOOD.
            fails: "<format> <stage>" for which nothing is filed, so that the run has to do that work.
            kv_cache_apart: what an export with a quantized KV cache scores with 16 bits; None files nothing.
            recipes: those of the ladder that the run can come to; None for all.
        """
        begun = self.begin()
        ready = self._walk(begun, fails)
        if ready is None:
            return
        for look, items, windows in asked():
            self._evaluation(ready, look, items, windows, Scores(ratio=1.0))
        self._integrity(ready, None, 1.0)
        ladder = self.ladder if recipes is None else recipes
        without_kv_cache = [
            recipe.model_copy(update={"quantize": recipe.quantize.model_copy(update={"kv_cache": "none"})})
            for recipe in ladder
            if recipe.quantize.kv_cache != "none"
        ]
        for recipe in [*ladder, *without_kv_cache]:
            state = begun.model_copy(update={"recipe": recipe, "attempt": 1})
            made = self._walk(state, fails)
            if made is None:
                continue
            wanted = scores.get(recipe.title, scores.get(recipe.quantize.format, GOOD))
            self._integrity(made, recipe.quantize, wanted.bytes)
            for look, items, windows in asked():
                self._evaluation(made, look, items, windows, wanted)
                if recipe.quantize.kv_cache != "none" and kv_cache_apart:
                    self._evaluation(made, look, items, windows, kv_cache_apart, kv_cache="none")

    def _walk(self, state: State, fails: str) -> State | None:
        """Files the results of the attempt's stages; None when one of them is left to the run."""
        for stage in stages.STAGES.values():
            if not stage.wanted(state.recipe):
                continue
            form = state.recipe.quantize.format if state.recipe.quantize else "baseline"
            if fails == f"{form} {stage.name}":
                return None
            key = stages.key_here(stage, state)
            environment = stage.environment(stage.parameters(state.recipe)).here(state.recipe.engine.backend)
            tree = self.record(key, stage.output, {"made.txt": key}, {"seconds_of_work": 0}, environment)
            state = state.model_copy(update={"trees": {**state.trees, stage.output: tree}})
        return state

    def _integrity(self, state: State, quantize: Quantization | None, size: float) -> None:
        inputs = {"export": _export(state), "checkpoint": state.model}
        if quantize and quantize.needs_statistics:
            inputs["calibration"] = state.trees["calibration"]
        parameters = quantize.model_dump(mode="json") if quantize else {}
        key = validation.INTEGRITY.key(parameters, inputs, here(validation.INTEGRITY))
        metrics = {"bytes": int(size * BASELINE_BYTES), "quantized_share": size, "max_relative_error": 0.1}
        files = {"layers.json": "[]", "metrics.json": json.dumps(metrics)}
        self.record(key, "integrity", files, metrics, here(validation.INTEGRITY))

    def _evaluation(
        self,
        state: State,
        look: int,
        items: Spans,
        windows: list[int],
        scores: Scores,
        kv_cache: str = "export",
    ) -> None:
        speed = look == 1 and kv_cache == "export"
        reads = decisions.facts_of(self.store, self.model).max_position_embeddings
        parameters = validation.evaluation_parameters(
            EVALUATION, items, windows, speed, max_length=reads, kv_cache=kv_cache
        )
        inputs = {"engine": state.trees["engine"], "export": _export(state)}
        key = validation.EVALUATE.key(parameters, inputs, here(validation.EVALUATE))
        files = {
            "items.jsonl": "".join(json.dumps(item) + "\n" for item in items_of(items, scores.lost[look - 1])),
            "windows.json": json.dumps(windows_of(windows, scores.ratio)),
            "kernels.json": "{}",
        }
        metrics = {"peak_memory_bytes": 10**8, "degenerate": scores.degenerate}
        metrics |= {"decode_tokens_per_second": 10.0, "throughput_tokens_per_second": 50.0}
        files["metrics.json"] = json.dumps(metrics)
        self.record(key, "evaluation", files, metrics, here(validation.EVALUATE))

    def record(
        self, key: str, kind: str, files: dict[str, str], metrics: dict[str, Any], environment: dict[str, Any]
    ) -> Tree:
        folder = self.folder / key
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(text)
        tree = self.store.put(folder, kind=kind, metadata={"key": key, "environment": environment})
        self.store.record(key, {"tree": tree.model_dump(), "metrics": metrics, "seconds": 1.0})
        return tree


def asked() -> Iterator[tuple[int, Spans, list[int]]]:
    """Yields the number, items and windows of each look, then of each confirmation that a run may come to."""
    deal = dealing.deal(task_sizes.of(EVALUATION), EVALUATION, Acceptance(), attempts=10)
    for look, drawn in enumerate(validation.looks(EVALUATION, deal), start=1):
        yield look, *drawn
    for earlier in range(3):
        yield evidence.CONFIRMATION, *validation.fresh(EVALUATION, deal, earlier)


def here(stage: stages.Stage) -> dict[str, Any]:
    return stage.environment({}).here("torch")


def _export(state: State) -> Tree:
    return stages.tree_of("export", state)


def items_of(spans: Spans, lost: float) -> Iterator[dict[str, Any]]:
    """Four of five are right; of those, the share `lost` is evenly spread.

    The suite's tasks have one size, so that the sums of their spans number the items of all looks.
    """
    for n in range(*(sum(ends) for ends in zip(*spans.values(), strict=True))):
        right = n % 5 != 0
        turned = right and math.floor((n + 1) * lost) > math.floor(n * lost)
        yield {"id": f"item/{n}", "score": float(right and not turned), "chance": 0.25, "answers": []}


def windows_of(span: list[int], ratio: float) -> dict[str, Any]:
    spread = [0.002 * math.sin(n) if ratio != 1 else 0.0 for n in range(*span)]
    nll = [TOKENS * (3 + 0.1 * math.cos(n) + math.log(ratio) + s) for n, s in zip(range(*span), spread, strict=True)]
    return {"start": span[0], "nll": nll, "tokens": [TOKENS] * len(nll)}


def arguments(script: Script, max_attempts: int) -> dict[str, Any]:
    return {
        "model": str(script.folder.parent / "model"),
        "store": script.store.uri,
        "name": "tiny",
        "max_attempts": max_attempts,
    }


def told(state: State) -> list[str]:
    """An attempt a line: its format, and how it ended."""
    lines = []
    for brief in state.history:
        looks = f" after {brief.verdict.looks} looks" if brief.verdict.looks > 1 else ""
        ending = brief.verdict.failure_class or ("confirmed" if brief.verdict.confirmed else "unconfirmed")
        lines.append(f"{brief.recipe.quantize.format} {brief.verdict.outcome} {ending}{looks}")
    return lines


def first_attempt(script: Script, scores: Scores = GOOD) -> State:
    """The state after the baseline and one attempt."""
    script.file({script.ladder[0].quantize.format: scores}, recipes=script.ladder[:1])
    return attempts(script, script.begin(), 1)


def attempts(script: Script, state: State, count: int) -> State:
    """The state after the baseline and so many attempts, all of whose results were filed."""
    for number in range(count + 1):
        for name in stages.STAGES:
            state, _ = stages.advance(name, state)
        page, metrics = script.folder / f"page-{number}", SimpleNamespace(log_metric=lambda *_: None)
        state = load(validate(save(state), SimpleNamespace(path=str(page)), metrics))
        state = decisions.next_attempt(state) if number < count else state
    return state


KV_RECIPE = "quantize: {format: int4_rtn, kv_cache: nvfp4}"
