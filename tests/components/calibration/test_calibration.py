"""Calibration: the statistics against a direct computation, and texts that share nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from trimtab import stages
from trimtab.base.errors import Failure, InputError
from trimtab.components.calibration.work import calibrate
from trimtab.components.validation.evaluation import measure
from trimtab.components.validation.suite import loading
from trimtab.recipe import Recipe
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.text import token_windows


@pytest.fixture(scope="module")
def statistics(calibration: Path) -> dict[str, torch.Tensor]:
    return load_file(calibration / "statistics.safetensors")


@pytest.fixture(scope="module")
def tokens(calibration: Path) -> torch.Tensor:
    return load_file(calibration / "tokens.safetensors")["tokens"].long()


@torch.inference_mode()
def test_statistics_of_the_first_layer(model, statistics, tokens):
    """The input of block 0 is the normed embedding, which can be computed by hand."""
    loaded, _ = model_files.load(model, torch.float32)
    hidden = loaded.model.layers[0].input_layernorm(loaded.model.embed_tokens(tokens)).flatten(0, 1)
    name = "model.layers.0.self_attn.q_proj"
    near = {"rtol": 2**-6, "atol": 1e-3} if torch.cuda.is_available() else {}  # a GPU runs the model in bfloat16
    torch.testing.assert_close(statistics[f"{name}.amax"], hidden.abs().amax(0), **near)
    torch.testing.assert_close(statistics[f"{name}.second_moment"], hidden.square().mean(0), **near)


@torch.inference_mode()
def test_block_influence(model, statistics, tokens):
    """One minus the mean cosine between what enters a block and what leaves it."""
    loaded, _ = model_files.load(model, torch.float32)
    before = loaded.model.embed_tokens(tokens)
    after = loaded(tokens, output_hidden_states=True).hidden_states[1]
    expected = 1 - torch.cosine_similarity(before, after, dim=-1).mean()
    torch.testing.assert_close(statistics["block_influence"][0], expected, rtol=1e-4, atol=1e-5)
    assert len(statistics["block_influence"]) == 4


@pytest.mark.parametrize("family", ["llama", "mistral"])
@torch.inference_mode()
def test_ranges_of_the_kv_cache_are_those_of_all_tokens(family, tmp_path, monkeypatch):
    """Also behind a sliding window, whose cache keeps the last tokens alone: here 16 of 96."""
    from importlib import import_module

    from trimtab.components.calibration.work import whole

    folder = tiny.write_model(tmp_path / family, family=family)
    config = json.loads((folder / "config.json").read_text()) | {"sliding_window": 16}
    (folder / "config.json").write_text(json.dumps(config))
    loaded, _ = model_files.load(folder, torch.float32)
    windows = torch.randint(3, 300, (3, 96), generator=torch.Generator().manual_seed(1))
    measured, _ = whole(loaded, windows)

    module = import_module(f"transformers.models.{family}.modeling_{family}")
    rotate, keys, values = module.apply_rotary_pos_emb, [], []

    def rotated(*args, **kwargs):
        query, key = rotate(*args, **kwargs)
        keys.append(key.abs().amax())
        return query, key

    monkeypatch.setattr(module, "apply_rotary_pos_emb", rotated)
    for block in loaded.model.layers:
        block.self_attn.v_proj.register_forward_hook(lambda _, __, output: values.append(output.abs().amax()))
    loaded(windows, use_cache=False)
    torch.testing.assert_close(measured["key_amax"], torch.stack(keys))
    torch.testing.assert_close(measured["value_amax"], torch.stack(values))


def test_every_linear_layer_is_measured(model, statistics):
    from trimtab.model.facts import inspect

    for layer in inspect(model).linears:
        assert statistics[f"{layer.name}.amax"].shape == (layer.in_features,)
        assert (statistics[f"{layer.name}.second_moment"] >= 0).all()


def test_what_is_written_down(model, calibration, tokens):
    report = json.loads((calibration / "calibration.json").read_text())
    assert tokens.shape == (4, 32) and (report["samples"], report["length"], report["tokens"]) == (4, 32, 128)
    assert report["vocabulary_coverage"] == pytest.approx(len(tokens.unique()) / 300)
    assert [line["source"] for line in report["sources"]] == ["builtin"]
    decoded = model_files.load_tokenizer(model).batch_decode(tokens)
    assert (calibration / "text.txt").read_text() == "\n\n".join(decoded), "what the check of overlap reads"


def test_the_work_takes_the_parameters_of_its_key(model, tmp_path):
    """A mix as JSON, and the digests of its files."""
    (tmp_path / "a.txt").write_text("A text of its own, which is long enough for one window of the tiny tokenizer.")
    mix = [{"text": "builtin"}, {"text": str(tmp_path / "a.txt")}]
    (tmp_path / "output").mkdir()
    recipe = Recipe.parse({"calibrate": {"samples": 2, "length": 32, "text": mix}})
    parameters = stages.STAGES["calibrate"].parameters(recipe)
    assert "files" in parameters
    metrics = calibrate(str(model), str(tmp_path / "output"), "", parameters)
    assert {name: metrics[name] for name in ("samples", "tokens")} == {"samples": 2, "tokens": 64}
    assert "A text of its own" in (tmp_path / "output" / "text.txt").read_text()


@pytest.mark.parametrize(("seed", "same"), [(0, True), (1, False)])
def test_the_seed_chooses_the_windows(seed, same, model, tokens, tmp_path):
    calibrate(str(model), str(tmp_path), "", {"samples": 4, "length": 32, "seed": seed})
    assert torch.equal(load_file(tmp_path / "tokens.safetensors")["tokens"].long(), tokens) == same


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("short.txt", "Too short.", "give more text, fewer samples or a shorter length"),
        ("empty.txt", " ", "is empty; write the path of a file with text in it"),
        ("token.txt", "a", "'.*token.txt': 1 token gives 0 windows of 32, 4 are needed; give more text, fewer samples"),
        ("bad.jsonl", '{"txt": "x"}', 'must be a JSON object with a field "text"'),
        ("missing.txt", None, "is not a file; write 'builtin' or the path"),
    ],
)
def test_bad_text(name, content, message, model, tmp_path):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        calibrate(str(model), str(tmp_path), "", {"samples": 4, "length": 32, "text": str(tmp_path / name)})


@pytest.mark.parametrize("name", ["model.layers.2.mlp.up_proj.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_named(name, value, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors[name][3, 5] = value
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"model: {name} holds NaN or infinity; download it again"):
        calibrate(str(broken), str(tmp_path), "", {"samples": 4, "length": 32})
    assert not list(tmp_path.glob("*.safetensors"))


def test_of_what_overflows_the_first_layer_is_named(model, tmp_path):
    """A norm that multiplies by 1e38: finite in bfloat16, and not so behind the layer."""
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"].fill_(1e38)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(Failure, match=r"^model\.layers\.1\.mlp\..* is not finite: the model's activations overflow"):
        calibrate(str(broken), str(tmp_path), "", {"samples": 4, "length": 32})


# --- calibration text is not what is measured later (GPT-3's measure: 13 words in a row) ---------------------

CALIBRATION = token_windows.read_text("builtin", token_windows.CALIBRATION_TEXT)


def test_no_overlap_with_the_heldout_text():
    assert token_windows.shared_sequences(CALIBRATION, token_windows.read_text("builtin", measure.HELDOUT_TEXT)) == []


@pytest.mark.parametrize("words", [13, 8])
def test_no_overlap_with_the_items(words):
    for path in sorted(loading.DATA.glob("*.jsonl")):
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        texts = [f"{item['context']}{choice}" for item in items for choice in item["choices"]]
        assert token_windows.shared_sequences(CALIBRATION, "\n".join(texts), words) == [], path.name


def test_overlap_is_found():
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    assert token_windows.shared_sequences(f"Before: {words.upper()}!", f"{words}, after") == [words]
    assert token_windows.shared_sequences(words, words.replace("seven", "7")) == []


def test_statistics_do_not_depend_on_the_batch(model, tokens, monkeypatch):
    """A GPU gets several windows at a time."""
    from trimtab.components.calibration.work import whole as measure
    from trimtab.runtime.measure import observe

    loaded, _ = model_files.load(model, torch.float32)
    one, _ = measure(loaded, tokens)
    monkeypatch.setattr(observe, "batches", lambda _, windows: windows.split(3))
    for name, found in measure(loaded, tokens)[0].items():
        rtol = 1e-4 if found.dtype == torch.float32 else 2.0**-7  # a sketch is rounded to bfloat16
        torch.testing.assert_close(found, one[name], rtol=rtol, atol=1e-6, msg=name)
