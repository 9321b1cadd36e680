"""A headless Chromium, spoken to through the DevTools protocol: one process that opens pages, one after the other."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websocket import WebSocket, create_connection

SECONDS = 30


@dataclass(frozen=True)
class Screen:
    """What a page is looked at on: its size in CSS pixels and its colour scheme."""

    name: str
    width: int
    height: int
    scheme: str
    mobile: bool = False


@dataclass
class Page:
    """A page that is open: what it asked the network for, and what it complained of."""

    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)


def program() -> str | None:
    """Chromium's program, None where it is not installed."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


class Chromium:
    """The browser. `open` shows a file; `evaluate` and `picture` are of the file that was opened last."""

    def __init__(self, chromium: str):
        self.home = Path(tempfile.mkdtemp(prefix="chromium"))
        flags = ["--headless=new", "--remote-debugging-port=0", f"--user-data-dir={self.home}", "--no-first-run"]
        flags += ["--disable-gpu", "--disable-dev-shm-usage", "--disable-background-networking", "--hide-scrollbars"]
        if os.geteuid() == 0:  # Chromium's sandbox wants a user of its own
            flags.append("--no-sandbox")
        self.log = (self.home / "log").open("wb")
        surroundings = {**os.environ, "TMPDIR": str(self.home)}
        self.process = subprocess.Popen(
            [chromium, *flags, "about:blank"], stdout=self.log, stderr=self.log, env=surroundings
        )
        self.socket: WebSocket | None = None
        self.session, self.number, self.page, self.loaded = "", 0, Page(), False
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def open(self, path: Path, screen: Screen) -> Page:
        """Shows an HTML file on a screen and returns when it has loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=screen.width,
            height=screen.height,
            deviceScaleFactor=1,
            mobile=screen.mobile,
        )
        scheme = [{"name": "prefers-color-scheme", "value": screen.scheme}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.page, self.loaded = Page(), False
        self.call("Page.navigate", url=path.as_uri())
        while not self.loaded:
            self._receive()
        self.evaluate("document.fonts.ready.then(() => true)")
        self.page.requests.remove(path.as_uri())
        return self.page

    def evaluate(self, script: str) -> Any:
        """Returns what an expression of JavaScript is, or promises to be, as plain data."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in done:
            raise RuntimeError(json.dumps(done["exceptionDetails"])[:1000])
        return done["result"].get("value")

    def picture(self) -> bytes:
        """Returns the whole page as PNG, a pixel for each of CSS."""
        size = self.call("Page.getLayoutMetrics")["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": size["height"], "scale": 1}
        shot = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip, optimizeForSpeed=True)
        return base64.b64decode(shot["data"])

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command of the protocol and returns its result."""
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        self.socket.send(json.dumps(message | ({"sessionId": self.session} if self.session else {})))
        while (answer := self._receive()).get("id") != self.number:
            pass
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']['message']}")
        return answer["result"]

    def close(self) -> None:
        """Ends the browser and removes what it wrote."""
        if self.socket:
            self.socket.close()
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.log.close()
        shutil.rmtree(self.home, ignore_errors=True)

    def _connect(self) -> None:
        port, deadline = self.home / "DevToolsActivePort", time.monotonic() + SECONDS
        while not (port.exists() and port.read_text().count("\n")):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"Chromium did not start: {(self.home / 'log').read_text()[-2000:]}")
            time.sleep(0.05)
        number, path = port.read_text().split()
        self.socket = create_connection(f"ws://127.0.0.1:{number}{path}", timeout=SECONDS, suppress_origin=True)
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def _receive(self) -> dict[str, Any]:
        message = json.loads(self.socket.recv())
        about = message.get("params", {})
        match message.get("method"):
            case "Page.loadEventFired":
                self.loaded = True
            case "Network.requestWillBeSent":
                self.page.requests.append(about["request"]["url"])
            case "Runtime.consoleAPICalled" if about["type"] in ("error", "warning", "assert"):
                self.page.complaints.append(" ".join(str(value.get("value", "")) for value in about["args"]))
            case "Runtime.exceptionThrown":
                self.page.complaints.append(about["exceptionDetails"]["text"])
            case "Log.entryAdded" if about["entry"]["level"] in ("error", "warning"):
                self.page.complaints.append(about["entry"]["text"])
        return message
