"""What goes along with a run or a schedule, and what its pods could not see, which is refused before."""

from __future__ import annotations

import pytest
import yaml

from trimtab.components.deployment.rollout.settings import Rollout
from trimtab.pipelines import package as packages

from .conftest import ROLLOUT, RUN


def test_submit(server, trimtab):
    code, said = trimtab("submit", *RUN, "--goal", "lower_cost", "--service-account", "trimtab-runner")
    (run,) = server.kept["runs"]
    assert code == 0 and f"{server.host}/#/runs/details/{run['run_id']}" in said
    assert run["pipeline_version_reference"]["pipeline_version_id"] == "pipeline-version-1"
    assert run["service_account"] == "trimtab-runner" and "pipeline_spec" not in run
    parameters = run["runtime_config"]["parameters"]
    assert parameters["goal"] == "lower_cost" and parameters["name"] == "tiny" and parameters["max_attempts"] == 5
    assert parameters["rollout"] == ""


@pytest.mark.parametrize("command", [["submit"], ["schedule", "--cron", "0 3 * * 1"]])
def test_as_many_attempts_as_are_asked_for(command, server, trimtab, monkeypatch):
    """Each costs the run pods and its Workflow room; what is uploaded alone has all that a form may ask for."""
    wanted = []
    write = packages.write
    monkeypatch.setattr(
        "trimtab.pipelines.package.write", lambda *given, **named: (wanted.append(given[1]), write(*given, **named))
    )
    assert trimtab(*command, *RUN, "--max-attempts", "3")[0] == 0
    assert trimtab("upload")[0] == 0
    assert wanted == [3, 10]


@pytest.mark.parametrize("command", [["submit"], ["schedule", "--cron", "0 3 * * 1"]])
def test_a_rollout_goes_along(command, server, trimtab, tmp_path):
    (tmp_path / "rollout.yaml").write_text(ROLLOUT % ", approval_minutes: 60")
    assert trimtab(*command, *RUN, "--rollout", str(tmp_path / "rollout.yaml"))[0] == 0
    (started,) = server.kept["runs" if command == ["submit"] else "recurringruns"]
    settings = Rollout.parse(started["runtime_config"]["parameters"]["rollout"])
    assert (settings.service, settings.approval_minutes) == ("assistant", 60)


@pytest.mark.parametrize("command", [["submit"], ["schedule", "--cron", "0 3 * * 1"]])
def test_a_registry_goes_along(command, server, trimtab):
    code, said = trimtab(*command, *RUN, "--registry", "registry:8080")
    assert code == 2 and "registry: 'registry:8080' is not valid; write https://host[:port]" in said
    assert trimtab(*command, *RUN, "--registry", "http://registry:8080")[0] == 0
    (started,) = server.kept["runs" if command == ["submit"] else "recurringruns"]
    assert started["runtime_config"]["parameters"]["registry"] == "http://registry:8080"


@pytest.mark.parametrize(
    ("store", "more", "message"),
    [
        ("s3://b/s", ", approval: 60", "approval: unknown key 'approval'; write 'approval_minutes'"),
        ("/shared/store", "", "rollout: its pods cannot read the store '/shared/store'; write store: s3://bucket/prefix"),
    ],
)
def test_a_rollout_that_cannot_be_is_refused_before_the_run(store, more, message, server, trimtab, tmp_path):
    (tmp_path / "rollout.yaml").write_text(ROLLOUT % more)
    options = ["--model", "org/tiny", "--store", store, "--rollout", str(tmp_path / "rollout.yaml")]
    code, said = trimtab("submit", *options)
    assert (code, message in said, server.kept["runs"]) == (2, True, []), said


@pytest.mark.parametrize("command", [["submit"], ["schedule", "--cron", "0 3 * * 1"]])
@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("recipe", "{calibrate: {text: 'hf:owner/{{name}}'}}"),
        ("evaluation", "{tasks: ['{{workflow.name}}']}"),
        ("rollout", ROLLOUT % ", prompts: ['Say {{ greeting }}.']"),
    ],
)
def test_what_argo_would_fill_in_is_refused(option, text, command, server, trimtab, tmp_path):
    (tmp_path / "input.yaml").write_text(text)
    code, said = trimtab(*command, *RUN, f"--{option}", str(tmp_path / "input.yaml"))
    assert (code, f"{option}: '…" in said) == (2, True), said
    assert "which a cluster's Argo Workflows reads as a tag of its own" in said
    assert not server.kept["versions"] and not server.kept["runs"]


HERE = "is of this machine, which the cluster does not see; write"
INPUTS = [
    ("evaluation", "heldout: {}/notes.txt", f"{HERE} builtin, or"),
    ("evaluation", "heldout: notes.txt", f"heldout: 'notes.txt' {HERE} builtin, or"),
    ("evaluation", "heldout: s3://bucket/notes.txt", "is not read from S3; write builtin, or"),
    ("evaluation", "{{task_path: {}, tasks: [mine]}}", f"{HERE} the names of lm-eval's own tasks alone, or"),
    ("evaluation", "{{task_path: nowhere, tasks: [mine]}}", f"task_path: 'nowhere' {HERE}"),
    ("recipe", "calibrate: {{text: {}/notes.txt}}", f"{HERE} builtin, or"),
    ("recipe", "calibrate: {{text: [{{text: 'hf:{}'}}]}}", f"{HERE} hf:owner/name, or"),
    ("recipe", "distill: {{tokens: 65536, text: {}/notes.txt}}", f"{HERE} builtin, or"),
    ("recipe", "workload: {{recorded: notes.txt}}", f"{HERE} s3://bucket/prefix, or"),
]


@pytest.mark.parametrize("profile", ["", "cache: {claim: shared, path: /volume}"])
@pytest.mark.parametrize("command", [["submit"], ["schedule", "--cron", "0 3 * * 1"]])
@pytest.mark.parametrize(("option", "text", "message"), INPUTS)
def test_what_pods_cannot_see_is_refused(option, text, message, command, profile, server, trimtab, tmp_path):
    (tmp_path / "notes.txt").write_text("Of this machine.")
    (tmp_path / "profile.yaml").write_text(profile or "{}")
    (tmp_path / "input.yaml").write_text(text.format(tmp_path))
    options = [f"--{option}", str(tmp_path / "input.yaml"), "--profile", str(tmp_path / "profile.yaml")]
    code, said = trimtab(*command, *RUN, *options)
    assert (code, message in said) == (2, True), said
    assert ("copy below /volume, the volume" if profile else "with cache: {claim: NAME}") in said
    assert not server.kept["runs"] and not server.kept["recurringruns"]


SECRET = "secrets: {s3: {key: AWS_ACCESS_KEY_ID}}"
ITSELF = "which to a pod is the pod itself; write the address"
ELSEWHERE = "and at AWS to the pods, for the profile does not say"
ENDPOINTS = [
    ("environment: {AWS_ENDPOINT_URL: 'http://localhost:9000'}", "", ITSELF),
    ("environment: {AWS_ENDPOINT_URL: 'http://127.0.0.1:9000'}", "", ITSELF),
    (SECRET, "http://minio.example", ELSEWHERE),
    (f"{{{SECRET}, environment: {{AWS_ENDPOINT_URL: 'http://s3.kubeflow'}}}}", "http://minio.example", ""),
]


@pytest.mark.parametrize(("profile", "here", "message"), ENDPOINTS)
def test_a_store_that_pods_do_not_reach(profile, here, message, server, trimtab, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", here)
    (tmp_path / "profile.yaml").write_text(profile)
    code, said = trimtab("submit", *RUN, "--profile", str(tmp_path / "profile.yaml"))
    assert (code, message in said, bool(server.kept["runs"])) == (2 if message else 0, True, not message), said


def test_the_artifact_of_an_earlier_run_goes_along(server, trimtab):
    """By the address that its page shows."""
    model = "minio://mlpipeline/v2/artifacts/optimize/1/quantize/2/export"
    assert trimtab("submit", "--model", model, "--store", "s3://bucket/store")[0] == 0
    assert server.kept["runs"][0]["runtime_config"]["parameters"]["model"] == model


def test_what_pods_can_see_goes_along(server, trimtab, tmp_path):
    """What the refusals say to write; below a volume that is mounted on this machine too."""
    (tmp_path / "profile.yaml").write_text(f"cache: {{claim: shared, path: {tmp_path}}}")
    (tmp_path / "notes.txt").write_text("On the volume.")
    (tmp_path / "evaluation.yaml").write_text(f"{{heldout: {tmp_path}/notes.txt, task_path: {tmp_path}/tasks}}")
    (tmp_path / "recipe.yaml").write_text(
        f"{{calibrate: {{text: [{{text: 'hf:owner/name'}}, {{text: /opt/image/notes.txt}}]}}, "
        f"distill: {{tokens: 65536, text: {tmp_path}/notes.txt}}, workload: {{recorded: 's3://bucket/traffic'}}}}"
    )
    options = [f"--{name}={tmp_path / name}.yaml" for name in ("profile", "evaluation", "recipe")]
    code, said = trimtab("submit", *RUN, *options)
    assert code == 0, said
    (run,) = server.kept["runs"]
    evaluation = yaml.safe_load(run["runtime_config"]["parameters"]["evaluation"])
    assert evaluation["heldout"] == f"{tmp_path}/notes.txt" and evaluation["task_path"] == f"{tmp_path}/tasks"
