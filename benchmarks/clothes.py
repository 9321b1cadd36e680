"""A Llama in the clothes of other families: the same function, stored and computed as theirs.

What a format costs must then agree with what it costs the Llama, but for what the family itself changes: fused layers
share scales, experts see a part of the tokens. So a family is tried with real weights, without a checkpoint of its own.

Run: python benchmarks/clothes.py FOLDER OUTPUT FAMILY
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trimtab.model.files import CONFIG, read_json
from trimtab.runtime.checkpoint import config_file, stream
from trimtab.runtime.checkpoint.model_files import Export

Tensors = dict[str, torch.Tensor]
#: How many experts a block has, and how many of them a token is given to; all are copies of the Llama's MLP, so any
#: router whose weights add up to one gives the Llama's function.
EXPERTS, CHOSEN = 4, 2
_FIELDS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta", "rope_parameters", "bos_token_id",
    "eos_token_id", "tie_word_embeddings", "dtype", "torch_dtype",
)  # fmt: skip


def write(source: Path, output: Path, family: str) -> Path:
    """Writes the Llama in `source` as a model of another family, one of `CLOTHES`, and returns the folder."""
    config, export = read_json(source / CONFIG), Export(source)
    heads = config["num_attention_heads"]
    base = {name: config[name] for name in _FIELDS if config.get(name) is not None}
    base |= {"head_dim": base.get("head_dim") or base["hidden_size"] // heads, "hidden_act": "silu"}
    tensors = {name: export.tensor(name) for name in export.names if name != "lm_head.weight"}
    architecture, changes, dressed = CLOTHES[family](base, tensors)
    output.mkdir(parents=True)
    save_file({name: tensor.contiguous() for name, tensor in dressed.items()}, output / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    stream.copy_the_rest(source, output)
    model_type = changes.pop("model_type", family)
    config_file.write(output, base | {"architectures": [architecture], "model_type": model_type} | changes)
    return output


def _mistral(config: dict[str, Any], tensors: Tensors) -> tuple[str, dict[str, Any], Tensors]:
    return "MistralForCausalLM", {"sliding_window": None}, tensors


def _qwen2(config: dict[str, Any], tensors: Tensors) -> tuple[str, dict[str, Any], Tensors]:
    return "Qwen2ForCausalLM", {"use_sliding_window": False}, tensors | _no_biases(tensors)


def _phi3(config: dict[str, Any], tensors: Tensors) -> tuple[str, dict[str, Any], Tensors]:
    """Query, key and value in one layer, gate and up in one."""
    fused, found = {"q_proj": ("qkv_proj", "k_proj", "v_proj"), "gate_proj": ("gate_up_proj", "up_proj")}, {}
    for name, tensor in tensors.items():
        module, _, layer = name.removesuffix(".weight").rpartition(".")
        if layer in fused:
            whole, *others = fused[layer]
            found[f"{module}.{whole}.weight"] = torch.cat([tensor, *(tensors[f"{module}.{x}.weight"] for x in others)])
        elif layer not in ("k_proj", "v_proj", "up_proj"):
            found[name] = tensor
    return "Phi3ForCausalLM", {"pad_token_id": config.get("eos_token_id")}, found


def _gemma(config: dict[str, Any], tensors: Tensors) -> tuple[str, dict[str, Any], Tensors]:
    """Norms of 1 + w; embeddings that are multiplied by the root of their width, as the head's input then is too."""
    root, found = math.sqrt(config["hidden_size"]), {}
    for name, tensor in tensors.items():
        if name == "model.embed_tokens.weight":
            found[name] = (tensor.float() / root).to(tensor.dtype)
        elif name.endswith("norm.weight"):
            factor = root if name == "model.norm.weight" else 1.0
            found[name] = tensor.float() * factor - 1
        else:
            found[name] = tensor
    return "GemmaForCausalLM", {"hidden_activation": "silu"}, found


def _mixtral(config: dict[str, Any], tensors: Tensors) -> tuple[str, dict[str, Any], Tensors]:
    names = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
    found = _experts(tensors, "block_sparse_moe", names)
    return "MixtralForCausalLM", {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}, found


def _qwen2_moe(config: dict[str, Any], tensors: Tensors) -> tuple[str, dict[str, Any], Tensors]:
    """With a shared expert of nothing."""
    found = _experts(tensors, "mlp", {name: name for name in ("gate_proj", "up_proj", "down_proj")})
    hidden, size = config["hidden_size"], 128
    for block in range(config["num_hidden_layers"]):
        shared = f"model.layers.{block}.mlp.shared_expert"
        generator = torch.Generator().manual_seed(block)
        for layer in ("gate_proj", "up_proj"):
            found[f"{shared}.{layer}.weight"] = (0.02 * torch.randn(size, hidden, generator=generator)).bfloat16()
        found[f"{shared}.down_proj.weight"] = torch.zeros(hidden, size, dtype=torch.bfloat16)
        found[f"{shared}_gate.weight"] = torch.zeros(1, hidden, dtype=torch.bfloat16)
    changes = {
        "num_experts": EXPERTS, "num_experts_per_tok": CHOSEN, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "moe_intermediate_size": config["intermediate_size"], "shared_expert_intermediate_size": size,
        "mlp_only_layers": [], "use_sliding_window": False,
    }  # fmt: skip
    return "Qwen2MoeForCausalLM", changes, found | _no_biases(tensors)


def _falcon_h1(config: dict[str, Any], tensors: Tensors) -> tuple[str, dict[str, Any], Tensors]:
    """With a state-space layer beside the attention of each block, whose random outputs are too small to matter."""
    names = {"mlp": "feed_forward", "post_attention_layernorm": "pre_ff_layernorm", "norm": "final_layernorm"}
    found = {".".join(names.get(part, part) for part in name.split(".")): tensor for name, tensor in tensors.items()}
    hidden, heads, state, kernel = config["hidden_size"], config["num_attention_heads"], 64, 4
    mixed = hidden + 2 * state  # what the convolution goes over: the layer's inputs, and B and C of one group
    for block in range(config["num_hidden_layers"]):
        generator = torch.Generator().manual_seed(block)
        random = {
            "in_proj.weight": 0.02 * torch.randn(hidden + mixed + heads, hidden, generator=generator),
            "conv1d.weight": torch.randn(mixed, 1, kernel, generator=generator) / kernel,
            "conv1d.bias": torch.zeros(mixed),
            "out_proj.weight": 1e-4 * torch.randn(hidden, hidden, generator=generator),
            "dt_bias": torch.full((heads,), -4.6),  # the softplus of it is a step of 0.01
            "A_log": torch.arange(1, heads + 1).log(),
            "D": torch.ones(heads),
        }
        found |= {f"model.layers.{block}.mamba.{name}": tensor.bfloat16() for name, tensor in random.items()}
    changes = {
        "mamba_d_ssm": hidden, "mamba_n_heads": heads, "mamba_d_head": hidden // heads, "mamba_n_groups": 1,
        "mamba_d_state": state, "mamba_d_conv": kernel, "mamba_chunk_size": 128,
    }  # fmt: skip
    return "FalconH1ForCausalLM", changes, found


def _no_biases(tensors: Tensors) -> Tensors:
    layers = [name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))]
    return {
        name.removesuffix("weight") + "bias": torch.zeros(len(tensors[name]), dtype=tensors[name].dtype)
        for name in layers
    }


def _experts(tensors: Tensors, module: str, names: dict[str, str]) -> Tensors:
    """Copies of the MLP as experts, and a router that tells tokens apart by random directions."""
    found = {}
    for name, tensor in tensors.items():
        block, is_mlp, layer = name.removesuffix(".weight").partition(".mlp.")
        if not is_mlp:
            found[name] = tensor
            continue
        for number in range(EXPERTS):
            found[f"{block}.{module}.experts.{number}.{names[layer]}.weight"] = tensor.clone()
        generator = torch.Generator().manual_seed(int(block.rpartition(".")[2]))
        router = torch.randn(EXPERTS, tensors[f"{block}.mlp.gate_proj.weight"].shape[1], generator=generator)
        found[f"{block}.{module}.gate.weight"] = (0.02 * router).bfloat16()
    return found


#: Family -> (config, tensors of the Llama) -> architecture, changes of the config, tensors.
CLOTHES: dict[str, Callable[[dict[str, Any], Tensors], tuple[str, dict[str, Any], Tensors]]] = {
    "mistral": _mistral,
    "qwen2": _qwen2,
    "phi3": _phi3,
    "gemma": _gemma,
    "mixtral": _mixtral,
    "qwen2_moe": _qwen2_moe,
    "falcon_h1": _falcon_h1,
}

if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
