"""Statistics a block at a time, beside those of the model as a whole."""

from __future__ import annotations

import decoders
import pytest
import torch

from trimtab.components.calibration.work import statistics, whole
from trimtab.runtime.checkpoint import model_files
from trimtab.runtime.measure.block_calls import BlockCalls, NotByBlock

#: Windows, experts of which some are given few of 96 tokens, a hybrid of three kinds of blocks, no cache.
BUILDS = ("gemma3_text", "qwen3_moe", "nemotron_h", "mamba")
#: A GPU runs the model in bfloat16, and rounds products of other sizes elsewhere.
RELATIVE, OF_LARGEST = (2**-6, 2**-6) if torch.cuda.is_available() else (1e-5, 1e-6)
TOKENS = torch.randint(3, 300, (3, 32), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("model_type", BUILDS)
def test_statistics_are_those_of_the_whole_model(model_type, tmp_path):
    source = decoders.write(tmp_path / "model", model_type)
    found, shares = statistics(source, TOKENS, tmp_path / "scratch")
    expected, expected_shares = whole(model_files.load_for_measuring(source)[0], TOKENS)
    assert found.keys() == expected.keys() and shares == expected_shares
    for name, tensor in expected.items():
        if name.endswith(".sketch") and any(shares.values()):  # the whole model goes twice, with other signs
            torch.testing.assert_close(found[name].norm(), tensor.norm(), rtol=0.2, atol=0, msg=name)
        else:
            near = OF_LARGEST * float(tensor.max())
            torch.testing.assert_close(found[name], tensor, rtol=RELATIVE, atol=near, msg=name)


def test_a_model_that_cannot_go_by_block_is_measured_whole(model, monkeypatch):
    def refuse(self, batches):
        raise NotByBlock("its last blocks read the keys and values of others")
        yield

    expected, _ = statistics(model, TOKENS)
    monkeypatch.setattr(BlockCalls, "record", refuse)
    found, _ = statistics(model, TOKENS)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=name)
