"""Width pruning: on a few numbers, and to smaller ordinary checkpoints of four architectures."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from trimtab.base.errors import Failure
from trimtab.components.calibration.work import calibrate
from trimtab.components.pruning.structured import width
from trimtab.components.pruning.work import prune
from trimtab.components.quantization.work import quantize
from trimtab.components.validation.integrity import gate
from trimtab.model import shapes
from trimtab.model.facts import inspect
from trimtab.recipe import WidthPruning
from trimtab.runtime.measure.measurements import Measurements

TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12]])
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
EVERYTHING = {"method": "width", "ffn": 0.5, "kv_groups": 1, "hidden": 0.5}


def test_a_group_counts_by_all_its_heads():
    moment = torch.tensor([1.0, 1, 1, 1, 2, 2, 2, 5])
    assert width.group_importance(moment, 2).tolist() == [4, 11]  # four heads of two: two a group
    assert width.group_importance(moment, 4).tolist() == [2, 2, 4, 7]


def test_a_channel_counts_ahead_of_the_weights_of_its_norm():
    energy = width.channel_energy(torch.tensor([1.0, 2, -2, 0]), torch.tensor([1.0, 4, 8, 0]))
    assert energy.tolist() == [1, 1, 2, 0]  # what a weight of 0 hides counts as nothing


@pytest.mark.parametrize(
    ("importance", "count", "kept"),
    [([1, 9, 3, 7], 2, [1, 3]), ([1, 9, 3, 7], 3, [1, 2, 3]), ([5, 5, 5, 5], 2, [0, 1]), ([1, 2], 2, [0, 1])],
)
def test_the_strongest_in_their_old_order(importance, count, kept):
    assert width.strongest(torch.tensor(importance), count).tolist() == kept


def test_the_rows_of_a_group():
    assert width.spread(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_a_norm_keeps_the_scale_of_its_output():
    """Rows whose channels 1 and 3 are 0: their squares, normalised over four channels, are those over two."""
    weight, kept = torch.tensor([1.0, 2, 3, 0.5]), torch.tensor([0, 2])
    rows = torch.tensor([[3.0, 0, 4, 0], [1.0, 0, 7, 0]])

    def norm(x, weight):
        return x * x.square().mean(dim=1, keepdim=True).rsqrt() * weight

    output = norm(rows, weight)
    scale = width.norm_scale(width.channel_energy(weight, output.square().mean(dim=0)), kept)
    assert scale.item() == pytest.approx(2**0.5)
    assert torch.allclose(norm(rows[:, kept], weight[kept] * scale), output[:, kept])


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A function: model type -> a random model of two blocks, and its calibration; made once."""
    made: dict[str, tuple[Path, Path]] = {}

    def make(name: str) -> tuple[Path, Path]:
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            model, calibration = tiny.write_model(folder / "model", hidden=128, family=name), folder / "calibration"
            calibration.mkdir()
            calibrate(str(model), str(calibration), "", {"samples": 4, "length": 32})
            made[name] = model, calibration
        return made[name]

    return make


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(model: PreTrainedModel) -> torch.Tensor:
    return model(TOKENS).logits


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_left_is_an_ordinary_model(name, family, tmp_path):
    model, calibration = family(name)
    metrics = prune(str(model), str(calibration), str(tmp_path), str(tmp_path / "scratch"), EVERYTHING)
    planned = shapes.pruned(inspect(model), WidthPruning(**EVERYTHING))
    found = inspect(tmp_path)
    assert (found.hidden_size, found.intermediate_size, found.heads, found.kv_heads) == (64, 128, 2, 1)
    assert {**dict(found), "parameters": 0, "bytes": 0} == {**dict(planned), "parameters": 0, "bytes": 0}
    assert found.parameters == metrics["parameters"] == pytest.approx(planned.parameters, rel=0.01)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["head_dim"] == 32, "explicit: elsewhere hidden_size / heads is taken for it"
    reloaded = load(tmp_path)
    tied = reloaded.get_output_embeddings().weight is reloaded.get_input_embeddings().weight
    assert tied == found.tied_embeddings == (name == "llama")
    cached = reloaded.generate(TOKENS, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    plain = reloaded.generate(TOKENS, max_new_tokens=8, min_new_tokens=8, do_sample=False, use_cache=False)
    assert torch.equal(cached, plain) and torch.isfinite(logits(reloaded)).all()


@pytest.mark.parametrize("name", FAMILIES)
def test_removed_neurons_and_heads_are_zeroed_ones(name, family, tmp_path):
    model, calibration = family(name)
    parameters = {"method": "width", "ffn": 0.25, "kv_groups": 1}
    prune(str(model), str(calibration), str(tmp_path), str(tmp_path / "scratch"), parameters)
    masked, measured = load(model), Measurements(calibration, model, "calibration")
    for index, block in enumerate(masked.model.layers):
        prefix = f"model.layers.{index}"
        for layer, place, size, group in (
            (block.mlp.down_proj, "mlp.down_proj", 64, 1), (block.self_attn.o_proj, "self_attn.o_proj", 1, 64)
        ):  # fmt: skip
            carried = measured[f"{prefix}.{place}.second_moment"]
            weakest = carried.reshape(-1, group).sum(dim=1).argsort()[:size]
            layer.weight.data.reshape(len(layer.weight), -1, group)[:, weakest] = 0
    assert torch.allclose(logits(load(tmp_path)), logits(masked), atol=1e-4)
    assert (logits(load(model)) - logits(masked)).abs().max() > 0.01


@pytest.mark.parametrize("name", FAMILIES)
def test_hidden_channels_that_carry_nothing_leave_the_logits_alone(name, family, tmp_path):
    """Every other channel of the residual stream is silenced, then removed."""
    model, _ = family(name)
    silent = load(model)
    quiet = torch.arange(0, 128, 2)
    silent.get_input_embeddings().weight.data[:, quiet] = 0
    for block in silent.model.layers:
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.weight.data[quiet] = 0
    for folder in ("silent", "calibration", "pruned"):
        (tmp_path / folder).mkdir()
    silent.save_pretrained(tmp_path / "silent")
    for path in model.glob("*token*"):
        (tmp_path / "silent" / path.name).write_bytes(path.read_bytes())
    folders = [str(tmp_path / folder) for folder in ("silent", "calibration", "pruned")]
    calibrate(*folders[:2], "", {"samples": 2, "length": 32})
    prune(*folders, str(tmp_path / "scratch"), {"method": "width", "hidden": 0.5})
    assert torch.allclose(logits(load(tmp_path / "pruned")), logits(silent), rtol=1e-3, atol=1e-3)


def test_a_narrowed_model_quantizes_and_passes_the_gate(family, tmp_path):
    model, calibration = family("llama")
    folders = {name: tmp_path / name for name in ("pruned", "measured", "export", "checked")}
    for folder in folders.values():
        folder.mkdir()
    pruned, measured, export, checked = map(str, folders.values())
    prune(str(model), str(calibration), pruned, str(tmp_path / "shards"), EVERYTHING)
    calibrate(pruned, measured, "", {"samples": 4, "length": 32})
    settings = {"format": "int4_awq", "group_size": 64}
    quantize(pruned, measured, None, export, str(tmp_path / "scratch"), settings)
    metrics = gate.inspect(export, pruned, checked, "", settings)
    assert metrics["tensor_bytes"] == pytest.approx(metrics["predicted_bytes"], rel=0.035)
    assert metrics["quantized_share"] < 0.3 and metrics["reload_skipped"] == ""


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"kv_groups": 2}, "prune.kv_groups: 2 of 2 KV groups cannot be removed; write at most 1"),
        ({"ffn": 0.1}, "prune.ffn: 0.1 of 256 neurons rounds to none"),
        ({"hidden": 0.9}, "prune.hidden: 0.9 of 128 channels leaves none"),
    ],
)
def test_what_cannot_be_removed(parameters, reason, family, tmp_path):
    model, calibration = family("llama")
    with pytest.raises(Failure, match=reason) as caught:
        prune(str(model), str(calibration), str(tmp_path), str(tmp_path / "scratch"), {"method": "width", **parameters})
    assert caught.value.failure_class == "unsupported" and list(tmp_path.iterdir()) == []


def test_an_architecture_that_is_not_known_is_named(family, tmp_path):
    model, calibration = family("phi3")
    with pytest.raises(Failure, match=r"does not know Phi3ForCausalLM \(model_type 'phi3'\)") as caught:
        prune(str(model), str(calibration), str(tmp_path), str(tmp_path / "scratch"), {"method": "width", "ffn": 0.5})
    assert caught.value.failure_class == "unsupported"
