"""Sparsity: each method on small tensors, SparseGPT a block at a time, and checkpoints with zeros where they belong."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trimtab.base.errors import Failure, InputError
from trimtab.components.pruning import work as pruning
from trimtab.components.pruning.zeros import allocation, magnitude, mask, sequential, sparsegpt, wanda
from trimtab.model.facts import inspect
from trimtab.runtime.checkpoint import model_files as checkpoints
from trimtab.runtime.checkpoint import stream
from trimtab.runtime.measure import blockwise, grams, observe
from trimtab.runtime.rounding import hessian

#: 1 to 32 with changing signs, four by eight.
WEIGHT = (torch.arange(1.0, 33) * torch.tensor([1.0, -1.0]).repeat(16)).reshape(4, 8)
METHODS = ("magnitude", "wanda", "sparsegpt")


def zeros(matrix: torch.Tensor) -> list[list[int]]:
    """The columns that are zero, by row."""
    return [row.nonzero().flatten().tolist() for row in matrix == 0]


@pytest.mark.parametrize(
    ("scores", "sparsity", "marked"),
    [
        ([[3, 1, 2, 4]], 0.5, [[1, 2]]),
        ([[3, 1, 2, 4], [9, 8, 7, 6]], 0.25, [[1], [3]]),
        ([[5, 5, 5, 5]], 0.5, [[0, 1]]),  # the first among equals
        ([[1, 5, 5, 0]], 0.75, [[0, 1, 3]]),
        ([[3, 1, 2, 4]], 0.1, [[]]),
        ([[3, 1, 2, 4]], 0.99, [[0, 1, 2, 3]]),
    ],
)
def test_lowest(scores, sparsity, marked):
    assert zeros((~mask.lowest(torch.tensor(scores, dtype=torch.float32), sparsity)).int()) == marked


@pytest.mark.parametrize(
    ("n", "m", "marked"),
    [
        (2, 4, [[1, 2, 4, 5]]),
        (1, 4, [[1, 2, 3, 4, 5, 6]]),
        (4, 8, [[1, 4, 5, 2]]),
        (1, 2, [[1, 2, 4, 6]]),
    ],
)
def test_n_of_m(n, m, marked):
    scores = torch.tensor([[9.0, 2, 3, 8, 1, 1, 4, 5]])
    assert zeros((~mask.n_of_m(scores, n, m)).int()) == [sorted(marked[0])]


@pytest.mark.parametrize(("sparsity", "gone"), [(0.25, 8), (0.5, 16), (0.9, 29), (0.01, 0)])
def test_magnitude_zeroes_the_smallest(sparsity, gone):
    pruned = magnitude.prune(WEIGHT, sparsity)
    assert (pruned == 0).flatten().tolist() == [n < gone for n in range(32)]
    assert torch.equal(pruned[pruned != 0], WEIGHT.flatten()[gone:])


def test_magnitude_leaves_its_argument_alone():
    before = WEIGHT.clone()
    magnitude.prune(WEIGHT, 0.5)
    magnitude.prune(WEIGHT, 0.0).zero_()
    assert torch.equal(WEIGHT, before)


def test_magnitude_is_exact_among_equals():
    assert (magnitude.prune(torch.ones(4, 8), 0.5) == 0).sum() == 16


def test_magnitude_of_n_m_stays_within_the_groups():
    assert zeros(magnitude.prune(WEIGHT, 0.5, (2, 4))) == [[0, 1, 4, 5]] * 4


@pytest.mark.parametrize(
    ("moments", "n_m", "gone"),
    [
        ([1.0] * 8, None, [0, 1, 2, 3]),  # equal inputs: the smallest of each row
        # Row 0 times the roots: 4, 8, 12, 16, 5, 6, 7, 8: what small weights meet can make them the ones that count.
        ([16.0] * 4 + [1.0] * 4, None, [0, 4, 5, 6]),
        ([16.0] * 4 + [1.0] * 4, (2, 4), [0, 1, 4, 5]),
    ],
)
def test_wanda_weighs_by_the_input(moments, n_m, gone):
    pruned = wanda.prune(WEIGHT[:1], torch.tensor(moments), 0.5, n_m)
    assert zeros(pruned) == [gone]
    kept = pruned != 0
    assert torch.equal(pruned[kept], WEIGHT[:1][kept]), "what is left is not changed"


def test_wanda_compares_within_rows():
    assert zeros(wanda.prune(WEIGHT, torch.ones(8), 0.25)) == [[0, 1]] * 4


def correlated(columns: int) -> torch.Tensor:
    """Inputs whose neighbours go together, [1000, columns]."""
    rows = torch.randn(1000, columns, generator=torch.Generator().manual_seed(0))
    return rows + rows.roll(1, 1) / 2 + rows.roll(2, 1) / 3


def pruned_by_definition(weight: torch.Tensor, gram: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
    """Optimal brain surgeon in the order of the columns, with the inverse of what is still open made anew each time."""
    weight = weight.double().clone()
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(gram.double()[j:, j:])
        lost = weight[:, j] * gone[:, j]
        weight[:, j:] -= lost[:, None] / inverse[0, 0] * inverse[0]
    return weight


@pytest.mark.parametrize("n_m", [None, (2, 4), (1, 3)])
def test_sparsegpt_makes_up_as_the_definition_says(n_m, monkeypatch):
    monkeypatch.setattr(sparsegpt, "BLOCK", 5)  # several blocks, the last of them shorter
    inputs = correlated(12)
    gram = inputs.t() @ inputs
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(1))
    pruned = sparsegpt.prune(weight, hessian.inverse_factor(gram, 0.0), 0.5, n_m)
    expected = pruned_by_definition(weight, gram, pruned == 0)
    assert torch.allclose(pruned.double(), expected, atol=1e-4)
    if n_m:
        assert ((pruned == 0).unflatten(1, (-1, n_m[1])).sum(-1) == n_m[1] - n_m[0]).all()
    else:
        assert (pruned == 0).sum() == 15 + 15 + 6  # half of six rows by five, five and two columns


def test_sparsegpt_without_correlation_is_magnitude():
    pruned = sparsegpt.prune(WEIGHT, hessian.inverse_factor(torch.eye(8), 0.0), 0.5)
    assert torch.equal(pruned, magnitude.prune(WEIGHT, 0.5))


@pytest.mark.parametrize("n_m", [None, (2, 4), (4, 8)])
def test_each_method_leaves_less_error_than_the_one_before(n_m):
    inputs = correlated(256) * torch.linspace(0.1, 3, 8).repeat(32)  # each block of columns has all sizes
    weight = torch.randn(32, 256, generator=torch.Generator().manual_seed(1))
    gram = inputs.t() @ inputs
    pruned = (
        magnitude.prune(weight, 0.5, n_m),
        wanda.prune(weight, inputs.square().mean(0), 0.5, n_m),
        sparsegpt.prune(weight, hessian.inverse_factor(gram, 0.01), 0.5, n_m),
    )
    errors = [float(((matrix - weight) @ inputs.t()).square().mean()) for matrix in pruned]
    assert [round(float((matrix == 0).float().mean()), 3) for matrix in pruned] == [0.5] * 3
    assert errors[1] < 0.9 * errors[0] and errors[2] < 0.9 * errors[1]


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_the_mean_of_the_shares_is_the_sparsity(sparsity):
    draw = torch.Generator().manual_seed(0)
    layers = {str(n): 10.0**n * torch.rand(8, 150 + 50 * n, generator=draw) for n in range(-2, 3)}
    shares = allocation.shares({name: allocation.spectrum(layer) for name, layer in layers.items()}, sparsity)
    mean = sum(shares[n] * layer.numel() for n, layer in layers.items()) / sum(x.numel() for x in layers.values())
    assert mean == pytest.approx(sparsity, abs=1e-9)
    assert list(shares.values()) == sorted(shares.values(), reverse=True), "the larger the scores, the fewer zeros"
    assert all(abs(share - sparsity) <= min(0.2, sparsity / 2, (1 - sparsity) / 2) + 1e-9 for share in shares.values())
    assert max(shares.values()) - min(shares.values()) > 0.05


def test_shares_are_those_of_one_threshold():
    """Two layers whose scores 1 to 100 and 21 to 120 overlap: of 200, the lowest 100 are those up to 60."""
    layers = {"low": torch.arange(1.0, 101), "high": torch.arange(21.0, 121)}
    shares = allocation.shares({name: allocation.spectrum(layer) for name, layer in layers.items()}, 0.5)
    assert shares == {"low": pytest.approx(0.6, abs=0.02), "high": pytest.approx(0.4, abs=0.02)}


def test_equal_layers_have_equal_shares():
    same = allocation.spectrum(torch.zeros(4, 8))  # zeros have no logarithm
    assert allocation.shares({"a": same, "b": same}, 0.5) == {"a": 0.5, "b": 0.5}


def test_scores_multiply_weight_input_and_gradient():
    weight, moment, energy = (torch.tensor(x) for x in ([[1.0, -2.0], [3.0, 0.0]], [1.0, 10.0], [1.0, 2.0]))
    found = allocation.scores(weight, moment, energy)
    assert found.tolist() == [[1, 40], [18, 0]]


def linears(model) -> list[str]:
    return [layer.name for layer in inspect(model).linears]


def test_blocks_see_what_they_see_in_the_whole_model(model, calibration, tmp_path):
    tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()
    seen: dict[str, torch.Tensor] = {}

    def keep(weights, gram):
        seen.update(dict.fromkeys(weights, gram))
        return weights

    sequential.prune_blocks(model, tokens, linears(model), {}, tmp_path, keep)
    whole, _ = checkpoints.load(model, torch.float32)
    with torch.inference_mode(), observe.grams(observe.linears(whole)) as expected:
        whole(tokens)
    assert seen.keys() == expected.keys()
    for name, gram in seen.items():
        mean = expected[name] / tokens.numel()
        assert torch.allclose(gram, mean, rtol=1e-4, atol=1e-4 * float(mean.max())), name


def test_a_block_sees_what_the_pruned_ones_before_it_make(model, calibration, tmp_path):
    tokens = load_file(calibration / "tokens.safetensors")["tokens"].long()
    seen: dict[str, torch.Tensor] = {}

    def halve(weights, gram):
        seen.update(dict.fromkeys(weights, gram))
        return {n: (w / 2 if ".layers.0." in n else w) for n, w in weights.items()}

    sequential.prune_blocks(model, tokens, linears(model), {}, tmp_path, halve)
    whole, _ = checkpoints.load(model, torch.float32)
    for layer in observe.linears(whole).values():
        if layer in set(observe.blocks(whole)[0].modules()):
            layer.weight.data /= 2
    name = "model.layers.1.mlp.down_proj"
    with torch.inference_mode(), observe.grams({name: observe.linears(whole)[name]}) as expected:
        whole(tokens)
    mean = expected[name] / tokens.numel()
    assert torch.allclose(seen[name], mean, rtol=1e-3, atol=1e-3 * float(mean.max()))


def prune(model, calibration, folder, **parameters):
    output = folder / "pruned"
    output.mkdir(parents=True)
    tree = str(calibration) if calibration else None
    return pruning.prune(str(model), tree, str(output), str(folder / "scratch"), parameters), output


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "3:8"])
def test_a_sparse_checkpoint_is_the_model_with_zeros(method, pattern, model, calibration, tmp_path):
    amount = {"sparsity": 0.3} if pattern == "unstructured" else {"pattern": pattern}
    metrics, output = prune(model, calibration if method != "magnitude" else None, tmp_path, method=method, **amount)
    share = {"unstructured": 0.3, "2:4": 0.5, "3:8": 5 / 8}[pattern]
    facts = inspect(output)
    assert metrics == {"parameters": facts.parameters, "zeros": pytest.approx(share, abs=0.005), "blocks": 4}
    before, after = load_file(model / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    pruned = {f"{name}.weight" for name in linears(model)}
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype and tensor.shape == before[name].shape
        if name not in pruned:
            assert torch.equal(tensor, before[name])
        elif pattern == "unstructured":
            assert (tensor == 0).float().mean() == pytest.approx(share, abs=0.01)
        else:
            n, m = map(int, pattern.split(":"))
            assert ((tensor != 0).unflatten(1, (-1, m)).sum(-1) <= n).all()
    reloaded = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32)
    assert reloaded.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=4, min_new_tokens=4).shape == (1, 7)
    assert not list((tmp_path / "scratch").iterdir()), "nothing is left in the scratch folder"


@pytest.mark.parametrize("method", METHODS)
def test_layers_share_the_zeros_out_by_sensitivity(method, model, calibration, tmp_path):
    metrics, output = prune(model, calibration, tmp_path, method=method, sparsity=0.5, allocation="sensitivity")
    assert metrics["zeros"] == pytest.approx(0.5, abs=0.005)
    after = load_file(output / "model.safetensors")
    shares = [float((after[f"{name}.weight"] == 0).float().mean()) for name in linears(model)]
    assert 0.29 < min(shares) < 0.45 and 0.55 < max(shares) < 0.71
    assert not list((tmp_path / "scratch").iterdir())


class Killed(BaseException):
    """Not an Exception: nothing tidies up after a kill."""


@pytest.mark.parametrize("at", [1, 3])
def test_a_kill_costs_the_open_block(at, model, calibration, tmp_path, monkeypatch):
    _, whole = prune(model, calibration, tmp_path / "whole", method="sparsegpt", sparsity=0.5)
    worked: list[int] = []
    measure, write = grams.measure, blockwise.Runner._write

    def count(block, *args, **kwargs):
        worked.append(block.number)
        return measure(block, *args, **kwargs)

    def kill(self, path, tensors):
        if path.name.startswith(f"block-{at:05d}"):  # in the middle of a file
            path.with_suffix(".partial").write_bytes(b"half")
            raise Killed
        write(self, path, tensors)

    monkeypatch.setattr(blockwise, "PAUSE_OVER_WRITE", 0)
    monkeypatch.setattr(grams, "measure", count)
    with monkeypatch.context() as patch:
        patch.setattr(blockwise.Runner, "_write", kill)
        with pytest.raises(Killed):
            prune(model, calibration, tmp_path / "killed", method="sparsegpt", sparsity=0.5)
    assert worked == list(range(at + 1)) and not list((tmp_path / "killed" / "pruned").iterdir())
    worked.clear()
    (tmp_path / "killed" / "pruned").rmdir()
    _, resumed = prune(model, calibration, tmp_path / "killed", method="sparsegpt", sparsity=0.5)
    assert worked == list(range(at, 4))
    assert (resumed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_a_shard_takes_the_place_of_its_blocks(model, calibration, tmp_path, monkeypatch):
    """So that the scratch holds one model and not two; a kill between two shards costs nothing that is finished."""
    blocks, seen = tmp_path / "killed" / "scratch" / "blocks", []

    def save(tensors, path, **kwargs):
        seen.append(len(list(blocks.glob("block-*"))))
        if seen[-1] == 2:
            raise Killed
        save_file(tensors, path, **kwargs)

    monkeypatch.setattr(stream, "SHARD_BYTES", 1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(stream, "save_file", save)
        prune(model, calibration, tmp_path / "killed", method="sparsegpt", sparsity=0.5)
    assert seen[-3:] == [4, 3, 2]
    with monkeypatch.context() as patch:
        patch.setattr(grams, "measure", None)  # no block is worked on again
        (tmp_path / "killed" / "pruned").rmdir()
        _, resumed = prune(model, calibration, tmp_path / "killed", method="sparsegpt", sparsity=0.5)
    _, whole = prune(model, calibration, tmp_path / "whole", method="sparsegpt", sparsity=0.5)
    files = sorted(path.name for path in whole.iterdir())
    assert files == sorted(path.name for path in resumed.iterdir())
    assert all((whole / name).read_bytes() == (resumed / name).read_bytes() for name in files)


def test_many_shards_are_one_model(model, calibration, tmp_path, monkeypatch):
    _, whole = prune(model, calibration, tmp_path / "whole", method="wanda", pattern="2:4")
    monkeypatch.setattr(stream, "SHARD_BYTES", 1)
    _, cut = prune(model, calibration, tmp_path / "cut", method="wanda", pattern="2:4")
    assert len(list(cut.glob("*.safetensors"))) == 6  # the embedding, the last norm, four blocks
    one, many = checkpoints.Export(whole), checkpoints.Export(cut)
    assert one.names == many.names and all(torch.equal(one.tensor(n), many.tensor(n)) for n in one.names)


@pytest.mark.parametrize("method", METHODS)
def test_a_pattern_that_does_not_divide_a_layer_is_refused(method, model, calibration, tmp_path):
    reason = "groups of 3, which do not divide the 128 of model.layers.0.mlp.down_proj; write 'unstructured'"
    with pytest.raises(Failure, match=reason) as caught:
        prune(model, calibration, tmp_path, method=method, pattern="1:3")
    assert caught.value.failure_class == "unsupported" and not list((tmp_path / "pruned").iterdir())


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_finite_are_refused(method, model, calibration, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name].view(-1)[500] = torch.nan
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=f"{name} holds NaN or infinity; download it again"):
        prune(broken, calibration, tmp_path, method=method, sparsity=0.5)
    assert not list((tmp_path / "pruned").iterdir())


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_calibration_of_another_model_is_refused(method, model, calibration, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="calibration: describes another model"):
        prune(other, calibration, tmp_path, method=method, sparsity=0.5)
