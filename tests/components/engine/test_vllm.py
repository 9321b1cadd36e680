"""Engines of vLLM's stand-in, judged beside the torch engine on the same export."""

import math
import subprocess
from pathlib import Path

import pytest
import standin
import torch

from trimtab.base import child
from trimtab.base.errors import Failure, InputError
from trimtab.components.engine import smoke, work
from trimtab.recipe import Engine
from trimtab.runtime.engines.backends import checkpoint_digest, open_engine
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.runtime.engines.vllm_engine import VllmEngine, score
from trimtab.serving.record import read
from trimtab.serving.vllm import VERSIONS

SETTINGS = {"backend": "vllm", "max_batch_size": 4, "max_seq_len": 96, "max_num_tokens": 80}


@pytest.fixture
def vllm(tmp_path, monkeypatch):
    """vLLM 0.24.0. The warm load is done here: a process takes seconds to start."""
    standin.install_vllm(tmp_path / "vllm", monkeypatch)
    monkeypatch.setattr(work.child, "call", lambda name, time_limit, **given: child.Done(smoke.smoke(**given), 0.0, 0))


def build(export: Path, folder: Path, **settings) -> Path:
    for part in ("engine", "scratch"):
        (folder / part).mkdir(parents=True)
    work.build(str(export), str(folder / "engine"), str(folder / "scratch"), settings)
    return folder / "engine"


def requests() -> list[tuple[list[int], list[int]]]:
    """Of one context and of many; the last is as long as an engine of `SETTINGS` takes."""
    draw = torch.Generator().manual_seed(3)
    tokens = torch.randint(2, 300, (96,), generator=draw).tolist()
    return [(tokens[:40], tokens[40:46]), (tokens[:40], tokens[50:51]), (tokens[7:8], tokens[8:20]),
            (tokens[:90], tokens[90:])]  # fmt: skip


@pytest.mark.parametrize(("form", "settings"), [
    ("bf16", {}), ("fp8", {}), ("fp8", {"kv_cache": "fp8"}), ("fp8_per_channel", {}),
    ("int4_awq", {}), ("int4_gptq", {}), ("int4_rtn", {"exclude": ["*.o_proj"]}), ("nvfp4_wo", {}), ("mxfp4_wo", {}),
    ("mixed_gpu", {"effective_bits": 6, "group_size": 64}),
])  # fmt: skip
def test_it_answers_as_the_torch_engine_does(export, tmp_path, vllm, form, settings):
    folder = export(form, **settings)
    engine = build(folder, tmp_path / "built", **SETTINGS)
    served, torch_engine = open_engine(engine, folder), TorchEngine(folder, Engine(**SETTINGS))
    asked = requests()
    # Logits between 4 and 8 are 1/32 apart in bfloat16, so a token may be off by half of that. Inputs that float32 and
    # bfloat16 round to FP8 apart are a sixteenth apart.
    near = 0.5 if form.startswith(("fp8", "mixed")) else 0.1
    for (likelihood, greedy), (expected, expected_greedy) in zip(
        served.loglikelihood(asked), torch_engine.loglikelihood(asked), strict=True
    ):
        assert abs(likelihood - expected) < near and greedy == expected_greedy and expected < -1
    windows = torch.randint(2, 300, (2, 24), generator=torch.Generator().manual_seed(4))
    assert served.nll(windows) == pytest.approx(torch_engine.nll(windows), abs=2 * near)
    told, expected = served.predict(windows, 4), torch_engine.predict(windows, 4)
    assert [sum(places) for places in told.nll] == pytest.approx(served.nll(windows), rel=1e-6)
    assert torch.tensor(told.log_probs) == pytest.approx(torch.tensor(expected.log_probs), abs=2 * near)
    prompts = [context for context, _ in asked[:3]]
    answers, expected = served.generate(prompts, 8), torch_engine.generate(prompts, 8)
    if form != "bf16":  # the stand-in multiplies in float32: of two tokens as likely it may take either
        pairs = [*zip(prompts, answers, strict=True), *zip(prompts, expected, strict=True)]
        found = [likelihood for likelihood, _ in torch_engine.loglikelihood([(p, a[:1]) for p, a in pairs])]
        assert found[:3] == pytest.approx(found[3:], abs=near)
    else:
        assert answers == expected
    assert len(served.decode_speed(2, 8, 4, repeats=2)) == 2
    layers = read(engine).kernels
    assert layers == served.kernels() and layers.keys() == torch_engine.kernels().keys()
    assert bool(read(engine).translated) == (form != "bf16")  # the tiny model's head is its embedding
    assert served.weight_bytes == (folder / "model.safetensors").stat().st_size and served.device_bytes == 0
    served.close()
    assert served._llm.closed


def test_what_the_model_writes_itself_is_greedy(export, vllm):
    served = VllmEngine(export("bf16"), Engine(**SETTINGS))
    prompt = requests()[0][0]
    answer = served.generate([prompt], 4)[0]
    other = [*answer[:-1], answer[-1] + 1]
    assert [greedy for _, greedy in served.loglikelihood([(prompt, answer), (prompt, other)])] == [True, False]


def test_an_answer_ends_where_the_generation_config_says(export, tmp_path, vllm):
    """Also where that is another token than the tokenizer's, and the end itself is no part of the answer."""
    folder = export("bf16")
    prompt = requests()[0][0]
    free = VllmEngine(folder, Engine(**SETTINGS)).generate([prompt], 6)[0]
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    (copy / "generation_config.json").unlink(missing_ok=True)
    (copy / "generation_config.json").write_text(f'{{"eos_token_id": [{free[3]}, 299]}}')
    assert VllmEngine(copy, Engine(**SETTINGS)).generate([prompt], 6)[0] == free[: free.index(free[3])]


def test_what_is_written_beside_the_engine(export, tmp_path, vllm):
    more = {"kv_cache_fraction": 0.8, "enable_block_reuse": False, "tokens_per_block": 64}
    engine = build(export("bf16"), tmp_path / "built", **SETTINGS, **more)
    assert sorted(path.name for path in engine.iterdir()) == ["engine.json", "serve.sh"]
    assert read(engine).versions["vllm"] == "0.24.0"
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$@"\n')
    program.chmod(0o755)
    path = f"{program.parent}:/usr/bin:/bin"
    run = ["sh", str(engine / "serve.sh")]
    told = subprocess.run([*run, "/models/a b"], env={"PATH": path}, text=True, capture_output=True, check=True).stdout
    assert told.strip() == (
        "serve /models/a b --tensor-parallel-size 1 --pipeline-parallel-size 1 --gpu-memory-utilization 0.8 "
        "--max-model-len 96 --max-num-seqs 4 --max-num-batched-tokens 80 --enable-chunked-prefill "
        "--no-enable-prefix-caching --block-size 64"
    )
    silent = subprocess.run(run, env={"PATH": path}, text=True, capture_output=True)
    assert silent.returncode and "folder of the export" in silent.stderr


def test_int4_is_served_from_beside_the_engine(export, tmp_path, vllm):
    folder = export("int4_awq")
    engine = build(folder, tmp_path / "built", **SETTINGS)
    assert sorted(path.name for path in engine.iterdir()) == ["checkpoint", "engine.json", "serve.sh"]
    built = read(engine)
    assert built.translated == "trimtab-int4" and built.checkpoint == checkpoint_digest(folder)
    program = tmp_path / "bin" / "vllm"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\necho "$2"\n')
    program.chmod(0o755)
    told = subprocess.run(["sh", str(engine / "serve.sh")], env={"PATH": f"{program.parent}:/usr/bin:/bin"}, text=True,
                          capture_output=True, check=True)  # fmt: skip
    assert told.stdout.strip() == str(engine / "checkpoint")
    with pytest.raises(Failure, match="vLLM reads this export once it is translated; build its engine"):
        VllmEngine(folder, Engine(**SETTINGS))


def test_nothing_is_truncated(export, vllm):
    served = VllmEngine(export("bf16"), Engine(**SETTINGS))
    for ask, message in [
        (lambda: served.loglikelihood([([5] * 90, [6] * 7)]), "request 0 has 97 tokens, more than engine.max_seq_len"),
        (lambda: served.loglikelihood([([], [6])]), "request 0: its context is empty"),
        (lambda: served.generate([[5] * 90], 7), "prompt 0 with 7 new tokens has 97 tokens, more than"),
        (lambda: served.generate([[]], 7), "prompt 0: is empty"),
        (lambda: served.decode_speed(1, 90, 6, 1), "a sequence of decode_speed has 97 tokens"),
    ]:
        with pytest.raises(InputError) as error:
            ask()
        assert message in str(error.value)
    longest = VllmEngine(export("bf16"), Engine(backend="vllm", max_seq_len=2048))  # all that the model has
    with pytest.raises(InputError, match="request 0 has 2048 tokens, more than vLLM's longest scored prompt 2047"):
        longest.loglikelihood([([5] * 2000, [6] * 48)])


@pytest.mark.parametrize(
    ("version", "form", "settings", "message"),
    [
        ("0.23.1", "bf16", {}, "engine.backend: 'vllm' needs vLLM 0.24, and this image has 0.23.1"),
        ("0.25.0", "bf16", {}, "engine.backend: 'vllm' needs vLLM 0.24, and this image has 0.25.0"),
        ("0.24.0", "int8_wo", {}, "vLLM reads FP8, FP8_PER_CHANNEL_PER_TOKEN, NVFP4, W4A16_AWQ, W4A16_NVFP4, "
         "W4A16_MXFP4 of ModelOpt's layers, and no W8A16"),
        ("0.24.0", "fp8 KV cache alone", {}, "vLLM refuses the export or its settings: Missing 'quant_algo'"),
        ("0.24.0", "bf16", {"max_seq_len": 4096, "max_num_tokens": 8192}, "vLLM refuses the export or its settings: "
         "User-specified max_model_len (4097) is greater"),
    ],
)  # fmt: skip
def test_what_vllm_does_not_serve(export, tmp_path, monkeypatch, vllm, version, form, settings, message):
    standin.install_vllm(tmp_path / "other", monkeypatch, version)
    folder = export("bf16", kv_cache="fp8") if form == "fp8 KV cache alone" else export(form)
    with pytest.raises(Failure) as failure:
        build(folder, tmp_path / "built", **{**SETTINGS, **settings})
    assert failure.value.failure_class == "unsupported" and message in failure.value.reason


def entry(own: int, likelihood: float, other: int = 9, others: float = -2.0):
    return {own: Likelihood(likelihood), other: Likelihood(others)}


class Likelihood:
    def __init__(self, logprob: float):
        self.logprob = logprob


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ([None, entry(2, -5.0), entry(3, -1.0), entry(4, -0.5)], (-1.5, True)),
        ([None, entry(2, -1.0), entry(3, -3.0), entry(4, -0.5)], (-3.5, False)),
        ([None, entry(2, -1.0), entry(3, -2.0), {4: Likelihood(-0.5)}], (-2.5, True)),  # as likely as the likeliest
        ([None, entry(2, -1.0), entry(3, -math.inf), entry(4, -0.5)], (-math.inf, False)),
    ],
)
def test_a_continuation_is_scored_by_its_own_tokens(told, expected):
    assert score(told, [1, 2, 3, 4], 2) == expected


@pytest.mark.parametrize(
    "told",
    [
        None,
        [None, entry(2, -1.0), entry(3, -1.0)],  # a token too few: their ends would not be one
        [None, entry(2, -1.0), entry(5, -1.0), entry(4, -1.0)],  # another token's
        [None, entry(2, -1.0), None, entry(4, -1.0)],
    ],
)
def test_log_probabilities_of_other_tokens_are_no_answer(told):
    with pytest.raises(Failure, match=r"vLLM returns \d log-probabilities for 4 tokens") as failure:
        score(told, [1, 2, 3, 4], 2)
    assert failure.value.failure_class == "unsupported"


def test_the_extra_installs_the_versions_that_are_served():
    import tomllib

    text = (Path(__file__).parents[3] / "pyproject.toml").read_text()
    asked = tomllib.loads(text)["project"]["optional-dependencies"]["vllm"]
    assert asked == [f"vllm>={VERSIONS[0]},<{VERSIONS[1]}"]
