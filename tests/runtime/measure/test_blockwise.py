"""A model a block at a time: the numbers of the whole model, the weights of one block, and what a kill leaves."""

from __future__ import annotations

from pathlib import Path

import decoders
import pytest
import tiny
import torch
from transformers.models.llama import modeling_llama

from trimtab.base.errors import InputError
from trimtab.model import hardware
from trimtab.runtime.checkpoint import experts, model_files
from trimtab.runtime.measure import activations, blockwise, gradients, grams, observe, routing
from trimtab.runtime.measure.block_calls import NotByBlock
from trimtab.runtime.measure.blockwise import Runner

#: Blocks that return tuples and get ALiBi's biases, windows with rotary embeddings of their own, experts with sinks and
#: with every second block chunked, a latent cache, delta nets with experts, Mamba with MLPs and experts, Mamba alone.
BUILDS = ("bloom", "gemma3_text", "gpt_oss", "llama4_text", "deepseek_v3", "qwen3_next", "nemotron_h", "mamba")
#: Three windows: on a GPU one batch, on a CPU three.
TOKENS = torch.randint(3, 300, (3, 32), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model") / "llama", layers=4)


@pytest.mark.parametrize("model_type", BUILDS)
def test_grams_and_gradients_are_those_of_the_whole_model(model_type, tmp_path):
    """Experts that were given few tokens are run on every token, in both."""
    source = decoders.write(tmp_path / "model", model_type)
    model, _ = model_files.load_for_measuring(source)
    mixtures = experts.mixtures(model)
    rare = {name: [0, 1] for name in mixtures}
    found: dict[str, torch.Tensor] = {}

    def work(block):
        return grams.measure(block, [group.layers[0] for group in block.groups], rare, advance=True)

    with torch.inference_mode(), Runner(source, TOKENS, "test", "measuring") as runner:
        for measured in runner.run(work):
            found |= measured
    layers = observe.linears(model)
    first = {group.layers[0]: layers[group.layers[0]] for group in observe.linear_groups(model)}
    with torch.inference_mode(), observe.grams(first) as sums, routing.run_on_all(mixtures, rare):
        for windows in observe.batches(model.device, TOKENS):
            model(windows, use_cache=False)
    assert found.keys() == sums.keys()
    seen = [name for name, gram in sums.items() if gram.any()]
    assert len(seen) > 0.7 * len(sums)  # Mamba multiplies by the weight of one layer without calling it
    for name in seen:
        expected = sums[name].cpu() / TOKENS.numel()
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-5 * float(expected.max()), msg=name)

    by_block = gradients.energy(source, TOKENS, "test")
    whole = gradients.whole(model, TOKENS.to(model.device), "test")
    assert list(by_block) == list(whole)
    for name, energy in whole.items():
        expected = energy.cpu()
        torch.testing.assert_close(by_block[name], expected, rtol=1e-4, atol=1e-5 * float(expected.max()), msg=name)


def materialised(runner: Runner) -> int:
    return sum(parameter.numel() for parameter in runner.model.parameters() if not parameter.is_meta)


def test_no_other_block_s_weights_are_in_memory(llama):
    counts = []
    with torch.inference_mode(), Runner(llama, TOKENS, "test", "counting") as runner:
        assert materialised(runner) == 0
        one = sum(parameter.numel() for parameter in runner.blocks[0].parameters())
        for _ in runner.run(lambda block: counts.append(materialised(runner)) or {}):
            assert materialised(runner) == 0
    assert counts == [one] * 4


def outputs(runner: Runner, work=lambda block: {}) -> torch.Tensor:
    """What comes out of the last block."""
    with torch.inference_mode(), runner:
        for _ in runner.run(work, through=True):
            pass
        stream = runner.streams["hidden"]
        return torch.cat([stream[number].clone() for number in range(len(stream))])


@pytest.mark.parametrize("place", ["host", "disk"])
def test_the_last_block_s_output_is_the_whole_model_s(place, llama, tmp_path, monkeypatch):
    """Also where hidden states do not fit the memory: 3 x 32 x 64 float32 numbers are more than a quarter of 90 kB."""
    monkeypatch.setattr(hardware, "machine_memory", lambda: 90_000 if place == "disk" else 1 << 30)
    assert activations.place_of(3 * 32 * 64 * 4, torch.device("cpu")) == place
    found = outputs(Runner(llama, TOKENS, "test", "running", tmp_path))
    model, _ = model_files.load_for_measuring(llama)
    with torch.inference_mode():
        expected = model(TOKENS.to(model.device), output_hidden_states=True, use_cache=False).hidden_states[-1]
        found = model.model.norm(found)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_what_the_work_changes_the_next_block_reads(llama):
    def halve(block):
        if block.number == 1:
            for layer in block.layers.values():
                layer.weight.mul_(0.5)
        return {}

    runner = Runner(llama, TOKENS, "test", "running", with_dense=True)
    found = outputs(runner, halve)
    dense = torch.cat([runner.streams["dense"][number] for number in range(3)])
    torch.testing.assert_close(dense, outputs(Runner(llama, TOKENS, "test", "running")))
    assert (found - dense).norm() > 0.1 * dense.norm()


class Killed(BaseException):
    """Not an Exception: nothing tidies up after a kill."""


@pytest.mark.parametrize(("pause", "again"), [(0, [2, 3]), (float("inf"), [1, 2, 3])])
def test_a_kill_costs_what_came_behind_the_last_hidden_states_that_were_written(
    pause, again, llama, tmp_path, monkeypatch
):
    """The first ones are written behind the first block, the next ones after a pause."""
    monkeypatch.setattr(blockwise, "PAUSE_OVER_WRITE", pause)
    worked: list[int] = []

    def work(block, dies_in=None):
        worked.append(block.number)
        if block.number == dies_in:
            raise Killed
        return {"sum": sum(x.sum() for x, _ in block.inputs(f"{block.prefix}mlp.down_proj")).reshape(1)}

    with pytest.raises(Killed):
        outputs(Runner(llama, TOKENS, "test", "running", tmp_path / "a"), lambda block: work(block, 2))
    worked.clear()
    with torch.inference_mode(), Runner(llama, TOKENS, "test", "running", tmp_path / "a") as runner:
        found = [measured["sum"] for measured in runner.run(work)]
    assert worked == again
    with torch.inference_mode(), Runner(llama, TOKENS, "test", "running") as runner:
        assert found == [measured["sum"] for measured in runner.run(work)]


def test_a_missing_weight_is_named(llama, tmp_path):
    from safetensors.torch import load_file, save_file

    broken = tiny.write_model(tmp_path / "broken", layers=4)
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.2.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight, which the model needs"):
        outputs(Runner(broken, TOKENS, "test", "running"))


def beside_the_text(self, input_ids=None, **kwargs):
    hidden = self.embed_tokens(input_ids)
    positions = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for block in self.layers:
        hidden = block(hidden, position_embeddings=positions, per_layer_input=self.embed_tokens(input_ids))
    return hidden


def between_blocks(self, input_ids=None, **kwargs):
    hidden = self.embed_tokens(input_ids)
    positions = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for block in self.layers:
        hidden = 2 * block(hidden, position_embeddings=positions)
    return hidden


def twice(self, input_ids=None, **kwargs):
    hidden = self.embed_tokens(input_ids)
    positions = self.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
    for block in (*self.layers, self.layers[0]):
        hidden = block(hidden, position_embeddings=positions)
    return hidden


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (beside_the_text, "its blocks are given something that depends on the text"),
        (between_blocks, "its block 1 does not read what the block before it returned"),
        (twice, "its blocks do not run once each, in their order"),
    ],
)
def test_a_model_whose_blocks_read_more_than_hidden_states_is_refused(forward, reason, llama, monkeypatch):
    """As those of Gemma 3n, which get an embedding each."""
    monkeypatch.setattr(modeling_llama.LlamaModel, "forward", forward)
    with pytest.raises(NotByBlock, match=reason):
        Runner(llama, TOKENS, "test", "running")
