"""The soak of benchmarks/serving.py: many clients, some of them bad, against a server in a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

RECIPE = "engine: {max_seq_len: 512, max_num_tokens: 512, max_batch_size: 32, enable_chunked_prefill: true}\n"
#: What a client does, and its share of the requests.
KINDS = {"whole": 0.4, "stream": 0.4, "leaves": 0.1, "oversized": 0.05, "bad JSON": 0.05}
#: How each must end.
RIGHT = {"whole": "complete", "stream": "complete", "leaves": "left", "oversized": "400", "bad JSON": "400"}


def soak(folder: Path, clients: int, seconds: float) -> dict[str, Any]:
    """Returns how the requests ended, what the server held before and after, and what SIGTERM did."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as recipe:
        recipe.write(RECIPE)
        recipe.flush()
        command = [sys.executable, "-m", "trimtab.pipelines.commands.main", "serve", str(folder)]
        command += ["--port", "0", "--name", "soak"]
        process = subprocess.Popen([*command, "--recipe", recipe.name], stderr=subprocess.PIPE, env=_environment())
        try:
            said = iter(process.stderr.readline, b"")
            host, port = next(m.groups() for line in said if (m := re.search(rb"http://([\d.]+):(\d+)/v1", line)))
            return asyncio.run(_soak((host.decode(), int(port)), process, clients, seconds))
        finally:
            process.kill()
            process.wait()


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "TRIMTAB_PROGRESS"}


async def _soak(address: tuple[str, int], process: subprocess.Popen, clients: int, seconds: float) -> dict[str, Any]:
    ended: Counter[str] = Counter()
    wrong: list[str] = []
    await asyncio.gather(*(_ask(address, "whole", n) for n in range(8)))  # warm-up
    before, end = _memory(process), time.monotonic() + seconds
    latest: list[int] = []

    async def client(number: int) -> None:
        draw = random.Random(number)
        while time.monotonic() < end:
            kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
            outcome = await _ask(address, kind, draw.randrange(1 << 30))
            ended[f"{kind}: {outcome}"] += 1
            if outcome != RIGHT[kind]:
                wrong.append(f"{kind}: {outcome}")

    async def watch() -> None:
        while time.monotonic() < end:
            await asyncio.sleep(seconds / 4)
            latest.append(_memory(process))

    await asyncio.gather(watch(), *(client(number) for number in range(clients)))
    idle = await _metrics(address)
    # SIGTERM with all clients waiting: whoever was accepted gets its answer, the others 503 or no connection.
    last = [asyncio.create_task(_ask(address, "stream", number)) for number in range(clients)]
    accepted = 0
    while accepted < clients // 2:
        await asyncio.sleep(0.01)
        state = await _metrics(address)
        accepted = state["trimtab_running_sequences"] + state["trimtab_waiting_sequences"]
    process.send_signal(signal.SIGTERM)
    after_term = Counter(await asyncio.gather(*last))
    return {
        "clients": clients, "seconds": seconds, "requests": sum(ended.values()), "ended": dict(sorted(ended.items())),
        "wrong": len(wrong), "wrong_examples": wrong[:5],
        "resident_mb_before": before, "resident_mb_during": latest,
        "kv_blocks_used_after": idle["trimtab_kv_blocks_used"], "running_after": idle["trimtab_running_sequences"],
        "generated_tokens": idle["trimtab_generated_tokens_total"], "sigterm": dict(after_term),
        "exit_code": await asyncio.to_thread(process.wait, 60),
    }  # fmt: skip


async def _ask(address: tuple[str, int], kind: str, seed: int) -> str:
    """Sends one request and returns how it ended: complete, cut, left, an HTTP status, or an error's name."""
    draw = random.Random(seed)
    prompt = [draw.randrange(3, 250) for _ in range(2000 if kind == "oversized" else draw.randrange(4, 100))]
    tokens = draw.randrange(4, 64)
    asked = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "temperature": draw.choice([0, 1])}
    body = json.dumps({**asked, "stream": kind in ("stream", "leaves")})
    try:
        status, text = await _post(address, body[:-1] if kind == "bad JSON" else body, leaves=kind == "leaves")
    except OSError as error:
        return type(error).__name__
    if status != 200:
        return str(status)
    if kind == "leaves":
        return "left"
    if kind == "stream":
        return "complete" if text.rstrip().endswith("data: [DONE]") and '"length"' in text else "cut"
    return "complete" if json.loads(text)["usage"]["completion_tokens"] == tokens else "cut"


async def _post(address: tuple[str, int], body: str, leaves: bool) -> tuple[int, str]:
    reader, writer = await asyncio.open_connection(*address)
    try:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write((head + body).encode())
        status = int((await reader.readline()).split()[1])
        if leaves:
            await reader.readuntil(b"data: ")
            return status, ""
        headers = await reader.readuntil(b"\r\n\r\n")
        text = (await reader.read()).decode()
        return status, re.sub(r"\r\n[0-9a-f]+\r\n", "", text) if b"chunked" in headers else text
    except (asyncio.IncompleteReadError, IndexError):
        raise ConnectionResetError from None
    finally:
        writer.close()


async def _metrics(address: tuple[str, int]) -> dict[str, float]:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    lines = (await reader.read()).decode().partition("\r\n\r\n")[2].splitlines()
    writer.close()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if line.startswith("trimtab"))}


def _memory(process: subprocess.Popen) -> int:
    """Resident memory of the server, in MB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) // 1024
