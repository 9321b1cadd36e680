"""The shapes that structured pruning leaves, against hand computation, and what cannot be removed."""

import pytest
from facts import LLAMA_8B, SMOLLM2, llama

from trimtab.model.facts import Linear
from trimtab.model.shapes import kept, pruned, refusal
from trimtab.recipe import Recipe

QWEN = llama(24, 896, 4864, 14, 2, 64, 151936, 32768, True).model_copy(update={"model_type": "qwen2"})
MQA = llama(2, 512, 1024, 8, 1, 64, 256, 512, True)
NARROW = llama(2, 64, 64, 2, 2, 32, 256, 512, True)
GRANITE = SMOLLM2.model_copy(update={"model_type": "granite", "architecture": "GraniteForCausalLM"})


def prune(text: str):
    return Recipe.parse(f"prune: {text}").prune


@pytest.mark.parametrize(
    ("size", "share", "multiple", "left"),
    [
        (1536, None, 64, 1536),
        (1500, None, 64, 1500),  # what stays whole is not rounded
        (1536, 0.25, 64, 1152),
        (1536, 0.2, 64, 1216),  # 1228.8 lies nearer to 1216 than to 1280
        (1024, 0.03125, 64, 960),  # 992 lies in the middle
        (4864, 0.5, 64, 2432),
        (576, 0.25, 192, 384),  # 432 lies nearer to 384 than to 576
        (1536, 0.01, 64, 1536),  # nothing, which `check` refuses
    ],
)
def test_what_is_kept(size, share, multiple, left):
    assert kept(size, share, multiple) == left


@pytest.mark.parametrize(
    ("facts", "text", "sentence"),
    [
        (SMOLLM2, "{method: depth, blocks: 30}", "prune.blocks: 30 of 30 blocks cannot be removed; write at most 29"),
        (SMOLLM2, "{method: width, kv_groups: 3}",
         "prune.kv_groups: 3 of 3 KV groups cannot be removed; write at most 2"),
        (MQA, "{method: width, kv_groups: 1}", "prune.kv_groups: 1 of 1 KV groups cannot be removed; remove it"),
        (SMOLLM2, "{method: width, ffn: 0.01}",
         "prune.ffn: 0.01 of 1536 neurons rounds to none, because neurons are kept in multiples of 64; write at least "
         "0.042"),
        (SMOLLM2, "{method: width, ffn: 0.99}",
         "prune.ffn: 0.99 of 1536 neurons leaves none, because neurons are kept in multiples of 64; write at most "
         "0.958"),
        # a Llama's nine heads divide its hidden size: 576 is the least common multiple of 9 and 64
        (SMOLLM2, "{method: width, hidden: 0.2}",
         "prune.hidden: channels are kept in multiples of 576, and the model has 576; remove it"),
        (NARROW, "{method: width, ffn: 0.5}",
         "prune.ffn: neurons are kept in multiples of 64, and the model has 64; remove it"),
        (SMOLLM2.model_copy(update={"model_type": "jamba"}), "{method: depth, blocks: 1}",
         "prune.method: depth cannot say in config.json what it leaves: a 'jamba' counts off by periods which blocks "
         "have attention and which experts (attn_layer_period); write sparsegpt"),
        (GRANITE, "{method: width, ffn: 0.5}",
         "prune.method: width pruning does not know GraniteForCausalLM (model_type 'granite'), only llama, mistral, "
         "qwen2, qwen3; write method: depth"),
    ],
)  # fmt: skip
def test_refused(facts, text, sentence):
    assert refusal(facts, prune(text)) == sentence


@pytest.mark.parametrize("share", [0.042, 0.958])
def test_the_remedy_is_one(share):
    assert refusal(SMOLLM2, prune(f"{{method: width, ffn: {share}}}")) is None


@pytest.mark.parametrize(
    ("facts", "text", "changed"),
    [
        (SMOLLM2, "{method: depth, blocks: 4}", {"layers": 26}),
        (SMOLLM2, "{method: width, ffn: 0.25}", {"intermediate_size": 1152}),
        (SMOLLM2, "{method: width, kv_groups: 1}", {"heads": 6, "kv_heads": 2}),
        # with six heads left, hidden channels come in multiples of 192
        (SMOLLM2, "{method: width, kv_groups: 1, hidden: 0.3}", {"heads": 6, "kv_heads": 2, "hidden_size": 384}),
        (LLAMA_8B, "{method: width, ffn: 0.5, hidden: 0.25}", {"intermediate_size": 7168, "hidden_size": 3072}),
        (QWEN, "{method: width, hidden: 0.07}", {"hidden_size": 832}),  # no Llama: 832 is 13 times 64
    ],
)
def test_what_is_left(facts, text, changed):
    assert refusal(facts, prune(text)) is None
    left = pruned(facts, prune(text))
    sizes = ("layers", "hidden_size", "intermediate_size", "heads", "kv_heads", "head_dim", "vocab_size")
    assert {name: getattr(left, name) for name in sizes} == {name: getattr(facts, name) for name in sizes} | changed
    expected = llama(
        left.layers, left.hidden_size, left.intermediate_size, left.heads, left.kv_heads, left.head_dim,
        left.vocab_size, left.max_position_embeddings, left.tied_embeddings,
    )  # fmt: skip
    assert left.linears == expected.linears and left.linear_parameters == expected.linear_parameters
    assert left.parameters == pytest.approx(expected.parameters, rel=0.001)
    assert left.bytes == pytest.approx(2 * left.parameters, rel=1e-6)


@pytest.mark.parametrize("text", ["null", "{method: magnitude, sparsity: 0.5}"])
def test_unstructured_pruning_changes_no_shape(text):
    assert pruned(SMOLLM2, prune(text)) == SMOLLM2 and refusal(SMOLLM2, prune(text)) is None


def mixed(attending: set[int]):
    """Four blocks of a Qwen3.5: the first is the lightest, then the third."""
    linears = []
    for block, neurons in enumerate((64, 256, 128, 256)):
        prefix = f"model.layers.{block}"
        layer = "self_attn.k_proj" if block in attending else "linear_attn.in_proj_z"
        linears += [Linear(f"{prefix}.{layer}", 64, 64), Linear(f"{prefix}.mlp.up_proj", neurons, 64)]
    parameters = sum(layer.parameters for layer in linears) + 256 * 64
    return NARROW.model_copy(update={"model_type": "qwen3_5_text", "layers": 4, "linears": tuple(linears),
                                     "parameters": parameters, "bytes": 2 * parameters})  # fmt: skip


def test_where_blocks_differ_a_plan_counts_on_the_lightest_ones_going():
    facts = mixed(attending={1, 3})
    left = pruned(facts, prune("{method: depth, blocks: 2}"))
    assert left.parameters == facts.parameters - 2 * 64 * 64 - (64 + 128) * 64
    assert [layer.name for layer in left.linears if "mlp" not in layer.name] == [
        "model.layers.0.self_attn.k_proj", "model.layers.1.self_attn.k_proj"
    ]  # fmt: skip
    assert (left.attention_blocks, left.recurrent_blocks) == (2, 0)


def test_one_block_with_attention_stays():
    left = pruned(mixed(attending={0}), prune("{method: depth, blocks: 3}"))
    assert [layer.name for layer in left.linears] == ["model.layers.0.self_attn.k_proj", "model.layers.0.mlp.up_proj"]
    assert left.attention_blocks == 1
