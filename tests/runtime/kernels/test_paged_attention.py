"""The Triton attention against a plain one, in Triton's interpreter on a CPU and compiled on a GPU."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from tiny import write_kv_cache

from trimtab.recipe import Engine as Settings
from trimtab.runtime.decoder.step import DecodingStep
from trimtab.runtime.kernels import replacements
from trimtab.runtime.kv_cache.paged_attention import why_no_kernel
from trimtab.runtime.service.paged_engine import GenerationRequest, PagedEngine

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
BLOCKS, BLOCK, LONGEST = 40, 16, 150


def plain(query_THD, keys_LKD, values_LKD, position, scale, window):
    """One sequence's attention in float32; the first query stands at `position`."""
    group = query_THD.shape[1] // keys_LKD.shape[1]
    keys, values = (x.float().repeat_interleave(group, 1) for x in (keys_LKD, values_LKD))
    scores = torch.einsum("thd,lhd->htl", query_THD.float(), keys) * scale
    own, key = position + torch.arange(len(query_THD))[:, None], torch.arange(len(keys))
    seen = key <= own
    if window:
        seen &= key > own - window
    weights = scores.masked_fill(~seen.to(scores.device), -torch.inf).softmax(-1)
    return torch.einsum("htl,lhd->thd", weights, values)


CASES = {
    "one token each": (1, [(0, 1), (5, 1), (63, 1), (64, 1), (149, 1)], 4, 2, 64, None, "16"),
    "one token each of many": (1, [(position, 1) for position in range(0, 150, 4)], 16, 16, 16, None, "16"),
    "lone tokens": (1, [(0, 1), (5, 1), (63, 1), (64, 1), (149, 1)], 4, 2, 64, None, "16"),
    "chunks and lone tokens": (16, [(0, 33), (20, 5), (100, 1), (7, 16)], 4, 2, 64, None, "16"),
    "a window": (1, [(3, 1), (149, 1)], 4, 4, 32, 9, "16"),
    "chunks in a window": (16, [(0, 40), (90, 20)], 4, 2, 32, 9, "16"),
    "nine heads share three": (16, [(0, 20), (10, 1)], 9, 3, 80, None, "16"),
    "int8": (16, [(30, 20), (149, 1)], 4, 2, 64, None, "int8"),
    "fp8": (1, [(30, 1), (149, 1)], 4, 2, 64, None, "fp8"),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_is_that_of_the_formula(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from trimtab.runtime.kernels import paged_attention

    size, works, heads, kv_heads, width, window, kind = CASES[name]
    generator = torch.Generator().manual_seed(3)
    shape = (BLOCKS, BLOCK, kv_heads, width)
    keys, values = (torch.randn(shape, generator=generator) * 2 for _ in range(2))
    if kind == "16":
        keys, values, scales = keys.bfloat16(), values.bfloat16(), (1.0, 1.0)
    elif kind == "int8":
        keys, values, scales = (keys * 20).to(torch.int8), (values * 20).to(torch.int8), (0.05, 0.06)
    else:
        keys, values, scales = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn), (0.5, 0.25)
    owners = torch.randperm(BLOCKS, generator=generator).int()
    wide = -(-LONGEST // BLOCK)
    tables = torch.stack([owners[torch.arange(wide) + 3 * n % 30] for n in range(len(works))])
    tokens = sum(count for _, count in works) + 3  # three that nobody reads
    query = torch.randn(tokens, heads, width, generator=generator).bfloat16()
    spans, expected, first = [], torch.zeros(tokens, heads, width), 0
    for number, (position, count) in enumerate(works):
        for done in range(0, count, size):
            spans.append([first + done, min(size, count - done), position + done, number])
        read = [
            (x[tables[number].long()].flatten(0, 1)[: position + count].float() * s).bfloat16()
            for x, s in zip((keys, values), scales, strict=True)
        ]
        expected[first : first + count] = plain(query[first : first + count], *read, position, width**-0.5, window)
        first += count
    spans += [[0, 0, 0, 0]] * (3 if "each" in name else 2)
    where = paged_attention.Spans(torch.tensor(spans, dtype=torch.int32).to(DEVICE), tables.to(DEVICE), size)
    on = [x.to(DEVICE) for x in (query, keys, values)]
    monkeypatch.setattr(torch, "empty", lambda *shape, **kinds: torch.full(shape, torch.nan, **kinds))
    found = paged_attention.attend(*on, where, width**-0.5, scales, window).float().cpu()
    assert not found[first:].any()
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


SETTINGS = Settings(max_seq_len=64, max_num_tokens=24, max_batch_size=3, enable_chunked_prefill=True)
NEW_TOKENS = 4


def test_keys_are_cut_into_more_parts_where_programs_are_few_or_keys_many() -> None:
    from trimtab.runtime.kernels import paged_attention

    assert [paged_attention.parts_of(programs, 1024) for programs in (8, 64, 512, 4096)] == [16, 8, 1, 1]
    assert [paged_attention.parts_of(512, keys) for keys in (16, 2048, 2049, 1 << 20)] == [1, 1, 2, 64]
    assert paged_attention.parts_of(8, 65) == 2


@pytest.mark.parametrize("kind", ["none", "FP8", "none, by a step of its own"])
def test_the_engine_gives_the_logits_of_gathered_blocks(
    plain_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Through chunks, preemption and padding: the same tokens are fed to both, and every step's logits compared."""
    if not CUDA:
        # The interpreter runs them one by one.
        monkeypatch.setattr("trimtab.runtime.kernels.paged_attention.MAX_PARTS", 2)
    folder = plain_folder if "none" in kind else write_kv_cache(plain_folder, tmp_path, kind, 0.03, 0.03)
    prompts = [torch.arange(3, 3 + length).tolist() for length in (8, 7, 8, 30)]
    blocks = {"block_size": 8, "blocks": 5}
    engines = [PagedEngine(folder, SETTINGS, DEVICE.type, attention=a, **blocks) for a in ("kernel", "gathered")]
    assert engines[0].attention_path == "kernel"
    if "own" in kind and not CUDA:  # where an engine has it anyway
        replacements.fuse_norms(engines[0].model)
        engines[0]._forward.step = DecodingStep(engines[0].model, SETTINGS.max_seq_len)
    requests = [[GenerationRequest(list(prompt), NEW_TOKENS) for prompt in prompts] for _ in engines]
    for served, some in zip(engines, requests, strict=True):
        for request in some:
            served.submit(request)
    compared = 0
    with torch.inference_mode():
        while not engines[0].scheduler.idle:
            steps = [served.scheduler.next_step(0.0) for served in engines]
            found, expected = (served._forward(step) for served, step in zip(engines, steps, strict=True))
            assert [w.sequence.tokens for w in found[0]] == [w.sequence.tokens for w in expected[0]]
            compared += len(found[0])
            difference = (found[1] - expected[1]).float().norm()
            assert difference <= 0.04 * expected[1].float().norm()
            for served, step, (works, _) in zip(engines, steps, (found, expected), strict=True):
                served.scheduler.done(step)
                for work, token in zip(works, expected[1].argmax(-1).tolist(), strict=True):
                    work.sequence.tokens.append(token)
                    if len(work.sequence.new_tokens) == NEW_TOKENS:
                        served.scheduler.remove(work.sequence)
    assert compared == NEW_TOKENS * len(prompts) and engines[1].scheduler.idle
    assert any(request.preemptions for request in requests[0])


def test_a_kernel_that_computes_something_else_is_not_used(plain_folder: Path, monkeypatch) -> None:
    from trimtab.runtime.kernels import paged_attention

    right = paged_attention.attend
    monkeypatch.setattr(paged_attention, "attend", lambda *args: right(*args) * 1.05)
    model = PagedEngine(plain_folder, SETTINGS, DEVICE.type, attention="gathered").model
    assert re.fullmatch("its results differ by [4-6].[0-9]% from those of PyTorch's attention", why_no_kernel(model))


def test_a_warm_engine_serves(plain_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the padding of a static batch."""
    if not CUDA:
        monkeypatch.setattr("trimtab.runtime.kernels.paged_attention.MAX_PARTS", 2)
    served = PagedEngine(plain_folder, SETTINGS, DEVICE.type, strategy="static", attention="kernel")
    served.warm_up(0)
    answers = served.generate([[5, 6, 7]] * 3, 3)
    assert answers == [answers[0]] * 3 and served.pool.used == 0
