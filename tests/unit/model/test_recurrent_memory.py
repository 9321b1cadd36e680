"""What blocks with a recurrent state keep of a text, against hand computation from published configs."""

import pytest

from trimtab.catalog.goals import GOALS
from trimtab.families import named, of
from trimtab.families.recurrent import State
from trimtab.model.facts import Linear, ModelFacts
from trimtab.model.hardware import target
from trimtab.model.memory import kv_bytes_per_token, max_context_tokens, memory, scan_bytes, state_bytes
from trimtab.planning.checks import refusal
from trimtab.planning.matrix import ladder
from trimtab.recipe import Recipe

# Qwen3-Next-80B-A3B (config.json): 16 key heads and 32 value heads of 128; a convolution over 4 tokens of
# 2 * 16 * 128 + 32 * 128 = 8,192 channels. LFM2-1.2B: 3 tokens of 2,048. Nemotron-Nano-9B-v2: 128 heads of 80, 8 groups
# of 128 numbers, 4 tokens of 10,240 + 2 * 8 * 128 = 12,288. Mamba-130m: 1,536 channels by 16, 4 tokens.
PUBLISHED = {
    "qwen3_next": ({"linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
                    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4}, State(4 * 8192, 32 * 128 * 128)),
    "lfm2": ({"hidden_size": 2048, "conv_L_cache": 3}, State(6144)),
    "nemotron_h": ({"mamba_num_heads": 128, "mamba_head_dim": 80, "n_groups": 8, "ssm_state_size": 128,
                    "conv_kernel": 4}, State(4 * 12_288, 10_240 * 128)),
    "mamba": ({"hidden_size": 768, "expand": 2, "conv_kernel": 4, "state_size": 16}, State(4 * 1536, 1536 * 16)),
}  # fmt: skip


@pytest.mark.parametrize("model_type", PUBLISHED)
def test_a_state_is_what_the_config_says(model_type):
    config, state = PUBLISHED[model_type]
    assert named(model_type).recurrent.state(config) == state
    assert state.bytes == 2 * state.window + 4 * state.recurrence


def model(model_type, attention, layers=8):
    """A model whose every fourth block has attention, or none; of 2 KV heads with 256 numbers."""
    family, hidden = named(model_type), 2048
    linears = []
    for block in range(layers):
        attends = attention and block % 4 == 3
        part = family.attention if attends else family.recurrent
        for shared in part.inputs:
            linears += [Linear(f"{family.blocks}.{block}.{layer.name}", hidden, hidden) for layer in shared.layers]
    parameters = sum(layer.parameters for layer in linears) + 151936 * hidden
    return ModelFacts(
        architecture="XForCausalLM", model_type=model_type, layers=layers, hidden_size=hidden, intermediate_size=5632,
        heads=16, kv_heads=2, head_dim=256, vocab_size=151936, max_position_embeddings=262144, tied_embeddings=True,
        parameters=parameters, bytes=2 * parameters, dtype="bfloat16", linears=tuple(linears),
        head_numbers=512 if attention else 0, state_bytes=PUBLISHED[model_type][1].bytes,
    )  # fmt: skip


RECIPE = Recipe.parse("{engine: {backend: trtllm, max_batch_size: 16, max_seq_len: 4096}}")


def test_blocks_with_attention_keep_tokens_and_the_others_a_state():
    facts = model("qwen3_next", attention=True)
    assert (facts.attention_blocks, facts.recurrent_blocks) == (2, 6)
    assert kv_bytes_per_token(facts, RECIPE) == 2 * 2 * 2 * 256 * 2  # blocks, keys and values, heads, head, bytes
    assert state_bytes(facts, RECIPE) == 6 * (2 * 32_768 + 4 * 524_288)
    need = memory(facts, RECIPE, target("h100"))
    assert need.state == 16 * 6 * 2_162_688
    assert need.kv_cache == 16 * 4096 * 4096
    assert need.total == need.weights + need.kv_cache + need.state + need.activations
    assert "0.21 GB recurrent state" in need.explanation


def test_a_model_without_attention_has_no_cache_to_round():
    facts = model("mamba", attention=False)
    assert kv_bytes_per_token(facts, RECIPE) == 0
    assert max_context_tokens(facts, RECIPE, target("h100"), facts.bytes) == facts.max_position_embeddings
    reason = refusal(Recipe.parse("{quantize: {format: fp8, kv_cache: fp8}, engine: {backend: vllm}}"),
                     target("h100"), facts)  # fmt: skip
    assert reason and "keeps no keys and values, but a recurrent state" in reason and reason.endswith("write 'none'")


@pytest.mark.parametrize("goal", GOALS)
@pytest.mark.parametrize("model_type", ["qwen3_next", "mamba"])
def test_every_goal_has_a_ladder(goal, model_type):
    facts = model(model_type, attention=model_type != "mamba")
    rungs = ladder(goal, facts, target("h100"))
    assert rungs
    if model_type == "mamba":
        assert {rung.recipe.kv_cache_format for rung in rungs} == {"none"}


def test_what_serving_lacks_is_said():
    for model_type in (*PUBLISHED, "granitemoehybrid", "bamba"):
        assert "recurrent state" in named(model_type).no_serve
    assert of({"model_type": "granitemoehybrid", "num_local_experts": 0}).model_type == "granitemoehybrid"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_layer_without_kernels_holds_states_of_the_texts_that_there_is_room_for(device):
    """Of a Mamba-130m a token's are 110,592 bytes; so a text of 4,096 tokens is more than a CPU's room already."""
    facts, text = model("mamba", attention=False), 4096
    assert facts.state_bytes == 2 * 6144 + 4 * 24_576
    assert scan_bytes(facts, 100, text, device) == 2 * 100 * facts.state_bytes
    room = max(text * facts.state_bytes, {"cpu": 2**28, "cuda": 2**31}[device])
    assert scan_bytes(facts, 64 * text, text, device) == 2 * room
    assert scan_bytes(model("qwen3_next", attention=True), 64 * text, text, device) == 0
    hardware = target("cpu" if device == "cpu" else "h200")
    recipes = [Recipe.parse(f"{{engine: {{backend: {name}}}}}") for name in ("torch", "vllm")]
    by_torch, by_vllm = (memory(facts, recipe, hardware).activations for recipe in recipes)
    read = recipes[0].engine.max_seq_len
    assert by_torch - by_vllm == scan_bytes(facts, 8192, read, device) > 0
