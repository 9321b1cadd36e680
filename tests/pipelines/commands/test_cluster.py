"""What the commands for a cluster say to a Kubeflow Pipelines server, and it to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from kfp_server import KfpServer

from trimtab.base import progress
from trimtab.base.errors import StoreError
from trimtab.components.deployment.rollout.settings import Rollout
from trimtab.loop import status
from trimtab.pipelines import package as packages
from trimtab.pipelines.cluster import connection, watch
from trimtab.pipelines.commands import main
from trimtab.stages.profile import Profile
from trimtab.store import Store, open_store

RUN = ["--model", "org/tiny", "--store", "s3://bucket/store"]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("package") / "optimize.yaml"
    assert main.main(["compile", "-o", str(output), "--max-attempts", "2"]) == 0
    return output


@pytest.fixture(scope="module")
def rebuilding(package: Path) -> Path:
    output = package.with_name("rebuild.yaml")
    assert main.main(["compile", "-o", str(output), "--max-attempts", "1", "--pipeline", "rebuild"]) == 0
    return output


@pytest.fixture
def server(package: Path, monkeypatch: pytest.MonkeyPatch):
    """A server, to which a pipeline that was compiled once goes; no pause between two looks."""
    found = KfpServer()

    def write(output: Path, unrolled: int, image: str, profile: Profile, pipeline: str) -> None:
        output.write_bytes(package.read_bytes() + f"# {image}, {pipeline}, {unrolled} attempts\n".encode())

    monkeypatch.setattr("trimtab.pipelines.package.write", write)
    monkeypatch.setattr(watch, "INTERVAL", 0.0)
    monkeypatch.setattr(watch.watch, "__defaults__", (0.0,))
    monkeypatch.setenv("TRIMTAB_KFP_HOST", found.host)
    monkeypatch.setenv("HOME", str(package.parent))
    for name in ("TRIMTAB_KFP_NAMESPACE", "TRIMTAB_KFP_TOKEN", "TRIMTAB_KFP_CA", progress.ENVIRONMENT):
        monkeypatch.delenv(name, raising=False)
    yield found
    found.close()


def trimtab(capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str]:
    """Runs a command; returns its exit code and all that it says, on one line."""
    code = main.main(list(options))
    said = capsys.readouterr()
    assert "Traceback" not in said.err
    return code, " ".join((said.out + said.err).split())


def test_a_version_is_uploaded_once(server, capsys):
    assert trimtab(capsys, "upload")[0] == 0
    code, said = trimtab(capsys, "upload")
    assert (code, "is there already" in said) == (0, True)
    assert trimtab(capsys, "upload", "--image", "registry/other:1")[0] == 0
    names = [version["display_name"] for version in server.kept["versions"]]
    assert len(server.kept["pipelines"]) == 1 and len(set(names)) == len(names) == 2


def test_another_was_quicker(server, capsys):
    """The version appears between the question and the upload: a conflict, and no error."""
    trimtab(capsys, "upload")
    answer, asked = server.reply, []

    def late(method: str, path: str, query: dict[str, str], sent: Any) -> tuple[int, Any]:
        if method == "GET" and "versions" in path and not asked:
            asked.append(path)
            return 200, {}
        return answer(method, path, query, sent)

    server.reply = late
    assert trimtab(capsys, "upload")[0] == 0
    assert asked and len(server.kept["versions"]) == 1


def test_submit(server, capsys):
    code, said = trimtab(capsys, "submit", *RUN, "--goal", "lower_cost", "--service-account", "trimtab-runner")
    (run,) = server.kept["runs"]
    assert code == 0 and f"{server.host}/#/runs/details/{run['run_id']}" in said
    assert run["pipeline_version_reference"]["pipeline_version_id"] == "pipeline-version-1"
    assert run["service_account"] == "trimtab-runner" and "pipeline_spec" not in run
    parameters = run["runtime_config"]["parameters"]
    assert parameters["goal"] == "lower_cost" and parameters["name"] == "tiny" and parameters["max_attempts"] == 5
    assert parameters["rollout"] == ""


@pytest.mark.parametrize("command", [["submit"], ["schedule", "--cron", "0 3 * * 1"]])
def test_as_many_attempts_as_are_asked_for(command, server, capsys, monkeypatch):
    """Each costs the run pods and its Workflow room; what is uploaded alone has all that a form may ask for."""
    wanted = []
    write = packages.write
    monkeypatch.setattr(
        "trimtab.pipelines.package.write", lambda *given, **named: (wanted.append(given[1]), write(*given, **named))
    )
    assert trimtab(capsys, *command, *RUN, "--max-attempts", "3")[0] == 0
    assert trimtab(capsys, "upload")[0] == 0
    assert wanted == [3, 10]


ROLLOUT = "{service: assistant, namespace: serving, image: 'a/vllm:1', command: [serve], loader: 'a/b:1'%s}"


@pytest.mark.parametrize("command", [["submit"], ["schedule", "--cron", "0 3 * * 1"]])
def test_a_rollout_goes_along(command, server, capsys, tmp_path):
    (tmp_path / "rollout.yaml").write_text(ROLLOUT % ", approval_minutes: 60")
    assert trimtab(capsys, *command, *RUN, "--rollout", str(tmp_path / "rollout.yaml"))[0] == 0
    (started,) = server.kept["runs" if command == ["submit"] else "recurringruns"]
    settings = Rollout.parse(started["runtime_config"]["parameters"]["rollout"])
    assert (settings.service, settings.approval_minutes) == ("assistant", 60)


@pytest.mark.parametrize("command", [["submit"], ["schedule", "--cron", "0 3 * * 1"]])
def test_a_registry_goes_along(command, server, capsys):
    code, said = trimtab(capsys, *command, *RUN, "--registry", "registry:8080")
    assert code == 2 and "registry: 'registry:8080' is not valid; write https://host[:port]" in said
    assert trimtab(capsys, *command, *RUN, "--registry", "http://registry:8080")[0] == 0
    (started,) = server.kept["runs" if command == ["submit"] else "recurringruns"]
    assert started["runtime_config"]["parameters"]["registry"] == "http://registry:8080"


@pytest.mark.parametrize(
    ("store", "more", "message"),
    [
        ("s3://b/s", ", approval: 60", "approval: unknown key 'approval'; write 'approval_minutes'"),
        ("/shared/store", "", "rollout: its pods cannot read the store '/shared/store'; write store: s3://bucket/prefix"),
    ],
)
def test_a_rollout_that_cannot_be_is_refused_before_the_run(store, more, message, server, capsys, tmp_path):
    (tmp_path / "rollout.yaml").write_text(ROLLOUT % more)
    options = ["--model", "org/tiny", "--store", store, "--rollout", str(tmp_path / "rollout.yaml")]
    code, said = trimtab(capsys, "submit", *options)
    assert (code, message in said, server.kept["runs"]) == (2, True, []), said


def test_namespace_and_token(server, capsys, monkeypatch):
    server.multi_user = True
    code, said = trimtab(capsys, "submit", *RUN)
    assert (code, "has a namespace for each user; write --namespace NAME" in said) == (2, True)
    monkeypatch.setenv("TRIMTAB_KFP_TOKEN", "of-the-environment")
    assert trimtab(capsys, "submit", *RUN, "--namespace", "team")[0] == 0
    assert server.kept["experiments"][0]["namespace"] == server.kept["pipelines"][0]["namespace"] == "team"
    assert server.headers[-1]["authorization"] == "Bearer of-the-environment"
    assert trimtab(capsys, "submit", *RUN, "--namespace", "team", "--token", "of-the-flag")[0] == 0
    assert server.headers[-1]["authorization"] == "Bearer of-the-flag"


def test_schedules(server, capsys):
    for name in ("nightly", "weekly", "monthly"):
        assert trimtab(capsys, "schedule", *RUN, "--cron", "0 3 * * 1", "--name", name)[0] == 0
    assert [pipeline["display_name"] for pipeline in server.kept["pipelines"]] == ["trimtab-rebuild"]
    for item in server.kept["recurringruns"]:
        assert item["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * 1"
        assert (item["no_catchup"], int(item["max_concurrency"])) == (True, 1)
    code, said = trimtab(capsys, "schedules")
    assert code == 0 and all(name in said for name in ("nightly", "weekly", "monthly")), said  # two a page
    code, said = trimtab(capsys, "schedule", *RUN, "--cron", "0 3 * * 1", "--name", "weekly")
    assert (code, "a schedule 'weekly' exists; write trimtab unschedule weekly first" in said) == (2, True)
    assert trimtab(capsys, "unschedule", "monthly")[0] == 0
    assert [item["display_name"] for item in server.kept["recurringruns"]] == ["nightly", "weekly"]
    code, said = trimtab(capsys, "unschedule", "nightli")
    assert (code, "there is no 'nightli'; write 'nightly'" in said) == (2, True)


def test_a_schedule_of_another_pipeline(server, capsys):
    assert trimtab(capsys, "schedule", *RUN, "--cron", "0 3 * * 1", "--pipeline", "optimize")[0] == 0
    assert [pipeline["display_name"] for pipeline in server.kept["pipelines"]] == ["trimtab-optimize"]


@pytest.fixture
def scheduled(tmp_path, server) -> tuple[Store, str, list[str]]:
    """A store, its only tree, and what schedules it as a model."""
    store = open_store(str(tmp_path / "store"))
    model = store.put_json("checkpoint", {}).uri.removeprefix("file://")
    return store, model, ["schedule", "--model", model, "--store", str(tmp_path / "store"), "--cron", "0 3 * * 1"]


def pins(store: Store) -> list[Path]:
    return list(Path(store.uri.removeprefix("file://")).glob("pins/*.json"))


def test_a_schedule_pins_its_model(server, capsys, scheduled):
    """The model that is a tree of the store is kept for as long as the schedule lasts."""
    store, model, command = scheduled
    for name in ("nightly", "weekly"):
        assert trimtab(capsys, *command, "--name", name)[0] == 0
    assert len(pins(store)) == 2 and all(model.rpartition("/")[2] in pin.read_text() for pin in pins(store))
    assert trimtab(capsys, "unschedule", "nightly")[0] == 0
    (left,) = pins(store)
    assert left.stem == f"schedule-{server.kept['recurringruns'][0]['recurring_run_id']}"


def test_no_schedule_without_its_model(server, capsys, scheduled, monkeypatch):
    store, model, command = scheduled
    gone = model[:-4] + "0000"
    code, said = trimtab(capsys, *[gone if option == model else option for option in command], "--name", "nightly")
    assert (code, "there is no tree" in said, server.kept["recurringruns"]) == (4, True, []), said

    def refuse(*_: Any) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(Store, "pin", refuse)
    code, said = trimtab(capsys, *command, "--name", "nightly")
    assert (code, "the disk is full" in said, server.kept["recurringruns"]) == (4, True, []), said


def story(package: Path, *looks: tuple[str, list[tuple[str, str]]], store: str) -> list[dict[str, Any]]:
    """Looks at a run: (its state, [(key of a task, its state), …]), as the server shows them."""
    spec = yaml.safe_load(package.read_text())
    return [
        {
            "state": state,
            "pipeline_spec": spec,
            "runtime_config": {"parameters": {"store": store}},
            "run_details": {
                "task_details": [
                    {
                        "task_id": str(number),
                        "display_name": key,
                        "state": task,
                        "create_time": f"2026-11-24T10:00:{number:02d}Z",
                    }
                    for number, (key, task) in enumerate(tasks)
                ]
            },
        }
        for state, tasks in looks
    ]


def attempts_told(store: Path, run: str, *outcomes: str) -> None:
    lines = [
        {"recipe": f"recipe {number}", "outcome": outcome, "reason": f"reason {number}"}
        for number, outcome in enumerate(outcomes)
    ]
    open_store(str(store)).write_status(run, "attempts", lines)


BEGINNING = [("fetch", "SUCCEEDED"), ("attempt", "SUCCEEDED"), ("prepare", "SUCCEEDED"), ("attempt-2", "RUNNING")]
ENDS = [
    ("SUCCEEDED", "accepted", [("gate", "SUCCEEDED")], 0, "the run released its model"),
    ("FAILED", "rejected", [("summarize", "SUCCEEDED"), ("gate", "FAILED")], 3, "no recipe passed: reason 1"),
    ("FAILED", "accepted", [("gate", "FAILED")], 4, "deploy gate failed"),
    ("FAILED", "rejected", [("quantize", "FAILED")], 4, "attempt 1, quantize failed"),
    ("FAILED", "rejected", [("quantize", "RUNNING")], 4, "quantize was killed: its pod ended without a word"),
    ("CANCELED", "rejected", [], 4, "the run was canceled; submit it again"),
]


@pytest.mark.parametrize(("state", "outcome", "last", "exit_code", "says"), ENDS)
def test_watch(state, outcome, last, exit_code, says, server, package, capsys, tmp_path):
    server.kept["runs"].append({"run_id": "r-1"})
    server.story = story(
        package, ("PENDING", []), ("RUNNING", BEGINNING), (state, [*BEGINNING, *last]), store=str(tmp_path / "store")
    )
    attempts_told(tmp_path / "store", "r-1", "baseline", outcome)
    code, said = trimtab(capsys, "watch", f"{server.host}/#/runs/details/r-1")
    assert (code, says in said) == (exit_code, True), said
    assert "fetch model: done baseline: done baseline, prepare: done attempt 1: running" in said
    assert said.count(f"attempt 1, recipe 1: {outcome}; reason 1") == 1


def test_watch_a_pod_that_is_begun_again(server, package, capsys, tmp_path):
    """Argo numbers the pods of a task; the stage itself goes on."""
    server.kept["runs"].append({"run_id": "r-1"})
    stage = [*BEGINNING, ("quantize", "RUNNING"), ("executor(0)", "FAILED"), ("executor(1)", "RUNNING")]
    server.story = story(package, ("RUNNING", stage), ("RUNNING", stage), ("SUCCEEDED", BEGINNING), store=str(tmp_path))
    code, said = trimtab(capsys, "watch", "r-1")
    assert code == 0 and said.count("attempt 1, quantize: its pod was killed; begun again, try 2") == 1, said


@pytest.mark.parametrize("command", [["submit"], ["schedule", "--cron", "0 3 * * 1"]])
@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("recipe", "{calibrate: {text: 'hf:owner/{{name}}'}}"),
        ("evaluation", "{tasks: ['{{workflow.name}}']}"),
        ("rollout", ROLLOUT % ", prompts: ['Say {{ greeting }}.']"),
    ],
)
def test_what_argo_would_fill_in_is_refused(option, text, command, server, capsys, tmp_path):
    (tmp_path / "input.yaml").write_text(text)
    code, said = trimtab(capsys, *command, *RUN, f"--{option}", str(tmp_path / "input.yaml"))
    assert (code, f"{option}: '…" in said) == (2, True), said
    assert "which a cluster's Argo Workflows reads as a tag of its own" in said
    assert not server.kept["versions"] and not server.kept["runs"]


@pytest.mark.parametrize(
    ("tasks", "says"),
    [
        (["review"], "nothing has changed, so the run kept the last release"),
        (["review", "attempt", "gate"], "the run released its model"),
    ],
)
def test_watch_a_rebuild(tasks, says, rebuilding, server, tmp_path, capsys):
    server.kept["runs"].append({"run_id": "r-1"})
    done = [(key, "SUCCEEDED") for key in tasks]
    server.story = story(rebuilding, ("SUCCEEDED", done), store=str(tmp_path / "store"))
    code, said = trimtab(capsys, "watch", "r-1")
    assert (code, says in said, "what changed?: done" in said) == (0, True, True), said


ROLLED_OUT = [
    ("SUCCEEDED", [("roll-out", "SUCCEEDED")], "assistant serves 0123456789ab", 0, "the run released its model"),
    (
        "FAILED",
        [("roll-out", "SUCCEEDED"), ("fail-rollout", "FAILED")],
        "assistant: rolled back, r1 serves",
        3,
        "the run released its model, which does not serve: assistant: rolled back, r1 serves",
    ),
    ("FAILED", [("roll-out", "FAILED")], "assistant: applied", 4, "rollout failed; its log is on the run's page"),
]


@pytest.mark.parametrize(("state", "last", "line", "exit_code", "says"), ROLLED_OUT)
def test_watch_a_rollout(state, last, line, exit_code, says, server, package, capsys, tmp_path):
    """What happens in it is shown as it happens, with the command by which a person approves on one line."""
    run = "0b0c4b6e-3b7d-4c57-9d55-6f2b7c1d8a90"
    waits = f"waits up to 60 minutes for approval: kubectl {'-' * 150} -p '{{}}'"
    status.write_rollout(open_store(str(tmp_path / "store")), run, [waits, line])
    attempts_told(tmp_path / "store", run, "baseline", "accepted")
    server.kept["runs"].append({"run_id": run})
    done = [*BEGINNING, ("gate", "SUCCEEDED")]
    server.story = story(package, ("RUNNING", done), (state, [*done, *last]), store=str(tmp_path / "store"))
    code = main.main(["watch", run])
    said = capsys.readouterr().err
    assert said.count(f"rollout: {waits}\n") == 1 and f"rollout: {line}\n" in said
    assert (code, says in " ".join(said.split())) == (exit_code, True), said


def test_a_run_that_is_no_longer_watched_goes_on(server, package, capsys, monkeypatch):
    def interrupted(connection, run):
        raise KeyboardInterrupt

    monkeypatch.setattr(watch, "watch", interrupted)
    code, said = trimtab(capsys, "watch", "r-1")
    assert code == 130 and "the run goes on, and `trimtab watch r-1` follows it again" in said


def test_watch_without_the_store(server, package, capsys):
    server.kept["runs"].append({"run_id": "r-1"})
    server.story = story(package, ("RUNNING", BEGINNING), ("SUCCEEDED", BEGINNING), store="gs://elsewhere")
    code, said = trimtab(capsys, "watch", "r-1")
    assert code == 0 and said.count("verdicts are not shown, the run's page has them") == 1


def test_a_lost_connection_is_tried_again(server, package, capsys, monkeypatch):
    monkeypatch.setattr(connection.time, "sleep", lambda seconds: None)
    server.kept["runs"].append({"run_id": "r-1"})
    server.story = story(package, ("SUCCEEDED", BEGINNING), store="gs://elsewhere")
    server.faults = [("drop", "")] * 5 + [(503, "busy")] * 2
    code, said = trimtab(capsys, "watch", "r-1")
    assert (code, "does not answer; trying again" in said) == (0, True), said
    assert server.faults == []


def test_what_must_not_happen_twice_is_not_tried_again(server, capsys):
    trimtab(capsys, "upload")
    answer = server.reply

    def broken(method: str, path: str, query: dict[str, str], sent: Any) -> tuple[int, Any]:
        return (503, {"message": "busy"}) if (method, path) == ("POST", "runs") else answer(method, path, query, sent)

    server.reply = broken
    code, said = trimtab(capsys, "submit", *RUN)
    assert (code, "cannot start a run" in said) == (4, True), said
    assert [path for method, path, _ in server.requests if (method, path) == ("POST", "runs")] == ["runs"]


REFUSALS = [
    (401, 2, "token: cannot list pipelines at {host}: it does not know who you are; write --token"),
    (403, 2, "namespace: cannot list pipelines at {host}: you may not;"),
    (404, 2, "cannot list pipelines at {host}: there is no such thing; correct the name, or --host"),
    (400, 2, "it answered 400 (it says: no); correct what it names"),
]


@pytest.mark.parametrize(("status", "exit_code", "message"), REFUSALS)
def test_refusals(status, exit_code, message, server, capsys):
    server.faults = [(status, "no")]
    code, said = trimtab(capsys, "upload", "--token", "secret-token")
    assert (code, message.format(host=server.host) in said) == (exit_code, True), said
    assert "secret-token" not in said


def test_no_such_run(server, capsys):
    code, said = trimtab(capsys, "watch", "r-9")
    assert (code, "cannot read run 'r-9'" in said and "Run r-9 not found" in said) == (2, True)


def test_a_login_page(server, capsys):
    server.page = "<html>Log in</html>"
    code, said = trimtab(capsys, "upload")
    assert (code, "it answers with a page, such as a login; write --token" in said) == (2, True), said


LACKS = "runs Kubeflow Pipelines {}, which cannot run this pipeline: it lacks"
BRANCHES = "the results of pipelines in branches (2.17)"
SERVERS = [
    ("2.5.0", f"{LACKS} optional secrets (2.15), lists on the form of a run (2.16), {BRANCHES}; upgrade it to 2.17.0"),
    ("2.15.2", f"{LACKS} lists on the form of a run (2.16), {BRANCHES}; upgrade it to 2.17.0 or later"),
    ("v2.16.1", f"{LACKS} {BRANCHES}; upgrade it to 2.17.0 or later"),
    ("3.0.0", "runs Kubeflow Pipelines {}, whose API trimtab does not know; write a server of 2.17.0 to 2.x"),
]


@pytest.mark.parametrize(
    "command", [["upload"], ["submit", *RUN], ["schedule", *RUN, "--cron", "0 3 * * 1"]], ids=lambda given: given[0]
)
@pytest.mark.parametrize(("version", "message"), SERVERS)
def test_a_server_that_cannot_run_it(version, message, command, server, capsys):
    """It would take the file, or refuse it in words of its own, and fail when a GPU has been paid for."""
    server.tag = version
    code, said = trimtab(capsys, *command)
    assert (code, message.format(version) in said) == (2, True), said
    assert not any(server.kept.values())


@pytest.mark.parametrize(("version", "told"), [("2.17.0", False), ("2.18.1", False), ("", True), ("master", True)])
def test_a_server_that_can_or_does_not_say(version, told, server, capsys):
    server.tag = version
    code, said = trimtab(capsys, "upload")
    assert (code, "does not say which version it is; the pipeline needs 2.17.0 or later" in said) == (0, told), said


BAD = [
    (["upload", "--host", "kfp.example"], 2, "host: 'kfp.example' is not valid; write https://host[:port][/path]"),
    (["upload", "--host", "http://127.0.0.1:1"], 4, "it refuses the connection; correct --host"),
    (["upload", "--ca", "no.pem"], 2, "ca: 'no.pem' is not a file"),
    (["watch", "a run?"], 2, "run: 'a run?' is not valid"),
    (["submit", "--model", "./tiny", "--store", "s3://b/s"], 2, "model: './tiny' is of this machine"),
    (["submit", "--model", "org/tiny", "--store", "store"], 2, "store: 'store' is of this machine"),
    (["upload", "--pipeline", "rebuid"], 2, "pipeline: 'rebuid' is not valid; write 'rebuild'"),
    (["schedule", *RUN, "--cron", "0 3 * * 1", "--pipeline", "all"], 2, "pipeline: 'all' is not valid"),
    (["submit", *RUN, "--goal", "cheaper"], 2, "goal: 'cheaper' is not valid"),
    (["schedule", *RUN, "--cron", "0 0 30 2 *"], 2, "cron: '0 0 30 2 *' never fires"),
]


@pytest.mark.parametrize(("options", "exit_code", "message"), BAD)
def test_bad_input(options, exit_code, message, server, capsys):
    code, said = trimtab(capsys, *options)
    assert (code, message in said) == (exit_code, True), said
    assert not server.kept["runs"] and not server.kept["recurringruns"]


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
def test_what_pods_cannot_see_is_refused(option, text, message, command, profile, server, capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("Of this machine.")
    (tmp_path / "profile.yaml").write_text(profile or "{}")
    (tmp_path / "input.yaml").write_text(text.format(tmp_path))
    options = [f"--{option}", str(tmp_path / "input.yaml"), "--profile", str(tmp_path / "profile.yaml")]
    code, said = trimtab(capsys, *command, *RUN, *options)
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
def test_a_store_that_pods_do_not_reach(profile, here, message, server, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", here)
    (tmp_path / "profile.yaml").write_text(profile)
    code, said = trimtab(capsys, "submit", *RUN, "--profile", str(tmp_path / "profile.yaml"))
    assert (code, message in said, bool(server.kept["runs"])) == (2 if message else 0, True, not message), said


def test_the_artifact_of_an_earlier_run_goes_along(server, capsys):
    """By the address that its page shows."""
    model = "minio://mlpipeline/v2/artifacts/optimize/1/quantize/2/export"
    assert trimtab(capsys, "submit", "--model", model, "--store", "s3://bucket/store")[0] == 0
    assert server.kept["runs"][0]["runtime_config"]["parameters"]["model"] == model


def test_what_pods_can_see_goes_along(server, capsys, tmp_path):
    """What the refusals say to write; below a volume that is mounted on this machine too."""
    (tmp_path / "profile.yaml").write_text(f"cache: {{claim: shared, path: {tmp_path}}}")
    (tmp_path / "notes.txt").write_text("On the volume.")
    (tmp_path / "evaluation.yaml").write_text(f"{{heldout: {tmp_path}/notes.txt, task_path: {tmp_path}/tasks}}")
    (tmp_path / "recipe.yaml").write_text(
        f"{{calibrate: {{text: [{{text: 'hf:owner/name'}}, {{text: /opt/image/notes.txt}}]}}, "
        f"distill: {{tokens: 65536, text: {tmp_path}/notes.txt}}, workload: {{recorded: 's3://bucket/traffic'}}}}"
    )
    options = [f"--{name}={tmp_path / name}.yaml" for name in ("profile", "evaluation", "recipe")]
    code, said = trimtab(capsys, "submit", *RUN, *options)
    assert code == 0, said
    (run,) = server.kept["runs"]
    evaluation = yaml.safe_load(run["runtime_config"]["parameters"]["evaluation"])
    assert evaluation["heldout"] == f"{tmp_path}/notes.txt" and evaluation["task_path"] == f"{tmp_path}/tasks"
