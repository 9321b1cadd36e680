"""The towers that see pictures beside a text model, by their configs: the shape of each tensor by its name.

They are kept as they are, so planning only counts them. Names are those of transformers 5.14.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.base.errors import InputError
from trimtab.families.parts import Config, Shape

Shapes = dict[str, Shape]
#: What transformers takes for CLIP and for SigLIP where a config is silent.
_VIT = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_channels": 3}


def siglip(config: Config) -> Shapes:
    """Gemma 3: SigLIP (Zhai et al. 2023, "Sigmoid Loss for Language Image Pre-Training") and a projector."""
    vision = _vision(config, "siglip_vision_model", image_size=224, patch_size=16, **_VIT)
    size, neurons = vision["hidden_size"], vision["intermediate_size"]
    found = _vit(vision, extra=0) | {"embeddings.patch_embedding.bias": (size,)}
    if vision.get("vision_use_head", True):
        head: Shapes = {"probe": (1, 1, size), "attention.in_proj_weight": (3 * size, size),
                        "attention.in_proj_bias": (3 * size,)}  # fmt: skip
        head |= _linears({"attention.out_proj": (size, size), "mlp.fc1": (neurons, size), "mlp.fc2": (size, neurons)})
        found |= _named("head", head | _norms({"layernorm": size}))
    projector = {"mm_input_projection_weight": (size, _text(config)), "mm_soft_emb_norm.weight": (size,)}
    return _named("model.vision_tower", found) | _named("model.multi_modal_projector", projector)


def clip(config: Config) -> Shapes:
    """LLaVA: CLIP (Radford et al. 2021), which has an embedding of the whole picture too, and two layers behind it."""
    vision = _vision(config, "clip_vision_model", image_size=224, patch_size=32, **_VIT)
    size = vision["hidden_size"]
    found = _vit(vision, extra=1) | {"embeddings.class_embedding": (size,)} | _norms({"pre_layrnorm": size})
    projector = _two_layers(config, size, biased=True)
    return _named("model.vision_tower", found) | _named("model.multi_modal_projector", projector)


def pixtral(config: Config) -> Shapes:
    """Mistral 3: Pixtral (Mistral AI 2024), all without biases, and a projector that merges neighbouring patches."""
    vision = _vision(config, "pixtral", hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_channels=3,
                     patch_size=16)  # fmt: skip
    size, neurons, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    found: Shapes = {"patch_conv.weight": (size, vision["num_channels"], patch, patch), "ln_pre.weight": (size,)}
    for layer in range(vision["num_hidden_layers"]):
        shapes = {f"attention.{name}.weight": (size, size) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        shapes |= {f"feed_forward.{name}.weight": (neurons, size) for name in ("gate_proj", "up_proj")}
        shapes |= {"feed_forward.down_proj.weight": (size, neurons)}
        shapes |= {f"{name}.weight": (size,) for name in ("attention_norm", "ffn_norm")}
        found |= _named(f"transformer.layers.{layer}", shapes)
    merged = size * config.get("spatial_merge_size", 2) ** 2
    projector = {"norm.weight": (size,), "patch_merger.merging_layer.weight": (size, merged)}
    projector |= _two_layers(config, size, biased=False)
    return _named("model.vision_tower", found) | _named("model.multi_modal_projector", projector)


def llama4(config: Config) -> Shapes:
    """Llama 4: patches through a linear layer, and an adapter behind the tower that puts patches together."""
    vision = _vision(
        config, "llama4_vision_model", hidden_size=768, intermediate_size=5632, num_hidden_layers=34, num_channels=3,
        image_size=448, patch_size=14, vision_output_dim=7680, projector_input_dim=4096, projector_output_dim=4096,
    )  # fmt: skip
    size, neurons, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    inner, outer = vision["projector_input_dim"], vision["projector_output_dim"]
    found: Shapes = {
        "patch_embedding.linear.weight": (size, vision["num_channels"] * patch * patch),
        "class_embedding": (size,),
        "positional_embedding_vlm": ((vision["image_size"] // patch) ** 2 + 1, size),
        "vision_adapter.mlp.fc1.weight": (inner, neurons),
        "vision_adapter.mlp.fc2.weight": (outer, outer),
    } | _norms({"layernorm_pre": size, "layernorm_post": size})
    for layer in range(vision["num_hidden_layers"]):
        layers = {f"self_attn.{name}": (size, size) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        layers |= {"mlp.fc1": (neurons, size), "mlp.fc2": (size, neurons)}
        norms = _norms({"input_layernorm": size, "post_attention_layernorm": size})
        found |= _named(f"model.layers.{layer}", _linears(layers) | norms)
    projector = {"multi_modal_projector.linear_1.weight": (_text(config), vision["vision_output_dim"])}
    return _named("vision_model", found) | projector


def qwen2_5(config: Config) -> Shapes:
    """Qwen2.5-VL: norms without biases, an MLP with a gate, and a merger of neighbouring patches."""
    vision = _vision(
        config, "", hidden_size=3584, intermediate_size=3420, depth=32, in_channels=3, patch_size=14,
        spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=3584,
    )  # fmt: skip
    size, neurons = vision["hidden_size"], vision["intermediate_size"]
    merged = size * vision["spatial_merge_size"] ** 2
    found: Shapes = {"patch_embed.proj.weight": _patch(vision), "merger.ln_q.weight": (size,)}
    for block in range(vision["depth"]):
        layers = {"attn.qkv": (3 * size, size), "attn.proj": (size, size), "mlp.gate_proj": (neurons, size),
                  "mlp.up_proj": (neurons, size), "mlp.down_proj": (size, neurons)}  # fmt: skip
        norms = {f"{name}.weight": (size,) for name in ("norm1", "norm2")}
        found |= _named(f"blocks.{block}", _linears(layers) | norms)
    found |= _linears({"merger.mlp.0": (merged, merged), "merger.mlp.2": (vision["out_hidden_size"], merged)})
    return _named("model.visual", found)


def qwen3(config: Config) -> Shapes:
    """Qwen3-VL and Qwen3.5: LayerNorm, learned positions, and in Qwen3-VL mergers for what enters early blocks."""
    deep = (8, 16, 24) if str(config.get("model_type")).startswith("qwen3_vl") else ()
    vision = _vision(
        config, "", hidden_size=1152, intermediate_size=4304, depth=27, in_channels=3, patch_size=16,
        spatial_merge_size=2, temporal_patch_size=2, out_hidden_size=3584, num_position_embeddings=2304,
        deepstack_visual_indexes=deep,
    )  # fmt: skip
    size, neurons = vision["hidden_size"], vision["intermediate_size"]
    merged = size * vision["spatial_merge_size"] ** 2
    found: Shapes = {"patch_embed.proj.weight": _patch(vision), "patch_embed.proj.bias": (size,),
                     "pos_embed.weight": (vision["num_position_embeddings"], size)}  # fmt: skip
    for block in range(vision["depth"]):
        layers = {"attn.qkv": (3 * size, size), "attn.proj": (size, size), "mlp.linear_fc1": (neurons, size),
                  "mlp.linear_fc2": (size, neurons)}  # fmt: skip
        found |= _named(f"blocks.{block}", _linears(layers) | _norms({"norm1": size, "norm2": size}))
    mergers = {"merger": size}
    mergers |= {f"deepstack_merger_list.{n}": merged for n in range(len(deep and vision["deepstack_visual_indexes"]))}
    for name, normed in mergers.items():
        layers = {"linear_fc1": (merged, merged), "linear_fc2": (vision["out_hidden_size"], merged)}
        found |= _named(name, _linears(layers) | _norms({"norm": normed}))
    return _named("model.visual", found)


def _vision(config: Config, kind: str, **defaults: Any) -> dict[str, Any]:
    """The tower's settings, with what transformers takes where config.json is silent.

    Raises:
        KeyError: it says nothing of the tower.
        InputError: the tower is of another kind than `kind`, "" for any.
    """
    said = config["vision_config"]
    found = said.get("model_type", kind)
    if kind and found != kind:
        what = f"vision_config.model_type is '{found}', and the shapes of a '{kind}' alone follow from a config"
        raise InputError(f"config.json: {what}; give the whole model")
    return {**defaults, **said}


def _vit(vision: Mapping[str, Any], extra: int) -> Shapes:
    """The blocks of CLIP and SigLIP, and what stands around them; `extra`: positions beside the patches'."""
    size, neurons, patch = vision["hidden_size"], vision["intermediate_size"], vision["patch_size"]
    found: Shapes = {
        "embeddings.patch_embedding.weight": (size, vision["num_channels"], patch, patch),
        "embeddings.position_embedding.weight": ((vision["image_size"] // patch) ** 2 + extra, size),
    } | _norms({"post_layernorm": size})
    for layer in range(vision["num_hidden_layers"]):
        layers = {f"self_attn.{name}": (size, size) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
        layers |= {"mlp.fc1": (neurons, size), "mlp.fc2": (size, neurons)}
        norms = _norms({"layer_norm1": size, "layer_norm2": size})
        found |= _named(f"encoder.layers.{layer}", _linears(layers) | norms)
    return found


def _two_layers(config: Config, size: int, biased: bool) -> Shapes:
    """The projector of LLaVA and Mistral 3; `biased`: what transformers takes where config.json is silent."""
    layers = config.get("vision_feature_layer")
    inputs, text = size * (len(layers) if isinstance(layers, list) else 1), _text(config)
    shapes = {"linear_1": (text, inputs), "linear_2": (text, text)}
    if config.get("multimodal_projector_bias", biased):
        return _linears(shapes)
    return {f"{name}.weight": shape for name, shape in shapes.items()}


def _text(config: Config) -> int:
    return config["text_config"]["hidden_size"]


def _patch(vision: Mapping[str, Any]) -> Shape:
    size = vision["patch_size"]
    return vision["hidden_size"], vision["in_channels"], vision["temporal_patch_size"], size, size


def _linears(layers: Mapping[str, Shape]) -> Shapes:
    """Layers with biases."""
    return {f"{name}.weight": shape for name, shape in layers.items()} | {
        f"{name}.bias": shape[:1] for name, shape in layers.items()
    }


def _norms(norms: Mapping[str, int]) -> Shapes:
    """LayerNorms, by their channels."""
    return {f"{name}.{part}": (size,) for name, size in norms.items() for part in ("weight", "bias")}


def _named(prefix: str, shapes: Shapes) -> Shapes:
    return {f"{prefix}.{name}": shape for name, shape in shapes.items()}
