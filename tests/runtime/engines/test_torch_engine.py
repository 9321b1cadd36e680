"""The torch engine: exports run as the quantized models they were made from, and scores are the textbook's."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from trimtab.base.errors import Failure, InputError
from trimtab.recipe import Engine as Settings
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.engines import batching
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.linear import choice

SETTINGS = Settings(max_seq_len=64, max_num_tokens=256, max_batch_size=2)
EMULATED = {"kernel": "dequantize + mm", "emulated": True}
KERNELS = {
    "int8_wo": {"kernel": "_weight_int8pack_mm", "emulated": False},
    "int8_sq": {"kernel": choice.Int8Static.name_on(torch.device("cpu")), "emulated": False},
    "fp8": EMULATED,
    "fp8_kv": EMULATED,
    "int4_rtn_g32": {"kernel": "_weight_int4pack_mm_for_cpu", "emulated": False},
    "int4_awq_g32": {"kernel": "_weight_int4pack_mm_for_cpu", "emulated": False},
    "int4_awq_g64": {"kernel": "_weight_int4pack_mm_for_cpu", "emulated": False},
}


def engine(folder: Path, settings: Settings = SETTINGS) -> TorchEngine:
    return TorchEngine(folder, settings, "cpu")


@pytest.fixture(scope="module")
def plain(plain_folder: Path) -> tuple[TorchEngine, Any]:
    """An engine, and the same model in transformers in float32."""
    return engine(plain_folder), LlamaForCausalLM.from_pretrained(plain_folder, dtype=torch.float32)


@pytest.mark.parametrize("name", [*KERNELS, "mixed"])
@torch.inference_mode()
def test_an_export_computes_what_modelopt_simulated(exported: Any, windows: torch.Tensor, name: str) -> None:
    """At least as close to ModelOpt's simulation in float32 as the same simulation in bfloat16.

    Activations near a boundary round to the other side in bfloat16, so no fixed bound serves all formats.
    """
    made = exported(name)
    expected = made.reference(windows).logits
    simulated = copy.deepcopy(made.reference).bfloat16()(windows).logits.float()
    loaded = engine(made.folder)
    for count, length in ((6, 24), (1, 9)):  # the dense paths, then the packed ones
        truth = expected[:count, :length]
        found = loaded.model(windows[:count, :length]).logits.float()
        error = (found - truth).square().mean().sqrt()
        bfloat16_error = (simulated[:count, :length] - truth).square().mean().sqrt()
        assert error < 1.2 * bfloat16_error
    kernels = loaded.kernels()
    assert len(kernels) == 14  # 2 blocks of 7 layers
    if name == "mixed":
        assert kernels["model.layers.0.mlp.up_proj"] == KERNELS["int4_awq_g32"]
        assert kernels["model.layers.1.mlp.up_proj"] == KERNELS["int8_wo"]
    else:
        assert set(map(str, kernels.values())) == {str(KERNELS[name])}


@torch.inference_mode()
def test_quantized_weights_are_never_held_as_floats(exported: Any) -> None:
    loaded = engine(exported("int8_wo").folder)
    floats = [n for n, p in loaded.model.named_parameters() if p.dim() == 2]
    assert floats == ["model.embed_tokens.weight"]
    assert loaded.head.weight is loaded.model.model.embed_tokens.weight
    matrices = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 128 * 64)
    others = 2 * (128 * 64 + 5 * 64)  # embedding and five norms, bfloat16
    scales = 2 * 2 * (2 * 64 + 2 * 32 + 2 * 128 + 64)
    rotary = 2 * 8 * 4  # frequencies and their original, float32
    assert loaded.weight_bytes == matrices + others + scales + rotary


@torch.inference_mode()
def test_rotary_frequencies_are_those_of_transformers(plain: tuple[TorchEngine, Any]) -> None:
    loaded, reference = plain
    assert torch.equal(loaded.model.model.rotary_emb.inv_freq, reference.model.rotary_emb.inv_freq)


def naive(model: Any, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """One request at a time, by the definition."""
    log_probs = model(torch.tensor([context + continuation])).logits[0].float().log_softmax(-1)
    predicted = log_probs[len(context) - 1 : -1]
    chosen = predicted[torch.arange(len(continuation)), continuation]
    return chosen.sum().item(), predicted.argmax(-1).tolist() == continuation


def requests() -> list[tuple[list[int], list[int]]]:
    """Shared contexts with continuations of one to four tokens, lone ones, and greedy ones."""
    generator = torch.Generator().manual_seed(3)

    def draw(length: int) -> list[int]:
        return torch.randint(3, 128, (length,), generator=generator).tolist()

    shared = [draw(n) for n in (1, 7, 12)]
    made = [(context, draw(length)) for context in shared for length in (1, 3, 1, 4)]
    return made + [(draw(5 + n), draw(1 + n % 3)) for n in range(9)]


@torch.inference_mode()
def test_loglikelihood_is_that_of_one_request_at_a_time(plain: tuple[TorchEngine, Any]) -> None:
    loaded, reference = plain
    asked = requests()
    for context, _ in asked[:2]:  # what the model itself would say is greedy
        asked.append(
            (
                context,
                reference.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False)[
                    0, len(context) :
                ].tolist(),
            )
        )
    expected = [naive(reference, *request) for request in asked]
    assert any(greedy for _, greedy in expected)
    for (score, greedy), (true_score, true_greedy) in zip(loaded.loglikelihood(asked), expected, strict=True):
        assert score == pytest.approx(true_score, abs=0.1)  # nats: bfloat16 against float32
        assert greedy == true_greedy


def test_branches_do_not_see_each_other(plain: tuple[TorchEngine, Any]) -> None:
    loaded, _ = plain
    asked = requests()
    alone = [loaded.loglikelihood([request])[0][0] for request in asked]
    together = [score for score, _ in loaded.loglikelihood(asked)]
    assert together == pytest.approx(alone, abs=0.1)
    assert sum(len(row) for row in batching.rows(asked, True, 256)) < sum(
        len(c) + len(t) - 1 for c, t in asked
    )


@torch.inference_mode()
def test_nll_is_the_sum_of_the_loss(plain: tuple[TorchEngine, Any], windows: torch.Tensor) -> None:
    loaded, reference = plain
    logits = reference(windows).logits[:, :-1].transpose(1, 2)
    expected = F.cross_entropy(logits, windows[:, 1:], reduction="none").sum(1)
    assert loaded.nll(windows) == pytest.approx(expected.tolist(), rel=0.005)
    small = TorchEngine(loaded.folder, Settings(max_num_tokens=24), "cpu")  # one window a batch
    assert small.nll(windows) == pytest.approx(expected.tolist(), rel=0.005)


@torch.inference_mode()
def test_a_prediction_is_what_nll_sums_and_the_likeliest_tokens(
    plain: tuple[TorchEngine, Any], windows: torch.Tensor
) -> None:
    loaded, reference = plain
    told = loaded.predict(windows, 5)
    assert [sum(places) for places in told.nll] == pytest.approx(loaded.nll(windows), rel=1e-6)
    expected = reference(windows).logits[:, :-1].log_softmax(-1)
    log_probs = torch.tensor(told.log_probs)
    assert log_probs.shape == (*expected.shape[:2], 5) and (log_probs.diff(dim=-1) <= 0).all()
    # bfloat16 against float32: each token has nearly the probability that the reference gives it, and none is better.
    assert torch.allclose(expected.gather(-1, torch.tensor(told.tokens)), log_probs, atol=0.1)
    assert torch.allclose(expected.topk(5).values, log_probs, atol=0.1)
    assert len(loaded.predict(windows[:1], 10_000).tokens[0][0]) == loaded.model.config.vocab_size


def test_generation_is_greedy_and_stops_before_the_end_token(plain: tuple[TorchEngine, Any]) -> None:
    loaded, reference = plain
    prompts = [context for context, _ in requests()[4:14]]
    reference.generation_config.pad_token_id = 0
    same = 0
    for prompt, answer in zip(prompts, loaded.generate(prompts, 6), strict=True):
        expected = reference.generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[
            0, len(prompt) :
        ].tolist()
        expected = expected[: expected.index(2)] if 2 in expected else expected
        same += answer == expected
    assert same >= len(prompts) - 1  # bfloat16 may break one near-tie


def test_decode_speed_is_measured_once_a_repeat(plain: tuple[TorchEngine, Any]) -> None:
    speeds = plain[0].decode_speed(batch_size=2, prompt_tokens=4, new_tokens=3, repeats=2)
    assert len(speeds) == 2
    assert min(speeds) > 0


TOO_LONG = {
    "loglikelihood": (
        lambda e: e.loglikelihood([([5], [6]), ([5] * 60, [6] * 5)]),
        "request 1 has 65 tokens",
    ),
    "nll": (lambda e: e.nll(torch.ones(1, 65, dtype=torch.int64)), "a window has 65 tokens"),
    "generate": (lambda e: e.generate([[5] * 60], 5), "prompt 0 with 5 new tokens has 65 tokens"),
    "decode_speed": (lambda e: e.decode_speed(1, 60, 5, 1), "decode_speed has 65 tokens"),
    "empty context": (lambda e: e.loglikelihood([([], [6])]), "request 0: its context is empty"),
    "empty continuation": (lambda e: e.loglikelihood([([5], [])]), "request 0: its continuation is empty"),
    "empty prompt": (lambda e: e.generate([[]], 5), "prompt 0: is empty"),
}


@pytest.mark.parametrize("case", TOO_LONG)
def test_nothing_is_truncated(plain: tuple[TorchEngine, Any], case: str) -> None:
    ask, words = TOO_LONG[case]
    with pytest.raises(InputError, match=words):
        ask(plain[0])


LAYER = "model.layers.1.mlp.down_proj"


def damaged(folder: Path, target: Path, change: Any) -> Path:
    """Copies an export with its tensors changed in place by `change`."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.mark.parametrize("name", ["int8_wo", "int8_sq", "fp8", "int4_awq_g32"])
def test_a_corrupted_scale_moves_the_score(
    exported: Any, tmp_path: Path, windows: torch.Tensor, name: str
) -> None:
    folder = exported(name).folder
    broken = damaged(folder, tmp_path, lambda tensors: tensors[f"{LAYER}.weight_scale"].mul_(3))
    before, after = engine(folder).nll(windows), engine(broken).nll(windows)
    change = sum(abs(b - a) for a, b in zip(before, after, strict=True))
    assert change > 0.005 * sum(before)
    assert engine(folder).nll(windows) == pytest.approx(before, rel=1e-6)


DAMAGE = {
    "missing scale": ("int8_wo", lambda t: t.pop(f"{LAYER}.weight_scale"), LAYER),
    "missing input scale": ("fp8", lambda t: t.pop(f"{LAYER}.input_scale"), LAYER),
    "missing weight": ("int4_awq_g32", lambda t: t.pop(f"{LAYER}.weight"), LAYER),
    "missing layer": ("int8_wo", lambda t: [t.pop(f"{LAYER}.weight"), t.pop(f"{LAYER}.weight_scale")], LAYER),
    "missing listed layer": (
        "mixed",
        lambda t: [t.pop(f"{LAYER}.weight"), t.pop(f"{LAYER}.weight_scale")],
        LAYER,
    ),
    "missing norm": ("fp8", lambda t: t.pop("model.norm.weight"), "model.norm"),
    "scale not finite": ("int8_wo", lambda t: t[f"{LAYER}.weight_scale"].fill_(torch.nan), LAYER),
    "scale of zero": ("int8_sq", lambda t: t[f"{LAYER}.input_scale"].zero_(), LAYER),
    "wrong shape": (
        "int8_wo",
        lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:, :64].clone()}),
        LAYER,
    ),
    "superfluous tensor": ("fp8", lambda t: t.update({"model.extra.weight": torch.ones(2)}), "model.extra"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_export_is_refused_and_names_the_layer(exported: Any, tmp_path: Path, case: str) -> None:
    name, change, culprit = DAMAGE[case]
    folder = damaged(exported(name).folder, tmp_path, change)
    with pytest.raises(Failure) as caught:
        engine(folder)
    assert caught.value.failure_class == "export_damaged"
    assert culprit in caught.value.reason


def test_a_file_cut_short_is_a_damaged_export(exported: Any, tmp_path: Path) -> None:
    folder = damaged(exported("fp8").folder, tmp_path, lambda _: None)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Failure) as caught:
        Export(folder)
    assert caught.value.failure_class == "export_damaged"


def test_a_folder_without_weights_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must hold safetensors"):
        engine(tmp_path)
