"""An export that is not what its recipe asks for is refused."""

from __future__ import annotations

import pytest

from .conftest import damage_of


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
