"""What engines of other libraries share behind the protocol of `runtime.engines.protocol`."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from trimtab.recipe import Engine as Settings
from trimtab.runtime.checkpoint.model_files import Export, end_tokens, load_tokenizer, weight_file_bytes
from trimtab.runtime.engines.batching import ScoringRequest
from trimtab.runtime.engines.protocol import Prediction


class LibraryEngine:
    """An engine that another library runs over an export.

    Subclasses load it, set `_loaded` to the bytes that this took of the devices, and score and write by token.

    Args:
        name: of the library, in the names of kernels.
    """

    def __init__(self, export: Path, settings: Settings, name: str):
        self.export, self.settings, self._name, self._loaded = Path(export), settings, name, 0

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.export)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the export's weights: the library does not tell what it made of them."""
        return weight_file_bytes(self.export)

    @property
    def device_bytes(self) -> int:
        return max(0, self._loaded)

    @property
    def arithmetic(self) -> str:
        return f"as {self._name} chooses"

    def kernels(self) -> dict[str, dict[str, Any]]:
        """As the protocol says; the library chooses kernels itself, so their name is that of the format."""
        layers = Export(self.export).layers
        return {name: {"kernel": f"{self._name} {layout.algo}", "emulated": False} for name, layout in layers.items()}

    def loglikelihood(self, requests: list[ScoringRequest]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def nll(self, windows: torch.Tensor) -> list[float]:
        """As the protocol says.

        Raises:
            InputError: as `loglikelihood`; a window of one token predicts nothing.
        """
        requests = [(window[:1], window[1:]) for window in windows.tolist()]
        return [-likelihood for likelihood, _ in self.loglikelihood(requests)]

    def predict(self, windows: torch.Tensor, count: int) -> Prediction:
        raise NotImplementedError

    @cached_property
    def _ends(self) -> list[int]:
        return end_tokens(self.export)

    def _until_end(self, outputs: list[Any]) -> list[list[int]]:
        """The tokens of the library's answers, each without the one that ended it."""
        answers = [list(output.outputs[0].token_ids) for output in outputs]
        return [answer[: next((i for i, t in enumerate(answer) if t in self._ends), None)] for answer in answers]
