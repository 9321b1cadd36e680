"""A quantized KV cache: each format rounds as ModelOpt's, and an export runs as the model that was simulated."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from modelopt.torch.quantization.config import QuantizerAttributeConfig
from modelopt.torch.quantization.nn import TensorQuantizer
from modelopt.torch.quantization.qtensor import NVFP4QTensor
from safetensors.torch import load_file, save_file
from transformers import AttentionInterface, LlamaForCausalLM

from trimtab.base.errors import Failure
from trimtab.recipe import Engine as Settings
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.kv_cache import emulated

SETTINGS = Settings(max_seq_len=64, max_num_tokens=256, max_batch_size=2)
RANGE = {"FP8": 448.0, "INT8": 127.0, "NVFP4": 6.0 * 448.0}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
ATTENTION = "model.layers.1.self_attn"


def keys() -> torch.Tensor:
    """[2, 3, 40, 32] with outliers, so that blocks differ by orders of magnitude."""
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 3, 40, 32, generator=generator)
    return x * torch.exp(1.5 * torch.randn(2, 3, 40, 32, generator=generator))


# --- rounding -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [1.0, 0.3], ids=["whole range", "a third clipped"])
@pytest.mark.parametrize(("algorithm", "bits"), [("FP8", (4, 3)), ("INT8", 8)])
def test_eight_bits_round_as_modelopt_does(algorithm, bits, clip):
    x = keys()
    amax = clip * x.abs().max()
    quantizer = TensorQuantizer(QuantizerAttributeConfig(num_bits=bits), amax=amax)
    found = emulated.rounded(algorithm, x, amax.item() / RANGE[algorithm])
    assert torch.allclose(found, quantizer(x), rtol=1e-6)
    assert not torch.equal(found, x)


@pytest.mark.parametrize("room", [1.0, 6.0], ids=["amax / 2688", "amax / 448"])
def test_nvfp4_rounds_as_modelopt_packs_it(room):
    x = keys()
    scale = room * x.abs().max() / RANGE["NVFP4"]
    packed, blocks, scale = NVFP4QTensor.quantize(x.clone(), 16, weights_scaling_factor_2=scale)
    expected = packed.dequantize(scale=blocks, double_scale=scale, block_sizes={-1: 16})
    assert torch.allclose(emulated.rounded("NVFP4", x, scale.item()), expected, rtol=1e-6)


@pytest.mark.parametrize("clip", [1.0, 0.1], ids=["whole range", "blocks clipped"])
def test_nvfp4_by_the_definition(clip):
    """One number at a time, by search among the eight values instead of by arithmetic."""
    x = keys()[0, 0]
    scale = clip * x.abs().max().item() / RANGE["NVFP4"]
    found = emulated.rounded("NVFP4", x, scale)
    for row, given in zip(found, x, strict=True):
        for start in range(0, 32, 16):
            block = given[start : start + 16].double()
            stored = torch.tensor(min(block.abs().max().item() / 6 / scale, 448.0)).to(torch.float8_e4m3fn)
            unit = stored.item() * scale
            for number, value in zip(block.tolist(), row[start : start + 16].tolist(), strict=True):
                nearest = min(E2M1, key=lambda code: abs(abs(number) / unit - code))
                assert value == pytest.approx(math.copysign(nearest, number) * unit, rel=1e-5)


def test_ties_go_to_the_even_code():
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    x = torch.tensor([*middles, *(-m for m in middles), 6.0, 0.0])  # 6 makes the block's scale 1
    expected = [0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0]
    assert emulated.rounded("NVFP4", x, 1.0).tolist() == [*expected, *(-e for e in expected), 6.0, 0.0]
    assert emulated.rounded("INT8", torch.tensor([0.5, 1.5, -2.5]), 1.0).tolist() == [0, 2, -2]


def test_blocks_of_zeros_and_blocks_too_small_for_their_scale_are_zero():
    x = torch.zeros(48)
    x[16:32] = 2**-13  # a sixth of it is less than half of e4m3's least number, 2 ** -9
    x[32:] = 1.0
    assert emulated.rounded("NVFP4", x, 1.0).tolist() == [0.0] * 32 + [pytest.approx(1.0, rel=0.1)] * 16


@pytest.mark.parametrize("algorithm", RANGE)
def test_what_was_rounded_stays_and_the_type_too(algorithm):
    x = keys().bfloat16()
    scale = x.abs().max().item() / RANGE[algorithm]
    once = emulated.rounded(algorithm, x, scale)
    assert once.dtype == torch.bfloat16 and once.shape == x.shape
    # bfloat16 has fewer digits than a code times its scale, so a code may come back a bit beside itself
    assert torch.allclose(emulated.rounded(algorithm, once, scale).float(), once.float(), rtol=0.01)


# --- exports --------------------------------------------------------------------------------------------------


def engine(folder: Path, **options: Any) -> TorchEngine:
    return TorchEngine(folder, SETTINGS, "cpu", **options)


def modelopt_attention(algorithm: str):
    """Attention by the textbook in the model's type, on keys and values that ModelOpt rounded."""

    def rounded(x: torch.Tensor, amax: float) -> torch.Tensor:
        if algorithm == "NVFP4":
            scale = torch.tensor(amax / RANGE["NVFP4"])
            packed, blocks, scale = NVFP4QTensor.quantize(x.float().clone(), 16, weights_scaling_factor_2=scale)
            return packed.dequantize(scale=blocks, double_scale=scale, block_sizes={-1: 16}).to(x.dtype)
        bits = {"FP8": (4, 3), "INT8": 8}[algorithm]
        return TensorQuantizer(QuantizerAttributeConfig(num_bits=bits), amax=torch.tensor(amax))(x)

    def attend(module, query, key, value, attention_mask, scaling, **_):
        seen = module.seen  # measured in a first pass, used in the second
        if isinstance(seen, list):
            seen.append((key.abs().max().item(), value.abs().max().item()))
        else:
            key, value = rounded(key, seen[0]), rounded(value, seen[1])
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        length = query.shape[2]
        scores = query @ key.transpose(2, 3) * scaling
        scores = scores.masked_fill(torch.ones(length, length, dtype=torch.bool).triu(1), -math.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    return attend


@pytest.fixture(scope="module")
def simulated(plain_folder: Path, windows: torch.Tensor, tmp_path_factory: pytest.TempPathFactory):
    """A function: algorithm -> an export with calibrated scales, and its simulation in float32."""

    def make(algorithm: str) -> tuple[Path, LlamaForCausalLM]:
        AttentionInterface.register(f"modelopt_{algorithm}", modelopt_attention(algorithm))
        model = LlamaForCausalLM.from_pretrained(plain_folder, dtype=torch.float32).eval()
        model.set_attn_implementation(f"modelopt_{algorithm}")
        layers = {f"model.layers.{n}.self_attn": block.self_attn for n, block in enumerate(model.model.layers)}
        for module in layers.values():
            module.seen = []
        with torch.inference_mode():
            model(windows)
        for module in layers.values():
            (module.seen,) = module.seen
        scales = [
            {name: module.seen[part] / RANGE[algorithm] for name, module in layers.items()} for part in (0, 1)
        ]
        folder = tmp_path_factory.mktemp(algorithm)
        return tiny.write_kv_cache(plain_folder, folder, algorithm, *scales), model

    return make


@pytest.mark.parametrize("algorithm", RANGE)
@torch.inference_mode()
def test_an_export_computes_what_modelopt_rounds(simulated, plain_folder, windows, algorithm):
    """At least as close to the simulation in float32 as the same simulation in bfloat16, and not to the plain model."""
    folder, reference = simulated(algorithm)
    truth = reference(windows).logits
    in_bfloat16 = copy.deepcopy(reference).bfloat16()(windows).logits.float()
    loaded = engine(folder)
    assert {module.kv_cache[0] for module in loaded.model.modules() if hasattr(module, "kv_cache")} == {algorithm}
    error = (loaded.model(windows).logits.float() - truth).square().mean().sqrt()
    assert error < 1.2 * (in_bfloat16 - truth).square().mean().sqrt()
    if algorithm == "NVFP4":  # eight bits are as fine as bfloat16's own rounding here
        assert error < 0.8 * (engine(plain_folder).model(windows).logits.float() - truth).square().mean().sqrt()


@pytest.mark.parametrize("algorithm", RANGE)
@torch.inference_mode()
def test_an_export_without_its_kv_cache_is_the_model_itself(plain_folder, windows, tmp_path, algorithm):
    ruined = tiny.write_kv_cache(plain_folder, tmp_path, algorithm, 1e-5, 1e-5)
    plain = engine(plain_folder).model(windows).logits
    assert torch.equal(engine(ruined, kv_cache="none").model(windows).logits, plain)
    assert not torch.allclose(engine(ruined).model(windows).logits, plain, atol=0.5)


@pytest.mark.parametrize("algorithm", RANGE)
def test_decoding_reads_what_prefill_read(simulated, algorithm):
    """Greedy decoding with a cache ends as it does when every step computes the whole sequence anew."""
    loaded = engine(simulated(algorithm)[0])
    prompt = [5, 17, 99, 23, 64]
    with torch.inference_mode():
        tokens = list(prompt)
        for _ in range(6):
            tokens.append(loaded.model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax().item())
    answer = loaded.generate([prompt], 6)[0]
    assert answer == tokens[len(prompt) :][: len(answer)] and answer


def changed(source: Path, target: Path, change: Any) -> Path:
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


K_SCALE, V_SCALE = f"{ATTENTION}.k_proj.k_scale", f"{ATTENTION}.v_proj.v_scale"
DAMAGE = {
    "missing": (lambda t: t.pop(K_SCALE), f"{K_SCALE}: is missing, and a KV cache in "),
    "nan": (lambda t: t[V_SCALE].fill_(math.nan), f"{V_SCALE}: is nan, not finite and positive"),
    "infinite": (lambda t: t[K_SCALE].fill_(math.inf), f"{K_SCALE}: is inf, not finite and positive"),
    "zero": (lambda t: t[V_SCALE].zero_(), f"{V_SCALE}: is 0.0, not finite and positive"),
    "several": (lambda t: t.update({K_SCALE: torch.ones(2)}), rf"{K_SCALE}: has shape \[2\], expected one number"),
}


@pytest.mark.parametrize("algorithm", RANGE)
@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_scale_is_refused_and_named(plain_folder, tmp_path, case, algorithm):
    change, reason = DAMAGE[case]
    folder = changed(tiny.write_kv_cache(plain_folder, tmp_path / "a", algorithm, 0.1, 0.1), tmp_path / "b", change)
    if (case, algorithm) == ("missing", "FP8"):  # TensorRT-LLM takes it for 1, and so does this
        layer = engine(folder).model.get_submodule(ATTENTION)
        assert layer.kv_cache == ("FP8", 1.0, pytest.approx(0.1))
        return
    with pytest.raises(Failure, match=reason) as caught:
        engine(folder)
    assert caught.value.failure_class == "export_damaged"


def test_an_unknown_kv_cache_is_unsupported(plain_folder, tmp_path):
    folder = tiny.write_kv_cache(plain_folder, tmp_path, "NVFP4_AFFINE", 0.1, 0.1)
    reason = "a KV cache in NVFP4_AFFINE does not run on the torch engine; known: FP8, INT8, NVFP4"
    with pytest.raises(Failure, match=reason) as caught:
        engine(folder)
    assert caught.value.failure_class == "unsupported"


def test_blocks_that_do_not_divide_a_head_are_unsupported(tmp_path):
    source = tiny.write_model(tmp_path / "model", hidden=96)  # four heads of 24
    folder = tiny.write_kv_cache(source, tmp_path / "export", "NVFP4", 0.1, 0.1)
    reason = r"layers\.0\.self_attn has heads of 24, which blocks of 16 do not divide"
    with pytest.raises(Failure, match=reason) as caught:
        engine(folder)
    assert caught.value.failure_class == "unsupported"
    engine(tiny.write_kv_cache(source, tmp_path / "int8", "INT8", 0.1, 0.1))


@pytest.mark.parametrize(
    ("scheme", "algorithm"),
    [
        ({"dynamic": False, "num_bits": 8, "type": "float"}, "FP8"),
        ("NVFP4", None),  # TensorRT-LLM reads it in hf_quant_config.json only
        (None, None),
    ],
)
def test_the_kv_cache_of_a_config_without_hf_quant_config(plain_folder, tmp_path, scheme, algorithm):
    folder = shutil.copytree(plain_folder, tmp_path / "export")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_scheme": scheme}
    (folder / "config.json").write_text(json.dumps(config))
    assert Export(folder).kv_cache_algo == algorithm
