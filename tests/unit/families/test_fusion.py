"""Which layers share an input, and the norm that makes it, by name alone."""

from __future__ import annotations

import random

import pytest

from trimtab.base.errors import InputError
from trimtab.families.fusion import Group, block_of, groups

LLAMA = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip
PHI3 = ["self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj"]


def layers(places: list[str], blocks: int = 1) -> list[str]:
    return [f"model.layers.{number}.{place}" for number in range(blocks) for place in places]


def block(number: int, norms: bool = True) -> list[Group]:
    """A Llama block, in order."""
    at = f"model.layers.{number}"
    before, between = (f"{at}.input_layernorm", f"{at}.post_attention_layernorm") if norms else (None, None)
    return [
        Group((f"{at}.mlp.down_proj",)),
        Group((f"{at}.mlp.gate_proj", f"{at}.mlp.up_proj"), between),
        Group((f"{at}.self_attn.o_proj",)),
        Group(tuple(f"{at}.self_attn.{part}_proj" for part in "kqv"), before),
    ]


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3", "granite", "smollm3"])
def test_llama(model_type):
    assert groups(layers(LLAMA, blocks=2), model_type) == block(0) + block(1)


def test_blocks_are_in_the_order_of_their_numbers():
    found = groups(layers(["mlp.down_proj"], blocks=11), "llama")
    assert [block_of(group.layers[0]) for group in found] == list(range(11))


def test_the_order_of_the_names_is_of_no_account():
    names = layers(LLAMA, blocks=3)
    random.Random(0).shuffle(names)
    assert groups(names, "llama") == block(0) + block(1) + block(2)


def test_phi3_has_its_layers_fused_already():
    at = "model.layers.0"
    assert groups(layers(PHI3), "phi3") == [
        Group((f"{at}.mlp.down_proj",)),
        Group((f"{at}.mlp.gate_up_proj",), f"{at}.post_attention_layernorm"),
        Group((f"{at}.self_attn.o_proj",)),
        Group((f"{at}.self_attn.qkv_proj",), f"{at}.input_layernorm"),
    ]


@pytest.mark.parametrize("model_type", ["olmo2", "cohere", "stablelm"])
def test_what_is_not_known_to_be_a_pre_norm_is_not_folded_into(model_type):
    """OLMo 2 has the norm of that name behind the layers; in Command, and in some of StableLM, all layers read one."""
    assert groups(layers(LLAMA), model_type) == block(0, norms=False)


def test_gemma_has_another_norm_before_the_mlp():
    found = {group.norm for group in groups(layers(LLAMA), "gemma2")}
    assert found == {None, "model.layers.0.input_layernorm", "model.layers.0.pre_feedforward_layernorm"}


def test_a_family_that_is_not_described_has_no_groups():
    with pytest.raises(InputError, match="model_type 'dbrx' has mixtures of experts, which is not supported yet"):
        groups(layers(LLAMA), "dbrx")


def test_other_names_stand_alone():
    names = ["model.layers.0.attn.c_attn", "model.layers.0.mlp.c_fc", "model.layers.1.attn.c_attn"]
    assert groups(names, "llama") == [Group((name,)) for name in names]


def test_layers_outside_blocks_come_first_and_alone():
    names = ["model.layers.0.mlp.up_proj", "score", "self_attn.q_proj", "self_attn.k_proj"]
    found = groups(names, "llama")
    assert found[:-1] == [Group(("score",)), Group(("self_attn.k_proj",)), Group(("self_attn.q_proj",))]
    assert found[-1] == Group(("model.layers.0.mlp.up_proj",), "model.layers.0.post_attention_layernorm")


def test_a_tower_with_the_same_numbers_is_no_part_of_the_blocks():
    names = [f"{tower}.layers.0.self_attn.{part}_proj" for tower in ("vision", "model") for part in "qk"]
    blocks = Group(("model.layers.0.self_attn.k_proj", "model.layers.0.self_attn.q_proj"),
                   "model.layers.0.input_layernorm")  # fmt: skip
    assert groups(names, "llama") == [*(Group((f"vision.layers.0.self_attn.{part}_proj",)) for part in "kq"), blocks]


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.layers.12.mlp.up_proj.weight", 12),
        ("transformer.h.3.attn.c_attn", 3),
        ("model.embed_tokens.weight", None),
        ("lm_head", None),
        ("model.norm.weight", None),
    ],
)
def test_block_of(name, number):
    assert block_of(name) == number


def test_layers_of_one_expert_read_one_input_and_no_norm_is_theirs_alone() -> None:
    names = [f"model.layers.1.block_sparse_moe.experts.{n}.{layer}" for n in (0, 11) for layer in ("w1", "w2", "w3")]
    found = groups([*names, "model.layers.1.self_attn.q_proj"], "mixtral")
    experts = [tuple(layer.rpartition("experts.")[2] for layer in group.layers) for group in found[:-1]]
    assert experts == [("0.w1", "0.w3"), ("0.w2",), ("11.w1", "11.w3"), ("11.w2",)]
    assert [group.norm for group in found] == [None] * 4 + ["model.layers.1.input_layernorm"]
