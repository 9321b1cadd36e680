"""Where the text model of a wrapper stands, and where its settings do: a model of pictures, sounds and text in one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from trimtab.families.parts import Config, Shape

#: The field of config.json that holds the settings of a wrapper's text model.
TEXT_CONFIG = "text_config"


class Text(NamedTuple):
    """One kind of text model in a wrapper.

    Attributes:
        built_as: the model type of transformers that computes it, which has a causal language model of its own.
        defaults: what transformers takes where `text_config` is silent, as checkpoints leave it out.
        settings: what `built_as` must be told beside the fields of `text_config`.
    """

    built_as: str
    defaults: Config
    settings: Config = {}


@dataclass(frozen=True)
class Wrapper:
    """What holds a text model among others; all that is not the text model is kept as it is.

    Attributes:
        within: the module whose tensors, beside the output head's, are the text model.
        texts: the text models that it may have, by the `model_type` of their config; where that says none, the first.
        own: where early checkpoints have the settings of the text model among the wrapper's, the fields that are the
            wrapper's.
        tower: the shapes of all that is not the text model by their names, from the wrapper's config.
    """

    within: str
    texts: Mapping[str, Text] = field(hash=False)
    tower: Callable[[Config], Mapping[str, Shape]]
    own: tuple[str, ...] = ()

    def kind(self, config: Config) -> str:
        """Returns the model type of the text model in a wrapper's config.json."""
        return str(config[TEXT_CONFIG].get("model_type") or next(iter(self.texts)))

    def text_config(self, config: Config) -> dict[str, Any]:
        """Returns the settings of the text model in a wrapper's config.json, with transformers' own where it is silent.

        A wrapper without a text model, or with one that is not known, has what it says, and no more: see `refusal`.
        """
        config = self.nested(config)
        inner = config.get(TEXT_CONFIG)
        if self.refusal(config):
            return dict(inner) if isinstance(inner, Mapping) else {}
        kind = self.kind(config)
        return {"model_type": kind, **self.texts[kind].defaults, **inner}

    def nested(self, config: Config) -> Config:
        """Returns a wrapper's config.json with the settings of the text model in `text_config`."""
        if TEXT_CONFIG in config or not self.own or "hidden_size" not in config:
            return config
        own = {name: value for name, value in config.items() if name in self.own}
        inner = {name: value for name, value in config.items() if name not in self.own}
        return {**own, TEXT_CONFIG: {"model_type": next(iter(self.texts)), **inner}}

    def refusal(self, config: Config) -> str:
        """Returns why a wrapper with this config.json has no text model that is known, or ""."""
        config, kind = self.nested(config), config.get("model_type")
        inner = config.get(TEXT_CONFIG)
        if not isinstance(inner, Mapping) or not inner:
            return f"{TEXT_CONFIG} is missing, which says what text model a '{kind}' wraps"
        if self.kind(config) in self.texts:
            return ""
        known = " and ".join(self.texts)
        return f"{TEXT_CONFIG}.model_type is '{self.kind(config)}', and {known} is what is known in a '{kind}'"
