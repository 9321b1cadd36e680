"""AWQ's scales and each layer's sensitivity to each format: one search a model, read by every recipe that needs it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import modelopt.torch.quantization as mtq
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from trimtab import progress
from trimtab.components.quantization import formats
from trimtab.components.quantization.allocation import BITS, Group
from trimtab.runtime import checkpoint as checkpoints


def measure(
    checkpoint: str, calibration: str, output: str, scratch: str, parameters: dict[str, Any]
) -> dict[str, float]:
    """Searches AWQ's scales, scores every layer in every format of `mixed`, and writes both.

    `awq.safetensors` holds for each layer the scale of its input channels, float32 [in_features] (Lin et al.
    2023, "AWQ"). `sensitivity.json` holds the score of ModelOpt's AutoQuantize: the squared change of a layer's
    output that a format causes, weighted with the squared gradient of the loss there, an estimate of the rise
    of the loss.

    Returns:
        groups, layers.
    """
    model, _ = checkpoints.load(Path(checkpoint), torch.float32)
    tokens = load_file(Path(calibration) / "tokens.safetensors")["tokens"].long()
    exclude = tuple(parameters["exclude"])
    names = sorted(BITS, key=BITS.get)
    batches = [{"input_ids": window[None]} for window in tokens]
    passes = len(batches) * (len(names) + 1)
    progress.report("sensitivity", "scoring every layer in every format", 0, passes)
    done = itertools.count(1)

    def forward(model: Any, batch: dict[str, torch.Tensor]) -> Any:
        output = model(**batch)
        progress.report("sensitivity", "scoring every layer in every format", next(done), passes)
        return output

    _, search = mtq.auto_quantize(
        model,
        # The search itself is not used: any feasible budget lets ModelOpt score and finish.
        constraints={"effective_bits": 15.9},
        quantization_formats=[formats.configuration(n, parameters["group_size"], exclude) for n in names],
        data_loader=batches,
        forward_step=forward,
        loss_func=lambda output, batch: F.cross_entropy(
            output.logits[:, :-1].flatten(0, 1).float(), batch["input_ids"][:, 1:].flatten()
        ),
        num_calib_steps=len(batches),
        num_score_steps=len(batches),
        disabled_layers=[f"*{pattern}*" for pattern in exclude],
        method="gradient",
    )
    document = [
        {
            "layers": stats["module_names"],
            "weights": int(stats["uncompressed_cost"]),
            "harm": dict(
                zip(names, stats["scores"], strict=False)
            ),  # the last score is that of no quantization
        }
        for stats in search["candidate_stats"].values()
        if len(stats["scores"]) > len(names)  # an excluded layer has one choice, to stay as it is
    ]
    save_file(_awq_scales(search["quantizer_states"]), Path(output) / "awq.safetensors")
    (Path(output) / "sensitivity.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    return {"groups": len(document), "layers": sum(len(g["layers"]) for g in document)}


def _awq_scales(states: dict[Any, dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Returns the scale that AWQ found for each layer's input, from the states that the search kept a format."""
    (state,) = (kept["state_dict"] for recipe, kept in states.items() if recipe.num_bits == BITS["int4_awq"])
    suffix = ".input_quantizer"
    return {
        name.removesuffix(suffix): tensors["_pre_quant_scale"].float().contiguous()
        for name, tensors in state.items()
        if name.endswith(suffix) and "_pre_quant_scale" in tensors
    }


def read(folder: Path) -> list[Group]:
    """Reads what `measure` wrote."""
    document = json.loads((folder / "sensitivity.json").read_text(encoding="utf-8"))
    return [Group(tuple(g["layers"]), g["weights"], g["harm"]) for g in document]
