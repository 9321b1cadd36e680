"""Decoding of one batch, a token at a time: what decode speed is measured on, and text is generated with.

On a GPU a step of a small model takes less time than Python takes to launch its thousand kernels, and a clock around
such a loop measures Python. So there the step is recorded once as a CUDA graph, over a KV cache of fixed size, and
replayed: the same kernels in the same order, launched by the GPU itself, as serving engines do it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, StaticCache

from trimtab.base import progress
from trimtab.runtime.decoder.step import Decoding, DecodingStep

#: logits [batch, V] -> the next tokens, int64 [batch, 1].
Choice = Callable[[torch.Tensor], torch.Tensor]
#: Whether all processes that hold parts of one model have come as far, from whether this one has; alone, that is all.
Agree = Callable[[bool], bool]

#: Steps before the recording, in which libraries choose and load their kernels.
_WARM_UP = 2
#: Tokens of the prompt, and of the continuation, that a recording is tried on.
_TRIAL = (4, 3)


class Growing:
    """Decodes with the KV cache that the model itself makes, which grows with each token."""

    def __init__(self, model: PreTrainedModel, path: str = "loop"):
        self.model, self.path = model, path

    def prefill(self, prompt: torch.Tensor) -> None:
        """Reads a prompt, int64 [batch, length], and chooses the first token."""
        output = self.model(prompt, use_cache=True, logits_to_keep=1)
        # A Mamba calls its cache otherwise, as it has a state alone.
        self._argument = "cache_params" if "cache_params" in output else "past_key_values"
        self._cache, self._logits = output[self._argument], output.logits
        self._token = _likeliest(output.logits)

    def steps(self, count: int, choose: Choice | None = None) -> torch.Tensor:
        """Returns the next tokens, int64 [batch, count], one pass each: the likeliest, or what `choose` says."""
        tokens = []
        for _ in range(count):
            if choose:
                self._token = choose(self._logits[:, -1])
            tokens.append(self._token)
            output = self.model(self._token, **{self._argument: self._cache}, use_cache=True)
            self._logits, self._token = output.logits, _likeliest(output.logits)
        return torch.cat(tokens, dim=1)


class Recorded:
    """Decodes by steps that always work on the same addresses, so that one can be recorded and replayed.

    Args:
        batch_size, prompt_tokens, new_tokens: of every prompt and continuation that it is used for, at most.
    """

    path = "loop"

    def __init__(self, model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int):
        self.model = model
        self._length = max(prompt_tokens + new_tokens, _TRIAL[0] + max(_TRIAL[1], _WARM_UP))
        self._token = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
        self._replay: Callable[[], None] | None = None

    def _read(self, prompt: torch.Tensor) -> torch.Tensor:
        """Begins anew; returns the logits of the prompts' last tokens, [batch, 1, V]."""
        raise NotImplementedError

    def _next(self) -> torch.Tensor:
        """Returns the logits of `_token`, [batch, 1, V]."""
        raise NotImplementedError

    def prefill(self, prompt: torch.Tensor) -> None:
        """Reads a prompt, int64 [batch, length], and chooses the first token."""
        self._logits = self._read(prompt)
        self._token.copy_(_likeliest(self._logits))

    def steps(self, count: int, choose: Choice | None = None) -> torch.Tensor:
        """Returns the next tokens, int64 [batch, count], one pass each: the likeliest, or what `choose` says."""
        step, tokens = self._replay or self._step, []
        for _ in range(count):
            if choose:
                self._token.copy_(choose(self._logits[:, -1]))
            tokens.append(self._token.clone())
            step()
        return torch.cat(tokens, dim=1)

    @torch.inference_mode()
    def capture(self, agree: Agree = bool) -> None:
        """Records the step as a CUDA graph, and tries the recording against the step itself.

        Ranks that talk within a step replay it together or not at all: one that could not record it would leave the
        others waiting for it in the middle of a replay.

        Raises:
            RuntimeError: the step cannot be recorded, as it waits for the GPU or copies to it, or a replay differs; or
                that is so of another rank.
        """
        batch_size, vocabulary = len(self._token), self.model.config.vocab_size
        prompt = torch.arange(batch_size * _TRIAL[0], device=self.model.device).view(batch_size, -1) % vocabulary
        replay = None
        try:
            self.prefill(prompt)
            self._warm_up()
            expected = self._trial(prompt)
            replay = self._record()
        finally:
            all_recorded = agree(replay is not None)
        if not all_recorded:
            raise RuntimeError("another rank could not record its step")
        self._replay, self.path = replay, self.path.replace("loop", "CUDA graph", 1)
        found = self._trial(prompt)
        alike = bool((found - expected).abs().max() <= 0.02 * expected.abs().max())
        if not agree(alike):
            raise RuntimeError("a replayed step has other logits than the step itself")

    def _warm_up(self) -> None:
        """Lets libraries choose and load their kernels."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(beside)

    def _record(self) -> Callable[[], None]:
        """Returns what replays the step."""
        graph = torch.cuda.CUDAGraph()
        # NCCL's own thread may look at its events meanwhile, which forbids nothing of this one.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._step()
        recorded = self._logits

        def replay() -> None:
            graph.replay()
            self._logits = recorded  # a prefill puts its own there

        return replay

    def _trial(self, prompt: torch.Tensor) -> torch.Tensor:
        """Logits behind given tokens: of a thousand rows, some have two likeliest tokens, and either may be taken."""
        self.prefill(prompt)
        self.steps(_TRIAL[1], lambda _: prompt[:, :1])
        return self._logits.float().clone()

    def _step(self) -> None:
        self._logits = self._next()
        self._token.copy_(_likeliest(self._logits))


class Stepping(Recorded):
    """Decodes by a model's `Step`."""

    path = "loop, step of its own"

    @torch.inference_mode()
    def __init__(
        self, step: DecodingStep, model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int
    ):
        super().__init__(model, batch_size, prompt_tokens, new_tokens)
        self._run, self._decoding = step, Decoding(model, batch_size, self._length, step.by_spans)

    def _read(self, prompt: torch.Tensor) -> torch.Tensor:
        return self._decoding.read(prompt)

    def _next(self) -> torch.Tensor:
        decoding = self._decoding
        logits = self._run(self._token.t(), decoding.positions[None], decoding.where())
        decoding.advance()
        return logits[:, None]


class Static(Recorded):
    """Decodes by the model's own forward pass, with transformers' KV cache of fixed size."""

    path = "loop, static cache"

    @torch.inference_mode()
    def __init__(self, model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int):
        super().__init__(model, batch_size, prompt_tokens, new_tokens)
        self._cache = StaticCache(config=model.config, max_cache_len=self._length)

    def _read(self, prompt: torch.Tensor) -> torch.Tensor:
        self._cache.reset()
        return self.model(prompt, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits

    def _next(self) -> torch.Tensor:
        return self.model(self._token, past_key_values=self._cache, use_cache=True).logits


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1].argmax(-1, keepdim=True)


def decoder(
    model: PreTrainedModel,
    batch_size: int,
    prompt_tokens: int,
    new_tokens: int,
    step: DecodingStep | None = None,
    agree: Agree = bool,
) -> Growing | Recorded:
    """Returns the fastest way to decode on the model's device; its `path` says which, and on a GPU why no faster.

    Args:
        step: of the model, where it has one, which must be so in all ranks or in none.
        agree: see `Recorded.capture`.
    """
    if model.device.type != "cuda":
        return Growing(model)
    return recorded(model, batch_size, prompt_tokens, new_tokens, step=step, agree=agree)


def recorded(
    model: PreTrainedModel, *sizes: int, step: DecodingStep | None = None, agree: Agree = bool
) -> Growing | Recorded:
    """Returns the first way to decode that can be recorded, in all ranks, or a loop with the reason."""
    reason = ""
    for make in ([lambda: Stepping(step, model, *sizes)] if step else []) + [lambda: Static(model, *sizes)]:
        try:
            found = make()
            found.capture(agree)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model does that a recording or a fixed cache does not allow
            reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            progress.report("engine", f"a step could not be recorded: {reason}")
        else:
            return found
    return Growing(model, f"loop, as no CUDA graph could be made: {reason}")
