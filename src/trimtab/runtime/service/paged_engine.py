"""Serves many sequences at once: a scheduler decides what a step computes, a paged KV cache holds what was computed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from trimtab.base.errors import Failure, InputError
from trimtab.recipe import Engine as Settings
from trimtab.runtime.checkpoint.model_files import load_tokenizer
from trimtab.runtime.checkpoint.skeleton import family_of, skeleton
from trimtab.runtime.decoder import gpu_memory, head
from trimtab.runtime.decoder.assemble import assemble
from trimtab.runtime.kv_cache import paged
from trimtab.runtime.kv_cache.block_pool import BlockPool
from trimtab.runtime.kv_cache.emulated import ServedKVCache
from trimtab.runtime.kv_cache.paged import PagedKVCache
from trimtab.runtime.linear.choice import PackedLinear
from trimtab.runtime.service import sampling
from trimtab.runtime.service.forward import Attention, Forward
from trimtab.runtime.service.sampling import Chosen, Sampling
from trimtab.runtime.service.scheduler import Scheduler, Sequence, Strategy

#: Tokens of a block: fewer waste less at a sequence's end, more make shorter tables.
BLOCK_SIZE = 16


@dataclass(eq=False)
class GenerationRequest(Sequence):
    """A sequence with its own way of choosing tokens; `finish_reason` is "" until it ends."""

    sampling: Sampling = field(default_factory=Sampling)
    ignore_eos: bool = False
    #: How many of the likeliest tokens are told with each token of the prompt; None tells nothing of it.
    prompt_logprobs: int | None = None
    finish_reason: Literal["", "stop", "length", "cancelled"] = ""
    #: When each token came, and the end-of-text token, in seconds of `time.monotonic`.
    times: list[float] = field(default_factory=list)
    #: The prompt's tokens but the first, by their places, with how likely they were; written while it is read.
    prompt_told: dict[int, Chosen] = field(default_factory=dict)

    @property
    def tells_prompt(self) -> bool:
        """Whether its next tokens are of a prompt whose likelihood is asked for."""
        return self.prompt_logprobs is not None and self.computed < self.prompt_tokens


@dataclass(frozen=True)
class Event:
    """A request got a token, None where that was its end-of-text token; `last` when it has ended."""

    request: GenerationRequest
    chosen: Chosen | None
    last: bool = False


@dataclass
class Counts:
    """What an engine has computed since it was made: steps, tokens that were read, the strategy's padding, and the
    works of all steps, of which one has at most `max_batch_size`."""

    steps: int = 0
    tokens: int = 0
    padding: int = 0
    sequences: int = 0


class PagedEngine:
    """Runs an export with continuous batching; every strategy uses the same kernels and the same cache.

    Args:
        folder: a plain Hugging Face checkpoint or a ModelOpt unified checkpoint.
        settings: `max_batch_size` sequences run together, `max_num_tokens` are computed in a step, `max_seq_len`
            bounds a sequence, `enable_chunked_prefill` lets a prompt take several steps, `kv_cache_fraction` of a
            GPU's free memory may hold keys and values.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        kv_cache: "export" holds the KV cache as the export asks, "none" in 16 bits whatever it asks for.
        block_size: tokens of a block; `max_seq_len` makes the cache a contiguous one.
        blocks: of the cache; 0 takes what whole batches at full length need, or what fits.
        attention: one of `forward.Attention`.

    Raises:
        InputError: not a model folder, or settings that fit no sequence.
        Failure: `export_damaged`, `unsupported`, or `does_not_fit`, naming the part.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        device: str = "auto",
        kv_cache: ServedKVCache = "export",
        strategy: Strategy = "in-flight",
        timeout: float = 0.1,
        block_size: int = BLOCK_SIZE,
        blocks: int = 0,
        attention: Attention = "auto",
    ):
        self.folder = Path(folder)
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(name)
        paged.check(family_of(skeleton(self.folder)).model_type)  # before minutes of loading
        with gpu_memory.part("weights", self.device):
            self.model = assemble(self.folder, self.device, kv_cache)
        head.check(self.model)
        self._positions = settings.max_seq_len
        self._forward = Forward(self.model, self.device, self._positions, attention)
        ends = self.model.generation_config.eos_token_id
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or [])
        self.lay_out(settings, block_size, blocks, strategy, timeout)

    def lay_out(
        self,
        settings: Settings,
        block_size: int = BLOCK_SIZE,
        blocks: int = 0,
        strategy: Strategy = "in-flight",
        timeout: float = 0.1,
        recorded: bool = True,
    ) -> None:
        """Gives the engine another cache and other limits, and forgets what it computed; the model stays.

        Args:
            recorded: whether a GPU's steps may be recorded; the others are those of the class.

        Raises:
            InputError: settings that fit no sequence, or longer ones than the engine was made for.
            Failure: `does_not_fit`.
        """
        if settings.max_seq_len > self._positions:
            longer = f"{settings.max_seq_len} is more than {self._positions}, which the engine was made for"
            raise InputError(f"engine.max_seq_len: {longer}; open another engine")
        self.settings = settings
        self.cache = None  # its memory first, and that of the recordings
        self._forward.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        blocks = blocks or self._affordable_blocks(block_size)
        with gpu_memory.part("KV cache", self.device):
            self.cache = PagedKVCache.for_model(self.model, blocks, block_size)
        self.pool = BlockPool(blocks, block_size)
        limits = (settings.max_batch_size, settings.max_num_tokens)
        self.scheduler = Scheduler(self.pool, *limits, strategy, settings.enable_chunked_prefill, timeout)
        self.counts = Counts()
        self._forward.lay_out(self.cache, self.pool, settings.max_batch_size, recorded)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder)

    @property
    def attention_path(self) -> str:
        """How attention reads the cache, and on a GPU why no faster."""
        return self._forward.attention_path

    @property
    def decode_path(self) -> str:
        """How the last step of nothing but single tokens ran: "loop", or "CUDA graph"; with the kernel, any step."""
        return self._forward.path

    def check(self, request: GenerationRequest) -> None:
        """Raises InputError where a request could never be served; names the field."""
        limit = self.settings.max_seq_len
        if request.length > limit:
            asked = f"{request.prompt_tokens} tokens of prompt and {request.max_new_tokens} new ones"
            raise InputError(f"prompt: {asked} exceed engine.max_seq_len {limit}; ask for fewer")
        vocabulary = self.model.config.vocab_size
        for token in request.tokens:
            if not 0 <= token < vocabulary:
                raise InputError(f"prompt: token {token} is not valid; write numbers from 0 to {vocabulary - 1}")
        self.scheduler.check(request)

    def submit(self, request: GenerationRequest) -> None:
        """Lets a request wait for its turn; the next steps compute it.

        Raises:
            InputError: it could never be served.
        """
        self.check(request)
        self.scheduler.submit(request)

    def cancel(self, request: GenerationRequest) -> None:
        """Ends a request, whatever became of it, and frees its blocks."""
        self._finish(request, "cancelled")

    @torch.inference_mode()
    def step(self) -> list[Event] | None:
        """Computes one step and returns what it brought, or None where there was nothing to compute yet.

        Raises:
            Failure: `does_not_fit`.
        """
        step = self.scheduler.next_step(time.monotonic())
        if step is None:
            return None
        with gpu_memory.part("activations", self.device):
            works, logits = self._forward(step)
            chosen = sampling.choose(logits, [work.sequence.sampling for work in works]) if works else []
        self.scheduler.done(step)
        self.counts.steps += 1
        self.counts.tokens += step.tokens
        self.counts.padding += step.padding
        self.counts.sequences += len(step.works)
        return [self._note(work.sequence, c) for work, c in zip(works, chosen, strict=True)]

    def probe(self) -> None:
        """Serves a few tokens, so that a model which cannot be served is refused before anybody asks.

        Raises:
            Failure: `unsupported`, or `does_not_fit`.
        """
        try:
            self.submit(GenerationRequest([0, 0], 2, ignore_eos=True))
            for _ in self.run():
                pass
        except Failure:
            raise
        except Exception as error:  # whatever a model's own code raises on its first request
            what = f"{type(self.model).__name__} does not run on the paged engine: {error!r}"
            raise Failure("unsupported", what) from error

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Returns for each prompt the tokens that greedy decoding adds, without the end-of-text token.

        Raises:
            InputError: a prompt is empty, or with its new tokens exceeds a limit.
        """
        requests = [GenerationRequest(list(prompt), max_new_tokens) for prompt in prompts]
        for request in requests:
            self.submit(request)
        for _ in self.run():
            pass
        return [request.new_tokens for request in requests]

    def run(self) -> Iterator[list[Event]]:
        """Computes steps until all that was submitted has ended, and yields what each brought."""
        self.scheduler.draining = True
        while not self.scheduler.idle:
            yield self.step() or []
        self.scheduler.draining = False

    def warm_up(self, tokens: int) -> None:
        """Runs what service runs before it is timed: with the kernel every usual shape of a step, else whole batches of
        so many tokens a sequence, and batches that shrink."""
        size = self.settings.max_batch_size
        if self._forward.has_kernel:
            self._forward.warm_up(self.settings.max_num_tokens)
            return
        while size:
            length = tokens // 2
            for number in range(size):
                new_tokens = tokens - length if number == 0 else 2
                self.submit(GenerationRequest([0] * length, new_tokens, ignore_eos=True))
            for _ in self.run():
                pass
            size //= 2

    def _note(self, request: GenerationRequest, chosen: Chosen) -> Event:
        request.times.append(time.monotonic())
        if chosen.token in self.ends and not request.ignore_eos:
            self._finish(request, "stop")
            return Event(request, None, last=True)
        request.tokens.append(chosen.token)
        if len(request.new_tokens) == request.max_new_tokens:
            self._finish(request, "length")
        return Event(request, chosen, last=bool(request.finish_reason))

    def _finish(self, request: GenerationRequest, reason: str) -> None:
        request.finish_reason = request.finish_reason or reason
        self.scheduler.remove(request)

    def _affordable_blocks(self, block_size: int) -> int:
        """Blocks for whole batches at full length, or as many as a GPU has room for."""
        settings, length = self.settings, -(-self.settings.max_seq_len // block_size)
        wanted = settings.max_batch_size * length
        if self.device.type != "cuda":
            return wanted
        each = paged.bytes_per_token(self.model) * block_size
        left = max(0, gpu_memory.free(self.device) - self._activation_bytes())
        fitting = int(left * settings.kv_cache_fraction) // each
        if fitting < length:
            total = torch.cuda.mem_get_info(self.device)[1]
            raise gpu_memory.does_not_fit("KV cache of one sequence", length * each, fitting * each, total)
        return min(wanted, fitting)

    def _activation_bytes(self) -> int:
        """An estimate like that of `model.memory`, and the keys and values that one layer reads at a time."""
        config, settings = self.model.config, self.settings
        width = 4 * config.hidden_size + 3 * config.intermediate_size
        layers = [module for module in self.model.modules() if isinstance(module, (nn.Linear, PackedLinear))]
        largest = max(layer.in_features * layer.out_features for layer in layers)
        gathered = max(2 * 2 * paged.key_features(self.model, m) for m in paged.attention_layers(self.model))
        gathered *= 0 if self._forward.has_kernel else settings.max_batch_size * settings.max_seq_len
        return (
            2 * settings.max_num_tokens * width
            + 4 * settings.max_batch_size * config.vocab_size
            + 2 * largest
            + gathered
        )
