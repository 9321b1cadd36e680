"""Names of releases: refused where a run is asked for, valid by construction where trimtab makes them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trimtab import flow
from trimtab.errors import InputError
from trimtab.pipelines import cli
from trimtab.pipelines.inputs import release_name
from trimtab.state import Evaluation
from trimtab.store import Tree, open_store
from trimtab.store.address import check_name

BAD = ["../x", "a/b", "", ".hidden", "-x", "_x", "mo dèl", "模型", "a\n", "x" * 129]


@pytest.mark.parametrize("name", BAD)
def test_bad_names(name, tmp_path):
    with pytest.raises(InputError, match="the release name .* is not valid: write letters"):
        check_name(name, "release")
    with pytest.raises(InputError, match="the release name .* is not valid: write letters"):
        open_store(str(tmp_path)).newest(name)


@pytest.mark.parametrize("name", BAD)
def test_the_plan_refuses_them_before_it_looks_at_the_model(name, tmp_path):
    with pytest.raises(InputError, match="the release name .* is not valid"):
        flow.begin(
            model=Tree(uri=f"{tmp_path.as_uri()}/trees/{'0' * 64}", digest="0" * 64),
            store_uri=str(tmp_path), name=name, goal="lower_cost", target="cpu", recipe="", max_attempts=1,
            evaluation=Evaluation(),
        )  # fmt: skip


@pytest.mark.parametrize("command", [["submit"], ["schedule", "--cron", "0 3 * * 1"]])
def test_before_a_cluster_is_asked(command, capsys):
    """No server is there: the name is looked at first."""
    code = cli.main([*command, "--model", "org/tiny", "--store", "s3://b/s", "--name", "../x", "--host", "http://no"])
    assert code == 2 and "the release name '../x' is not valid" in capsys.readouterr().err


MADE = [
    ("/models/Llama-3.1-8B", "Llama-3.1-8B"),
    ("org/tiny", "tiny"),
    ("s3://bucket/models/tiny/", "tiny"),
    ("/m/tiny.gguf", "tiny"),
    ("/m/Tiny.Q4_K_M.GGUF", "Tiny.Q4_K_M"),
    ("/m/mo dèl", "mo-del"),
    ("/m/Ｑｗｅｎ２", "Qwen2"),  # full width forms are the same letters
    ("/m/模型", "model-c98e118e"),
    ("/m/Модель-7B", "7B-"),
    ("/m/.hidden", "hidden"),
    ("/", "model"),
]


@pytest.mark.parametrize(("model", "expected"), MADE)
def test_names_out_of_models(model, expected):
    made = release_name("", model)
    assert check_name(made, "release") == made
    assert made == expected or (expected.endswith("-") and made.startswith(expected))


def test_two_models_of_another_script_keep_two_names():
    assert release_name("", "/m/模型") != release_name("", "/m/模特")


@given(st.text())
def test_any_model_gives_a_valid_name(model):
    assert check_name(release_name("", model), "release")
