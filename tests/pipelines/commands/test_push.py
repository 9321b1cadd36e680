"""The command push: an image that KServe serves and an artifact that `oras` takes, on disk and in a registry."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import subprocess
import sys
import tarfile

import oci_registry
import pytest
from releases import Released

from trimtab.base import signing
from trimtab.release import packing
from trimtab.store import open_store

oras = pytest.importorskip("oras.provider")
pytest.importorskip("modelcar_base_image")

PAPERS = {"README.md", "bom.cdx.json", "provenance.intoto.json", "model.sig"}
FILES = {"config.json", "model.safetensors", *PAPERS}


@pytest.fixture
def released(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIMTAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("REGISTRY_AUTH_FILE", "XDG_RUNTIME_DIR", "DOCKER_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    return Released(open_store("trimtab-store"), tmp_path)


@pytest.fixture
def registry():
    server = oci_registry.Registry()
    yield server
    server.close()


@pytest.fixture(params=["stand-in", "docker-registry"])
def host(request, tmp_path):
    if request.param == "stand-in":
        yield request.getfixturevalue("registry").host
        return
    if not shutil.which("docker-registry"):
        pytest.skip("docker-registry is not installed")
    with oci_registry.docker_registry(tmp_path) as host:
        yield host


def blobs_of(layout):
    """Every blob of a layout by its name, each hashed again."""
    found = {path.name: path.read_bytes() for path in (layout / "blobs/sha256").iterdir()}
    assert all(hashlib.sha256(data).hexdigest() == name for name, data in found.items())
    return found


def of(blobs, descriptor):
    data = blobs[descriptor["digest"].removeprefix("sha256:")]
    assert len(data) == descriptor["size"]
    return json.loads(data)


def test_an_image_of_each_machine_holds_the_model_its_papers_and_the_statement(released, trimtab, tmp_path):
    code, said = trimtab("push", "tiny", "oci:car", "--key", "gate.pub")
    assert code == 0, said
    assert "skopeo copy --all --preserve-digests oci:car:latest docker://" in said
    blobs = blobs_of(tmp_path / "car")
    (top,) = json.loads((tmp_path / "car/index.json").read_bytes())["manifests"]
    assert top["digest"] in said and top["annotations"] == {"org.opencontainers.image.ref.name": "latest"}
    machines, named = of(blobs, top)["manifests"], {top["digest"]}
    assert {machine["platform"]["architecture"] for machine in machines} == {"amd64", "arm64"}
    for machine in machines:
        manifest = of(blobs, machine)
        config = of(blobs, manifest["config"])
        assert manifest["annotations"]["trimtab.artifact"] == f"sha256:{released.evidence['export']['digest']}"
        assert len(config["rootfs"]["diff_ids"]) == len(manifest["layers"]) == len(config["history"])
        assert config["config"]["Entrypoint"] == ["/bin/link-model-and-wait"]
        held = {}
        for layer, unpacked in zip(manifest["layers"], config["rootfs"]["diff_ids"], strict=True):
            with tarfile.open(tmp_path / "car/blobs/sha256" / layer["digest"].removeprefix("sha256:")) as tar:
                held |= {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
            if layer["mediaType"].endswith("tar"):
                assert layer["digest"] == unpacked
        assert held.keys() == {"bin/link-model-and-wait", "trimtab/statement.intoto.json"} | {
            f"models/{name}" for name in FILES
        }
        assert held["models/model.safetensors"] == bytes(range(256)) * 4
        payload = signing.unseal(json.loads(held["trimtab/statement.intoto.json"]), [released.key])
        assert json.loads(payload)["subject"][0]["name"] == "tiny/000001"
        named |= {part["digest"] for part in (machine, manifest["config"], *manifest["layers"])}
    assert {f"sha256:{name}" for name in blobs} == named, "nothing of the base is left over"


def test_pushed(released, trimtab, host, tmp_path):
    """What a registry has is what the layout on disk has, also the second time, of another version of the day."""
    for form in ("modelcar", "artifact"):
        code, said = trimtab("push", "tiny", f"{host}/models/tiny:{form}", "--plain-http", "--form", form)
        assert code == 0, said
        trimtab("push", "tiny", f"oci:{form}", "--form", form)
        (top,) = json.loads((tmp_path / form / "index.json").read_bytes())["manifests"]
        pinned = f"{host}/models/tiny@{top['digest']}"
        use = "--model-uri oci://" if form == "modelcar" else "oras pull "
        assert f"to {pinned} " in said and use + pinned in said
        again = trimtab("push", "tiny", f"{host}/models/tiny:{form}", "--plain-http", "--form", form)[1]
        assert pinned in again, "one release has one digest"
    pulled = tmp_path / "pulled"
    oras.Registry(insecure=True).pull(target=f"{host}/models/tiny:artifact", outdir=str(pulled))
    assert {path.name for path in pulled.iterdir()} == FILES | {"statement.intoto.json"}
    assert (pulled / "model.safetensors").read_bytes() == bytes(range(256)) * 4
    command = [sys.executable, "-m", "model_signing", "verify", "key", pulled, "--signature", pulled / "model.sig"]
    command += ["--public_key", "gate.pub", "--ignore-paths", pulled / "statement.intoto.json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_what_is_there_is_not_sent_again_and_large_files_go_in_parts(released, trimtab, registry, monkeypatch):
    monkeypatch.setattr(packing, "_AT_ONCE", 500)
    image = f"{registry.host}/tiny:1"
    assert trimtab("push", "tiny", image, "--plain-http", "--form", "artifact")[0] == 0
    assert any(line.startswith("PATCH ") for line in registry.requests)
    registry.requests.clear()
    assert trimtab("push", "tiny", image, "--plain-http", "--form", "artifact")[0] == 0
    assert {line.split()[0] for line in registry.requests} == {"GET", "HEAD", "PUT"}
    assert sum(line.startswith("PUT ") for line in registry.requests) == 1, "the manifest alone"


@pytest.mark.parametrize("uses", [0, 3], ids=["password", "tokens that expire"])
def test_the_logins_of_docker_and_podman_are_used(released, trimtab, tmp_path, monkeypatch, uses):
    login = base64.b64encode(b"user:password").decode()
    server = oci_registry.Registry(login, uses)
    try:
        code, said = trimtab("push", "tiny", f"{server.host}/tiny:1", "--plain-http")
        assert code == 2 and "log in with `podman login`" in said
        for variable, file in (("REGISTRY_AUTH_FILE", "auth.json"), ("DOCKER_CONFIG", "docker/config.json")):
            path = tmp_path / file
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps({"auths": {server.host: {"auth": login}}}))
            with monkeypatch.context() as patch:
                patch.setenv(variable, str(path if variable.endswith("FILE") else path.parent))
                code, said = trimtab("push", "tiny", f"{server.host}/tiny:{variable}", "--plain-http")
            assert code == 0, said
    finally:
        server.close()


def test_what_does_not_verify_is_not_pushed(released, trimtab, registry, tmp_path):
    trimtab("keygen", "other")
    for image in (f"{registry.host}/tiny:1", "oci:car"):
        code, said = trimtab("push", "tiny", image, "--plain-http", "--key", "other.pub")
        assert code == 5 and "signed by another key" in said
    assert not registry.requests and not (tmp_path / "car").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["tiny"], "image: 'tiny' is not valid; write REGISTRY/REPOSITORY:TAG, or oci:FOLDER"),
        (["models/tiny:1"], "image: 'models/tiny:1' is not valid"),
        (["localhost:1/tiny"], "image: 'localhost:1/tiny' is not valid"),
        (["oci:trimtab-store"], "'trimtab-store' is there already"),
        (["oci:none/car"], "has no parent"),
        (["oci:car", "--form", "zip"], "form: 'zip' is not valid; valid: modelcar, artifact"),
    ],
)
def test_bad_input(released, trimtab, options, message):
    code, said = trimtab("push", "tiny", *options)
    assert code == 2 and message in said, said


def test_trouble_with_the_registry(released, trimtab, registry, monkeypatch):
    image = f"{registry.host}/tiny:1"
    monkeypatch.setattr(registry, "answer", lambda *request: (500, {"Location": "/"}, b"out of room"))
    code, said = trimtab("push", "tiny", image, "--plain-http")
    assert code == 4 and "answers 500: out of room" in said
    registry.close()
    code, said = trimtab("push", "tiny", image, "--plain-http")
    assert code == 4 and "the registry does not answer" in said


def test_an_image_has_no_more_layers_than_nodes_stack(released, trimtab, monkeypatch, tmp_path):
    monkeypatch.setattr(packing, "MOST_FILES", 5)
    code, said = trimtab("push", "tiny", "oci:car")
    assert code == 2 and "a layer for each of 6 files" in said and "--form artifact" in said
    assert trimtab("push", "tiny", "oci:files", "--form", "artifact")[0] == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".trimtab-push-")]
