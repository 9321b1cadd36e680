"""The sentence that a recipe gets which its target or its model cannot run, and what is judged by emulation."""

import facts
import pytest

from trimtab.model.facts import Linear, ModelFacts
from trimtab.model.hardware import target
from trimtab.model.linear_layers import largest_group_size
from trimtab.planning.checks import refusal
from trimtab.recipe import GROUPED_FORMATS, Quantization, Recipe


def smollm2(down_features: int = 1536, head_dim: int = 64) -> ModelFacts:
    """SmolLM2-135M's shapes: 30 blocks, hidden 576, 9 heads, 3 KV heads."""
    linears = [
        Linear(f"model.layers.{n}.{name}", out, features)
        for n in range(30)
        for name, out, features in (
            ("self_attn.q_proj", 576, 576),
            ("self_attn.o_proj", 576, 576),
            ("mlp.up_proj", 1536, 576),
            ("mlp.down_proj", 576, down_features),
        )
    ]
    return ModelFacts(
        architecture="LlamaForCausalLM", model_type="llama", layers=30, hidden_size=576,
        intermediate_size=1536, heads=9, kv_heads=3, head_dim=head_dim, vocab_size=49152,
        max_position_embeddings=8192, tied_embeddings=True, parameters=134_515_008, bytes=269_030_016,
        dtype="bfloat16", linears=tuple(linears), head_numbers=2 * head_dim,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "recipe", "sentence"),
    [
        (
            "a100-80",
            "{quantize: {format: fp8}, engine: {backend: trtllm}}",
            "quantize.format: fp8 needs compute capability 8.9 or later (Ada, Hopper, Blackwell) and a100-80 "
            "has 8.0; write one of: fp32, fp16, bf16, int4_rtn, int4_awq, "
            "int4_gptq",
        ),
        (
            "h100",
            "{quantize: {format: nvfp4_wo}, engine: {backend: trtllm, tensorrt_llm: 1.2.1}}",
            "quantize.format: nvfp4_wo is read by TensorRT-LLM from 1.3.0rc20 on, and 1.2.1 is asked for; write "
            "int4_gptq, or engine.backend: vllm",
        ),
        (
            "h100",
            "{quantize: {format: int8_sq}, engine: {backend: trtllm}}",
            "quantize.format: trtllm does not serve int8_sq on h100; write one of: fp32, fp16, bf16, fp8, fp8_gptq, "
            "fp8_per_channel, int4_rtn, int4_awq, int4_gptq, w4a8_awq, nvfp4_wo, mixed_gpu, or engine.backend: torch",
        ),
        (
            "cpu",
            "{quantize: {format: int8_wo}, engine: {backend: trtllm}}",
            "engine.backend: 'trtllm' does not run on cpu; valid: torch",
        ),
        (
            "h100",
            "{quantize: {format: fp8, kv_cache: int8}, engine: {backend: trtllm}}",
            "quantize.kv_cache: trtllm serves no int8 KV cache on h100; write one of: none, fp8, or "
            "engine.backend: trtllm-legacy",
        ),
        (
            "h100",
            "{quantize: {format: fp8, kv_cache: nvfp4}, engine: {backend: trtllm}}",
            "quantize.kv_cache: trtllm serves nvfp4 on compute capability 10.0 to 10.3 and h100 has 9.0; "
            "write one of: none, fp8",
        ),
        (
            "b200",
            "{quantize: {format: fp8, kv_cache: int8}, engine: {backend: trtllm-legacy}}",
            "quantize.kv_cache: trtllm-legacy serves int8 on compute capability 8.0 to 9.0 and b200 has 10.0; "
            "write one of: none, fp8",
        ),
        (
            "a100-80",
            "{quantize: {format: bf16, kv_cache: fp8}, engine: {backend: vllm}}",
            "quantize.kv_cache: vllm serves fp8 on compute capability 8.9 or later and a100-80 has 8.0; write "
            "'none', or engine.backend: trtllm",
        ),
        (
            "h100",
            "{quantize: {format: bf16, kv_cache: fp8}, engine: {backend: vllm}}",
            "quantize.kv_cache: vllm reads fp8 beside quantized weights alone; write 'none', or format: fp8",
        ),
        (
            "h100",
            "engine: {backend: vllm, max_num_tokens: 64, max_batch_size: 128}",
            "engine.max_num_tokens: 64 is less than max_batch_size 128, and each sequence adds a token a step; write "
            "at least 128",
        ),
        (
            "h100",
            "engine: {backend: vllm, scheduler_policy: static_batch}",
            "engine.scheduler_policy: vllm has one of its own and no static_batch; remove the field",
        ),
        (
            "h100",
            "{quantize: {format: int8_wo, kv_cache: fp8}, engine: {backend: trtllm-legacy}}",
            "quantize.kv_cache: trtllm-legacy cannot build int8_wo with an fp8 KV cache; write 'none'",
        ),
        (
            "cpu",
            "{quantize: {format: int4_awq, group_size: 128}}",
            "quantize.group_size: 128 does not divide the 576 input features of "
            "model.layers.0.self_attn.q_proj; write one of: 64, 32",
        ),
        (
            "h100",
            "{quantize: {format: int4_awq, group_size: 32}, engine: {backend: trtllm}}",
            "quantize.group_size: trtllm has no groups of 32; write one of: 128, 64",
        ),
        (
            "cpu",
            "{prune: {method: depth, blocks: 30}}",
            "prune.blocks: 30 of 30 blocks cannot be removed; write at most 29",
        ),
        (
            "cpu",
            "prune: {method: wanda, pattern: '2:5'}",
            "prune.pattern: 2:5 wants input features in groups of 5, which do not divide the 576 of "
            "model.layers.0.self_attn.q_proj; write 'unstructured'",
        ),
        (
            "h100",
            "{engine: {backend: trtllm, tensor_parallel_size: 2}}",
            "engine.tensor_parallel_size: 2 does not divide 9 attention heads and 3 KV heads; "
            "write one of: 1, 3",
        ),
        (
            "h100",
            "{prune: {method: depth, blocks: 28}, engine: {backend: trtllm, pipeline_parallel_size: 4}}",
            "engine.pipeline_parallel_size: 4 stages for 2 blocks; write at most 2",
        ),
        (
            "cpu",
            "prune: {method: width, ffn: 0.01}",
            "prune.ffn: 0.01 of 1536 neurons rounds to none, because neurons are kept in multiples of 64; write at "
            "least 0.042",
        ),
        (
            "cpu",  # 12 groups of 128 fit into 1536 neurons, 8.5 into 1088
            "{prune: {method: width, ffn: 0.29}, quantize: {format: int4_awq, group_size: 128, exclude: "
            "['*.q_proj', '*.o_proj', '*.up_proj']}}",
            "quantize.group_size: 128 does not divide the 1088 input features of model.layers.0.mlp.down_proj; write "
            "one of: 64, 32",
        ),
        (
            "h100",  # two of three KV groups are left, which three ranks do not divide
            "{prune: {method: width, kv_groups: 1}, engine: {backend: trtllm, tensor_parallel_size: 3}}",
            "engine.tensor_parallel_size: 3 does not divide 6 attention heads and 2 KV heads; write one of: 1, 2, 6",
        ),
        (
            "cpu",  # a pattern means the pruned model, whose blocks are numbered anew
            "{prune: {method: depth, blocks: 4}, quantize: {format: int8_wo, exclude: [model.layers.29.mlp.up_proj]}}",
            "quantize.exclude: 'model.layers.29.mlp.up_proj' matches no layer; write 'model.layers.9.mlp.up_proj' "
            "(valid: *.down_proj, *.o_proj, *.q_proj, *.up_proj, lm_head)",
        ),
        (
            "h100",
            "{engine: {backend: torch, tensor_parallel_size: 2}}",
            "engine.tensor_parallel_size: 2 does not divide 9 attention heads and 3 KV heads; write one of: 1, 3",
        ),
        (
            "cpu",
            "{engine: {backend: torch, pipeline_parallel_size: 4}}",
            "engine.pipeline_parallel_size: 4 does not divide 30 blocks; write one of: 1, 2, 3, 5, 6, 10, 15, 30",
        ),
    ],
)
def test_refused(name, recipe, sentence):
    assert refusal(Recipe.parse(recipe), target(name), smollm2()) == sentence


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("cpu", "{}"),
        ("cpu", "{quantize: {format: mixed, effective_bits: 6, group_size: 64}}"),
        ("h100", "{quantize: {format: fp8, kv_cache: fp8}, engine: {backend: trtllm}}"),
        ("a100-80", "{quantize: {format: bf16, kv_cache: fp8}, engine: {backend: trtllm}}"),
        ("a100-80", "{quantize: {format: int8_wo, kv_cache: int8}, engine: {backend: trtllm-legacy}}"),
        ("b200", "{quantize: {format: fp8, kv_cache: nvfp4}, engine: {backend: trtllm}}"),
        ("h100", "{engine: {backend: trtllm, tensor_parallel_size: 3}}"),
        ("cpu", "{engine: {backend: torch, tensor_parallel_size: 3}}"),
        ("h100", "{quantize: {format: fp8}, engine: {backend: torch, pipeline_parallel_size: 2}}"),
        ("cpu", "{prune: {method: depth, blocks: 29}}"),
        ("cpu", "{prune: {method: sparsegpt, pattern: '4:8'}}"),
        ("cpu", "{prune: {method: width, ffn: 0.29, kv_groups: 2}, quantize: {format: int4_awq}}"),
    ],
)
def test_allowed(name, recipe):
    assert refusal(Recipe.parse(recipe), target(name), smollm2()) is None


@pytest.mark.parametrize(
    ("name", "format", "emulated"),
    [
        ("cpu", "fp8", True),
        ("cpu", "fp8_per_channel", True),
        ("cpu", "nvfp4", True),
        ("cpu", "int4_gptq", False),
        ("h100", "w4a8_awq", True),
        ("b200", "nvfp4", True),
        ("b200", "mxfp4", True),
        ("cpu", "nvfp4_wo", True),
        ("h100", "mxfp4_wo", True),
        ("h100", "fp8_per_channel", False),
    ],
)
def test_torch_judges_by_emulation_what_it_has_no_kernel_for(name, format, emulated):
    recipe, machine = Recipe.parse(f"quantize: {{format: {format}}}"), target(name)
    assert refusal(recipe, machine, smollm2()) is None
    assert machine.is_emulated(recipe) is emulated


@pytest.mark.parametrize(
    ("format", "features", "block"),
    [("nvfp4", 1536, None), ("nvfp4", 1544, 16), ("mxfp4", 1536, None), ("mxfp4", 1552, 32), ("nvfp4_wo", 1544, 16)],
)
def test_a_format_with_blocks_of_its_own_wants_them_to_divide_every_layer(format, features, block):
    reason = refusal(Recipe.parse(f"quantize: {{format: {format}}}"), target("cpu"), smollm2(down_features=features))
    assert reason is None if block is None else reason == (
        f"quantize.format: {format} has a scale for each {block} weights of a row, which do not divide the {features} "
        f"of model.layers.0.mlp.down_proj; add 'model.layers.0.mlp.down_proj' to quantize.exclude"
    )


@pytest.mark.parametrize("format", GROUPED_FORMATS)
def test_int4_wants_an_even_number_of_output_features(format):
    """A byte of ModelOpt's INT4 holds the weights of two output features."""
    facts, name = smollm2(), "model.layers.3.mlp.up_proj"
    odd = [layer._replace(out_features=1535) if layer.name == name else layer for layer in facts.linears]
    facts = facts.model_copy(update={"linears": tuple(odd)})
    bits = {"effective_bits": 6} if format.startswith("mixed") else {}

    def reason(*exclude: str) -> str | None:
        recipe = Recipe.parse({"quantize": {"format": format, "exclude": ["lm_head", *exclude], **bits}})
        return refusal(recipe, target("cpu"), facts)

    assert reason() == (
        f"quantize.format: {format} stores output features in pairs, and {name} has 1535; add '{name}' to "
        f"quantize.exclude"
    )
    assert reason(name) is None
    assert refusal(Recipe.parse("quantize: {format: int8_wo}"), target("cpu"), facts) is None


@pytest.mark.parametrize(
    ("recipe", "left"),
    [
        ("{format: int8_wo}", 120),  # 30 blocks of q_proj, o_proj, up_proj and down_proj, of which none share an input
        ("{format: int8_wo, exclude: ['*.o_proj', '*.down_proj']}", 60),
        ("{format: int8_wo, exclude: ['model.layers.0.*']}", 116),
    ],
)
@pytest.mark.parametrize("blocks", [0, 10])
def test_the_most_sensitive_groups_are_fewer_than_all(recipe, left, blocks):
    left -= blocks * left // 30 if "layers.0" not in recipe else blocks * 4
    prune = f"prune: {{method: depth, blocks: {blocks}}}, " if blocks else ""

    def reason(number: int) -> str | None:
        settings = recipe.replace("}", f", exclude_sensitive: {number}}}")
        return refusal(Recipe.parse(f"{{{prune}quantize: {settings}}}"), target("cpu"), smollm2())

    assert reason(left - 1) is None
    assert reason(left) == (
        f"quantize.exclude_sensitive: {left} of {left} groups of layers leave nothing to quantize; write at most "
        f"{left - 1}"
    )


@pytest.mark.parametrize("pattern", ["lm_head", "*", "*.q_proj", "model.layers.29.*", "model.layers.[0-4].mlp.up_proj"])
def test_an_exclusion_that_matches_is_allowed_with_another(pattern):
    recipe = Recipe.parse({"quantize": {"format": "int8_wo", "exclude": [pattern]}})
    assert refusal(recipe, target("cpu"), smollm2()) == (
        "quantize.exclude: leaves no layer to quantize; remove a pattern, or write format: bf16"
        if pattern == "*" else None
    )  # fmt: skip


def test_an_exclusion_that_matches_nothing_lists_the_endings_and_not_every_layer():
    recipe = Recipe.parse("quantize: {format: int8_wo, exclude: [lm_head, down_proj]}")
    assert refusal(recipe, target("cpu"), smollm2()) == (
        "quantize.exclude: 'down_proj' matches no layer; write '*.down_proj' (valid: *.down_proj, *.o_proj, *.q_proj, "
        "*.up_proj, lm_head)"
    )


def test_fp8_on_cpu_is_allowed_and_called_emulated():
    recipe, cpu = Recipe.parse("quantize: {format: fp8}"), target("cpu")
    assert refusal(recipe, cpu, smollm2()) is None
    assert cpu.is_emulated(recipe)
    assert not target("h100").is_emulated(recipe)


@pytest.mark.parametrize("kv_cache", ["fp8", "int8", "nvfp4"])
@pytest.mark.parametrize("name", ["cpu", "h100", "b200"])
def test_every_kv_cache_is_emulated_by_torch_on_every_device(name, kv_cache):
    recipe, machine = Recipe.parse(f"quantize: {{format: int8_wo, kv_cache: {kv_cache}}}"), target(name)
    assert refusal(recipe, machine, smollm2()) is None
    assert machine.is_kv_cache_emulated(recipe) and not machine.is_emulated(recipe)


def test_what_is_served_is_not_emulated():
    for text in ("{format: fp8, kv_cache: fp8}", "{format: fp8}"):
        served = Recipe.parse(f"{{quantize: {text}, engine: {{backend: trtllm}}}}")
        assert not target("h100").is_kv_cache_emulated(served)
    assert not target("cpu").is_kv_cache_emulated(Recipe())


@pytest.mark.parametrize(("head_dim", "allowed"), [(64, True), (80, True), (72, False)])
def test_blocks_of_nvfp4_divide_a_head(head_dim, allowed):
    recipe = Recipe.parse("quantize: {format: int8_wo, kv_cache: nvfp4}")
    reason = refusal(recipe, target("cpu"), smollm2(head_dim=head_dim))
    assert reason is None if allowed else reason == (
        "quantize.kv_cache: nvfp4 has a scale for each 16 numbers of a head, which do not divide this model's 72; "
        "write 'fp8'"
    )


def test_a_layer_that_no_group_divides_is_named_with_the_way_out():
    recipe = Recipe.parse("quantize: {format: int4_rtn, group_size: 32}")
    reason = refusal(recipe, target("cpu"), smollm2(down_features=1500))
    assert "1500 input features of model.layers.0.mlp.down_proj" in reason
    assert "add 'model.layers.0.mlp.down_proj' to quantize.exclude" in reason
    spared = Recipe.parse("quantize: {format: int4_rtn, group_size: 32, exclude: [lm_head, '*.down_proj']}")
    assert refusal(spared, target("cpu"), smollm2(down_features=1500)) is None


@pytest.mark.parametrize(
    ("down_features", "exclude", "size"),
    [
        (1536, ("lm_head",), 64),  # 576 = 9 * 64
        (1568, ("lm_head",), 32),  # 1568 = 49 * 32
        (1500, ("lm_head",), None),
        (1500, ("lm_head", "*.down_proj"), 64),
        (1536, (), 64),  # lm_head's 576 input features too
    ],
)
def test_largest_group_size(down_features, exclude, size):
    quantize = Quantization(format="int4_rtn", exclude=exclude)
    assert largest_group_size(smollm2(down_features), quantize, "torch") == size


def test_torch_splits_the_layers_of_a_llama_alone():
    model = smollm2().model_copy(update={"model_type": "phi3"})
    reason = "engine.tensor_parallel_size: torch has no way to split the layers of a 'phi3'; write 1"
    assert refusal(Recipe.parse("engine: {tensor_parallel_size: 3}"), target("cpu"), model) == reason


def test_a_rank_holds_whole_blocks_of_a_row():
    model = facts.llama(2, 64, 160, 4, 2, 16, 300, 128, True)  # 80 of 160 neurons each: blocks of 16, not of 32
    recipe = "{{quantize: {{format: {}}}, engine: {{tensor_parallel_size: 2}}}}"
    recipes = {form: recipe.format(form) for form in ("nvfp4", "mxfp4")}
    found = {form: refusal(Recipe.parse(recipe), target("cpu"), model) for form, recipe in recipes.items()}
    assert found["nvfp4"] is None
    assert found["mxfp4"].startswith(
        "engine.tensor_parallel_size: 2 leaves a rank 80 input features of model.layers.0.mlp.down_proj"
    )


def test_tensor_parallelism_splits_the_input_of_row_parallel_layers():
    # 1536 / 3 = 512 input features a rank: 64 divides; o_proj has 576 / 3 = 192 = 3 * 64.
    quantize = Quantization(format="int4_awq")
    assert largest_group_size(smollm2(), quantize, "trtllm", ranks=3) == 64
    # 576 / 9 = 64, and 1536 is not divided by 9 at all, so nine ranks are refused earlier.
    recipe = Recipe.parse("engine: {backend: trtllm, tensor_parallel_size: 9}")
    assert "tensor_parallel_size" in refusal(recipe, target("h100"), smollm2())


def test_vllm_is_not_given_what_it_reads_in_another_order():
    """GPTBigCode as GPT-2 has become: StarCoder has one head of keys, which both put behind the queries."""
    gpt2 = facts.SMOLLM2.model_copy(update={"model_type": "gpt_bigcode", "architecture": "GPTBigCodeForCausalLM"})
    served = Recipe.parse("{engine: {backend: vllm}}")
    assert refusal(served, target("h100"), gpt2) == (
        "engine.backend: vllm reads the queries, keys and values of a 'gpt_bigcode' with 3 KV heads in another order; "
        "write 'torch'"
    )
    assert refusal(served, target("h100"), gpt2.model_copy(update={"kv_heads": 1})) is None
    assert refusal(Recipe.parse("{engine: {backend: torch}}"), target("h100"), gpt2) is None
