"""Batching strategies and KV caches on the same engine, kernels and arrivals; and a server under many clients.

Run: python benchmarks/serving.py [--model FOLDER | --eight-billion] [--out FOLDER] [--quick | --soak]

Requests arrive as a Poisson process, with log-normal lengths: at 0.7 of the rate that in-flight batching served when
all came at once, which shows latency, and at twice that rate, which shows throughput. Every repeat draws anew, and each
strategy meets the same draws. Without --model a random model stands in. Writes serving.md,
serving.json and serving.svg into the output folder; the last line is the same JSON. --soak serves the model in a
process of its own to 200 clients for two minutes, and ends it by SIGTERM under load.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu import CUDA, EIGHT_BILLION, SMALL, log, random_model, release, versions
from serving_picture import picture
from serving_soak import soak

TINY = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 1024}  # fmt: skip
STRATEGIES = ("static", "dynamic", "in-flight")
#: Arrivals as a share of what in-flight batching can serve: below it, and above it.
LOADS = (0.7, 2.0)
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
    parser.add_argument("--requests", type=int, default=0, help="requests of a repeat; 8 batches of them")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a tiny model and two repeats, below a minute on a CPU")
    parser.add_argument("--soak", action="store_true", help="200 clients for two minutes, then SIGTERM")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        os.environ["TRIMTAB_PROGRESS"] = str(Path(name) / "progress.jsonl")  # the terminal is for results
        folder = options.model or random_model(Path(name) / "model", _shape(options))
        title = folder.name if options.model else "random, in the shape of " + _shape_name(options)
        found: dict[str, Any] = {"model": title, "versions": versions()}
        if options.soak:
            found["soak"] = soak(folder, options.clients, options.seconds)
            (options.out / "soak.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
        else:
            measure(found, folder, options)
            (options.out / "serving.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
            (options.out / "serving.md").write_text(markdown(found), encoding="utf-8")
            (options.out / "serving.svg").write_text(picture(found["strategies"][str(LOADS[-1])]), encoding="utf-8")
    print(json.dumps(found))
    return 0


def _shape(options: argparse.Namespace) -> dict[str, Any]:
    return EIGHT_BILLION if options.eight_billion else SMALL if CUDA and not options.quick else TINY


def _shape_name(options: argparse.Namespace) -> str:
    return {id(EIGHT_BILLION): "Llama 3 8B", id(SMALL): "SmolLM2-135M"}.get(id(_shape(options)), "two small blocks")


def measure(found: dict[str, Any], folder: Path, options: argparse.Namespace) -> None:
    """Measures the strategies, then the caches."""
    from trimtab.components.engine.load import Lengths, Objective, Workload
    from trimtab.recipe import Engine
    from trimtab.runtime.scheduler import Scheduler

    batch = options.batch or (64 if CUDA else 8)
    repeats = 2 if options.quick else options.repeats
    requests = options.requests or (6 if options.quick else 8) * batch
    if CUDA:
        lengths, longest = (Lengths(128, 512), Lengths(128, 1024)), 1536
    else:
        lengths, longest = (Lengths(16, 64), Lengths(16, 96)), 160
    settings = Engine(
        max_batch_size=batch, max_seq_len=longest, max_num_tokens=max(2048 if CUDA else 128, batch),
        enable_chunked_prefill=True,
    )  # fmt: skip
    workload = Workload(requests, math.inf, *lengths)
    log("warm-up, and the rate that in-flight batching can serve")
    engine = open_engine(folder, settings)
    capacity, first = _capacity(engine, workload)
    found["decode_path"] = engine.decode_path
    found["capacity_requests_per_second"] = capacity
    # A user waits for the first token as long as ten steps and a prompt take, and reads at half the engine's speed.
    objective = Objective(first_token=10 * first, between_tokens=2 * first)
    found["workload"] = {
        "requests": requests, "repeats": repeats, "max_batch_size": batch,
        "max_seq_len": longest, "prompt_median": lengths[0].median, "answer_median": lengths[1].median,
        "prompt_longest": lengths[0].longest, "answer_longest": lengths[1].longest,
        "objective_first_token": round(objective.first_token, 4),
        "objective_between_tokens": round(objective.between_tokens, 4),
    }  # fmt: skip
    found["strategies"] = {}
    for load in LOADS[1:] if options.quick else LOADS:
        workload = replace(workload, rate=load * capacity)
        rows = found["strategies"][str(load)] = {}
        for strategy in STRATEGIES:
            log(f"{strategy} at a load of {load}")
            limits = (settings.max_batch_size, settings.max_num_tokens)
            engine.scheduler = Scheduler(engine.pool, *limits, strategy)
            rows[strategy] = repeated(engine, workload, objective, repeats)
    engine = None
    release()
    # The same memory: what half of the batch needs at full length.
    room = batch // 2 * longest
    found["caches"] = {}
    for name, block_size in (("contiguous", longest), ("paged", 16)):
        log(f"{name} KV cache")
        wide = settings.model_copy(update={"max_batch_size": 4 * batch, "max_num_tokens": 4 * settings.max_num_tokens})
        engine = open_engine(folder, wide, block_size=block_size, blocks=room // block_size)
        found["caches"][name] = repeated(engine, workload, objective, repeats)
        engine = None
        release()
    if CUDA:
        found["longest_batch"] = longest_batch(folder, settings, workload)


def open_engine(folder: Path, settings: Any, **options: Any) -> Any:
    """Loads an engine and lets it record or load what it needs before it is timed."""
    from trimtab.runtime.paged_engine import PagedEngine

    engine = PagedEngine(folder, settings, **options)
    engine.warm_up(min(settings.max_seq_len, 384 if CUDA else 48))
    return engine


def _capacity(engine: Any, workload: Any) -> tuple[float, float]:
    """Returns requests a second, and the median seconds between two tokens, when all requests come at once."""
    from trimtab.components.engine.load import Objective, figures, replay

    arrivals = workload.draw(10_000, engine.model.config.vocab_size)
    replay(engine, arrivals[: len(arrivals) // 2])  # what is loaded or recorded once
    run = replay(engine, workload.draw(10_001, engine.model.config.vocab_size))
    return len(run.requests) / run.seconds, figures(run, Objective(1, 1))["between_tokens_p50"]


def repeated(engine: Any, workload: Any, objective: Any, repeats: int) -> dict[str, Any]:
    """Returns each figure's mean over the repeats and half the width of its 95 % interval."""
    from trimtab.components.engine.load import figures, interval, replay

    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    rows = []
    for seed in range(repeats):
        before = replace(engine.counts)
        run = replay(engine, workload.draw(seed, engine.model.config.vocab_size))
        row = figures(run, objective)
        steps, padding = engine.counts.steps - before.steps, engine.counts.padding - before.padding
        row["padding_share"] = padding / (padding + engine.counts.tokens - before.tokens)
        row["utilisation"] = (engine.counts.sequences - before.sequences) / steps / engine.settings.max_batch_size
        rows.append(row)
    found: dict[str, Any] = {name: interval([row[name] for row in rows]) for name in rows[0]}
    found["kv_gb"] = engine.cache.nbytes / 1e9
    if CUDA:
        found["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
    return found


def longest_batch(folder: Path, settings: Any, workload: Any) -> dict[str, int]:
    """Returns how many sequences of mixed lengths a GPU's memory holds at their ends, by the kind of cache."""
    from trimtab.runtime.blocks import BlockPool
    from trimtab.runtime.paged_engine import PagedEngine

    found = {}
    many = settings.model_copy(update={"max_batch_size": 4096, "max_num_tokens": 4096})
    for name, block_size in (("contiguous", settings.max_seq_len), ("paged", 16)):
        engine = PagedEngine(folder, many, block_size=block_size)
        pool = BlockPool(engine.pool.blocks, block_size)
        requests = [request for _, request in replace(workload, requests=4096).draw(3, 256)]
        found[name] = next((n for n, r in enumerate(requests) if not pool.grow(r, r.length)), len(requests))
        engine = None
        release()
    return found


# --------------------------------------------------------------------------------------------------- the report


def markdown(found: dict[str, Any]) -> str:
    """The results as they are committed under benchmarks/results/."""
    known, asked, loads = found["versions"], found["workload"], found["strategies"]
    lines = [
        f"# Serving on {known['card']}",
        "",
        f"{known['date']}, PyTorch {known['torch']}, transformers {known['transformers']}; printed by "
        f"`python benchmarks/serving.py`. The model: {found['model']}; steps by {found['decode_path']}.",
        "",
        f"{asked['requests']} requests arrive as a Poisson process. Prompts have a median of {asked['prompt_median']} "
        f"tokens and at most {asked['prompt_longest']}, answers of {asked['answer_median']} and "
        f"{asked['answer_longest']}, log-normal. {asked['max_batch_size']} sequences at once; means of "
        f"{asked['repeats']} repeats with 95 % "
        f"intervals. A request is good with its first token within {asked['objective_first_token']} s and the others "
        f"{asked['objective_between_tokens']} s apart.",
    ]
    for load, rows in loads.items():
        rate = float(load) * found["capacity_requests_per_second"]
        ratio = rows["in-flight"]["tokens_per_second"][0] / rows["static"]["tokens_per_second"][0]
        lines += [
            "",
            f"## {rate:.1f} requests a second, {load} of what in-flight batching served when all came at once",
            "",
            f"In-flight batching has {ratio:.2f} times the throughput of static batching.",
            "",
            *table("strategy", COLUMNS, rows),
        ]
    title = "## Paged and contiguous KV cache, in the same memory, at the last rate"
    lines += ["", "![strategies](serving.svg)", "", title, "", *table("cache", CACHE_COLUMNS, found["caches"])]
    if "longest_batch" in found:
        held = found["longest_batch"]
        lines += ["", f"The whole card holds {held['contiguous']} sequences contiguously, {held['paged']} in pages."]
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
