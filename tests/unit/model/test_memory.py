"""The memory that a recipe needs on a target, against hand computation."""

import pytest
from facts import LLAMA_8B, LLAMA_70B, MODELS, on

from trimtab.model.hardware import GB
from trimtab.model.memory import max_context_tokens, memory
from trimtab.recipe import Recipe


def test_parameters_are_those_of_the_cards():
    # from the models' cards: 134,515,008; 8,030,261,248; 70,553,706,496
    assert [facts.parameters for facts in MODELS.values()] == [134_515_008, 8_030_261_248, 70_553_706_496]


# Llama-3.1-8B: a block's linears have 2 * 4096 * 4096 (q, o) + 2 * 1024 * 4096 (k, v) + 3 * 14336 * 4096
# (mlp) = 218,103,808 weights, 32 blocks 6,979,321,856; embeddings, lm_head and norms 1,050,939,392, at 2
# bytes 2,101,878,784. KV: 2 * 32 * 8 * 128 * 2 bytes = 131,072 a token.
# Output features of a block: 4096 + 1024 + 1024 + 4096 + 14336 + 14336 + 4096 = 43,008.
LINEARS, REST = 6_979_321_856, 2_101_878_784


@pytest.mark.parametrize(
    ("quantize", "weights"),
    [
        ("null", 2 * LINEARS + REST),
        ("{format: bf16, kv_cache: fp8}", 2 * LINEARS + REST),
        # one byte a weight, and a 2-byte scale a row of 32 * 43,008
        ("{format: fp8}", LINEARS + 2 * 32 * 43_008 + REST),
        ("{format: int8_wo}", LINEARS + 2 * 32 * 43_008 + REST),
        # half a byte a weight, and 2 bytes for each 128: 6,979,321,856 / 64 = 109,051,904
        ("{format: int4_awq, group_size: 128}", LINEARS // 2 + 109_051_904 + REST),
        # 6 bits: half of the weights in INT4 (0.5 + 2/64 bytes), half in INT8 (1 byte, and a scale a row)
        (
            "{format: mixed, effective_bits: 6, group_size: 64}",
            LINEARS * 3 // 4 + LINEARS // 64 + 32 * 43_008 + REST,
        ),
        # down_proj, 58,720,256 a block, stays at 2 bytes; the other rows are 43,008 - 4,096
        (
            "{format: fp8, exclude: [lm_head, '*.down_proj']}",
            LINEARS + 32 * 58_720_256 + 2 * 32 * (43_008 - 4_096) + REST,
        ),
    ],
)
def test_weights(quantize, weights):
    recipe = Recipe.parse(f"{{quantize: {quantize}, engine: {{backend: trtllm}}}}")
    assert memory(LLAMA_8B, recipe, on("h100")).weights == weights


@pytest.mark.parametrize(
    ("recipe", "kv_cache"),
    [
        ("engine: {max_batch_size: 8, max_seq_len: 2048}", 8 * 2048 * 131_072),
        ("{quantize: {format: fp8, kv_cache: fp8}, engine: {backend: trtllm}}", 8 * 2048 * 131_072 // 2),
        (
            "{quantize: {format: int8_wo, kv_cache: int8}, engine: {backend: trtllm-legacy}}",
            8 * 2048 * 131_072 // 2,
        ),
        # four bits and an eighth of a half byte: 2 * 32 * 8 * 128 * 0.5625 = 36,864 bytes a token
        ("{quantize: {format: fp8, kv_cache: nvfp4}, engine: {backend: trtllm}}", 8 * 2048 * 36_864),
        # torch rounds to the format and holds 16 bits
        ("{quantize: {format: int8_wo, kv_cache: nvfp4}}", 8 * 2048 * 131_072),
        ("engine: {max_batch_size: 1, max_seq_len: 999999}", 131_072 * 131_072),  # the model ends at 131,072
        ("{prune: {method: depth, blocks: 8}}", 8 * 2048 * 131_072 * 24 // 32),
        ("{prune: {method: width, kv_groups: 2}}", 8 * 2048 * 131_072 * 6 // 8),
        ("engine: {backend: trtllm, tensor_parallel_size: 4}", 8 * 2048 * 131_072 // 4),
        ("engine: {backend: trtllm, pipeline_parallel_size: 4}", 8 * 2048 * 131_072 // 4),
        # sixteen ranks share eight KV heads: one each
        ("engine: {backend: trtllm, tensor_parallel_size: 16}", 8 * 2048 * 131_072 // 8),
    ],
)
def test_kv_cache(recipe, kv_cache):
    assert memory(LLAMA_8B, Recipe.parse(recipe), on("h100")).kv_cache == kv_cache


@pytest.mark.parametrize(("backend", "tokens"), [("trtllm", 1), ("torch", 0.5)])
def test_the_longest_context_counts_what_the_cache_takes(backend, tokens):
    # of 80 GB, 71 GB beside 9 GB of weights, and nine tenths of them for a cache of 65,536 bytes a token in FP8
    recipe = Recipe.parse(f"{{quantize: {{format: fp8, kv_cache: fp8}}, engine: {{backend: {backend}}}}}")
    endless = LLAMA_8B.model_copy(update={"max_position_embeddings": 10_000_000})
    found = max_context_tokens(endless, recipe, on("h100"), 9 * GB)
    assert found == int(tokens * 63_900_000_000 / 65_536)
    assert max_context_tokens(LLAMA_8B, recipe, on("h100"), 9 * GB) == 131_072, "the model reads no more"


def test_the_longest_context_of_several_devices():
    # Llama-3.1-70B has 80 * (2 * 8192 * 8192 + 2 * 1024 * 8192 + 3 * 28672 * 8192) weights in its blocks, of which
    # each of two devices holds half in FP8, one byte; and the rest, 2,102,665,216 weights, whole in 16 bits. 80 heads
    # of one device's four KV heads: 2 * 80 * 4 * 128 bytes of FP8 a token.
    recipe = Recipe.parse(
        "{quantize: {format: fp8, kv_cache: fp8}, engine: {backend: trtllm, tensor_parallel_size: 2}}"
    )
    linears, rest = 80 * 855_638_016, 2 * 2_102_665_216
    endless = LLAMA_70B.model_copy(update={"max_position_embeddings": 10_000_000})
    free = 80 * GB - linears // 2 - rest
    assert max_context_tokens(endless, recipe, on("h100"), linears + rest) == int(0.9 * free) // 81_920
    # one that is not quantized is served in 16 bits, also where its files have 32
    plain = Recipe.parse("engine: {backend: trtllm, tensor_parallel_size: 4}")
    free = 80 * GB - 2 * linears // 4 - rest
    assert max_context_tokens(endless, plain, on("h100"), 4 * (linears + rest // 2)) == int(0.9 * free) // 81_920
    # no room for a token is no error
    alone = Recipe.parse("engine: {backend: trtllm}")
    assert max_context_tokens(LLAMA_70B, alone, on("h100"), LLAMA_70B.bytes) == 0


def test_activations():
    # 8192 tokens * (4 * 4096 + 3 * 14336) * 2 bytes + 8 sequences * 128,256 logits * 4 bytes
    recipe = Recipe.parse("engine: {backend: trtllm}")
    expected = 8192 * 59_392 * 2 + 8 * 128_256 * 4
    assert memory(LLAMA_8B, recipe, on("h100")).activations == expected
    # two ranks halve the intermediate vectors
    recipe = Recipe.parse("engine: {backend: trtllm, tensor_parallel_size: 2}")
    assert memory(LLAMA_8B, recipe, on("h100")).activations == expected - 8192 * 21_504 * 2
    # torch holds one dequantised layer besides: 14336 * 4096 * 2 bytes
    recipe = Recipe.parse("quantize: {format: int8_wo}")
    assert memory(LLAMA_8B, recipe, on("h100")).activations == expected + 117_440_512


def test_parallelism_splits_the_linears_only():
    whole = 2 * LINEARS
    for engine, share in (("tensor_parallel_size: 2", 2), ("pipeline_parallel_size: 4", 4)):
        recipe = Recipe.parse(f"engine: {{backend: trtllm, {engine}}}")
        assert memory(LLAMA_8B, recipe, on("h100")).weights == whole // share + REST


def test_depth_pruning_removes_its_share_of_the_linears():
    recipe = Recipe.parse("prune: {method: depth, blocks: 8}")
    assert memory(LLAMA_8B, recipe, on("h100")).weights == 2 * 24 * 218_103_808 + REST


def test_width_pruning_narrows_weights_and_activations():
    recipe = Recipe.parse("{prune: {method: width, ffn: 0.5, hidden: 0.25}, quantize: {format: int8_wo}}")
    found = memory(LLAMA_8B, recipe, on("h100"))
    # a block: 2 * 4096 * 3072 (q, o) + 2 * 1024 * 3072 (k, v) + 3 * 7168 * 3072 (mlp) = 97,517,568 weights of a byte,
    # and 4096 + 2 * 1024 + 3072 + 2 * 7168 + 3072 = 26,624 rows with a scale; embeddings and head keep three quarters
    rest = REST - 2 * 2 * 128_256 * 1024
    assert found.weights == 32 * (97_517_568 + 2 * 26_624) + rest
    # 8192 tokens * (4 * 3072 + 3 * 7168) * 2 bytes, 8 rows of logits, and the largest layer in 16 bits
    assert found.activations == 8192 * 33_792 * 2 + 8 * 128_256 * 4 + 2 * 7168 * 3072


def test_an_emulated_format_is_held_in_16_bits():
    emulated, plain = Recipe.parse("quantize: {format: fp8}"), Recipe()
    assert memory(LLAMA_8B, emulated, on("cpu")).weights == memory(LLAMA_8B, plain, on("cpu")).weights


@pytest.mark.parametrize(
    ("name", "recipe", "fits"),
    [
        ("l4", "engine: {backend: trtllm}", True),  # 16.1 + 2.1 + 1.0 of 24 GB
        ("l4", "engine: {backend: trtllm, max_batch_size: 32}", False),  # 16.1 + 8.6 + 1.0
        ("h100", "engine: {backend: trtllm, max_batch_size: 128, max_seq_len: 4096}", False),  # 68.7 GB of KV
    ],
)
def test_fits(name, recipe, fits):
    need = memory(LLAMA_8B, Recipe.parse(recipe), on(name))
    assert need.fits is fits
    assert need.explanation.endswith("fits" if fits else "does not fit")


def test_the_explanation_adds_up():
    need = memory(LLAMA_8B, Recipe.parse("engine: {backend: trtllm}"), on("l4"))
    assert need.explanation == (
        "16.06 GB weights + 2.15 GB KV cache + 0.98 GB activations = 19.19 GB of 24.00 GB: fits"
    )
