"""The command: what it says to bad input, and SIGTERM during load in a process of its own."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from trimtab.pipelines.commands import main, serving
from trimtab.runtime.checkpoint.model_files import load_tokenizer
from trimtab.store import open_store

PROMPT = "The river runs past"
RECIPE = "engine: {max_seq_len: 1200, max_num_tokens: 64, max_batch_size: 2, enable_chunked_prefill: true}\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no-such-folder"], "WHAT: 'no-such-folder' is no model: write a folder with a config.json"),
        (["MODEL", "--port", "70000"], "port: 70000 is not valid; write 0 to 65535"),
        (["MODEL", "--port", "TAKEN"], "cannot be listened on"),
        (["MODEL", "--device", "gpu"], "device: 'gpu' is not valid; write 'cpu'"),
        (["MODEL", "--port", "0", "--strategy", "inflight"], "strategy: 'inflight' is not valid"),
        (["MODEL", "--recipe", "missing.yaml"], "recipe: 'missing.yaml' cannot be read"),
        (["/nowhere/releases/x/000001"], "there is no release"),
    ],
)
def test_bad_input(served: Path, capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        known = {"MODEL": str(served), "TAKEN": str(taken.getsockname()[1])}
        assert main.main(["serve", *(known.get(option, option) for option in options)]) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_release_names_its_artifact_and_its_recipe(served: Path, tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "store"))
    tree = store.put(served, kind="checkpoint")
    release = store.release("small", {"artifact": tree.model_dump(), "recipe": {"engine": {"max_seq_len": 99}}})
    folder, name, recipe = serving._artifact(release)
    assert (folder / "config.json").read_bytes() == (served / "config.json").read_bytes()
    assert (name, json.loads(recipe)["engine"]) == ("small", {"max_seq_len": 99})
    assert serving._artifact(tree.uri)[0] == folder


def complete(url: str, tokens: int) -> tuple[int, dict]:
    body = json.dumps({"prompt": PROMPT, "max_tokens": tokens, "ignore_eos": True}).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{url}/completions", body)) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_sigterm_finishes_what_was_accepted_and_refuses_what_is_new(served: Path, tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    command = [sys.executable, "-m", "trimtab.pipelines.commands.main", "serve", str(served)]
    command += ["--port", "0", "--device", "cpu"]
    command += ["--recipe", str(tmp_path / "recipe.yaml")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        said = iter(process.stderr.readline, "")
        url = next(found[0] for line in said if (found := re.search(r"http://\S+/v1", line)))
        answers: dict[int, tuple[int, dict]] = {}

        def ask(number: int) -> None:
            answers[number] = complete(url, 500)

        clients = [threading.Thread(target=ask, args=(number,)) for number in range(4)]  # two run, two wait
        for client in clients:
            client.start()
        health = url.removesuffix("/v1")
        accepted = f"trimtab_prompt_tokens_total {4 * len(load_tokenizer(served)(PROMPT).input_ids)}.0"
        end = time.monotonic() + 60
        while accepted not in urllib.request.urlopen(f"{health}/metrics").read().decode():
            assert time.monotonic() < end
        process.send_signal(signal.SIGTERM)
        status = 200
        while status == 200:  # the signal may be a moment on its way
            status, refusal = complete(url, 1)
        assert status == 503 and "shutting down" in refusal["error"]["message"]
        for client in clients:
            client.join(60)
        assert [answers[n][0] for n in range(4)] == [200] * 4
        assert {answers[n][1]["usage"]["completion_tokens"] for n in range(4)} == {500}
        assert process.wait(20) == 0
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
