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

from trimtab.base import progress
from trimtab.base.errors import Failure, InputError
from trimtab.recipe import Engine as Settings
from trimtab.runtime.checkpoint.model_files import load_tokenizer
from trimtab.runtime.decoder import gpu_memory, head
from trimtab.runtime.decoder import step as own_step
from trimtab.runtime.decoder.assemble import assemble, skeleton
from trimtab.runtime.decoder.step import Step
from trimtab.runtime.kernels import cuda_graphs, replacements
from trimtab.runtime.kv_cache import paged, paged_attention
from trimtab.runtime.kv_cache.block_pool import BlockPool
from trimtab.runtime.kv_cache.emulated import ServedKVCache
from trimtab.runtime.kv_cache.paged import PagedKVCache
from trimtab.runtime.kv_cache.paged_attention import Chunk, Pass
from trimtab.runtime.linear.choice import PackedLinear
from trimtab.runtime.service import sampling, step_inputs
from trimtab.runtime.service.sampling import Chosen, Sampling
from trimtab.runtime.service.scheduler import Scheduler, Sequence, Strategy, Work
from trimtab.runtime.service.scheduler import Step as Planned
from trimtab.runtime.service.step_inputs import Item, Shape

#: Tokens of a block: fewer waste less at a sequence's end, more make shorter tables.
BLOCK_SIZE = 16
#: How attention reads the cache: by the kernel of `runtime.kernels.paged_attention`, or by gathered blocks; "auto" is
#: the kernel on a GPU where it computes what the other does.
Attention = Literal["auto", "kernel", "gathered"]
#: A pass that reads prompts has a multiple of so many tokens: oneDNN makes a kernel for each number, and keeps it.
ROUNDING = 16


@dataclass(eq=False)
class Request(Sequence):
    """A sequence with its own way of choosing tokens; `finish_reason` is "" until it ends."""

    sampling: Sampling = field(default_factory=Sampling)
    ignore_eos: bool = False
    finish_reason: Literal["", "stop", "length", "cancelled"] = ""
    #: When each token came, and the end-of-text token, in seconds of `time.monotonic`.
    times: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Event:
    """A request got a token, None where that was its end-of-text token; `last` when it has ended."""

    request: Request
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
        attention: one of `Attention`.

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
        paged.check(skeleton(self.folder).config.model_type)  # before minutes of loading
        with gpu_memory.part("weights", self.device):
            self.model = assemble(self.folder, self.device, kv_cache)
        head.check(self.model)
        self._step: Step | None = None
        self._positions = settings.max_seq_len
        if self.device.type == "cuda":
            replacements.fuse_norms(self.model)
            self._step = own_step.build(self.model, self._positions)
        self.body, self.head = self.model.base_model, self.model.get_output_embeddings()
        ends = self.model.generation_config.eos_token_id
        self.ends = frozenset([ends] if isinstance(ends, int) else ends or [])
        #: How attention reads the cache, and on a GPU why no faster.
        self.attention_path = self._choose_attention(attention)
        paged_attention.use_paged_attention(self.model)
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
        self.cache = self._recordings = None  # their memory first
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        blocks = blocks or self._affordable_blocks(block_size)
        with gpu_memory.part("KV cache", self.device):
            self.cache = PagedKVCache.for_model(self.model, blocks, block_size)
        self.pool = BlockPool(blocks, block_size)
        limits = (settings.max_batch_size, settings.max_num_tokens)
        self.scheduler = Scheduler(self.pool, *limits, strategy, settings.enable_chunked_prefill, timeout)
        self.counts = Counts()
        self._recordings = cuda_graphs.Recordings(self.device, recorded)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder)

    @property
    def decode_path(self) -> str:
        """How the last step of nothing but single tokens ran: "loop", or "CUDA graph"; with the kernel, any step."""
        return self._recordings.path

    def check(self, request: Request) -> None:
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

    def submit(self, request: Request) -> None:
        """Lets a request wait for its turn; the next steps compute it.

        Raises:
            InputError: it could never be served.
        """
        self.check(request)
        self.scheduler.submit(request)

    def cancel(self, request: Request) -> None:
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
            works, logits = self._compute(step)
            chosen = sampling.choose(logits, [work.sequence.sampling for work in works]) if works else []
        self.scheduler.done(step)
        self.counts.steps += 1
        self.counts.tokens += step.tokens
        self.counts.padding += step.padding
        self.counts.sequences += len(step.works)
        return [self._note(work.sequence, c) for work, c in zip(works, chosen, strict=True)]

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Returns for each prompt the tokens that greedy decoding adds, without the end-of-text token.

        Raises:
            InputError: a prompt is empty, or with its new tokens exceeds a limit.
        """
        requests = [Request(list(prompt), max_new_tokens) for prompt in prompts]
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
        if self._has_kernel:
            with torch.inference_mode(), gpu_memory.part("activations", self.device):
                for shape in step_inputs.shapes(size, self.settings.max_num_tokens):
                    self._run(self._sample(shape), shape)
            return
        while size:
            length = tokens // 2
            for number in range(size):
                new_tokens = tokens - length if number == 0 else 2
                self.submit(Request([0] * length, new_tokens, ignore_eos=True))
            for _ in self.run():
                pass
            size //= 2

    def _sample(self, shape: Shape) -> list[Item]:
        """Work that fills a shape, on the first block, which is nobody's yet."""
        each = min(shape.span, self.pool.block_size)
        return [Item([1] * each, 0, [0])] * min(shape.sequences, shape.tokens // each)

    def _choose_attention(self, asked: Attention) -> str:
        self._has_kernel = False
        if asked == "gathered" or (asked == "auto" and self.device.type != "cuda"):
            return "gathered blocks"
        why = ""
        if not (self._step and self._step.by_spans):  # which was tried when the step was built
            with gpu_memory.part("activations", self.device):
                why = paged_attention.why_no_kernel(self.model)
        if not why:
            self._has_kernel = True
            return "kernel"
        if asked == "kernel":
            raise Failure("unsupported", f"attention by the kernel does not run here: {why}")
        found = f"gathered blocks, as the kernel does not run here: {why}"
        progress.report("serve", f"attention: {found}")
        return found

    def _compute(self, planned: Planned) -> tuple[list[Work], torch.Tensor]:
        """Returns the works that end with a choice, and the logits for it, [n, vocabulary]."""
        singles = [work for work in planned.works if work.count == 1]
        chunks = [work for work in planned.works if work.count > 1]
        works, padding = singles + chunks, planned.padding
        if self._has_kernel:
            items = [self._item(work) for work in works]
            logits = self._run(items, Shape.of(items, padding, self.settings.max_batch_size))[: len(works)]
        else:
            if chunks:
                padding += -(planned.tokens + padding) % ROUNDING
            nobody = self.cache.padding_slot
            rows = [self._row(work) for work in singles]
            rows += [cuda_graphs.Row(0, 0, nobody, [nobody // self.pool.block_size])] * padding
            logits = self._mixed(rows, chunks) if chunks else self._decode(rows)
            logits = torch.cat([logits[: len(singles)], logits[len(rows) :]])
        places = [i for i, work in enumerate(works) if work.is_last]
        return [works[i] for i in places], logits if len(places) == len(works) else logits[places]

    def _run(self, items: list[Item], shape: Shape) -> torch.Tensor:
        """Runs a step by the kernel; returns the logits of each item's last token, and of padding."""

        def step(row: torch.Tensor) -> torch.Tensor:
            return self._logits(*step_inputs.unpack(row, shape, self.cache))

        row = step_inputs.pack(items, shape, self.pool.block_size, self.cache.padding_slot)
        if shape.is_recorded:
            return self._recordings(shape, row, step)
        return step(row.to(self.device))

    def _item(self, work: Work) -> Item:
        start, stop = work.sequence.computed, work.sequence.computed + work.count
        table = self.pool.tables[work.sequence]
        return Item(work.sequence.tokens[start:stop], start, table[: self.pool.needed(stop)])

    def _decode(self, rows: list[cuda_graphs.Row]) -> torch.Tensor:
        """Runs single tokens by gathered blocks; returns the logits of each row."""
        count, width = len(rows), max(len(row.blocks) for row in rows)
        sequences = count
        if self._recordings.records:
            sequences, width = 1 << (count - 1).bit_length(), cuda_graphs.rounded_up(width)
        lines = cuda_graphs.to_tensor(rows, sequences, width, self.cache.padding_slot, self.pool.block_size)
        return self._recordings((sequences, width), lines, self._decode_lines)[:count]

    def _decode_lines(self, lines: torch.Tensor) -> torch.Tensor:
        tokens, positions, slots, lengths = lines[:, : cuda_graphs.COLUMNS].t().contiguous()
        where = Pass(self.cache, slots, lines[:, cuda_graphs.COLUMNS :].contiguous(), lengths)
        return self._logits(tokens[None], positions[None], where)

    def _mixed(self, rows: list[cuda_graphs.Row], chunks: list[Work]) -> torch.Tensor:
        """Runs single tokens and chunks of prompts in one pass; returns the logits of each one's last token."""
        tokens, positions, slots = ([getattr(row, n) for row in rows] for n in ("token", "position", "slot"))
        found, last = [], list(range(len(rows)))
        for work in chunks:
            start, stop = work.sequence.computed, work.sequence.computed + work.count
            table = self.pool.tables[work.sequence]
            tokens += work.sequence.tokens[start:stop]
            positions += range(start, stop)
            slots += [self._slot(table, position) for position in range(start, stop)]
            found.append(Chunk(work.count, start, self._tensor([table[: self.pool.needed(stop)]])))
            last.append(len(tokens) - 1)
        if rows:
            width = max(len(row.blocks) for row in rows)
            lines = cuda_graphs.to_tensor(rows, len(rows), width, self.cache.padding_slot, self.pool.block_size)
            lines = lines.to(self.device)
            lengths, tables = lines[:, cuda_graphs.COLUMNS - 1], lines[:, cuda_graphs.COLUMNS :]
        else:
            lengths, tables = self._tensor([]), self._tensor([[]])
        where = Pass(self.cache, self._tensor(slots), tables, lengths, found)
        return self._logits(self._tensor([tokens]), self._tensor([positions]), where, self._tensor(last))

    def _logits(
        self, tokens: torch.Tensor, positions: torch.Tensor, where: Pass, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self._step and (where.spans or not where.chunks):
            return self._step(tokens, positions, where, last)
        hidden = self.body(input_ids=tokens, position_ids=positions, use_cache=False, paged=where).last_hidden_state[0]
        return self.head(hidden if last is None else hidden[last])

    def _row(self, work: Work) -> cuda_graphs.Row:
        sequence, position = work.sequence, work.sequence.computed
        table = self.pool.tables[sequence]
        blocks = table[: self.pool.needed(position + 1)]
        return cuda_graphs.Row(sequence.tokens[position], position, self._slot(table, position), blocks)

    def _slot(self, table: list[int], position: int) -> int:
        block, offset = divmod(position, self.pool.block_size)
        return table[block] * self.pool.block_size + offset

    def _tensor(self, numbers: list) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self.device)

    def _note(self, request: Request, chosen: Chosen) -> Event:
        request.times.append(time.monotonic())
        if chosen.token in self.ends and not request.ignore_eos:
            self._finish(request, "stop")
            return Event(request, None, last=True)
        request.tokens.append(chosen.token)
        if len(request.new_tokens) == request.max_new_tokens:
            self._finish(request, "length")
        return Event(request, chosen, last=bool(request.finish_reason))

    def _finish(self, request: Request, reason: str) -> None:
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
        gathered *= 0 if self._has_kernel else settings.max_batch_size * settings.max_seq_len
        return (
            2 * settings.max_num_tokens * width
            + 4 * settings.max_batch_size * config.vocab_size
            + 2 * largest
            + gathered
        )
