"""Wrappers: models that read pictures, films or sounds too, around a text model of a family that is described.

Only the text model is measured, quantized, pruned, trained and scored, on text alone. A wrapper is a family of its own
because its checkpoint has other names, its config.json the text model's settings in `text_config`.

In the Qwen VL models rotary embeddings turn by time, height and width; for text all three are the place in the text,
so their text models compute what Qwen2 and Qwen3 do, and are built as these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from trimtab.families import gemma, llama, qwen, qwen_hybrid, towers
from trimtab.families.family import Family
from trimtab.families.parts import Config, Shape
from trimtab.families.wrapper import Text, Wrapper

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
          "num_key_value_heads", "max_position_embeddings")  # fmt: skip


def _sizes(*numbers: int, **others: Any) -> dict[str, Any]:
    return {**dict(zip(_SIZES, numbers, strict=True)), **others}


def wrapped(
    model_type: str,
    text: Family,
    texts: Mapping[str, Text],
    within: str = "model.language_model",
    head: str = "lm_head",
    own: tuple[str, ...] = (),
    *,
    tower: Callable[[Config], Mapping[str, Shape]],
) -> Family:
    """Returns the family of a wrapper around a text model.

    Its width stays: what the tower hands over has the text model's hidden size.

    Args:
        model_type: the wrapper's.
        text: the family of its text model, alone; of several, one whose blocks have the layers of all.
        texts, own, tower: as in `Wrapper`.
        within: what stands in the place of the text model's `model` in the names of the checkpoint.
        head: the output head, by its name there.
    """
    parts = ("blocks", "embedding", "last_norm")
    names = {part: f"{within}.{getattr(text, part).removeprefix('model.')}" for part in parts}
    aliases = tuple((f"{within}.{stored.removeprefix('model.')}", own) for stored, own in text.aliases)
    return replace(
        text,
        model_type=model_type,
        head=head,
        aliases=aliases,
        wrapper=Wrapper(within, texts, tower, own),
        width=False,
        **names,
    )


_FAMILIES = {family.model_type: family for file in (gemma, llama, qwen, qwen_hybrid) for family in file.FAMILIES}
#: `mistral` and `ministral3` have the same layers; this multiplies queries by their position, which the decoding step
#: of Llamas does not.
_MISTRALS = replace(_FAMILIES["mistral"], llama_block=False)
_GEMMA3 = _sizes(262208, 2304, 9216, 26, 8, 4, 131072, head_dim=256)
_MISTRAL = _sizes(32000, 4096, 14336, 32, 32, 8, 131072)
_MINISTRAL3 = _sizes(131072, 4096, 14336, 34, 32, 8, 262144, head_dim=128)
_LLAMA = _sizes(32000, 4096, 11008, 32, 32, 32, 2048)
_LLAMA4 = _sizes(202048, 5120, 8192, 48, 40, 8, 131072, head_dim=128, num_local_experts=16, num_experts_per_tok=1)
_QWEN2_5_VL = _sizes(152064, 8192, 29568, 80, 64, 8, 32768)
_QWEN3_VL = _sizes(151936, 4096, 22016, 32, 32, 32, 128000, head_dim=128)
_QWEN3_VL_MOE = _sizes(
    151936, 2048, 5632, 24, 16, 16, 128000, num_experts_per_tok=4, moe_intermediate_size=1408
)
_QWEN3_5 = _sizes(248320, 4096, 12288, 32, 16, 4, 32768, head_dim=256)
_QWEN3_5_MOE = {
    "vocab_size": 248320, "hidden_size": 2048, "num_hidden_layers": 40, "num_attention_heads": 16,
    "num_key_value_heads": 2, "max_position_embeddings": 32768, "head_dim": 256, "num_experts": 256,
    "num_experts_per_tok": 8, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
}  # fmt: skip
#: What config.json of transformers before 4.52 says of the wrapper, among the settings of the text model.
_QWEN_OWN = (
    "architectures", "model_type", "vision_config", "image_token_id", "video_token_id", "vision_start_token_id",
    "vision_end_token_id", "vision_token_id", "tie_word_embeddings", "dtype", "torch_dtype", "transformers_version",
    "quantization_config",
)  # fmt: skip
FAMILIES = (
    wrapped(
        "gemma3", _FAMILIES["gemma3_text"], {"gemma3_text": Text("gemma3_text", _GEMMA3)}, tower=towers.siglip
    ),
    wrapped(
        "mistral3",
        _MISTRALS,
        {"mistral": Text("mistral", _MISTRAL), "ministral3": Text("ministral3", _MINISTRAL3)},
        tower=towers.pixtral,
    ),
    wrapped("llava", _FAMILIES["llama"], {"llama": Text("llama", _LLAMA)}, tower=towers.clip),
    wrapped(
        "qwen2_5_vl",
        _FAMILIES["qwen2"],
        {"qwen2_5_vl_text": Text("qwen2", _QWEN2_5_VL)},
        own=_QWEN_OWN,
        tower=towers.qwen2_5,
    ),
    wrapped("qwen3_vl", _FAMILIES["qwen3"], {"qwen3_vl_text": Text("qwen3", _QWEN3_VL)}, tower=towers.qwen3),
    # Its router always makes the weights of a token's experts add up to one.
    wrapped(
        "qwen3_vl_moe",
        _FAMILIES["qwen3_moe"],
        {"qwen3_vl_moe_text": Text("qwen3_moe", _QWEN3_VL_MOE, {"norm_topk_prob": True})},
        tower=towers.qwen3,
    ),
    wrapped(
        "qwen3_5",
        _FAMILIES["qwen3_5_text"],
        {"qwen3_5_text": Text("qwen3_5_text", _QWEN3_5)},
        tower=towers.qwen3,
    ),
    wrapped(
        "qwen3_5_moe",
        _FAMILIES["qwen3_5_moe_text"],
        {"qwen3_5_moe_text": Text("qwen3_5_moe_text", _QWEN3_5_MOE)},
        tower=towers.qwen3,
    ),
    wrapped(
        "llama4",
        _FAMILIES["llama4_text"],
        {"llama4_text": Text("llama4_text", _LLAMA4)},
        "language_model.model",
        "language_model.lm_head",
        tower=towers.llama4,
    ),
)
