"""LLM, SamplingParams and what they return."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TypedDict

import torch

from . import packed

ALGOS = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "NVFP4", "W4A16_NVFP4", "MXFP8", "MIXED_PRECISION")


class TokensPrompt(TypedDict):
    prompt_token_ids: list[int]


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    flat_logprobs: bool = False
    detokenize: bool = True
    skip_reading_prefix_cache: bool | None = None


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    index: int
    text: str
    token_ids: list[int]
    finish_reason: str | None = None


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    prompt_logprobs: list[dict[int, Logprob] | None] | None
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True


class LLM:
    def __init__(
        self,
        model: str,
        *,
        tokenizer: str | None = None,
        dtype: str = "auto",
        quantization: str | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        enforce_eager: bool = False,
        kv_cache_dtype: str = "auto",
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        enable_chunked_prefill: bool | None = None,
        enable_prefix_caching: bool | None = None,
        block_size: int | None = None,
    ):
        config = json.loads((Path(model) / "config.json").read_text())
        if max_model_len > config["max_position_embeddings"]:
            raise ValueError(f"User-specified max_model_len ({max_model_len}) is greater than the derived one")
        if max_num_batched_tokens < max_model_len and not enable_chunked_prefill:
            raise ValueError(f"max_num_batched_tokens ({max_num_batched_tokens}) is smaller than max_model_len")
        if max_num_batched_tokens < max_num_seqs:
            raise ValueError(f"max_num_batched_tokens ({max_num_batched_tokens}) must be >= max_num_seqs")
        quantization = config.get("quantization_config") or {}
        if quantization and quantization["quant_method"] not in packed.METHODS:
            if not quantization.get("quant_algo"):
                raise ValueError("Missing 'quant_algo' in quantization config")
            if quantization["quant_algo"].upper() not in ALGOS:
                raise ValueError(f"ModelOpt currently only supports: {ALGOS} quantizations in vLLM.")
            if config["tie_word_embeddings"]:
                raise NotImplementedError  # UnquantizedLinearMethod, which an excluded head gets, has no tie_weights
        if quantization.get("quant_method") in packed.METHODS:
            self._model = packed.read(Path(model), quantization)
        else:
            from trimtab.runtime.decoder.assemble import assemble

            self._model = assemble(Path(model), torch.device("cpu"))
        self._end, self._longest = config["eos_token_id"], max_model_len
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._end_processes))
        self.closed = False

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[TokensPrompt],
        sampling_params: SamplingParams | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        return [self._one(item["prompt_token_ids"], sampling_params or SamplingParams()) for item in prompts]

    def _end_processes(self, timeout: float | None = None) -> None:
        self.closed = True

    def _one(self, prompt: list[int], sampling: SamplingParams) -> RequestOutput:
        if not prompt:
            raise ValueError("The decoder prompt cannot be empty")
        if len(prompt) >= self._longest:
            raise ValueError(f"The decoder prompt (length {len(prompt)}) plus 1 is longer than {self._longest}")
        if sampling.temperature or sampling.detokenize:
            raise NotImplementedError("the stand-in is greedy and has no tokenizer")
        logits = self._logits(prompt)
        told = None
        if sampling.prompt_logprobs is not None:
            rows = logits[:-1].log_softmax(-1)
            told = [None, *(_entry(r, t, sampling.prompt_logprobs) for r, t in zip(rows, prompt[1:], strict=True))]
        return RequestOutput(prompt, told, [CompletionOutput(0, "", self._continue(prompt, logits[-1], sampling))])

    def _logits(self, tokens: list[int]) -> torch.Tensor:
        return self._model(torch.tensor([tokens]), use_cache=False).logits[0].bfloat16().float()

    def _continue(self, prompt: list[int], last: torch.Tensor, sampling: SamplingParams) -> list[int]:
        ends = {*(sampling.stop_token_ids or ()), *(() if sampling.ignore_eos else (self._end,))}
        written: list[int] = []
        while True:
            written.append(int(last.argmax()))
            if written[-1] in ends or len(written) == sampling.max_tokens:
                return written
            last = self._logits(prompt + written)[-1]


def _entry(row: torch.Tensor, token: int, count: int) -> dict[int, Logprob]:
    """The prompt's own token first, then the likeliest; one that is both stands once, with its last rank."""
    found = {token: Logprob(float(row[token]), int((row >= row[token]).sum()))}
    for rank, other in enumerate(row.topk(count).indices.tolist() if count else [], 1):
        found[other] = Logprob(float(row[other]), rank)
    return found
