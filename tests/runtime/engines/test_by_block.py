"""A model a block at a time says what the whole one says, and holds no more of it than two blocks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import decoders
import pytest
import tiny
import torch

from trimtab.base import progress
from trimtab.base.errors import Failure, InputError
from trimtab.recipe import Engine
from trimtab.runtime.engines import by_block
from trimtab.runtime.engines.by_block import BlockwiseEngine
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.linear import cpu_products
from trimtab.runtime.measure import activations
from trimtab.runtime.measure.block_weights import BlockWeights

#: So many tokens that requests and windows need several batches, of unlike lengths.
SETTINGS = Engine(by_block=True, max_seq_len=64, max_num_tokens=96)
#: Blocks that return tuples (BLOOM's of one, Bamba's of two) and get ALiBi's biases, windows, caps of scores and
#: logits, experts, sinks, chunks, a latent cache, delta nets with experts, convolutions, Mamba with MLPs and experts,
#: Mamba alone, Mamba beside attention.
FAMILIES = (
    "llama", "bloom", "mistral", "gemma2", "gemma3_text", "granite", "mixtral", "qwen3_moe", "gpt_oss", "llama4_text",
    "deepseek_v3", "qwen3_next", "lfm2", "nemotron_h", "mamba", "bamba",
)  # fmt: skip


def requests() -> list[tuple[list[int], list[int]]]:
    """Of several lengths, two of them on the same context."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(3, 300, (5, 60), generator=generator).tolist()
    contexts = [(row[: 12 + 9 * n], row[50 : 51 + n]) for n, row in enumerate(tokens)]
    return [*contexts, (contexts[2][0], [7, 8])]


def windows() -> torch.Tensor:
    return torch.randint(3, 300, (5, 40), generator=torch.Generator().manual_seed(3))


def is_alike(ours: Any, theirs: Any, tolerance: float) -> None:
    """Compares likelihoods, whether they are greedy, and predictions."""
    assert [greedy for _, greedy in ours.loglikelihood(requests())] == [
        greedy for _, greedy in theirs.loglikelihood(requests())
    ]
    for (found, _), (expected, _) in zip(
        ours.loglikelihood(requests()), theirs.loglikelihood(requests()), strict=True
    ):
        assert found == pytest.approx(expected, rel=tolerance)
    assert ours.nll(windows()) == pytest.approx(theirs.nll(windows()), rel=tolerance)
    found, expected = ours.predict(windows(), 4), theirs.predict(windows(), 4)
    for name in ("nll", "log_probs"):
        pair = (torch.tensor(getattr(told, name)) for told in (found, expected))
        torch.testing.assert_close(*pair, rtol=10 * tolerance, atol=10 * tolerance, msg=name)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_it_says_what_the_whole_model_says(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both in float32, where only the order of sums differs."""
    monkeypatch.setattr(cpu_products, "dtype", lambda: torch.float32)
    folder = decoders.write(tmp_path, model_type)
    ours, theirs = BlockwiseEngine(folder, SETTINGS), TorchEngine(folder, SETTINGS, "cpu")
    for engine in (ours, theirs):
        engine.model.float()
    is_alike(ours, theirs, 2e-5)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "llama", layers=4)


def test_it_computes_in_the_numbers_of_the_engine_that_judges_candidates(llama: Path) -> None:
    ours, theirs = BlockwiseEngine(llama, SETTINGS), TorchEngine(llama, SETTINGS, "cpu")
    assert ours.nll(windows()) == pytest.approx(theirs.nll(windows()), rel=2e-3)  # bfloat16
    assert ours.arithmetic == f"{theirs.arithmetic}, block by block" and ours.kernels() == {}
    assert ours.tokenizer("a river").input_ids == theirs.tokenizer("a river").input_ids


def test_a_pass_reads_each_block_once_for_all_requests(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[list[str]] = []
    plain = BlockWeights._read
    monkeypatch.setattr(BlockWeights, "_read", lambda self, names: read.append(names) or plain(self, names))
    engine = BlockwiseEngine(llama, SETTINGS)
    engine.nll(windows())
    # Embeddings, four blocks, and what stands behind them.
    assert [names[0].partition(".layers.")[2][:1] for names in read] == ["", "0", "1", "2", "3", ""]


def test_no_more_than_two_blocks_are_there_at_a_time(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    plain = BlockWeights._put

    def put(self: BlockWeights, tensors: dict[str, torch.Tensor]) -> None:
        plain(self, tensors)
        held.append(sum(p.nbytes for p in self._model.parameters() if not p.is_meta))

    monkeypatch.setattr(BlockWeights, "_put", put)
    engine = BlockwiseEngine(llama, SETTINGS)
    engine.nll(windows())
    assert 0 < 2 * max(held[1:-1]) == engine.weight_bytes
    assert all(parameter.is_meta for parameter in engine.model.parameters())


@pytest.mark.parametrize("place", ["host", "disk"])
def test_as_many_passes_as_host_memory_needs(
    place: str, llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of two windows has 78 hidden states of 64 numbers in bfloat16."""
    progressed = tmp_path / "progress"
    monkeypatch.setenv(progress.ENVIRONMENT, str(progressed))
    monkeypatch.setattr(by_block, "EVERY", 0.0)
    engine = BlockwiseEngine(llama, SETTINGS)
    whole = engine.nll(windows())
    monkeypatch.setattr(activations, "host_room", lambda: 2 * 64 * (78 if place == "host" else 20))
    assert engine.nll(windows()) == pytest.approx(whole, rel=1e-6)
    told = [progress.describe(json.loads(line)) for line in progressed.read_text().splitlines()]
    assert "validate: scoring (3/4)" in told and "validate: scoring, batches of block 4 (2/3)" in told
    assert "validate: scoring, pass 3 of 3 (4/4)" in told and "validate: scoring, pass 1 of 3 (4/4)" in told


def test_what_it_does_not_do_is_refused_with_what_to_write(llama: Path) -> None:
    engine = BlockwiseEngine(llama, SETTINGS)
    with pytest.raises(Failure, match="block by block writes no text; name tasks of multiple choice, or a target that"):
        engine.generate([[3, 4]], 2)
    with pytest.raises(Failure, match="block by block has no speed; write goal: fit_larger_model, which needs none,"):
        engine.decode_speed(1, 4, 4, 1)
    with pytest.raises(InputError, match="request 0 has 65 tokens, more than engine.max_seq_len 64"):
        engine.loglikelihood([([3] * 60, [4] * 5)])
    with pytest.raises(InputError, match="a window of 1 tokens predicts nothing"):
        engine.nll(windows()[:, :1])


def test_a_quantized_export_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = tiny.write_kv_cache(llama, tmp_path / "int8", "INT8", 0.05, 0.05)
    with pytest.raises(Failure, match="is quantized, and block by block runs a plain checkpoint alone; open it whole"):
        BlockwiseEngine(folder, SETTINGS)


def test_a_model_whose_blocks_read_each_other_is_refused(llama: Path) -> None:
    engine = BlockwiseEngine(llama, SETTINGS)
    engine.model.config.num_kv_shared_layers = 2
    what = "cannot be scored block by block: its last blocks read the keys and values of others; write a target"
    with pytest.raises(Failure, match=what) as failure:
        engine.nll(windows())
    assert failure.value.failure_class == "unsupported"


def test_a_float16_that_overflows_is_found_where_it_does(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tiny.write_model(tmp_path / "model", layers=4)
    tensors = {name: tensor.half() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.3.mlp.up_proj.weight"] *= 60_000
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float16"}))
    with pytest.raises(Failure, match=r"layers\.3\.mlp\..*in float16, which ends at 65,504"):
        BlockwiseEngine(folder, SETTINGS).nll(windows())
