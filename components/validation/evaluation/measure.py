"""What one engine scores on a range of items and windows, and how fast it is: runs in a process of its own."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.evaluator
import numpy as np
import torch

from trimtab.base import progress
from trimtab.base.errors import Failure, InputError
from trimtab.components.validation.evaluation import pace
from trimtab.components.validation.evaluation import tasks as known_tasks
from trimtab.components.validation.evaluation.generation import generate, is_degenerate
from trimtab.components.validation.evaluation.lm import EngineLM
from trimtab.components.validation.evaluation.load import Load, alike, load_of
from trimtab.loop.evidence import TEXT
from trimtab.runtime.engines import kept
from trimtab.runtime.engines.protocol import Engine, Prediction
from trimtab.runtime.text import token_windows
from trimtab.serving import record

# After each evaluation lm-eval asks pip and the shell what is installed: seconds, for what the engine tells.
lm_eval.evaluator.add_env_info = lambda results: None

HELDOUT_TEXT = ("trimtab.components.validation.suite", "heldout.txt")

#: Tokens that are kept of what could stand at a place: as many as vLLM tells by default (max_logprobs).
LIKELIEST = 20

#: On a CPU; `load` says what is measured on a GPU.
SPEED = {"prompt_tokens": 32, "new_tokens": 48, "repeats": 3}


def evaluate(
    engine: str, export: str, output: str, scratch: str, parameters: dict[str, Any], calibration: str | None = None
) -> dict[str, float]:
    """Scores items and windows and writes `items.jsonl`, `windows.json`, `text.npz`, `outputs.json`, and what computed
    them.

    Args:
        engine: folder of the built engine, `engine.json`.
        export: folder of the exported checkpoint, all that is known of the model here.
        parameters: tasks, task_path, filters, items (task -> [start, stop]), windows [start, stop], all_windows (how
            many all looks ask for together), window_tokens, heldout, speed (measure decoding and
            generation too), max_length (the most tokens of a request and its answer), and optionally kv_cache ("none"
            runs the export with its KV cache in 16 bits).
        calibration: folder of the calibration whose text must not be what is evaluated on, or None.

    Returns:
        items, accuracy, truncated (requests that lost their beginning), windows, log_perplexity; with `speed`
        decode_tokens_per_second, throughput_tokens_per_second, cores (that computed; 0 for a GPU) and degenerate (share
        of the prompts whose continuation is empty or goes round in a loop).
    """
    if calibration:
        _refuse_overlap((Path(calibration) / "text.txt").read_text(encoding="utf-8"), parameters)
    served = kept.built(Path(engine), Path(export), parameters.get("kv_cache", "export"))
    folder = Path(output)
    settings = record.read(Path(engine)).settings
    model = EngineLM(served, parameters["max_length"], settings.max_batch_size)
    metrics = _score_windows(served, parameters, folder, settings.by_block)
    metrics |= _score_items(model, parameters, folder)
    (folder / "kernels.json").write_text(json.dumps(served.kernels()), encoding="utf-8")
    (folder / "arithmetic.json").write_text(json.dumps(served.arithmetic), encoding="utf-8")
    if parameters["speed"]:
        load = _load(Path(engine))
        metrics |= decode_speed(served, load, new_tokens([(served, load)])) | _generate(served, folder)
        metrics["cores"] = 0 if served.device_bytes else torch.get_num_threads()
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

    Each has the batch of its own recipe, and both the same lengths. Where there is no room for both (`engines.kept`),
    one is measured after the other, and the one that is open already first.

    Returns:
        decode and throughput tokens/s of the candidate, and those of the baseline with the prefix `baseline_`.
    """
    places = ((Path(baseline_engine), Path(baseline_export)), (Path(engine), Path(export)))
    loads = alike(*(_load(folder) for folder, _ in places))
    if kept.have_room(places):
        pairs = [(kept.built(*place), load) for place, load in zip(places, loads, strict=True)]
        tokens = new_tokens(pairs, parameters["rounds"])
        rounds = [tuple(decode_speed(*pair, tokens) for pair in pairs) for _ in range(parameters["rounds"])]
    else:
        order = sorted((0, 1), key=lambda which: not kept.is_open(*places[which]))
        columns = {which: _speeds_alone(*places[which], parameters["rounds"], loads[which]) for which in order}
        rounds = list(zip(columns[0], columns[1], strict=True))
    metrics = {}
    for position, prefix in ((0, "baseline_"), (1, "")):
        for name in rounds[0][0]:
            metrics[prefix + name] = statistics.median(pair[position][name] for pair in rounds)
    (Path(output) / "speed.json").write_text(json.dumps(rounds), encoding="utf-8")
    return metrics


def _load(engine: Path) -> Load:
    short = SPEED["prompt_tokens"], SPEED["new_tokens"]
    return load_of(record.read(engine).settings, torch.cuda.is_available(), short)


def _speeds_alone(engine: Path, export: Path, rounds: int, load: Load) -> list[dict[str, float]]:
    """Measures one engine after the other where the device has no room for both."""
    served = kept.built(engine, export)
    tokens = new_tokens([(served, load)], rounds)
    return [decode_speed(served, load, tokens) for _ in range(rounds)]


def new_tokens(pairs: Sequence[tuple[Engine, Load]], rounds: int = 1) -> tuple[int, int]:
    """Returns how many tokens a repeat of `decode_speed` has at batch 1, and at the loads' batches, so that all rounds
    end in bounded time. It is the same for all engines, for these are compared with each other: the slowest decides.
    """
    progress.report("validate", "trying how fast it decodes")
    seconds = pace.SECONDS / rounds

    def fewest(batches: Iterable[int]) -> int:
        asked = zip(pairs, batches, strict=True)
        return min(
            pace.new_tokens(engine, batch, load.prompt_tokens, load.new_tokens, SPEED["repeats"], seconds)
            for (engine, load), batch in asked
        )

    return fewest([1] * len(pairs)), fewest(load.batch_size for _, load in pairs)


def decode_speed(engine: Engine, load: Load, tokens: tuple[int, int]) -> dict[str, float]:
    """Returns the median decode speed at batch 1, and at the load's batch as throughput, in tokens a second.

    Args:
        tokens: how many each sequence is continued by in a repeat, as `new_tokens` returns them.
    """
    progress.report("validate", "measuring decode speed")
    single = engine.decode_speed(1, load.prompt_tokens, tokens[0], SPEED["repeats"])
    batched = single
    if load.batch_size > 1:
        batched = engine.decode_speed(load.batch_size, load.prompt_tokens, tokens[1], SPEED["repeats"])
    return {
        "decode_tokens_per_second": statistics.median(single),
        "throughput_tokens_per_second": statistics.median(batched),
    }


def _refuse_overlap(calibrated: str, parameters: dict[str, Any]) -> None:
    _, tasks = known_tasks.load(parameters["tasks"], parameters["task_path"])
    asked = [_words(task, document) for task in tasks.values() for document in task.eval_docs]
    for what, evaluated in (("the held-out text", _heldout(parameters)), ("the items", "\n".join(asked))):
        shared = token_windows.shared_sequences(calibrated, evaluated)
        if shared:
            raise InputError(
                f"calibrate.text: shares {len(shared)} sequences of 13 words with {what}, such as '{shared[0]}'; "
                f"calibrate on other text"
            )


def _words(task: Any, document: dict[str, Any]) -> str:
    choices = task.doc_to_choice(document) if task.OUTPUT_TYPE == "multiple_choice" else ""
    return f"{task.doc_to_text(document)} {choices}"


def _heldout(parameters: dict[str, Any]) -> str:
    return token_windows.read_text(parameters["heldout"], HELDOUT_TEXT, field="heldout")


def _score_items(model: EngineLM, parameters: dict[str, Any], folder: Path) -> dict[str, float]:
    manager, tasks = known_tasks.load(parameters["tasks"], parameters["task_path"])
    chosen = known_tasks.choose(tasks, parameters["items"])
    filters = known_tasks.filters_of(tasks, parameters["filters"])
    items = []
    if chosen:
        results = lm_eval.simple_evaluate(
            model=model,
            tasks=sorted(chosen),
            samples=chosen,
            task_manager=manager,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
        items = [
            _item(name, sample)
            for name, samples in sorted(results["samples"].items())
            for sample in samples
            if sample["filter"] == filters[name]  # the same answer read in another way is no other item
        ]
    with (folder / "items.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(item) + "\n" for item in items)
    if not items:
        return {"items": 0}
    accuracy = statistics.fmean(item["score"] for item in items)
    return {"items": len(items), "accuracy": accuracy, "truncated": model.truncated}


def _item(task: str, sample: dict[str, Any]) -> dict[str, Any]:
    """Keeps of lm-eval's sample what the verdict reads and what a person wants to look up."""
    metric = next((name for name in known_tasks.ITEM_METRICS if name in sample), None)
    if metric is None:
        raise Failure(
            "unsupported", f"tasks: '{task}' scores no single items (one of {', '.join(known_tasks.ITEM_METRICS)})"
        )
    choices = len(sample["arguments"])
    return {
        "id": f"{task}/{sample['doc_id']}/{sample['doc_hash'][:12]}",
        "score": float(sample[metric]),
        "chance": 1 / choices if metric.startswith("acc") and choices > 1 else 0.0,
        "answers": [response[0] for response in sample["filtered_resps"]] if choices > 1 else [],
    }


def _score_windows(engine: Engine, parameters: dict[str, Any], folder: Path, together: bool) -> dict[str, float]:
    """Writes the nats of each window, which are judged, and what was predicted at each place, which explains them.

    Args:
        together: the engine is asked once, for what a question costs it is the same for one window and for all.
    """
    start, windows = _windows(engine, parameters)
    told = Prediction([], [], [])
    parts = windows.split(len(windows) if together else 1) if len(windows) else ()
    for some in progress.track(parts, "validate", "measuring perplexity", len(parts)):
        for part, values in zip(told, engine.predict(some, LIKELIEST), strict=True):
            part += values
    nll = [math.fsum(places) for places in told.nll]
    document = {"start": start, "nll": nll, "tokens": [parameters["window_tokens"] - 1] * len(nll)}
    (folder / "windows.json").write_text(json.dumps(document), encoding="utf-8")
    if not nll:
        return {"windows": 0}
    types = zip(("nll", "tokens", "log_probs"), told, ("float32", "int32", "float32"), strict=True)
    np.savez(folder / TEXT, **{name: np.array(values, dtype=kind) for name, values, kind in types})
    mean = sum(nll) / sum(document["tokens"])
    return {"windows": len(nll), "log_perplexity": mean}


def _windows(engine: Engine, parameters: dict[str, Any]) -> tuple[int, torch.Tensor]:
    """Returns the windows of a look, int64 [n, window_tokens], and the number of the first.

    How many windows a text gives is known once its model's tokenizer is. Where it gives fewer than all looks together
    ask for, each gets its share, as of the items.

    Raises:
        InputError: the text gives less than half of them.
    """
    length, asked, (start, stop) = parameters["window_tokens"], parameters["all_windows"], parameters["windows"]
    room = length - len(token_windows.prefix(engine.tokenizer))
    tokens = token_windows.encode(engine.tokenizer, _heldout(parameters), special=False)
    tokens = torch.tensor(tokens, dtype=torch.int64)
    there = len(tokens) // room
    if there < asked:
        first, last = (round(place * there / asked) for place in (start, stop))
        if 2 * there < asked or last - first < min(2, stop - start):
            raise InputError(
                f"heldout: {len(tokens):,} tokens give {there} windows of {length}, and {asked} are asked for; write a "
                f"longer text, fewer windows, or window_tokens: {max(16, len(tokens) // asked)}"
            )
        start, stop = first, last
    return start, token_windows.begin(engine.tokenizer, token_windows.cut(tokens, room, there)[start:stop])


def _generate(engine: Engine, folder: Path) -> dict[str, float]:
    written = generate(engine)
    texts = {prompt: engine.tokenizer.decode(tokens) for prompt, tokens in written.items()}
    (folder / "outputs.json").write_text(json.dumps(texts, indent=1), encoding="utf-8")
    return {"degenerate": statistics.fmean(map(is_degenerate, written.values()))}
