"""A KV cache of fixed size gives the tokens of the growing one; the recording of its steps is in test_cuda.py."""

from __future__ import annotations

import pytest
import torch

from trimtab.runtime.decoder import decode
from trimtab.runtime.decoder.decode import Growing, Static


@torch.inference_mode()
def test_a_static_cache_gives_the_same_tokens(original: torch.nn.Module, windows: torch.Tensor) -> None:
    growing, static = Growing(original), Static(original, 6, 8, 12)
    for prompt in (windows[:, :8], windows[:, 8:16]):  # the second finds nothing left of the first
        growing.prefill(prompt)
        static.prefill(prompt)
        expected = growing.steps(12)
        assert len(expected.unique()) > 4  # a model that says one word would hide a wrong cache
        assert torch.equal(static.steps(12), expected)


@torch.inference_mode()
def test_tokens_are_those_of_generate(original: torch.nn.Module, windows: torch.Tensor) -> None:
    growing = Growing(original)
    growing.prefill(windows[:, :8])
    expected = original.generate(windows[:, :8], max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(growing.steps(12), expected[:, 8:])


def test_what_cannot_be_recorded_is_decoded_in_a_loop(
    original: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Static, agree: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(Static, "capture", refuse)
    monkeypatch.setattr(type(original), "device", torch.device("cuda"), raising=False)
    monkeypatch.setattr(Static, "__init__", lambda *_: None)
    found = decode.decoder(original, 1, 4, 4)
    assert isinstance(found, Growing)
    reason = "RuntimeError: operation not permitted when stream is capturing"
    assert found.path == f"loop, as no CUDA graph could be made: {reason}"
