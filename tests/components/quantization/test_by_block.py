"""GPTQ's way through a model: the Gram matrices that it rounds by, and what it moves outputs back to."""

from __future__ import annotations

import shutil
from pathlib import Path

import decoders
import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.base.errors import Failure
from trimtab.components.calibration.work import calibrate
from trimtab.components.quantization import by_block, work
from trimtab.components.quantization.groups import GroupQuantizer
from trimtab.components.quantization.methods import gptq
from trimtab.families.fusion import groups
from trimtab.model.facts import inspect
from trimtab.recipe import Quantization
from trimtab.runtime.checkpoint import experts, model_files, stream
from trimtab.runtime.checkpoint.layer_layout import dequantize
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.linear import choice
from trimtab.runtime.measure import blockwise, grams, observe, routing
from trimtab.runtime.measure.block import Block
from trimtab.runtime.measure.block_calls import BlockCalls, NotByBlock
from trimtab.runtime.measure.measurements import Measurements
from trimtab.runtime.rounding import hessian
from trimtab.runtime.rounding.scales import FP8, INT4, Numbers


def calibrated(source: Path, folder: Path) -> Path:
    folder.mkdir()
    calibrate(str(source), str(folder), "", {"samples": 8, "length": 32})
    return folder


def quantize(source: Path, calibration: Path, folder: Path, **settings) -> Path:
    (folder / "export").mkdir(parents=True)
    parameters = {"format": "int4_gptq", "group_size": 32, "sequential": True, **settings}
    trees = (str(source), str(calibration), None)
    work.quantize(*trees, str(folder / "export"), str(folder / "scratch"), parameters)
    return folder / "export"


@pytest.mark.parametrize(
    ("model_type", "form"),
    [("gemma2", "int4_gptq"), ("mixtral", "int4_gptq"), ("mixtral", "fp8_gptq"), ("qwen3_next", "int4_gptq")],
)
def test_rounded_at_once_it_is_what_the_whole_model_s_gram_matrices_give(model_type, form, tmp_path):
    """Also of experts that were given few tokens, in their blocks and those of a hybrid."""
    source = decoders.write(tmp_path / "model", model_type)
    calibration = calibrated(source, tmp_path / "calibration")
    export = quantize(source, calibration, tmp_path / "q", format=form, sequential=False)
    found = load_file(export / "model.safetensors")

    model, _ = model_files.load_for_measuring(source)
    tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()
    facts, layers = inspect(source), observe.linears(model)
    settings = gptq.with_defaults(Quantization(format=form, group_size=32), tokens.numel())
    family = model.family
    chosen = {layer.name: form for layer in facts.linears if not family.keeps(layer.name)}
    quantizer = GroupQuantizer(source, settings, chosen, Measurements(calibration, source, "calibration"))
    asked = [group for group in groups(list(layers), facts.model_type) if quantizer.form(group)]
    first = {group.layers[0]: layers[group.layers[0]] for group in asked}
    rare = routing.run_on_all(experts.mixtures(model), routing.recorded(calibration))
    with torch.inference_mode(), observe.grams(first) as sums, rare:
        for windows in observe.batches(model.device, tokens):
            model(windows, use_cache=False)
    compared = 0
    with torch.inference_mode():
        for group in asked:
            seen = quantizer.seen(group)
            gram = sums[group.layers[0]] / tokens.numel()
            whole = quantizer.quantize(Export(source), group, type(seen)(seen.amax, seen.second_moment, gram))
            for name, tensor in whole.tensors.items():
                one, other = (each.reshape(-1).view(torch.uint8) for each in (found[name], tensor.cpu()))
                different = (one != other).float().mean()
                assert different < 0.01, name  # numbers halfway between two
                compared += 1
    assert compared > 2 * len(asked)


def test_in_order_a_layer_is_rounded_for_the_inputs_that_it_gets(model, calibration, tmp_path, monkeypatch):
    """The Gram matrix of the last layer is that of a model with the export's weights in all layers before it."""
    seen: dict[str, torch.Tensor] = {}
    measure = grams.measure_beside

    def watch(block, layer, *how):
        found = measure(block, layer, *how)
        seen[layer] = found[0].clone()
        return found

    monkeypatch.setattr(grams, "measure_beside", watch)
    read, source = Export(quantize(model, calibration, tmp_path)), Export(model)
    whole, _ = model_files.load_for_measuring(model)
    layers, last = observe.linears(whole), "model.layers.3.mlp.down_proj"
    for group in groups(read.layers, "llama"):
        norm = f"{group.norm}.weight"
        change = read.tensor(norm).float() / source.tensor(norm).float() if group.norm else 1.0
        for layer in group.layers:
            layers[layer].weight.data.copy_(dequantize(read.layer(layer)) * change)
    tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()
    with torch.inference_mode(), observe.grams({last: layers[last]}) as sums:
        for windows in observe.batches(whole.device, tokens):
            whole(windows, use_cache=False)
    expected = sums[last] / tokens.numel()
    assert (seen[last] - expected).norm() < 0.01 * expected.norm()
    names = [name.removeprefix("model.layers.0.") for name in list(seen)[:4]]
    assert names == ["self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"], "as they are called"


class KeptRunner(blockwise.Runner):
    """Keeps what comes out of the last block."""

    def run(self, work):
        yield from super().run(work, through=True)
        stream = self.streams["hidden"]
        self.found = torch.cat([stream[number].clone() for number in range(len(stream))])


def comes_out(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What comes out of the last block, [windows, length, hidden]."""
    kept: list[torch.Tensor] = []
    handle = model.model.layers[-1].register_forward_hook(lambda _, __, output: kept.append(output.clone()))
    with torch.inference_mode():
        for windows in observe.batches(model.device, tokens):
            model(windows, use_cache=False)
    handle.remove()
    return torch.cat(kept)


@pytest.mark.parametrize(
    ("form", "layers"),
    [("fp8_gptq", ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")),
     ("nvfp4", ("self_attn.k_proj", "mlp.gate_proj"))],
)  # fmt: skip
def test_in_order_a_layer_computes_what_the_export_s_does(form, layers, model, calibration, tmp_path, monkeypatch):
    """Its input rounded too: without that FP8 is 3 % off, and NVFP4 10 %. Norms took what channels were scaled by."""
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    put = Block.replace

    def watch(block, layer, weight, reads):
        module = block.layers[layer]
        module.register_forward_hook(lambda _, args, output: seen.update({layer: (given.pop(), output)}))
        given: list[torch.Tensor] = []
        module.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        put(block, layer, weight, reads)

    monkeypatch.setattr(Block, "replace", watch)
    export = quantize(model, calibration, tmp_path, format=form)
    read, source = Export(export), Export(model)
    for layer in (f"model.layers.1.{name}" for name in layers):
        x, found = seen[layer]
        norm = next(group.norm for group in groups([layer], "llama"))
        if norm:
            x = x * read.tensor(f"{norm}.weight").float() / source.tensor(f"{norm}.weight").float()
        expected = choice.build(read.layer(layer), None, x.device)(x).float()
        assert (found - expected).norm() < 0.01 * expected.norm(), layer


def test_what_a_layer_lacks_is_what_rounding_took_and_a_part_of_the_way_to_the_dense_model():
    draw = torch.Generator().manual_seed(0)
    given, dense = (torch.randn(3, 20, 8, generator=draw).bfloat16() for _ in range(2))

    class FakeBlock:
        layers, dense, tokens = {"layer": torch.nn.Linear(8, 4)}, object(), 60

        def inputs(self, layer, beside):
            yield from zip(given, dense if beside else [None] * 3, strict=True)

    gram, lack = grams.measure_beside(FakeBlock(), "layer", 0.5, torch.round)
    x, seen, y = (rows.flatten(0, 1).float() for rows in (given, given.round(), dense))
    torch.testing.assert_close(gram, seen.t() @ seen / 60)
    torch.testing.assert_close(lack, (0.5 * (y - x) + x - seen).t() @ seen / 60, rtol=0.01, atol=0.01)
    FakeBlock.dense = None
    assert grams.measure_beside(FakeBlock(), "layer", 0.5)[1] is None


def naive_gptq(weight: torch.Tensor, gram: torch.Tensor, scale: torch.Tensor, numbers: Numbers) -> torch.Tensor:
    """A weight at a time: what is left of the inverse Hessian tells how the others make up for its error (OBS)."""
    order = gram.diagonal().argsort(descending=True).tolist()
    damped = gram.double() + gptq.DAMPING * gram.diagonal().double().mean() * torch.eye(len(gram))
    found = torch.empty_like(weight)
    for row in range(len(weight)):
        left, inverse = weight[row].double(), torch.linalg.inv(damped)
        for place in order:
            nearest = numbers.round(left[place] / scale[row, place]) * scale[row, place]
            found[row, place] = nearest
            lost = (left[place] - nearest) / inverse[place, place]
            left = left - lost * inverse[place]
            inverse = inverse - inverse[:, place, None] * inverse[place] / inverse[place, place]
            inverse[place, place] = 1.0  # of a column that is done
    return found


@pytest.mark.parametrize("numbers", [INT4, FP8], ids=["int4", "e4m3"])
def test_columns_make_up_for_the_rounding_of_those_before_them(numbers):
    """Over blocks of columns too: of 80 columns 64 are one."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(300, 80, generator=draw) * (1 + torch.arange(80)) + torch.randn(300, 1, generator=draw) * 20
    gram, weight = x.t() @ x / 300, torch.randn(6, 80, generator=draw)
    scale = (weight.abs().amax(1, keepdim=True) / numbers.largest).expand_as(weight)
    found, expected = gptq.round_weights(weight, gram, scale, numbers), naive_gptq(weight, gram, scale, numbers)
    assert ((found - expected).abs() < 1e-4).float().mean() > 0.98  # the others are halfway between two numbers
    errors = [((w - weight) @ gram * (w - weight)).sum() for w in (found, numbers.round(weight / scale) * scale)]
    assert errors[0] < 0.9 * errors[1]


def test_what_weights_are_moved_by_is_the_least_squares_solution():
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(500, 12, generator=draw), torch.randn(5, 12, generator=draw)
    y = x + 0.3 * torch.randn(500, 12, generator=draw) + 0.2 * x.roll(1, 1)
    gram, shift = x.t() @ x / 500, (y - x).t() @ x / 500
    moved = weight + hessian.solve(gram, 1e-6, weight @ shift)
    expected = torch.linalg.lstsq(x, y @ weight.t()).solution.t()
    torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-4)


def test_moved_outputs_are_nearer_to_the_dense_model_s(model, calibration, tmp_path, monkeypatch):
    runners: list[KeptRunner] = []
    monkeypatch.setattr(blockwise, "Runner", lambda *a, **k: runners.append(KeptRunner(*a, **k)) or runners[-1])
    tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()
    for asymmetry in (0.0, 1.0):
        quantize(model, calibration, tmp_path / str(asymmetry), asymmetry=asymmetry)
    ends = {asymmetry: runner.found for asymmetry, runner in zip((0.0, 1.0), runners, strict=True)}
    dense = comes_out(model_files.load_for_measuring(model)[0], tokens)
    errors = {asymmetry: float((found - dense).norm() / dense.norm()) for asymmetry, found in ends.items()}
    assert errors[1.0] < errors[0.0], errors


@pytest.mark.parametrize("settings", [{}, {"format": "mixed", "effective_bits": 6.0}, {"format": "nvfp4"}])
def test_a_kill_costs_the_open_block(settings, model, calibration, harms, tmp_path, monkeypatch):
    """And nothing as large as a Gram matrix stands in the scratch meanwhile: down_proj's takes 128 x 128 x 4 bytes."""
    worked: list[int] = []
    in_order = by_block._in_order

    def work_on(block, *args):
        worked.append(block.number)
        if len(worked) == 3:
            raise KeyboardInterrupt
        return in_order(block, *args)

    monkeypatch.setattr(blockwise, "PAUSE_OVER_WRITE", 0)
    monkeypatch.setattr(by_block, "_in_order", work_on)
    (tmp_path / "export").mkdir()
    parameters = {"format": "int4_gptq", "group_size": 32, "sequential": True, **settings}
    trees = (str(model), str(calibration), str(harms), str(tmp_path / "export"), str(tmp_path / "scratch"))
    with pytest.raises(KeyboardInterrupt):
        work.quantize(*trees, parameters)
    for file in (tmp_path / "scratch" / "blocks").glob("block-*.safetensors"):
        assert all(tensor.nbytes < 4 * 128 * 128 for tensor in load_file(file).values())
    work.quantize(*trees, parameters)
    assert worked == [0, 1, 2, 2, 3]
    (tmp_path / "whole").mkdir()
    monkeypatch.setattr(by_block, "_in_order", in_order)
    work.quantize(*trees[:3], str(tmp_path / "whole"), str(tmp_path / "s"), parameters)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("export", "whole"))
    assert one == other
    assert not list((tmp_path / "scratch").iterdir())


def test_a_shard_takes_the_place_of_its_blocks(model, calibration, tmp_path, monkeypatch):
    """So that the scratch holds one export and not two; a kill between two shards costs nothing that is finished."""
    seen: list[list[str]] = []

    def save(tensors, path, **kwargs):
        seen.append(sorted(file.stem for file in (tmp_path / "killed" / "scratch" / "blocks").glob("block-*")))
        if len(seen[-1]) == 2:
            raise KeyboardInterrupt
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(stream, "SHARD_BYTES", 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stream, "save_file", save)
        quantize(model, calibration, tmp_path / "killed")
    assert seen[-3:] == [[f"block-{number:05d}" for number in range(first, 4)] for first in range(3)]
    with monkeypatch.context() as patch:
        patch.setattr(by_block, "_in_order", None)  # no block is worked on again
        (tmp_path / "killed" / "export").rmdir()
        resumed = quantize(model, calibration, tmp_path / "killed")
    whole = quantize(model, calibration, tmp_path / "whole")
    names = [path.name for path in sorted(whole.iterdir())]
    assert names == [path.name for path in sorted(resumed.iterdir())]
    assert all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in names)


def test_a_kill_while_the_scratch_is_emptied_loses_no_gram_matrix(model, calibration, tmp_path, monkeypatch):
    """Blocks are gone by then, and some shards too: what is missing is made anew, and not rounded without them."""
    remove = shutil.rmtree

    def kill(folder, *args, **kwargs):
        if (first := next(Path(folder).glob("shard-*"), None)) is None:
            return remove(folder, *args, **kwargs)
        first.unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", kill)
        quantize(model, calibration, tmp_path / "killed")
    remove(tmp_path / "killed" / "export")
    resumed, whole = (quantize(model, calibration, tmp_path / name) for name in ("killed", "whole"))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert not list((tmp_path / "killed" / "scratch").iterdir())


def test_a_model_that_cannot_go_by_block_is_told_what_to_write(model, calibration, tmp_path, monkeypatch):
    def refuse(self, batches):
        raise NotByBlock("its last blocks read the keys and values of others")
        yield

    monkeypatch.setattr(BlockCalls, "record", refuse)
    message = r"GPTQ cannot run this model a block at a time: its last blocks read .* of others; write int4_awq"
    with pytest.raises(Failure, match=rf"quantize\.format: {message}") as caught:
        quantize(model, calibration, tmp_path)
    assert caught.value.failure_class == "unsupported"


@pytest.mark.parametrize(("tokens", "damping"), [(4096, 0.3), (32768, 0.3), (65536, 0.15), (1 << 20, 0.05)])
def test_damping_goes_by_the_tokens_unless_the_recipe_says_it(tokens, damping):
    assert gptq.with_defaults(Quantization(format="int4_gptq"), tokens).damping == pytest.approx(damping)
    assert gptq.with_defaults(Quantization(format="int4_gptq", damping=0.01), tokens).damping == 0.01


@pytest.mark.parametrize(("tokens", "sweeps"), [(4096, 0), (32768, 2)])
def test_sweeps_go_by_the_tokens_unless_the_recipe_says_it(tokens, sweeps):
    assert gptq.with_defaults(Quantization(format="int4_gptq"), tokens).sweeps == sweeps
    assert gptq.with_defaults(Quantization(format="int4_gptq", sweeps=1), tokens).sweeps == 1


@pytest.mark.parametrize(("tokens", "many"), [(32767, False), (32768, True)])
def test_the_order_goes_by_the_tokens_unless_the_recipe_says_it(tokens, many):
    assert Quantization(format="int4_gptq").is_sequential(tokens) == many
    for wanted in (True, False):
        assert Quantization(format="int4_gptq", sequential=wanted).is_sequential(tokens) == wanted
    assert not Quantization(format="int4_awq").is_sequential(tokens)
    assert Quantization(format="int4_gptq").follows_dense(tokens) == many
    assert not Quantization(format="int4_gptq", sequential=True, asymmetry=0).follows_dense(tokens)


def test_more_damping_is_nearer_to_rounding_to_nearest(model, calibration, tmp_path):
    """At the largest damping errors are hardly passed on."""
    exports = {damping: Export(quantize(model, calibration, tmp_path / str(damping), damping=damping, sequential=False))
               for damping in (0.01, 10.0)}  # fmt: skip
    source = Export(model)
    name = "model.layers.1.self_attn.o_proj"
    weight = source.tensor(f"{name}.weight").float()
    errors = {damping: float((dequantize(read.layer(name)) - weight).norm()) for damping, read in exports.items()}
    assert errors[10.0] < errors[0.01]
