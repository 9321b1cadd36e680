"""What a family answers about names and configs, and what it refuses."""

from __future__ import annotations

import pytest

from trimtab import families
from trimtab.base.errors import InputError
from trimtab.families import Logits


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model_type": "dbrx"}, "model_type 'dbrx' has mixtures of experts, which is not supported yet; give"),
        ({"model_type": "brand_new"}, "model_type 'brand_new' is not described; give a model of one of these: llama,"),
        ({"model_type": "brand_new", "num_local_experts": 8}, "model_type 'brand_new' has mixtures of experts"),
        ({"model_type": "brand_new", "kv_lora_rank": 512}, "'brand_new' has attention over compressed keys"),
        ({"model_type": "internvl", "text_config": {"model_type": "qwen2"}},
         r"'internvl' wraps its text model \(text_config.model_type 'qwen2'\) with others"),
        ({"model_type": "gemma3"}, r"text_config is missing, which says what text model a 'gemma3' wraps"),
        ({"model_type": "mistral3", "text_config": {"model_type": "llama"}},
         r"text_config.model_type is 'llama', and mistral and ministral3 is what is known in a 'mistral3'"),
        ({"model_type": "gemma3", "text_config": {"layer_types": ["linear_attention"]}},
         "layer_types names 'linear_attention'"),
        ({}, "model_type 'None' is not described"),
        ({"model_type": ["llama"]}, r"is not described"),
        ({"model_type": "opt", "do_layer_norm_before": False},  # OPT-350M
         "do_layer_norm_before is False, and norms behind its parts are not known; give another model"),
        ({"model_type": "mpt", "no_bias": False}, "no_bias is False, and transformers builds it without biases; give"),
        ({"model_type": "falcon", "alibi": True}, r"alibi is True, and biases of attention by distance \(ALiBi\)"),
        ({"model_type": "ernie4_5_moe", "use_bias": True}, "use_bias is True, and its experts are known without"),
        ({"model_type": "ernie4_5_moe", "moe_layer_interval": 2}, "moe_layer_interval is 2, and experts in every"),
        ({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text"}}, "'gemma4' wraps its text model"),
        ({"model_type": "llama", "layer_types": ["full_attention", "linear_attention"]},
         "layer_types names 'linear_attention', and full_attention and sliding_attention are what is known"),
    ],
)  # fmt: skip
def test_refused(config, sentence):
    with pytest.raises(InputError, match=f"^config.json: .*{sentence}"):
        families.of(config)


@pytest.mark.parametrize(
    ("config", "logits"),
    [
        ({"model_type": "llama"}, Logits(1.0, None)),
        ({"model_type": "granite", "logits_scaling": 8.0}, Logits(0.125, None)),  # Granite 3.3 2B
        ({"model_type": "granite"}, Logits(1.0, None)),
        ({"model_type": "hyperclovax", "logits_scaling": 0.125}, Logits(0.125, None)),
        ({"model_type": "cohere"}, Logits(0.0625, None)),
        ({"model_type": "cohere2", "logit_scale": 0.25}, Logits(0.25, None)),  # Command R7B
        ({"model_type": "gemma2"}, Logits(1.0, 30.0)),
        ({"model_type": "gemma2", "final_logit_softcapping": None}, Logits(1.0, None)),
        ({"model_type": "gemma3_text"}, Logits(1.0, None)),
        ({"model_type": "nanochat"}, Logits(1.0, 15.0)),
        ({"model_type": "granitemoe", "logits_scaling": 6.0}, Logits(1 / 6, None)),  # Granite 3.1 1B-A400M
        ({"model_type": "falcon_h1", "lm_head_multiplier": 0.0390625}, Logits(0.0390625, None)),
    ],
)
def test_what_becomes_of_logits_behind_the_head(config, logits):
    assert families.of(config).logits(config) == logits


def test_a_name_is_placed_in_its_block():
    family = families.named("opt")
    assert family.place("model.decoder.layers.11.self_attn.q_proj.bias") == (11, "self_attn.q_proj.bias")
    assert family.place("model.decoder.layers") == (None, "model.decoder.layers")
    assert family.place("model.layers.1.fc1") == (None, "model.layers.1.fc1")
    assert family.layer("model.decoder.layers.3.fc2") == ("fc2", "hidden", "ffn")
    assert family.layer("model.decoder.layers.3.final_layer_norm") is None


@pytest.mark.parametrize(
    ("model_type", "row_parallel", "neurons"),
    [
        ("llama", ("self_attn.o_proj", "mlp.down_proj"), ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
        ("phi3", ("self_attn.o_proj", "mlp.down_proj"), ("mlp.gate_up_proj", "mlp.down_proj")),
        ("falcon", ("self_attention.dense", "mlp.dense_4h_to_h"), ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
        ("opt", ("self_attn.out_proj", "fc2"), ("fc1", "fc2")),
    ],
)
def test_what_layers_are(model_type, row_parallel, neurons):
    family = families.named(model_type)
    assert (family.row_parallel, family.neurons) == (row_parallel, neurons)


@pytest.mark.parametrize(
    ("model_type", "config", "kept", "changed"),
    [
        ("smollm3", {"no_rope_layers": [1, 1, 1, 0], "layer_types": ["full_attention"] * 4}, [0, 2, 3],
         {"no_rope_layers": [1, 1, 0], "layer_types": ["full_attention"] * 3}),
        # blocks 0 and 1 have no window, and block 0 is gone
        ("qwen2", {"max_window_layers": 2, "layer_types": None}, [1, 2, 3], {"max_window_layers": 1}),
        ("qwen2", {"max_window_layers": 28}, [1, 2, 3], {"max_window_layers": 3}),
        ("llama", {"eos_token_id": [1, 2, 3, 4]}, [0], {}),
        # blocks 1 and 2 have experts; of these, 2 stays
        ("ernie4_5_moe", {"moe_layer_start_index": 1, "moe_layer_end_index": 2}, [0, 2, 3],
         {"moe_layer_start_index": 1, "moe_layer_end_index": 1}),
        ("ernie4_5_moe", {"moe_layer_start_index": 1, "moe_layer_end_index": -1}, [0, 2, 3],
         {"moe_layer_start_index": 1}),
        ("hunyuan_v1_moe", {"moe_topk": [8, 8, 8, 8]}, [0, 2, 3], {"moe_topk": [8, 8, 8]}),
    ],
)  # fmt: skip
def test_what_a_config_says_by_block_is_of_the_blocks_that_stay(model_type, config, kept, changed):
    found = families.named(model_type).without_blocks({"num_hidden_layers": 4, **config}, kept)
    assert found == {"num_hidden_layers": len(kept), **changed}


def test_a_list_by_block_that_is_not_known_is_not_left_as_it_was():
    config = {"num_hidden_layers": 3, "no_rope_layers": [1, 1, 0]}
    with pytest.raises(ValueError, match="no_rope_layers has as many entries as the model has blocks"):
        families.named("llama").without_blocks(config, [0, 1])


@pytest.mark.parametrize(
    ("config", "kv_heads"),
    [
        ({"num_attention_heads": 71, "multi_query": True}, 1),  # Falcon-7B
        ({"num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True}, 8),  # Falcon-40B
        ({"num_attention_heads": 16, "multi_query": False}, 16),
    ],
)
def test_a_falcon_has_as_many_kv_heads_as_its_build_says(config, kv_heads):
    assert families.named("falcon").sizes(config)["num_key_value_heads"] == kv_heads


@pytest.mark.parametrize(
    ("model_type", "config", "parts"),
    [
        ("llama", {}, ["attention mlp"] * 4),
        ("mixtral", {}, ["attention experts"] * 4),
        ("mamba", {}, ["recurrent"] * 4),
        ("falcon_h1", {}, ["attention mlp recurrent"] * 4),
        ("qwen3_next", {"mlp_only_layers": [1]}, ["experts recurrent", "mlp recurrent", "experts recurrent",
                                                  "attention experts"]),
        ("qwen3_5_text", {"full_attention_interval": 2}, ["mlp recurrent", "attention mlp"] * 2),
        ("lfm2", {"full_attn_idxs": [2]}, ["mlp recurrent", "mlp recurrent", "attention mlp", "mlp recurrent"]),
        ("bamba", {"attn_layer_indices": [0]}, ["attention mlp", *["mlp recurrent"] * 3]),
        ("nemotron_h", {"hybrid_override_pattern": "M-*E"}, ["recurrent", "mlp", "attention", "experts"]),
        ("granitemoehybrid", {"layer_types": ["mamba", "mamba", "attention", "mamba"]},
         ["experts mlp recurrent", "experts mlp recurrent", "attention experts mlp", "experts mlp recurrent"]),
        ("granitemoehybrid", {"num_local_experts": 0}, ["mlp recurrent"] * 4),
        ("ernie4_5_moe", {}, ["attention mlp", *["attention experts"] * 3]),
        ("jamba", {"attn_layer_period": 4, "attn_layer_offset": 2},
         ["mlp recurrent", "experts recurrent", "attention mlp", "experts recurrent"]),
        ("jamba", {"attn_layer_period": 4, "attn_layer_offset": 2, "num_experts": 1},
         ["mlp recurrent", "mlp recurrent", "attention mlp", "mlp recurrent"]),  # Jamba Reasoning 3B
    ],
)  # fmt: skip
def test_what_each_block_is_made_of(model_type, config, parts):
    found = families.named(model_type).parts({"num_hidden_layers": 4, **config})
    assert [" ".join(sorted(block)) for block in found] == parts
