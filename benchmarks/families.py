"""What each family of models goes through: every stage on a tiny random model, and real weights in other clothes.

Run: python benchmarks/families.py [--model FOLDER] [--families NAMES] [--clothes NAMES] [--formats NAMES] [--quick]

Stage by stage, `yes` or what stopped it: plan reads the model; score is how far the logits over 40 tokens are from
transformers' in float32; measure is calibration with Gram matrices and sensitivity; a format is exported, passes the
integrity gate and is scored again; depth, sparsegpt and width prune; serve asks whether the server takes it.

With --model, a Llama such as SmolLM2, the second table puts its weights into the clothes of other families
(`benchmarks.clothes`): the perplexity of each format over that of the same clothes in 16 bits must agree with the
Llama's. What experts cost beside the Llama, and nothing else: --families --clothes llama mixtral qwen2_moe. The last
line is one JSON object.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import clothes
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import decoders
import wrappers

from trimtab import families
from trimtab.base.errors import Failure, InputError
from trimtab.components.calibration.work import calibrate
from trimtab.components.pruning.work import prune
from trimtab.components.quantization.mixed import sensitivity
from trimtab.components.quantization.work import quantize
from trimtab.components.validation.integrity import gate
from trimtab.model.facts import inspect
from trimtab.recipe import Engine
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.text import token_windows

FORMATS = ("int8_wo", "fp8", "int4_gptq", "nvfp4")
STAGES = ("plan", "score", "measure", *FORMATS, "depth", "sparsegpt", "width", "serve")
QUICK = ("llama", "gemma3_text", "phi3", "mixtral", "deepseek_v3", "gemma3")
#: Rows of the second table: the Llama itself first.
ROWS = ("llama", "mixtral", *(name for name in clothes.CLOTHES if name != "mixtral"))
#: Windows and tokens that the second table calibrates on, and perplexity windows.
_SAMPLES, _LENGTH, _WINDOWS = 12, 512, 32
_HELDOUT = ("trimtab.components.validation.suite", "heldout.txt")


class _Stages:
    """One family's tiny model in a folder, and what its stages say."""

    def __init__(self, model_type: str, folder: Path):
        self.model_type, self.folder = model_type, folder
        self.tiny = wrappers if families.named(model_type).wrapper else decoders
        self.source = self.tiny.write(folder / "source", model_type)

    def run(self) -> Iterator[tuple[str, str]]:
        """Yields each stage and what came of it."""
        for stage in STAGES:
            try:
                yield stage, self._stage(stage)
            except (Failure, InputError) as error:
                yield stage, f"refused: {error}"
            except Exception as error:  # what a user would see as a bug
                yield stage, f"BREAKS: {type(error).__name__}: {error}"

    def _stage(self, stage: str) -> str:
        if stage == "serve":
            why = families.named(self.model_type).no_serve
            return f"refused: {why}" if why else "yes"
        if stage in FORMATS:
            return self._format(stage)
        return getattr(self, f"_{stage}")()

    def _plan(self) -> str:
        inspect(self.source)
        return "yes"

    @torch.inference_mode()
    def _score(self) -> str:
        tokens = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
        reference = self.tiny.build(self.model_type)
        for tensor in reference.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.bfloat16())
        loaded, _ = model_files.load(self.source, torch.float32)
        return f"{(loaded(tokens).logits - reference(tokens).logits).abs().max().item():.1e}"

    def _measure(self) -> str:
        source, (calibration, harm) = str(self.source), map(self._made, ("calibration", "sensitivity"))
        calibrate(source, calibration, "", {"samples": 4, "length": 32})
        sensitivity.measure(source, calibration, harm, "", {"formats": ["int8_wo", "int4_rtn"], "group_size": 32})
        return "yes"

    def _format(self, form: str) -> str:
        export, parameters = self._made(form), {"format": form, "group_size": 32}
        trees = (str(self.folder / name) for name in ("calibration", "sensitivity"))
        quantize(str(self.source), *trees, export, self._made(f"{form}-scratch"), parameters)
        told = gate.inspect(export, str(self.source), self._made(f"{form}-gate"), "", parameters)
        engine = TorchEngine(Path(export), Engine(backend="torch"))
        if not math.isfinite(sum(engine.nll(torch.randint(3, 300, (1, 32))))):
            raise ValueError("its likelihoods are not finite")
        return f"{told['quantized_share']:.0%}" if not told["reload_skipped"] else f"refused: {told['reload_skipped']}"

    def _depth(self) -> str:
        return self._pruned({"method": "depth", "blocks": 1})

    def _sparsegpt(self) -> str:
        return self._pruned({"method": "sparsegpt", "pattern": "2:4"})

    def _width(self) -> str:
        return self._pruned({"method": "width", "ffn": 0.5})

    def _pruned(self, settings: dict[str, Any]) -> str:
        output = self._made(settings["method"])
        prune(str(self.source), str(self.folder / "calibration"), output, self._made("scratch"), settings)
        model, _ = model_files.load(Path(output), torch.float32)
        if not torch.isfinite(model(torch.tensor([[3, 4, 5]])).logits).all():
            raise ValueError("its logits are not finite")
        return "yes"

    def _made(self, name: str) -> str:
        (self.folder / name).mkdir(exist_ok=True)
        return str(self.folder / name)


def stages(names: list[str]) -> dict[str, dict[str, str]]:
    """Prints the first table, and returns it: family -> stage -> what came of it."""
    print(f"{'family':<20}" + "".join(f"{stage:>11}" for stage in STAGES), flush=True)
    found: dict[str, dict[str, str]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = dict(_Stages(name, Path(folder)).run())
        print(f"{name:<20}" + "".join(f"{told.split(':')[0][:10]:>11}" for told in found[name].values()), flush=True)
    for name, row in found.items():
        for stage, told in row.items():
            if told.startswith("BREAKS"):
                print(f"{name}, {stage}: {told}")
    return found


def dressed(model: Path, names: Sequence[str], formats: Sequence[str], quick: bool) -> dict[str, dict[str, float]]:
    """Prints the second table, and returns it: clothes -> "16 bits" and formats -> perplexity over 16 bits', and
    "tokens/s" of decoding 8 sequences in 16 bits and in FP8, where that is among the formats."""
    titles = ("16 bits", *formats, "tokens/s", *(["fp8"] if "fp8" in formats else []))
    print(f"\n{'clothes':<12}" + "".join(f"{title:>11}" for title in titles), flush=True)
    found: dict[str, dict[str, float]] = {}
    for name in names:
        with tempfile.TemporaryDirectory() as scratch:
            folder = model if name == "llama" else clothes.write(model, Path(scratch) / "source", name)
            found[name] = _ratios(folder, Path(scratch), formats, quick)
        row = found[name]
        ratios = "".join(f"{row[form]:>11.4f}" for form in formats)
        speeds = "".join(f"{row[title]:>11.1f}" for title in ("tokens/s", "fp8 tokens/s") if title in row)
        print(f"{name:<12}{row['16 bits']:>11.3f}{ratios}{speeds}", flush=True)
    return found


def _ratios(source: Path, scratch: Path, formats: Sequence[str], quick: bool) -> dict[str, float]:
    calibration = scratch / "calibration"
    calibration.mkdir()
    samples = 2 if quick else _SAMPLES
    calibrate(str(source), str(calibration), "", {"samples": samples, "length": _LENGTH, "seed": 0, "text": "builtin"})
    found = {"16 bits": _perplexity(source, quick), "tokens/s": _speed(source, quick)}
    for form in formats:
        export = scratch / form
        export.mkdir()
        parameters = {"format": form, "group_size": 64}
        quantize(str(source), str(calibration), None, str(export), str(scratch / "shards"), parameters)
        found[form] = _perplexity(export, quick) / found["16 bits"]
        if form == "fp8":
            found["fp8 tokens/s"] = _speed(export, quick)
    return found


def _speed(folder: Path, quick: bool) -> float:
    engine = TorchEngine(folder, Engine(backend="torch"))
    return max(engine.decode_speed(8, 64, 8 if quick else 64, 1 if quick else 2))


def _perplexity(folder: Path, quick: bool) -> float:
    engine = TorchEngine(folder, Engine(backend="torch"))
    text = token_windows.read_text("builtin", _HELDOUT)
    windows = token_windows.windows(engine.tokenizer, text, _LENGTH, 2 if quick else _WINDOWS)
    return math.exp(sum(engine.nll(windows)) / (windows.numel() - len(windows)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a Llama's folder, for the second table")
    parser.add_argument("--families", nargs="*", choices=families.BY_TYPE, default=list(families.BY_TYPE))
    parser.add_argument("--clothes", nargs="*", choices=ROWS, default=list(ROWS), help="rows of the second table")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), help="of the second table")
    parser.add_argument("--quick", action="store_true", help=f"{', '.join(QUICK)} alone; of the second table two rows")
    options = parser.parse_args()
    names = QUICK if options.quick and options.families else options.families
    figures: dict[str, Any] = {"stages": stages(list(names))} if names else {}
    if options.model:
        rows = ROWS[:2] if options.quick and options.clothes == list(ROWS) else options.clothes
        figures["clothes"] = dressed(options.model, rows, options.formats, options.quick)
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
