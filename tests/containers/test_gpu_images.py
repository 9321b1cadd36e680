"""The images for NVIDIA's GPUs, built as images/README.md says, on the base that was built here.

What NVIDIA would bring is a stand-in: wheels and Debian packages of a few bytes, with the names and versions that the
Containerfiles ask for, and an image laid out as that of TensorRT-LLM is. pip, apt and buildah are the real ones: what
is seen here is the Containerfiles' own work: build arguments, labels, user, environment, and what stays NVIDIA's.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

import trimtab

pytestmark = [pytest.mark.containers, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
BASE = f"localhost/trimtab-base:{trimtab.__version__}"
PREFIX = "localhost/trimtab-stand-in"
OFFLINE = "PIP_ARGS=--no-index --find-links=/dist"
REVISION = "0123456789abcdef"
#: What NVIDIA's image holds: its torch has a version that no index has.
NVIDIA = {"torch": "2.9.0a0+145a3a7", "tensorrt_llm": "1.2.1", "transformers": "4.57.1"}
#: Where the packages of the system's Python lie, in Debian and in Python's own images.
SYSTEM = "/usr/local/lib/python3"

#: A mirror of Debian with two packages of no content, and a third that only `Recommends` would bring.
DEBIAN = f"""
FROM {BASE}
USER 0
COPY debs /debs
RUN cd /debs && for p in gcc libc6-dev manual; do dpkg-deb --build $p $p.deb \\
    && {{ dpkg-deb --field $p.deb; echo "Filename: ./$p.deb"; echo "Size: $(stat -c %s $p.deb)"; \\
        echo "SHA256: $(sha256sum $p.deb | cut -d ' ' -f 1)"; echo; }} >> Packages; done \\
    && cd /etc/apt && rm -rf sources.list sources.list.d && echo 'deb [trusted=yes] file:/debs ./' > sources.list
USER 1000:0
"""
#: TensorRT-LLM's release: packages of the system's own Python, a user of its own, a script that greets.
RELEASE = f"""
FROM {BASE}
USER 0
COPY nvidia /nvidia
RUN python3 -m pip install --no-index --no-deps --find-links=/nvidia {" ".join(NVIDIA)} \\
    && mv /opt/trimtab/lib/python3*/site-packages /held && rm -rf /opt/trimtab /held/pip /held/pip-* \\
    && into=$(python3 -c 'import site; print(site.getsitepackages()[0])') && mkdir -p $into && mv /held/* $into/ \\
    && userdel trimtab && useradd --uid 1000 ubuntu
ENV VIRTUAL_ENV= PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root TRITON_CACHE_DIR=/root
ENTRYPOINT ["echo", "welcome"]
"""
#: What an image says of itself, as JSON.
PROBE = """
import json, os, sys
from importlib import metadata, util

import trimtab
print(json.dumps({
    "ids": [os.getuid(), os.getgid()],
    "home": os.environ["HOME"],
    "commit": os.environ["TRIMTAB_COMMIT"],
    "packages": {name: [metadata.version(name), util.find_spec(name).origin] for name in sys.argv[1:]},
    "trimtab": trimtab.__file__,
    "authority": os.path.exists("/run/secrets/ca"),
}))
"""


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """Writes a wheel with an empty module."""
    name = name.replace("-", "_")
    told = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}", *(f"Requires-Dist: {r}" for r in requires)]
    about = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": "",
        f"{about}/METADATA": "\n".join(told) + "\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    for path, text in files.items():
        found = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={found},{len(text.encode())}\n")
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        for path, text in {**files, f"{about}/RECORD": f"{''.join(rows)}{about}/RECORD,,\n"}.items():
            archive.writestr(path, text)


def debian(folder: Path, name: str, *fields: str) -> None:
    """Writes what dpkg-deb makes a package of: a file of the package's name in /usr/bin."""
    (folder / name / "DEBIAN").mkdir(parents=True)
    (folder / name / "DEBIAN").chmod(0o755)  # the tests beside these give everyone's rights to what they make
    (folder / name / "usr/bin").mkdir(parents=True)
    (folder / name / "usr/bin" / name).write_text("#!/bin/sh\n")
    (folder / name / "usr/bin" / name).chmod(0o755)
    common = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: a stand-in\n"
    (folder / name / "DEBIAN/control").write_text(common + "".join(f"{field}\n" for field in fields))


def lowest(requirement: Requirement) -> str:
    """A version that a requirement of pyproject.toml allows: its lower bound."""
    (bound,) = (spec for spec in requirement.specifier if spec.operator in (">=", "=="))
    return bound.version.removesuffix(".*")


@pytest.fixture(scope="module")
def context(podman: Any, image: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the images are built from: the repository's files, the wheel of the image that CI built, and stand-ins."""
    folder = tmp_path_factory.mktemp("context")
    shutil.copytree(ROOT / "images", folder / "images")
    shutil.copy(ROOT / "pyproject.toml", folder)
    name = f"trimtab-{trimtab.__version__}-py3-none-any.whl"
    (folder / "dist").mkdir()
    container = podman.containers.create(image, ["true"])
    packed, _ = container.get_archive(f"/opt/trimtab/share/{name}")
    with tarfile.open(fileobj=io.BytesIO(b"".join(packed))) as archive:
        archive.extract(name, folder / "dist", filter="data")
    container.remove()

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for requirement in map(Requirement, extras["torch"] + extras["registry"]):
        if requirement.name not in ("torch", "lm-eval"):
            wheel(folder / "dist", requirement.name, lowest(requirement))
    for version in ("2.12.0", "2.13.0"):  # PyPI's torch for Linux brings CUDA's libraries
        wheel(folder / "dist", "torch", version, "nvidia-cublas", "triton")
    for library in ("nvidia-cublas", "triton"):
        wheel(folder / "dist", library, "3.6")
    (judge,) = (r for r in map(Requirement, extras["trtllm-image"]) if r.name == "lm-eval")
    wheel(folder / "dist", "lm-eval", lowest(judge), "torch>=1.8", "transformers>=4.1")
    wheel(folder / "dist" / "newer", "lm-eval", lowest(judge), "torch>=2.13", "transformers>=4.1")
    wheel(folder / "dist" / "newer", "torch", "2.13.0")

    for package, version in NVIDIA.items():
        wheel(folder / "nvidia", package, version)
    debian(folder / "debs", "gcc", "Recommends: manual")
    debian(folder / "debs", "libc6-dev")
    debian(folder / "debs", "manual")
    (folder / "ca.pem").write_text("of the site\n")
    return folder


@pytest.fixture(scope="module")
def build(context: Path) -> Iterator[Callable[..., subprocess.CompletedProcess]]:
    """A function: builds a Containerfile as .ci/run does; what it tags is removed afterwards."""
    built = []

    def run(file: Path, name: str, *arguments: str) -> subprocess.CompletedProcess:
        given = [word for argument in arguments for word in ("--build-arg", argument)]
        options = ["--isolation", "chroot", "--network", "host", "--secret", f"id=ca,src={context / 'ca.pem'}"]
        built.append(f"{PREFIX}-{name}")
        return subprocess.run(
            ["buildah", "bud", *options, "--file", str(file), *given, "--tag", built[-1], "."],
            cwd=context, capture_output=True, text=True, timeout=600,
        )  # fmt: skip

    yield run
    subprocess.run(["podman", "rmi", "--force", "--ignore", *built], capture_output=True, check=True, timeout=300)


@pytest.fixture(scope="module")
def made(build: Callable[..., subprocess.CompletedProcess], context: Path) -> Callable[..., str]:
    """A function: builds, and returns the tag of what came out."""

    def run(file: str, name: str, *arguments: str) -> str:
        path = context / "images" / file / "Containerfile"
        if not path.exists():
            path = context / name
            path.write_text(file)
        done = build(path, name, *arguments)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        return f"{PREFIX}-{name}"

    return run


@pytest.fixture(scope="module")
def cuda_base(made: Callable[..., str]) -> str:
    mirror = made(DEBIAN, "debian")
    return made("cuda", "cuda-base", f"BASE_IMAGE={mirror}")


@pytest.fixture(scope="module")
def release(made: Callable[..., str]) -> str:
    return made(RELEASE, "release")


def settings(podman: Any, tag: str) -> dict[str, Any]:
    """What an image says of itself in its own description."""
    found = podman.images.get(tag).attrs["Config"]
    labels = {name.rpartition(".")[2]: value for name, value in found["Labels"].items() if "opencontainers" in name}
    variables = dict(variable.partition("=")[::2] for variable in found["Env"])
    return {"labels": labels, "variables": variables, "user": found["User"], "entry": found.get("Entrypoint")}


def probe(podman: Any, tag: str, *packages: str) -> dict[str, Any]:
    """What a process in it finds, as strict as a hardened pod lets it be."""
    strict = {"read_only": True, "tmpfs": {"/tmp": "rw,mode=1777"}, "network_mode": "none", "cap_drop": ["ALL"]}
    said = podman.containers.run(tag, ["trimtab", "--version"], remove=True, **strict).decode()
    assert said.strip() == f"trimtab {trimtab.__version__}", "a script of the base greets, or nothing answers"
    return json.loads(podman.containers.run(tag, ["python3", "-c", PROBE, *packages], remove=True, **strict))


def test_cuda_base(cuda_base: str, podman: Any) -> None:
    """A compiler without what it recommends, without lists, and what makes the driver be mounted; nobody is root."""
    found = settings(podman, cuda_base)
    assert found["user"] == "1000:0" and found["labels"]["title"] == "trimtab-cuda-base"
    assert found["variables"]["NVIDIA_VISIBLE_DEVICES"] == "all"
    assert found["variables"]["NVIDIA_DRIVER_CAPABILITIES"] == "compute,utility"
    look = "ls /usr/bin/gcc /usr/bin/libc6-dev /usr/bin/manual 2>/dev/null; ls /var/lib/apt/lists"
    said = podman.containers.run(cuda_base, ["sh", "-c", look], remove=True, network_mode="none").decode().split()
    assert said == ["/usr/bin/gcc", "/usr/bin/libc6-dev"]


def test_cuda(cuda_base: str, made: Callable[..., str], podman: Any) -> None:
    version = trimtab.__version__
    arguments = [f"BASE_IMAGE={cuda_base}", f"VERSION={version}", "TITLE=trimtab-cuda", "TORCH=torch==2.12.0"]
    tag = made("torch", "cuda", OFFLINE, *arguments, f"REVISION={REVISION}")
    found = settings(podman, tag)
    assert found["user"] == "1000:0" and not found["entry"]
    assert found["labels"].items() >= {"title": "trimtab-cuda", "version": version, "revision": REVISION}.items()
    assert found["variables"]["NVIDIA_VISIBLE_DEVICES"] == "all", "as the base has it"
    seen = probe(podman, tag, "torch", "nvidia_cublas")
    assert seen["ids"] == [1000, 0] and seen["home"] == "/tmp" and seen["commit"] == REVISION
    assert seen["packages"]["torch"][0] == "2.12.0", "not the newest: the argument says which"
    assert seen["packages"]["nvidia_cublas"][0] == "3.6", "CUDA's libraries come with PyPI's torch"
    assert seen["trimtab"].startswith("/opt/trimtab/lib/") and not seen["authority"]


def test_trtllm_beside_what_is_nvidias(release: str, made: Callable[..., str], podman: Any) -> None:
    """NVIDIA's packages stay where and what they are, though newer ones lie beside; what lacks is trimtab's."""
    version = trimtab.__version__
    assert settings(podman, release)["entry"] == ["echo", "welcome"]
    tag = made("trtllm", "trtllm", OFFLINE, f"BASE_IMAGE={release}", f"VERSION={version}", f"REVISION={REVISION}")
    found = settings(podman, tag)
    assert found["user"] == "1000:0" and not found["entry"]
    wanted = {"title": "trimtab-trtllm", "version": version, "revision": REVISION, "licenses": "Apache-2.0"}
    assert found["labels"].items() >= wanted.items()
    seen = probe(podman, tag, *NVIDIA, "lm_eval", "kfp")
    assert seen["ids"] == [1000, 0] and seen["home"] == "/tmp" and seen["commit"] == REVISION
    assert found["variables"]["TRITON_CACHE_DIR"] == "/tmp/cache/triton", "the release's own may not be writable"
    for name, wanted in NVIDIA.items():
        assert seen["packages"][name][0] == wanted and seen["packages"][name][1].startswith(SYSTEM)
    assert seen["packages"]["kfp"][1].startswith(SYSTEM), "what NVIDIA has is not installed again"
    assert seen["packages"]["lm_eval"][1].startswith("/opt/trimtab/lib/")
    assert seen["trimtab"].startswith("/opt/trimtab/lib/") and not seen["authority"]


def test_trtllm_is_not_built_over_nvidias_torch(
    release: str, build: Callable[..., subprocess.CompletedProcess], context: Path
) -> None:
    """A judge that wants a newer torch than NVIDIA's ends the build, though that torch lies ready."""
    arguments = [f"BASE_IMAGE={release}", f"VERSION={trimtab.__version__}", f"{OFFLINE}/newer"]
    done = build(context / "images/trtllm/Containerfile", "refused", *arguments)
    said = done.stdout + done.stderr
    assert done.returncode and "depends on torch>=2.13" in said, said[-3000:]
    assert f"requested (constraint) torch=={NVIDIA['torch']}" in said
