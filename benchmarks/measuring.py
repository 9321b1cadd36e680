"""What the quality benchmarks share: their command line, texts, BLiMP's pairs, and what a model scores on them."""

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.recipe import Engine
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.text import token_windows

LENGTH = 512


def add_arguments(parser: argparse.ArgumentParser, needs_model: bool = True) -> None:
    """Adds what says on which model and data a benchmark runs."""
    parser.add_argument("--model", type=Path, required=needs_model, help="a Hugging Face model folder")
    parser.add_argument("--text", type=Path, help="a text file; trimtab's own when absent")
    parser.add_argument("--blimp", type=Path, help="a folder of BLiMP's .jsonl files")
    parser.add_argument("--pairs", type=int, default=94, help="pairs of each BLiMP file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--samples", type=int, default=32, help=f"calibration windows of {LENGTH} tokens")
    parser.add_argument("--windows", type=int, default=48, help=f"test windows of {LENGTH} tokens, at most")


def main(
    doc: str | None,
    what: str,
    rows: Iterable[str],
    quick: Sequence[str],
    benchmark: Callable[[argparse.Namespace, Path], Any],
    more: Callable[[argparse.ArgumentParser], Any] = lambda parser: None,
) -> int:
    """Reads the command line, runs a benchmark of many rows, and prints its figures as the last line.

    Args:
        doc: the benchmark's docstring.
        what: the option that chooses rows; they become `options.rows`.
        rows: the rows there are.
        quick: those of --quick.
        benchmark: (options, scratch folder) -> what has a `run` that returns the figures.
        more: adds what this benchmark alone has for options.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    more(parser)
    parser.add_argument(f"--{what}", dest="rows", nargs="*", choices=rows, default=list(rows))
    parser.add_argument("--quick", action="store_true", help=f"one seed, {len(quick)} {what}, little text")
    options = parser.parse_args()
    if options.quick:
        options.seeds, options.samples, options.windows, options.pairs = 1, 2, 2, 5
        options.rows = list(quick)
    with tempfile.TemporaryDirectory() as folder:
        figures = benchmark(options, Path(folder)).run()
    print(json.dumps(figures))
    return 0


class Measuring:
    """Scores model folders on the held-out text and on BLiMP.

    Args:
        options: parsed from what `add_arguments` adds.
        folder: where the calibration text is written.
    """

    def __init__(self, options: argparse.Namespace, folder: Path):
        self.options = options
        self._text, self._test = _texts(options.text, folder)
        self.sentences = _pairs(options.blimp, options.pairs) if options.blimp else []

    def calibration(self, seed: int) -> dict[str, Any]:
        """The recipe's `calibrate` for one seed."""
        return {"samples": self.options.samples, "length": LENGTH, "seed": seed, "text": self._text}

    @property
    def seeds(self) -> range:
        return range(self.options.first_seed, self.options.first_seed + self.options.seeds)

    def measure(self, folder: Path) -> dict[str, Any]:
        """Returns what `score` does of a reloaded folder in the torch engine."""
        return self.score(TorchEngine(folder, Engine()))

    def score(self, engine: Any) -> dict[str, Any]:
        """Returns the perplexity of a model in an engine, and `right`, 1 or 0 for each pair of BLiMP."""
        windows = self.windows(engine)
        found: dict[str, Any] = {"perplexity": math.exp(sum(engine.nll(windows)) / (windows.numel() - len(windows)))}
        if self.sentences:
            scores = self.likelihoods(engine)
            found["right"] = [float(good > bad) for good, bad in zip(scores[::2], scores[1::2], strict=True)]
        return found

    def windows(self, engine: Any) -> torch.Tensor:
        """Returns the test text as the engine's tokenizer has it, int64 [windows, LENGTH]."""
        return self.windows_of(engine.tokenizer)

    def windows_of(self, tokenizer: Any) -> torch.Tensor:
        """Returns the test text as a tokenizer has it, int64 [windows, LENGTH]."""
        return token_windows.windows(tokenizer, self._test, LENGTH, self.options.windows)

    def likelihoods(self, engine: Any) -> list[float]:
        """Returns the nats of each sentence of BLiMP's pairs."""
        start = token_windows.prefix(engine.tokenizer) or [engine.tokenizer.eos_token_id]
        tokens = [token_windows.encode(engine.tokenizer, s, special=False) for s in self.sentences]
        return [score for score, _ in engine.loglikelihood([(start, t) for t in tokens])]


def blimp(rows: Sequence[dict[str, Any]]) -> float:
    """The share of pairs whose good sentence is the likelier one, mean over seeds."""
    return statistics.fmean(statistics.fmean(row["right"]) for row in rows)


def columns(found: dict[str, Any], seconds: float, between: str = "") -> str:
    """A measurement as the end of a line: perplexity, what the benchmark adds behind it, BLiMP and seconds."""
    right = f"{blimp([found]):>9.4f}" if "right" in found else " " * 9
    return f"{found['perplexity']:>12.3f}{between}{right}{seconds:>9.1f}"


def short(found: dict[str, Any]) -> dict[str, float]:
    """A measurement without its single pairs."""
    return {"perplexity": found["perplexity"], **({"blimp": blimp([found])} if "right" in found else {})}


def paired(ours: Sequence[dict[str, Any]], plain: Sequence[dict[str, Any]]) -> list[float]:
    """Accuracy of ours minus plain's: the mean over seeds and pairs, and its 95 % interval over pairs."""
    pairs = zip(*(r["right"] for r in ours), strict=True), zip(*(r["right"] for r in plain), strict=True)
    differences = [statistics.fmean(a) - statistics.fmean(b) for a, b in zip(*pairs, strict=True)]
    mean = statistics.fmean(differences)
    half = 1.96 * statistics.stdev(differences) / math.sqrt(len(differences))
    return [round(x, 4) for x in (mean, mean - half, mean + half)]


def _texts(path: Path | None, folder: Path) -> tuple[str, str]:
    """Returns the calibration text as a recipe names it, and the test text itself."""
    if path is None:
        heldout = ("trimtab.components.validation.suite", "heldout.txt")
        return "builtin", token_windows.read_text("builtin", heldout)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = int(0.8 * len(lines))
    (folder / "calibration.txt").write_text("".join(lines[:cut]), encoding="utf-8")
    return str(folder / "calibration.txt"), "".join(lines[cut:])


def _pairs(folder: Path, count: int) -> list[str]:
    """The first pairs of each file: a good sentence, then its bad twin, and so on."""
    sentences = []
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines()[:count]:
            pair = json.loads(line)
            sentences += [pair["sentence_good"], pair["sentence_bad"]]
    return sentences
