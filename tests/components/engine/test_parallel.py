"""An engine in two real processes, built, opened and asked as validation does."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import wait
from pathlib import Path

import pytest
import torch

from trimtab.base.errors import Failure, InputError, StageError
from trimtab.components.engine import work
from trimtab.recipe import Engine
from trimtab.runtime.engines import backends, parallel
from trimtab.runtime.engines.parallel import ParallelEngine
from trimtab.runtime.engines.torch_engine import TorchEngine

LIMITS = {"max_seq_len": 64, "max_num_tokens": 128, "max_batch_size": 2}
WINDOWS = torch.randint(3, 300, (3, 24), generator=torch.Generator().manual_seed(1))
PROMPTS = WINDOWS[:, :6].tolist()
REQUESTS = [(prompt[:4], prompt[4:]) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def alone(model) -> TorchEngine:
    return TorchEngine(model, Engine(**LIMITS), "cpu")


def is_close(engine: ParallelEngine, alone: TorchEngine, rel: float) -> None:
    assert engine.nll(WINDOWS) == pytest.approx(alone.nll(WINDOWS), rel=rel)
    told = engine.predict(WINDOWS, 3)
    assert [sum(places) for places in told.nll] == pytest.approx(alone.nll(WINDOWS), rel=rel)
    assert torch.tensor(told.tokens).shape == (3, 23, 3)
    found, expected = engine.loglikelihood(REQUESTS), alone.loglikelihood(REQUESTS)
    assert [likelihood for likelihood, _ in found] == pytest.approx([value for value, _ in expected], rel=10 * rel)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert len(engine.decode_speed(batch_size=2, prompt_tokens=4, new_tokens=3, repeats=2)) == 2


@torch.inference_mode()
def shortfall(alone: TorchEngine, prompt: list[int], answer: list[int]) -> float:
    """How far below the largest logit the tokens of an answer are at most: 0 if it is greedy."""
    logits = alone.model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].float()
    return float((logits.amax(-1) - logits[range(len(answer)), answer]).max())


def test_tensor_parallel(model, alone, tmp_path, monkeypatch):
    settings = {"tensor_parallel_size": 2, **LIMITS}
    engine = ParallelEngine(model, Engine(**settings))
    monkeypatch.setattr(parallel, "ParallelEngine", lambda *_: engine)  # starting one takes seconds
    with monkeypatch.context() as during:
        during.setattr(engine, "close", lambda: None)
        built = work.build(str(model), str(tmp_path), str(tmp_path / "scratch"), settings)
    assert backends.open_engine(tmp_path, model) is engine
    is_close(engine, alone, rel=0.002)
    answers = engine.generate(PROMPTS, 5)
    assert [len(answer) for answer in answers] == [5, 5, 5]
    # Sums of two parts round differently, which decides between tokens that are as likely; logits reach 10.
    assert max(shortfall(alone, *pair) for pair in zip(PROMPTS, answers, strict=True)) < 0.1
    embeddings = alone.model.get_input_embeddings().weight.nbytes
    assert alone.weight_bytes < built["weight_bytes"] == engine.weight_bytes < alone.weight_bytes + 2 * embeddings
    with pytest.raises(InputError, match="prompt 0: is empty"):
        engine.generate([[]], 5)
    assert engine.generate(PROMPTS, 5) == answers  # what all refuse does no harm
    engine.close()
    with pytest.raises(StageError, match="the engine was closed"):
        engine.nll(WINDOWS)


def test_pipeline_parallel_until_a_rank_dies(model, alone):
    engine = ParallelEngine(model, Engine(pipeline_parallel_size=2, **LIMITS))
    is_close(engine, alone, rel=1e-9)  # the same sums in the same order
    assert engine.generate(PROMPTS, 5) == alone.generate(PROMPTS, 5)
    children = Path(f"/proc/{engine._process.pid}/task/{engine._process.pid}/children").read_text().split()
    first, second = (os.pidfd_open(int(child)) for child in children)
    signal.pidfd_send_signal(second, signal.SIGKILL)
    assert wait([second], timeout=60)
    with pytest.raises(StageError, match="a rank of the engine ended without an answer"):
        engine.nll(WINDOWS)
    assert engine._process.poll() is not None
    assert wait([first], timeout=60)  # it has ended too


def test_fewer_gpus_than_ranks(model, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(Failure, match="size 2 x pipeline_parallel_size 1 needs 2 GPUs, and there are 1") as caught:
        ParallelEngine(model, Engine(tensor_parallel_size=2))
    assert caught.value.failure_class == "unsupported"
