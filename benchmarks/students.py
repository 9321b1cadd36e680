"""Rows of benchmarks/distillation.py that compare students of the same tokens: sparse, rounded, of equal bytes."""

import math
from functools import partial
from pathlib import Path
from typing import Any

from measuring import short

from trimtab.components.calibration import grams
from trimtab.components.calibration.work import calibrate
from trimtab.components.distillation import work
from trimtab.components.pruning.work import prune
from trimtab.components.quantization import sensitivity
from trimtab.components.quantization.work import quantize
from trimtab.recipe import MIXED_FORMATS, MovementPruning, Quantization

#: Equal bytes: how near the peer's must come, as a share.
NEAR = 0.005


def _distilled(benchmark: Any, student: str, weights: dict[str, Any]) -> str:
    """A student trained on `--comparison-tokens`, in small batches: a schedule of sparsity wants many steps."""
    options = benchmark.options
    settings = benchmark.settings(
        tokens=options.comparison_tokens,
        batch_size=options.comparison_batch_size,
        gradient_accumulation=1,
        learning_rate=options.comparison_learning_rate,
        stored_logits=0,
    )

    def distill(parameters: dict[str, Any], **folders: str) -> dict[str, float]:
        return work.distill(parameters={**parameters, "weights": weights}, **folders)

    trees = {"checkpoint": student, "model": benchmark.model, **benchmark.generated}
    return benchmark.stage("distill", distill, settings, **trees)


def _quantized(benchmark: Any, checkpoint: str, settings: Quantization, *measured: str) -> tuple[str, float]:
    """An export and its bytes."""
    output = str(benchmark.new(settings.format))
    trees = measured or (None, None, None)
    metrics = quantize(checkpoint, *trees, output, f"{output}-scratch", settings.model_dump(mode="json"))
    return output, metrics["bytes"]


def _score(benchmark: Any, name: str, folder: str) -> dict[str, float]:
    found = short(benchmark.measuring.measure(Path(folder)))
    print(f"{name:<44}{found['perplexity']:>14.3f}{found.get('blimp', math.nan):>9.4f}", flush=True)
    return found


def movement(benchmark: Any) -> dict[str, Any]:
    """Movement pruning beside magnitude, pruned at once or gradually, each distilled with the same tokens."""
    found = {"dense": _score(benchmark, "dense", benchmark.model)}
    for sparsity in benchmark.options.sparsities:
        kinds = {"movement": {}, "movement, as the paper": {"magnitude_weight": 0.0}}
        kinds["gradual magnitude"] = {"scores": "magnitude"}
        for kind, changes in kinds.items():
            settings = MovementPruning(method="movement", sparsity=sparsity, **changes)
            student = _distilled(benchmark, benchmark.model, {"movement": settings.model_dump(mode="json")})
            found[f"{kind} {sparsity:.0%}"] = _score(benchmark, f"{kind} {sparsity:.0%}", student)
        sparse, parameters = str(benchmark.new("sparse")), {"method": "magnitude", "sparsity": sparsity}
        prune(benchmark.model, None, sparse, f"{sparse}-scratch", parameters)
        student, name = _distilled(benchmark, sparse, {"keep_zeros": True}), f"magnitude at once {sparsity:.0%}"
        found[name] = _score(benchmark, name, student)
    return found


def quantization_aware(benchmark: Any) -> dict[str, Any]:
    """INT4 rounded to nearest, of the student distilled plainly and of the one that trained with the rounding."""
    settings = Quantization(format="int4_rtn", group_size=benchmark.options.group_size)
    rounded = {"rounded": settings.model_dump(mode="json", include={"format", "group_size", "exclude"})}
    plain = _distilled(benchmark, benchmark.student, {})
    checkpoints = {
        "distilled, then int4_rtn": plain,
        "distilled with int4_rtn": _distilled(benchmark, benchmark.student, rounded),
        "all blocks, int4_rtn": benchmark.model,
        "all blocks, distilled with int4_rtn": _distilled(benchmark, benchmark.model, rounded),
    }
    found = {"distilled, 16 bits": _score(benchmark, "distilled, 16 bits", plain)}
    for name, folder in checkpoints.items():
        found[name] = _score(benchmark, name, _quantized(benchmark, folder, settings)[0])
    return found


def equal_bytes(benchmark: Any) -> dict[str, Any]:
    """The pruned and distilled student in INT8 beside all blocks in mixed precision of as many bytes."""
    pruned, size = _quantized(benchmark, _distilled(benchmark, benchmark.student, {}), Quantization(format="int8_wo"))
    calibration, gram, harms = (str(benchmark.new(name)) for name in ("calibration", "gram", "sensitivity"))
    group = benchmark.options.group_size
    calibrate(benchmark.model, calibration, "", benchmark.measuring.calibration(0))
    grams.measure(benchmark.model, calibration, gram, "", {})
    sensitivity.measure(
        benchmark.model, calibration, harms, "", {"formats": list(MIXED_FORMATS), "group_size": group}
    )
    mixed = partial(Quantization, format="mixed", group_size=group)
    low, high = 4.0, 8.0
    for _ in range(6):  # bytes grow with bits, by whole groups of layers
        bits = (low + high) / 2
        peer, peer_size = _quantized(benchmark, benchmark.model, mixed(effective_bits=bits), calibration, gram, harms)
        if abs(peer_size / size - 1) < NEAR:
            break
        low, high = (bits, high) if peer_size < size else (low, bits)
    found = {
        "pruned": {**_score(benchmark, "pruned, distilled, int8_wo", pruned), "bytes": size},
        "mixed": {**_score(benchmark, f"all blocks, mixed {bits:.2f} bits", peer), "bytes": peer_size, "bits": bits},
    }
    winner = min(found, key=lambda name: found[name]["perplexity"])
    equal = abs(peer_size / size - 1) < NEAR
    print(f"at {size / 1e6:.1f} and {peer_size / 1e6:.1f} MB{'' if equal else ', which are not equal'}, {winner} wins")
    return {**found, "equal": equal, "wins": winner}
