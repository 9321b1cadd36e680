"""Triton model repositories for TensorRT-LLM: of its LLM API, and of engines.

The names of tensors and parameters are those of `triton_backend/all_models/{llmapi,inflight_batcher_llm}` in
TensorRT-LLM, which also has the Python of the models (`model.py`) and the models around the engine; they are part of
NVIDIA's Triton images and not of these folders.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from trimtab.recipe import Engine
from trimtab.serving.settings import llm_args

#: What a request to the LLM API's model may carry beside its text: name -> (type, dims).
_SAMPLING = {
    "best_of": "INT32", "temperature": "FP32", "top_k": "INT32", "top_p": "FP32", "frequency_penalty": "FP32",
    "presence_penalty": "FP32", "max_tokens": "INT32", "seed": "UINT64", "exclude_input_from_output": "BOOL",
    "return_perf_metrics": "BOOL",
}  # fmt: skip
#: Of the engine's model: optional scalars.
_SCALARS = {
    "num_return_sequences": "INT32", "end_id": "INT32", "pad_id": "INT32", "beam_width": "INT32", "temperature": "FP32",
    "runtime_top_k": "INT32", "runtime_top_p": "FP32", "len_penalty": "FP32", "repetition_penalty": "FP32",
    "min_tokens": "INT32", "presence_penalty": "FP32", "frequency_penalty": "FP32", "seed": "UINT64",
    "return_log_probs": "BOOL", "return_context_logits": "BOOL", "return_generation_logits": "BOOL",
    "return_num_input_tokens": "BOOL", "return_num_output_tokens": "BOOL", "exclude_input_in_output": "BOOL",
    "stop": "BOOL", "streaming": "BOOL",
}  # fmt: skip


def llm_api(settings: Engine, model_path: str) -> dict[str, str]:
    """Returns the files of a repository whose model is the LLM API: path -> content.

    Batching is in-flight inside TensorRT-LLM, so Triton batches nothing; what `triton_config` says may not stand in
    config.pbtxt too.
    """
    inputs = [_tensor("text_input", "STRING", [-1]), _tensor("streaming", "BOOL", [1], optional=True)]
    inputs += [_tensor(f"sampling_param_{name}", kind, [1], optional=True) for name, kind in _SAMPLING.items()]
    inputs.append(_tensor("sampling_param_stop", "STRING", [-1], optional=True))
    returned = ("return_finish_reason", "return_stop_reason", "return_cumulative_logprob", "stop")
    inputs += [_tensor(name, "BOOL", [1], optional=True) for name in returned]
    outputs = [_tensor(name, "STRING", [-1]) for name in ("text_output", "finish_reason", "stop_reason")]
    outputs.append(_tensor("cumulative_logprob", "FP32", [-1]))
    blocks = ("reused_block", "missed_block", "alloc_new_blocks", "alloc_total_blocks")
    outputs += [_tensor(f"kv_cache_{name}", "INT32", [-1]) for name in blocks]
    outputs.append(_tensor("kv_cache_hit_rate", "FP32", [-1]))
    config = ['name: "tensorrt_llm"', 'backend: "python"', *_on_the_cpu(), *_listed("input", inputs)]
    config += _listed("output", outputs)
    document: dict[str, Any] = {"model": model_path, "backend": "pytorch", **llm_args(settings)}
    document["triton_config"] = {"max_batch_size": 0, "decoupled": True}  # decoupled: answers may be streamed
    return {
        "tensorrt_llm/config.pbtxt": _lines(config),
        "tensorrt_llm/1/model.yaml": yaml.safe_dump(document, sort_keys=False),
    }


def engine_parameters(settings: Engine, engine_path: str) -> dict[str, str]:
    """Returns the parameters of the engine's model by their names in config.pbtxt.

    `gpt_model_type` is what the documentation calls batching_strategy: in-flight, or V1, which is static batching.
    """
    static = settings.scheduler_policy == "static_batch"
    policy = "guaranteed_no_evict" if static else settings.scheduler_policy
    return {
        "gpt_model_type": "V1" if static else "inflight_fused_batching",
        "gpt_model_path": engine_path,
        "batch_scheduler_policy": policy,
        "kv_cache_free_gpu_mem_fraction": f"{settings.kv_cache_fraction:g}",
        "enable_kv_cache_reuse": str(settings.enable_block_reuse).lower(),
        "enable_chunked_context": str(settings.enable_chunked_prefill).lower(),
        "max_beam_width": "1",
        "exclude_input_in_output": "true",
        "FORCE_CPU_ONLY_INPUT_TENSORS": "no",
        "executor_worker_path": "/opt/tritonserver/backends/tensorrtllm/trtllmExecutorWorker",
    }


def inflight_batcher(settings: Engine, engine_path: str, model_path: str) -> dict[str, str]:
    """Returns the files of a repository whose model is an engine, and a script for the four models around it."""
    inputs = [_tensor("input_ids", "INT32", [-1], optional=True, ragged=True)]
    inputs += [_tensor(name, "INT32", [1], scalar=True) for name in ("input_lengths", "request_output_len")]
    inputs += [_tensor(name, kind, [1], optional=True, scalar=True) for name, kind in _SCALARS.items()]
    words = ("stop_words_list", "bad_words_list")
    inputs += [_tensor(name, "INT32", [2, -1], optional=True, ragged=True) for name in words]
    inputs.append(_tensor("embedding_bias", "FP32", [-1], optional=True, ragged=True))
    outputs = [_tensor("output_ids", "INT32", [-1, -1]), _tensor("sequence_length", "INT32", [-1])]
    outputs += [_tensor("cum_log_probs", "FP32", [-1]), _tensor("output_log_probs", "FP32", [-1, -1])]
    outputs += [_tensor("context_logits", "FP32", [-1, -1]), _tensor("generation_logits", "FP32", [-1, -1, -1])]
    outputs += [_tensor(name, "INT32", [1]) for name in ("batch_index", "sequence_index")]
    size = settings.max_batch_size
    config = [
        'name: "tensorrt_llm"',
        'backend: "tensorrtllm"',
        f"max_batch_size: {size}",
        "model_transaction_policy { decoupled: true }",
        f"dynamic_batching {{ preferred_batch_size: [ {size} ] max_queue_delay_microseconds: 0 }}",
        *_listed("input", inputs),
        *_listed("output", outputs),
        *_on_the_cpu(),
        *_parameters(engine_parameters(settings, engine_path)),
    ]
    return {"tensorrt_llm/config.pbtxt": _lines(config), "fill_templates.sh": _script(size, model_path)}


def _script(size: int, model_path: str) -> str:
    """The models around the engine are NVIDIA's: their templates are filled where they are."""
    shared = f"triton_max_batch_size:{size},logits_datatype:TYPE_FP32"
    words = f"tokenizer_dir:{model_path},add_special_tokens:true"
    filled = {
        "preprocessing": f"{words},triton_max_batch_size:{size},preprocessing_instance_count:1",
        "postprocessing": f"{words},triton_max_batch_size:{size},postprocessing_instance_count:1",
        "ensemble": shared,
        "tensorrt_llm_bls": f"{shared},decoupled_mode:true,bls_instance_count:1,accumulate_tokens:false,"
        "tensorrt_llm_model_name:tensorrt_llm",
    }
    lines = [
        "#!/bin/sh",
        "# Adds NVIDIA's models around the engine: fill_templates.sh /path/to/TensorRT-LLM/triton_backend",
        "set -eu",
        'cd "$(dirname "$0")"',
        "mkdir -p tensorrt_llm/1",
    ]
    for model, values in filled.items():
        lines.append(f'cp -r "$1/all_models/inflight_batcher_llm/{model}" .')
        lines.append(f"python3 \"$1/tools/fill_template.py\" -i {model}/config.pbtxt '{values}'")
    return _lines(lines)


def _tensor(
    name: str, kind: str, dims: list[int], optional: bool = False, scalar: bool = False, ragged: bool = False
) -> str:
    parts = [f'name: "{name}"', f"data_type: TYPE_{kind}", f"dims: [ {', '.join(map(str, dims))} ]"]
    parts += ["reshape: { shape: [ ] }"] if scalar else []
    parts += ["allow_ragged_batch: true"] if ragged else []
    parts += ["optional: true"] if optional else []
    return f"{{ {' '.join(parts)} }}"


def _listed(field: str, entries: Iterable[str]) -> list[str]:
    return [f"{field} [", ",\n".join(f"  {entry}" for entry in entries), "]"]


def _on_the_cpu() -> list[str]:
    """One instance, which finds its GPUs itself."""
    return ["instance_group [ { count: 1 kind: KIND_CPU } ]"]


def _parameters(values: Mapping[str, str]) -> list[str]:
    return [f'parameters {{ key: "{k}" value {{ string_value: {_quoted(v)} }} }}' for k, v in values.items()]


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


def _lines(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"
