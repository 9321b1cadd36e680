"""A planned step through the model: packed tokens of many sequences over a paged KV cache, and the logits they ask for.

Attention reads the cache by a kernel, in rows of a few fixed shapes, or by gathered blocks, where single tokens and
chunks of prompts go through the model in one pass.
"""

from __future__ import annotations

from typing import Literal

import torch
from transformers import PreTrainedModel

from trimtab.base import progress
from trimtab.base.errors import Failure
from trimtab.runtime.decoder import gpu_memory, head
from trimtab.runtime.decoder import step as own_step
from trimtab.runtime.decoder.step import DecodingStep
from trimtab.runtime.kernels import cuda_graphs, replacements
from trimtab.runtime.kv_cache import paged_attention
from trimtab.runtime.kv_cache.block_pool import BlockPool
from trimtab.runtime.kv_cache.paged import PagedKVCache
from trimtab.runtime.kv_cache.paged_attention import Chunk, Pass
from trimtab.runtime.service import prompt_scores, step_inputs
from trimtab.runtime.service.scheduler import ScheduledStep as Planned
from trimtab.runtime.service.scheduler import Work
from trimtab.runtime.service.step_inputs import Item, Shape

#: How attention reads the cache: by the kernel of `runtime.kernels.paged_attention`, or by gathered blocks; "auto" is
#: the kernel on a GPU where it computes what the other does.
Attention = Literal["auto", "kernel", "gathered"]
#: A pass that reads prompts has a multiple of so many tokens: oneDNN makes a kernel for each number, and keeps it.
ROUNDING = 16


class Forward:
    """Computes the steps that a scheduler plans, in the cache that `lay_out` gave last.

    Args:
        model: on the device; its attention becomes the paged one, and on a GPU its norms are fused.
        positions: that a token may have, from 0.
        attention: one of `Attention`.

    Raises:
        Failure: `unsupported`, the kernel was asked for and does not run here.
    """

    def __init__(self, model: PreTrainedModel, device: torch.device, positions: int, attention: Attention):
        self._model, self._device = model, device
        #: The family's own step, where it has one and the device is a GPU.
        self.step: DecodingStep | None = None
        if device.type == "cuda":
            replacements.fuse_norms(model)
            self.step = own_step.build(model, positions)
        self._body, self._head, self._behind_head = model.base_model, model.get_output_embeddings(), head.behind(model)
        #: Whether attention reads the cache by the kernel; how it does, and on a GPU why no faster.
        self.has_kernel, self.attention_path = self._choose_attention(attention)
        paged_attention.use_paged_attention(model)

    def forget(self) -> None:
        """Gives up the cache and what was recorded on it, so that their memory is free."""
        self._cache = self._recordings = None

    def lay_out(self, cache: PagedKVCache, pool: BlockPool, most: int, recorded: bool = True) -> None:
        """Computes from now on in this cache, `most` sequences at a time; a GPU's steps are recorded if so said."""
        self._cache, self._pool, self._most = cache, pool, most
        self._recordings = cuda_graphs.Recordings(self._device, recorded)

    @property
    def path(self) -> str:
        """How the last step that may be recorded ran: "loop", or "CUDA graph"."""
        return self._recordings.path

    @torch.inference_mode()
    def warm_up(self, budget: int) -> None:
        """Runs every usual shape of a step of at most `budget` tokens by the kernel."""
        with gpu_memory.part("activations", self._device):
            for shape in step_inputs.shapes(self._most, budget):
                self._run(self._sample(shape), shape)

    def __call__(self, planned: Planned) -> tuple[list[Work], torch.Tensor]:
        """Returns the works that end with a choice, and the logits for it, [n, vocabulary].

        Prompts whose own tokens are asked for are read in a pass beside the others, which keeps what they predict.
        """
        telling = [work for work in planned.works if work.sequence.tells_prompt]
        if not telling:
            return self._chosen(planned)
        works, logits = self._read_and_tell(telling)
        others = [work for work in planned.works if not work.sequence.tells_prompt]
        if others:
            more, beside = self._chosen(Planned(others, planned.padding))
            works, logits = more + works, torch.cat([beside.to(logits.dtype), logits])
        return works, logits

    def _chosen(self, planned: Planned) -> tuple[list[Work], torch.Tensor]:
        singles = [work for work in planned.works if work.count == 1]
        chunks = [work for work in planned.works if work.count > 1]
        works, padding = singles + chunks, planned.padding
        if self.has_kernel:
            items = [self._item(work) for work in works]
            logits = self._run(items, Shape.of(items, padding, self._most))[: len(works)]
        else:
            if chunks:
                padding += -(planned.tokens + padding) % ROUNDING
            nobody = self._cache.padding_slot
            rows = [self._row(work) for work in singles]
            rows += [cuda_graphs.StepToken(0, 0, nobody, [nobody // self._pool.block_size])] * padding
            logits = self._mixed(rows, chunks) if chunks else self._decode(rows)
            logits = torch.cat([logits[: len(singles)], logits[len(rows) :]])
        places = [i for i, work in enumerate(works) if work.is_last]
        return [works[i] for i in places], logits if len(places) == len(works) else logits[places]

    def _run(self, items: list[Item], shape: Shape) -> torch.Tensor:
        """Runs a step by the kernel; returns the logits of each item's last token, and of padding."""

        def step(row: torch.Tensor) -> torch.Tensor:
            return self._logits(*step_inputs.unpack(row, shape, self._cache))

        row = step_inputs.pack(items, shape, self._pool.block_size, self._cache.padding_slot)
        if shape.is_recorded:
            return self._recordings(shape, row, step)
        return step(row.to(self._device))

    def _item(self, work: Work) -> Item:
        start, stop = work.sequence.computed, work.sequence.computed + work.count
        table = self._pool.tables[work.sequence]
        return Item(work.sequence.tokens[start:stop], start, table[: self._pool.needed(stop)])

    def _decode(self, rows: list[cuda_graphs.StepToken]) -> torch.Tensor:
        """Runs single tokens by gathered blocks; returns the logits of each row."""
        count, width = len(rows), max(len(row.blocks) for row in rows)
        sequences = count
        if self._recordings.records:
            sequences, width = 1 << (count - 1).bit_length(), cuda_graphs.rounded_up(width)
        lines = cuda_graphs.to_tensor(rows, sequences, width, self._cache.padding_slot, self._pool.block_size)
        return self._recordings((sequences, width), lines, self._decode_lines)[:count]

    def _decode_lines(self, lines: torch.Tensor) -> torch.Tensor:
        tokens, positions, slots, lengths = lines[:, : cuda_graphs.COLUMNS].t().contiguous()
        where = Pass(self._cache, slots, lines[:, cuda_graphs.COLUMNS :].contiguous(), lengths)
        return self._logits(tokens[None], positions[None], where)

    def _mixed(self, rows: list[cuda_graphs.StepToken], chunks: list[Work]) -> torch.Tensor:
        """Runs single tokens and chunks of prompts in one pass; returns the logits of each one's last token."""
        tokens, positions, where, last = self._packed(rows, chunks)
        return self._logits(tokens, positions, where, last)

    def _read_and_tell(self, works: list[Work]) -> tuple[list[Work], torch.Tensor]:
        """Reads chunks of prompts, writes down how likely their tokens were, and returns what `__call__` does."""
        tokens, positions, where, last = self._packed([], works)
        hidden = self._hidden(tokens, positions, where)
        begin = 0
        for work in works:
            request, first = work.sequence, work.sequence.computed
            count = min(work.count, request.prompt_tokens - 1 - first)  # the last token predicts no other of the prompt
            targets = request.tokens[first + 1 : first + 1 + count]
            if targets:
                rows = hidden[begin : begin + len(targets)]
                told = prompt_scores.tell(self._head, rows, targets, request.prompt_logprobs, self._behind_head)
                request.prompt_told |= dict(enumerate(told, start=first + 1))
            begin += work.count
        ending = [number for number, work in enumerate(works) if work.is_last]
        logits = head.changed(self._head(hidden[last[ending]]), self._behind_head)
        return [works[number] for number in ending], logits

    def _packed(
        self, rows: list[cuda_graphs.StepToken], chunks: list[Work]
    ) -> tuple[torch.Tensor, torch.Tensor, Pass, torch.Tensor]:
        """Returns the tokens of a pass by gathered blocks, their positions, where they stand, and each one's last."""
        tokens, positions, slots = ([getattr(row, n) for row in rows] for n in ("token", "position", "slot"))
        found, last = [], list(range(len(rows)))
        for work in chunks:
            start, stop = work.sequence.computed, work.sequence.computed + work.count
            table = self._pool.tables[work.sequence]
            tokens += work.sequence.tokens[start:stop]
            positions += range(start, stop)
            slots += [self._slot(table, position) for position in range(start, stop)]
            found.append(Chunk(work.count, start, self._tensor([table[: self._pool.needed(stop)]])))
            last.append(len(tokens) - 1)
        if rows:
            width = max(len(row.blocks) for row in rows)
            lines = cuda_graphs.to_tensor(rows, len(rows), width, self._cache.padding_slot, self._pool.block_size)
            lines = lines.to(self._device)
            lengths, tables = lines[:, cuda_graphs.COLUMNS - 1], lines[:, cuda_graphs.COLUMNS :]
        else:
            lengths, tables = self._tensor([]), self._tensor([[]])
        where = Pass(self._cache, self._tensor(slots), tables, lengths, found)
        return self._tensor([tokens]), self._tensor([positions]), where, self._tensor(last)

    def _logits(
        self, tokens: torch.Tensor, positions: torch.Tensor, where: Pass, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        if self.step and (where.spans or not where.chunks):
            return self.step(tokens, positions, where, last)
        hidden = self._hidden(tokens, positions, where)
        return head.changed(self._head(hidden if last is None else hidden[last]), self._behind_head)

    def _hidden(self, tokens: torch.Tensor, positions: torch.Tensor, where: Pass) -> torch.Tensor:
        return self._body(input_ids=tokens, position_ids=positions, use_cache=False, paged=where).last_hidden_state[0]

    def _row(self, work: Work) -> cuda_graphs.StepToken:
        sequence, position = work.sequence, work.sequence.computed
        table = self._pool.tables[sequence]
        blocks = table[: self._pool.needed(position + 1)]
        return cuda_graphs.StepToken(sequence.tokens[position], position, self._slot(table, position), blocks)

    def _slot(self, table: list[int], position: int) -> int:
        block, offset = divmod(position, self._pool.block_size)
        return table[block] * self._pool.block_size + offset

    def _tensor(self, numbers: list) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)

    def _sample(self, shape: Shape) -> list[Item]:
        """Work that fills a shape, on the first block, which is nobody's yet."""
        each = min(shape.span, self._pool.block_size)
        return [Item([1] * each, 0, [0])] * min(shape.sequences, shape.tokens // each)

    def _choose_attention(self, asked: Attention) -> tuple[bool, str]:
        if asked == "gathered" or (asked == "auto" and self._device.type != "cuda"):
            return False, "gathered blocks"
        why = ""
        if not (self.step and self.step.by_spans):  # which was tried when the step was built
            with gpu_memory.part("activations", self._device):
                why = paged_attention.why_no_kernel(self._model)
        if not why:
            return True, "kernel"
        if asked == "kernel":
            raise Failure("unsupported", f"attention by the kernel does not run here: {why}")
        found = f"gathered blocks, as the kernel does not run here: {why}"
        progress.report("serve", f"attention: {found}")
        return False, found
