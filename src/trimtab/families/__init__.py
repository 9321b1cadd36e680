"""The families of models that trimtab knows: one `Family` for each model type of transformers, a file a family.

To add one, describe it in a file here and add that file's `FAMILIES` to `_FILES`; `tests/runtime/test_families.py`
then compares every name with transformers' own modules.
"""

from __future__ import annotations

from trimtab.base.errors import InputError
from trimtab.families import (
    cohere,
    deepseek,
    ernie,
    gemma,
    glm,
    gpt,
    gpt_oss,
    granite,
    hunyuan,
    lfm,
    llama,
    mamba,
    mixtral,
    multimodal,
    olmo,
    phi,
    plain,
    qwen,
    qwen_hybrid,
)
from trimtab.families.family import Family, Limit, Logits
from trimtab.families.parts import (
    Attention,
    Config,
    Experts,
    LatentAttention,
    Layer,
    Mlp,
    NoAttention,
    SharedInput,
)
from trimtab.families.recurrent import Recurrent
from trimtab.families.undescribed import missing
from trimtab.families.wrapper import TEXT_CONFIG, Wrapper

__all__ = [
    "BY_TYPE", "Attention", "Config", "Experts", "Family", "LatentAttention", "Layer", "Limit", "Logits", "Mlp",
    "NoAttention", "Recurrent", "SharedInput", "TEXT_CONFIG", "Wrapper", "as_fetched", "named", "of", "text_config",
]  # fmt: skip

_FILES = (
    llama, qwen, gemma, phi, glm, olmo, cohere, plain, gpt, mixtral, deepseek, ernie, hunyuan, gpt_oss, qwen_hybrid,
    lfm, mamba, granite, multimodal,
)  # fmt: skip
#: Model type -> family.
BY_TYPE = {family.model_type: family for file in _FILES for family in file.FAMILIES}


def of(config: Config, where: str = "config.json") -> Family:
    """Returns the family of a model by its config.json.

    Raises:
        InputError: no family describes its `model_type`, or the family does not describe one of its settings; says
            which, and what is described.
    """
    family = _described(config)
    if family is None:
        raise InputError(f"{where}: {_unknown(config)}")
    if reason := (family.wrapper and family.wrapper.refusal(config)) or family.refusal(text_config(config)):
        raise InputError(f"{where}: {reason}; give another model")
    return family


def text_config(config: Config) -> Config:
    """Returns the settings of the text model in a config.json: all of them, or in a wrapper those of its text model,
    with what transformers takes where `text_config` is silent."""
    wrapper = _wrapper(config)
    return wrapper.text_config(config) if wrapper else config


def as_fetched(config: Config) -> Config:
    """Returns a config.json as fetching writes it: a wrapper's text model has its settings in `text_config`, and GPT-2
    is a GPTBigCode."""
    config = gpt.as_bigcode(config)
    wrapper = _wrapper(config)
    return wrapper.nested(config) if wrapper else config


def named(model_type: str) -> Family:
    """Returns the family of a model type, of a model that `of` has let pass.

    Raises:
        InputError: no family describes it.
    """
    if model_type not in BY_TYPE:
        raise InputError(_unknown({"model_type": model_type}))
    return BY_TYPE[model_type]


def _described(config: Config) -> Family | None:
    model_type = config.get("model_type")
    return BY_TYPE.get(model_type) if isinstance(model_type, str) else None


def _wrapper(config: Config) -> Wrapper | None:
    family = _described(config)
    return family.wrapper if family else None


def _unknown(config: Config) -> str:
    what = missing(config)
    lacks = f"{what}, which is not supported yet" if what else "is not described"
    return f"model_type '{config.get('model_type')}' {lacks}; give a model of one of these: {', '.join(BY_TYPE)}"
