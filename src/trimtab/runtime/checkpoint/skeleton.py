"""A model without its weights: transformers' modules, under the names that the checkpoint has for them."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel, cache_utils
from transformers.initialization import no_init_weights

from trimtab import families
from trimtab.base.errors import InputError
from trimtab.families import Family
from trimtab.runtime.checkpoint import experts, scans, text_model

# transformers 5.14 knows no cache for blocks of Nemotron-H that are an MLP; they keep nothing, as its experts do.
for _kinds in (cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, cache_utils.STATIC_LAYER_TYPE_MAPPING):
    _kinds.setdefault("mlp", _kinds["moe"])


def skeleton(folder: Path, dtype: torch.dtype = torch.bfloat16) -> PreTrainedModel:
    """Returns the model with its parameters on the meta device; buffers such as rotary frequencies are real.

    Of a wrapper this is its text model alone.

    Raises:
        InputError: no config, an architecture that transformers does not know, or one that no family describes.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        config.__dict__.pop("quantization_config", None)
    except (OSError, ValueError, KeyError) as error:
        raise _no_model(folder, error) from None
    family = families.of(config.to_dict(), f"{folder}/config.json")
    try:
        if family.wrapper:
            config = text_model.config(Path(folder), config, family)
        # To draw weights on the meta device gives none, and takes two thirds of the time.
        with init_empty_weights(include_buffers=False), no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model.tie_weights(recompute_mapping=False)  # which is part of what is left out
    except (OSError, ValueError, KeyError) as error:
        raise _no_model(folder, error) from None
    for parameter in model.parameters():  # and not all buffers: GPT-J's angles would be those of rounded frequencies
        parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if name.rpartition(".")[2] in family.factors:
            buffer.data = buffer.data.to(dtype)
    model.config.dtype = dtype
    scans.bound(model)
    if getattr(config, "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # the only one of transformers' that caps scores on every device
    if (Path(folder) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return as_stored(model, family)


def as_stored(model: PreTrainedModel, family: Family) -> PreTrainedModel:
    """Gives a model's modules the names of the checkpoint, and each expert layers of its own.

    Transformers' code still finds its modules under its own names, which are attributes and no more.
    """
    model.family = family
    if not hasattr(model, model.base_model_prefix):  # Llama 4's is the name of its place in the wrapper
        model.base_model_prefix = "model"
    if family.wrapper:
        text_model.place(model, family)
    for stored, own in family.aliases:
        for number in range(model.config.num_hidden_layers) if "*" in own else (0,):
            _rename(model, stored.replace("*", str(number)), own.replace("*", str(number)))
    if family.experts:
        experts.separate(model.get_submodule(family.blocks), family.experts)
    return model


def family_of(model: PreTrainedModel) -> Family:
    """Returns the family of a model: by whose names its modules go, in a wrapper not those of its own model type."""
    return getattr(model, "family", None) or families.named(model.config.model_type)


def kept_in_float32(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor stays in float32 whatever the model's type: numbers that routers choose by."""
    return any(part in name for part in model._keep_in_fp32_modules_strict or ())


def put(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Gives a model a parameter or buffer that it has a place for, without a copy."""
    parent, _, leaf = name.rpartition(".")
    module = model.get_submodule(parent)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[leaf] = tensor


def _rename(model: nn.Module, stored: str, own: str) -> None:
    try:
        module = model.get_submodule(own)
    except AttributeError:  # not every block has the same parts
        return
    parent, _, name = own.rpartition(".")
    holder = model.get_submodule(parent)
    del holder._modules[name]
    holder.__dict__[name] = module
    if stored.startswith(f"{own}."):  # one name more, under its own: that of a module which only holds it
        leaf = stored[len(own) + 1 :]
        place = holder._modules[name] = nn.Module()
        place._modules[leaf] = module
        module.__dict__[leaf] = module  # transformers' attribute hides the holder from whoever goes by the whole name
        return
    parent, _, name = stored.rpartition(".")
    holder = model.get_submodule(parent) if parent else model
    holder._modules[name] = module


def _no_model(folder: Path, error: Exception) -> InputError:
    return InputError(f"{folder}: no model can be made of its config.json: {error}")
