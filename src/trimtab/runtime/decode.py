"""Decoding of one batch, a token at a time: what decode speed is measured on, and text is generated with.

On a GPU a step of a small model takes less time than Python takes to launch its thousand kernels, and a clock around
such a loop measures Python. So there the step is recorded once as a CUDA graph, over a KV cache of fixed size, and
replayed: the same kernels in the same order, launched by the GPU itself, as serving engines do it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import PreTrainedModel, StaticCache

#: logits [batch, V] -> the next tokens, int64 [batch, 1].
Choice = Callable[[torch.Tensor], torch.Tensor]

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
        self._cache, self._logits = output.past_key_values, output.logits
        self._token = _likeliest(output.logits)

    def steps(self, count: int, choose: Choice | None = None) -> torch.Tensor:
        """Returns the next tokens, int64 [batch, count], one pass each: the likeliest, or what `choose` says."""
        tokens = []
        for _ in range(count):
            if choose:
                self._token = choose(self._logits[:, -1])
            tokens.append(self._token)
            output = self.model(self._token, past_key_values=self._cache, use_cache=True)
            self._logits, self._token = output.logits, _likeliest(output.logits)
        return torch.cat(tokens, dim=1)


class Static:
    """Decodes with a KV cache of fixed size, so that every step works on the same addresses and can be replayed.

    Args:
        batch_size, prompt_tokens, new_tokens: of every prompt and continuation that it is used for, at most.
        compiled: lets TorchInductor fuse the small kernels of a step, which takes minutes for a large model.
    """

    path = "loop, static cache"

    @torch.inference_mode()
    def __init__(
        self, model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int, compiled: bool = False
    ):
        self.model = model
        self._forward = torch.compile(model.forward, dynamic=False) if compiled else model
        length = max(prompt_tokens + new_tokens, _TRIAL[0] + max(_TRIAL[1], _WARM_UP))
        self._cache = StaticCache(config=model.config, max_cache_len=length)
        self._token = torch.zeros(batch_size, 1, dtype=torch.int64, device=model.device)
        self._replay: Callable[[], None] | None = None

    def prefill(self, prompt: torch.Tensor) -> None:
        """Reads a prompt, int64 [batch, length], and chooses the first token."""
        self._cache.reset()
        output = self.model(prompt, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._logits = output.logits
        self._token.copy_(_likeliest(output.logits))

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
    def capture(self) -> None:
        """Records the step as a CUDA graph, and tries the recording against the step itself.

        Raises:
            RuntimeError: the step cannot be recorded, as it waits for the GPU or copies to it, or a replay differs.
        """
        batch_size, vocabulary = len(self._token), self.model.config.vocab_size
        prompt = torch.arange(batch_size * _TRIAL[0], device=self.model.device).view(batch_size, -1) % vocabulary
        self.prefill(prompt)
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(_WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(beside)
        expected = self._trial(prompt)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        recorded = self._logits

        def replay() -> None:
            graph.replay()
            self._logits = recorded  # a prefill puts its own there

        self._replay, self.path = replay, "CUDA graph"
        found = self._trial(prompt)
        if (found - expected).abs().max() > 0.02 * expected.abs().max():
            raise RuntimeError("a replayed step has other logits than the step itself")

    def _trial(self, prompt: torch.Tensor) -> torch.Tensor:
        """Logits behind given tokens: of a thousand rows, some have two likeliest tokens, and either may be taken."""
        self.prefill(prompt)
        self.steps(_TRIAL[1], lambda _: prompt[:, :1])
        return self._logits.float().clone()

    def _step(self) -> None:
        self._logits = self._forward(self._token, past_key_values=self._cache, use_cache=True).logits
        self._token.copy_(_likeliest(self._logits))


def _likeliest(logits: torch.Tensor) -> torch.Tensor:
    return logits[:, -1].argmax(-1, keepdim=True)


def decoder(
    model: PreTrainedModel, batch_size: int, prompt_tokens: int, new_tokens: int
) -> Growing | Static:
    """Returns the fastest way to decode on the model's device; its `path` says which, and on a GPU why no faster."""
    if model.device.type != "cuda":
        return Growing(model)
    try:
        found = Static(model, batch_size, prompt_tokens, new_tokens)
        found.capture()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model does that a recording or a fixed cache does not allow
        first = str(error).strip().partition("\n")[0]
        return Growing(model, f"loop, as no CUDA graph could be made: {type(error).__name__}: {first}")
    return found
