"""The work of the stage: what it refuses, what a kill costs, and that slices and memory change nothing."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from trimtab.base import child
from trimtab.base.errors import Failure, InputError
from trimtab.components.quantization import work
from trimtab.runtime.checkpoint.model_files import Export
from trimtab.runtime.rounding import quantizers

from .conftest import FORMATS, quantize


@pytest.mark.parametrize("name", FORMATS)
def test_slices_change_nothing(name, export, model, calibration, tmp_path, monkeypatch):
    """Two rows at a time, where otherwise a whole matrix of the tiny model fits one slice."""
    monkeypatch.setitem(quantizers.SLICE, "cpu", 1)
    quantize(model, tmp_path / "q", calibration, format=name)
    sliced, whole = Export(tmp_path / "q" / "output"), Export(export(name))
    assert sliced.names == whole.names
    for tensor in whole.names:
        torch.testing.assert_close(sliced.tensor(tensor).float(), whole.tensor(tensor).float(), rtol=1e-6, atol=0)


def test_measurements_of_another_model_are_refused(model, calibration, tmp_path):
    import tiny

    other = tiny.write_model(tmp_path / "other", layers=4, seed=1)
    with pytest.raises(InputError, match=r"calibration: describes another model \(fingerprint [0-9a-f]{12}\)"):
        quantize(other, tmp_path / "q", calibration, format="fp8")


def test_an_odd_number_of_output_features_is_unsupported_in_int4(model, tmp_path):
    """Refused by `hardware.check` before any work; and here, where a recipe comes from elsewhere."""
    odd, name = shutil.copytree(model, tmp_path / "odd"), "model.layers.2.mlp.gate_proj"
    tensors = load_file(odd / "model.safetensors")
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:-1].contiguous()
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failure, match=f"int4_rtn stores output features in pairs, and {name} has 127; add") as caught:
        quantize(odd, tmp_path / "q", format="int4_rtn")
    assert caught.value.failure_class == "unsupported"
    quantize(odd, tmp_path / "q", format="int4_rtn", exclude=["lm_head", name])


NOT_FINITE = {
    "model.layers.2.mlp.up_proj.weight": torch.nan,
    "model.layers.0.self_attn.o_proj.weight": -torch.inf,
    "model.layers.3.input_layernorm.weight": torch.inf,
    "model.embed_tokens.weight": torch.nan,
}


@pytest.mark.parametrize("name", NOT_FINITE)
@pytest.mark.parametrize("form", ["int8_wo", "int4_rtn", "bf16"])
def test_weights_that_are_not_finite_are_refused(name, form, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors[name].view(-1)[5] = NOT_FINITE[name]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"model: {name} holds NaN or infinity; download it again"):
        quantize(broken, tmp_path / "q", format=form)
    assert not list((tmp_path / "q").rglob("model*.safetensors"))


def test_a_kill_between_shards_costs_only_the_open_one(model, calibration, monkeypatch, tmp_path):
    from trimtab.runtime.checkpoint import stream

    monkeypatch.setattr(stream, "SHARD_BYTES", 1)
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    arguments = (str(model), str(calibration), None)
    settings = {"format": "int4_awq", "group_size": 32}
    work.quantize(*arguments, str(tmp_path / "whole"), str(tmp_path / "s0"), settings)

    converted = []
    convert = work._Shards.__call__

    def counting(self, names, title):
        if len(converted) == 4:
            raise KeyboardInterrupt
        converted.append(names)
        return convert(self, names, title)

    monkeypatch.setattr(work._Shards, "__call__", counting)
    with pytest.raises(KeyboardInterrupt):
        work.quantize(*arguments, str(tmp_path / "cut"), str(tmp_path / "s1"), settings)
    assert not list((tmp_path / "cut").iterdir())
    before = list(converted)
    converted[:] = []
    monkeypatch.setattr(work._Shards, "__call__", lambda *call: converted.append(call[1]) or convert(*call))
    work.quantize(*arguments, str(tmp_path / "cut"), str(tmp_path / "s1"), settings)
    assert not any(names in before for names in converted)
    cut, whole = Export(tmp_path / "cut"), Export(tmp_path / "whole")
    assert cut.names == whole.names and all(torch.equal(cut.tensor(n), whole.tensor(n)) for n in cut.names)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 6  # the embedding, the last norm, four blocks
    assert not (tmp_path / "s1" / "shards").exists()


@pytest.mark.slow
def test_memory_holds_no_second_copy_of_the_largest_tensor(write_model, tmp_path):
    """An embedding of 400 MB: its file's pages count, and nothing else of its size."""
    peaks = {}
    for vocab in (64, 400_000):
        source, folder = write_model(tmp_path / str(vocab), layers=1, hidden=512, vocab=vocab), tmp_path / f"q{vocab}"
        (folder / "output").mkdir(parents=True)
        trees = {"checkpoint": str(source), "calibration": None, "sensitivity": None}
        places = {"output": str(folder / "output"), "scratch": str(folder / "scratch")}
        done = child.call(
            "trimtab.components.quantization.work:quantize", **trees, **places, parameters={"format": "int4_rtn"}
        )
        peaks[vocab] = done.peak_memory_bytes
    assert peaks[400_000] - peaks[64] < 1.5 * 400_000 * 512 * 2
