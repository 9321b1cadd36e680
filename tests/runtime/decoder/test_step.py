"""A step of its own gives the logits and tokens of the model's forward pass; test_cuda.py runs it with its kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedModel

from trimtab.runtime.decoder import decode, step
from trimtab.runtime.decoder.assemble import assemble
from trimtab.runtime.decoder.decode import Growing, Stepping
from trimtab.runtime.decoder.step import DecodingStep
from trimtab.runtime.kernels import replacements
from trimtab.runtime.linear import small_batch
from trimtab.runtime.service.paged_engine import PagedEngine

CPU = torch.device("cpu")
SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILY = {
    "Llama": {"rope_parameters": LLAMA3},
    "Mistral": {"sliding_window": 4096, "head_dim": 32},
    "Qwen2": {},
    "Qwen3": {"head_dim": 32},
}


def make(name: str, **changes: Any) -> PreTrainedModel:
    """A random model of a class, in bfloat16, with its norms replaced as the engines do it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | changes)
    model = getattr(transformers, f"{name}ForCausalLM")(config).bfloat16().eval().requires_grad_(False)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("bias") or "norm" in parameter_name:
            parameter.add_(0.3 * torch.randn(parameter.shape))
    replacements.fuse_norms(model)
    return model


@pytest.mark.parametrize("name", list(FAMILY))
@torch.inference_mode()
def test_the_llama_family_has_a_step(name: str, windows: torch.Tensor) -> None:
    model = make(name, **FAMILY[name])
    found = step.build(model, 64)
    assert isinstance(found, DecodingStep)
    decoder, growing = Stepping(found, model, 6, 8, 12), Growing(model)
    for prompt in (windows[:, :8], windows[:, 8:16]):  # the second finds nothing left of the first
        decoder.prefill(prompt)
        growing.prefill(prompt)
        tokens = growing.steps(12)
        logits = []
        decoder.steps(12, lambda seen: logits.append(seen.float()) or tokens[:, len(logits) - 1 :][:, :1])  # noqa: B023
        growing.prefill(prompt)
        expected = []
        growing.steps(12, lambda seen: expected.append(seen.float()) or tokens[:, len(expected) - 1 :][:, :1])  # noqa: B023
        for a, b in zip(logits, expected, strict=True):
            assert (a - b).norm() <= 0.03 * b.norm()


@pytest.mark.parametrize("name", ["bf16", "int8_wo", "fp8_kv", "int4_awq_g32"])
@pytest.mark.parametrize("fuse", [True, False])
@torch.inference_mode()
def test_an_export_has_a_step(name: str, fuse: bool, plain_folder: Path, exported: Any) -> None:
    model = assemble(plain_folder if name == "bf16" else exported(name).folder, CPU, fuse=fuse)
    assert step.build(model, 64) is None  # for the norms are not replaced
    replacements.fuse_norms(model)
    found = step.build(model, 64)
    assert isinstance(found, DecodingStep)
    assert step.disagreement(model, found, 64) == ""


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("Gemma", {"head_dim": 16}, "of another family than Llama's"),
        ("Granite", {}, "of another family than Llama's"),
        ("SmolLM3", {"no_rope_layers": [1, 0], "pad_token_id": 0}, "block 1 has no rotary embedding"),
        ("Mistral", {"sliding_window": 32}, "looks at 32 tokens alone"),
        ("Llama", {"hidden_act": "gelu"}, "the activation GELU"),
        ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "of type dynamic"),
    ],
)
def test_what_is_built_another_way_has_none(name: str, changes: dict[str, Any], reason: str) -> None:
    model = make(name, **changes)
    assert reason in step.refusal(model, 64)
    assert step.build(model, 64) is None


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("Gemma", {"head_dim": 16}, "norms of another kind"),
        ("Gemma2", {"head_dim": 16}, "is built another way"),
        ("Olmo2", {}, "is built another way"),
        ("Qwen3", {"head_dim": 16}, "has other layers"),
    ],
)
def test_modules_show_what_only_calls_itself_a_llama(name: str, changes: dict[str, Any], reason: str) -> None:
    model = make(name, **changes)
    model.config.model_type = "llama"
    assert reason in step.refusal(model, 64)


def test_a_model_that_computes_something_else_has_none(capsys: pytest.CaptureFixture[str]) -> None:
    """Granite's modules are Llama's, but it scales what its blocks add."""
    model = make("Granite", residual_multiplier=0.3, embedding_multiplier=3.0)
    model.config.model_type = "llama"
    assert step.refusal(model, 64) == ""
    assert step.build(model, 64) is None
    assert "GraniteForCausalLM gives other logits" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fp8_kv", "int8_sq"])
@torch.inference_mode()
def test_another_model_is_told_from_rounding(name: str, exported: Any) -> None:
    model, other = (assemble(exported(name).folder, CPU) for _ in range(2))
    other.model.layers[0].post_attention_layernorm.weight.mul_(1.5)
    for one in (model, other):
        replacements.fuse_norms(one)
    assert step.disagreement(model, DecodingStep(model, 64), 64) == ""
    assert "other logits" in step.disagreement(model, DecodingStep(other, 64), 64)


@torch.inference_mode()
def test_products_are_used_for_the_rows_that_they_were_chosen_for(plain_folder: Path) -> None:
    model = assemble(plain_folder, CPU)
    replacements.fuse_norms(model)
    layers, used = step.layers(model), []
    assert len(layers) == 2 * 4 + 1
    assert all(small_batch.operands(layer) for layer in layers)

    def noting(layer: torch.nn.Module, name: str) -> Any:
        return lambda x: used.append(name) or layer(x)

    names = {1: "one", 3: "few"}
    chosen = {x: small_batch.Chosen(x, [(rows, noting(x, name)) for rows, name in names.items()]) for x in layers}
    found = DecodingStep(model, 64, products=chosen)
    for batch, expected in ((1, ["one"]), (2, ["few"]), (3, ["few"]), (4, [])):
        used.clear()
        decoder = Stepping(found, model, batch, 4, 4)
        decoder.prefill(torch.ones(batch, 4, dtype=torch.int64))
        decoder.steps(1)
        assert used == expected * len(layers)


@torch.inference_mode()
def test_the_server_decodes_by_the_same_step(plain_folder: Path, windows: torch.Tensor) -> None:
    from trimtab.recipe import Engine

    settings = Engine(max_batch_size=4, max_seq_len=64)
    prompts = [row[: 5 + number].tolist() for number, row in enumerate(windows)]
    expected = PagedEngine(plain_folder, settings, "cpu").generate(prompts, 10)
    engine = PagedEngine(plain_folder, settings, "cpu")
    replacements.fuse_norms(engine.model)
    asked = []
    own = DecodingStep(engine.model, 64)
    engine._forward.step = lambda *args: asked.append(1) or own(*args)
    found = engine.generate(prompts, 10)
    assert len(asked) > 5
    same = [a == b for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=False)]
    assert sum(same) > 0.8 * len(same)  # bfloat16 may settle a tie another way


def test_a_gpu_that_cannot_record_a_step_records_transformers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, made = make("Llama"), []
    monkeypatch.setattr(type(model), "device", torch.device("cuda"), raising=False)

    class Broken:
        def __init__(self, *_: Any):
            raise RuntimeError("a kernel that no card has")

    class Fine:
        def __init__(self, *_: Any):
            made.append(self)

        def capture(self, agree: Any) -> None:
            pass

    monkeypatch.setattr(decode, "Stepping", Broken)
    monkeypatch.setattr(decode, "Static", Fine)
    assert decode.decoder(model, 1, 4, 4, step=object()) is made[0]
    assert "could not be recorded: RuntimeError: a kernel that no card has" in capsys.readouterr().err
