"""Whether vLLM and the torch engine judge an export alike, and which is right where they differ.

Run: python benchmarks/vllm_agreement.py --model FOLDER [--clothes NAME] [--text FILE] [--blimp FOLDER]
         [--formats NAME ...] [--engines NAME ...] [--out FILE] [--quick]

Both engines and a reference answer the same windows, pairs of BLiMP and next tokens. The reference computes in float32
with the export's own numbers: weights dequantised, inputs rounded where the format rounds them. The verdict is the
pipeline's, against BF16 in the same engine. A decision on which the engines differ (the likelier sentence of a pair;
whether a token is the likeliest) is the right one's that decides as the reference does.

With --clothes the model, a Llama, is first written as one of another family (`benchmarks.clothes`): as a Mixtral or a
Qwen2-MoE it has experts with real weights. vLLM gives the inputs of all experts of a block the largest of their FP8
scales, where the torch engine and the reference give each its own.

Every engine runs in a process of its own. Rows are printed, and added to --out as JSON lines, as soon as they are
found; one that fails says why and leaves the others alone.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import apart
import clothes
import measuring
import torch
from machine import DEVICE, versions
from measuring import Measuring

from trimtab import judge
from trimtab.judge import Scores
from trimtab.recipe import Acceptance, Engine, Quantization
from trimtab.runtime.checkpoint import compressed_tensors, few_bits, layer_layout, skeleton
from trimtab.runtime.checkpoint.model_files import Export, load_tokenizer
from trimtab.runtime.engines import backends
from trimtab.runtime.engines.torch_engine import TorchEngine

FORMATS = ("bf16", "fp8", "int4_awq", "int4_gptq")
ENGINES = ("torch", "vllm", "reference")
GROUP = 64
#: A fifth of the GPU is more than enough for a small model, and is free as soon as another engine's process has ended.
SETTINGS = {"max_batch_size": 64, "max_seq_len": 1024, "kv_cache_fraction": 0.2}
#: Tokens of each window whose likelihood is asked one at a time.
NEXT_TOKENS = 16
#: Tokens of a batch of the reference, whose logits are float32.
_BATCH_TOKENS = 8192


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measuring.add_arguments(parser)
    parser.add_argument("--clothes", choices=clothes.CLOTHES, help="the family that the model is written as")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, default=list(FORMATS[:3]))
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=list(ENGINES))
    parser.add_argument("--out", type=Path, help="a file of JSON lines, which is added to")
    parser.add_argument("--quick", action="store_true", help="little text, few pairs")
    options = parser.parse_args()
    if options.quick:
        options.samples, options.windows, options.pairs = 2, 2, 5
    apart.tell({"versions": versions() | backends.versions()}, options.out)
    with tempfile.TemporaryDirectory() as scratch:
        if options.clothes:
            options.model = clothes.write(options.model, Path(scratch) / "source", options.clothes)
        set_side_by_side(options, Path(scratch))
    return 0


def set_side_by_side(options: argparse.Namespace, scratch: Path) -> None:
    """Exports each format, lets each engine answer, and sets the answers side by side."""
    asked = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    answers: dict[tuple[str, str], dict[str, Any]] = {}
    for form in options.formats:
        made = apart.call("vllm_agreement:export", form=form, scratch=str(scratch), options=asked)
        if "error" in made:
            apart.tell({"format": form, **made}, options.out)
            continue
        read = {name: made[name] for name in ("folder", "checkpoint")}
        for engine in options.engines:
            found = apart.call("vllm_agreement:answer", engine=engine, **read, options=asked)
            if "error" not in found:
                answers[form, engine] = found
            kept = ("error", "kernels", "device_gb", "perplexity", "blimp", "seconds")
            row = {"format": form, "engine": engine} | {name: found[name] for name in kept if name in found}
            if form != "bf16" and "error" not in found and ("bf16", engine) in answers:
                row["verdict"] = verdict_on(answers["bf16", engine], found)
            apart.tell(row, options.out)
        plain = {} if form == "bf16" else {e: answers["bf16", e] for e in ENGINES if ("bf16", e) in answers}
        found = {e: answers[form, e] for e in ENGINES if (form, e) in answers}
        apart.tell({"format": form, "agreement": compare(found, plain)}, options.out)


def export(form: str, scratch: str, options: dict[str, Any]) -> dict[str, Any]:
    """Writes the export of a format, calibrated on the first seed, and what vLLM reads if it does not read that."""
    from trimtab.components.calibration.work import calibrate
    from trimtab.components.quantization.work import quantize

    settings = Quantization(format=form, group_size=GROUP)
    measure = _measure(options, Path(scratch))
    model = options["model"]
    calibration, folder, checkpoint = (
        Path(scratch) / part for part in ("calibration", f"export-{form}", f"checkpoint-{form}")
    )
    if settings.needs_statistics and not calibration.is_dir():
        calibration.mkdir()
        calibrate(model, str(calibration), "", measure.calibration(options["first_seed"]))
    folder.mkdir()
    quantize(
        model,
        str(calibration) if settings.needs_statistics else None,
        None,
        str(folder),
        str(Path(scratch) / f"scratch-{form}"),
        settings.model_dump(mode="json"),
    )
    if not compressed_tensors.is_needed(folder):
        return {"folder": str(folder), "checkpoint": None}
    compressed_tensors.translate(folder, checkpoint, Path(scratch) / f"shards-{form}")
    return {"folder": str(folder), "checkpoint": str(checkpoint)}


def answer(engine: str, folder: str, checkpoint: str | None, options: dict[str, Any]) -> dict[str, Any]:
    """Returns what an engine says of each window, sentence and next token, with a summary."""
    served = open_engine(engine, Path(folder), checkpoint)
    with tempfile.TemporaryDirectory() as scratch:
        measure = _measure(options, Path(scratch))
    windows = measure.windows(served)
    found: dict[str, Any] = {
        "kernels": sorted({kernel["kernel"] for kernel in served.kernels().values()}),
        "device_gb": round(served.device_bytes / 1e9, 2),
        "nll": served.nll(windows),
        "tokens": windows.shape[1] - 1,
        "sentences": measure.likelihoods(served) if measure.sentences else [],
    }
    places = torch.linspace(1, windows.shape[1] - 1, NEXT_TOKENS).long().tolist()
    requests = [(window[:place], [window[place]]) for window in windows.tolist() for place in places]
    found["next"], found["likeliest"] = map(list, zip(*served.loglikelihood(requests), strict=True))
    found["perplexity"] = torch.tensor(found["nll"]).sum().div(found["tokens"] * len(windows)).exp().item()
    if found["sentences"]:
        found["blimp"] = statistics.fmean(decisions(found))
    served.close()
    return found


def open_engine(name: str, folder: Path, checkpoint: str | None) -> Any:
    if name == "reference":
        return Reference(folder)
    settings = Engine(backend=name, **SETTINGS)
    backends.check(settings)
    if name == "torch":
        return TorchEngine(folder, settings)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # this process ends anyway, and takes all with it
    from trimtab.runtime.engines.vllm_engine import VllmEngine

    return VllmEngine(folder, settings, Path(checkpoint) if checkpoint else None)


def _measure(options: dict[str, Any], folder: Path) -> Measuring:
    paths = {name: Path(options[name]) for name in ("text", "blimp") if options[name]}
    return Measuring(argparse.Namespace(**(options | paths)), folder)


class Reference:
    """The numbers of an export in float32, without an engine's kernels and roundings."""

    device_bytes = 0

    def __init__(self, folder: Path):
        export = Export(folder)
        model = skeleton.skeleton(folder, torch.float32)
        own = {f"{layer}.{part}" for layer in export.layers for part in ("weight", *layer_layout.SCALES)}
        for name in export.names:
            if name not in own:
                skeleton.put(model, name, export.tensor(name).float())
        for name in export.layers:
            layer = export.layer(name)
            skeleton.put(model, f"{name}.weight", layer_layout.dequantize(layer))
            if layer.layout.storage.inputs:
                scale = layer.input_scale.float().to(DEVICE)  # FP8 with one scale: the only one among the formats here
                model.get_submodule(name).register_forward_pre_hook(
                    lambda _, given, scale=scale: (few_bits.round_to("e4m3", given[0], scale),)
                )
        model.tie_weights()
        self._model, self.tokenizer = model.eval().to(DEVICE), load_tokenizer(folder)

    def kernels(self) -> dict[str, dict[str, Any]]:
        return {"": {"kernel": "float32"}}

    @torch.inference_mode()
    def loglikelihood(self, requests: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: sum(map(len, requests[i])))
        while order:
            longest = sum(map(len, requests[order[-1]]))
            some = [order.pop() for _ in range(min(len(order), max(1, _BATCH_TOKENS // longest)))]
            batch = torch.zeros(len(some), longest, dtype=torch.int64)
            for row, i in zip(batch, some, strict=True):  # what is filled up stands behind, where nothing looks at it
                tokens = [*requests[i][0], *requests[i][1]]
                row[: len(tokens)] = torch.tensor(tokens)
            rows = self._model(batch.to(DEVICE), use_cache=False).logits.log_softmax(-1)
            for row, i in zip(rows, some, strict=True):
                context, continuation = requests[i]
                own = row[len(context) - 1 : len(context) - 1 + len(continuation)]
                wanted = torch.tensor(continuation, device=own.device)
                likelihood = own.gather(1, wanted[:, None]).sum().item()
                found[i] = likelihood, bool((own.argmax(-1) == wanted).all())
        return found

    def nll(self, windows: torch.Tensor) -> list[float]:
        return [-likelihood for likelihood, _ in self.loglikelihood([(w[:1], w[1:]) for w in windows.tolist()])]

    def close(self) -> None:
        self._model = None


def decisions(found: dict[str, Any]) -> list[float]:
    """1 for each pair of which the good sentence is the likelier one, else 0."""
    return [float(good > bad) for good, bad in zip(found["sentences"][::2], found["sentences"][1::2], strict=True)]


def verdict_on(plain: dict[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """Returns the pipeline's verdict after one look at all items, against BF16 in the same engine."""
    if not found["sentences"]:
        ratio = found["perplexity"] / plain["perplexity"]
        return {"perplexity_ratio": round(ratio, 4), "outcome": "not judged: give --blimp"}
    scores = [
        Scores(
            items=decisions(one),
            chance=[0.5] * (len(one["sentences"]) // 2),
            nll=one["nll"],
            tokens=[one["tokens"]] * len(one["nll"]),
            item_ids=range(len(one["sentences"]) // 2),
            window_ids=range(len(one["nll"])),
        )
        for one in (plain, found)
    ]
    said = judge.judge(baseline=scores[0], candidate=scores[1], accept=Acceptance(), look=1, looks=1)
    intervals = {
        name: [round(end, 4) for end in (value.estimate, value.low, value.high)]
        for name in ("recovery", "perplexity_ratio")
        if (value := getattr(said, name)) is not None
    }
    return {"outcome": said.outcome, "failure_class": said.failure_class, "reason": said.reason, **intervals}


def compare(found: dict[str, dict[str, Any]], plain: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Sets what the engines said of a format side by side.

    Args:
        found: engine -> its answers.
        plain: engine -> its answers on BF16; empty for BF16 itself, which has no verdict.
    """
    told: dict[str, Any] = {}
    if found.keys() & plain.keys() >= {"torch", "vllm"} and found["torch"]["sentences"]:
        outcomes = [verdict_on(plain[engine], found[engine])["outcome"] for engine in ("torch", "vllm")]
        told["verdicts"] = dict(zip(("torch", "vllm"), outcomes, strict=True)) | {"agree": outcomes[0] == outcomes[1]}
    for kind in ("sentences", "next", "nll"):
        for one, other in (("torch", "vllm"), ("torch", "reference"), ("vllm", "reference")):
            if {one, other} <= found.keys() and found[one][kind]:
                apart_by = [abs(a - b) for a, b in zip(found[one][kind], found[other][kind], strict=True)]
                told[f"{kind}: {one} and {other}"] = {
                    "max": round(max(apart_by), 4), "mean": round(statistics.fmean(apart_by), 5), "count": len(apart_by)
                }  # fmt: skip
    if found.keys() >= {"torch", "vllm"}:
        answers = {engine: decisions(one) for engine, one in found.items()}
        told["pairs"] = _disagreement(answers) | {"which": _margins(found, answers)}
        told["likeliest tokens"] = _disagreement({engine: one["likeliest"] for engine, one in found.items()})
    return told


def _disagreement(answers: dict[str, list[Any]]) -> dict[str, Any]:
    """How often torch and vLLM decide differently, and who then decides as the reference does."""
    differ = [i for i, (a, b) in enumerate(zip(answers["torch"], answers["vllm"], strict=True)) if a != b]
    told: dict[str, Any] = {"count": len(answers["torch"]), "differ": len(differ)}
    if "reference" in answers:
        told["right"] = {e: sum(answers[e][i] == answers["reference"][i] for i in differ) for e in ("torch", "vllm")}
    return told


def _margins(found: dict[str, dict[str, Any]], answers: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """By how many nats each engine holds the good sentence likelier, where torch and vLLM differ; ten at most."""
    differ = [i for i, (a, b) in enumerate(zip(answers["torch"], answers["vllm"], strict=True)) if a != b]
    margins = {
        engine: [good - bad for good, bad in zip(one["sentences"][::2], one["sentences"][1::2], strict=True)]
        for engine, one in found.items()
    }
    return [{"pair": i} | {engine: round(margin[i], 4) for engine, margin in margins.items()} for i in differ[:10]]


if __name__ == "__main__":
    sys.exit(main())
