"""The back ends of TensorRT-LLM: its LLM API over an export, and over engines of `trtllm-build`.

tensorrt_llm is imported where an engine is opened, and nowhere else. Log-likelihoods are computed from the logits of
the prompt: TensorRT-LLM before 1.3.0rc11 returns one log-probability a position, that of the likeliest token, and its
OpenAI server none at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from trimtab import families
from trimtab.base import progress
from trimtab.base.errors import Failure
from trimtab.catalog.backends import BACKENDS
from trimtab.model.files import CONFIG, read_json
from trimtab.recipe import Engine as Settings
from trimtab.runtime.decoder import gpu_memory
from trimtab.runtime.engines import decode_time
from trimtab.runtime.engines.batching import ScoringRequest
from trimtab.runtime.engines.library import LibraryEngine
from trimtab.runtime.engines.protocol import Prediction, check_length, check_prompts, check_requests
from trimtab.serving.record import RANKS, Built
from trimtab.serving.settings import compiled_args, llm_args


class TrtllmEngine(LibraryEngine):
    """An LLM of TensorRT-LLM, of its PyTorch back end or of a built engine, behind the protocol of
    `runtime.engines.torch_engine`.

    Args:
        export: the exported checkpoint: its tokenizer, and what is known of its layers.
        settings: as it is served. While it is measured, blocks are not reused and prompts are read in one piece: both
            leave out logits of the prompt.
        engine: folder with the engines of `trtllm-build`; None for the LLM API over the export.

    Raises:
        Failure: `does_not_fit`, the GPU's memory is too small.
    """

    def __init__(self, export: Path, settings: Settings, engine: Path | None = None):
        super().__init__(export, settings, "tensorrt" if engine else "trtllm")
        before = gpu_memory.used()
        measured = settings.model_copy(update={"enable_block_reuse": False, "enable_chunked_prefill": False})
        if engine:
            from tensorrt_llm._tensorrt_engine import LLM
        else:
            from tensorrt_llm import LLM

        arguments = compiled_args(measured) if engine else llm_args(measured)
        progress.report("engine", f"loading {settings.backend}")
        self._llm = LLM(model=str(engine or export), tokenizer=str(export), **arguments)
        self._loaded = gpu_memory.used() - before

    @torch.inference_mode()
    def loglikelihood(self, requests: list[ScoringRequest]) -> list[tuple[float, bool]]:
        """As the protocol says.

        Raises:
            InputError: a context or continuation is empty, or both together exceed `max_seq_len` or, as prompts are
                read in one piece, `max_num_tokens`.
            Failure: `unsupported`, TensorRT-LLM returns other logits than those of every token of the prompt.
        """
        check_requests(requests, self.settings.max_seq_len)
        check_requests(requests, self.settings.max_num_tokens, "engine.max_num_tokens")
        answers: dict[int, tuple[float, bool]] = {}
        order = sorted(range(len(requests)), key=lambda i: -sum(map(len, requests[i])))
        for some in self._batches(order, [sum(map(len, request)) for request in requests]):
            prompts = [requests[i][0] + requests[i][1][:-1] for i in some]  # the last token is predicted, never read
            outputs = self._ask(prompts, max_tokens=1, return_context_logits=True)
            for i, prompt, output in zip(some, prompts, outputs, strict=True):
                answers[i] = _score(output.context_logits, prompt, requests[i][1], self._vocabulary)
        return [answers[i] for i in range(len(requests))]

    @torch.inference_mode()
    def predict(self, windows: torch.Tensor, count: int) -> Prediction:
        """As the protocol says.

        Raises:
            InputError, Failure: as `loglikelihood`.
        """
        prompts = windows.tolist()
        check_requests([(p[:1], p[1:]) for p in prompts], self.settings.max_num_tokens, "engine.max_num_tokens")
        found = Prediction([], [], [])
        for some in self._batches(list(range(len(prompts))), [len(prompt) for prompt in prompts]):
            read = [prompts[i][:-1] for i in some]
            for i, output in zip(some, self._ask(read, max_tokens=1, return_context_logits=True), strict=True):
                rows = _rows(output.context_logits, prompts[i][:-1], self._vocabulary).log_softmax(-1)
                targets = torch.tensor(prompts[i][1:], device=rows.device)
                best = rows.topk(min(count, rows.shape[1]))
                parts = (-rows.gather(1, targets[:, None])[:, 0], best.indices, best.values)
                for part, values in zip(found, parts, strict=True):
                    part.append(values.tolist())
        return found

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, until: Sequence[Sequence[str]] = ()
    ) -> list[list[int]]:
        """As the protocol says; `until` shortens nothing here.

        Raises:
            InputError: a prompt is empty, or with its new tokens exceeds `max_seq_len`, or alone `max_num_tokens`.
        """
        check_prompts(prompts, max_new_tokens, self.settings.max_seq_len)
        for number, prompt in enumerate(prompts):
            check_length(f"prompt {number}", len(prompt), self.settings.max_num_tokens, "engine.max_num_tokens")
        ends = self._ends
        stop = {"end_id": ends[0], "stop_token_ids": ends[1:] or None} if ends else {"ignore_eos": True}
        # The likeliest token alone is greedy decoding.
        return self._until_end(self._ask(prompts, max_tokens=max_new_tokens, top_k=1, **stop))

    def decode_speed(self, batch_size: int, prompt_tokens: int, new_tokens: int, repeats: int) -> list[float]:
        """As the protocol says: the time of `new_tokens` more tokens than one; one untimed repeat comes first.

        Raises:
            InputError: prompt and new tokens exceed `max_seq_len`.
        """
        check_length("a sequence of decode_speed", prompt_tokens + new_tokens + 1, self.settings.max_seq_len)

        def write(prompts: list[list[int]], tokens: int) -> None:
            self._ask(prompts, max_tokens=tokens, top_k=1, ignore_eos=True)

        return decode_time.speeds(write, self._vocabulary, batch_size, prompt_tokens, new_tokens, repeats)

    def close(self) -> None:
        self._llm.shutdown()

    def _ask(self, prompts: list[list[int]], **sampling: Any) -> list[Any]:
        from tensorrt_llm import SamplingParams

        parameters = SamplingParams(detokenize=False, **sampling)
        return self._llm.generate([{"prompt_token_ids": p} for p in prompts], parameters, use_tqdm=False)

    def _batches(self, order: list[int], lengths: list[int]) -> list[list[int]]:
        """Groups requests, longest first, so that their logits stay within one step's: they are all held at once."""
        found: list[list[int]] = []
        room = 0
        for i in order:
            if not found or lengths[i] > room or len(found[-1]) == self.settings.max_batch_size:
                found.append([])
                room = self.settings.max_num_tokens
            found[-1].append(i)
            room -= lengths[i]
        return found

    @cached_property
    def _vocabulary(self) -> int:
        return families.text_config(read_json(self.export / CONFIG))["vocab_size"]


def open_engine(built: Built, engine: Path, export: Path, kv_cache: str) -> TrtllmEngine:
    """Opens an engine of either back end of TensorRT-LLM: see `runtime.engines.backends.open_engine`.

    Raises:
        Failure: `unsupported`, the folder holds compiled engines of another number of ranks.
    """
    if not BACKENDS[built.settings.backend].compiled:
        return TrtllmEngine(export, built.settings)
    ranks, wanted = engine / RANKS, built.settings.world_size
    if (found := len(list(ranks.glob("rank*.engine")))) != wanted:
        raise Failure("unsupported", f"{ranks} holds engines of {found} ranks, and {wanted} are asked for")
    return TrtllmEngine(export, built.settings, ranks)


def _score(
    logits: torch.Tensor | None, prompt: list[int], continuation: list[int], vocabulary: int
) -> tuple[float, bool]:
    """Returns the nats of a continuation and whether it is greedy, from the logits [tokens, vocabulary] of its prompt.

    The prompt ends before the last token of the continuation, so its last rows predict the continuation.
    """
    rows = _rows(logits, prompt, vocabulary)[-len(continuation) :]
    targets = torch.tensor(continuation, device=rows.device)
    likelihood = rows.log_softmax(-1).gather(1, targets[:, None]).double().sum().item()
    return likelihood, bool((rows.argmax(-1) == targets).all())


def _rows(logits: torch.Tensor | None, prompt: list[int], vocabulary: int) -> torch.Tensor:
    """Returns a prompt's logits, float32 [tokens, vocabulary], without what pads the vocabulary."""
    logits = logits.reshape(-1, logits.shape[-1]) if logits is not None else None
    if logits is None or logits.shape[0] != len(prompt) or logits.shape[1] < vocabulary:
        found = "none" if logits is None else list(logits.shape)
        reason = f"TensorRT-LLM returns context logits {found} for {len(prompt)} tokens of a vocabulary of {vocabulary}"
        raise Failure("unsupported", reason)
    return logits[:, :vocabulary].float()
