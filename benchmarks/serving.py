"""Batching strategies and KV caches on the same engine, kernels and arrivals; and a server under many clients.

Run: python benchmarks/serving.py [--model FOLDER | --eight-billion] [--out FOLDER] [--quick | --soak]

Requests arrive as a Poisson process, with log-normal lengths: at twice the rate that in-flight batching served when all
came at once, which shows throughput, and at 0.7 of it, which shows latency. Every repeat draws anew, and each strategy
meets the same draws. Without --model a random model stands in. Every figure goes into serving.jsonl of the output
folder as soon as it is known; serving.json, serving.md and serving.svg follow, and the last line is that JSON. --soak
serves the model in a process of its own to 200 clients for two minutes, and ends it by SIGTERM under load.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from machine import CUDA, log, release, roomy, versions
from random_model import EIGHT_BILLION, SMALL, random_model
from serving_picture import picture
from serving_soak import soak

TINY = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024}  # fmt: skip
STRATEGIES = ("static", "dynamic", "in-flight")
#: Arrivals as a share of what in-flight batching can serve: above it, and below it.
LOADS = (2.0, 0.7)
#: Kinds of KV cache, and the tokens of a block; 0 is as many as the longest sequence has.
CACHES = (("contiguous", 0), ("paged", 16))
#: Seconds that the caches and the longest batch take on a GPU.
RESERVE = 90
#: The columns of the tables: what a figure is called in `load.figures`, and its heading.
COLUMNS = {
    "tokens_per_second": "tokens/s", "latency_p50": "latency p50, s", "latency_p95": "p95", "latency_p99": "p99",
    "first_token_p50": "first token p50, s", "first_token_p95": "p95", "between_tokens_p50": "between tokens p50, s",
    "between_tokens_p99": "p99", "goodput_requests_per_second": "good requests/s", "padding_share": "padding",
    "utilisation": "utilisation",
}  # fmt: skip
CACHE_COLUMNS = {
    "kv_wasted_share": "wasted of what is owned", "sequences_peak": "sequences at once",
    "tokens_per_second": "tokens/s", "latency_p95": "latency p95, s", "preemptions": "preemptions",
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an export or a Hugging Face folder; a random model without it")
    parser.add_argument("--eight-billion", action="store_true", help="a random model in the shape of Llama 3 8B")
    parser.add_argument("--out", type=Path, default=Path("build/serving"), help="folder of the results")
    parser.add_argument("--batch", type=int, default=0, help="sequences at once; 64 on a GPU, 8 on a CPU")
    parser.add_argument("--requests", type=int, default=0, help="requests of a repeat; 3 batches of them")
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=5, help="repeats that would end later are left out")
    parser.add_argument("--attention", choices=["auto", "kernel", "gathered"], default="auto")
    parser.add_argument("--quick", action="store_true", help="a tiny model and two repeats, below a minute on a CPU")
    parser.add_argument("--soak", action="store_true", help="200 clients for two minutes, then SIGTERM")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    results = Results(options.out, options.minutes)
    with tempfile.TemporaryDirectory(dir=roomy(options.eight_billion)) as name:
        os.environ["TRIMTAB_PROGRESS"] = str(Path(name) / "progress.jsonl")  # the terminal is for results
        folder = options.model or random_model(Path(name) / "model", _shape(options))
        title = folder.name if options.model else "random, in the shape of " + _shape_name(options)
        about = {"model": title, "versions": versions()}
        if options.soak:
            found = about | {"soak": soak(folder, options.clients, options.seconds)}
            (options.out / "soak.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        else:
            results.note("about", about)
            measure(results, folder, options)
            found = results.found()
    print(json.dumps(found))
    return 0


def _shape(options: argparse.Namespace) -> dict[str, Any]:
    return EIGHT_BILLION if options.eight_billion else SMALL if CUDA and not options.quick else TINY


def _shape_name(options: argparse.Namespace) -> str:
    return {id(EIGHT_BILLION): "Llama 3 8B", id(SMALL): "SmolLM2-135M"}.get(id(_shape(options)), "two small blocks")


class Results:
    """What was measured: a line of serving.jsonl as soon as it is known, and the report as far as it goes."""

    def __init__(self, folder: Path, minutes: float):
        self.folder, self._ends = folder, time.monotonic() + 60 * minutes
        self.notes: dict[str, Any] = {}
        #: (load or "cache", strategy or kind of cache) -> the figures of each repeat.
        self.rows: dict[tuple[str, str], list[dict[str, float]]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._lines = (folder / "serving.jsonl").open("w", encoding="utf-8")

    @property
    def left(self) -> float:
        """Seconds until the run should end."""
        return self._ends - time.monotonic()

    def note(self, name: str, what: Any) -> None:
        self.notes[name] = what
        self._write({name: what})

    def add(self, part: str, name: str, figures: dict[str, float]) -> None:
        """Adds the figures of a repeat."""
        self.rows.setdefault((part, name), []).append(figures)
        self._write({"part": part, "name": name, **figures})

    def has_time(self, part: str, name: str, reserve: float) -> bool:
        """Whether another repeat would end in time, with a reserve for what comes after; the first always does."""
        spent = [row["seconds"] for row in self.rows.get((part, name), [])]
        return not spent or max(spent) + reserve < self.left

    def _write(self, line: dict[str, Any]) -> None:
        print(json.dumps(line), file=self._lines, flush=True)
        found = self.found()
        (self.folder / "serving.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        if found["strategies"]:
            (self.folder / "serving.md").write_text(markdown(found), encoding="utf-8")
            (self.folder / "serving.svg").write_text(picture(found["strategies"][str(LOADS[0])]), encoding="utf-8")

    def found(self) -> dict[str, Any]:
        """Everything: of each figure the mean over the repeats and half the width of its 95 % interval."""
        from trimtab.components.engine.server.load_generator import interval

        def parts(part: str) -> dict[str, Any]:
            rows = {name: rows for (of, name), rows in self.rows.items() if of == part}
            means = {n: {k: interval([row[k] for row in some]) for k in some[0]} for n, some in rows.items()}
            for name, some in rows.items():
                means[name]["repeats"] = len(some)
            if {"static", "in-flight"} <= rows.keys():  # the same arrivals, so by pairs
                for column, title in (("tokens_per_second", "throughput_ratio"), ("latency_p95", "latency_p95_ratio")):
                    pairs = zip(rows["in-flight"], rows["static"], strict=False)
                    means["in-flight"][title] = interval([ours[column] / theirs[column] for ours, theirs in pairs])
            return means

        about = self.notes.get("about", {})
        rest = {name: what for name, what in self.notes.items() if name != "about"}
        strategies = {str(load): found for load in LOADS if (found := parts(str(load)))}
        return {**about, **rest, "strategies": strategies, "caches": parts("cache")}


def measure(results: Results, folder: Path, options: argparse.Namespace) -> None:
    """Measures the strategies, then the caches, and what a GPU holds."""
    from trimtab.components.engine.server.load_generator import Lengths, Objective, Workload
    from trimtab.recipe import Engine
    from trimtab.runtime.service.paged_engine import PagedEngine
    from trimtab.runtime.service.scheduler import Scheduler

    batch = options.batch or (64 if CUDA else 8)
    repeats = 2 if options.quick else options.repeats
    requests = options.requests or (6 if options.quick else 3) * batch
    lengths, longest = (Lengths(128, 512), Lengths(64, 512)), 1024
    if not CUDA:
        lengths, longest = (Lengths(16, 64), Lengths(16, 96)), 160
    settings = Engine(
        max_batch_size=batch, max_seq_len=longest, max_num_tokens=max(2048 if CUDA else 128, batch),
        enable_chunked_prefill=True,
    )  # fmt: skip
    workload = Workload(requests, math.inf, *lengths)
    log("loading")
    started = time.monotonic()
    engine = PagedEngine(folder, settings, attention=options.attention)
    loaded = time.monotonic()
    warm_up(engine)
    took = {"load": loaded - started, "warm_up": time.monotonic() - loaded}
    log("the rate that in-flight batching can serve")
    capacity, step = _capacity(engine, workload)
    results.note("capacity_requests_per_second", capacity)
    results.note("paths", {"steps": engine.decode_path, "attention": engine.attention_path, "seconds": took})
    # A user waits for the first token as long as ten steps take, and reads at half the engine's speed.
    objective = Objective(first_token=10 * step, between_tokens=2 * step)
    results.note("workload", {
        "requests": requests, "max_batch_size": batch,
        "max_seq_len": longest, "prompt_median": lengths[0].median, "answer_median": lengths[1].median,
        "prompt_longest": lengths[0].longest, "answer_longest": lengths[1].longest,
        "objective_first_token": round(objective.first_token, 4),
        "objective_between_tokens": round(objective.between_tokens, 4),
    })  # fmt: skip
    reserve = RESERVE if CUDA else 0
    for seed in range(repeats):
        for load in LOADS[:1] if options.quick else LOADS:
            workload = replace(workload, rate=load * capacity)
            for strategy in STRATEGIES:
                if not results.has_time(str(load), strategy, reserve):
                    continue
                log(f"{strategy} at a load of {load}, repeat {seed + 1}")
                engine.scheduler = Scheduler(engine.pool, batch, settings.max_num_tokens, strategy)
                results.add(str(load), strategy, repeat(engine, workload, objective, seed))
    # The same memory: what half of the batch needs at full length.
    room, workload = batch // 2 * longest, replace(workload, rate=LOADS[0] * capacity)
    wide = settings.model_copy(update={"max_batch_size": 4 * batch})
    for name, block_size in CACHES:
        block_size = block_size or longest
        log(f"{name} KV cache")
        engine.lay_out(wide, block_size, room // block_size)
        warm_up(engine)
        for seed in range(repeats):
            if results.has_time("cache", name, reserve / 3):
                results.add("cache", name, repeat(engine, workload, objective, seed))
    if CUDA:
        results.note("longest_batch", longest_batch(engine, settings, workload))


def warm_up(engine: Any) -> None:
    engine.warm_up(min(engine.settings.max_seq_len, 384 if CUDA else 48))


def _capacity(engine: Any, workload: Any) -> tuple[float, float]:
    """Returns requests a second, and the median seconds between two tokens, when all requests come at once."""
    from trimtab.components.engine.server.load_generator import Objective, figures, replay

    arrivals = workload.draw(10_000, engine.model.config.vocab_size)
    replay(engine, arrivals[: len(arrivals) // 4])  # what is loaded or recorded once
    run = replay(engine, workload.draw(10_001, engine.model.config.vocab_size))
    return len(run.requests) / run.seconds, figures(run, Objective(1, 1))["between_tokens_p50"]


def repeat(engine: Any, workload: Any, objective: Any, seed: int) -> dict[str, float]:
    """Returns the figures of one draw of the workload."""
    from trimtab.components.engine.server.load_generator import figures, replay

    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    before = replace(engine.counts)
    run = replay(engine, workload.draw(seed, engine.model.config.vocab_size))
    row = {"seconds": run.seconds, **figures(run, objective)}
    steps, padding = engine.counts.steps - before.steps, engine.counts.padding - before.padding
    row["steps"] = steps
    row["padding_share"] = padding / (padding + engine.counts.tokens - before.tokens)
    row["utilisation"] = (engine.counts.sequences - before.sequences) / steps / engine.settings.max_batch_size
    row["kv_gb"] = engine.cache.nbytes / 1e9
    if CUDA:
        row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return row


def longest_batch(engine: Any, settings: Any, workload: Any) -> dict[str, Any]:
    """Returns how many sequences of mixed lengths decode together at their ends before a GPU has no room for them.

    Found by trying, to one part in fifty: a cache of that size is laid out, and a step computed in it.
    """
    found: dict[str, Any] = {}
    for name, block_size in CACHES:
        holds, fails = 0, 0
        count = 512
        while not fails or fails - holds > max(1, holds // 50):
            log(f"{name}: {count} sequences")
            why = _does_not_hold(engine, settings, workload, count, block_size or settings.max_seq_len)
            holds, fails = (holds, count) if why else (count, fails)
            found[f"{name}_refused"] = why or found.get(f"{name}_refused", "")
            count = (holds + fails) // 2 if fails else 2 * count
        found[name] = holds
    return found


def _does_not_hold(engine: Any, settings: Any, workload: Any, count: int, block_size: int) -> str:
    from trimtab.base.errors import Failure

    drawn = replace(workload, requests=count).draw(3, engine.model.config.vocab_size)
    blocks = sum(-(-request.length // block_size) for _, request in drawn)
    many = settings.model_copy(update={"max_batch_size": count, "max_num_tokens": count})
    try:
        engine.lay_out(many, block_size, blocks, recorded=False)
        for _, request in drawn:
            request.tokens += [0] * (request.max_new_tokens - 1)
            request.computed = len(request.tokens) - 1
            engine.pool.grow(request, len(request.tokens))
            engine.scheduler.running.append(request)
        engine.step()
        torch.cuda.synchronize()
    except Failure as failure:
        return failure.reason
    finally:
        release()
    return ""


# --------------------------------------------------------------------------------------------------- the report


def markdown(found: dict[str, Any]) -> str:
    """The results as they are committed under benchmarks/results/, as far as they go."""
    known, asked, paths = found["versions"], found["workload"], found["paths"]
    lines = [
        f"# Serving on {known['card']}",
        "",
        f"{known['date']}, PyTorch {known['torch']}, transformers {known['transformers']}; printed by "
        f"`python benchmarks/serving.py`. The model: {found['model']}; steps by {paths['steps']}, attention by "
        f"{paths['attention']}.",
        "",
        f"{asked['requests']} requests arrive as a Poisson process. Prompts have a median of {asked['prompt_median']} "
        f"tokens and at most {asked['prompt_longest']}, answers of {asked['answer_median']} and "
        f"{asked['answer_longest']}, log-normal. {asked['max_batch_size']} sequences at once; means over repeats with "
        f"95 % intervals. A request is good with its first token within {asked['objective_first_token']} s and the "
        f"others {asked['objective_between_tokens']} s apart.",
    ]
    for load, rows in found["strategies"].items():
        rate = float(load) * found["capacity_requests_per_second"]
        lines += ["", f"## {rate:.1f} requests a second, {load} of what in-flight batching served at once", ""]
        ours = rows.get("in-flight", {})
        if "throughput_ratio" in ours:
            faster, later = cell(*ours["throughput_ratio"]), cell(*ours["latency_p95_ratio"])
            what = f"{faster} times the throughput of static batching, and {later} times its p95 latency"
            lines += [f"In-flight batching has {what}, over {ours['repeats']} pairs of repeats.", ""]
        lines += table("strategy", COLUMNS, rows)
    lines += ["", "![strategies](serving.svg)"]
    if found["caches"]:
        title = "## Paged and contiguous KV cache, in the same memory, at the first rate"
        lines += ["", title, "", *table("cache", CACHE_COLUMNS, found["caches"])]
    if "longest_batch" in found:
        held = found["longest_batch"]
        text = f"Before it is out of memory the whole card decodes {held['contiguous']} such sequences together in a "
        lines += ["", f"{text}contiguous cache, {held['paged']} in a paged one."]
    return "\n".join(lines) + "\n"


def table(what: str, columns: dict[str, str], rows: dict[str, Any]) -> list[str]:
    lines = [f"| {what} | {' | '.join(columns.values())} |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(cell(*row[column]) for column in columns)} |")
    return lines


def cell(mean: float, half: float) -> str:
    return f"{mean:.4g}" + (f" ± {half:.2g}" if math.isfinite(half) and half else "")


if __name__ == "__main__":
    sys.exit(main())
