"""Everything that needs a GPU, in one run: quantize to each format there, check, load, generate, and time.

Run: python benchmarks/gpu.py --model FOLDER --out FOLDER [--sizes small 8b] [--formats NAME ...] [--quick]

Writes gpu.json and gpu.md into the output folder after every row, so that a run that is cut off has left what it
found; the last line is the same JSON without the texts. What fails is a row that says why. Without --model a random
model in the shape of SmolLM2-135M stands in: its speed is that model's, its perplexity means nothing.

Speeds are medians over rounds in which BF16 and the format take turns. A product's time is that of a CUDA graph over
as many copies of the layer as outgrow the cache. On a CPU what needs CUDA is left out.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import gc
import importlib.metadata
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
PROMPTS = ("The capital of France is", "Once upon a time, in a small village by the sea,")
ROUNDS, PROMPT_TOKENS, NEW_TOKENS = 3, 32, 48
#: An emulated layer is unpacked for each token; a few tokens show that.
EMULATED_NEW_TOKENS = 8
#: Formats in the order of what is missed most if time runs out.
FORMATS = (
    "fp8", "int4_awq", "int8_sq", "fp8_per_channel", "int8_wo", "int4_gptq", "mixed", "int4_rtn",
    "nvfp4", "w4a8_awq", "mxfp4",
)  # fmt: skip
QUICK = ["fp8", "int8_sq", "int4_awq"]
SIZES = ("small", "8b")
#: Formats that need Gram matrices, 32 GB of them for 32 blocks of 8B.
NEED_GRAMS = ("int4_gptq", "mixed")
SMALL = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
         "num_key_value_heads": 3, "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip
EIGHT_BILLION = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
                 "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False}  # fmt: skip
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024)
SHAPES = ((4096, 4096), (14336, 4096))
#: Bytes of weights that one timed replay reads: more than twice the L2 cache of an H200.
COLD_BYTES = 160 << 20


class Results:
    """What was found so far, written anew whenever something is added."""

    def __init__(self, folder: Path, minutes: float):
        self.folder, self.started, self.seconds = folder, time.perf_counter(), 60 * minutes
        self.found: dict[str, Any] = {"versions": versions(), "models": [], "products": [], "failures": []}
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds until the run should end."""
        return self.started + self.seconds - time.perf_counter()

    def write(self) -> None:
        self.found["seconds"] = round(time.perf_counter() - self.started)
        (self.folder / "gpu.json").write_text(json.dumps(self.found, indent=1), encoding="utf-8")
        try:
            (self.folder / "gpu.md").write_text(markdown(self.found), encoding="utf-8")
        except (KeyError, IndexError, TypeError, ValueError):  # the figures are safe in gpu.json
            traceback.print_exc()

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Runs a part whose failure leaves the others alone."""
        log(name)
        try:
            yield
        except Exception as error:
            self.found["failures"].append({"part": name, "error": describe(error)})
            traceback.print_exc()
        self.write()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a small Hugging Face folder; a random one without it")
    parser.add_argument("--out", type=Path, required=True, help="folder for gpu.json and gpu.md")
    parser.add_argument("--text", default="builtin", help="file to measure perplexity on")
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=SIZES[:1], help="8b: random weights")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--quick", action="store_true", help="three formats of the small model, batches 1 and 8")
    parser.add_argument("--minutes", type=float, default=8, help="what is not begun by then is left out")
    parser.add_argument("--scratch", type=Path, help="folder with 30 GB of room for 8B; /dev/shm where it has them")
    options = parser.parse_args()
    if options.quick:
        options.sizes, options.formats = ["small"], QUICK
    results = Results(options.out, options.minutes)
    with tempfile.TemporaryDirectory(dir=options.scratch or roomy("8b" in options.sizes)) as name:
        scratch = Path(name)
        os.environ["TRIMTAB_PROGRESS"] = str(scratch / "progress.jsonl")  # the terminal is for results
        if CUDA:
            with results.part("products"):
                time_products(results, (1, 64, 1024) if options.quick else ROWS)
        if "small" in options.sizes:
            with results.part("small model"):
                folder = options.model or random_model(scratch / "model", SMALL)
                title = folder.name if options.model else "random, in the shape of SmolLM2-135M"
                run_model(results, title, folder, scratch, options, small=True)
        if "8b" in options.sizes:
            with results.part("8B"):
                folder = random_model(scratch / "8b", EIGHT_BILLION)
                run_model(results, "random, in the shape of Llama 3 8B", folder, scratch, options, small=False)
    results.write()
    brief = copy.deepcopy(results.found)
    for model in brief["models"]:
        for row in model["rows"]:
            row.pop("texts", None)
    print(json.dumps(brief))
    return 0


def versions() -> dict[str, str]:
    """The machine and the libraries that the figures depend on."""
    found = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "cuda": str(torch.version.cuda)}
    found["card"] = torch.cuda.get_device_name() if CUDA else "none (CPU)"
    for package in ("transformers", "nvidia-modelopt"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "missing"
    return found


def roomy(large: bool) -> str | None:
    """Memory is the fastest disk, if it has room for a model of 16 GB and its export."""
    memory = Path("/dev/shm")
    return str(memory) if large and memory.is_dir() and shutil.disk_usage(memory).free > 40 << 30 else None


def log(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip()}"[:300]


def synchronize() -> None:
    if CUDA:
        torch.cuda.synchronize()


def seconds_of(work: Callable[[], object]) -> float:
    synchronize()
    started = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - started


@contextmanager
def peak(row: dict[str, Any], name: str) -> Iterator[None]:
    """Notes the GiB of GPU memory that the body took at most, beside what was held before it."""
    if not CUDA:
        yield
        return
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    row[name] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)


def release() -> None:
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------ a random model


@torch.inference_mode()
def random_model(folder: Path, shape: dict[str, Any]) -> Path:
    """Writes a Llama with random weights, a shard a block, and a tokenizer of bytes."""
    from accelerate import init_empty_weights
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder.mkdir()
    config = LlamaConfig(
        **shape, max_position_embeddings=8192, rope_theta=500000.0, bos_token_id=0, eos_token_id=1,
        architectures=["LlamaForCausalLM"], dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(folder)
    with init_empty_weights():
        empty = LlamaForCausalLM(config)
    tied = {"lm_head.weight"} if config.tie_word_embeddings else set()
    shapes = {name: tensor.shape for name, tensor in empty.named_parameters() if name not in tied}
    shards: dict[str, list[str]] = {}
    for name in shapes:
        block = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{block}.safetensors", []).append(name)
    generator = torch.Generator(DEVICE).manual_seed(0)
    for file, names in shards.items():
        tensors = {}
        for name in names:
            made = torch.ones(shapes[name], dtype=torch.bfloat16, device=DEVICE)
            if not name.endswith("norm.weight"):
                made.normal_(std=0.02, generator=generator)
            tensors[name] = made.cpu()
        save_file(tensors, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    alphabet = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------------------------- one model


def run_model(
    results: Results, title: str, folder: Path, scratch: Path, options: argparse.Namespace, small: bool
) -> None:
    """Calibrates a model, and measures it in BF16 and in every format."""
    from trimtab.recipe import Engine
    from trimtab.runtime.engine import TorchEngine

    model: dict[str, Any] = {"title": title, "rows": []}
    results.found["models"].append(model)
    trees = {}
    with results.part(f"calibrate, {title}"):
        trees = calibrate(folder, scratch / f"{folder.name}-trees", model, small, options.quick)
    settings = Engine(max_batch_size=64, max_seq_len=1024)
    batches = (1, 8) if options.quick else (1, 8, 64)
    row: dict[str, Any] = {"format": "bf16"}
    model["rows"].append(row)
    baseline = None
    with results.part(f"bf16, {title}"), peak(row, "serve_gib"):
        baseline = TorchEngine(folder, settings, str(DEVICE))
        measure(row, baseline, None, batches, options.text if small else None)
        row["loop_speed"] = round(loop_speed(baseline))
    formats = [name for name in options.formats if small or name not in NEED_GRAMS]
    if not small:
        model["left_out"] = f"{', '.join(NEED_GRAMS)}: their Gram matrices take 32 GB"
    longest = 0.0
    for name in formats:
        row = {"format": name}
        model["rows"].append(row)
        if results.left < longest:
            row["error"] = "left out: no time"
            continue
        started = time.perf_counter()
        log(f"{name}, {title}")
        try:
            run_format(row, name, folder, trees, scratch, baseline, settings, batches, options, small)
        except Exception as error:
            row["error"] = describe(error)
            traceback.print_exc()
        release()
        row["seconds"] = round(time.perf_counter() - started, 1)
        longest = max(longest, row["seconds"])
        results.write()
    del baseline
    release()


def calibrate(folder: Path, trees: Path, model: dict[str, Any], small: bool, quick: bool) -> dict[str, str]:
    """Measures statistics, for a small model Gram matrices and sensitivity too, and what they cost."""
    from trimtab.components.calibration import data, grams, work
    from trimtab.recipe import Calibration
    from trimtab.runtime import checkpoint, measurements

    found = {name: str(trees / name) for name in ("calibration", "gram", "sensitivity")}
    for path in found.values():
        Path(path).mkdir(parents=True)
    loaded, tokenizer = checkpoint.load_for_measuring(folder)
    settings = Calibration(samples=8, length=512) if CUDA else Calibration(samples=4, length=64)
    tokens = data.draw(settings, tokenizer).tokens
    seen: dict[str, torch.Tensor] = {}
    times: dict[str, list[float]] = {"forward": [], "statistics": []}
    for _ in range(3):
        times["forward"].append(seconds_of(lambda: bare_pass(loaded, tokens)))
        times["statistics"].append(seconds_of(lambda: seen.update(work.statistics(loaded, tokens))))
    model["tokens"] = tokens.numel()
    model |= {f"{name}_seconds": round(min(taken), 4) for name, taken in times.items()}
    model["statistics_over_forward"] = round(min(times["statistics"]) / min(times["forward"]), 2)
    loaded = None
    release()
    measurements.write(Path(found["calibration"]), folder, "statistics", seen)
    save_file({"tokens": tokens.int()}, Path(found["calibration"]) / "tokens.safetensors")
    if small and not quick:
        from trimtab.components.quantization import sensitivity
        from trimtab.recipe import MIXED_FORMATS

        arguments = (str(folder), found["calibration"])
        taken = seconds_of(lambda: grams.measure(*arguments, found["gram"], "", {}))
        model["gram_seconds"] = round(taken, 1)
        scored = {"formats": list(MIXED_FORMATS), "group_size": 64}
        taken = seconds_of(lambda: sensitivity.measure(*arguments, found["sensitivity"], "", scored))
        model["sensitivity_seconds"] = round(taken, 1)
    return found


@torch.inference_mode()
def bare_pass(model: torch.nn.Module, tokens: torch.Tensor) -> None:
    from trimtab.runtime import observe

    for windows in observe.batches(model, tokens):
        model(windows, use_cache=False, logits_to_keep=1)


def run_format(
    row: dict[str, Any],
    name: str,
    folder: Path,
    trees: dict[str, str],
    scratch: Path,
    baseline: Any,
    settings: Any,
    batches: tuple[int, ...],
    options: argparse.Namespace,
    small: bool,
) -> None:
    """Fills the row of one format: quantized, checked, loaded and measured."""
    from trimtab.components.quantization import work
    from trimtab.runtime.checkpoint import weight_file_bytes
    from trimtab.runtime.engine import TorchEngine

    if not trees:
        raise RuntimeError("calibration failed")
    parameters = {"format": name, "group_size": 64} | ({"effective_bits": 5.0} if name == "mixed" else {})
    export = scratch / f"export-{name}"
    export.mkdir()
    gram, harms = (trees["gram"], trees["sensitivity"]) if name in NEED_GRAMS else (None, None)
    inputs = (str(folder), trees["calibration"], gram, harms)
    try:
        with peak(row, "quantize_gib"):
            made = scratch / f"scratch-{name}"
            taken = seconds_of(lambda: work.quantize(*inputs, str(export), str(made), parameters))
        row["quantize_seconds"] = round(taken, 1)
        row["gb"] = round(weight_file_bytes(export) / 1e9, 3)
        if small:  # reading 16 GB again takes longer than all the rest
            row |= check(export, folder, scratch, parameters)
        with peak(row, "serve_gib"):
            engine = TorchEngine(export, settings, str(DEVICE))
            measure(row, engine, baseline, batches, options.text if small else None)
    finally:
        shutil.rmtree(export)


def check(export: Path, folder: Path, scratch: Path, parameters: dict[str, Any]) -> dict[str, Any]:
    """Compares every layer of the export with its source."""
    from trimtab.components.validation import integrity

    started = time.perf_counter()
    worst = integrity.inspect(str(export), str(folder), str(scratch), "", parameters)["max_relative_error"]
    return {"largest_layer_error": round(worst, 4), "check_seconds": round(time.perf_counter() - started, 1)}


def measure(row: dict[str, Any], engine: Any, baseline: Any, batches: tuple[int, ...], text: str | None) -> None:
    """Adds kernels, size, continuations, perplexity and speed of an engine to its row."""
    kernels = engine.kernels().values()
    row["kernels"] = sorted({kernel["kernel"] for kernel in kernels})
    row["emulated"] = sum(kernel["emulated"] for kernel in kernels)
    row["layers"] = len(kernels)
    row["weight_gb"] = round(engine.weight_bytes / 1e9, 3)
    slow = 2 * row["emulated"] > row["layers"]
    prompts = [engine.tokenizer(prompt, add_special_tokens=False).input_ids for prompt in PROMPTS]
    answers = engine.generate(prompts, max_new_tokens=8 if slow else 24)
    row["tokens_generated"] = [len(answer) for answer in answers]
    if text:
        row["texts"] = [engine.tokenizer.decode(answer) for answer in answers]
        row["perplexity"] = round(perplexity(engine, text), 3)
    new_tokens = EMULATED_NEW_TOKENS if slow or not CUDA else NEW_TOKENS
    row["speed"], row["over_bf16"], row["of_limit"] = {}, {}, {}
    for batch in batches[:1] if slow and not text else batches:
        own, ratios = [], []
        for _ in range(1 if slow and not text else ROUNDS):
            reference = baseline.decode_speed(batch, PROMPT_TOKENS, new_tokens, 1)[0] if baseline else math.nan
            own += engine.decode_speed(batch, PROMPT_TOKENS, new_tokens, 1)
            ratios.append(own[-1] / reference)
        row["speed"][str(batch)] = round(statistics.median(own), 1)
        limit = speed_limit(engine.model, batch, PROMPT_TOKENS + new_tokens / 2)
        row["of_limit"][str(batch)] = round(row["speed"][str(batch)] / limit, 3)
        if baseline:
            row["over_bf16"][str(batch)] = round(statistics.median(ratios), 3)
        row["decode_path"] = engine.decode_path


def speed_limit(model: Any, batch: int, tokens: float) -> float:
    """Tokens a second if a step took as long as reading, once, what it must: the weights, and keys and values.

    The torch engine holds these in 16 bits. Of an embedding that is not the head too, a step reads a row.
    """
    from trimtab.runtime.paged import attention_layers

    embedding = model.get_input_embeddings().weight
    read = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    if embedding is not model.get_output_embeddings().weight:
        read -= embedding.nbytes
    keys_and_values = sum(2 * 2 * module.k_proj.out_features for module in attention_layers(model))
    return batch * copy_bandwidth() / (read + batch * tokens * keys_and_values)


@functools.cache
def copy_bandwidth() -> float:
    """Bytes a second that a copy reads and writes, the best of several."""
    source = torch.zeros((2 << 30) if CUDA else (64 << 20), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds_of(lambda: target.copy_(source)) for _ in range(8))


def perplexity(engine: Any, source: str) -> float:
    from trimtab.runtime import text

    content = text.read_text(source, ("trimtab.components.validation.suite", "heldout.txt"), field="--text")
    windows = text.windows(engine.tokenizer, content, 256 if CUDA else 64, 16 if CUDA else 4)
    return math.exp(sum(engine.nll(windows)) / (windows.shape[0] * (windows.shape[1] - 1)))


@torch.inference_mode()
def loop_speed(engine: Any) -> float:
    """Tokens a second at batch 1 where Python launches every kernel: what replaying saves."""
    from trimtab.runtime.decode import Growing

    decoder, new_tokens = Growing(engine.model), NEW_TOKENS if CUDA else EMULATED_NEW_TOKENS
    prompt = torch.zeros(1, PROMPT_TOKENS, dtype=torch.int64, device=DEVICE)
    taken = []
    for _ in range(2):
        decoder.prefill(prompt)
        taken.append(seconds_of(lambda: decoder.steps(new_tokens)))
    return new_tokens / min(taken)


# ---------------------------------------------------------------------------------------------- single products


@torch.inference_mode()
def time_products(results: Results, rows: tuple[int, ...]) -> None:
    """Times one layer in every kernel, packed and dense, by the number of rows: where `packed_rows` come from."""
    for out_features, in_features in SHAPES:
        lines = {"bf16": lambda: dense_layer(out_features, in_features)}  # noqa: B023, called in this turn
        for kind, path in (
            ("Int4WeightOnlyCuda", "packed"), ("Int4WeightOnlyCuda", "dense"), ("Int8WeightOnlyCuda", "packed"),
            ("Int8WeightOnlyCuda", "dense"), ("Fp8", "dense"), ("Fp8PerToken", "dense"), ("Int8Static", "dense"),
        ):  # fmt: skip
            lines[f"{kind}.{path}"] = lambda k=kind, p=path: packed_layer(k, p, out_features, in_features)  # noqa: B023
        for name, make in lines.items():
            line: dict[str, Any] = {"shape": f"{out_features} x {in_features}", "product": name, "microseconds": {}}
            results.found["products"].append(line)
            try:
                products = make()
                for count in rows:
                    x = torch.randn(count, in_features, device=DEVICE, dtype=torch.bfloat16)
                    line["microseconds"][str(count)] = round(microseconds(products, x), 1)
            except Exception as error:
                line["error"] = describe(error)
            products = None
            release()


def dense_layer(out_features: int, in_features: int) -> list[Callable]:
    size = 2 * out_features * in_features
    weights = [
        torch.randn(out_features, in_features, device=DEVICE, dtype=torch.bfloat16)
        for _ in range(math.ceil(COLD_BYTES / size))
    ]
    return [lambda x, w=w: torch.nn.functional.linear(x, w) for w in weights]


def packed_layer(kind: str, path: str, out_features: int, in_features: int) -> list[Callable]:
    """The products of copies of a layer whose numbers are drawn at random."""
    from trimtab.runtime import linear
    from trimtab.runtime.formats import Layout, Quantized

    algo = {"Int4WeightOnlyCuda": "W4A16_AWQ", "Int8WeightOnlyCuda": "W8A16", "Fp8": "FP8",
            "Fp8PerToken": "FP8_PER_CHANNEL_PER_TOKEN", "Int8Static": "W8A8_SQ_PER_CHANNEL"}[kind]  # fmt: skip
    scale = torch.full((out_features,), 0.01, device=DEVICE)
    given = torch.tensor(0.03, device=DEVICE)
    if algo == "W4A16_AWQ":
        weight = torch.randint(256, (out_features // 2, in_features), dtype=torch.uint8, device=DEVICE)
        layer = Quantized(Layout(algo, 128), weight, scale[:, None].expand(-1, in_features // 128).contiguous())
    else:
        weight = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8, device=DEVICE)
        if "FP8" in algo:
            weight = (weight.bfloat16() / 32).to(torch.float8_e4m3fn)
        layer = Quantized(Layout(algo), weight, scale[0] if algo == "FP8" else scale, given)
    first = getattr(linear, kind)(layer, None)
    size = out_features * in_features // (2 if algo == "W4A16_AWQ" else 1)
    modules = [first, *(copy.deepcopy(first) for _ in range(math.ceil(COLD_BYTES / size) - 1))]
    return [getattr(module, path) for module in modules]


def microseconds(products: list[Callable], x: torch.Tensor) -> float:
    """Returns the time of one product: the median of replays in which every copy of the layer takes its turn."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(2):
            products[0](x)
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for product in products:
            product(x)
    graph.replay()
    taken = []
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end))
    return 1000 * statistics.median(taken) / len(products)


# --------------------------------------------------------------------------------------------------- the report


def markdown(found: dict[str, Any]) -> str:
    """The results as they are committed under benchmarks/results/."""
    known = found["versions"]
    lines = [
        f"# On {known['card']}",
        "",
        f"{known['date']}, PyTorch {known['torch']}, CUDA {known['cuda']}, transformers {known['transformers']}, "
        f"ModelOpt {known['nvidia-modelopt']}; printed by `python benchmarks/gpu.py`.",
    ]
    for model in found["models"]:
        lines += ["", *model_lines(model)]
    for shape in dict.fromkeys(line["shape"] for line in found["products"]):
        lines += ["", *product_lines(shape, [line for line in found["products"] if line["shape"] == shape])]
    lines += ["", *(f"Failed: {failure['part']}: {failure['error']}" for failure in found["failures"])]
    return "\n".join(lines).rstrip() + "\n"


def model_lines(model: dict[str, Any]) -> list[str]:
    lines = [f"## {model['title']}", ""]
    if "statistics_over_forward" in model:
        lines += [
            f"Calibration reads {model['tokens']:,} tokens: {model['statistics_seconds']:.3g} s with statistics, "
            f"{model['statistics_over_forward']:.2f} times a bare forward pass."
            + "".join(
                f" {what}: {model[key]} s."
                for what, key in (("Gram matrices", "gram_seconds"), ("Sensitivity", "sensitivity_seconds"))
                if key in model
            ),
            "",
        ]
    first = model["rows"][0] if model["rows"] else {}
    if "loop_speed" in first:
        speed = f"{first['loop_speed']} tokens/s in a Python loop at batch 1; below: {first.get('decode_path')}"
        lines += [f"BF16 decodes {speed}. GiB are of the GPU at most, beside the baseline held there. "
                  "In brackets: times BF16's speed, and the share of what the memory's bandwidth allows.", ""]
    batches = list(dict.fromkeys(batch for row in model["rows"] for batch in row.get("speed", {})))
    header = ["format", "kernel", "emulated", "GB", *(f"tokens/s, batch {batch}" for batch in batches), "perplexity",
              "largest layer error", "quantize s", "quantize GiB", "serve GiB"]  # fmt: skip
    lines += [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for row in model["rows"]:
        if "error" in row:
            lines.append(f"| {row['format']} | {row['error'].replace('|', '/').replace(chr(10), ' ')} |")
            continue
        cells = [row["format"], ", ".join(row.get("kernels", [])) or "dense", f"{row.get('emulated', 0)} of "
                 f"{row.get('layers', 0)}", row.get("weight_gb", "")]  # fmt: skip
        for batch in batches:
            ratio = row.get("over_bf16", {}).get(batch)
            speed = row.get("speed", {}).get(batch)
            share = row.get("of_limit", {}).get(batch)
            notes = ", ".join([f"{ratio:.2f}x"] * bool(ratio) + [f"{share:.0%}"] * bool(share))
            cells.append("" if speed is None else f"{speed:,.0f}" + f" ({notes})" * bool(notes))
        names = ("perplexity", "largest_layer_error", "quantize_seconds", "quantize_gib", "serve_gib")
        lines.append(f"| {' | '.join(str(cell) for cell in [*cells, *(row.get(name, '') for name in names)])} |")
    if "left_out" in model:
        lines += ["", f"Left out: {model['left_out']}."]
    return lines


def product_lines(shape: str, products: list[dict[str, Any]]) -> list[str]:
    rows = list(dict.fromkeys(count for line in products for count in line["microseconds"]))
    lines = [f"## One layer of {shape}, microseconds a product by rows", ""]
    lines += [f"| product | {' | '.join(rows)} |", "|---" * (len(rows) + 1) + "|"]
    for line in products:
        times = [str(line["microseconds"].get(count, "")) for count in rows]
        lines.append(f"| {line['product']} | {line['error'] if 'error' in line else ' | '.join(times)} |")
    return lines


if __name__ == "__main__":
    sys.exit(main())
