"""What a recipe's engine is called in TensorRT-LLM: the arguments of the LLM API and of `trtllm-build`."""

from __future__ import annotations

from typing import Any

from trimtab.catalog.backends import BACKENDS
from trimtab.catalog.contracts import arguments, version
from trimtab.recipe import Engine


def target_version(settings: Engine) -> str:
    """Returns the TensorRT-LLM that a recipe names, or the installed one, or the newest that is no pre-release."""
    return settings.tensorrt_llm or version.installed() or version.NEWEST


def llm_args(settings: Engine) -> dict[str, Any]:
    """Returns the LLM API's arguments, also the content of the YAML that trtllm-serve reads.

    Only what differs from the defaults: the KV cache's type is the checkpoint's, which is the default.

    Raises:
        InputError: the version that is served with has no such argument.
    """
    given = {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "max_batch_size": settings.max_batch_size,
        "max_num_tokens": settings.max_num_tokens,
        "max_input_len": longest_prompt(settings),
        "max_seq_len": settings.max_seq_len,
        "enable_chunked_prefill": settings.enable_chunked_prefill,
        "kv_cache_config": {
            "free_gpu_memory_fraction": settings.kv_cache_fraction,
            "tokens_per_block": settings.tokens_per_block,
            "enable_block_reuse": settings.enable_block_reuse,
        },
        "scheduler_config": {"capacity_scheduler_policy": settings.scheduler_policy.upper()},
    }
    return arguments.llm_args(given, target_version(settings))


def compiled_args(settings: Engine) -> dict[str, Any]:
    """Returns those of `llm_args` that a built engine takes: the limits are compiled in, the parallelism is its own."""
    given = llm_args(settings)
    return {name: given[name] for name in ("kv_cache_config", "scheduler_config") if name in given}


def build_command(
    settings: Engine,
    checkpoint: str,
    output: str,
    *,
    fp8_weights: bool,
    fp8_kv_cache: bool,
    known_timings: str | None,
    learned_timings: str,
) -> list[str]:
    """Returns the command line of `trtllm-build` for a TensorRT-LLM checkpoint, which itself says the precision.

    Args:
        fp8_kv_cache: the checkpoint's; attention over the prompt in FP8 is possible with it alone, and is switched on
            by default (TensorRT-LLM issue #2112).
        fp8_weights: cuBLAS's plugin is left to TensorRT's own kernels then, which are the faster ones in FP8.
        known_timings: the timing cache of earlier builds, which saves measuring kernels again, where there is one.
        learned_timings: where this build's goes.

    Raises:
        InputError: the version that is built with has no such argument, or builds no engines.
    """
    given = {
        "checkpoint_dir": checkpoint,
        "output_dir": output,
        "max_batch_size": settings.max_batch_size,
        "max_input_len": longest_prompt(settings),
        "max_seq_len": settings.max_seq_len,
        "max_num_tokens": settings.max_num_tokens,
        "kv_cache_type": "paged",
        "tokens_per_block": settings.tokens_per_block,
        "use_fp8_context_fmha": "enable" if fp8_kv_cache else "disable",
        "gemm_plugin": None if fp8_weights else "auto",
        "workers": settings.world_size,
        "input_timing_cache": known_timings,
        "output_timing_cache": learned_timings,
        "gather_context_logits": True,  # log-likelihoods are computed from them
    }
    return arguments.trtllm_build(given, target_version(settings))


def longest_prompt(settings: Engine) -> int:
    """Tokens of the longest prompt that leaves room for an answer of one."""
    return max(1, settings.max_seq_len - 1)


def serve_command(settings: Engine, model: str, engine: str = "", config: str = "llm_args.yaml") -> list[str]:
    """Returns the command that serves an artifact over HTTP; all settings stand in the YAML.

    A flag would win over the YAML in newer versions and lose in older ones, so there is none that the YAML has too.

    Args:
        model: folder of the exported checkpoint.
        engine: folder of the built engine, for `trtllm-legacy`.
        config: the YAML with `llm_args`.
    """
    legacy = ["--backend", "tensorrt", "--tokenizer", model] if BACKENDS[settings.backend].compiled else []
    return ["trtllm-serve", engine if legacy else model, *legacy, "--extra_llm_api_options", config]
