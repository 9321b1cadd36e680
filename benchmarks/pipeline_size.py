"""What the pipeline weighs on a Kubeflow backend: its file, and the Argo Workflow of a run that tries every attempt.

Run: python benchmarks/pipeline_size.py [--profile FILE] [--pipeline optimize|rebuild]
The Workflow is computed (`argo_workflow.py`), with KFP 2.17 as it installs itself; no cluster is asked. The last line
is one JSON object, by the number of attempts.
"""

import argparse
import json
import tempfile
from pathlib import Path

import yaml
from argo_workflow import MOST, Workflow

from trimtab.pipelines import package
from trimtab.pipelines.inputs import read_profile

GPU = Path(__file__).parents[1] / "manifests/overlays/gpu/profile.yaml"
ATTEMPTS = (1, 5, 10)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", default=str(GPU), help="the cluster's (that of the GPU overlay)")
    parser.add_argument("--pipeline", default="optimize")
    options = parser.parse_args()
    figures = {str(number): measure(number, options.profile, options.pipeline) for number in ATTEMPTS}
    print("| attempts | bytes of the file | components | tasks | pods | Workflow at submission | at its end |")
    print("|---|---|---|---|---|---|---|")
    for number, found in figures.items():
        counted = " | ".join(f"{found[name]:,}" for name in ("file_bytes", "components", "tasks", "pods"))
        parts = " | ".join(f"{found[name]} %" for name in ("submitted_percent", "finished_percent"))
        print(f"| {number} | {counted} | {parts} |")
    print(json.dumps(figures))
    return 0


def measure(attempts: int, profile: str, pipeline: str = "optimize") -> dict[str, float]:
    """Returns the figures of a pipeline with this number of attempts; percents are of the 1 MiB that Argo takes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        package.write(path, attempts, profile=read_profile(profile), pipeline=pipeline)
        spec, *platform = yaml.load_all(path.read_text(encoding="utf-8"), yaml.CSafeLoader)
        size = path.stat().st_size
    workflow = Workflow(spec, platform[0] if platform else {})
    return {
        "file_bytes": size,
        "components": len(spec["components"]),
        "tasks": _tasks(spec, spec["root"]),
        "pods": workflow.pods,
        "submitted_percent": round(100 * workflow.submitted / MOST, 1),
        "finished_percent": round(100 * workflow.finished / MOST, 1),
    }


def _tasks(spec: dict, component: dict) -> int:
    """The tasks of a graph that run in a container, those of the graphs in it included."""
    tasks = component.get("dag", {}).get("tasks", {}).values()
    inner = [spec["components"][task["componentRef"]["name"]] for task in tasks]
    return sum(_tasks(spec, body) if "dag" in body else 1 for body in inner)


if __name__ == "__main__":
    raise SystemExit(main())
