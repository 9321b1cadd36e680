"""Where the time of a decoding step goes, by format and batch, beside what the memory's bandwidth allows.

Run: python benchmarks/decode.py [--eight-billion] [--formats NAME ...] [--batches N ...] [--variants NAME ...]
         [--out FILE] [--quick]

Weights are random and made on the device; a model has them as an export of its format would, and is run by the engine's
own decoder. The limit is bytes of weights, keys and values of a step over the measured speed of a copy. With --out
every row is written as a line of JSON when it is found: `speed` in tokens a second of all sequences; for the first
batch `kernels`, the microseconds a step that each takes; and `products`, the GB/s of weights that those of few rows
read by the block of a program ("own": the layer's kernel). `vllm_decode.py` times vLLM on the same shape.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from machine import CUDA, DEVICE, copy_bandwidth, describe, log, release, seconds_of, speed_limit, versions
from random_model import EIGHT_BILLION, SMALL
from torch import nn

PROMPT_TOKENS, NEW_TOKENS, REPEATS = (128, 256, 3) if CUDA else (16, 8, 1)
#: "engine" is what an engine does; the others leave something of it out.
VARIANTS = ("engine", "library products", "library kernels", "not fused", "transformers")
#: Format -> quant_algo and group size; none for BF16.
FORMATS = {
    "bf16": None,
    "fp8": ("FP8", 0),
    "fp8_per_channel": ("FP8_PER_CHANNEL_PER_TOKEN", 0),
    "int8_wo": ("W8A16", 0),
    "int8_sq": ("W8A8_SQ_PER_CHANNEL", 0),
    "int4": ("W4A16_AWQ", 64),
}
#: Kinds of kernels by parts of their names; what has none of them is small.
KINDS = {
    "attention": ("attend", "combine", "flash", "fmha", "attention"),
    "products": ("matvec", "multiply", "gemm", "gemv", "cutlass", "nvjet", "splitk", "xmma"),
}
PROFILED_STEPS = 8


class Rows:
    """What was found, printed, and written to a file a line at a time."""

    def __init__(self, path: Path | None):
        self.found: list[dict[str, Any]] = []
        self._file = path.open("w", encoding="utf-8") if path else None

    def add(self, row: dict[str, Any]) -> None:
        self.found.append(row)
        if "speed" in row:
            told = f"{row['speed']:>10,.1f} tokens/s {row['milliseconds']:>8.3f} ms a step "
            told += f"{row['of_limit']:>7.1%} of the limit, {row['path']}" if "of_limit" in row else ""
        else:
            told = row.get("error") or json.dumps(row)
        named = [str(row[key]) for key in ("engine", "format", "variant", "batch") if key in row]
        print(*named, told, flush=True)
        if self._file:
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--eight-billion", action="store_true", help="the shape of Llama 3 8B, else of SmolLM2-135M")
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=["bf16", "fp8"])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=["engine"])
    parser.add_argument("--out", type=Path, help="a file for the rows, as JSON lines")
    parser.add_argument("--quick", action="store_true", help="two blocks, batch 1")
    options = parser.parse_args()
    shape = EIGHT_BILLION if options.eight_billion else SMALL
    if options.quick:
        shape, options.batches = {**shape, "num_hidden_layers": 2}, [1]
    rows = Rows(options.out)
    rows.add({**versions(), "gb_per_second": round(copy_bandwidth() / 1e9)})
    with tempfile.TemporaryDirectory() as name:
        os.environ["TRIMTAB_PROGRESS"] = str(Path(name) / "progress.jsonl")  # the terminal is for results
        for form in options.formats:
            for row in rows_of(shape, form, options.variants, options.batches):
                rows.add(row)
            release()
        if (said := Path(name) / "progress.jsonl").is_file():
            for line in dict.fromkeys(json.loads(line)["text"] for line in said.read_text().splitlines()):
                rows.add({"said": line})
    print(json.dumps({"rows": rows.found}))
    return 0


# --------------------------------------------------------------------------------------------- a model without files


def random_model(shape: dict[str, Any], form: str, fuse: bool) -> Any:
    """Returns a Llama on the device, its layers stored in a format and joined as `assemble` joins them."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM, LlamaConfig

    from trimtab.families.llama import LLAMA
    from trimtab.runtime.checkpoint.layer_layout import Layout
    from trimtab.runtime.linear import choice, fused

    rotary = {"rope_type": "default", "rope_theta": 500000.0}
    config = LlamaConfig(**shape, max_position_embeddings=8192, rope_parameters=rotary)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if FORMATS[form]:
        names = [name for name, m in model.base_model.named_modules(prefix="model") if isinstance(m, nn.Linear)]
        for group in fused.groups(names, LLAMA) if fuse else [[name] for name in names]:
            shapes = [tuple(model.get_submodule(name).weight.shape) for name in group]
            stored = [random_layer(Layout(*FORMATS[form]), *sizes) for sizes in shapes]
            if len(group) == 1:
                model.set_submodule(group[0], choice.build(stored[0], None, DEVICE))
            else:
                packed = choice.build(fused.join(stored), None, DEVICE)
                fused.place(model, group, packed, [sizes[0] for sizes in shapes])
    for name, parameter in list(model.named_parameters()):
        tensor = torch.ones(parameter.shape, dtype=torch.bfloat16, device=DEVICE)
        if not name.endswith("norm.weight"):
            tensor.normal_(std=0.02)
        module, _, own = name.rpartition(".")
        setattr(model.get_submodule(module), own, nn.Parameter(tensor, requires_grad=False))
    model.tie_weights()
    model = model.eval().to(DEVICE)
    if fuse:
        fused.fuse_linears(model, LLAMA)
    return model


def random_layer(layout: Any, rows: int, columns: int) -> Any:
    """Returns a layer as ModelOpt stores it, whose weights have a deviation of about 0.02."""
    from trimtab.runtime.checkpoint.layer_layout import Quantized

    storage, given = layout.storage, {}
    if storage.number.packed:
        weight = torch.randint(256, (rows // 2, columns), dtype=torch.uint8, device=DEVICE)
        scale = torch.full((rows, columns // layout.group_size), 0.02 / 5, device=DEVICE)
    elif layout.dtype == torch.int8:
        weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, device=DEVICE)
        scale = torch.full((rows,), 0.02 / 73, device=DEVICE)
    else:
        drawn = torch.empty(rows, columns, device=DEVICE).normal_(std=80)
        weight = drawn.clamp_(-448, 448).to(layout.dtype)  # beyond E4M3's largest there is only NaN
        # No two layers have the same scale, as in an export: what is joined then has one a row.
        scale = (1 + torch.rand(() if layout.algo == "FP8" else (rows,), device=DEVICE)) * 0.02 / 120
    if "input_scale" in layout.scales:
        given["input_scale"] = torch.tensor(0.02 if storage.inputs.numbers == "e4m3" else 0.05, device=DEVICE)
    return Quantized(layout, weight, scale, **given)


# --------------------------------------------------------------------------------------------------------- measuring


@torch.inference_mode()
def rows_of(
    shape: dict[str, Any], form: str, variants: list[str], batches: list[int]
) -> Iterator[dict[str, Any]]:
    """Yields a row a variant and batch, and for the first batch one of kernels and one of products."""
    for variant in variants:
        what = {"engine": "torch", "format": form, "variant": variant}
        log(f"{form}, {variant}")
        model = step = None
        try:
            started = time.perf_counter()
            model = random_model(shape, form, fuse=variant not in ("not fused", "transformers"))
            step = own_step(model, variant)
            ready = round(time.perf_counter() - started, 1)
        except Exception as error:
            yield {**what, "error": describe(error)}
            continue
        for batch in batches:
            row = {**what, "batch": batch, "seconds_to_be_ready": ready}
            decoder = None
            try:
                decoder = decoder_of(model, step, batch)
                row |= timed(decoder, batch)
                row["of_limit"] = round(row["speed"] / speed_limit(model, batch, PROMPT_TOKENS + NEW_TOKENS / 2), 3)
            except Exception as error:  # the others are worth having
                row["error"] = describe(error)
            yield row
            if batch == batches[0] and CUDA and decoder:
                yield {**what, "batch": batch, "kernels": part(lambda: kernels(decoder, batch))}  # noqa: B023
            decoder = None
            release()
        if CUDA and variant == "engine" and step:
            yield {**what, "products": part(lambda: products(model))}  # noqa: B023
        model = step = None
        release()


def own_step(model: Any, variant: str) -> Any:
    """Returns the step that a variant decodes by, None for transformers' forward pass."""
    from trimtab.runtime.decoder import step as steps
    from trimtab.runtime.kernels import replacements
    from trimtab.runtime.linear import elementwise

    if variant == "transformers":
        return None
    replacements.group_queries(model)
    replacements.fuse_norms(model)
    length = PROMPT_TOKENS + NEW_TOKENS
    if variant in ("engine", "not fused"):
        return steps.build(model, length)
    chosen = elementwise.choose(steps.sizes(model), DEVICE) if variant == "library products" else None
    return steps.DecodingStep(model, length, chosen, by_spans=bool(chosen) and CUDA)


def decoder_of(model: Any, step: Any, batch: int) -> Any:
    """Returns the engine's decoder, and on a CPU the one that a GPU would record."""
    from trimtab.runtime.decoder import decode

    sizes = (batch, PROMPT_TOKENS, NEW_TOKENS)
    if CUDA:
        return decode.decoder(model, *sizes, step)
    return decode.Stepping(step, model, *sizes) if step else decode.Static(model, *sizes)


def timed(decoder: Any, batch: int) -> dict[str, Any]:
    prompt = torch.ones(batch, PROMPT_TOKENS, dtype=torch.int64, device=DEVICE)
    taken = []
    for _ in range(1 + REPEATS):
        decoder.prefill(prompt)
        taken.append(seconds_of(lambda: decoder.steps(NEW_TOKENS)))
    seconds = statistics.median(taken[1:]) / NEW_TOKENS
    return {"speed": round(batch / seconds, 1), "milliseconds": round(1000 * seconds, 4), "path": decoder.path}


def part(work: Callable[[], Any]) -> Any:
    """Returns what a part of a row is, or why there is none."""
    try:
        return work()
    except Exception as error:
        return describe(error)


def kernels(decoder: Any, batch: int) -> dict[str, Any]:
    """Returns microseconds and launches a step by kind, and of the twelve kernels that take longest."""
    from torch.profiler import ProfilerActivity, profile

    decoder.prefill(torch.ones(batch, PROMPT_TOKENS, dtype=torch.int64, device=DEVICE))  # its cache was full

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        decoder.steps(PROFILED_STEPS)
        torch.cuda.synchronize()
    single = []
    for event in found.key_averages():
        if microseconds := getattr(event, "self_device_time_total", 0):
            single.append((microseconds / PROFILED_STEPS, event.count / PROFILED_STEPS, event.key))
    kinds: dict[str, list[float]] = {}
    for microseconds, count, name in single:
        kind = next((kind for kind, parts in KINDS.items() if any(p in name.lower() for p in parts)), "small")
        of_kind = kinds.setdefault(kind, [0.0, 0.0])
        of_kind[0] += microseconds
        of_kind[1] += count
    longest = [[round(time, 1), round(count, 1), name[:120]] for time, count, name in sorted(single, reverse=True)[:12]]
    return {"kinds": {kind: [round(x, 1) for x in sums] for kind, sums in kinds.items()}, "longest": longest}


def products(model: Any) -> dict[str, dict[str, float]]:
    """Returns by shape and rows the GB/s of the product, in each block that was tried and the layer's own."""
    from trimtab.runtime.decoder import step as steps
    from trimtab.runtime.linear import small_batch

    found = {}
    for members in small_batch.by_shape(steps.layers(model)):
        layer, weight = members[0][0], members[0][1]["weight"]
        for rows in small_batch.ROWS:
            times = small_batch.measure(members, rows)
            found[f"{layer.out_features} x {layer.in_features}, {getattr(layer, 'kernel', 'bf16')}, {rows} rows"] = {
                "own" if block is None else "x".join(map(str, block)): round(weight.nbytes / seconds / 1e9)
                for block, seconds in times.items()
            }
    return found


if __name__ == "__main__":
    sys.exit(main())
