"""Ranks together compute what one process computes; here they are threads, which meet where processes would talk."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, PreTrainedModel

from trimtab.base.errors import Failure
from trimtab.runtime.checkpoint.skeleton import skeleton
from trimtab.runtime.decoder import decode
from trimtab.runtime.decoder.assemble import assemble
from trimtab.runtime.parallel import shards
from trimtab.runtime.parallel.shards import Place

CPU = torch.device("cpu")
FORMATS = ("int8_wo", "int8_sq", "fp8_kv", "int4_rtn_g32", "int4_awq_g32", "mixed")


class Threads:
    """Stands for torch.distributed: all ranks of a group are threads of this process."""

    def __init__(self, ranks: int):
        self.ranks, self.barrier, self.given = ranks, threading.Barrier(ranks), {}

    def all_reduce(self, tensor: torch.Tensor, group: int) -> None:
        self.given[group] = tensor.clone()
        self.barrier.wait()
        total = sum(self.given[rank] for rank in range(self.ranks))
        self.barrier.wait()
        tensor.copy_(total)

    def broadcast(self, tensor: torch.Tensor, group: int, group_src: int) -> None:
        if group == group_src:
            self.given[0] = tensor.clone()
        self.barrier.wait()
        tensor.copy_(self.given[0])
        self.barrier.wait()

    def run(self, work: Callable[[int], Any]) -> list[Any]:
        found: list[Any] = [None] * self.ranks

        def thread(rank: int) -> None:
            try:
                with torch.inference_mode():
                    found[rank] = work(rank)
            except BaseException:
                self.barrier.abort()
                raise

        threads = [threading.Thread(target=thread, args=(rank,)) for rank in range(self.ranks)]
        for one in threads:
            one.start()
        for one in threads:
            one.join()
        return found


def places(tensors: int, stages: int) -> list[Place]:
    """One of the two is 1, so a rank's number serves as its group."""
    ranks = range(tensors * stages)
    return [Place(rank % tensors, tensors, rank // tensors, stages, rank, rank) for rank in ranks]


def models(folder: Path, monkeypatch: pytest.MonkeyPatch, **sizes: int) -> tuple[Threads, list[PreTrainedModel]]:
    found = places(**{"tensors": 1, "stages": 1} | sizes)
    threads = Threads(len(found))
    monkeypatch.setattr(shards, "distributed", threads)
    return threads, [assemble(folder, CPU, place=place) for place in found]


@pytest.mark.parametrize("name", FORMATS)
def test_tensor_parallel_ranks_are_as_right_as_one_process(exported, windows, monkeypatch, name):
    made = exported(name)
    threads, parts = models(made.folder, monkeypatch, tensors=2)
    for count, length in ((6, 24), (1, 9)):  # the dense paths, then the packed ones
        some = windows[:count, :length]
        with torch.inference_mode():
            truth, one = made.reference(some).logits, assemble(made.folder, CPU)(some).logits.float()
        first, second = threads.run(lambda rank, some=some: parts[rank](some).logits.float())
        assert torch.equal(first, second)
        assert (first - truth).square().mean() < 1.5 * (one - truth).square().mean()
    held = [part.model.layers[1].mlp.down_proj for part in parts]
    assert [layer.in_features for layer in held] == [64, 64]


@pytest.mark.parametrize(("tensors", "k_features"), [(2, 16), (4, 16)])  # two KV heads: four ranks share them
def test_ranks_have_whole_heads(plain_folder, windows, monkeypatch, tensors, k_features):
    threads, parts = models(plain_folder, monkeypatch, tensors=tensors)
    with torch.inference_mode():
        expected = assemble(plain_folder, CPU)(windows).logits
    for found in threads.run(lambda rank: parts[rank](windows).logits):
        assert (found - expected).square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()
    assert [part.model.layers[0].self_attn.k_proj.out_features for part in parts] == [k_features] * tensors


def test_an_embedding_that_transformers_would_split_stays_whole(plain_folder, monkeypatch):
    """Since 5.17 its plan names the embedding too."""
    plan = LlamaConfig.base_model_tp_plan | {"embed_tokens": "embedding_rowwise"}
    monkeypatch.setattr(LlamaConfig, "base_model_tp_plan", plan)
    model = skeleton(plain_folder)
    shards.cut(model, places(2, 1)[0])
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size


@pytest.mark.parametrize("name", ["int8_wo", "fp8_kv"])
def test_stages_compute_exactly_what_one_process_does(exported, windows, monkeypatch, name):
    folder = exported(name).folder
    threads, parts = models(folder, monkeypatch, stages=2)
    some = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected = assemble(folder, CPU).generate(windows[:2], **some)
    for found in threads.run(lambda rank: parts[rank].generate(windows[:2], **some)):
        assert torch.equal(found.sequences, expected.sequences)
        assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    held = [[n for n, _ in part.named_parameters() if "layers" in n] for part in parts]
    assert all(name.startswith(f"model.layers.{stage}.") for stage, names in enumerate(held) for name in names)


@pytest.mark.parametrize("sizes", [{"tensors": 2}, {"stages": 2}])
def test_a_fixed_cache_is_that_of_the_rank(plain_folder, windows, monkeypatch, sizes):
    """What decode speed is measured on, on a GPU: here the same steps without a recording."""

    def steps(model: PreTrainedModel) -> torch.Tensor:
        decoder = decode.Static(model, batch_size=2, prompt_tokens=24, new_tokens=4)
        for _ in range(2):  # a cache is used again
            decoder.prefill(windows[:2])
            found = decoder.steps(4)
        return found

    threads, parts = models(plain_folder, monkeypatch, **sizes)
    with torch.inference_mode():
        expected = steps(assemble(plain_folder, CPU))
    for found in threads.run(lambda rank: steps(parts[rank])):
        assert torch.equal(found, expected)


def test_a_bias_is_added_once(tiny, tmp_path, windows, monkeypatch):
    model = tiny(torch.bfloat16, attention_bias=True, mlp_bias=True)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            torch.nn.init.normal_(parameter)
    model.save_pretrained(tmp_path)
    threads, parts = models(tmp_path, monkeypatch, tensors=2)
    with torch.inference_mode():
        expected = model(windows).logits
    for found in threads.run(lambda rank: parts[rank](windows).logits):
        assert (found - expected).square().mean().sqrt() < 0.02 * expected.square().mean().sqrt()


@pytest.mark.parametrize(
    ("changes", "sizes", "reason"),
    [
        ({}, {"tensors": 3}, "engine.tensor_parallel_size: 3: model.layers.0.self_attn.q_proj.weight: 64 rows in 4 "
         "runs cannot be shared out among 3 ranks; write 1"),
        ({}, {"stages": 3}, "engine.pipeline_parallel_size: 3: does not divide 2 blocks of LlamaForCausalLM; write 1"),
        ({"model_type": "olmo2"}, {"tensors": 2}, "engine.tensor_parallel_size: 2: Olmo2ForCausalLM splits "
         "model.layers.*.self_attn.q_proj as 'colwise_gather_output'; write 1"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, {"stages": 2},
         "engine.pipeline_parallel_size: 2: Qwen2ForCausalLM has blocks of full_attention and sliding_attention; "
         "write 1"),
    ],
)  # fmt: skip
def test_what_cannot_be_shared_out_is_refused(tiny, tmp_path, changes, sizes, reason):
    settings = tiny().config.to_dict() | changes
    settings.pop("layer_types", None)
    AutoConfig.for_model(**settings).save_pretrained(tmp_path)
    with pytest.raises(Failure) as caught:
        shards.cut(skeleton(tmp_path), places(**{"tensors": 1, "stages": 1} | sizes)[0])
    assert (caught.value.failure_class, caught.value.reason) == ("unsupported", reason)


def test_groups_that_ranks_would_tear_apart_are_refused(exported):
    with pytest.raises(Failure, match="o_proj.weight_scale: 1 columns cannot be shared out among 2 ranks") as caught:
        assemble(exported("int4_awq_g64").folder, CPU, place=places(2, 1)[0])
    assert caught.value.failure_class == "unsupported"
