"""What a recipe's engine is called in vLLM: the arguments of its LLM class and of `vllm serve`.

The names are those of vLLM 0.24's EngineArgs (vllm/engine/arg_utils.py). vLLM's `gpu_memory_utilization` is a share of
the whole GPU, weights and activations included, so `kv_cache_fraction` leaves a little less to the KV cache here than
in TensorRT-LLM.
"""

from __future__ import annotations

import importlib.metadata
from typing import Any

from trimtab.base.errors import InputError
from trimtab.catalog.contracts.version import parse, within
from trimtab.catalog.formats import STORAGES
from trimtab.recipe import Engine

#: The versions whose arguments and outputs these are: the first, and the first that is another.
VERSIONS = ("0.24", "0.25")
#: How ModelOpt calls the layers that vLLM reads: those that it reads as they are, and then those that are translated
#: (`runtime.checkpoint.compressed_tensors`).
READS = tuple(
    algorithm for way in ("modelopt", "compressed-tensors") for algorithm, row in STORAGES.items() if row.vllm == way
)


def installed() -> str | None:
    """Returns the version of vLLM in this environment, without importing it; None when there is none."""
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None


def refusal(version: str) -> str | None:
    """Returns why that vLLM is not served with, or None when it is."""
    first, beyond = VERSIONS
    if within(parse(version), first, None) and not within(parse(version), beyond, None):
        return None
    return f"engine.backend: 'vllm' needs vLLM {first}, and this image has {version}; install trimtab[vllm]"


def settings_refusal(settings: Engine) -> str | None:
    """Returns why vLLM does not serve so, in one sentence, or None: it would refuse it less plainly, or ignore it."""
    tokens, sequences = settings.max_num_tokens, settings.max_batch_size
    if tokens < sequences:
        return (
            f"engine.max_num_tokens: {tokens} is less than max_batch_size {sequences}, and each sequence adds a token "
            f"a step; write at least {sequences}"
        )
    if settings.scheduler_policy != "guaranteed_no_evict":
        return f"engine.scheduler_policy: vllm has one of its own and no {settings.scheduler_policy}; remove the field"
    return None


def vllm_args(settings: Engine) -> dict[str, Any]:
    """Returns the arguments of vLLM's LLM class. Quantization and the KV cache's type are read from the checkpoint.

    Prompts are read in chunks whatever the recipe says: without them, vLLM warns, outputs may be wrong.

    Raises:
        InputError: as `settings_refusal` says.
    """
    if reason := settings_refusal(settings):
        raise InputError(reason)
    return {
        "tensor_parallel_size": settings.tensor_parallel_size,
        "pipeline_parallel_size": settings.pipeline_parallel_size,
        "gpu_memory_utilization": settings.kv_cache_fraction,
        "max_model_len": settings.max_seq_len,
        "max_num_seqs": settings.max_batch_size,
        "max_num_batched_tokens": settings.max_num_tokens,
        "enable_chunked_prefill": True,
        "enable_prefix_caching": settings.enable_block_reuse,
        "block_size": settings.tokens_per_block,
    }


def serve_command(settings: Engine, model: str) -> list[str]:
    """Returns the command that serves an artifact over HTTP.

    Args:
        model: folder of the exported checkpoint.

    Raises:
        InputError: as `vllm_args`.
    """
    command = ["vllm", "serve", model]
    for name, value in vllm_args(settings).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            command.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            command += [f"--{flag}", str(value)]
    return command
