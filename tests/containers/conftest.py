"""Podman as the engine of kfp.local's DockerRunner, with its service on a socket of the session's own."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

#: Hosts that deny CAP_SYS_RESOURCE, as many CI machines do, cannot raise limits, and there crun fails.
LIMITS = 'default_ulimits = ["nofile=4096:4096", "nproc=16384:16384"]\n'


def missing(what: str) -> NoReturn:
    """A laptop may lack podman or the image; in CI their absence must not pass for success."""
    if os.environ.get("CI") == "true":
        pytest.fail(what)
    pytest.skip(what)


@pytest.fixture(scope="session")
def podman() -> Iterator[Any]:
    """A client of the docker SDK that talks to podman; DOCKER_HOST is set for kfp.local."""
    if not shutil.which("podman"):
        missing("podman is not installed")
    if not importlib.util.find_spec("docker"):
        missing("the Python package docker is not installed")
    import docker
    from docker.models.containers import ContainerCollection

    home = Path(tempfile.mkdtemp(prefix="podman"))  # not pytest's: a socket's path has 107 bytes at most
    settings, address = home / "containers.conf", f"unix://{home / 'podman.sock'}"
    runtime = '[engine]\nruntime = "runc"\n' if shutil.which("runc") else ""
    settings.write_text(f"[containers]\n{LIMITS}{runtime}")
    with pytest.MonkeyPatch.context() as patch, (home / "log").open("w") as log:
        patch.setenv("DOCKER_HOST", address)
        patch.setattr(ContainerCollection, "run", _kept(ContainerCollection.run, home.name))
        service = subprocess.Popen(
            ["podman", "system", "service", "--time=0", address],
            env={**os.environ, "CONTAINERS_CONF": str(settings)},
            stdout=log,
            stderr=log,
        )
        try:
            client = _connected(docker, service, home / "log")
            yield client
            for container in client.containers.list(all=True, filters={"label": f"trimtab-test={home.name}"}):
                container.remove(force=True)
        finally:
            service.terminate()
            service.wait(timeout=30)
            shutil.rmtree(home)


def _kept(run: Callable[..., Any], label: str) -> Callable[..., Any]:
    """Keeps a container that has ended, until its logs and its exit code were read.

    kfp 2.17's DockerRunner has it removed at once. When it asks too late, it loses the logs with an APIError, or
    takes a failure for a success.
    """

    def run_kept(self: Any, *arguments: Any, **settings: Any) -> Any:
        if settings.get("auto_remove"):
            settings |= {"auto_remove": False, "labels": {"trimtab-test": label}}
        return run(self, *arguments, **settings)

    return run_kept


def _connected(docker: Any, service: subprocess.Popen, log: Path) -> Any:
    for _ in range(120):
        if service.poll() is not None:
            break
        try:
            return docker.from_env(timeout=300)
        except docker.errors.DockerException:
            time.sleep(0.25)
    return missing(f"podman's service did not start: {log.read_text()[-2000:]}")


@pytest.fixture(scope="session")
def image(podman: Any) -> str:
    from trimtab.components import images

    if not any(images.CPU in known.tags for known in podman.images.list()):
        missing(f"{images.CPU} is not built; see images/README.md")
    return images.CPU


@pytest.fixture(scope="session")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """A function: makes a folder that containers of another user may write, and all that is made in it too."""
    before = os.umask(0)
    try:
        root = tmp_path_factory.mktemp("outside")
        for folder in (root, *list(root.parents)[:2]):
            folder.chmod(0o755)
        yield lambda name: _made(root / name)
    finally:
        os.umask(before)


def _made(folder: Path) -> Path:
    folder.mkdir(mode=0o777)
    return folder
