"""Every family's likelihoods in the torch engine, against transformers' logits: both in float32."""

from __future__ import annotations

from pathlib import Path

import decoders
import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM

from trimtab import families
from trimtab.components.distillation.text import generation
from trimtab.recipe import Engine
from trimtab.runtime.decoder import decode
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.linear import cpu_products

#: Three windows long, and behind what the caps, multipliers and blocks without positions of `decoders` change.
LENGTH = 48
#: Nats a token, of the likelihoods that issue 16 asks for.
NEAR = 5e-4


@pytest.fixture
def in_float32(monkeypatch: pytest.MonkeyPatch):
    """A function: folder -> its engine, which computes in float32 what it holds in bfloat16."""
    monkeypatch.setattr(cpu_products, "dtype", lambda: torch.float32)

    def open_engine(folder: Path) -> TorchEngine:
        engine = TorchEngine(folder, Engine(max_seq_len=128, max_num_tokens=256, max_batch_size=4), device="cpu")
        engine.model.float()
        return engine

    return open_engine


@torch.inference_mode()
def test_a_rounded_kv_cache_is_read_by_attention_that_caps_its_scores(in_float32, tmp_path: Path) -> None:
    source = decoders.write(tmp_path / "source", "gemma2")
    folder = tiny.write_kv_cache(source, tmp_path / "int8", "INT8", 0.05, 0.05)
    tokens = torch.randint(3, 300, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    capped, uncapped = (
        AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation=how)(tokens).logits
        for how in ("eager", "sdpa")
    )
    found = in_float32(folder).model(tokens).logits
    assert not torch.equal(found, in_float32(source).model(tokens).logits)
    assert (found - capped).norm() < 0.1 * (uncapped - capped).norm()


#: Wrappers are in `tests/components/test_wrapped_models.py`.
TYPES = [name for name, family in families.BY_TYPE.items() if not family.wrapper]


@pytest.mark.parametrize("model_type", TYPES)
@torch.inference_mode()
def test_likelihoods_are_those_of_transformers(model_type: str, in_float32, tmp_path: Path) -> None:
    """Of a window, and of two continuations that share their context's work where the family allows it."""
    reference = decoders.as_written(model_type)
    engine = in_float32(decoders.write(tmp_path, model_type))
    tokens = torch.randint(3, 300, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = reference(tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    found = engine.nll(tokens)
    assert found == pytest.approx((-expected.sum(1)).tolist(), abs=NEAR * LENGTH)
    assert torch.allclose(engine.model(tokens).logits, reference(tokens).logits, atol=NEAR, rtol=NEAR)
    context, ends = tokens[0, :40].tolist(), [[5, 6, 7], [9, 8]]
    scored = engine.loglikelihood([(context, end) for end in ends])
    for end, (score, _) in zip(ends, scored, strict=True):
        row = torch.tensor([context + end])
        logits = reference(row).logits[0, 39:-1].log_softmax(-1)
        assert score == pytest.approx(logits.gather(-1, torch.tensor(end)[:, None]).sum().item(), abs=NEAR * len(end))


@pytest.mark.parametrize(
    "model_type", ["gemma2", "granite", "cohere2", "ministral3", "nanochat", "bloom", "mpt", "gpt_bigcode", "gptj",
                   "qwen3_5_text", "lfm2", "nemotron_h", "granitemoehybrid", "mamba", "mamba2"]
)
@torch.inference_mode()
def test_texts_of_unlike_length_are_written_together_as_alone(model_type: str, in_float32, tmp_path: Path) -> None:
    engine = in_float32(decoders.write(tmp_path, model_type))
    prompts = [list(range(3, 30)), list(range(40, 80))]
    assert engine.generate(prompts, 6) == [engine.generate([prompt], 6)[0] for prompt in prompts]


#: Tokens of a prompt that is longer than any window, and than a chunk of any recurrence.
PROMPT = 70


@pytest.mark.parametrize("model_type", TYPES)
@torch.inference_mode()
def test_steps_go_on_from_token_to_token(model_type: str, in_float32, tmp_path: Path) -> None:
    """Those after a prompt choose what a pass over all of the text chooses, whatever a block keeps of it."""
    engine = in_float32(decoders.write(tmp_path, model_type))
    decoder = decode.decoder(engine.model, 2, PROMPT, 4)
    prompt = torch.randint(3, 300, (2, PROMPT), generator=torch.Generator().manual_seed(2))
    decoder.prefill(prompt)
    text = torch.cat([prompt, decoder.steps(4)], dim=1)
    chosen = engine.model(text, use_cache=False).logits.argmax(-1)
    assert torch.equal(chosen[:, PROMPT - 1 : -1], text[:, PROMPT:])
    written = engine.generate(prompt.tolist(), 4)
    assert written == text[:, PROMPT:].tolist()
    assert generation._windows_at_once(engine.model, 64) == generation.WINDOWS_AT_ONCE["cpu"]
