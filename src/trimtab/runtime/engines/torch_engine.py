"""The embedded back end on PyTorch."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from trimtab.base import progress
from trimtab.recipe import Engine as Settings
from trimtab.runtime.checkpoint import config_file
from trimtab.runtime.checkpoint.model_files import load_tokenizer
from trimtab.runtime.checkpoint.skeleton import family_of
from trimtab.runtime.decoder import decode, float16_range, gpu_memory, head, step
from trimtab.runtime.decoder.assemble import assemble
from trimtab.runtime.decoder.decode import Growing, Recorded
from trimtab.runtime.decoder.step import DecodingStep
from trimtab.runtime.engines.answer_end import AnswersEnd
from trimtab.runtime.engines.protocol import check_length, check_prompts
from trimtab.runtime.engines.scoring import Batch, Inputs, Scoring
from trimtab.runtime.kernels import replacements
from trimtab.runtime.kv_cache.emulated import ServedKVCache
from trimtab.runtime.linear import fused
from trimtab.runtime.parallel import shards
from trimtab.runtime.parallel.shards import Place


class TorchEngine(Scoring):
    """Runs an export folder in this process, in bfloat16, with PyTorch's low-precision kernels.

    A model in float16 is judged in its range: see `runtime.decoder.float16_range`.

    bfloat16 serves the baseline too, so both are compared in the same arithmetic. A CPU without instructions for it
    computes the products in float32 and rounds their sums (`linear.cpu_products`); log-probabilities are summed over
    float32 logits anyway.

    Args:
        folder: a plain Hugging Face checkpoint or a ModelOpt unified checkpoint.
        settings: `max_seq_len` bounds a sequence, `max_num_tokens` a forward pass, `max_batch_size` `generate`.
        device: "cpu", "cuda", or "auto" for CUDA where there is one.
        kv_cache: "export" for the KV cache that the export asks for, "none" for 16 bits whatever it asks for.
        place: of this process among several that answer together, each on its part of the model; all must be asked
            the same, in the same order. `runtime.engines.parallel` sees to that.

    Raises:
        InputError: not a model folder.
        Failure: `export_damaged`, `unsupported`, or `does_not_fit`, naming the part, as every method does.
    """

    def __init__(
        self,
        folder: Path,
        settings: Settings,
        device: str = "auto",
        kv_cache: ServedKVCache = "export",
        place: Place | None = None,
    ):
        self.folder, self.settings = Path(folder), settings
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(name)
        with gpu_memory.part("weights", self.device):
            self.model = assemble(self.folder, self.device, kv_cache, place)
        if self.device.type == "cuda":
            replacements.fuse_norms(self.model)
            replacements.group_queries(self.model)
        self.body, self.head = self.model.base_model, self.model.get_output_embeddings()
        self._behind_head = head.behind(self.model)
        # A branch's mask says nothing of a window, and attention of a model's own may want numbers to add, or find
        # positions in its mask; a recurrence knows no branches at all: there every request gets a row of its own.
        windows = ("sliding_window", "attention_chunk_size")
        windowed = any(getattr(self.model.config, name, None) for name in windows)
        self._is_recurrent = family_of(self.model).recurrent is not None
        own_rows = windowed or self._is_recurrent or self.model.config._attn_implementation == "eager"
        self._share_contexts = not own_rows
        self._agree = shards.agreement(place, self.device) if place else bool
        # Products of one row are chosen by their speed, which ranks would find to differ, and leave out their sums.
        self._has_step = self.device.type == "cuda" and place is None
        self._decoders: dict[tuple[int, int, int], Growing | Recorded] = {}
        self._is_float16 = config_file.declared_dtype(self.folder) == torch.float16
        #: How `decode_speed` last ran its steps: "CUDA graph" of which step, or "loop" and on a GPU why.
        self.decode_path = ""
        head.check(self.model)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.folder)

    @cached_property
    def _step(self) -> DecodingStep | None:
        return step.build(self.model, self.settings.max_seq_len) if self._has_step else None

    @property
    def weight_bytes(self) -> int:
        tensors = [*self.model.parameters(), *self.model.buffers()]  # tied ones come once
        return sum(tensor.nbytes for tensor in tensors)

    @property
    def device_bytes(self) -> int:
        return torch.cuda.memory_reserved(self.device) if self.device.type == "cuda" else 0

    def kernels(self) -> dict[str, dict[str, Any]]:
        packed = fused.packed_layers(self.model)
        return {name: {"kernel": m.kernel, "emulated": m.emulated} for name, m in packed.items()}

    @torch.inference_mode()
    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, until: Sequence[Sequence[str]] = ()
    ) -> list[list[int]]:
        """As the protocol says.

        Raises:
            InputError: a prompt is empty, or with its new tokens exceeds `max_seq_len`.
        """
        check_prompts(prompts, max_new_tokens, self.settings.max_seq_len)
        answers: dict[int, list[int]] = {}
        for some in self._prompt_batches(prompts):
            with gpu_memory.part("KV cache and activations", self.device):
                stops = [until[i] for i in some] if until else []
                answers |= zip(some, self._generate([prompts[i] for i in some], max_new_tokens, stops), strict=True)
        return [answers[i] for i in range(len(prompts))]

    @torch.inference_mode()
    def decode_speed(self, batch_size: int, prompt_tokens: int, new_tokens: int, repeats: int) -> list[float]:
        """As the protocol says; one untimed repeat comes first.

        Raises:
            InputError: prompt and new tokens exceed `max_seq_len`.
        """
        check_length("a sequence of decode_speed", prompt_tokens + new_tokens, self.settings.max_seq_len)
        generator = torch.Generator().manual_seed(0)
        shape = (batch_size, prompt_tokens)
        prompt = torch.randint(self.model.config.vocab_size, shape, generator=generator).to(self.device)
        with gpu_memory.part("KV cache and activations", self.device):
            decoder = self._decoder(batch_size, prompt_tokens, new_tokens)
            seconds = [self._decode(decoder, prompt, new_tokens) for _ in range(repeats + 1)]
        self.decode_path = decoder.path
        return [batch_size * new_tokens / s for s in seconds[1:]]

    def under(self, settings: Settings) -> TorchEngine:
        """Returns an engine with other limits over the same loaded model."""
        other = copy.copy(self)
        other.settings, other._decoders = settings, {}
        other.__dict__.pop("_step", None)  # it has room for the longest sequence
        return other

    def close(self) -> None:
        """Nothing to do: memory goes back with the object."""

    def _hidden_of(
        self, batches: Iterable[Batch], read: Callable[[Batch], Inputs]
    ) -> Iterator[tuple[Batch, torch.Tensor]]:
        for batch in batches:
            tokens, positions, mask = read(batch)
            inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask}
            inputs = {name: value.to(self.device) for name, value in inputs.items() if value is not None}
            with float16_range.checked(self.body) if self._is_float16 else nullcontext():
                hidden = self.body(**inputs, use_cache=False).last_hidden_state
            yield batch, hidden

    def _generate(
        self, prompts: list[list[int]], max_new_tokens: int, until: Sequence[Sequence[str]]
    ) -> list[list[int]]:
        length = max(map(len, prompts))
        ends = self.model.generation_config.eos_token_id
        ends = [ends] if isinstance(ends, int) else ends or []
        padding = ends[0] if ends else 0
        tokens = torch.tensor([[padding] * (length - len(p)) + p for p in prompts])
        seen = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
        # The folder's own generation config may ask for sampling.
        config = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=ends or None, pad_token_id=padding
        )
        inputs = {"input_ids": tokens.to(self.device), "attention_mask": seen.to(self.device)}
        criteria = StoppingCriteriaList([AnswersEnd(self.tokenizer, length, ends, until)] if until else [])
        output = self.model.generate(**inputs, generation_config=config, stopping_criteria=criteria)
        output = output[:, length:].tolist()
        return [answer[: next((i for i, t in enumerate(answer) if t in ends), None)] for answer in output]

    def _prompt_batches(self, prompts: list[list[int]]) -> Iterator[list[int]]:
        """Yields the numbers of prompts that are answered together, the shortest first; a recurrence would take padding
        for text, so there they have one length."""
        order, size = sorted(range(len(prompts)), key=lambda i: len(prompts[i])), self.settings.max_batch_size
        lengths = groupby(order, key=lambda i: len(prompts[i]) if self._is_recurrent else 0)
        for some in (list(alike) for _, alike in lengths):
            yield from (some[start : start + size] for start in range(0, len(some), size))

    def _decoder(self, *sizes: int) -> Growing | Recorded:
        """Decoders are kept: recording one takes longer than a measurement."""
        if sizes not in self._decoders:
            self._decoders[sizes] = decode.decoder(self.model, *sizes, self._step, self._agree)
            if self.device.type == "cuda":
                progress.report("validate", f"decoding by {self._decoders[sizes].path}")
        return self._decoders[sizes]

    def _decode(self, decoder: Growing | Recorded, prompt: torch.Tensor, new_tokens: int) -> float:
        """Returns the seconds of `new_tokens` single steps after a prefill."""
        decoder.prefill(prompt)
        self._synchronize()
        started = time.perf_counter()
        decoder.steps(new_tokens)
        self._synchronize()
        return time.perf_counter() - started

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
