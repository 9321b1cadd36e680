"""Planning for mixtures of experts by their published configs: parameters, those that a token passes, bytes of KV."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trimtab.base.errors import InputError
from trimtab.model import memory
from trimtab.model.facts import ModelFacts
from trimtab.model.outline import outline
from trimtab.recipe import Recipe

#: config.json as published, without what planning does not read.
DEEPSEEK_V3 = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280, "max_position_embeddings": 163840,
    "tie_word_embeddings": False, "num_nextn_predict_layers": 1,
}  # fmt: skip
QWEN3_30B_A3B = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "hidden_size": 2048,
    "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "vocab_size": 151936, "max_position_embeddings": 40960, "tie_word_embeddings": False,
}  # fmt: skip
MIXTRAL_8X7B = {
    "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2, "vocab_size": 32000, "max_position_embeddings": 32768, "tie_word_embeddings": False,
}  # fmt: skip
SCOUT = {
    "architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text", "hidden_size": 5120,
    "intermediate_size": 8192, "intermediate_size_mlp": 16384, "num_hidden_layers": 48, "num_attention_heads": 40,
    "num_key_value_heads": 8, "head_dim": 128, "num_local_experts": 16, "num_experts_per_tok": 1,
    "interleave_moe_layer_step": 1, "vocab_size": 202048, "max_position_embeddings": 10485760,
    "tie_word_embeddings": False,
}  # fmt: skip
GPT_OSS_120B = {
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "hidden_size": 2880, "intermediate_size": 2880,
    "num_hidden_layers": 36, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_local_experts": 128, "num_experts_per_tok": 4, "vocab_size": 201088, "max_position_embeddings": 131072,
    "tie_word_embeddings": False, "attention_bias": True,
}  # fmt: skip
HUNYUAN_A13B = {
    "architectures": ["HunYuanMoEV1ForCausalLM"], "model_type": "hunyuan_v1_moe", "hidden_size": 4096,
    "intermediate_size": 3072, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": 128, "num_experts": 64, "moe_topk": [8] * 32, "vocab_size": 128167, "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}  # fmt: skip


def facts(config: dict, folder: Path) -> ModelFacts:
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return outline(folder / "config.json")


@pytest.mark.parametrize(
    ("config", "billions", "active", "kv_bytes"),
    [
        # "671B total parameters of which 37B are activated for each token" (DeepSeek-V3 technical report); 61 blocks of
        # 512 compressed numbers and 64 rotary ones in 16 bits.
        (DEEPSEEK_V3, 671.0, 37.6, 61 * (512 + 64) * 2),
        # "30.5B in total and 3.3B activated" (Qwen3-30B-A3B's model card); 48 blocks of 4 heads of 128, twice.
        (QWEN3_30B_A3B, 30.5, 3.35, 48 * 2 * 4 * 128 * 2),
        # "46.7B total parameters", of which a token uses 12.9B (Mistral AI 2023, "Mixtral of experts").
        (MIXTRAL_8X7B, 46.7, 12.9, 32 * 2 * 8 * 128 * 2),
        # "109B total parameters, 17B active" with the vision tower, which has about one billion of them (Meta 2025).
        (SCOUT, 107.8, 17.2, 48 * 2 * 8 * 128 * 2),
        # "80 billion total parameters with 13 billion active" (Tencent 2025, Hunyuan-A13B).
        (HUNYUAN_A13B, 80.4, 12.75, 32 * 2 * 8 * 128 * 2),
    ],
    ids=["deepseek-v3", "qwen3-30b-a3b", "mixtral-8x7b", "llama-4-scout", "hunyuan-a13b"],
)
def test_published_figures(config, billions, active, kv_bytes, tmp_path) -> None:
    found = facts(config, tmp_path)
    assert found.parameters / 1e9 == pytest.approx(billions, rel=0.002)
    assert found.active_parameters / 1e9 == pytest.approx(active, rel=0.01)
    served = Recipe.model_validate({"engine": {"backend": "vllm"}})
    assert memory.kv_bytes_per_token(found, served) == kv_bytes


def test_a_token_passes_the_biases_of_its_own_experts_alone(tmp_path) -> None:
    """gpt-oss-120b by hand: attention, its sinks and its norms, the router, and of 128 experts four."""
    found = facts(GPT_OSS_120B, tmp_path)
    attention = 2880 * (64 + 8 + 8) * 64 + (64 + 8 + 8) * 64 + 64 * 64 * 2880 + 2880 + 64
    expert = 2880 * 2 * 2880 + 2 * 2880 + 2880 * 2880 + 2880
    block = attention + 2 * 2880 + 128 * 2880 + 128
    around = 2 * 201088 * 2880 + 2880
    assert found.parameters == around + 36 * (block + 128 * expert)
    assert found.active_parameters == around + 36 * (block + 4 * expert)


def test_the_torch_engine_keeps_keys_and_values_as_they_are_used(tmp_path) -> None:
    """Not compressed: 128 heads of 128 + 64 numbers of keys and 128 of values."""
    found = facts(DEEPSEEK_V3, tmp_path)
    assert memory.kv_bytes_per_token(found, Recipe.model_validate({})) == 61 * 128 * (192 + 128) * 2


def test_what_is_quantized_are_the_experts_and_not_attention_over_compressed_keys(tmp_path) -> None:
    """Half a byte and a byte for each 16 weights: NVIDIA's own DeepSeek in FP4 has 0.6 bytes a parameter."""
    found = facts(DEEPSEEK_V3, tmp_path)
    linears, rest = memory.weight_bytes(found, Recipe.model_validate({"quantize": {"format": "nvfp4"}}))
    attention = sum(layer.parameters for layer in found.linears if ".self_attn." in layer.name)
    assert linears == pytest.approx((found.linear_parameters - attention) * 9 / 16 + 2 * attention, rel=1e-6)
    assert rest == 2 * (found.parameters - found.linear_parameters)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"num_experts": "many"}, "num_experts must be a whole number above 0, got 'many'"),
        ({"num_experts_per_tok": 200}, "num_experts_per_tok is 200, and num_experts only 128"),
        ({"model_type": "hunyuan_v1_moe", "moe_topk": [8, 4] * 24},
         r"moe_topk must be a whole number above 0, got \[8, 4,"),
        ({"decoder_sparse_step": 2}, "decoder_sparse_step is 2, and only blocks that mlp_only_layers names may have"),
    ],
)
def test_refused(changes, sentence, tmp_path) -> None:
    with pytest.raises(InputError, match=sentence):
        facts(QWEN3_30B_A3B | changes, tmp_path)
