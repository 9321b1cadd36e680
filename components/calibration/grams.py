"""A pass of its own: the full second moments of every layer's input, which GPTQ needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from trimtab.base import progress
from trimtab.components.calibration.work import rare_experts
from trimtab.families.fusion import block_of
from trimtab.runtime.checkpoint import model_files as checkpoints
from trimtab.runtime.measure import measurements, observe, routing

#: Bytes of sums held at once. A model with more of them is run over the text several times.
BUDGET = 8 << 30


def measure(
    checkpoint: str, calibration: str, output: str, scratch: str, parameters: dict[str, Any]
) -> dict[str, float]:
    """Writes for each block `gram-<block>.safetensors` with `<layer>.gram`, float32 [in_features, in_features].

    The Gram matrix is the mean of x xᵀ over the calibration tokens, half the Hessian of the squared error of the
    layer's output (Frantar et al. 2022, "GPTQ"). Layers that read one input share that of the first of them. An
    expert's is over the tokens that it is given, or over all where these are too few (`runtime.measure.routing`), and
    still divided by all tokens: rounding by it does not depend on its scale.

    Returns:
        layers, passes (runs over the text), bytes.
    """
    model, _ = checkpoints.load_for_measuring(Path(checkpoint))
    tokens = load_file(Path(calibration) / "tokens.safetensors")["tokens"].long()
    batches, rare = observe.batches(model, tokens), rare_experts(Path(calibration))
    modules, chunks = observe.linears(model), _chunks(model)
    written = 0
    for number, layers in enumerate(chunks, start=1):
        title = f"measuring Gram matrices, part {number} of {len(chunks)}"
        measured = observe.grams({n: modules[n] for n in layers})
        with torch.inference_mode(), routing.run_on_all(model, rare), measured as sums:
            for windows in progress.track(batches, "gram", title, len(batches)):
                model(windows, use_cache=False, logits_to_keep=1)
        for block in sorted({block_of(layer) for layer in layers}):
            found = {f"{n}.gram": (sums[n] / tokens.numel()).cpu() for n in layers if block_of(n) == block}
            observe.check_finite(found)
            written += sum(tensor.nbytes for tensor in found.values())
            save_file(found, Path(output) / f"gram-{block:05d}.safetensors")
    measurements.bind(Path(output), Path(checkpoint))
    return {"layers": sum(map(len, chunks)), "passes": len(chunks), "bytes": written}


def _chunks(model: torch.nn.Module) -> list[list[str]]:
    """The first layers of all groups, in runs of whole blocks whose sums fit the budget."""
    layers = observe.linears(model)
    chunks: list[list[str]] = []
    held, last = 0, None
    for group in observe.linear_groups(model):
        first = group.layers[0]
        size, block = 4 * layers[first].in_features ** 2, block_of(first)
        if not chunks or (block != last and held + size > BUDGET):
            chunks.append([])
            held = 0
        chunks[-1].append(first)
        held, last = held + size, block
    return chunks
