"""TensorRT-LLM's arguments by version: what trimtab writes, and what it refuses before TensorRT-LLM does."""

import pytest

from trimtab.base.errors import InputError
from trimtab.catalog.contracts import version
from trimtab.catalog.contracts.arguments import llm_args, tables, trtllm_build
from trimtab.recipe import Engine, Recipe
from trimtab.serving import settings

NEWER = "1.3.0rc22"
EVERYTHING = Engine(
    backend="trtllm", tensor_parallel_size=4, pipeline_parallel_size=2, max_batch_size=64, max_seq_len=4096,
    max_num_tokens=2048, kv_cache_fraction=0.8, kv_cache_tokens=9999, enable_chunked_prefill=True, tokens_per_block=64,
    enable_block_reuse=False, scheduler_policy="max_utilization",
)  # fmt: skip


def every():
    return [(contract, table, name, argument) for contract in ("llm_args", "trtllm_build")
            for table, rows in tables(contract).items() for name, argument in rows.items()]  # fmt: skip


def test_the_tables_are_well_formed():
    known = {"int", "float", "bool", "str", "list", "dict", "flag"}
    for contract, table, name, argument in every():
        kind, _, nothing = argument.type.partition(" | ")
        assert kind in known | tables(contract).keys() and nothing in ("", "null"), (table, name)
        for end in (argument.since, argument.until):
            assert end is None or version.parse(end)
        may_be_absent = nothing or argument.required or kind in tables(contract)
        assert argument.default is not None or may_be_absent, (table, name)
        assert not argument.values or argument.default in (None, *argument.values), (table, name)


def test_what_is_given_is_written_where_it_differs():
    written = settings.llm_args(EVERYTHING)
    assert written == {
        "tensor_parallel_size": 4, "pipeline_parallel_size": 2, "max_batch_size": 64, "max_num_tokens": 2048,
        "max_input_len": 4095, "max_seq_len": 4096, "enable_chunked_prefill": True,
        "kv_cache_config": {"free_gpu_memory_fraction": 0.8, "tokens_per_block": 64, "enable_block_reuse": False},
        "scheduler_config": {"capacity_scheduler_policy": "MAX_UTILIZATION"},
    }  # fmt: skip
    for number in ("1.2.0", "1.2.1", "1.3.0rc20", NEWER, "1.4.0rc1"):
        assert llm_args(written, number) == written, "every version has all of it"
    defaults = Engine(backend="trtllm", max_batch_size=2048, max_seq_len=1025)
    assert settings.llm_args(defaults) == {"max_seq_len": 1025}
    static = EVERYTHING.model_copy(update={"scheduler_policy": "static_batch"})
    assert settings.llm_args(static)["scheduler_config"] == {"capacity_scheduler_policy": "STATIC_BATCH"}


@pytest.mark.parametrize(
    ("arguments", "number", "message"),
    [
        ({"tensor_parallel": 2}, "1.2.1",
         "tensor_parallel: TensorRT-LLM has no such argument; write 'tensor_parallel_size'"),
        ({"kv_cache_config": {"dtyp": "fp8"}}, "1.2.1",
         "kv_cache_config.dtyp: TensorRT-LLM has no such argument; write 'dtype'"),
        ({"telemetry_config": {"a": 1}}, "1.2.1",
         f"is an argument from {NEWER} on, and this is TensorRT-LLM 1.2.1; leave it out"),
        ({"kv_cache_config": {"disk_cache_size": 9}}, "1.3.0rc5",
         "kv_cache_config.disk_cache_size: is an argument from"),
        ({"batching_type": "STATIC"}, NEWER,
         f"batching_type: is an argument up to 1.3.0rc20, and this is TensorRT-LLM {NEWER}"),
        ({"scheduler_config": {"capacity_scheduler_policy": "STATIC"}}, "1.2.1",
         "'STATIC' is not valid; write 'STATIC_BATCH'"),
        ({"max_batch_size": "8"}, "1.2.1", "max_batch_size: '8' is not valid; write an int"),
        ({"max_batch_size": True}, "1.2.1", "max_batch_size: True is not valid; write an int"),
        ({"enable_chunked_prefill": 1}, "1.2.1", "enable_chunked_prefill: 1 is not valid; write a bool"),
        ({}, "twelve", "'twelve' is no version of TensorRT-LLM; write one like 1.2.1"),
    ],
)  # fmt: skip
def test_refused(arguments, number, message):
    with pytest.raises(InputError) as error:
        llm_args(arguments, number)
    assert message in str(error.value)


def test_a_key_at_its_default_is_left_out_even_where_it_does_not_exist():
    assert llm_args({"batching_type": None, "kv_cache_config": {"disk_cache_size": None}}, "1.2.1") == {}


def test_the_command_line_of_a_build():
    command = settings.build_command(
        EVERYTHING, "ckpt", "out", fp8_weights=True, fp8_kv_cache=False, known_timings=None, learned_timings="t"
    )
    assert command == [
        "trtllm-build", "--checkpoint_dir", "ckpt", "--output_dir", "out", "--max_batch_size", "64",
        "--max_input_len", "4095", "--max_seq_len", "4096", "--max_num_tokens", "2048", "--kv_cache_type", "paged",
        "--tokens_per_block", "64", "--use_fp8_context_fmha", "disable", "--workers", "8",
        "--output_timing_cache", "t", "--gather_context_logits",
    ]  # fmt: skip
    # FP8 attention over the prompt, which is on by default, stays on with an FP8 KV cache alone.
    command = settings.build_command(
        EVERYTHING, "ckpt", "out", fp8_weights=False, fp8_kv_cache=True, known_timings="k", learned_timings="t"
    )
    assert "--use_fp8_context_fmha" not in command and command[command.index("--gemm_plugin") + 1] == "auto"


@pytest.mark.parametrize("name", ["use_fp8", "use_int8", "fp8_kv_cache", "calibration_cache_path", "tp_size", "pp_size",
                                  "quant_algo", "kv_cache_dtype", "auto_parallel"])  # fmt: skip
def test_arguments_that_trtllm_build_never_had_or_lost(name):
    with pytest.raises(InputError, match=f"{name}: TensorRT-LLM has no such argument"):
        trtllm_build({name: "x"}, "1.2.1")


def test_no_build_without_a_builder():
    with pytest.raises(InputError, match="TensorRT-LLM 1.3.0rc22 has no 'trtllm-legacy'"):
        trtllm_build({}, NEWER)


@pytest.mark.parametrize(
    ("number", "backends"),
    [
        ("0.18.2", ()),
        ("1.0.0", ("trtllm-legacy",)),
        ("1.2.0rc8", ("trtllm-legacy",)),
        ("1.2.0", ("trtllm", "trtllm-legacy")),
        ("1.2.1", ("trtllm", "trtllm-legacy")),
        ("1.3.0rc20", ("trtllm", "trtllm-legacy")),
        (NEWER, ("trtllm",)),
        ("1.4.0rc1", ("trtllm",)),
    ],
)
def test_back_ends_of_a_version(number, backends):
    assert version.backends(number) == backends
    if backends:
        assert Recipe.parse(f"engine: {{tensorrt_llm: {number}}}").engine.backend == backends[0]


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("{backend: trtllm-legacy, tensorrt_llm: 1.4.0rc1}",
         "1.4.0rc1 has no 'trtllm-legacy', which ends with 1.2.1 and 1.3.0rc20"),
        ("{backend: trtllm, tensorrt_llm: 1.1.0}",
         "1.1.0 has no 'trtllm', which is in 1.2.0 and later; write engine.backend: trtllm-"),
        ("{backend: torch, tensorrt_llm: 1.2.1}",
         "back end 'torch' does not need; remove it, or write backend: trtllm"),
        ("{tensorrt_llm: newest}", "engine.tensorrt_llm: 'newest' is no version of TensorRT-LLM; write one like 1.2.1"),
        ("{tokens_per_block: 48}", "engine.tokens_per_block: 48 is not valid"),
    ],
)  # fmt: skip
def test_a_recipe_for_a_version(engine, message):
    with pytest.raises(InputError) as error:
        Recipe.parse(f"engine: {engine}")
    assert message in str(error.value)


def test_later_fields_change_the_digest_only_where_they_are_set():
    assert "tokens_per_block" not in Engine().model_dump()
    assert Engine(tokens_per_block=64).model_dump()["tokens_per_block"] == 64
    assert Engine.model_validate(EVERYTHING.model_dump(mode="json")) == EVERYTHING
    other = EVERYTHING.model_copy(update={"tokens_per_block": 32})
    assert Recipe(engine=EVERYTHING).digest != Recipe(engine=other).digest
