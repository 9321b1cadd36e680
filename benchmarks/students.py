"""Rows of benchmarks/distillation.py that compare students of the same tokens: sparse, rounded, of equal bytes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trimtab.components.pruning.work import prune
from trimtab.components.quantization.mixed import sensitivity
from trimtab.components.quantization.work import quantize
from trimtab.model.facts import inspect
from trimtab.recipe import MIXED_FORMATS, Distillation, MovementPruning, Quantization

#: Equal bytes: how near the peer's must come, as a share, and how often it is tried.
NEAR, TRIES = 0.005, 4
#: Seconds that all of `equal_bytes` is expected to take beside the student.
SECONDS_OF_EQUAL_BYTES = 60

Figures = Iterator[tuple[str, dict[str, Any]]]


def movement(benchmark: Any) -> Figures:
    """Movement pruning beside gradual magnitude pruning: one schedule, the same tokens."""
    for sparsity in benchmark.options.sparsities:
        yield _sparse(benchmark, "movement", sparsity)
        yield _sparse(benchmark, "gradual magnitude", sparsity, scores="magnitude")


def movement_otherwise(benchmark: Any) -> Figures:
    """The same tokens for magnitude pruning before training, and for movement by scores less, alone, and not at all."""
    for sparsity in benchmark.options.sparsities:
        sparse, parameters = str(benchmark.new("sparse")), {"method": "magnitude", "sparsity": sparsity}
        prune(benchmark.model, None, sparse, f"{sparse}-scratch", parameters)
        yield _trained(benchmark, f"magnitude at once {sparsity:.0%}", sparse, {"keep_zeros": True})
    kinds = {"gradual |W| ‖x‖": 1e9, "movement, scores count a tenth": 10.0, "movement, scores alone": 0.0}
    for kind, weight in kinds.items():
        for sparsity in benchmark.options.sparsities:
            yield _sparse(benchmark, kind, sparsity, magnitude_weight=weight)


def _sparse(benchmark: Any, kind: str, sparsity: float, **changes: Any) -> tuple[str, dict[str, Any]]:
    settings = MovementPruning(method="movement", sparsity=sparsity, **changes)
    weights = {"movement": settings.model_dump(mode="json")}
    return _trained(benchmark, f"{kind} {sparsity:.0%}", benchmark.model, weights)


def _trained(benchmark: Any, name: str, student: str, weights: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    folder = benchmark.distil(name, student, _comparable(benchmark), weights)
    told = json.loads((Path(folder) / "distillation.json").read_text(encoding="utf-8"))
    return name, {**benchmark.measure(name, folder), "heldout": told["heldout"]}


def _comparable(benchmark: Any) -> Distillation:
    """Small batches, since a schedule of sparsity wants many steps, and a rate that is not low in the last of them."""
    options = benchmark.options
    return benchmark.settings(
        tokens=options.comparison_tokens,
        batch_size=options.comparison_batch_size,
        gradient_accumulation=1,
        learning_rate=options.comparison_learning_rate,
        schedule="linear",
        stored_logits=0,
    )


def quantization_aware(benchmark: Any) -> Figures:
    """INT4 rounded to nearest, of the student distilled plainly and of the one that trained with the rounding."""
    settings = Quantization(format="int4_rtn", group_size=benchmark.options.group_size)
    rounded = {"rounded": settings.model_dump(mode="json", include={"format", "group_size", "exclude"})}
    plain = benchmark.distil("distilled", benchmark.student, _comparable(benchmark))
    yield "distilled, 16 bits", benchmark.measure("distilled, 16 bits", plain)
    yield _int4(benchmark, "distilled, then int4_rtn", plain, settings)
    aware = benchmark.distil("distilled with int4_rtn", benchmark.student, _comparable(benchmark), rounded)
    yield _int4(benchmark, "distilled with int4_rtn", aware, settings)
    yield _int4(benchmark, "all blocks, int4_rtn", benchmark.model, settings)
    aware = benchmark.distil("all blocks, distilled with int4_rtn", benchmark.model, _comparable(benchmark), rounded)
    yield _int4(benchmark, "all blocks, distilled with int4_rtn", aware, settings)


def activations_aware(benchmark: Any) -> Figures:
    """NVFP4 weights and activations: calibrated, and of the whole model trained with the rounding of either or both."""
    calibrated = _quantized(benchmark, benchmark.model, Quantization(format="nvfp4"), benchmark.calibrated)[0]
    yield "all blocks, nvfp4", benchmark.measure("all blocks, nvfp4", calibrated)
    settings = Quantization(format="nvfp4", method="nearest")
    rounded = {"rounded": settings.model_dump(mode="json", include={"format", "group_size", "exclude"})}
    for what, weights in (("weights", rounded), ("weights and inputs", {**rounded, "rounded_inputs": True})):
        name = f"all blocks, distilled with nvfp4's {what}"
        aware = benchmark.distil(name, benchmark.model, _comparable(benchmark), weights)
        export = _quantized(benchmark, aware, settings, benchmark.calibrate(aware))[0]
        yield name, benchmark.measure(name, export)


def _int4(benchmark: Any, name: str, checkpoint: str, settings: Quantization) -> tuple[str, dict[str, Any]]:
    return name, benchmark.measure(name, _quantized(benchmark, checkpoint, settings)[0])


def equal_bytes(benchmark: Any) -> Figures:
    """The pruned and distilled student in INT8 beside all blocks in mixed precision of as many bytes."""
    student = benchmark.recovered
    benchmark.require(SECONDS_OF_EQUAL_BYTES, "equal_bytes")
    pruned, size = _quantized(benchmark, student, Quantization(format="int8_wo"))
    ours = {**benchmark.measure("pruned, distilled, int8_wo", pruned), "bytes": size}
    yield "pruned, distilled, int8_wo", ours
    peer, peer_size, bits = _mixed_of(benchmark, size)
    name = f"all blocks, mixed {bits:.2f} bits"
    theirs = {**benchmark.measure(name, peer), "bytes": peer_size, "bits": bits}
    equal = abs(peer_size / size - 1) < NEAR
    wins = "pruned" if ours["perplexity"] < theirs["perplexity"] else "mixed"
    print(f"at {size / 1e6:.1f} and {peer_size / 1e6:.1f} MB{'' if equal else ', which are not equal'}, {wins} wins")
    yield name, {**theirs, "equal": equal, "wins": wins}


def _mixed_of(benchmark: Any, size: float) -> tuple[str, float, float]:
    """The unpruned model in mixed precision of about so many bytes: its folder, bytes and bits."""
    model, calibration, group = benchmark.model, benchmark.calibrated, benchmark.options.group_size
    harms = str(benchmark.new("sensitivity"))
    sensitivity.measure(model, calibration, harms, "", {"formats": list(MIXED_FORMATS), "group_size": group})
    bytes_of_a_bit = sum(layer.parameters for layer in inspect(model).linears) / 8
    bits, tried = 6.0, {}
    for _ in range(TRIES):  # bytes grow with bits, by whole groups of layers
        settings = Quantization(format="mixed", group_size=group, effective_bits=bits)
        folder, found = _quantized(benchmark, model, settings, calibration, harms)
        tried[abs(found / size - 1)] = folder, found, bits
        bits = min(8.0, max(4.0, bits + (size - found) / bytes_of_a_bit))
        if min(tried) < NEAR:
            break
    return tried[min(tried)]


def _quantized(benchmark: Any, checkpoint: str, settings: Quantization, *measured: str) -> tuple[str, float]:
    """An export and its bytes."""
    output = str(benchmark.new(settings.format))
    trees = (*measured, None, None)[:2]
    metrics = quantize(checkpoint, *trees, output, f"{output}-scratch", settings.model_dump(mode="json"))
    return output, metrics["bytes"]
