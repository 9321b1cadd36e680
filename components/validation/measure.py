"""What one engine scores on a range of items and windows, and how fast it is: runs in a process of its own."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import lm_eval

from trimtab import progress
from trimtab.components.validation import pace
from trimtab.components.validation import tasks as task_row
from trimtab.components.validation.generation import generate, is_degenerate
from trimtab.components.validation.lm import EngineLM
from trimtab.errors import Failure, InputError
from trimtab.runtime import text
from trimtab.runtime.backends import EXCLUSIVE, open_engine
from trimtab.runtime.engine import Engine
from trimtab.serving import record

HELDOUT_TEXT = ("trimtab.components.validation.suite", "heldout.txt")

#: lm-eval's metrics that score one item between 0 and 1, the first that a task has counts.
ITEM_METRICS = ("acc", "exact_match", "acc_norm", "em")

SPEED = {"prompt_tokens": 32, "new_tokens": 48, "repeats": 3}
BATCH = 8


def evaluate(
    engine: str, export: str, output: str, scratch: str, parameters: dict[str, Any], calibration: str | None = None
) -> dict[str, float]:
    """Scores items and windows and writes `items.jsonl`, `windows.json`, `outputs.json`, and what computed them.

    Args:
        engine: folder of the built engine, `engine.json`.
        export: folder of the exported checkpoint, all that is known of the model here.
        parameters: tasks, task_path, items [start, stop], windows [start, stop], window_tokens, heldout,
            speed (measure decoding and generation too), kv_cache (optional: "none" runs the export with its
            KV cache in 16 bits).
        calibration: folder of the calibration whose text must not be what is evaluated on, or None.

    Returns:
        accuracy, log_perplexity; with `speed` decode_tokens_per_second, throughput_tokens_per_second and
        degenerate (share of the prompts whose continuation is empty or goes round in a loop).
    """
    if calibration:
        _refuse_overlap((Path(calibration) / "text.txt").read_text(encoding="utf-8"), parameters)
    served = open_engine(Path(engine), Path(export), parameters.get("kv_cache", "export"))
    folder = Path(output)
    metrics = _score_items(served, parameters, folder) | _score_windows(served, parameters, folder)
    (folder / "kernels.json").write_text(json.dumps(served.kernels()), encoding="utf-8")
    (folder / "arithmetic.json").write_text(json.dumps(served.arithmetic), encoding="utf-8")
    if parameters["speed"]:
        metrics |= decode_speed(served, new_tokens([served])) | _generate(served, folder)
    served.close()
    return metrics


def compare_speed(
    engine: str,
    export: str,
    baseline_engine: str,
    baseline_export: str,
    output: str,
    scratch: str,
    parameters: dict[str, Any],
) -> dict[str, float]:
    """Measures candidate and baseline in turn in one process, so that a busy machine disturbs both alike.

    Engines of TensorRT-LLM and vLLM claim the GPU's memory, so there one is closed before the other is opened.

    Returns:
        decode and throughput tokens/s of the candidate, and those of the baseline with the prefix `baseline_`.
    """
    places = ((Path(baseline_engine), Path(baseline_export)), (Path(engine), Path(export)))
    if record.read(places[1][0]).settings.backend in EXCLUSIVE:
        columns = [_speeds_alone(*place, parameters["rounds"]) for place in places]
        rounds = list(zip(*columns, strict=True))
    else:
        baseline, candidate = (open_engine(*place) for place in places)
        tokens = new_tokens([baseline, candidate], parameters["rounds"])
        both = (baseline, candidate)
        rounds = [tuple(decode_speed(engine, tokens) for engine in both) for _ in range(parameters["rounds"])]
        baseline.close()
        candidate.close()
    metrics = {}
    for position, prefix in ((0, "baseline_"), (1, "")):
        for name in rounds[0][0]:
            metrics[prefix + name] = statistics.median(pair[position][name] for pair in rounds)
    (Path(output) / "speed.json").write_text(json.dumps(rounds), encoding="utf-8")
    return metrics


def _speeds_alone(engine: Path, export: Path, rounds: int) -> list[dict[str, float]]:
    """Measures one engine after the other where the GPU has no room for both."""
    served = open_engine(engine, export)
    try:
        tokens = new_tokens([served], rounds)
        return [decode_speed(served, tokens) for _ in range(rounds)]
    finally:
        served.close()


def new_tokens(engines: list[Engine], rounds: int = 1) -> dict[int, int]:
    """Returns by batch size how many tokens a repeat of `decode_speed` has, so that all rounds end in bounded time."""
    progress.report("validate", "trying how fast it decodes")
    prompt, most, repeats = (SPEED[name] for name in ("prompt_tokens", "new_tokens", "repeats"))
    seconds = pace.SECONDS / rounds
    return {batch: pace.new_tokens(engines, batch, prompt, most, repeats, seconds) for batch in (1, BATCH)}


def decode_speed(engine: Engine, tokens: dict[int, int]) -> dict[str, float]:
    """Returns the median decode speed at batch 1, and at batch 8 as throughput, in tokens a second."""
    progress.report("validate", "measuring decode speed")
    single, batched = (
        engine.decode_speed(batch, SPEED["prompt_tokens"], tokens[batch], SPEED["repeats"]) for batch in (1, BATCH)
    )
    return {
        "decode_tokens_per_second": statistics.median(single),
        "throughput_tokens_per_second": statistics.median(batched),
    }


def _refuse_overlap(calibrated: str, parameters: dict[str, Any]) -> None:
    _, tasks = task_row.load(parameters["tasks"], parameters["task_path"])
    asked = [_words(task, document) for task in tasks.values() for document in task.eval_docs]
    for what, evaluated in (("the held-out text", _heldout(parameters)), ("the items", "\n".join(asked))):
        shared = text.shared_sequences(calibrated, evaluated)
        if shared:
            raise InputError(
                f"calibrate.text: shares {len(shared)} sequences of 13 words with {what}, such as '{shared[0]}'; "
                f"calibrate on other text"
            )


def _words(task: Any, document: dict[str, Any]) -> str:
    choices = task.doc_to_choice(document) if task.OUTPUT_TYPE == "multiple_choice" else ""
    return f"{task.doc_to_text(document)} {choices}"


def _heldout(parameters: dict[str, Any]) -> str:
    return text.read_text(parameters["heldout"], HELDOUT_TEXT, field="heldout")


def _score_items(engine: Engine, parameters: dict[str, Any], folder: Path) -> dict[str, float]:
    manager, tasks = task_row.load(parameters["tasks"], parameters["task_path"])
    chosen = task_row.choose(tasks, *parameters["items"])
    items = []
    if chosen:
        results = lm_eval.simple_evaluate(
            model=EngineLM(engine),
            tasks=sorted(chosen),
            samples=chosen,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
        items = [_item(name, s) for name, samples in sorted(results["samples"].items()) for s in samples]
    with (folder / "items.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)
    if not items:
        return {"items": 0}
    return {"items": len(items), "accuracy": statistics.fmean(item["score"] for item in items)}


def _item(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """Keeps of lm-eval's sample what the verdict reads and what a person wants to look up."""
    metric = next((name for name in ITEM_METRICS if name in sample), None)
    if metric is None:
        raise Failure(
            "unsupported", f"tasks: '{task}' scores no single items (one of {', '.join(ITEM_METRICS)})"
        )
    choices = len(sample["arguments"])
    return {
        "id": f"{task}/{sample['doc_id']}/{sample['doc_hash'][:12]}",
        "score": float(sample[metric]),
        "chance": 1 / choices if metric.startswith("acc") and choices > 1 else 0.0,
        "answers": [response[0] for response in sample["filtered_resps"]] if choices > 1 else [],
    }


def _score_windows(engine: Engine, parameters: dict[str, Any], folder: Path) -> dict[str, float]:
    start, stop = parameters["windows"]
    length = parameters["window_tokens"]
    windows = text.windows(engine.tokenizer, _heldout(parameters), length, stop)[start:stop]
    nll = []
    for window in progress.track(windows, "validate", "measuring perplexity", len(windows)):
        nll += engine.nll(window[None])
    document = {"start": start, "nll": nll, "tokens": [length - 1] * len(nll)}
    (folder / "windows.json").write_text(json.dumps(document), encoding="utf-8")
    if not nll:
        return {"windows": 0}
    mean = sum(nll) / sum(document["tokens"])
    return {"windows": len(nll), "log_perplexity": mean}


def _generate(engine: Engine, folder: Path) -> dict[str, float]:
    written = generate(engine)
    texts = {prompt: engine.tokenizer.decode(tokens) for prompt, tokens in written.items()}
    (folder / "outputs.json").write_text(json.dumps(texts, indent=1), encoding="utf-8")
    return {"degenerate": statistics.fmean(map(is_degenerate, written.values()))}
