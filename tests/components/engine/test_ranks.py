"""A checkpoint for trtllm-build: the ranks hold the export's tensors, and what ModelOpt itself writes."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from standins.recombine import recombine

from trimtab.base.errors import Failure
from trimtab.components.engine.trtllm import ranks
from trimtab.recipe import Engine
from trimtab.runtime.checkpoint import layer_layout
from trimtab.runtime.checkpoint.model_files import Export

GROUPED = ("int4_awq", "int4_gptq", "w4a8_awq")
PARTS = {
    "weights_scaling_factor": "weight_scale",
    "weights_scaling_factor_2": "weight_scale_2",
    "activation_scaling_factor": "input_scale",
    "prequant_scaling_factor": "pre_quant_scale",
}


def engine(tensor: int = 1, pipeline: int = 1) -> Engine:
    return Engine(backend="trtllm-legacy", tensor_parallel_size=tensor, pipeline_parallel_size=pipeline)


# The tiny model has four blocks, four attention heads and two KV heads: four ranks share KV heads in pairs.
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (4, 2)])
@pytest.mark.parametrize(
    ("form", "settings"),
    [
        ("bf16", {}),
        ("int8_wo", {}),
        ("int8_sq", {"kv_cache": "int8"}),
        ("fp8", {"kv_cache": "fp8"}),
        ("fp8", {"exclude": ("lm_head", "*.down_proj")}),
        ("int4_awq", {}),
        ("int4_gptq", {}),
        ("w4a8_awq", {}),
    ],
)
def test_ranks_recombine_to_the_export(export, tmp_path, form, settings, tensor, pipeline):
    folder = export(form, **settings)
    if form in GROUPED and tensor == 4:  # the 64 inputs of o_proj have two groups
        with pytest.raises(Failure, match="4: 2 columns cannot be shared out among 4 ranks"):
            ranks.convert(folder, tmp_path, engine(tensor, pipeline))
        return
    document = ranks.convert(folder, tmp_path, engine(tensor, pipeline))
    assert document["mapping"] == {"world_size": tensor * pipeline, "tp_size": tensor, "pp_size": pipeline}
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == ["config.json", *(f"rank{n}.safetensors" for n in range(tensor * pipeline))]
    source, found = Export(folder), recombine(tmp_path)
    for name in source.names:
        layer, _, part = name.rpartition(".")
        if part in layer_layout.SCALES or name.endswith(("k_scale", "v_scale")) or layer in source.layers:
            continue
        assert torch.equal(found.pop(name), source.tensor(name)), name
    assert torch.equal(found.pop("lm_head.weight"), source.tensor("model.embed_tokens.weight"))
    for layer in source.layers:
        stored = source.layer(layer)
        weight = found.pop(f"{layer}.weight")
        if form == "int8_wo":  # trtllm-build rounds anew
            assert torch.equal(weight, layer_layout.dequantize(stored).bfloat16())
            continue
        assert torch.equal(weight.view(torch.uint8), stored.weight.view(torch.uint8)), layer
        for theirs, ours in PARTS.items():
            scale, own = found.pop(f"{layer}.{theirs}", None), stored.tensors.get(ours)
            if own is None and ours == "pre_quant_scale" and scale is not None:
                own = torch.ones(stored.shape[1])  # folded into the norm before
            if own is not None and ours == "weight_scale_2" and ".self_attn." in layer and "o_proj" not in layer:
                block = layer.rpartition(".")[0]
                own = torch.stack([source.tensor(f"{block}.{p}_proj.weight_scale_2") for p in "qkv"]).max()
            assert (scale is None) == (own is None), (layer, theirs)
            assert own is None or torch.equal(scale.float().flatten(), own.float().flatten()), (layer, theirs)
    caches = {name for name in found if "cache_scaling_factor" in name}
    assert found.keys() == caches and len(caches) == (3 * 4 if settings.get("kv_cache") else 0)


def test_the_scales_of_a_kv_cache(export, tmp_path):
    folder = export("fp8", kv_cache="fp8")
    ranks.convert(folder, tmp_path, engine(2))
    source, found = Export(folder), recombine(tmp_path)
    for n in range(4):
        attention = f"model.layers.{n}.self_attn"
        key, value = (source.tensor(f"{attention}.{p}_proj.{p}_scale").item() for p in "kv")
        names = ("k_cache", "v_cache", "kv_cache")
        scales = [found[f"{attention}.{name}_scaling_factor"].item() for name in names]
        assert scales == [key, value, max(key, value)]


@pytest.mark.parametrize(
    ("form", "settings", "quantization"),
    [
        ("bf16", {}, {"quant_algo": None, "kv_cache_quant_algo": None}),
        ("fp8", {"kv_cache": "fp8"},
         {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}),
        ("fp8", {"exclude": ("lm_head", "*.down_proj", "model.layers.2.self_attn.[qkv]_proj")},
         {"quant_algo": "FP8", "kv_cache_quant_algo": None,
          "exclude_modules": ["lm_head", "transformer.layers.2.attention.qkv", "transformer.layers.*.mlp.proj"]}),
        ("int4_awq", {},
         {"quant_algo": "W4A16_AWQ", "kv_cache_quant_algo": None, "group_size": 32, "has_zero_point": False,
          "pre_quant_scale": True, "exclude_modules": ["lm_head"]}),
    ],
)  # fmt: skip
def test_config(export, tmp_path, form, settings, quantization):
    document = ranks.convert(export(form, **settings), tmp_path, engine())
    assert json.loads((tmp_path / "config.json").read_text()) == document
    assert document["quantization"] == quantization
    expected = {
        "architecture": "LlamaForCausalLM", "dtype": "bfloat16", "vocab_size": 300, "hidden_size": 64, "head_size": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "rotary_base": 10000.0,
        "max_position_embeddings": 2048, "num_hidden_layers": 4,
    }  # fmt: skip
    assert {name: document[name] for name in expected} == expected


def test_rotary_scaling_in_both_spellings():
    from trimtab.components.engine.trtllm.rank_config import config

    base = {
        "architectures": ["LlamaForCausalLM"], "vocab_size": 8, "max_position_embeddings": 8, "hidden_size": 8,
        "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8,
    }  # fmt: skip
    old = {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    new = {"rope_parameters": {"rope_theta": 500000.0, "rope_type": "llama3", "factor": 8.0}}
    for spelling in (old, new):
        found = config({**base, **spelling}, {}, engine())
        assert found["rotary_base"] == 500000.0
        assert found["rotary_scaling"] == {"factor": 8.0, "rope_type": "llama3", "type": "llama3"}


@pytest.mark.parametrize(
    ("form", "settings", "parallel", "message"),
    [
        ("mixed", {"effective_bits": 6}, (1, 1), "trtllm-build takes one format a model, not W4A16_AWQ, W8A16"),
        ("fp8", {"exclude": ("lm_head", "*.q_proj")}, (1, 1), "are one product in TensorRT-LLM and stored differently"),
        ("fp8", {"exclude": ("lm_head", "model.layers.2.*")}, (1, 2), "attention.qkv is quantized in some blocks only"),
        ("bf16", {}, (3, 1), "engine.tensor_parallel_size: 3: 64 rows in 4 runs cannot be shared out among 3 ranks"),
        ("bf16", {}, (1, 3), "3 stages do not divide 4 blocks"),
    ],
)
def test_what_the_format_cannot_express(export, tmp_path, form, settings, parallel, message):
    with pytest.raises(Failure) as failure:
        ranks.convert(export(form, **settings), tmp_path, engine(*parallel))
    assert failure.value.failure_class == "unsupported" and message in failure.value.reason
    assert not (tmp_path / "config.json").exists()


def test_layers_of_one_product_get_the_largest_scale():
    def layer(*numbers: float, scale: float) -> dict[str, torch.Tensor]:
        weight = torch.tensor([numbers]).to(torch.float8_e4m3fn)
        return {"weight": weight, "weight_scale": torch.tensor(scale), "input_scale": torch.tensor(scale / 2)}

    first, second = ranks.unite([layer(2, 448, scale=0.5), layer(4, -7, scale=0.25)])
    assert first["weight"].float().tolist() == [[2, 448]] and second["weight"].float().tolist() == [[2, -3.5]]
    assert first["weight_scale"].item() == second["weight_scale"].item() == 0.5
    assert first["input_scale"].item() == second["input_scale"].item() == 0.25


def test_inputs_that_are_scaled_differently_within_one_product_are_a_damaged_export(export, tmp_path):
    folder = tmp_path / "export"
    shutil.copytree(export("int4_awq"), folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.pre_quant_scale"] = torch.full((64,), 2.0, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(Failure, match=r"v_proj are one product in TensorRT-LLM, and their pre_quant_scale differ"):
        ranks.convert(folder, tmp_path / "ranks", engine(2))


def test_finished_ranks_are_kept(export, tmp_path):
    ranks.convert(export("fp8"), tmp_path, engine(2))
    first = (tmp_path / "rank0.safetensors").stat().st_mtime_ns
    (tmp_path / "rank1.safetensors").unlink()
    ranks.convert(export("fp8"), tmp_path, engine(2))
    assert (tmp_path / "rank0.safetensors").stat().st_mtime_ns == first and (tmp_path / "rank1.safetensors").exists()


def _scaled(name: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    scale = tensors.get(name.replace(".weight", ".weights_scaling_factor")) if name.endswith(".weight") else None
    return tensors[name].float() * (1 if scale is None else scale)


@pytest.mark.parametrize("parallel", [(1, 1), (2, 1), (1, 2)])
def test_modelopt_writes_the_same_for_fp8(tmp_path, parallel):
    """ModelOpt's own exporters, of the unified and of TensorRT-LLM's checkpoint, are given one quantized model."""
    import copy

    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint, export_tensorrt_llm_checkpoint
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    windows = torch.randint(3, 128, (2, 16))
    settings = copy.deepcopy(mtq.FP8_DEFAULT_CFG)
    settings["quant_cfg"] += copy.deepcopy(mtq.FP8_KV_CFG["quant_cfg"])
    model = mtq.quantize(LlamaForCausalLM(config).bfloat16().eval(), settings, lambda m: m(windows))
    export_tensorrt_llm_checkpoint(
        copy.deepcopy(model), "llama", torch.bfloat16, tmp_path / "theirs", *parallel
    )
    export_hf_checkpoint(model, export_dir=tmp_path / "export")
    document = ranks.convert(tmp_path / "export", tmp_path / "ours", engine(*parallel))
    for path in sorted((tmp_path / "theirs").glob("rank*.safetensors")):
        theirs, ours = load_file(path), load_file(tmp_path / "ours" / path.name)
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            # ModelOpt raises scales of an FP8 KV cache to 1 here, and keeps them in the unified checkpoint.
            if "cache_scaling" not in name:
                assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape, name
                found, expected = (_scaled(name, tensors) for tensors in (ours, theirs))
                # Of gate and up ModelOpt's unified checkpoint has one scale, of q, k and v three, the other format the
                # other way round: what is rounded to another scale may become a neighbour, an eighth away.
                rtol = 2**-3 if tensor.dtype == torch.float8_e4m3fn else 0.0
                if "weights_scaling" not in name:
                    assert torch.allclose(found, expected, rtol=rtol, atol=1e-5), name
    theirs = json.loads((tmp_path / "theirs" / "config.json").read_text())
    shared = document.keys() & theirs.keys() - {"logits_dtype"}  # they write float16, the format's default is float32
    assert {name: document[name] for name in shared} == {name: theirs[name] for name in shared} and len(shared) > 15
