"""The batch and the lengths at which speed is measured."""

from __future__ import annotations

import pytest
from facts import LLAMA_8B

from trimtab.components.validation.evaluation.load import Load, alike, load_of
from trimtab.model.hardware import target
from trimtab.model.memory import kv_bytes_per_token, weight_bytes
from trimtab.planning.matrix import baseline, ladder
from trimtab.recipe import Engine, Recipe

SHORT = (32, 48)


@pytest.mark.parametrize(
    ("engine", "on_gpu", "load"),
    [
        # half of a request's tokens lie behind it
        ({"backend": "trtllm", "max_batch_size": 64, "max_seq_len": 4096}, True, (64, 2048, 64)),
        ({"backend": "trtllm", "max_batch_size": 1, "max_seq_len": 4096}, True, (1, 2048, 64)),
        # a workload's long requests have 1,200 tokens
        ({"backend": "vllm", "max_batch_size": 8, "max_seq_len": 4000, "kv_cache_tokens": 9600}, True, (8, 600, 64)),
        ({"backend": "trtllm", "max_batch_size": 4, "max_seq_len": 131_072}, True, (4, 2048, 64)),
        # the torch engine reads all prompts in one step of 8,192 tokens
        ({"max_batch_size": 64, "max_seq_len": 2048}, True, (64, 128, 64)),
        ({"max_batch_size": 2, "max_seq_len": 64}, True, (2, 31, 32)),
        ({"max_batch_size": 16, "max_seq_len": 2048}, False, (16, 32, 48)),
    ],
)
def test_a_load_is_what_the_engine_is_planned_for(engine, on_gpu, load):
    found = load_of(Engine.parse(engine), on_gpu, SHORT)
    assert found == load
    assert not on_gpu or found.prompt_tokens + found.new_tokens < engine["max_seq_len"]


def test_lengths_are_those_of_both():
    assert alike(Load(8, 2048, 64), Load(64, 128, 48)) == (Load(8, 128, 48), Load(64, 128, 48))


def step(recipe: Recipe, load: Load) -> float:
    """Bytes that a step reads for each token that it writes."""
    context = load.prompt_tokens + load.new_tokens / 2
    return sum(weight_bytes(LLAMA_8B, recipe)) / load.batch_size + context * kv_bytes_per_token(LLAMA_8B, recipe)


def test_an_8_bit_kv_cache_gains_where_it_is_measured():
    """An A100's first recipe for throughput reads 0.2 % less at a batch of 8 and 56 tokens, where it was measured."""
    a100 = target("a100-80")
    first = ladder("higher_throughput", LLAMA_8B, a100)
    before, after = baseline("higher_throughput", LLAMA_8B, a100, first).recipe, first[0].recipe
    assert after.title == "bf16 + fp8 KV"
    short = Load(8, 32, 48)
    assert step(before, short) / step(after, short) - 1 == pytest.approx(0.002, abs=0.0005)
    loads = alike(load_of(before.engine, True, SHORT), load_of(after.engine, True, SHORT))
    assert step(before, loads[0]) / step(after, loads[1]) - 1 > 0.35
