"""Whether vLLM and the torch engine judge an export alike: the same items and windows scored in both, and their speed.

Run: python benchmarks/vllm_agreement.py --model FOLDER [--text FILE] [--blimp FOLDER] [--quick]

Recovery is the accuracy above chance on BLiMP's pairs, as a share of BF16's in the same engine; the ratio is perplexity
over BF16's. Flips are pairs that the two engines decide differently: their logits are rounded to other 16 bits. vLLM
0.24 reads no INT4 of ModelOpt, so its row of `int4_awq` says that it is refused. A row that fails leaves the others
alone. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import measuring
from gpu import CUDA, describe, release, versions
from measuring import Measuring, short

from trimtab.recipe import Acceptance, Engine, Quantization
from trimtab.runtime import backends
from trimtab.runtime.engine import TorchEngine

FORMATS = ("bf16", "fp8", "int4_awq")
ENGINES = ("torch", "vllm")
GROUP = 64
PROMPT_TOKENS, NEW_TOKENS, REPEATS = (128, 256, 3) if CUDA else (16, 4, 1)
#: Half of the GPU is room enough beside what the torch engine leaves behind in this process.
SETTINGS = {"max_batch_size": 64, "max_seq_len": 1024, "kv_cache_fraction": 0.5}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measuring.add_arguments(parser)
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--quick", action="store_true", help="little text, few pairs, batch 1")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.windows, options.pairs, options.batches = 2, 2, 5, [1]
    found: dict[str, Any] = {"versions": versions() | backends.versions(), "rows": []}
    with tempfile.TemporaryDirectory() as name:
        os.environ["TRIMTAB_PROGRESS"] = str(Path(name) / "progress.jsonl")  # the terminal is for results
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # it logs to stdout
        measure = Measuring(options, Path(name))
        scored: dict[tuple[str, str], dict[str, Any]] = {}
        print(f"{'format':<10}{'engine':<8}{'perplexity':>12}{'BLiMP':>8}{'seconds':>9}  tokens/s at batch", flush=True)
        for form in options.formats:
            try:
                folder = export(form, options.model, measure, Path(name))
            except Exception as error:
                found["rows"].append({"format": form, "error": describe(error)})
                print(f"{form:<10}was not exported: {describe(error)}", flush=True)
                traceback.print_exc()
                continue
            for engine in options.engines:
                row = {"format": form, "engine": engine}
                found["rows"].append(row)
                fill(row, scored, folder, measure, options.batches)
    found["agreement"] = agreement(scored, options.formats)
    for line in found["agreement"]:
        print("  ".join(f"{name} {value}" for name, value in line.items()))
    print(json.dumps(found))
    return 0


def export(form: str, model: Path, measure: Measuring, scratch: Path) -> Path:
    """Writes the export of a format, calibrated on the first seed, and what it needs measured if that is not there."""
    from trimtab.components.calibration import grams
    from trimtab.components.calibration.work import calibrate
    from trimtab.components.quantization.work import quantize

    settings = Quantization(format=form, group_size=GROUP)
    calibration, gram, folder = (scratch / part for part in ("calibration", "gram", f"export-{form}"))
    if settings.needs_statistics and not calibration.is_dir():
        calibration.mkdir()
        calibrate(str(model), str(calibration), "", measure.calibration(measure.options.first_seed))
    if settings.needs_grams and not gram.is_dir():
        gram.mkdir()
        grams.measure(str(model), str(calibration), str(gram), "", {})
    folder.mkdir()
    quantize(
        str(model),
        str(calibration) if settings.needs_statistics else None,
        str(gram) if settings.needs_grams else None,
        None,
        str(folder),
        str(scratch / f"scratch-{form}"),
        settings.model_dump(mode="json"),
    )
    return folder


def fill(
    row: dict[str, Any],
    scored: dict[tuple[str, str], dict[str, Any]],
    folder: Path,
    measure: Measuring,
    batches: list[int],
) -> None:
    """Adds to a row what its engine scores and how fast it is, or why it does not, and prints it."""
    started = time.perf_counter()
    engine = None
    row["speed"] = {}
    try:
        engine = open_engine(row["engine"], folder)
        row["kernels"] = sorted({kernel["kernel"] for kernel in engine.kernels().values()})
        row["device_gb"] = round(engine.device_bytes / 1e9, 2)
        found = measure.score(engine)
        scored[row["format"], row["engine"]] = found
        row |= short(found)
        for batch in batches:
            speeds = engine.decode_speed(batch, PROMPT_TOKENS, NEW_TOKENS, REPEATS)
            row["speed"][str(batch)] = round(statistics.median(speeds), 1)
    except Exception as error:
        row["error"] = describe(error)
        traceback.print_exc()
    finally:
        row["seconds"] = round(time.perf_counter() - started, 1)
        if engine is not None:
            engine.close()
        engine = None
        release()
    figures = f"{row.get('perplexity', float('nan')):>12.3f}{row.get('blimp', float('nan')):>8.4f}"
    speed = "  ".join(f"{batch}: {tokens:,.0f}" for batch, tokens in row["speed"].items())
    told = f"{row['format']:<10}{row['engine']:<8}{figures}{row['seconds']:>9.1f}  {speed}"
    print(told, row.get("error", ""), flush=True)


def open_engine(name: str, folder: Path) -> Any:
    settings = Engine(backend=name, **SETTINGS)
    backends.check(settings)
    if name == "torch":
        return TorchEngine(folder, settings)
    from trimtab.runtime.vllm import VllmEngine

    return VllmEngine(folder, settings)


def agreement(scored: dict[tuple[str, str], dict[str, Any]], formats: list[str]) -> list[dict[str, Any]]:
    """Sets what both engines say of a format side by side: torch first, vLLM second.

    They agree when both stand on the same side of the limits that a recipe has by default.
    """
    lines = []
    for form in formats:
        pair = [scored.get((form, engine)) for engine in ENGINES]
        if not all(pair):
            continue
        line: dict[str, Any] = {"format": form, "perplexity": [round(found["perplexity"], 3) for found in pair]}
        sides = [[], []]
        plain = [scored.get(("bf16", engine)) for engine in ENGINES]
        if "right" in pair[0]:
            line["blimp"] = [round(statistics.fmean(found["right"]), 4) for found in pair]
            line["pairs"] = len(pair[0]["right"])
            line["flips"] = sum(a != b for a, b in zip(*(found["right"] for found in pair), strict=True))
        if all(plain):
            line["perplexity_ratio"] = [
                round(a["perplexity"] / b["perplexity"], 4) for a, b in zip(pair, plain, strict=True)
            ]
            for side, ratio in zip(sides, line["perplexity_ratio"], strict=True):
                side.append(ratio <= Acceptance().max_perplexity_ratio)
        if all(plain) and "right" in pair[0]:
            line["recovery"] = [recovery(a["right"], b["right"]) for a, b in zip(pair, plain, strict=True)]
            for side, kept in zip(sides, line["recovery"], strict=True):
                side.append(kept is None or kept >= Acceptance().min_recovery)
        if sides[0]:
            line["agree"] = sides[0] == sides[1]
        lines.append(line)
    return lines


def recovery(right: list[float], plain: list[float]) -> float | None:
    """Returns accuracy above chance over BF16's, None where BF16 has none."""
    above = statistics.fmean(plain) - 0.5
    return round((statistics.fmean(right) - 0.5) / above, 4) if above > 0 else None


if __name__ == "__main__":
    sys.exit(main())
