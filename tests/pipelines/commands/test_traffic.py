"""`trimtab traffic`, and recorded traffic in the commands that plan and submit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from releases import file_release

from trimtab.components.fetch.source import fetch
from trimtab.loop import decisions
from trimtab.pipelines.commands import main
from trimtab.recipe import Recipe
from trimtab.recipe.evaluation import Evaluation
from trimtab.store import open_store

CONFIG = str(Path(__file__).parents[2] / "unit" / "configs" / "llama-3.1-70b.json")


@pytest.fixture
def record(tmp_path: Path):
    """A function: records a request a second, and returns the log."""

    def write(count: int = 2000, output: int = 20, **others: float) -> str:
        rows = ({"time": n, "input_tokens": 100, "output_tokens": output, **others} for n in range(count))
        (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "log.jsonl")

    return write


def said(capsys: pytest.CaptureFixture[str]) -> str:
    captured = capsys.readouterr()
    return " ".join((captured.out + captured.err).split())


def told(capsys: pytest.CaptureFixture[str], what: str) -> str:
    """Returns what a line of the output says behind `what`."""
    return next(line.removeprefix(what) for line in capsys.readouterr().out.splitlines() if line.startswith(what))


def test_the_shape_of_a_log_is_a_workload(record, capsys, tmp_path):
    stated, recorded = tmp_path / "stated.yaml", tmp_path / "recorded.yaml"
    recorded.write_text(f"recorded: {record(seconds=9)}")
    assert main.main(["traffic", str(tmp_path / "log.jsonl")]) == 0
    stated.write_text(told(capsys, "workload: "))
    engines = []
    for workload in (stated, recorded):
        assert main.main(["plan", "--engine", "--model", CONFIG, "--target", "h100", "--workload", str(workload)]) == 0
        engines.append(json.loads(told(capsys, "engine: ")))
    assert engines[0] == engines[1] and (engines[0]["max_batch_size"], engines[0]["max_seq_len"]) == (9, 120)


def test_what_a_log_does_not_tell(record, capsys):
    assert main.main(["traffic", record(count=10)]) == 0
    shown = said(capsys)
    assert "fewer than 1,000 requests are too few for a run to go by" in shown
    assert "the log does not say how long requests took; add concurrency to a workload" in shown
    assert "workload: {" not in shown


def test_beside_a_release(record, capsys, tmp_path, write_model):
    store = open_store(str(tmp_path / "store"))
    recipe = f"{{quantize: {{format: int8_wo}}, workload: {{recorded: {record(seconds=1)}}}}}"
    state = decisions.begin(
        model=fetch(str(write_model(tmp_path / "model")), store), store_uri=store.uri, evaluation=Evaluation(),
        name="tiny", goal="lower_latency", target="cpu", recipe=recipe, max_attempts=1,
    )  # fmt: skip
    state = state.model_copy(update={"recipe": Recipe.parse("quantize: {format: int8_wo}")})
    uri = file_release(store, state, store.put_json("export", {}))
    capsys.readouterr()
    assert main.main(["traffic", record(output=50, seconds=1), "--release", uri]) == 0
    assert "since the release: output p95: 20 → 50 tokens, 2.50 times" in said(capsys)
    other = file_release(store, state.model_copy(update={"plan": None}), store.put_json("export", {}))
    assert main.main(["traffic", record(), "--release", other]) == 2
    assert f"release: '{other}' was not sized for recorded traffic; leave --release out" in said(capsys)
    assert main.main(["traffic", record(), "--release", "tiny"]) == 2
    assert "release: 'tiny' is no release; write STORE/releases/NAME/VERSION" in said(capsys)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["traffic", "/nowhere"], "recorded: '/nowhere' is no log and no folder of logs"),
        (["traffic", "LOG", "--days", "0"], "days: 0 is not valid; write more than 0"),
        (["run", "--model", "MODEL", "--recipe", "FEW"], "holds 9 requests, which are too few to go by"),
        (["run", "--model", "s3://bucket/model", "--recipe", "FEW"], "holds 9 requests, which are too few to go by"),
        (
            ["submit", "--model", "org/name", "--store", "s3://bucket/store", "--recipe", "RELATIVE"],
            "workload.recorded: 'log.jsonl' is of this machine, which the cluster does not see; write s3://bucket/prefix",
        ),
    ],
)
def test_bad_input(options, message, record, capsys, tmp_path, write_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    (tmp_path / "few.yaml").write_text(f"workload: {{recorded: {record(count=9, seconds=1)}}}")
    (tmp_path / "relative.yaml").write_text("workload: {recorded: log.jsonl}")
    known = {"LOG": str(tmp_path / "log.jsonl"), "FEW": "few.yaml", "RELATIVE": "relative.yaml"}
    known["MODEL"] = str(write_model(tmp_path / "model"))
    assert main.main([known.get(option, option) for option in options]) == 2
    assert message in said(capsys)
