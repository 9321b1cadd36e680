"""The paged engine gives the tokens of the contiguous one, whatever runs beside them and however blocks lie."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import decoders
import pytest
import torch
from answers import assert_same
from tiny import write_kv_cache

from trimtab.base.errors import Failure, InputError
from trimtab.recipe import Engine as Settings
from trimtab.runtime.decoder import gpu_memory
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.kernels import cuda_graphs
from trimtab.runtime.kv_cache import emulated, paged
from trimtab.runtime.service import sampling
from trimtab.runtime.service.paged_engine import GenerationRequest, PagedEngine
from trimtab.runtime.service.sampling import Sampling

SETTINGS = Settings(max_seq_len=96, max_num_tokens=24, max_batch_size=4, enable_chunked_prefill=True)
CONTIGUOUS = Settings(max_seq_len=96, max_batch_size=1)
#: A name, and ModelOpt's name of a KV cache: fp8, int8 and nvfp4 with scales that round visibly.
KV_CACHES = {"fp8": "FP8", "int8": "INT8", "nvfp4": "NVFP4"}


def engine(folder: Path, **options: Any) -> PagedEngine:
    return PagedEngine(folder, options.pop("settings", SETTINGS), "cpu", **options)


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Nine prompts of 1 to 40 tokens: some are read in chunks, and more than a batch holds."""
    generator = torch.Generator().manual_seed(5)
    lengths = (1, 40, 3, 17, 16, 29, 2, 33, 8)
    return [torch.randint(3, 128, (length,), generator=generator).tolist() for length in lengths]


@pytest.fixture(scope="module")
def folders(plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {"none": plain_folder}
    for name, algorithm in KV_CACHES.items():
        scale = 0.02 if name == "fp8" else 0.03
        made[name] = write_kv_cache(plain_folder, tmp_path_factory.mktemp(name), algorithm, scale, scale)
    return made


@pytest.fixture(scope="module")
def judged(folders: dict[str, Path]) -> dict[str, TorchEngine]:
    """The contiguous engines, which validation asks."""
    return {name: TorchEngine(folder, CONTIGUOUS, "cpu") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def expected(judged: dict[str, TorchEngine], prompts: list[list[int]]) -> dict[str, list[list[int]]]:
    """What the contiguous engine writes, one prompt at a time."""
    found = {name: engine.generate(prompts, 20) for name, engine in judged.items()}
    assert len({token for answer in found["none"] for token in answer}) > 20  # a model that says one word hides faults
    assert len({str(answers) for answers in found.values()}) == 4  # and one that does not notice its KV cache, too
    return found


@torch.inference_mode()
@pytest.mark.parametrize("strategy", ["in-flight", "dynamic", "static"])
@pytest.mark.parametrize("name", ["none", *KV_CACHES])
def test_tokens_are_those_of_the_contiguous_engine(
    folders, prompts, judged, expected, name, strategy
) -> None:
    served = engine(folders[name], strategy=strategy)
    assert_same(served.generate(prompts, 20), expected[name], prompts, judged[name])
    assert served.pool.used == 0


@pytest.mark.parametrize(
    "options",
    [{"block_size": 1}, {"block_size": 96}, {"block_size": 16, "blocks": 5}, {"block_size": 4, "blocks": 17}],
    ids=["a token a block", "contiguous", "five blocks", "17 blocks"],
)
def test_how_blocks_lie_changes_nothing(folders, prompts, judged, expected, options) -> None:
    served = engine(folders["int8"], **options)
    requests = [GenerationRequest(list(prompt), 20) for prompt in prompts]
    for request in requests:
        served.submit(request)
    for _ in served.run():
        pass
    assert_same([request.new_tokens for request in requests], expected["int8"], prompts, judged["int8"])
    assert any(request.preemptions for request in requests) == ("blocks" in options)


@pytest.mark.parametrize("name", ["int8_wo", "int4_awq_g32", "fp8_kv"])
def test_an_export_is_served(exported, prompts, name) -> None:
    folder = exported(name).folder
    judge = TorchEngine(folder, CONTIGUOUS, "cpu")
    served = engine(folder)
    assert served.cache.algorithm == ("FP8" if name == "fp8_kv" else None)
    assert_same(served.generate(prompts, 12), judge.generate(prompts, 12), prompts, judge)


@pytest.mark.parametrize("name", ["none", *KV_CACHES])
def test_what_is_read_is_what_the_judged_engine_reads(folders, name) -> None:
    """Bit for bit, and in 8 bits where the format has 8."""
    cache = engine(folders[name], blocks=6).cache
    x = torch.randn(5, 2, 16, generator=torch.Generator().manual_seed(2)).bfloat16() * 4
    cache.write(1, torch.tensor([33, 34, 35, 36, 96]), x, -x)
    keys, values = cache.read(1, torch.tensor([[2]]))
    scale = 0.02 if name == "fp8" else 0.03
    right = emulated.rounded(KV_CACHES[name], x[:4], scale) if name in KV_CACHES else x[:4]
    assert torch.equal(keys[0, :, 1:5].transpose(0, 1), right)
    negative = emulated.rounded(KV_CACHES[name], -x[:4], scale) if name in KV_CACHES else -x[:4]
    assert torch.equal(values[0, :, 1:5].transpose(0, 1), negative)
    assert not keys[0, :, 5:].any() and cache.padding_slot == 96
    each = 1 if name in ("fp8", "int8") else 2
    assert cache.nbytes == 7 * 16 * 2 * 2 * 2 * 16 * each  # blocks, tokens, layers, K and V, heads, numbers
    assert paged.bytes_per_token(engine(folders[name]).model) == 2 * 2 * 2 * 16 * each


def test_a_kv_cache_in_16_bits_on_request(folders, prompts, judged, expected) -> None:
    served = engine(folders["int8"], kv_cache="none")
    assert_same(served.generate(prompts, 20), expected["none"], prompts, judged["none"])


@pytest.mark.parametrize(
    "model_type",
    ["gemma2", "vaultgemma", "granite", "hyperclovax", "cohere", "cohere2", "apertus", "ministral3", "nanochat",
     "jais2"],
)  # fmt: skip
@torch.inference_mode()
def test_a_family_is_served_with_the_likelihoods_it_is_judged_by(model_type, tmp_path, prompts) -> None:
    """So its logits are changed behind the head, its scores capped and its windows kept, in chunks and alone."""
    folder = decoders.write(tmp_path, model_type)
    served, judge = engine(folder), TorchEngine(folder, CONTIGUOUS, "cpu")
    requests = [GenerationRequest(list(p), 12, sampling=Sampling(logprobs=1), ignore_eos=True) for p in prompts]
    found: dict[int, list[float]] = {id(request): [] for request in requests}
    for request in requests:
        served.submit(request)
    for events in served.run():
        for event in events:
            found[id(event.request)].append(event.chosen.logprob)
    scored = [(prompt, request.new_tokens) for prompt, request in zip(prompts, requests, strict=True)]
    right = judge.loglikelihood(scored)
    for request, (score, _) in zip(requests, right, strict=True):
        assert sum(found[id(request)]) == pytest.approx(score, abs=0.05 * 12)  # bfloat16: 0.02 in the other test's


def test_a_sliding_window_is_kept(tmp_path: Path, prompts) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=8, initializer_range=0.15, max_position_embeddings=256,
    )  # fmt: skip
    MistralForCausalLM(config).bfloat16().save_pretrained(tmp_path)
    judge = TorchEngine(tmp_path, CONTIGUOUS, "cpu")
    assert_same(engine(tmp_path).generate(prompts, 20), judge.generate(prompts, 20), prompts, judge)


def test_a_cancelled_request_frees_its_blocks_and_disturbs_nobody(folders, prompts, judged, expected) -> None:
    served = engine(folders["none"])
    requests = [GenerationRequest(list(prompt), 20) for prompt in prompts[:4]]
    for request in requests:
        served.submit(request)
    for number, _ in enumerate(served.run()):
        if number == 3:
            served.cancel(requests[1])
            assert requests[1] not in served.pool.tables
    assert requests[1].finish_reason == "cancelled" and len(requests[1].new_tokens) < 20
    others = (0, 2, 3)
    found, right = [requests[i].new_tokens for i in others], [expected["none"][i] for i in others]
    assert_same(found, right, [prompts[i] for i in others], judged["none"])
    assert served.pool.used == 0


def test_end_of_text_ends_a_request_unless_it_is_ignored(folders, prompts, expected) -> None:
    served = engine(folders["none"])
    third = expected["none"][3][2]
    first = expected["none"][3].index(third)
    served.ends = frozenset([third])
    stopped = GenerationRequest(list(prompts[3]), 20)
    ignoring = GenerationRequest(list(prompts[3]), 20, ignore_eos=True)
    for request in (stopped, ignoring):
        served.submit(request)
    events = [event for step in served.run() for event in step]
    assert (stopped.finish_reason, ignoring.finish_reason) == ("stop", "length")
    assert stopped.new_tokens == expected["none"][3][:first] and len(ignoring.new_tokens) == 20
    assert [event.request for event in events if event.chosen is None] == [stopped]


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(folders, prompts, monkeypatch) -> None:
    """Of the same logits: a model's differ in the last bit with the rows of a product, which decides some draws."""
    served, choose, same = engine(folders["none"]), sampling.choose, torch.linspace(0, 3, 128)
    monkeypatch.setattr(sampling, "choose", lambda logits, settings: choose(same.expand_as(logits).clone(), settings))

    def draw(seed: int, beside: int) -> list[int]:
        request = GenerationRequest(list(prompts[3]), 20, sampling=Sampling(temperature=1.5, top_p=0.9, seed=seed))
        for item in [request, *(GenerationRequest(list(prompt), 9) for prompt in prompts[:beside])]:
            served.submit(item)
        for _ in served.run():
            pass
        return request.new_tokens

    assert draw(1, 0) == draw(1, 3)
    assert draw(1, 0) != draw(2, 0)


@pytest.mark.parametrize(
    ("tokens", "new", "message"),
    [([], 1, "is empty"), ([1] * 90, 7, "exceed engine.max_seq_len 96"), ([1, 128], 1, "token 128 is not valid")],
)
def test_bad_requests_are_refused(folders, tokens, new, message) -> None:
    with pytest.raises(InputError, match=message):
        engine(folders["none"]).submit(GenerationRequest(tokens, new))


def test_a_model_without_paged_attention_is_refused(tmp_path: Path) -> None:
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = dict(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    Phi3ForCausalLM(Phi3Config(**sizes, pad_token_id=0)).save_pretrained(tmp_path)
    with pytest.raises(Failure, match="'phi3' cannot be served.*: its keys and values come out of qkv_proj") as caught:
        engine(tmp_path)
    assert caught.value.failure_class == "unsupported"


@pytest.mark.parametrize(
    ("number", "expected"), [(1, 1), (2, 2), (3, 3), (4, 4), (5, 6), (7, 8), (9, 12), (13, 16), (24, 24), (25, 32)]
)
def test_sizes_of_recordings(number: int, expected: int) -> None:
    assert cuda_graphs.rounded_up(number) == expected


@torch.inference_mode()
def test_padding_rows_change_no_logits(folders) -> None:
    """What a recording computes beside the sequences is written where nobody reads."""
    served = engine(folders["none"], blocks=4)
    rows = [cuda_graphs.StepToken(5, 2, 2, [0]), cuda_graphs.StepToken(9, 17, 33, [1, 2])]
    alone = served._forward._decode(rows)
    lines = cuda_graphs.to_tensor(rows, 8, 4, served.cache.padding_slot, 16)
    padded = served._forward._decode_lines(lines)
    assert padded.shape == (8, 128)
    assert torch.allclose(padded[:2], alone, atol=0.02 * float(alone.abs().max()))


def test_what_did_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (500_000_000, 80_000_000_000))
    message = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 74.5 GiB of which …"
    with pytest.raises(Failure) as caught, gpu_memory.part("KV cache", torch.device("cuda")):
        raise torch.OutOfMemoryError(message)
    assert caught.value.failure_class == "does_not_fit"
    expected = "KV cache did not fit: 2.15 GB more were needed, and 0.50 of 80.00 GB were free, 1.65 GB too few"
    assert caught.value.reason == expected
