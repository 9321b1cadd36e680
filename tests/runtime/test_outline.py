"""What is planned by a config.json alone: every tensor that transformers' model of that config has, and no other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import decoders
import pytest
import torch
import wrappers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from trimtab import families
from trimtab.base.errors import InputError
from trimtab.model import memory, outline
from trimtab.model.facts import inspect
from trimtab.recipe import Recipe

#: Beside each family's tiny model: what its config may say of biases, norms and heads.
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((name, {}) for name in families.BY_TYPE),
    *((name, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True})
      for name in ("llama", "smollm3", "arcee", "granite", "hyperclovax", "apertus", "hunyuan_v1_dense", "nemotron")),
    *((name, {"attention_bias": True}) for name in ("qwen3", "gemma", "olmo", "olmo2", "cohere", "glm", "seed_oss")),
    ("llama", {"head_dim": 32}),
    ("seed_oss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    ("ernie4_5", {"use_bias": True}),
    ("starcoder2", {"use_bias": False}),
    ("hyperclovax", {"use_post_norm": False}),
    ("cohere", {"use_qk_norm": False, "tie_word_embeddings": False}),
    ("falcon", {"bias": True, "parallel_attn": False}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
    ("opt", {"enable_bias": False}),
    ("opt", {"word_embed_proj_dim": 32, "_remove_final_layer_norm": True}),
    ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True, "qk_layernorm": True}),
    ("phi", {"qk_layernorm": True}),
    ("persimmon", {"qk_layernorm": False}),
    ("gpt_bigcode", {"multi_query": False}),
    ("mamba", {"use_bias": True, "use_conv_bias": False}),
    ("mamba2", {"use_bias": True}),
    ("lfm2", {"conv_bias": True}),
    ("bamba", {"mamba_proj_bias": True, "attention_bias": True, "mlp_bias": True}),
    ("nemotron_h", {"mlp_bias": True, "layers_block_type": ["mlp", "linear_attention", "moe", "full_attention"]}),
    ("granitemoehybrid", {"num_local_experts": 0, "attention_bias": True}),
    ("falcon_h1", {"mamba_d_ssm": None, "mamba_n_heads": 8, "mamba_rms_norm": False, "projectors_bias": True,
                   "attention_bias": True, "mlp_bias": True}),
]  # fmt: skip


def of_transformers(config: Any) -> dict[str, tuple[int, ...]]:
    build = AutoModelForImageTextToText if families.BY_TYPE[config.model_type].wrapper else AutoModelForCausalLM
    with torch.device("meta"):
        model = build.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in decoders.stored(model).items()}


@pytest.mark.parametrize(("model_type", "changes"), VARIANTS, ids=[f"{t}-{'-'.join(c)}" for t, c in VARIANTS])
def test_the_tensors_are_those_of_transformers(model_type: str, changes: dict[str, Any]) -> None:
    tiny = wrappers if families.BY_TYPE[model_type].wrapper else decoders
    config = tiny.config(model_type, **changes)
    found = outline.shapes(config.to_dict(), families.BY_TYPE[model_type], Path("config.json"))
    assert found == of_transformers(config)


#: Of these transformers 5.14 makes no model that runs without a `head_dim`.
NEEDS_HEAD_DIM = ("ministral", "helium", "hunyuan_v1_dense", "deepseek_v2", "deepseek_v3", "minimax_m2", "glm4_moe",
                  "hunyuan_v1_moe", "mamba2")  # fmt: skip


ALONE = [name for name in families.BY_TYPE if not families.BY_TYPE[name].wrapper]


@pytest.mark.parametrize("model_type", [name for name in ALONE if name not in NEEDS_HEAD_DIM])
def test_a_config_that_leaves_out_what_transformers_knows(model_type: str) -> None:
    """Biases, ties and the sizes of heads, of which a config.json may say nothing."""
    whole = decoders.config(model_type).to_dict()
    silent = {name: value for name, value in whole.items()
              if not any(part in name for part in ("bias", "tie_", "head_dim", "norm", "multi_query"))}  # fmt: skip
    config = AutoConfig.for_model(**silent)
    assert outline.shapes(silent, families.BY_TYPE[model_type], Path("config.json")) == of_transformers(config)


@pytest.mark.parametrize("model_type", ["gemma2", "cohere", "bloom", "gpt_bigcode", "apertus", "phi",
                                        "qwen3_next", "lfm2_moe", "nemotron_h", "granitemoehybrid", "falcon_h1",
                                        "mamba", "ernie4_5_moe"])  # fmt: skip
def test_the_facts_are_those_of_the_whole_model(model_type: str, tmp_path: Path) -> None:
    whole = inspect(decoders.write(tmp_path, model_type))
    assert outline.outline(tmp_path / "config.json") == whole
    config = json.loads((tmp_path / "config.json").read_text())
    del config["vocab_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="vocab_size must be a whole number above 0, got None"):
        outline.outline(tmp_path / "config.json")


#: Published sizes as config.json has them, and parameters: Pythia's by the table of its README (of EleutherAI), BLOOM's
#: by its model card, Gemma 2's by the table of its report (590 million of embeddings, 2.02 billion others).
PUBLISHED = {
    "Pythia-160M": ({"model_type": "gpt_neox", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
                     "intermediate_size": 3072, "vocab_size": 50304, "tie_word_embeddings": False}, 162_322_944),
    "Pythia-1.4B": ({"model_type": "gpt_neox", "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16,
                     "intermediate_size": 8192, "vocab_size": 50304, "tie_word_embeddings": False}, 1_414_647_808),
    "BLOOM-560M": ({"model_type": "bloom", "n_embed": 1024, "n_layer": 24, "num_attention_heads": 16,
                    "vocab_size": 250880}, 559_214_592),
    "Gemma 2 2B": ({"model_type": "gemma2", "hidden_size": 2304, "num_hidden_layers": 26, "num_attention_heads": 8,
                    "num_key_value_heads": 4, "head_dim": 256, "intermediate_size": 9216, "vocab_size": 256000},
                   2_614_341_888),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_as_many_parameters_as_their_publishers_say(name: str, tmp_path: Path) -> None:
    config, parameters = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps({**config, "architectures": ["AForCausalLM"]}))
    assert outline.outline(tmp_path / "config.json").parameters == parameters


#: config.json as published, without what planning does not read.
GEMMA3_27B = {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "mm_tokens_per_image": 256,
    "text_config": {"model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504,
                    "num_hidden_layers": 62, "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
                    "sliding_window": 1024, "vocab_size": 262208},
    "vision_config": {"hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
                      "model_type": "siglip_vision_model", "num_attention_heads": 16, "num_hidden_layers": 27,
                      "patch_size": 14, "vision_use_head": False},
}  # fmt: skip


def test_a_wrapper_is_its_text_model_and_its_tower(tmp_path: Path) -> None:
    """Gemma 3 27B by hand, embeddings tied, and its KV cache: 62 blocks of 16 heads of 128, twice, in 16 bits."""
    (tmp_path / "config.json").write_text(json.dumps(GEMMA3_27B))
    found = outline.outline(tmp_path / "config.json")
    block = 5376 * (2 * 32 * 128 + 2 * 16 * 128 + 3 * 21504) + 4 * 5376 + 2 * 128
    text = 262208 * 5376 + 62 * block + 5376
    layer = 4 * (1152 * 1152 + 1152) + 2 * 1152 * 4304 + 4304 + 1152 + 4 * 1152
    tower = 1152 * 3 * 14 * 14 + 1152 + 64 * 64 * 1152 + 27 * layer + 2 * 1152
    projector = 1152 * 5376 + 1152
    assert (found.parameters, found.beside) == (text + tower + projector, tower + projector)
    assert found.parameters == 27_432_406_640
    assert found.active_parameters == text
    served = Recipe.model_validate({"engine": {"backend": "vllm"}})
    assert memory.kv_bytes_per_token(found, served) == 62 * 2 * 16 * 128 * 2


def test_a_tower_of_another_kind_is_refused(tmp_path: Path) -> None:
    config = wrappers.config("llava").to_dict() | {"architectures": ["LlavaForConditionalGeneration"]}
    config["vision_config"]["model_type"] = "siglip_vision_model"
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="vision_config.model_type is 'siglip_vision_model', and the shapes of a"):
        outline.outline(tmp_path / "config.json")
