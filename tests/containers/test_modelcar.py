"""A pushed release as KServe runs it: podman pulls the image and starts it with the command of KServe's webhook."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from releases import Released

from trimtab.pipelines.commands import main
from trimtab.store import open_store

pytestmark = pytest.mark.containers

#: What KServe's webhook gives the container, and the init container, as arguments.
LINK = ["sh", "-c", "ln -s /proc/$$/root/models /mnt/models && sleep infinity"]
FETCH = ["sh", "-c", "echo 'Pre-fetching modelcar' && exit 0"]


@pytest.fixture
def car(podman: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The image of a release, which podman has read from a layout on disk."""
    pytest.importorskip("modelcar_base_image")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    Released(open_store("trimtab-store"), tmp_path)
    assert main.main(["push", "tiny", "oci:modelcar", "--key", "gate.pub"]) == 0
    done = subprocess.run(
        ["podman", "pull", "--quiet", f"oci:{tmp_path / 'modelcar'}:latest"], check=True, capture_output=True, text=True
    )
    image = podman.images.get(done.stdout.split()[-1])
    yield image
    podman.images.remove(image.id, force=True)


def test_the_image_links_the_model_as_kserve_asks(podman: Any, car: Any, tmp_path: Path) -> None:
    podman.containers.run(car.id, FETCH, network_mode="none", remove=True)
    mounted = tmp_path / "mnt"
    mounted.mkdir()
    running = podman.containers.run(
        car.id, LINK, network_mode="none", detach=True, volumes={str(mounted): {"bind": "/mnt", "mode": "rw"}}
    )
    try:
        for _ in range(100):
            if (mounted / "models").is_symlink():
                break
            time.sleep(0.1)
        link = str((mounted / "models").readlink())
        assert link.startswith("/proc/") and link.endswith("/root/models")
        # What the container's first process has at its root, as the server sees it by the link.
        running.reload()
        seen = Path(f"/proc/{running.attrs['State']['Pid']}/root/models")
        assert (seen / "model.safetensors").read_bytes() == bytes(range(256)) * 4
        command = [sys.executable, "-m", "model_signing", "verify", "key", seen, "--signature", seen / "model.sig"]
        checked = subprocess.run([*command, "--public_key", "gate.pub"], capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout + checked.stderr
    finally:
        running.remove(force=True)
