"""The back end of a run on this machine: named, or the best of those that are installed."""

from __future__ import annotations

from importlib import metadata

import pytest
import yaml

from trimtab.base.errors import InputError
from trimtab.model.hardware import target
from trimtab.pipelines import local
from trimtab.pipelines.commands import main
from trimtab.pipelines.local_backend import choose
from trimtab.planning import installed
from trimtab.recipe import Recipe


@pytest.fixture
def have(monkeypatch):
    """A function: makes this a machine with these packages, with a GPU unless said otherwise."""

    def have(gpu: bool = True, **versions: str) -> None:
        def version(name: str) -> str:
            if name not in versions:
                raise metadata.PackageNotFoundError(name)
            return versions[name]

        monkeypatch.setattr("importlib.metadata.version", version)
        monkeypatch.setattr(installed, "has_gpu", lambda: gpu)
        monkeypatch.setattr(installed, "_has_torch", lambda: "torch" in versions)

    return have


MACHINES = [
    ({"torch": "2.11", "tensorrt_llm": "1.2.1"}, "h200", "trtllm"),
    ({"torch": "2.11", "tensorrt_llm": "1.2.1", "vllm": "0.24.0"}, "h200", "trtllm"),
    ({"torch": "2.11", "tensorrt_llm": "1.1.0"}, "h200", "trtllm-legacy"),
    ({"torch": "2.11", "vllm": "0.24.0"}, "h200", "vllm"),
    ({"torch": "2.11", "vllm": "0.20.0"}, "h200", "torch"),  # another vLLM than trimtab knows
    ({"torch": "2.11"}, "h200", "torch"),
    ({"torch": "2.11", "tensorrt_llm": "1.2.1"}, "cpu", "torch"),
    ({"torch": "2.11", "tensorrt_llm": "1.2.1", "gpu": False}, "h200", "torch"),  # the library cannot run here
]


@pytest.mark.parametrize(("machine", "name", "expected"), MACHINES)
def test_the_best_that_is_installed(machine, name, expected, have):
    have(**machine)
    recipe, said = choose("", target(name))
    assert Recipe.parse(recipe).engine.backend == expected
    assert said.startswith(f"{expected}, the best that is installed here for {name}")


def test_torch_is_named_for_the_pipeline_too(have):
    """Else the plan would take the target's default: the recipe must say it, though it is the recipe's default."""
    have(torch="2.11")
    assert "backend" in Recipe.parse(choose("{quantize: {format: fp8}}", target("h200"))[0]).engine.model_fields_set


def test_the_rest_of_the_recipe_stays(have):
    have(torch="2.11", tensorrt_llm="1.2.1")
    text = "{name: a, quantize: {format: fp8}, engine: {max_batch_size: 4}, accept: {min_recovery: 0.9}}"
    recipe, _ = choose(text, target("h100"))
    assert Recipe.parse(recipe) == Recipe.parse(text.replace("engine: {", "engine: {backend: trtllm, "))


def test_one_that_cannot_run_the_recipe_leaves_it_to_the_next(have):
    have(torch="2.11", tensorrt_llm="1.2.1")

    def ladder(text: str) -> None:
        if "trtllm" in text:
            raise InputError("quantize.format: trtllm does not serve mixed")

    assert Recipe.parse(choose("", target("h100"), ladder)[0]).engine.backend == "torch"
    with pytest.raises(InputError, match="trtllm does not serve mixed"):
        choose("{engine: {backend: trtllm}}", target("h100"), ladder)


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("{engine: {backend: trtllm}}", "engine.backend: 'trtllm' is not part of this image, for it has no Tens"),
        ("{engine: {backend: vllm}}", "engine.backend: 'vllm' is not part of this image, for it has no vLLM"),
        ("{engine: {tensorrt_llm: 1.2.1}}", "engine.backend: 'trtllm' is not part of this image"),
    ],
)
def test_a_named_one_that_is_not_installed(recipe, message, have):
    have(torch="2.11")
    with pytest.raises(InputError, match=message):
        choose(recipe, target("h200"))


def test_a_named_one_stays(have):
    have(torch="2.11", tensorrt_llm="1.2.1")
    text = "{engine: {backend: torch}}"
    assert choose(text, target("h200")) == (text, "torch, as the recipe says")


def test_a_machine_with_nothing(have):
    have()
    with pytest.raises(InputError, match="none of the back ends that serve h200 .* write pip install 'trimtab.torch.'"):
        choose("", target("h200"))


def test_speeds_of_another_device_are_not_the_targets(have):
    have(torch="2.11", gpu=False)
    assert "this machine has no GPU, so speeds and memory are its own and not those of h200" in choose(
        "", target("h200")
    )[1]


def test_nothing_is_copied_before_it_is_known(have, write_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    have(torch="2.11")
    (tmp_path / "recipe.yaml").write_text("engine: {backend: trtllm}")
    assert main.main(["run", "--model", "model", "--target", "h200", "--recipe", "recipe.yaml"]) == 2
    assert "is not part of this image" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "trimtab-store").exists()


def test_the_run_says_which_and_is_given_it(have, write_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_model(tmp_path / "model")
    have(torch="2.11")
    asked = []

    def run(parameters, folder, console, **_):
        asked.append(parameters)
        return local.Outcome(None, None, "release", None, tmp_path)

    monkeypatch.setattr(local, "run", run)
    assert main.main(["run", "--model", "model", "--target", "h200"]) == 0
    assert yaml.safe_load(asked[0]["recipe"]) == {"engine": {"backend": "torch"}}
    assert "engine torch, the best that is installed here for h200" in " ".join(capsys.readouterr().err.split())
