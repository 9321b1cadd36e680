"""The back end of vLLM: its LLM class over an export.

vllm is imported where an engine is opened, and nowhere else. Log-likelihoods are its log-probabilities of the prompt,
which it computes over logits in the model's own 16 bits: those between 16 and 32 are 0.125 apart in bfloat16, so a
token's likelihood differs a little from that of the torch engine, whose logits are float32.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab import families
from trimtab.base import progress
from trimtab.base.errors import Failure
from trimtab.model.files import CONFIG, read_json
from trimtab.model.hardware import GB
from trimtab.recipe import Engine as Settings
from trimtab.runtime.checkpoint import compressed_tensors
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.decoder import gpu_memory
from trimtab.runtime.engines import decode_time
from trimtab.runtime.engines.batching import ScoringRequest
from trimtab.runtime.engines.library import LibraryEngine
from trimtab.runtime.engines.protocol import Prediction, check_length, check_prompts, check_requests
from trimtab.serving.record import CHECKPOINT, Built
from trimtab.serving.vllm import READS, vllm_args

#: Tensors of a prompt's float32 logits that vLLM holds at once while it scores, and does not count when it plans.
_LOGITS = 3


class VllmEngine(LibraryEngine):
    """An LLM of vLLM behind the protocol of `runtime.engines.protocol`; its workers are processes of their own.

    Args:
        export: the exported checkpoint.
        settings: as it is served. While it is measured there is room for one more token, since vLLM reads the last
            one too and writes another, and the KV cache gives way to the logits of the prompts.
        checkpoint: what `vllm_checkpoint.translate` made of the export, if vLLM does not read the export itself.

    Raises:
        InputError: settings that vLLM does not serve with.
        Failure: `unsupported`, a checkpoint that vLLM does not read, or settings that it refuses; `does_not_fit`.
    """

    def __init__(self, export: Path, settings: Settings, checkpoint: Path | None = None):
        super().__init__(export, settings, "vllm")
        self._config = families.text_config(read_json(self.export / CONFIG))
        _check_readable(self.export, checkpoint)
        arguments = self._measured(vllm_args(settings))
        self._longest = arguments["max_model_len"] - 1
        self._check_fit(arguments["gpu_memory_utilization"])
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        from vllm import LLM

        before = gpu_memory.used()
        progress.report("engine", "loading vllm")
        try:
            self._llm = LLM(model=str(checkpoint or export), **arguments)
        except ValueError as error:  # of its configuration; what a worker meets is a RuntimeError, told in the log
            reason = " ".join(str(error).split())
            raise Failure("unsupported", f"vLLM refuses the export or its settings: {reason[:400]}") from error
        self._loaded = gpu_memory.used() - before

    def loglikelihood(self, requests: list[ScoringRequest]) -> list[tuple[float, bool]]:
        """As the protocol says.

        Raises:
            InputError: a context or continuation is empty, or both together exceed `max_seq_len`, or are as long as
                the model can be: vLLM has no room then for the token that it writes behind them.
            Failure: `unsupported`, vLLM returns other log-probabilities than one of every token of the prompt.
        """
        check_requests(requests, self.settings.max_seq_len)
        check_requests(requests, self._longest, "vLLM's longest scored prompt")
        prompts = [context + continuation for context, continuation in requests]
        outputs = self._ask(prompts, max_tokens=1, prompt_logprobs=1, ignore_eos=True)
        return [
            score(output.prompt_logprobs, prompt, len(continuation))
            for output, prompt, (_, continuation) in zip(outputs, prompts, requests, strict=True)
        ]

    def predict(self, windows: torch.Tensor, count: int) -> Prediction:
        """As the protocol says.

        Raises:
            InputError, Failure: as `loglikelihood`.
        """
        prompts = windows.tolist()
        check_requests([(prompt[:1], prompt[1:]) for prompt in prompts], self._longest, "vLLM's longest scored prompt")
        found = Prediction([], [], [])
        outputs = self._ask(prompts, max_tokens=1, prompt_logprobs=count, ignore_eos=True)
        for output, prompt in zip(outputs, prompts, strict=True):
            places = told_of(output.prompt_logprobs, prompt, len(prompt) - 1)
            found.nll.append([-entries[token].logprob for token, entries in places])
            # Beside the likeliest ones stands the prompt's own token, whatever its rank.
            ranked = [sorted(entries.items(), key=lambda entry: entry[1].rank)[:count] for _, entries in places]
            found.tokens.append([[token for token, _ in likeliest] for likeliest in ranked])
            found.log_probs.append([[entry.logprob for _, entry in likeliest] for likeliest in ranked])
        return found

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, until: Sequence[Sequence[str]] = ()
    ) -> list[list[int]]:
        """As the protocol says; `until` shortens nothing here.

        Raises:
            InputError: a prompt is empty, or with its new tokens exceeds `max_seq_len`.
        """
        check_prompts(prompts, max_new_tokens, self.settings.max_seq_len)
        # vLLM would end at the tokenizer's token too, where the model's generation config names another.
        stop = {"ignore_eos": True, "stop_token_ids": self._ends}
        return self._until_end(self._ask(prompts, max_tokens=max_new_tokens, **stop))

    def decode_speed(self, batch_size: int, prompt_tokens: int, new_tokens: int, repeats: int) -> list[float]:
        """As the protocol says: the time of `new_tokens` more tokens than one; one untimed repeat comes first.

        Raises:
            InputError: prompt and new tokens exceed `max_seq_len`.
        """
        check_length("a sequence of decode_speed", prompt_tokens + new_tokens + 1, self.settings.max_seq_len)

        def write(prompts: list[list[int]], tokens: int) -> None:
            self._ask(prompts, max_tokens=tokens, ignore_eos=True)

        return decode_time.speeds(write, self._config["vocab_size"], batch_size, prompt_tokens, new_tokens, repeats)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()  # LLM itself has no way to end its processes

    def _ask(self, prompts: list[list[int]], **sampling: Any) -> list[Any]:
        from vllm import SamplingParams, TokensPrompt

        if not prompts:
            return []
        parameters = SamplingParams(temperature=0.0, detokenize=False, **sampling)
        return self._llm.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], parameters, use_tqdm=False)

    def _measured(self, served: dict[str, Any]) -> dict[str, Any]:
        """Returns the arguments of `vllm_args` with room for what scoring needs beside serving."""
        longest, limit = served["max_model_len"], self._config.get("max_position_embeddings")
        longest += longest != limit  # beyond its positions vLLM runs no model
        share = served["gpu_memory_utilization"]
        if torch.cuda.is_available():
            logits = _LOGITS * 4 * min(longest, served["max_num_batched_tokens"]) * self._config["vocab_size"]
            share = max(share / 2, min(share, 1 - logits / torch.cuda.mem_get_info()[1]))
        return served | {"max_model_len": longest, "gpu_memory_utilization": share}

    def _check_fit(self, share: float) -> None:
        """Refuses what vLLM would refuse in a process of its own, from where only the log tells why."""
        if not torch.cuda.is_available():
            return
        free, total = torch.cuda.mem_get_info()
        if free < share * total:
            found = f"{free / GB:.1f} of {total / GB:.1f} GB are free, and vLLM claims {share:.2f} of all"
            raise Failure("does_not_fit", f"{found}; end what else runs there, or lower engine.kv_cache_fraction")
        weights = self.weight_bytes / self.settings.world_size
        if weights > share * total:
            found = f"weights of {weights / GB:.1f} GB a GPU did not fit: vLLM has {share * total / GB:.1f} GB"
            raise Failure("does_not_fit", found)


def open_engine(built: Built, engine: Path, export: Path, kv_cache: str) -> VllmEngine:
    """Opens an engine of vLLM: see `runtime.engines.backends.open_engine`."""
    return VllmEngine(export, built.settings, engine / CHECKPOINT if built.translated else None)


def score(told: list[dict[int, Any] | None] | None, prompt: list[int], continuation: int) -> tuple[float, bool]:
    """Returns the nats of a prompt's last `continuation` tokens, and whether each is the likeliest; see `told_of`."""
    places = told_of(told, prompt, continuation)
    own = [found[token].logprob for token, found in places]
    best = [max(entry.logprob for entry in found.values()) for _, found in places]
    return sum(own), all(a >= b for a, b in zip(own, best, strict=True))


def told_of(
    told: list[dict[int, Any] | None] | None, prompt: list[int], continuation: int
) -> list[tuple[int, dict[int, Any]]]:
    """Returns a prompt's last `continuation` tokens, each with what vLLM says of its place.

    Args:
        told: for each token of the prompt, by tokens, its log-probability and those of the likeliest ones.

    Raises:
        Failure: `unsupported`, one is missing.
    """
    places = list(zip(prompt, told or [], strict=False))[-continuation:]
    if len(told or []) != len(prompt) or not all(found and token in found for token, found in places):
        what = f"vLLM returns {len(told or [])} log-probabilities for {len(prompt)} tokens"
        raise Failure("unsupported", f"{what}, or those of others")
    return places


def _check_readable(export: Path, checkpoint: Path | None) -> None:
    found = {layout.algo for layout in Export(export).layers.values()}
    strange = sorted(found - {*READS})
    if strange:
        raise Failure("unsupported", f"vLLM reads {', '.join(READS)} of ModelOpt's layers, and no {', '.join(strange)}")
    if checkpoint is None and compressed_tensors.is_needed(export):
        raise Failure("unsupported", "vLLM reads this export once it is translated; build its engine")
