"""The text model of a wrapper, alone: its config, and its modules under the names that the wrapper's checkpoint has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel

from trimtab.families import Family
from trimtab.model.configured import ties_embeddings
from trimtab.model.files import CONFIG, read_json
from trimtab.model.headers import read_tensors

#: How rotary embeddings share a head among time, height and width; for text these are one number.
_SECTIONS = ("mrope_section", "mrope_interleaved")


def config(folder: Path, whole: PreTrainedConfig, family: Family) -> PreTrainedConfig:
    """Returns the config from which transformers builds the text model of a wrapper, a causal language model.

    Args:
        folder: of the wrapper; it tells whether the head is the embedding, also where config.json does not.
        whole: the wrapper's config.
    """
    inner = whole.get_text_config()
    text = family.wrapper.texts[inner.model_type]
    if text.built_as != inner.model_type:
        fields: dict[str, Any] = inner.to_dict() | {"model_type": text.built_as, **text.settings}
        rotary = fields.get("rope_parameters") or {}
        fields["rope_parameters"] = {name: value for name, value in rotary.items() if name not in _SECTIONS}
        inner = CONFIG_MAPPING[text.built_as].from_dict(fields)
    has_head = f"{family.head}.weight" in read_tensors(folder)
    inner.tie_word_embeddings = not has_head or ties_embeddings(read_json(folder / CONFIG))
    return inner


def place(model: PreTrainedModel, family: Family) -> None:
    """Gives the modules of a text model the names that they have in a wrapper.

    Transformers' code still finds `model` and `lm_head` where it put them: there they are attributes and no more.
    """
    _move(model, "model", family.wrapper.within)
    if family.head != "lm_head":
        _move(model, "lm_head", family.head)
    if model._tied_weights_keys:
        model._tied_weights_keys = {f"{family.head}.weight": f"{family.embedding}.weight"}


def _move(model: nn.Module, own: str, stored: str) -> None:
    """Gives a child of a model a name of two parts: in a module that holds what else stands under the first."""
    first, _, second = stored.partition(".")
    child, holder = model._modules[own], nn.Module()
    model.__dict__[own] = child
    if first == own:  # in its place, so that the embedding still comes before the head that is tied to it
        model._modules[own] = holder
        child.__dict__[second] = child  # the attribute hides the holder from whoever goes by the whole name
    else:
        del model._modules[own]
        holder = model._modules.setdefault(first, holder)
    holder._modules[second] = child
