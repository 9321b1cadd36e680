"""The notebooks: kept without output, and executed as a reader would, cell after cell in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from kfp_server import KfpServer

from trimtab.store import open_store

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
#: Runs the cells of a notebook in one namespace, as a kernel does.
EXECUTE = """
import json, sys
cells = json.load(open(sys.argv[1], encoding="utf-8"))["cells"]
names = {"__name__": "__main__"}
import linecache
for number, cell in enumerate(cells):
    if cell["cell_type"] == "code":
        source, name = "".join(cell["source"]), f"<cell {number}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # KFP reads its components
        exec(compile(source, name, "exec"), names)
"""


def execute(name: str, folder: Path, **environment: str) -> str:
    """Executes a notebook in an empty folder and returns what it prints."""
    (path,) = [path for path in NOTEBOOKS if path.stem == name]
    done = subprocess.run(
        [sys.executable, "-c", EXECUTE, str(path)],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_output_is_kept(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


#: In the place of torch: work on a model takes minutes, and ends here in its first second.
TORCH = """
from trimtab.base.errors import Failure
raise Failure("export_damaged", "this model cannot be measured")
"""


@pytest.fixture
def unmeasurable(write_model, tmp_path) -> dict[str, str]:
    """The environment of a notebook with a model that nobody can measure."""
    (tmp_path / "path" / "torch").mkdir(parents=True)
    (tmp_path / "path" / "torch" / "__init__.py").write_text(TORCH)
    model = write_model(tmp_path / "model")
    path = os.pathsep.join([str(tmp_path / "path"), os.environ["PYTHONPATH"]])
    return {"MODEL": str(model), "STORE": str(tmp_path / "store"), "PYTHONPATH": path}


@pytest.mark.slow
def test_optimize(unmeasurable, tmp_path):
    """All of it, on a model that nobody can measure: the plan, the run, its page and why nothing is released."""
    said = execute("optimize", tmp_path, **unmeasurable)
    assert "int4_rtn" in said and "nothing is released: this model cannot be measured" in " ".join(said.split())
    (page,) = tmp_path.glob("trimtab-runs/*/*/summarize/report.html")
    assert str(page) in said and "this model cannot be measured" in page.read_text()


def test_compose(model, tmp_path):
    said = execute("compose", tmp_path, MODEL=str(model), STORE=str(tmp_path / "store"))
    assert "/trees/" in said and "'model.safetensors'" in said
    assert (tmp_path / "prune-only.yaml").exists()


@pytest.mark.slow
def test_verdict(unmeasurable, tmp_path):
    """Its own condition takes the other branch, for a model that nobody can measure: no stage does a model's work."""
    said = execute("verdict", tmp_path, **unmeasurable)
    assert said.splitlines()[-1] == "rejected: this model cannot be measured"


def test_submit(tmp_path):
    server = KfpServer()
    server.story = [{"state": "SUCCEEDED"}]
    store = open_store(str(tmp_path / "store"))
    store.write_status("run-1", "attempts", [{"recipe": "fp8", "outcome": "accepted", "reason": "it is still good"}])
    store.release("tiny", {"recipe": {}, "verdict": {"reason": "recovery is enough"}})
    try:
        said = execute("submit", tmp_path, HOST=server.host, STORE=str(tmp_path / "store"))
    finally:
        server.close()
    (run,) = server.kept["runs"]
    assert run["display_name"] == "tiny lower_latency l40s" and "SUCCEEDED" in said
    assert "fp8: accepted; it is still good" in said and "recovery is enough" in said
    assert run["runtime_config"]["parameters"]["store"] == str(tmp_path / "store")
