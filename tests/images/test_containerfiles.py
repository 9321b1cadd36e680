"""The Containerfiles, as a linter of our own sees them: those that cannot be built everywhere are read all the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import trimtab

IMAGES = Path(__file__).parents[2] / "images"
FILES = sorted(path.parent.name for path in IMAGES.glob("*/Containerfile"))
LABELS = ("title", "description", "licenses")
SECRET = re.compile(r"(?i)(password|secret|token|api_?key|credential)")
GOOD = """
ARG BASE_IMAGE=registry/base:1.2
FROM ${BASE_IMAGE}
RUN --mount=type=secret,id=ca,required=false if [ -f /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi \\
    && pip install --no-cache-dir -r a.txt
ENV HOME=/tmp
COPY dist/trimtab-${VERSION}-py3-none-any.whl /a/
RUN pip install --no-cache-dir --no-index --no-deps /a/trimtab-${VERSION}-py3-none-any.whl
USER 1000:0
LABEL org.opencontainers.image.title="a" org.opencontainers.image.description="b" org.opencontainers.image.licenses="c"
"""


def instructions(text: str) -> list[tuple[str, str]]:
    """Returns (instruction, arguments), comments left out and continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (word.upper(), rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines()) if word
    ]


def faults(text: str) -> list[str]:
    """What is wrong with a Containerfile, each in a few words."""
    found, steps = [], instructions(text)
    words = [word for word, _ in steps]
    arguments = dict(rest.partition("=")[::2] for word, rest in steps if word == "ARG")
    base = arguments.get("BASE_IMAGE", "")
    if [rest for word, rest in steps if word == "FROM"] != ["${BASE_IMAGE}"] or words[:2] != ["ARG", "FROM"]:
        found.append("base image is no build argument")
    name, _, digest = base.partition("@")
    if not digest and name.rpartition("/")[2].partition(":")[2] in ("", "latest"):
        found.append("base image is not pinned")
    users = [rest for word, rest in steps if word == "USER"]
    if not users or not re.fullmatch(r"[1-9]\d*:0", users[-1]):
        found.append("runs as root, or as a group that OpenShift does not give")
    labels = " ".join(rest for word, rest in steps if word == "LABEL")
    found += [f"no label {label}" for label in LABELS if f"org.opencontainers.image.{label}=" not in labels]
    if "ADD" in words:
        found.append("ADD")
    for word, rest in steps:
        if word in ("ARG", "ENV") and any(SECRET.search(part.partition("=")[0]) for part in rest.split()):
            found.append("secret in the history")
        for command in re.findall(r"pip install[^&|;]*", rest) if word == "RUN" else ():
            if "--no-cache-dir" not in command:
                found.append("pip keeps its cache")
            if "--no-index" not in command and "/run/secrets/ca" not in rest:
                found.append("pip without the site's certificate authority")
        if (
            word == "RUN"
            and "apt-get install" in rest
            and not {"--no-install-recommends", "/var/lib/apt/lists"}
            <= {part for part in ("--no-install-recommends", "/var/lib/apt/lists") if part in rest}
        ):
            found.append("apt leaves its lists")
        if word == "RUN" and re.search(r"\b(sudo|chmod (-R )?777)\b", rest):
            found.append("open rights")
    wheel = next((number for number, (word, rest) in enumerate(steps) if word == "COPY" and "trimtab-" in rest), None)
    if wheel is not None:
        if any(word == "RUN" and "--no-index" not in rest for word, rest in steps[wheel:]):
            found.append("a change of code downloads again")
        if any(word == "COPY" and rest.split()[0] in (".", "src", "dist") for word, rest in steps[:wheel]):
            found.append("a change of code rebuilds what is below")
    return found


BAD = [
    ("", "", []),
    ("registry/base:1.2", "registry/base:latest", ["base image is not pinned"]),
    ("registry/base:1.2", "registry:5000/base", ["base image is not pinned"]),
    ("FROM ${BASE_IMAGE}", "FROM debian:12", ["base image is no build argument"]),
    ("USER 1000:0", "USER 0", ["runs as root, or as a group that OpenShift does not give"]),
    ("USER 1000:0", "USER trimtab", ["runs as root, or as a group that OpenShift does not give"]),
    ('org.opencontainers.image.licenses="c"', "", ["no label licenses"]),
    ("ENV HOME=/tmp", "ENV HOME=/tmp HF_TOKEN=x", ["secret in the history"]),
    ("ENV HOME=/tmp", "ADD https://a/b /c", ["ADD"]),
    ("ENV HOME=/tmp", "RUN apt-get install curl", ["apt leaves its lists"]),
    ("ENV HOME=/tmp", "RUN chmod -R 777 /opt", ["open rights"]),
    ("ENV HOME=/tmp", "COPY . /opt", ["a change of code rebuilds what is below"]),
    ("pip install --no-cache-dir -r", "pip install -r", ["pip keeps its cache"]),
    ("export PIP_CERT=/run/secrets/ca", "true", []),
    ("if [ -f /run/secrets/ca ]; then export PIP_CERT=/run/secrets/ca; fi", "true",
     ["pip without the site's certificate authority"]),
    ("USER 1000:0", "RUN ls\nUSER 1000:0", ["a change of code downloads again"]),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "expected"), BAD)
def test_the_linter_sees(old, new, expected):
    assert old in GOOD and faults(GOOD.replace(old, new)) == expected


def test_all_four_are_here():
    assert FILES == ["base", "cuda", "torch", "trtllm"]


@pytest.mark.parametrize("name", FILES)
def test_containerfile(name):
    assert faults((IMAGES / name / "Containerfile").read_text()) == []


@pytest.mark.parametrize("name", FILES)
def test_what_writes_by_itself_writes_below_tmp(name):
    """Of itself or of the base that it stands on: the root file system may be read-only."""
    own = (IMAGES / name / "Containerfile").read_text()
    text = own if name in ("base", "trtllm") else (IMAGES / "base/Containerfile").read_text()
    variables = dict(
        part.partition("=")[::2] for word, rest in instructions(text) if word == "ENV" for part in rest.split()
    )
    for variable in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TRIMTAB_CACHE", "HF_HOME", "TRITON_CACHE_DIR"):
        assert variables[variable].startswith("/tmp")


@pytest.mark.parametrize("name", ["cuda", "torch"])
def test_the_base_is_of_this_version(name):
    text = (IMAGES / name / "Containerfile").read_text()
    assert f"ARG BASE_IMAGE=localhost/trimtab-base:{trimtab.__version__}\n" in text


def test_one_torch_everywhere():
    """The image's torch is the Makefile's, which the tests run with."""
    wanted = re.search(r"^TORCH \?= (\S+)", (IMAGES.parent / "Makefile").read_text(), re.MULTILINE)[1]
    assert f"ARG TORCH={wanted}\n" in (IMAGES / "torch/Containerfile").read_text()


def test_every_image_that_judges_has_what_judges():
    """Validation asks lm-eval's tasks in the engine's own image."""
    wanted = {"torch": "torch", "trtllm": "trtllm-image"}
    extras = tomllib.loads((IMAGES.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for name, extra in wanted.items():
        assert f"requirements.py pyproject.toml {extra} " in (IMAGES / name / "Containerfile").read_text()
        assert any(line.startswith("lm-eval") for line in extras[extra])


def test_a_back_end_can_be_installed_without_its_image():
    """And in the image, which has its own, nothing asks for it again."""
    extras = tomllib.loads((IMAGES.parent / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    (named,) = (Requirement(line) for line in extras["trtllm"] if line.startswith("tensorrt-llm"))
    assert named.marker.evaluate({"sys_platform": "linux", "python_version": "3.12"})
    assert not named.marker.evaluate({"sys_platform": "darwin", "python_version": "3.12"})
    assert not any(line.startswith("tensorrt-llm") for line in extras["trtllm-image"])
