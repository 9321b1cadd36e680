"""An export with one seeded fault in its tensors is refused, and the layer is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from .conftest import LAYER, SETTINGS, Tensors, check, damage_of


def scale(tensors: Tensors) -> torch.Tensor:
    return tensors[f"{LAYER}.weight_scale"]


def scaled_ten_times(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight_scale"] = scale(tensors) * 10


def a_scale_a_quarter_too_large(tensors: Tensors) -> None:
    scale(tensors)[5] *= 1.25


def one_wrong_scale(tensors: Tensors) -> None:
    scale(tensors)[5] *= 3


def swapped_scales(tensors: Tensors) -> None:
    """Of the two channels that differ most."""
    rows = scale(tensors).float().reshape(len(scale(tensors)), -1).mean(1)
    pair, other = [int(rows.argmin()), int(rows.argmax())], [int(rows.argmax()), int(rows.argmin())]
    scale(tensors)[pair] = scale(tensors)[other]


def missing_scale(tensors: Tensors) -> None:
    del tensors[f"{LAYER}.weight_scale"]


def missing_weight(tensors: Tensors) -> None:
    del tensors[f"{LAYER}.weight"]


def zeroed(tensors: Tensors) -> None:
    tensors[f"{LAYER}.weight"] = torch.zeros_like(tensors[f"{LAYER}.weight"])


def not_a_number(tensors: Tensors) -> None:
    scale(tensors)[0] = torch.nan


def another_layer(tensors: Tensors) -> None:
    for part in ("weight", "weight_scale"):
        tensors[f"{LAYER}.{part}"] = tensors[f"{LAYER.replace('.1.', '.2.')}.{part}"].clone()


def half_of_it_zero(tensors: Tensors) -> None:
    """As a kernel that wrote half of a tensor leaves it."""
    half_of_it(tensors, 0)


def half_of_it_as_initialised(tensors: Tensors) -> None:
    half_of_it(tensors, 1)


def half_of_it(tensors: Tensors, value: float) -> None:
    found = scale(tensors)
    flat = found.float().flatten()
    flat[len(flat) // 2 :] = value
    tensors[f"{LAYER}.weight_scale"] = flat.reshape(found.shape).to(found.dtype)


FAULTS = [
    scaled_ten_times, a_scale_a_quarter_too_large, one_wrong_scale, swapped_scales, missing_scale, missing_weight,
    zeroed, not_a_number, another_layer, half_of_it_zero, half_of_it_as_initialised,
]  # fmt: skip


#: Of one scale for all, and of scales that are no plain numbers, those faults that mean the same.
TENSOR_FAULTS = [scaled_ten_times, missing_scale, missing_weight, zeroed, another_layer]
FP4_FAULTS = [missing_scale, zeroed, another_layer, half_of_it_zero, half_of_it_as_initialised]
SEEDED = [
    *((name, fault) for name in ("int8_wo", "fp8_per_channel", "int4_rtn", "int4_gptq") for fault in FAULTS),
    *((name, fault) for name in ("fp8", "fp8_gptq") for fault in TENSOR_FAULTS),
    *((name, fault) for name in ("nvfp4", "nvfp4_wo", "mxfp4") for fault in FP4_FAULTS),
]


@pytest.mark.parametrize(("name", "fault"), SEEDED, ids=[f"{name}-{fault.__name__}" for name, fault in SEEDED])
def test_seeded_faults(name, fault, damaged, model, calibration, tmp_path):
    damage_of(re.escape(LAYER), damaged(name, fault), model, tmp_path, name, calibration=calibration)


def rows_of_the_layer_before_doubled(tensors: Tensors) -> None:
    tensors[LAYER.replace("down", "up") + ".weight"][:32] *= 2


def test_a_scale_that_went_into_the_layer_before_alone(damaged, model, calibration, tmp_path):
    """Where up_proj stays in 16 bits, it shows the scale itself; the layer behind has taken back another."""
    settings = SETTINGS["nvfp4_wo"]
    moved = damaged("nvfp4_wo", rows_of_the_layer_before_doubled, **settings)
    sentence = rf"{re.escape(LAYER)}: group \d of output channel \d+ has 2.\d+ times its source's weights"
    damage_of(sentence, moved, model, tmp_path, "nvfp4_wo", calibration=calibration, **settings)


def a_group_of_one_channel_zeroed(tensors: Tensors) -> None:
    """The second of 32 inputs, of output channel 4, which the low nibbles of a row of bytes hold."""
    tensors[f"{LAYER}.weight"][2, 32:64] &= 0xF0


def test_a_group_that_matters_little_may_move_and_one_that_matters_may_not(damaged, model, calibration, tmp_path):
    """GPTQ lets weights of inputs that matter little make up for the errors of others. At 8 billion parameters the gate
    called such an export damaged: "group 15 of output channel 345 has -0.07 times its source's weights"."""
    moved = damaged("int4_gptq", a_group_of_one_channel_zeroed)
    zero = re.escape(f"{LAYER}: group 1 of output channel 4 has 0.00 times its source's weights")
    (tmp_path / "matters").mkdir()
    damage_of(zero, moved, model, tmp_path / "matters", "int4_gptq", calibration=calibration)
    quiet = shutil.copytree(calibration, tmp_path / "quiet")
    statistics = load_file(quiet / "statistics.safetensors")
    statistics[f"{LAYER}.sketch"][:, 32:64] *= 0.01
    save_file(statistics, quiet / "statistics.safetensors")
    check(moved, model, tmp_path, "int4_gptq", quiet)
    layers = json.loads((tmp_path / "output" / "layers.json").read_text())
    assert all(0 < layer["output_error"] < 0.3 for layer in layers)
    (tmp_path / "plain").mkdir()
    damage_of(rf"{re.escape(LAYER)}: output channel 4 has 0\.\d+ times", moved, model, tmp_path / "plain", "int4_gptq")


def test_a_norm_that_makes_a_channel_zero(damaged, model, tmp_path):
    def silence(tensors: Tensors) -> None:
        tensors[NORM][7] = 0

    reason = f"{re.escape(NORM)}: multiplies channel 7 by 0, its source does not"
    damage_of(reason, damaged("int4_awq", silence), model, tmp_path, "int4_awq")


def test_scales_of_two_layers_swapped(damaged, model, tmp_path):
    swapped = []

    def swap(tensors: Tensors) -> None:
        scales = sorted((tensors[name].item(), name) for name in tensors if name.endswith(".weight_scale"))
        (_, first), (_, second) = scales[0], scales[-1]
        tensors[first], tensors[second] = tensors[second], tensors[first]
        swapped.extend((first, second))

    folder = damaged("fp8", swap)
    names = "|".join(re.escape(name.removesuffix(".weight_scale")) for name in swapped)
    damage_of(f"({names}): output channel", folder, model, tmp_path, "fp8")


@pytest.mark.parametrize("name", ["nvfp4", "w4a8_awq"])
def test_a_wrong_second_scale(name, damaged, model, tmp_path):
    def shrink(tensors: Tensors) -> None:
        tensors[f"{LAYER}.weight_scale_2"] /= 4

    damage_of(re.escape(LAYER), damaged(name, shrink), model, tmp_path, name)


NORM = "model.layers.1.post_attention_layernorm.weight"


@pytest.mark.parametrize("name", ["int8_sq", "int4_awq", "int4_gptq", "w4a8_awq"])
def test_a_norm_that_was_not_folded(name, damaged, model, tmp_path):
    """Of the norms, the one with the strongest scale: the others' are smaller than what four bits round away."""
    originals = load_file(model / "model.safetensors")
    unfolded = []

    def unfold(tensors: Tensors) -> None:
        norms = [norm for norm in tensors if norm.endswith("_layernorm.weight")]
        strongest = max(norms, key=lambda norm: (tensors[norm].float() / originals[norm].float()).log().std())
        tensors[strongest] = originals[strongest]
        unfolded.append(strongest.removesuffix(".weight"))

    folder = damaged(name, unfold)
    reason = re.escape(unfolded[0].rpartition(".")[0]) + r"\.\S+_proj: "
    if name != "int8_sq":  # there the output channels tell it first
        reason += f"its input channels are .*look at the scale in {re.escape(unfolded[0])}$"
    damage_of(reason, folder, model, tmp_path, name)


def test_one_number_of_a_folded_norm(damaged, model, tmp_path):
    def double(tensors: Tensors) -> None:
        tensors[NORM][7] *= 2

    reason = r"model\.layers\.1\.mlp\.(gate|up)_proj: input channel 7 has (1\.9|2\.0)"
    damage_of(reason, damaged("int4_awq", double), model, tmp_path, "int4_awq")


def test_a_norm_that_no_scale_was_folded_into(damaged, model, tmp_path):
    def double(tensors: Tensors) -> None:
        tensors[NORM][7] *= 2

    reason = f"{re.escape(NORM)}: differs from its source in 1 of 64 numbers"
    damage_of(reason, damaged("int4_rtn", double), model, tmp_path, "int4_rtn")


def test_an_excluded_layer_that_was_not_scaled_back(damaged, model, tmp_path):
    name, settings = "model.layers.1.self_attn.k_proj", {"exclude": ["lm_head", "*.k_proj"]}
    original = load_file(model / "model.safetensors")[f"{name}.weight"]

    def restore(tensors: Tensors) -> None:
        tensors[f"{name}.weight"] = original

    folder = damaged("int4_awq", restore, **settings)
    damage_of(f"{re.escape(name)}: is not its source's weight", folder, model, tmp_path, "int4_awq", **settings)


@pytest.mark.parametrize("name", ["bf16", "int8_wo"])
def test_another_number_in_a_tensor_that_is_not_quantized(name, damaged, model, tmp_path):
    def change(tensors: Tensors) -> None:
        tensors["model.embed_tokens.weight"][3, 5] += 1

    reason = r"model\.embed_tokens\.weight: differs from its source in 1 of"
    damage_of(reason, damaged(name, change), model, tmp_path, name)


def test_a_tensor_in_another_type(damaged, model, tmp_path):
    def widen(tensors: Tensors) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].float()

    damage_of(r"model\.norm\.weight: is torch\.float32", damaged("fp8", widen), model, tmp_path, "fp8")


@pytest.mark.parametrize("extra", [f"{LAYER}.weight_zero_point", f"{LAYER}.input_scale", "model.layers.9.mlp.x.weight"])
def test_a_superfluous_tensor(extra, damaged, model, tmp_path):
    def add(tensors: Tensors) -> None:
        tensors[extra] = torch.ones(1)

    damage_of(f"{re.escape(extra)}: is superfluous", damaged("int8_wo", add), model, tmp_path, "int8_wo")


@pytest.mark.parametrize("equal", [True, False])
def test_a_second_output_head(equal, damaged, model, tmp_path):
    """More than the bytes that were planned with, even where it is the embedding once more."""

    def add(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0 if equal else 1)

    reason = "its tensors take .* bytes" if equal else r"lm_head\.weight: is tied to model\.embed_tokens\.weight"
    damage_of(reason, damaged("int8_wo", add), model, tmp_path, "int8_wo")


@pytest.fixture(scope="module")
def untied(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The model with an output head of its own, and its int8_wo export."""
    from trimtab.components.quantization import work

    base = tmp_path_factory.mktemp("untied")
    folder = shutil.copytree(model, base / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    (base / "export").mkdir()
    trees = (str(folder), None, None, str(base / "export"), str(base / "scratch"))
    work.quantize(*trees, {"format": "int8_wo"})
    return folder, base / "export"


def test_an_output_head_of_its_own(untied, tmp_path):
    check(untied[1], untied[0], tmp_path, "int8_wo")


def test_an_output_head_that_is_missing(untied, tmp_path):
    folder = shutil.copytree(untied[1], tmp_path / "damaged")
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    damage_of(r"lm_head\.weight: is missing", folder, untied[0], tmp_path, "int8_wo")


def test_a_file_cut_short(damaged, model, tmp_path):
    folder = damaged("int4_rtn", lambda _: None)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    reason = r"model\.safetensors: is cut short: .* so model\.layers\.\d.*weight(_scale)? is not whole"
    damage_of(reason, folder, model, tmp_path, "int4_rtn")


def test_a_file_that_no_index_names(damaged, model, tmp_path):
    folder = damaged("int8_wo", lambda _: None)
    save_file({"left.over": torch.zeros(10_000)}, folder / "model-00007-of-00007.safetensors")
    damage_of(r"its tensors take 23\d,\d+ bytes, 191,104 are predicted", folder, model, tmp_path, "int8_wo")
