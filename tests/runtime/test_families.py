"""Every family against transformers' own modules, and every causal language model of transformers: known or refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import decoders
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from trimtab import families
from trimtab.base.errors import Failure, InputError
from trimtab.model.facts import inspect
from trimtab.runtime.checkpoint import model_files, skeleton
from trimtab.runtime.parallel import shards
from trimtab.runtime.rounding import folding

#: Wrappers are in `test_wrappers.py`.
ALONE = {name: family for name, family in families.BY_TYPE.items() if not family.wrapper}
TYPES = list(ALONE)
LATENT = [name for name, family in ALONE.items() if isinstance(family.attention, families.LatentAttention)]
EXPERTS = [name for name, family in ALONE.items() if family.experts]
STACKED = ("gpt_oss", "llama4_text", "granitemoe", "granitemoeshared", "granitemoehybrid")
TOKENS = torch.randint(3, 300, (1, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_names_are_those_of_transformers(model_type: str) -> None:
    family = families.BY_TYPE[model_type]
    with torch.device("meta"):
        model = skeleton.as_stored(decoders.build(model_type), family)
    blocks = model.get_submodule(family.blocks)
    assert len(blocks) == decoders.LAYERS
    found = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and family.place(name)[1] != name]
    assert {name for name in found if not family.layer(name)} == {name for name in found if family.stays_plain(name)}
    described = {family.layer(name).name for name in found if family.layer(name)}
    assert described == family.layers.keys() - ({"self_attn.q_proj"} if family.experts and model_type in LATENT else ())
    if not family.experts and not family.recurrent:
        assert set(found) == {f"{family.blocks}.{n}.{layer}" for n in range(len(blocks)) for layer in family.layers}
    assert model.get_submodule(family.embedding) is model.get_input_embeddings()
    assert model.get_submodule(family.head) is model.get_output_embeddings()
    assert [*model.get_submodule(family.last_norm).parameters()] or family.norm == "none"
    for block in blocks:
        attention = getattr(block, family.attention.module, None)
        named = [attention.get_submodule(norm) for norm in family.attention.head_norms] if attention else []
        named += [block.get_submodule(shared.norm) for shared in family.inputs if shared.norm]
        if family.experts and hasattr(block, family.experts.module):
            part = block.get_submodule(family.experts.module)
            plain = family.experts.plain if hasattr(part, family.experts.experts) else ()
            named += [part.get_submodule(name) for name in plain]
        assert all([*norm.parameters()] for norm in named)


@pytest.mark.parametrize("model_type", [
    "llama", "qwen2", "gemma2", "granite", "cohere", "starcoder2", "opt", "olmo2", "glm4", "phi", "qwen3_next", "lfm2",
])  # fmt: skip
def test_what_divides_the_rows_of_the_layer_before_multiplies_the_columns(model_type: str, tmp_path: Path) -> None:
    """Values and attention's output, up and down behind a gate: the model computes the same, whatever the factors."""
    family = families.BY_TYPE[model_type]
    model, _ = model_files.load(decoders.write(tmp_path / "model", model_type), torch.float32)
    config, draw = model.config, torch.Generator().manual_seed(0)
    head_dim = getattr(config, "head_dim", None) or decoders.HIDDEN // decoders.HEADS
    with torch.no_grad():
        expected, changed = model(TOKENS).logits, 0
        for name, behind in model.named_modules():
            maker = family.layer_before(name) if isinstance(behind, nn.Linear) else None
            if maker is None:
                continue
            before = model.get_submodule(maker)
            rows = torch.rand(before.out_features, generator=draw) + 0.5
            before.weight /= rows[:, None]
            if before.bias is not None:
                before.bias /= rows
            behind.weight *= folding.widened(rows, behind.in_features, head_dim)
            changed += 1
        assert changed and torch.allclose(model(TOKENS).logits, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("model_type", ["olmo", "olmoe"])
def test_rows_of_values_that_a_config_may_limit_are_not_divided(model_type: str) -> None:
    """`clip_qkv` limits what comes out of them, so a model whose values are divided is another."""
    model = decoders.build(model_type, clip_qkv=0.05)
    family, attention = families.BY_TYPE[model_type], model.model.layers[0].self_attn
    assert family.layer_before("model.layers.0.self_attn.o_proj") is None
    with torch.no_grad():
        expected = model(TOKENS).logits
        attention.v_proj.weight /= 4
        attention.o_proj.weight *= 4
        assert (model(TOKENS).logits - expected).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", TYPES)
def test_a_checkpoint_is_what_the_family_says(model_type: str, tmp_path: Path) -> None:
    """Shapes by what the features are; and the numbers that transformers' own cache keeps of a token."""
    family = families.BY_TYPE[model_type]
    facts = inspect(decoders.write(tmp_path, model_type))
    kv = facts.kv_heads * facts.head_dim
    dense = 4 * decoders.HIDDEN if model_type in decoders.WIDE else decoders.NEURONS
    config = decoders.config(model_type).to_dict()
    sizes = {"hidden": decoders.HIDDEN, "attention": decoders.HIDDEN, "kv": kv, "qkv": decoders.HIDDEN + 2 * kv,
             "ffn": dense, "gate_up": 2 * dense, "expert": facts.expert_size,
             "shared": {"qwen2_moe": 96, "llama4_text": 64, "qwen3_next": 96,
                       "qwen3_5_moe_text": 96, "nemotron_h": 96,
                       "hunyuan_v1_moe": decoders.NEURONS}.get(model_type, decoders.EXPERT)}  # fmt: skip
    if facts.latent_numbers:
        turned, rank, heads = config["qk_rope_head_dim"], config["kv_lora_rank"], decoders.HEADS
        each = config["qk_nope_head_dim"] + config["v_head_dim"]
        sizes |= {"query_latent": config["q_lora_rank"], "kv_latent": rank, "kv_latent_rotary": rank + turned,
                  "kv_heads": heads * each, "attention": heads * (config["qk_nope_head_dim"] + turned),
                  "values": heads * config["v_head_dim"]}  # fmt: skip
    sizes |= {"attention_gate": 2 * decoders.HIDDEN, "mixer": None, "mixer_in": None, "mixer_choice": None}
    for linear in facts.linears:
        layer = family.layer(linear.name)
        found, expected = (linear.out_features, linear.in_features), (sizes[layer.outputs], sizes[layer.inputs])
        assert all(size in (None, features) for size, features in zip(expected, found, strict=True)), linear.name
    with torch.inference_mode():
        output = decoders.build(model_type)(TOKENS[:, :4], use_cache=True)
    cache = output["cache_params" if "cache_params" in output else "past_key_values"]
    keeping = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    kept = sum(layer.keys.numel() + layer.values.numel() for layer in keeping) // 4
    assert facts.kv_heads * facts.head_numbers * facts.attention_blocks == kept
    states = [layer for layer in cache.layers if getattr(layer, "conv_states", {}).get(0) is not None]
    windows = sum(layer.conv_states[0].numel() for layer in states)
    recurrences = sum(layer.recurrent_states[0].numel() for layer in states if layer.recurrent_states[0] is not None)
    assert facts.recurrent_blocks * facts.state_bytes == 2 * windows + 4 * recurrences


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [*((name, {}) for name in TYPES), ("granitemoehybrid", {"num_local_experts": 0}), ("jamba", {"num_experts": 1}),
     ("granitemoeshared", {"shared_intermediate_size": 0})],
)  # fmt: skip
@torch.inference_mode()
def test_a_loaded_checkpoint_gives_the_logits_of_transformers(model_type: str, changes: dict, tmp_path: Path) -> None:
    """Over a text that is longer than windows, so that whatever looks at a part of it shows."""
    tokens = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(1))
    reference = decoders.as_written(model_type, **changes)
    loaded, _ = model_files.load(decoders.write(tmp_path, model_type, **changes), torch.float32)
    assert (loaded(tokens).logits - reference(tokens).logits).abs().max() <= 5e-4


@pytest.mark.parametrize("model_type", [name for name in EXPERTS if name not in STACKED])
def test_experts_are_stored_as_transformers_stores_them(model_type: str, tmp_path: Path) -> None:
    """Those that are left out store one tensor for all experts, which `fetch` takes apart."""
    model = decoders.build(model_type)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    if model_type == "nemotron_h":  # NVIDIA's own files have it as here
        saved["backbone.embeddings.weight"] = saved.pop("backbone.embedding.weight")
    found = decoders.stored(model)
    assert found.keys() == saved.keys()
    assert all(torch.equal(found[name], saved[name]) for name in saved)


@pytest.mark.parametrize("model_type", [name for name, family in ALONE.items() if family.folds])
@torch.inference_mode()
def test_a_scale_in_a_norm_is_made_up_for_by_the_layers_behind_it(model_type: str) -> None:
    """So nothing else reads what the norm makes, and the norm does nothing but multiply by its weight."""
    family = families.BY_TYPE[model_type]
    model = skeleton.as_stored(decoders.build(model_type), replace(family, experts=None))
    before = model(TOKENS).logits
    folded = 0
    for block in model.get_submodule(family.blocks):
        for shared in family.inputs:
            if shared.norm and {layer.name for layer in shared.layers} <= dict(block.named_modules()).keys():
                scale = torch.rand(decoders.HIDDEN) + 0.5
                norm = block.get_submodule(shared.norm)
                norm.weight.copy_((norm.weight + family.norm_offset) * scale - family.norm_offset)
                if family.norm.endswith(", b"):
                    norm.bias.mul_(scale)
                for layer in shared.layers:
                    block.get_submodule(layer.name).weight.div_(scale)
                folded += 1
    after = model(TOKENS).logits
    assert (folded == 0 and torch.equal(after, before)) or (after - before).norm() < 1e-4 * before.norm()


@pytest.mark.parametrize("model_type", ["smollm3", "exaone4", "cohere2", "llama"])
@torch.inference_mode()
def test_blocks_without_rotary_embeddings(model_type: str) -> None:
    family, model = families.BY_TYPE[model_type], decoders.build(model_type)
    hidden, size = torch.randn(1, 6, decoders.HIDDEN), decoders.HIDDEN // decoders.HEADS
    angles = [torch.randn(1, 6, size) for _ in range(2)]
    still = []
    for number, block in enumerate(model.get_submodule(family.blocks)):
        attend = block.get_submodule(family.attention.module)
        first, second = (attend(hidden, position_embeddings=(a, a.sin()), attention_mask=None)[0] for a in angles)
        if torch.equal(first, second):
            still.append(number)
    assert list(family.nope(model.config.to_dict())) == still


@pytest.mark.parametrize("model_type", TYPES)
def test_every_list_by_block_is_known(model_type: str) -> None:
    family, config = families.BY_TYPE[model_type], decoders.config(model_type)
    before = config.to_dict()
    changed = family.without_blocks(before, [0, 2])
    for name, value in changed.items():
        setattr(config, name, value)
    assert changed.pop(family.depth) == config.num_hidden_layers == 2
    for name in family.numbered:
        if before.get(name) is not None:
            assert changed.pop(name) == [[0, 2].index(block) for block in before[name] if block in (0, 2)]
    assert all(len(value) == 2 for value in changed.values() if isinstance(value, list))


@pytest.mark.parametrize("model_type", [name for name, family in ALONE.items() if family.tensor_parallel])
def test_what_tensor_parallelism_is_asked_of_can_be_split(model_type: str) -> None:
    changes = {"use_qk_norm": False} if model_type == "cohere" else {}
    with torch.device("meta"):
        model = decoders.build(model_type, **changes)
    cut = shards.cut(model, shards.Place(0, 2))
    family = families.BY_TYPE[model_type]
    assert {family.place(name)[1] for name in cut.rows} == set(family.row_parallel)


@pytest.mark.parametrize("model_type", [name for name in TYPES if not families.BY_TYPE[name].recurrent])
def test_blocks_that_are_shared_out_hand_on_one_tensor(model_type: str) -> None:
    family, model = families.BY_TYPE[model_type], decoders.build(model_type)
    seen: list[bool] = []
    model.get_submodule(family.blocks)[0].register_forward_hook(lambda _, __, out: seen.append(torch.is_tensor(out)))
    with torch.inference_mode():
        model(TOKENS[:, :3])
    assert seen == [family.pipeline_parallel]


def test_norms_with_a_row_for_each_head_are_not_split() -> None:
    with torch.device("meta"):
        model = decoders.build("cohere")
    with pytest.raises(Failure, match="tensor_parallel_size: 2: .*q_norm.weight has a row for each head.*; write 1"):
        shards.cut(model, shards.Place(0, 2))


#: What a refusal says of some that people have; the others are told that they are not described.
REASONS = {
    "dbrx": "has mixtures of experts", "deepseek_v32": "and attention over compressed keys",
    "zamba2": "has recurrent layers",
    "gpt2": "stores its layers transposed (Conv1D)",
    "gpt_neo": "lists which blocks have windows by repetition", "bitnet": "trains its weights as ternary numbers",
    "gemma4_text": "has blocks whose heads differ in number and size", "bert": "was made for encoders",
}  # fmt: skip


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_every_causal_language_model_is_known_or_refused_in_a_sentence(model_type: str) -> None:
    settings = {"model_type": model_type, "num_local_experts": 0}
    if model_type in families.BY_TYPE and families.BY_TYPE[model_type].wrapper:
        with pytest.raises(InputError, match="config.json: text_config is missing, which says what text model a"):
            families.of(settings)
        return
    if model_type in families.BY_TYPE:
        assert families.of(settings).model_type == model_type
        return
    with pytest.raises(InputError, match=f"config.json: model_type '{model_type}' .*; give a model of") as refused:
        families.of(settings)
    assert REASONS.get(model_type, "") in str(refused.value)
    assert "llama, mistral" in str(refused.value) and "\n" not in str(refused.value)


def test_no_model_type_is_made_up() -> None:
    assert {*families.BY_TYPE, *families.undescribed.BY_TYPE} <= set(CONFIG_MAPPING_NAMES)
    assert not families.BY_TYPE.keys() & families.undescribed.BY_TYPE.keys()
