"""LLM and SamplingParams."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

KV_CACHE = {"dtype": "auto", "free_gpu_memory_fraction": 0.9, "max_tokens": None, "tokens_per_block": 32,
            "enable_block_reuse": True, "enable_partial_reuse": True}  # fmt: skip
SCHEDULER = {"capacity_scheduler_policy": "GUARANTEED_NO_EVICT", "context_chunking_policy": None}


@dataclass
class SamplingParams:
    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    stop_token_ids: list[int] | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None
    ignore_eos: bool = False
    detokenize: bool = True
    return_context_logits: bool = False
    return_generation_logits: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    truncate_prompt_tokens: int | None = None


@dataclass
class CompletionOutput:
    token_ids: list[int]
    text: str = ""


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    context_logits: torch.Tensor | None = None
    finished: bool = True


class LLM:
    def __init__(
        self,
        model: str,
        tokenizer: str | None = None,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
        dtype: str = "auto",
        kv_cache_config: dict[str, Any] | None = None,
        scheduler_config: dict[str, Any] | None = None,
        enable_chunked_prefill: bool = False,
        max_batch_size: int = 2048,
        max_input_len: int = 1024,
        max_seq_len: int | None = None,
        max_num_tokens: int = 8192,
    ):
        for given, known in ((kv_cache_config, KV_CACHE), (scheduler_config, SCHEDULER)):
            if extra := set(given or {}) - set(known):
                raise ValueError(f"Extra inputs are not permitted: {extra}")
        self._reuse = {**KV_CACHE, **(kv_cache_config or {})}["enable_block_reuse"]
        self._chunked, self._step = enable_chunked_prefill, max_num_tokens
        self._longest = max_input_len
        self._seen: list[list[int]] = []
        self._model = self._load(Path(model))
        self.closed = False

    def _load(self, folder: Path) -> Any:
        from trimtab.runtime.decoder.assemble import assemble

        return assemble(folder, torch.device("cpu"))

    @torch.inference_mode()
    def generate(
        self, inputs: list[dict[str, Any]], sampling_params: SamplingParams | None = None, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        return [self._one(item["prompt_token_ids"], sampling_params or SamplingParams()) for item in inputs]

    def shutdown(self) -> None:
        self.closed = True

    def _one(self, prompt: list[int], sampling: SamplingParams) -> RequestOutput:
        prompt = prompt[: self._longest]
        if len(prompt) > self._step and not self._chunked:
            raise ValueError(f"The prompt length ({len(prompt)}) should not exceed max_num_tokens ({self._step})")
        logits = self._model(torch.tensor([prompt]), use_cache=False).logits[0].float()
        output = RequestOutput(prompt, [CompletionOutput(self._continue(prompt, logits[-1], sampling))])
        if sampling.return_context_logits:
            shared = max((_shared(prompt, other) for other in self._seen), default=0) if self._reuse else 0
            start = max(shared, len(prompt) - self._step if self._chunked else 0)
            # The vocabulary is padded to a multiple of 64, with whatever the memory held.
            output.context_logits = torch.nn.functional.pad(logits[start:], (0, -logits.shape[1] % 64), value=1e4)
        self._seen.append(prompt)
        return output

    def _continue(self, prompt: list[int], last: torch.Tensor, sampling: SamplingParams) -> list[int]:
        if sampling.top_k not in (None, 1) or sampling.temperature:
            raise NotImplementedError("the stand-in is greedy")
        if sampling.end_id is None and not sampling.ignore_eos and sampling.max_tokens > 1:
            raise ValueError("end_id is needed")
        ends = () if sampling.ignore_eos else (sampling.end_id, *(sampling.stop_token_ids or ()))
        written: list[int] = []
        while True:
            written.append(int(last.argmax()))
            if written[-1] in ends or len(written) == sampling.max_tokens:
                return written
            last = self._model(torch.tensor([prompt + written]), use_cache=False).logits[0, -1]


def _shared(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))) // 32 * 32
