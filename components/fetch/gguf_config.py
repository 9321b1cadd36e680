"""The config of a GGUF file's model, without its tensors."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trimtab.errors import InputError


def read(path: str) -> dict[str, Any]:
    """Returns what would be the model's config.json.

    Raises:
        InputError: it is no GGUF file of a decoder that transformers reads.
    """
    try:
        found = load_gguf_checkpoint(path, return_tensors=False)["config"]
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[found["model_type"]]
        return {**AutoConfig.for_model(**found).to_dict(), "architectures": [architecture]}
    except (OSError, ValueError, KeyError, IndexError) as error:
        said = f"{type(error).__name__}: {error}"
        raise InputError(f"model: '{path}' is no GGUF file of a model that transformers reads ({said})") from None
