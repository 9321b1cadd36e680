"""What KFP sees of a stage: the body of its component, and the artifacts and numbers that its page shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trimtab.base import child, environment
from trimtab.catalog.formats import FORMATS
from trimtab.loop.documents import load, save
from trimtab.recipe import Recipe
from trimtab.stages.execution import advance, tree_of
from trimtab.stages.keys import SHAPING
from trimtab.stages.registry import STAGES
from trimtab.store.tree import Tree

#: The outputs of stages that are models.
MODELS = ("checkpoint", "export")


def run(names: str, state_uri: str, artifact: Any, metrics: Any, shown: str = "") -> str:
    """The body of a stage's component: runs the named stages and fills the artifacts that the UI shows.

    Args:
        names: names of STAGES, separated by spaces. The libraries of this image are written down for each of them, also
            where there is nothing to do, unless they are known: see `accelerators`.
        shown: the stage whose tree the artifact stands for; the first when empty. The names of the others' metrics
            begin with their stage's, for all have seconds.
        state_uri: the document of the attempt, as the previous stage returned it.
        artifact: KFP output artifact; gets a few kB that name the tree, so that the UI draws the lineage.
        metrics: KFP Metrics artifact, or None.

    Returns:
        The URI of the document for the next stage.
    """
    child.follow_run()
    state = load(state_uri)
    shown = shown or names.split()[0]
    for name in names.split():
        state, result = advance(name, state)
        if result or name not in state.libraries:  # what only passes on may do so in another image
            libraries = {**state.libraries, name: environment.installed(SHAPING)}
            state = state.model_copy(update={"libraries": libraries})
        if metrics is not None and result:
            told = {**result.metrics, "seconds": result.seconds, "from_store": float(result.hit)}
            log_metrics(metrics, {key if name == shown else f"{name}_{key}": value for key, value in told.items()})
    output = STAGES[shown].output
    describe_tree(artifact, tree_of(output, state))
    if output in MODELS:
        artifact.metadata.update(model_facts(state.recipe, output == "export"))
    return save(state)


def model_facts(recipe: Recipe, is_quantized: bool) -> dict[str, Any]:
    """Returns what a model registry shows of a model, by the names that Kubeflow's has for it."""
    quantize = recipe.quantize if is_quantized else None
    row = FORMATS[quantize.format if quantize else "bf16"]
    bits = (quantize and quantize.effective_bits) or row.bits
    told = {"framework": "transformers", "model_format_name": "safetensors", "model_format_version": "1"}
    return {**told, "quantization": quantize.format if quantize else "none", "bits": round(float(bits), 2)}


def log_metrics(artifact: Any, metrics: Mapping[str, Any]) -> None:
    """Shows the numbers among the metrics in the UI; texts have no place in KFP's Metrics."""
    for name, value in metrics.items():
        if isinstance(value, int | float):
            artifact.log_metric(name, round(float(value), 6))


def describe_tree(artifact: Any, tree: Tree | None) -> None:
    """Writes what the artifact stands for: the tree stays in the store, its name travels through KFP.

    The artifact's own URI is left alone: outside the pipeline root KFP's launcher fails the task.
    """
    facts = tree.model_dump() if tree else {}
    Path(artifact.path).write_text(json.dumps(facts), encoding="utf-8")
    artifact.metadata.update({f"tree_{name}": value for name, value in facts.items()})
