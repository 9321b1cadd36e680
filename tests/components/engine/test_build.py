"""Engines built with a stand-in for TensorRT-LLM, and judged beside the torch engine on the same export."""

import json
import os
from pathlib import Path

import pytest
import standin
import torch
import yaml
from answers import assert_same

from trimtab.base import child
from trimtab.base.errors import Failure, InputError, StageError
from trimtab.catalog.contracts import arguments
from trimtab.components.engine import smoke, work
from trimtab.recipe import Engine
from trimtab.runtime.engines.backends import open_engine
from trimtab.runtime.engines.torch_engine import TorchEngine
from trimtab.serving.record import Device, read

LIMITS = {"max_batch_size": 4, "max_seq_len": 96, "max_num_tokens": 80}
TRTLLM, LEGACY = {"backend": "trtllm", **LIMITS}, {"backend": "trtllm-legacy", **LIMITS}


@pytest.fixture
def trtllm(tmp_path, monkeypatch):
    """TensorRT-LLM 1.2.1, which has both back ends. The warm load is done here: a process takes seconds to start."""
    standin.install(tmp_path / "trtllm", monkeypatch)

    def call(name: str, time_limit: float, **arguments):
        assert name == "trimtab.components.engine.smoke:smoke" and time_limit == 3600
        return child.Done(smoke.smoke(**arguments), 0.0, 0)

    monkeypatch.setattr(work.child, "call", call)


def build(export: Path, folder: Path, **settings) -> Path:
    for part in ("engine", "scratch"):
        (folder / part).mkdir(parents=True)
    work.build(str(export), str(folder / "engine"), str(folder / "scratch"), settings)
    return folder / "engine"


def requests(count: int = 6) -> list[tuple[list[int], list[int]]]:
    """Of one context and of many, with a long common beginning, which block reuse would take logits from."""
    draw = torch.Generator().manual_seed(3)
    common = torch.randint(2, 300, (40,), generator=draw).tolist()
    parts = [torch.randint(2, 300, (5 + n,), generator=draw).tolist() for n in range(count)]
    return [(common + part[:2], part[2:]) for part in parts] + [(common, parts[0]), (parts[1][:1], parts[2])]


@pytest.mark.parametrize(
    ("settings", "form", "tolerance"),
    [
        (TRTLLM, "bf16", 0.05),
        (TRTLLM, "fp8", 0.05),
        (TRTLLM, "int4_awq", 0.05),
        # The stand-in's engines dequantise weights to bfloat16 and leave activations alone, as these formats do.
        (LEGACY, "bf16", 0.05),
        ({**LEGACY, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}, "bf16", 0.05),
        ({**LEGACY, "tensor_parallel_size": 2}, "int4_awq", 0.3),
        ({**LEGACY, "tensor_parallel_size": 4}, "int8_wo", 0.3),
    ],
)
def test_it_answers_as_the_torch_engine_does(export, tmp_path, trtllm, settings, form, tolerance):
    engine = build(export(form), tmp_path / "built", **settings)
    served, torch_engine = open_engine(engine, export(form)), TorchEngine(export(form), Engine(**LIMITS))
    asked = requests()
    ours, theirs = served.loglikelihood(asked), torch_engine.loglikelihood(asked)
    # An FP8 activation beside the middle of two numbers goes to either, and which depends on the rows of a product on
    # some processors: by so much the torch engine itself differs between many requests and one.
    alone = [torch_engine.loglikelihood([request])[0][0] for request in asked]
    noise = max(abs(one - expected) for one, (expected, _) in zip(alone, theirs, strict=True))
    for (likelihood, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert abs(likelihood - expected) < tolerance + noise and greedy == expected_greedy and expected < -1
    windows = torch.randint(2, 300, (3, 24), generator=torch.Generator().manual_seed(4))
    together, alone = torch_engine.nll(windows), [torch_engine.nll(window[None])[0] for window in windows]
    noise = max(abs(one - expected) for one, expected in zip(alone, together, strict=True))
    assert noise < 0.5 and served.nll(windows) == pytest.approx(together, abs=2 * tolerance + noise)
    told, expected = served.predict(windows, 4), torch_engine.predict(windows, 4)
    assert [sum(places) for places in told.nll] == pytest.approx(served.nll(windows), rel=1e-6)
    assert torch.tensor(told.log_probs) == pytest.approx(torch.tensor(expected.log_probs), abs=2 * tolerance + noise)
    prompts = [request[0] for request in asked]
    if tolerance < 0.1:
        assert_same(served.generate(prompts, 8), torch_engine.generate(prompts, 8), prompts, torch_engine)
    assert len(served.decode_speed(2, 8, 4, repeats=2)) == 2
    layers = read(engine).kernels
    assert layers == served.kernels() and len(layers) == (28 if form != "bf16" else 0)
    assert served.weight_bytes == (export(form) / "model.safetensors").stat().st_size and served.device_bytes == 0
    served.close()


def test_speeds_are_compared_one_engine_after_the_other(export, tmp_path, trtllm, monkeypatch):
    """Each claims the GPU's memory, so the first is closed before the second is opened."""
    from tensorrt_llm import LLM

    from trimtab.components.validation.evaluation import measure
    from trimtab.runtime.engines import kept

    log: list[str] = []
    opened, shut = LLM.__init__, LLM.shutdown
    monkeypatch.setattr(measure, "SPEED", {"prompt_tokens": 4, "new_tokens": 2, "repeats": 1})
    engines = [build(export(form), tmp_path / form, **TRTLLM) for form in ("fp8", "bf16")]
    monkeypatch.setattr(LLM, "__init__", lambda *args, **named: (log.append("open"), opened(*args, **named))[1])
    monkeypatch.setattr(LLM, "shutdown", lambda self: (log.append("close"), shut(self))[1])
    places = zip(("engine", "export", "baseline_engine", "baseline_export"),
                 (engines[0], export("fp8"), engines[1], export("bf16")), strict=True)  # fmt: skip
    found = measure.compare_speed(
        **{name: str(path) for name, path in places}, output=str(tmp_path), scratch="", parameters={"rounds": 2}
    )
    assert log == ["open", "close", "open"], "the second one stays, for the confirmation"
    kept.close()
    assert log == ["open", "close"] * 2 and len(found) == 4 and all(speed > 0 for speed in found.values())


def test_what_trtllm_writes(export, tmp_path, trtllm):
    engine = build(export("fp8"), tmp_path / "built", **TRTLLM, tensor_parallel_size=2, tokens_per_block=64)
    assert sorted(path.name for path in engine.iterdir()) == ["engine.json", "llm_args.yaml"]
    written = yaml.safe_load((engine / "llm_args.yaml").read_text())
    assert written == {
        "tensor_parallel_size": 2, "max_batch_size": 4, "max_num_tokens": 80, "max_input_len": 95, "max_seq_len": 96,
        "kv_cache_config": {"tokens_per_block": 64},
    }  # fmt: skip
    assert arguments.llm_args(written, "1.2.1") == written, "what is written differs from the defaults and is known"
    built = read(engine)
    assert built.versions["tensorrt_llm"] == "1.2.1" and built.settings.tokens_per_block == 64


def test_what_legacy_writes_and_learns(export, tmp_path, trtllm, monkeypatch):
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    engine = build(export("fp8", kv_cache="fp8"), tmp_path / "first", **LEGACY, tensor_parallel_size=2)
    files = sorted(path.name for path in (engine / "engine").iterdir())
    assert files == ["config.json", "rank0.engine", "rank1.engine"]
    asked = json.loads((engine / "engine" / "config.json").read_text())["build_config"]
    expected = {
        "max_batch_size": 4, "max_input_len": 95, "max_seq_len": 96, "max_num_tokens": 80, "workers": 2,
        "gather_context_logits": True, "kv_cache_type": "paged", "use_fp8_context_fmha": "enable", "gemm_plugin": None,
        "input_timing_cache": None, "use_paged_context_fmha": "enable",
    }  # fmt: skip
    assert {name: asked[name] for name in expected} == expected
    cache = tmp_path / "cache" / "timing" / "tensorrt-10.14.1-sm-none.cache"
    assert cache.read_bytes() == b"timings"
    assert not (tmp_path / "first" / "scratch" / "checkpoint").exists()
    engine = build(export("bf16"), tmp_path / "second", **LEGACY)
    asked = json.loads((engine / "engine" / "config.json").read_text())["build_config"]
    assert asked["input_timing_cache"] == str(cache)
    assert asked["use_fp8_context_fmha"] == "disable" and asked["gemm_plugin"] == "auto"


def test_the_warm_load_is_a_process_of_its_own(export, tmp_path, monkeypatch):
    standin.install(tmp_path / "trtllm", monkeypatch)
    engine = build(export("fp8"), tmp_path / "built", **TRTLLM)
    assert len(read(engine).kernels) == 28 and read(engine).kernels["model.layers.0.mlp.up_proj"] == {
        "kernel": "trtllm FP8", "emulated": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"versions": {"tensorrt_llm": "1.2.0", "tensorrt": "10.14.1"}},
         "built by tensorrt_llm 1.2.0, and here is 1.2.1; build it anew"),
        ({"versions": {"tensorrt_llm": "1.2.1", "tensorrt": "10.13.3"}},
         "built by tensorrt 10.13.3, and here is 10.14.1; build it anew"),
        ({"device": Device(name="H100", compute_capability=(9, 0))},
         "built for compute capability 9.0, and here is no GPU; build it anew"),
        ({"settings": Engine(**LEGACY, tensor_parallel_size=2)}, "holds engines of 1 ranks, and 2 are asked for"),
    ],
)  # fmt: skip
def test_an_engine_from_elsewhere_is_refused(export, tmp_path, trtllm, changes, message):
    engine = build(export("bf16"), tmp_path / "built", **LEGACY)
    open_engine(engine, export("bf16")).close()
    read(engine).model_copy(update=changes).write(engine)
    with pytest.raises(Failure) as failure:
        open_engine(engine, export("bf16"))
    assert failure.value.failure_class == "unsupported" and message in failure.value.reason


def test_an_engine_is_opened_with_its_own_export_only(export, tmp_path):
    engine = build(export("bf16"), tmp_path / "built", backend="torch")
    with pytest.raises(Failure, match=r"the engine was built from export \w{12}, and this one is \w{12}") as failure:
        open_engine(engine, export("fp8"))
    assert failure.value.failure_class == "export_damaged"


@pytest.mark.parametrize(
    ("version", "settings", "message"),
    [
        (None, TRTLLM, "engine.backend: 'trtllm' is not part of this image, for it has no TensorRT-LLM; write 'torch'"),
        ("1.2.1", {"backend": "vllm"}, "engine.backend: 'vllm' is not part of this image, for it has no vLLM; write"),
        ("1.1.0", TRTLLM, "1.1.0 has no 'trtllm', which is in 1.2.0 and later; write engine.backend: trtllm-legacy"),
        ("1.3.0rc22", LEGACY, "TensorRT-LLM 1.3.0rc22 has no 'trtllm-legacy', which ends with 1.2.1 and 1.3.0rc20"),
        ("1.2.1", {**TRTLLM, "tensorrt_llm": "1.3.0rc5"}, "1.3.0rc5 is asked for, and this image has 1.2.1"),
    ],
)
def test_a_back_end_that_the_image_lacks(export, tmp_path, monkeypatch, version, settings, message):
    if version:
        standin.install(tmp_path / "trtllm", monkeypatch, version)
    with pytest.raises(Failure) as failure:
        build(export("bf16"), tmp_path / "built", **settings)
    assert failure.value.failure_class == "unsupported" and message in failure.value.reason


def test_a_format_that_the_image_is_too_old_for(export, tmp_path, monkeypatch):
    standin.install(tmp_path / "trtllm", monkeypatch, "1.2.1")
    with pytest.raises(Failure, match=r"reads W4A16_NVFP4 from 1.3.0rc20 on, and this image has 1.2.1") as failure:
        build(export("nvfp4_wo"), tmp_path, backend="trtllm")
    assert failure.value.failure_class == "unsupported"


@pytest.mark.parametrize("backend", ["trtllm", "trtllm-legacy"])
def test_nothing_is_truncated(export, tmp_path, trtllm, backend):
    served = open_engine(build(export("bf16"), tmp_path / "built", **{**TRTLLM, "backend": backend}), export("bf16"))
    assert served.loglikelihood([([5] * 70, [6] * 10)])
    for ask, message in [
        (lambda: served.loglikelihood([([5] * 90, [6] * 7)]), "request 0 has 97 tokens, more than engine.max_seq_len"),
        (lambda: served.loglikelihood([([5] * 80, [6])]), "request 0 has 81 tokens, more than engine.max_num_tokens"),
        (lambda: served.loglikelihood([([], [6])]), "request 0: its context is empty"),
        (lambda: served.generate([[5] * 90], 7), "prompt 0 with 7 new tokens has 97 tokens, more than"),
        (lambda: served.generate([[5] * 81], 7), "prompt 0 has 81 tokens, more than engine.max_num_tokens 80"),
        (lambda: served.generate([[]], 7), "prompt 0: is empty"),
    ]:
        with pytest.raises(InputError) as error:
            ask()
        assert message in str(error.value)


def test_logits_of_another_shape_are_no_answer(export, tmp_path, trtllm):
    """The library returns the logits of a part of the prompt when it reuses blocks: the score would be another's."""
    served = open_engine(build(export("bf16"), tmp_path / "built", **TRTLLM), export("bf16"))
    served._llm._reuse = True
    with pytest.raises(Failure, match=r"returns context logits \[\d+, 320\] for 4\d tokens of a vocabulary of 300"):
        served.loglikelihood(requests())


@pytest.mark.parametrize(
    ("script", "failure_class", "message"),
    [
        ("echo '[E] Error: Networks with FP8 precision require hardware with FP8 support'; exit 1", "unsupported",
         "trtllm-build ended with exit code 1: [E] Error: Networks with FP8 precision require hardware"),
        ("echo 'CUDA error: out of memory'; exit 1", "does_not_fit", "trtllm-build ran out of memory: CUDA error"),
        ("echo oom_kill 1 >$OOM_COUNTER; kill -9 $$", "does_not_fit", "trtllm-build was killed: it needed more memory"),
        ("exit 0", "unsupported", "trtllm-build wrote no engine for rank 0"),
    ],
)  # fmt: skip
def test_a_build_that_fails(export, tmp_path, trtllm, oom_counter, script, failure_class, message):
    (tmp_path / "trtllm" / "bin" / "trtllm-build").write_text(f"#!/bin/sh\n{script}\n")
    with pytest.raises(Failure) as failure:
        build(export("bf16"), tmp_path / "built", **LEGACY)
    assert failure.value.failure_class == failure_class and message in failure.value.reason


def test_the_time_limit(export, tmp_path, trtllm, monkeypatch):
    (tmp_path / "trtllm" / "bin" / "trtllm-build").write_text("#!/bin/sh\nsleep 30\n")
    monkeypatch.setenv(work.TIME_LIMIT, "0.5")
    with pytest.raises(StageError, match="trtllm-build was not done after 0.5 s and was ended"):
        build(export("bf16"), tmp_path / "built", **LEGACY)
    monkeypatch.setenv(work.TIME_LIMIT, "an hour")
    with pytest.raises(InputError, match="TRIMTAB_ENGINE_SECONDS: 'an hour' is not valid; write seconds, such as 3600"):
        build(export("bf16"), tmp_path / "again", **LEGACY)
    assert os.environ[work.TIME_LIMIT]
