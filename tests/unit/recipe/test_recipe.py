"""Recipes: what a bad one is told, and what makes two the same piece of work."""

from __future__ import annotations

import pytest

from trimtab.base.errors import InputError
from trimtab.catalog.formats import FORMATS
from trimtab.recipe import Format, Recipe

BAD = [
    # an unknown key names the nearest valid one
    ("quantise: {format: fp8}", "quantise: unknown key 'quantise'; write 'quantize' (valid: accept, calibrate,"),
    ("quantize: {fromat: fp8}", "quantize.fromat: unknown key 'fromat'; write 'format'"),
    ("distill: {tokens: 9, temprature: 2}", "distill.temprature: unknown key 'temprature'; write 'temperature'"),
    (
        "prune: {method: depth, blocks: 2, sparsity: 0.5}",
        "prune.sparsity: unknown key 'sparsity'; valid: blocks, contiguous, method",
    ),
    (
        "engine: {tensor_parallel: 2}",
        "engine.tensor_parallel: unknown key 'tensor_parallel'; write 'tensor_parallel_size'",
    ),
    (
        "prune: {method: magnitude, sparsity: 0.5, penalty: 2}",  # another method's, which has a field of this name
        "prune.penalty: unknown key 'penalty'; write 'sparsity' (valid: allocation, method, pattern, sparsity)",
    ),
    # a bad value names itself and what is valid
    ("quantize: {format: int8}", "quantize.format: 'int8' is not valid; write 'int8_wo' (valid: fp32, fp16, bf16,"),
    ("quantize: {format: nvfp8}", "quantize.format: 'nvfp8' is not valid; write 'nvfp4'"),
    ("quantize: {format: fp8, scale_search: mean}", "quantize.scale_search: 'mean' is not valid; write 'mse'"),
    (
        "quantize: {format: int4_awq, group_size: 48}",
        "quantize.group_size: 48 is not valid; write 64 (valid: 32, 64, 128)",
    ),
    (
        "quantize: {format: fp8, kv_cache: fp4}",
        "quantize.kv_cache: 'fp4' is not valid; write 'nvfp4' (valid: none, fp8, int8, nvfp4)",
    ),
    ("quantize: {format: fp8, exclude: lm_head}", "quantize.exclude: 'lm_head' is not a list; write [lm_head]"),
    ("quantize: {format: null}", "quantize.format: None is not valid; valid: fp32, fp16, bf16"),
    (
        "prune: {method: depht, blocks: 2}",
        "prune.method: 'depht' is not valid; write 'depth' (valid: magnitude, wanda, sparsegpt, movement, depth,",
    ),
    ("prune: {method: magnitude, sparsity: 1.5}", "prune.sparsity: 1.5 should be less than 1"),
    ("prune: {method: sparsegpt, sparsity: 0}", "prune.sparsity: 0 should be greater than 0"),
    ("prune: {method: wanda, sparsity: half}", "prune.sparsity: 'half' should be a valid number"),
    ("prune: {method: wanda, sparsity: 0.5, patern: '2:4'}", "prune.patern: unknown key 'patern'; write 'pattern'"),
    ("prune: {method: wanda, pattern: dense}", "prune.pattern: 'dense' is no pattern; write 'unstructured', or n:m in"),
    ("prune: {method: wanda, pattern: '0:4'}", "prune.pattern: '0:4' is no pattern; write 'unstructured', or n:m in"),
    ("prune: {method: wanda, pattern: '4:4'}", "prune.pattern: '4:4' keeps 4 of each 4 weights, so it zeroes none;"),
    ("prune: {method: wanda, pattern: '8:4'}", "prune.pattern: '8:4' keeps 8 of each 4 weights, so it zeroes none;"),
    ("prune: {method: wanda, pattern: 2:4}", "prune.pattern: 124 is how YAML reads 2:4 without quotes; write '2:4'"),
    (
        "prune: {method: sparsegpt, pattern: '2:4', sparsity: 0.6}",
        "prune.sparsity: 0.6 is not what '2:4' zeroes, 0.5; leave it out, or the pattern",
    ),
    ("prune: {method: width, ffn: 1}", "prune.ffn: 1 should be less than 1"),
    ("prune: {method: width, hidden: -0.1}", "prune.hidden: -0.1 should be greater than 0"),
    ("prune: {method: width, kv_groups: 0}", "prune.kv_groups: 0 should be greater than or equal to 1"),
    ("prune: {method: width, heads: 1}", "prune.heads: unknown key 'heads'; valid: ffn, hidden, kv_groups, method"),
    (
        "prune: {method: wanda, pattern: '2:4', allocation: sensitivity}",
        "prune.allocation: 'sensitivity' shares out what '2:4' fixes for every layer; write 'uniform'",
    ),
    ("prune: {method: depth, blocks: 0}", "prune.blocks: 0 should be greater than or equal to 1"),
    ("distill: {tokens: 9, loss: kl}", "distill.loss: 'kl' is not valid; valid: forward_kl, reverse_kl"),
    ("distill: {tokens: 9, schedule: cosin}", "distill.schedule: 'cosin' is not valid; write 'cosine' (valid: cosine,"),
    ("distill: {tokens: 9, warmup: 1}", "distill.warmup: 1 should be less than 1"),
    ("distill: {tokens: 9, text: 5}", "distill.text: 5 is not how YAML reads a text without quotes; write '5'"),
    ("distill: {tokens: 9, text: []}", "has no text; write text: builtin, the path of a file, or generate: a number"),
    ("distill: {tokens: 9, batch_size: 6, gradient_accumulation: 2, processes: 2}", "write a multiple of 4"),
    ("distill: {tokens: 9, hidden_weight: 1, stored_logits: 8}", "but hidden states are not stored; remove one"),
    ("distill: {tokens: many}", "distill.tokens: 'many' should be a valid integer"),
    ("calibrate: {samples: 1.5}", "calibrate.samples: 1.5 should be a valid integer"),
    ("accept: {min_recovery: 95}", "accept.min_recovery: 95 should be less than or equal to 1"),
    ("accept: {min_recovery: .nan}", "accept.min_recovery: nan should be a finite number"),
    ("engine: {backend: tensorrt}", "engine.backend: 'tensorrt' is not valid; valid: torch, trtllm,"),
    # a mix of calibration text
    ("calibrate: {text: 5}", "calibrate.text: 5 is not how YAML reads a text without quotes; write '5'"),
    ("calibrate: {text: []}", "names no source of text; write text: builtin, or a list of sources"),
    ("calibrate: {text: {text: a.txt}}", "calibrate.text: {'text': 'a.txt'} is not a list; write [{text: a.txt}]"),
    ("calibrate: {text: [a.txt]}", "calibrate.text.0: 'a.txt' is a text without its field; write {text: a.txt}"),
    ("calibrate: {text: [{text: a}, {txt: b}]}", "calibrate.text.1.txt: unknown key 'txt'; write 'text' (valid:"),
    ("calibrate: {text: [{weight: 2}]}", "calibrate.text.0.text: is required"),
    ("calibrate: {text: [{text: a, weight: 0}]}", "calibrate.text.0.weight: 0 should be greater than 0"),
    ("calibrate: {text: [{text: a, weight: .inf}]}", "calibrate.text.0.weight: inf should be a finite number"),
    ("calibrate: {text: [{text: a}, {text: a, weight: 2}]}", "names 'a' twice; write it once, with a larger weight"),
    ("calibrate: {text: 'hf:'}", "names no dataset after 'hf:'; write hf:owner/name, or hf: and a folder"),
    ("calibrate: {text: [{text: a.txt, split: test}]}", "which only a dataset has; write text: 'hf:owner/name'"),
    # what belongs together
    ("quantize: {format: mixed}", "has format 'mixed' and no effective_bits; write effective_bits: 4 to 8"),
    (
        "quantize: {format: fp8, effective_bits: 6}",
        "has effective_bits, which only format 'mixed' has; remove it, or write format: mixed",
    ),
    *(
        (
            f"quantize: {{format: {form}, scale_search: mse}}",
            f"has scale_search 'mse', but format '{form}' has no scales to search; remove it",
        )
        for form in ("fp32", "fp16", "bf16")
    ),
    (
        "quantize: {format: int4_gptq, method: nearest}",
        "has method 'nearest', which format 'int4_gptq' has no choice of; write format: int4_rtn",
    ),
    ("quantize: {format: fp8, method: nearest}", "'nearest', which format 'fp8' has no choice of; remove it"),
    (
        "quantize: {format: nvfp4, method: nearest, scale_search: mse}",
        "has method 'nearest' and scale_search 'mse', which is another; remove one",
    ),
    (
        "quantize: {format: bf16, exclude_sensitive: 2}",
        "has exclude_sensitive, but format 'bf16' quantizes no layer; remove it",
    ),
    ("prune: {method: movement, sparsity: 0.85}", "prune.method: 'movement' prunes while training; add distill:"),
    ("prune: {method: movement, sparsity: 1}", "prune.sparsity: 1 should be less than 1"),
    ("prune: {method: movement, penalty: 0}", "prune.penalty: 0 should be greater than 0"),
    ("prune: {method: movement}", "has neither sparsity nor penalty; write one: sparsity, the share of zeros, or"),
    ("prune: {method: movement, sparsity: 0.5, penalty: 1}", "has sparsity and penalty; write one: sparsity"),
    ("prune: {method: movement, penalty: 1, scores: magnitude}", "are not learned, and a penalty on them; write spars"),
    (
        "distill: {tokens: 9, quantization_aware: true}",
        "distill.quantization_aware: true needs a format; add quantize: {format: int4_rtn} (or int8_wo, fp8,",
    ),
    *(
        (
            f"{{distill: {{tokens: 9, quantization_aware: true}}, quantize: {{format: {form}}}}}",
            f"distill.quantization_aware: true: format '{form}' is not rounded to nearest by the weights alone, and "
            f"cannot be trained with; write one of: int8_wo, fp8, fp8_gptq, fp8_per_channel, int4_rtn, nvfp4, "
            f"nvfp4_wo, mxfp4, mxfp4_wo",
        )
        for form in ("bf16", "int8_sq", "int4_awq", "int4_gptq", "w4a8_awq")
    ),
    (
        "{distill: {tokens: 9, quantization_aware: true}, quantize: {format: fp8, scale_search: mse}}",
        "quantize.scale_search: mse is decided by what is measured after training; remove one",
    ),
    (
        "{distill: {tokens: 9, quantization_aware: true}, quantize: {format: fp8, exclude_sensitive: 1}}",
        "quantize.exclude_sensitive is decided by what is measured after training; remove one",
    ),
    ("quantize: {format: fp8, sequential: true}",
     "has sequential, and format 'fp8' has no GPTQ; remove it (with GPTQ: fp8_gptq, int4_gptq"),
    ("quantize: {format: int4_awq, damping: 0.1}", "has damping, and format 'int4_awq' has no GPTQ"),
    ("quantize: {format: int4_gptq, sequential: false, asymmetry: 0.25}",
     "has asymmetry, which only sequential GPTQ has; remove it, or"),
    ("quantize: {format: int4_gptq, asymmetry: 2}", "quantize.asymmetry: 2 should be less than or equal to 1"),
    ("quantize: {format: int4_gptq, damping: 0}", "quantize.damping: 0 should be greater than 0"),
    ("quantize: {format: mixed, effective_bits: 3}", "quantize.effective_bits: 3 should be greater than or equal to 4"),
    ("prune: {method: width}", "has method 'width' and nothing to remove; write ffn, kv_groups or hidden"),
    # what is missing
    ("quantize: {group_size: 64}", "quantize.format: is required"),
    ("prune: {blocks: 2}", "prune.method: is required"),
    ("prune: {method: depth}", "prune.blocks: is required"),
    ("prune: {method: wanda}", "prune.sparsity: is required"),
    # not a recipe at all
    ("- quantize", "the recipe must be a mapping of fields, got list"),
    ("fp8", "the recipe must be a mapping of fields, got str"),
    ("quantize: {", "the recipe is not valid YAML or JSON: while parsing a flow"),
    ("quantize: 8", "quantize: 8 is not a mapping; write its fields: asymmetry, damping, effective_bits, exclude,"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), BAD, ids=[text for text, _ in BAD])
def test_bad_recipe(text, message):
    with pytest.raises(InputError) as caught:
        Recipe.parse(text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value), "one sentence, which a log keeps on one line"


def test_every_fault_is_named():
    with pytest.raises(InputError) as caught:
        Recipe.parse("{quantize: {format: fp9}, prune: {method: depth, blocks: -1}, extra: 1}")
    assert all(field in str(caught.value) for field in ("quantize.format", "prune.blocks", "extra"))


@pytest.mark.parametrize("form", ["nvfp4", "nvfp4_wo", "mxfp4", "mxfp4_wo"])
def test_fp4_is_calibrated_unless_it_is_to_be_nearest(form):
    asked = {"format": form}, {"format": form, "method": "nearest"}
    found, nearest = (Recipe.parse({"quantize": quantize}).quantize for quantize in asked)
    assert found.needs_grams and found.needs_statistics and found.searches_scales(form)
    assert not nearest.needs_grams and not nearest.searches_scales(form) and not nearest.channels(form)
    assert nearest.needs_statistics is (FORMATS[form].storage.inputs is not None)


@pytest.mark.parametrize("asked", [{}, {"method": "nearest"}])
def test_what_was_trained_with_nearest_numbers_is_stored_in_them(asked):
    recipe = {"distill": {"tokens": 9, "quantization_aware": True}, "quantize": {"format": "nvfp4_wo", **asked}}
    found = Recipe.parse(recipe)
    assert found.quantize.method == "nearest" and not found.quantize.needs_grams
    assert Recipe.parse(found.to_dict()) == found
    assert Recipe.parse({"quantize": {"format": "nvfp4_wo"}, "distill": {"tokens": 9}}).quantize.method is None


@pytest.mark.parametrize("form", [f for f in Format.__args__ if f not in ("fp32", "fp16", "bf16")])
def test_every_other_format_has_scales_to_search(form):
    bits = ", effective_bits: 5" if FORMATS[form].mixes else ""
    settings = Recipe.parse(f"quantize: {{format: {form}, scale_search: mse{bits}}}").quantize
    assert settings.needs_statistics and all(map(settings.searches_scales, settings.layer_formats))


@pytest.mark.parametrize(
    ("text", "title"),
    [
        ("{}", "unchanged (bf16)"),
        ("{name: mine, quantize: {format: fp8}}", "mine"),
        ("quantize: {format: fp8, kv_cache: fp8}", "fp8 + fp8 KV"),
        ("quantize: {format: bf16, kv_cache: nvfp4}", "bf16 + nvfp4 KV"),
        ("quantize: {format: mixed, effective_bits: 5.5}", "mixed 5.5 bits"),
        ("quantize: {format: nvfp4, method: nearest}", "nvfp4, to nearest"),
        ("prune: {method: magnitude, sparsity: 0.5}", "magnitude 50 %"),
        ("prune: {method: wanda, sparsity: 0.667}", "wanda 66.7 %"),
        ("prune: {method: sparsegpt, pattern: '2:4'}", "sparsegpt 2:4"),
        ("prune: {method: depth, blocks: 4, contiguous: true}", "-4 blocks in a row"),
        ("prune: {method: width, ffn: 0.25}", "-25 % FFN"),
        (
            "{prune: {method: width, ffn: 0.3, kv_groups: 2, hidden: 0.125}, quantize: {format: fp8}}",
            "-30 % FFN, -2 KV groups, -12.5 % hidden + fp8",
        ),
        ("{prune: {method: movement, sparsity: 0.85}, distill: {tokens: 9}}", "movement 85 % + distill 9 tokens"),
        ("{prune: {method: movement, penalty: 2}, distill: {tokens: 9}}", "soft movement + distill 9 tokens"),
        ("{prune: {method: movement, sparsity: 0.5, scores: magnitude}, distill: {tokens: 9}}",
         "gradual magnitude 50 % + distill 9 tokens"),
        ("{distill: {tokens: 9, quantization_aware: true}, quantize: {format: nvfp4}}",
         "distill 9 tokens, rounded + nvfp4"),
        ("prune: {method: wanda, sparsity: 0.5, allocation: sensitivity}", "wanda 50 % by sensitivity"),
        ("{prune: {method: depth, blocks: 4}, distill: {tokens: 65536}}", "-4 blocks + distill 65,536 tokens"),
    ],
)
def test_title(text, title):
    assert Recipe.parse(text).title == title


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [
        ("quantize: {format: fp8}", "quantize: {format: fp8, group_size: 64}", True),  # a default, written out
        ("quantize: {format: fp8}", "{name: mine, quantize: {format: fp8}}", True),
        ("quantize: {format: fp8}", "{quantize: {format: fp8}, accept: {min_recovery: 0.5}}", True),
        ("quantize: {format: fp8}", "quantize: {format: fp8, kv_cache: fp8}", False),
        ("quantize: {format: fp8}", "{quantize: {format: fp8}, engine: {max_batch_size: 1}}", False),
        ("quantize: {format: fp8}", "{quantize: {format: fp8}, calibrate: {samples: 16}}", False),
    ],
)
def test_digest(first, second, same):
    assert (Recipe.parse(first).digest == Recipe.parse(second).digest) == same


def test_a_mix_reads_back_and_a_single_text_stays_one():
    mix = "[{text: 'hf:a/b', config: en, field: messages, weight: 3}, {text: 'hf:a/b', config: de}, {text: builtin}]"
    recipe = Recipe.parse(f"calibrate: {{text: {mix}}}")
    assert Recipe.parse(recipe.to_yaml()) == Recipe.parse(recipe.to_json()) == recipe
    assert [source.title for source in recipe.calibrate.sources] == ["hf:a/b en train", "hf:a/b de train", "builtin"]
    assert [source.dataset for source in recipe.calibrate.sources] == ["a/b", "a/b", None]
    single = Recipe.parse("calibrate: {text: a.txt}").calibrate
    assert single.model_dump(mode="json")["text"] == "a.txt"
    assert [(source.text, source.weight) for source in single.sources] == [("a.txt", 1.0)]


def test_a_recipe_without_a_mix_has_the_digest_it_had_before_there_were_mixes():
    assert Recipe().digest == "336a21512babc2c7d59ff250b169b54a5633b371a82e2c5945d975625cbf8fcd"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{workload: {recorded: x, drift: 1}}", "workload.drift: 1 should be greater than 1"),
        ("{workload: {recorded: x, dirft: 2}}", "workload.dirft: unknown key 'dirft'; write 'drift'"),
        ("{workload: {recorded: x, days: 0}}", "workload.days: 0 should be greater than 0"),
        ("{workload: {concurency: 2}}", "workload.concurency: unknown key 'concurency'; write 'concurrency'"),
        ("{workload: {total: 9}}", "total: 9 is less than the longest input or output; write 4096 or more"),
        ("{workload: {recorded: x}, engine: {max_seq_len: 9}}", "engine.max_seq_len: is planned from the workload"),
    ],
)
def test_bad_workloads(text, message):
    with pytest.raises(InputError) as error:
        Recipe.parse(text)
    assert message in str(error.value)


def test_a_workload_is_no_part_of_what_a_recipe_makes():
    assert Recipe.parse("{workload: {recorded: x}}").digest == Recipe().digest
    assert Recipe.parse(Recipe.parse("{workload: {recorded: x, days: 7}}").to_json()).workload.days == 7
