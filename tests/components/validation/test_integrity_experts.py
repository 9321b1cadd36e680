"""What the integrity gate finds in a mixture of experts: one that is missing or another, a router that changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import decoders
import pytest
from safetensors.torch import load_file, save_file

from trimtab.base.errors import Failure
from trimtab.components.quantization.work import quantize
from trimtab.components.validation.integrity import gate

SETTINGS = {"format": "int8_wo"}
EXPERTS = "model.layers.1.block_sparse_moe.experts"
ROUTER = "model.layers.1.block_sparse_moe.gate"


@pytest.fixture
def made(tmp_path: Path) -> tuple[Path, Path]:
    """A tiny Mixtral, and its export in INT8."""
    source, export = decoders.write(tmp_path / "source", "mixtral"), tmp_path / "export"
    export.mkdir()
    quantize(str(source), None, None, str(export), str(tmp_path / "scratch"), SETTINGS)
    return source, export


def inspect(made: tuple[Path, Path], tmp_path: Path) -> dict:
    (tmp_path / "report").mkdir(exist_ok=True)
    return gate.inspect(str(made[1]), str(made[0]), str(tmp_path / "report"), "", SETTINGS)


def test_every_expert_is_quantized_and_no_router(made, tmp_path: Path) -> None:
    told = inspect(made, tmp_path)
    assert told["reload_skipped"] == "" and told["quantized_share"] < 0.55
    own = json.loads((made[1] / "hf_quant_config.json").read_text())["quantization"]
    routers = {f"model.layers.{n}.block_sparse_moe.gate" for n in range(decoders.LAYERS)}
    assert routers <= set(own["exclude_modules"])
    layers = {row["layer"] for row in json.loads((tmp_path / "report" / "layers.json").read_text())}
    assert layers >= {f"{EXPERTS}.{n}.w{m}" for n in range(decoders.EXPERTS) for m in (1, 2, 3)}


def missing(tensors: dict) -> None:
    del tensors[f"{EXPERTS}.3.w2.weight"], tensors[f"{EXPERTS}.3.w2.weight_scale"]


def swapped(tensors: dict) -> None:
    for part in ("weight", "weight_scale"):
        first, second = f"{EXPERTS}.0.w1.{part}", f"{EXPERTS}.2.w1.{part}"
        tensors[first], tensors[second] = tensors[second], tensors[first]


def another_router(tensors: dict) -> None:
    tensors[f"{ROUTER}.weight"] = tensors[f"{ROUTER}.weight"].flip(0)


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (missing, rf"{EXPERTS}.3.w2"),
        (swapped, rf"{EXPERTS}.0.w1: .* times its source's weights"),
        (another_router, rf"{ROUTER}.weight: differs from its source"),
    ],
)
def test_faults(fault: Callable[[dict], None], sentence: str, made, tmp_path: Path) -> None:
    path = made[1] / "model.safetensors"
    tensors = load_file(path)
    fault(tensors)
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(Failure, match=sentence) as found:
        inspect(made, tmp_path)
    assert found.value.failure_class == "export_damaged"


def test_a_config_that_calls_a_router_quantized(made, tmp_path: Path) -> None:
    for name, key in (("hf_quant_config.json", "exclude_modules"), ("config.json", "ignore")):
        document = json.loads((made[1] / name).read_text())
        own = document["quantization" if key == "exclude_modules" else "quantization_config"]
        own[key] = [module for module in own[key] if module != ROUTER]
        for other in ("exclude_modules",):
            if other in own:
                own[other] = [module for module in own[other] if module != ROUTER]
        (made[1] / name).write_text(json.dumps(document))
    with pytest.raises(Failure, match=f"{ROUTER}: is quantized"):
        inspect(made, tmp_path)
