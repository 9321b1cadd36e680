"""The one writer of config.json: spelled as transformers before and after 5 has it, so that engines read the same.

| transformers 4, TensorRT-LLM, vLLM | transformers 5 |
|---|---|
| `torch_dtype` | `dtype` |
| `rope_theta`, `rope_scaling`, `partial_rotary_factor` | `rope_parameters`, with `rope_theta` and the factor in it |
| Gemma 3: `rope_theta`, `rope_local_base_freq` | `rope_parameters`, a set for each of `layer_types` |

A reader that finds only the spelling it does not know takes its class's default and says nothing: Llama 3.1 with
rotary frequencies of Llama 2.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from trimtab import families
from trimtab.model.files import CONFIG, read_json

_ROTARY = ("rope_parameters", "rope_scaling", "rope_theta")
#: Beside the scaling in transformers 5, fields of their own before it.
_APART = ("rope_theta", "partial_rotary_factor")
#: Phi-3 of transformers 4 wants these three and no more.
_PHI3 = ("short_factor", "long_factor")


def read(folder: Path) -> PreTrainedConfig:
    """Returns the config of a model folder."""
    return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def declared_dtype(folder: Path) -> torch.dtype:
    """Returns the type in which an engine serves a model, by its config.json, or by its text model's settings in a
    wrapper that does not say; bfloat16 where neither does."""
    config = read_json(Path(folder) / CONFIG)
    said = (part.get(name) for part in (config, families.text_config(config)) for name in ("dtype", "torch_dtype"))
    return getattr(torch, next(filter(None, said), "bfloat16"))


def with_dtype(document: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Returns a config that says another type of the weights, also in the configs inside it that say one."""
    name = str(dtype).removeprefix("torch.")
    parts = {
        field: with_dtype(part, dtype)
        for field, part in document.items()
        if field.endswith("_config") and isinstance(part, dict) and (part.get("dtype") or part.get("torch_dtype"))
    }
    return {**document, **parts, "dtype": name}


def write(folder: Path, document: Mapping[str, Any]) -> None:
    """Writes a model's config.json, in both spellings."""
    text = json.dumps(both_spellings(document), indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def changed(source: Path, config: PreTrainedConfig) -> dict[str, Any]:
    """Returns the config.json of a model folder with what differs in `config`, read from it and then changed.

    What was not changed stays as it is, also what transformers does not know, or would leave out as its default.
    """
    return _with_changes(read_json(source / CONFIG), read(source).to_dict(), config.to_dict())


def _with_changes(document: Mapping[str, Any], before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    different = {name: value for name, value in after.items() if name not in before or value != before[name]}
    for name, value in different.items():
        parts = (document.get(name), before.get(name), value)
        if name.endswith("_config") and all(isinstance(part, Mapping) for part in parts):
            different[name] = _with_changes(*parts)
    return {**document, **different}


def both_spellings(document: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a config with everything that has two spellings in both, also in the configs inside it."""
    found = dict(document)
    if dtype := found.get("dtype") or found.get("torch_dtype"):
        found["dtype"] = found["torch_dtype"] = dtype
    if any(found.get(name) for name in _ROTARY) and (rotary := _rotary(document)):
        found["rope_parameters"] = rotary
        found |= _before_5(rotary, document)
    for name, part in document.items():
        if name.endswith("_config") and name != "quantization_config" and isinstance(part, dict):
            found[name] = both_spellings(part)
    return found


def _rotary(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The rotary embedding as transformers 5 reads this config, None where its class has none."""
    kind = document.get("model_type")
    if kind not in CONFIG_MAPPING:
        return document.get("rope_parameters")
    try:
        config = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(dict(document)))
    except Exception:  # a value that the class refuses: it stays, for whoever loads the model to name
        return document.get("rope_parameters")
    return getattr(config, "rope_parameters", None)


def _before_5(rotary: Mapping[str, Any], document: Mapping[str, Any]) -> dict[str, Any]:
    by_layer = all(isinstance(value, dict) for value in rotary.values())
    one = (rotary.get("full_attention") or next(iter(rotary.values()))) if by_layer else rotary
    kind = one.get("rope_type") or one.get("type") or "default"
    # What is shared among time, height and width is no scaling, and stood among it.
    is_scaled = kind != "default" or "mrope_section" in one
    scaling = {name: value for name, value in one.items() if name not in _APART} if is_scaled else None
    if scaling and document.get("model_type") == "phi3":
        scaling = {"type": kind, **{name: one[name] for name in _PHI3 if name in one}}
    found = {"rope_theta": one.get("rope_theta"), "rope_scaling": document.get("rope_scaling") or scaling}
    if one.get("partial_rotary_factor") not in (None, 1.0):
        found["partial_rotary_factor"] = one["partial_rotary_factor"]
    if by_layer and str(document.get("model_type")).startswith("gemma3") and "sliding_attention" in rotary:
        found["rope_local_base_freq"] = rotary["sliding_attention"]["rope_theta"]
    return {name: value for name, value in found.items() if value is not None or name == "rope_scaling"}
