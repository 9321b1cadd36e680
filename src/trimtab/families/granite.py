"""Granite with experts: 3 (granitemoe, with a shared MLP granitemoeshared), and 4, which has Mambas between attention.

Its files hold the experts of a block in one tensor; `fetch` puts them apart, a layer each. A shared MLP stands beside
the experts, and reads what they and the router read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from trimtab.families.family import Family, Logits
from trimtab.families.mamba import NO_SERVE
from trimtab.families.parts import Config, Experts, Mlp
from trimtab.families.recurrent import listed
from trimtab.families.state_space import mixer, of_bamba

#: `sizes` gives the neurons of an expert this name, as `intermediate_size` becomes those of the shared MLP.
_EXPERT_SIZE = "expert_intermediate_size"
_EXPERTS = Experts("block_sparse_moe", plain=("router.layer",), size="intermediate_size")
#: vLLM reads the experts of Granite 3 under Mixtral's names, and those of Granite 4 under Llama's.
_NAMED_AS_MIXTRAL = replace(_EXPERTS, gate="w1", up="w3", down="w2")
_ROUTER = ("model.layers.*.block_sparse_moe.router.layer", "model.layers.*.block_sparse_moe.router")
_BESIDE = {"beside_mlp": True, "size": _EXPERT_SIZE, "shared_size": "shared_intermediate_size"}
#: No norm is its own: experts and router read the same.
_SHARED_MLP = Mlp("shared_mlp", None, gate_up="input_linear", down="output_linear")


def _sizes(config: Config, shared: int) -> dict[str, Any]:
    """`shared`: what transformers takes for the neurons of the shared MLP where a config does not say."""
    said = config.get("shared_intermediate_size")
    return {
        "intermediate_size": shared if said is None else said,
        _EXPERT_SIZE: config.get("intermediate_size"),
    }


def _mambas(config: Config) -> Sequence[int]:
    """All blocks, unless a list says which."""
    found = listed(config)
    return range(config["num_hidden_layers"]) if found is None else found


def _logits(config: Config) -> Logits:
    return Logits(1 / (config.get("logits_scaling") or 1.0))


GRANITE_MOE = Family(
    "granitemoe",
    mlp=None,
    experts=_NAMED_AS_MIXTRAL,
    aliases=(_ROUTER,),
    logits=_logits,
    output_bias=("attention_bias", False),
)
FAMILIES = (
    GRANITE_MOE,
    replace(
        GRANITE_MOE,
        model_type="granitemoeshared",
        mlp=_SHARED_MLP,
        experts=replace(_NAMED_AS_MIXTRAL, **_BESIDE),
        sizes=lambda config: _sizes(config, 0),
    ),
    Family(
        "granitemoehybrid",
        mlp=_SHARED_MLP,
        experts=replace(
            _EXPERTS,
            **_BESIDE,
            blocks=lambda config: range(config["num_hidden_layers"] if config.get("num_local_experts", 8) else 0),
        ),
        recurrent=mixer("mamba", of_bamba, blocks=_mambas),
        aliases=(_ROUTER,),
        attention_types=("full_attention", "linear_attention", "attention", "mamba"),
        sizes=lambda config: _sizes(config, 1024),
        logits=_logits,
        output_bias=("attention_bias", False),
        pipeline_parallel=False,
        no_serve=NO_SERVE,
    ),
)
