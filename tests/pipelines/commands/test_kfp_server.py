"""How the commands for a cluster and a Kubeflow Pipelines server agree: versions, who may, and what is said once."""

from __future__ import annotations

from typing import Any

import pytest

from .conftest import RUN


def test_a_version_is_uploaded_once(server, trimtab):
    assert trimtab("upload")[0] == 0
    code, said = trimtab("upload")
    assert (code, "is there already" in said) == (0, True)
    assert trimtab("upload", "--image", "registry/other:1")[0] == 0
    names = [version["display_name"] for version in server.kept["versions"]]
    assert len(server.kept["pipelines"]) == 1 and len(set(names)) == len(names) == 2


def test_another_was_quicker(server, trimtab):
    """The version appears between the question and the upload: a conflict, and no error."""
    trimtab("upload")
    answer, asked = server.reply, []

    def late(method: str, path: str, query: dict[str, str], sent: Any) -> tuple[int, Any]:
        if method == "GET" and "versions" in path and not asked:
            asked.append(path)
            return 200, {}
        return answer(method, path, query, sent)

    server.reply = late
    assert trimtab("upload")[0] == 0
    assert asked and len(server.kept["versions"]) == 1


def test_namespace_and_token(server, trimtab, monkeypatch):
    server.multi_user = True
    code, said = trimtab("submit", *RUN)
    assert (code, "has a namespace for each user; write --namespace NAME" in said) == (2, True)
    monkeypatch.setenv("TRIMTAB_KFP_TOKEN", "of-the-environment")
    assert trimtab("submit", *RUN, "--namespace", "team")[0] == 0
    assert server.kept["experiments"][0]["namespace"] == server.kept["pipelines"][0]["namespace"] == "team"
    assert server.headers[-1]["authorization"] == "Bearer of-the-environment"
    assert trimtab("submit", *RUN, "--namespace", "team", "--token", "of-the-flag")[0] == 0
    assert server.headers[-1]["authorization"] == "Bearer of-the-flag"


def test_what_must_not_happen_twice_is_not_tried_again(server, trimtab):
    trimtab("upload")
    answer = server.reply

    def broken(method: str, path: str, query: dict[str, str], sent: Any) -> tuple[int, Any]:
        return (503, {"message": "busy"}) if (method, path) == ("POST", "runs") else answer(method, path, query, sent)

    server.reply = broken
    code, said = trimtab("submit", *RUN)
    assert (code, "cannot start a run" in said) == (4, True), said
    assert [path for method, path, _ in server.requests if (method, path) == ("POST", "runs")] == ["runs"]


REFUSALS = [
    (401, 2, "token: cannot list pipelines at {host}: it does not know who you are; write --token"),
    (403, 2, "namespace: cannot list pipelines at {host}: you may not;"),
    (404, 2, "cannot list pipelines at {host}: there is no such thing; correct the name, or --host"),
    (400, 2, "it answered 400 (it says: no); correct what it names"),
]


@pytest.mark.parametrize(("status", "exit_code", "message"), REFUSALS)
def test_refusals(status, exit_code, message, server, trimtab):
    server.faults = [(status, "no")]
    code, said = trimtab("upload", "--token", "secret-token")
    assert (code, message.format(host=server.host) in said) == (exit_code, True), said
    assert "secret-token" not in said


def test_a_login_page(server, trimtab):
    server.page = "<html>Log in</html>"
    code, said = trimtab("upload")
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
def test_a_server_that_cannot_run_it(version, message, command, server, trimtab):
    """It would take the file, or refuse it in words of its own, and fail when a GPU has been paid for."""
    server.tag = version
    code, said = trimtab(*command)
    assert (code, message.format(version) in said) == (2, True), said
    assert not any(server.kept.values())


@pytest.mark.parametrize(("version", "told"), [("2.17.0", False), ("2.18.1", False), ("", True), ("master", True)])
def test_a_server_that_can_or_does_not_say(version, told, server, trimtab):
    server.tag = version
    code, said = trimtab("upload")
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
def test_bad_input(options, exit_code, message, server, trimtab):
    code, said = trimtab(*options)
    assert (code, message in said) == (exit_code, True), said
    assert not server.kept["runs"] and not server.kept["recurringruns"]
