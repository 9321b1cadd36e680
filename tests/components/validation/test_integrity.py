"""A clean export passes; an export with one seeded fault is refused, and the layer is named."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from trimtab.base.errors import Failure
from trimtab.catalog.formats import FORMATS
from trimtab.components.validation.evaluation.generation import PROMPTS, is_degenerate
from trimtab.components.validation.integrity import reload
from trimtab.components.validation.integrity.gate import inspect
from trimtab.recipe import Quantization
from trimtab.runtime.engines import kept

#: Format -> what else its recipe asks for.
SETTINGS = dict.fromkeys(FORMATS, {}) | {
    "fp8": {"kv_cache": "fp8"},
    "int4_awq": {"exclude": ["lm_head", "*.k_proj"]},
    "int4_gptq": {"exclude_sensitive": 2},
    "nvfp4": {"kv_cache": "nvfp4"},
    "nvfp4_wo": {"exclude": ["lm_head", "*.v_proj", "*.up_proj"]},
    "mixed_gpu": {"effective_bits": 6},
    "mixed_fp4": {"effective_bits": 6, "max_time": 0.6, "step_tokens": 1000},
    "mixed": {"effective_bits": 5.5},
    "bf16": {"kv_cache": "int8"},
}
LAYER = "model.layers.1.mlp.down_proj"
Tensors = dict[str, torch.Tensor]


def check(
    export: Path, model: Path, folder: Path, name: str, calibration: Path | None = None, **settings
) -> dict[str, Any]:
    output = folder / "output"
    output.mkdir()
    parameters = {"format": name, "group_size": 32, **settings}
    weighed = str(calibration) if calibration and Quantization.model_validate(parameters).needs_statistics else None
    return inspect(str(export), str(model), str(output), "", parameters, weighed)


@pytest.mark.slow
@pytest.mark.parametrize("name", SETTINGS)
def test_clean(name, export, model, calibration, tmp_path):
    metrics = check(export(name, **SETTINGS[name]), model, tmp_path, name, calibration, **SETTINGS[name])
    layers = json.loads((tmp_path / "output" / "layers.json").read_text())
    reloaded = json.loads((tmp_path / "output" / "reload.json").read_text())
    assert reloaded["skipped"] is None and len(reloaded["outputs"]) == len(PROMPTS) and metrics["reload_skipped"] == ""
    assert metrics["tensor_bytes"] == pytest.approx(metrics["predicted_bytes"], rel=0.035)
    if FORMATS[name].is_cast:
        assert not layers and metrics["quantized_share"] == 1
        return
    parts = [FORMATS[part].storage for part in FORMATS[name].mixes or (name,)]
    excluded = len(SETTINGS[name].get("exclude", ())) > 2  # up_proj among them
    assert metrics["quantized_share"] < (0.30 if parts[0].bits == 4 and len(parts) == 1 and not excluded else 0.54)
    assert 0 < metrics["max_relative_error"] < (0.2 if any(part.bits == 4 for part in parts if part) else 0.05)
    assert len(layers) >= 4 * 7 - 8 and all(layer["cosine"] > 0.95 for layer in layers)


def test_a_model_that_is_not_quantized(model, tmp_path):
    (tmp_path / "output").mkdir()
    metrics = inspect(str(model), str(model), str(tmp_path / "output"), "", {})
    assert metrics["quantized_share"] == 1 and metrics["bytes"] > metrics["tensor_bytes"] > 0


def test_a_model_that_stores_more_than_is_read(model, tmp_path):
    """The embedding once more as a tied head, and what transformers computes: neither is damage of a model unchanged,
    and both are left out of its export."""
    from trimtab.components.quantization.work import quantize

    old = shutil.copytree(model, tmp_path / "old")
    tensors = load_file(old / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(tensors, old / "model.safetensors", {"format": "pt"})
    (tmp_path / "output").mkdir()
    inspect(str(old), str(old), str(tmp_path / "output"), "", {})
    export = tmp_path / "export"
    export.mkdir()
    quantize(str(old), None, None, str(export), str(tmp_path / "scratch"), {"format": "int8_wo"})
    (tmp_path / "output").rename(tmp_path / "first")
    check(export, old, tmp_path, "int8_wo")
    assert not {"lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"} & {
        *load_file(export / "model.safetensors")
    }


@pytest.mark.parametrize("settings", [{}, {"format": "int8_wo"}], ids=["as it is", "int8_wo"])
def test_a_sparse_model_passes(settings, model, calibration, tmp_path):
    from trimtab.components.pruning.work import prune
    from trimtab.components.quantization.work import quantize

    folders = {name: tmp_path / name for name in ("sparse", "quantized", "output")}
    for folder in folders.values():
        folder.mkdir()
    sparse, quantized, output = map(str, folders.values())
    scratch = str(tmp_path / "scratch")
    prune(str(model), str(calibration), sparse, scratch, {"method": "wanda", "pattern": "2:4"})
    if settings:
        quantize(sparse, str(calibration), None, quantized, scratch, settings)  # as the pipeline has it
    metrics = inspect(quantized if settings else sparse, sparse, output, "", settings)
    assert metrics["reload_skipped"] == "" and (metrics["quantized_share"] == 1) == (not settings)


# --- tensors ----------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(export: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """A function: format and fault -> a copy of its export, its tensors changed by the fault."""

    def damage(name: str, fault: Callable[[Tensors], None], **settings) -> Path:
        folder = shutil.copytree(export(name, **settings), tmp_path / "damaged")
        path = folder / "model.safetensors"
        tensors = load_file(path)
        fault(tensors)
        save_file(tensors, path, metadata={"format": "pt"})
        return folder

    return damage


def damage_of(reason: str, folder: Path, model: Path, tmp_path: Path, name: str, **settings) -> None:
    with pytest.raises(Failure, match=reason) as caught:
        check(folder, model, tmp_path, name, **settings)
    assert caught.value.failure_class == "export_damaged"


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
    statistics[f"{LAYER}.second_moment"][32:64] *= 1e-4
    save_file(statistics, quiet / "statistics.safetensors")
    check(moved, model, tmp_path, "int4_gptq", quiet)
    layers = json.loads((tmp_path / "output" / "layers.json").read_text())
    assert all(0 < layer["weighted_error"] < 0.3 for layer in layers)
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


# --- coverage ---------------------------------------------------------------------------------------------------


def test_a_layer_that_was_left_unquantized(export, model, tmp_path):
    folder = export("int8_wo", exclude=["lm_head", "*.down_proj"])
    left = r"model\.layers\.0\.mlp\.down_proj: is not quantized \(4 layers in all\)"
    damage_of(left, folder, model, tmp_path, "int8_wo")


def test_patterns_match_whole_names(export, model, tmp_path):
    """'down_proj' without a star names no layer, so all are to be quantized."""
    folder = export("int8_wo", exclude=["lm_head", "*.down_proj"])
    damage_of("down_proj: is not quantized", folder, model, tmp_path, "int8_wo", exclude=["lm_head", "down_proj"])


def test_a_layer_that_should_not_be_quantized(export, model, tmp_path):
    reason = r"model\.layers\.0\.mlp\.down_proj: is quantized \(W8A16\), the recipe asks for int8_wo without it"
    damage_of(reason, export("int8_wo"), model, tmp_path, "int8_wo", exclude=["lm_head", "*.down_proj"])


def test_a_cast_that_is_quantized(export, model, tmp_path):
    reason = r"is quantized \(FP8\), the recipe asks for no quantized layer"
    damage_of(reason, export("fp8"), model, tmp_path, "bf16")


@pytest.mark.parametrize(("made", "asked"), [(1, 2), (2, 1), (0, 1), (1, 0)])
def test_another_number_of_groups_left_out(made, asked, export, model, tmp_path):
    folder = export("int4_rtn", exclude_sensitive=made)
    reason = rf"{made} groups of layers are not quantized.*, the recipe leaves {asked} out"
    if not asked:
        reason = r"model\.layers\.\d\.\S+: is not quantized \(\d layers? in all\)"
    damage_of(reason, folder, model, tmp_path, "int4_rtn", exclude_sensitive=asked)


def test_one_layer_of_a_group_left_out(export, model, tmp_path):
    folder = export("int4_rtn", exclude=["lm_head", "*.1.self_attn.k_proj"])
    reason = r"model\.layers\.1\.self_attn\.k_proj: is not quantized"
    damage_of(reason, folder, model, tmp_path, "int4_rtn", exclude_sensitive=1)


@pytest.mark.parametrize(("made", "asked"), [("int8_wo", "int4_rtn"), ("int8_sq", "int8_wo"), ("nvfp4", "mxfp4")])
def test_another_format_than_asked_for(made, asked, export, model, tmp_path):
    reason = rf"model\.layers\.0\.mlp\.down_proj: is stored as \S+, {asked} is "
    damage_of(reason, export(made), model, tmp_path, asked)


def test_mixed_over_its_budget(export, model, tmp_path):
    folder = export("mixed", effective_bits=6.5)
    reason = r"weights have 6\.\d+ bits in the mean, the recipe allows 5\.5; model\.layers\.\S+ is one of those with 8"
    damage_of(reason, folder, model, tmp_path, "mixed", effective_bits=5.5)


def test_another_type_than_asked_for(export, model, tmp_path):
    damage_of("config.json: dtype is 'float16', fp32 has 'float32'", export("fp16"), model, tmp_path, "fp32")


# --- what the files say ------------------------------------------------------------------------------------------


def edited(export: Path, folder: Path, own: Callable[[dict], Any], flat: Callable[[dict], Any]) -> Path:
    """A copy of an export with changes to hf_quant_config.json's settings and to those of config.json."""
    copy = shutil.copytree(export, folder / "edited")
    path = copy / "hf_quant_config.json"
    document = json.loads(path.read_text())
    own(document["quantization"])
    path.write_text(json.dumps(document))
    path = copy / "config.json"
    document = json.loads(path.read_text())
    flat(document["quantization_config"])
    path.write_text(json.dumps(document))
    return copy


def same(_: dict) -> None:
    pass


SAYS = "hf_quant_config.json says .*, config.json says"
DISAGREE = {
    "quant_algo": ("int8_wo", same, lambda c: c.update(quant_algo="FP8"), f"quant_algo: {SAYS} 'FP8'"),
    "group size": (
        "nvfp4", same, lambda c: c["config_groups"]["group_0"]["weights"].update(group_size=32),
        f"group_size: {SAYS} 32",
    ),
    "excluded": ("int8_wo", lambda c: c.update(exclude_modules=[]), same, "the excluded modules: "),
    "KV cache": ("fp8", same, lambda c: c.pop("kv_cache_scheme"), f"the KV cache: {SAYS} None"),
    "KV cache by name": (
        "nvfp4", same, lambda c: c.update(kv_cache_scheme={"type": "float", "num_bits": 8}), "the KV cache: ",
    ),
    "a layer": (
        "mixed", lambda c: c["quantized_layers"].pop(LAYER), same, f"{re.escape(LAYER)}: {SAYS}",
    ),
    "method": ("fp8", same, lambda c: c.update(quant_method="gptq"), "quant_method is 'gptq', not 'modelopt'"),
}  # fmt: skip


@pytest.mark.parametrize("case", DISAGREE)
def test_two_configs_that_disagree(case, export, model, tmp_path):
    name, own, flat, reason = DISAGREE[case]
    folder = edited(export(name, **SETTINGS[name]), tmp_path, own, flat)
    damage_of(reason, folder, model, tmp_path, name, **SETTINGS[name])


def test_a_wrong_group_size_in_the_config(export, model, tmp_path):
    folder = edited(export("int4_rtn"), tmp_path, lambda c: c.update(group_size=64), same)
    reason = r"model\.layers\.0\.mlp\.down_proj: has groups of 64, the recipe asks for 32"
    damage_of(reason, folder, model, tmp_path, "int4_rtn")


def test_a_lost_kv_cache(export, model, tmp_path):
    def lose(settings: dict) -> None:
        settings.pop("kv_cache_quant_algo", None)
        settings.pop("kv_cache_scheme", None)

    folder = edited(export("fp8", **SETTINGS["fp8"]), tmp_path, lose, lose)
    reason = r"model\.layers\.0\.self_attn \(4 layers in all\): the export says 16 bits of its KV cache"
    damage_of(reason, folder, model, tmp_path, "fp8", **SETTINGS["fp8"])


@pytest.mark.parametrize("lost", ["hf_quant_config.json", "config.json"])
def test_a_config_that_says_nothing(lost, export, model, tmp_path):
    folder = shutil.copytree(export("fp8"), tmp_path / "edited")
    if lost == "config.json":
        config = json.loads((folder / lost).read_text())
        del config["quantization_config"]
        (folder / lost).write_text(json.dumps(config))
    else:
        (folder / lost).unlink()
    damage_of(f"{lost} says nothing of the quantization", folder, model, tmp_path, "fp8")


def test_a_config_of_another_model(export, model, tmp_path):
    folder = shutil.copytree(export("fp8"), tmp_path / "edited")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.1}))
    damage_of("config.json: rms_norm_eps is 0.1, its source's", folder, model, tmp_path, "fp8")


@pytest.mark.parametrize(("key", "value"), [("rope_theta", 5.0), ("rope_parameters", {"rope_theta": 5.0})])
def test_a_setting_that_only_some_engines_read(key, value, export, model, tmp_path):
    """Each spelling is the source's: transformers 5 reads one of the two, TensorRT-LLM may read the other."""
    folder = shutil.copytree(export("fp8"), tmp_path / "damaged")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: value}))
    damage_of(f"config.json: {key} is .*5.0.*, its source's", folder, model, tmp_path, "fp8")


def test_an_export_in_one_spelling_alone_passes(export, model, tmp_path):
    """As ModelOpt writes it."""
    folder = shutil.copytree(export("fp8"), tmp_path / "alone")
    config = json.loads((folder / "config.json").read_text())
    kept = {name: value for name, value in config.items() if name not in ("rope_theta", "rope_scaling", "torch_dtype")}
    assert len(kept) == len(config) - 3
    (folder / "config.json").write_text(json.dumps(kept))
    check(folder, model, tmp_path, "fp8")


# --- loading ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that writes."""
    folder = tiny.write_model(tmp_path_factory.mktemp("talker") / "model", layers=1)
    assert reload.check(folder, folder)["skipped"] is None
    return folder


def counting(folder: Path) -> Path:
    """A model that writes the next token of its vocabulary behind each: no repetition, and no tie for sums to break."""
    tiny.write_model(folder, layers=1, family="mistral")
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name].zero_()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].roll(1, 0)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def silenced(talker: Path, folder: Path, **changes: float) -> Path:
    """A copy whose blocks do nothing, so that each token's embedding is likest to itself."""
    copy = shutil.copytree(talker, folder / "silenced")
    tensors = load_file(copy / "model.safetensors")
    for name in tensors:
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name].zero_()
    if "lm_head.weight" in tensors:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    for name, value in changes.items():
        tensors[name].fill_(value)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy


def test_text_that_became_a_repetition(tmp_path):
    source = counting(tmp_path / "source")
    with pytest.raises(Failure, match="all that it writes is empty or a repetition, after 'The capital") as caught:
        reload.check(silenced(source, tmp_path), source)
    assert caught.value.failure_class == "export_damaged"


def test_a_kv_cache_that_ruins_the_text_is_left_to_the_evaluation(talker, tmp_path):
    folder = tiny.write_kv_cache(talker, tmp_path / "cached", "FP8", 1e-9, 1e-9)
    outputs = reload.check(folder, talker)["outputs"]
    assert outputs != reload.check(talker, talker)["outputs"]


def test_a_source_whose_own_text_is_a_repetition_acquits(talker, tmp_path):
    folder = silenced(talker, tmp_path)
    outputs = reload.check(folder, folder)["outputs"]
    assert all(is_degenerate(list(text.encode())) for text in outputs.values())


def test_logits_that_are_no_numbers(talker, tmp_path):
    folder = silenced(talker, tmp_path, **{"model.norm.weight": torch.inf})
    with pytest.raises(Failure, match="its logits after 'The capital of France is' are not all finite"):
        reload.check(folder, talker)


def test_what_the_engine_cannot_run_is_said(talker, monkeypatch, tmp_path):
    def unsupported(*_: Any) -> None:
        raise Failure("unsupported", "a head that caps its logits")

    monkeypatch.setattr(kept, "loaded", unsupported)
    folder = shutil.copytree(talker, tmp_path / "copy")
    (tmp_path / "output").mkdir()
    metrics = inspect(str(folder), str(talker), str(tmp_path / "output"), "", {})
    assert metrics["reload_skipped"] == "a head that caps its logits"
    assert json.loads((tmp_path / "output" / "reload.json").read_text())["skipped"] == metrics["reload_skipped"]


# --- the KV cache ---------------------------------------------------------------------------------------------

ATTENTION = "model.layers.2.self_attn"
K_SCALE, V_SCALE = f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale"
ALGORITHMS = {"fp8": "FP8", "int8": "INT8", "nvfp4": "NVFP4"}


@pytest.fixture
def cached(damaged: Callable[..., Path]) -> Callable[..., Path]:
    """A function: recipe's KV cache -> the model in 16 bits with that KV cache, its tensors changed by `fault`."""
    return lambda kv_cache, fault=lambda _: None: damaged("bf16", fault, kv_cache=kv_cache)


def refused(folder: Path, model: Path, tmp_path: Path, asked: str) -> str:
    with pytest.raises(Failure) as caught:
        check(folder, model, tmp_path, "bf16", kv_cache=asked)
    assert caught.value.failure_class == "export_damaged"
    return caught.value.reason


@pytest.mark.parametrize("kv_cache", ALGORITHMS)
def test_a_kv_cache_as_asked_for(kv_cache, cached, model, tmp_path):
    check(cached(kv_cache), model, tmp_path, "bf16", kv_cache=kv_cache)


@pytest.mark.parametrize("asked", ["none", *ALGORITHMS])
@pytest.mark.parametrize("found", ["none", *ALGORITHMS])
def test_another_kv_cache_than_asked_for(asked, found, cached, export, model, tmp_path):
    folder = export("bf16") if found == "none" else cached(found)
    if asked == found:
        check(folder, model, tmp_path, "bf16", kv_cache=asked)
        return
    says = ALGORITHMS.get(found, "16 bits")
    where = "model.layers.0.self_attn (4 layers in all)"
    reason = f"{where}: the export says {says} of its KV cache, the recipe asks for {asked}"
    assert refused(folder, model, tmp_path, asked) == reason


def test_modelopt_leaves_no_calibrated_scale_out(export, model, tmp_path):
    """However small: a tiny model's keys are far below 448, where the scale would be 1."""
    folder = export("fp8", kv_cache="fp8")
    check(folder, model, tmp_path, "fp8", kv_cache="fp8")
    tensors = load_file(folder / "model.safetensors")
    assert 0 < tensors[K_SCALE] < 0.5 and 0 < tensors[V_SCALE] < 0.5


def test_a_kv_cache_of_a_recipe_that_quantizes_nothing(cached, model, tmp_path):
    (tmp_path / "output").mkdir()
    with pytest.raises(Failure, match="the export says FP8 of its KV cache, the recipe asks for none"):
        inspect(str(cached("fp8")), str(model), str(tmp_path / "output"), "", {})


def without_keys(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[K_SCALE]


def without_values(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[V_SCALE]


def without_any(tensors: dict[str, torch.Tensor]) -> None:
    for name in [name for name in tensors if name.endswith("_scale")]:
        del tensors[name]


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    tensors[K_SCALE].fill_(torch.inf)


def not_positive(tensors: dict[str, torch.Tensor]) -> None:
    tensors[V_SCALE].neg_()


def one_a_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors[K_SCALE] = torch.ones(2)


KV_FAULTS = {
    without_keys: f"{K_SCALE}: is missing",
    without_values: f"{V_SCALE}: is missing",
    without_any: "model.layers.0.self_attn.k_proj.k_scale: is missing",
    not_finite: f"{K_SCALE}: is inf",
    not_positive: f"{V_SCALE}: is -0.0",
    one_a_head: f"{K_SCALE}: has shape [2]",
}


@pytest.mark.parametrize("kv_cache", ALGORITHMS)
@pytest.mark.parametrize("fault", KV_FAULTS, ids=[fault.__name__ for fault in KV_FAULTS])
def test_seeded_faults_of_the_kv_cache(fault, kv_cache, cached, model, tmp_path):
    assert refused(cached(kv_cache, fault), model, tmp_path, kv_cache).startswith(KV_FAULTS[fault])
