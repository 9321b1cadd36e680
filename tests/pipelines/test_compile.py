"""What a Kubeflow Pipelines backend gets: the compiled intermediate representation (IR)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format
from kfp import components

from trimtab.base import signing
from trimtab.catalog.goals import GOALS
from trimtab.components import images
from trimtab.model.hardware import TARGETS
from trimtab.pipelines.commands import main
from trimtab.pipelines.loop import offered_target
from trimtab.pipelines.optimize import optimize_pipeline
from trimtab.pipelines.placement import machines
from trimtab.stages import OPTIONAL, TASKS
from trimtab.stages.profile import Profile

STEPS = ["prepare", "calibrate", "prune", "distill", "recalibrate", "quantize", "build engine", "validate"]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline as `trimtab compile` writes it, ten attempts unrolled."""
    output = tmp_path_factory.mktemp("compiled") / "optimize.yaml"
    assert main.main(["compile", "-o", str(output)]) == 0
    return output


@pytest.fixture(scope="module")
def ir(path: Path) -> dict[str, Any]:
    return yaml.load(path.read_text(), yaml.CSafeLoader)


def dags(ir: dict[str, Any]) -> dict[str, dict[str, Any]]:
    found = {name: part["dag"] for name, part in ir["components"].items() if "dag" in part}
    return {"root": ir["root"]["dag"], **found}


def tasks(ir: dict[str, Any]) -> list[dict[str, Any]]:
    """The tasks that run in a container."""
    every = [task for dag in dags(ir).values() for task in dag["tasks"].values()]
    return [task for task in every if "executorLabel" in ir["components"][task["componentRef"]["name"]]]


def attempts(ir: dict[str, Any]) -> list[dict[str, Any]]:
    """The tasks of an attempt: the baseline and all attempts share them."""
    return [dag["tasks"] for name, dag in dags(ir).items() if name.startswith("comp-attempt")]


def test_ten_attempts_and_a_baseline(ir):
    names = [task["taskInfo"]["name"] for dag in dags(ir).values() for task in dag["tasks"].values()]
    for name in ["baseline", *(f"attempt {number}" for number in range(1, 11))]:
        assert names.count(name) == 1


@pytest.mark.parametrize("number", [1, 2, 10])
def test_fewer_attempts(number, tmp_path):
    output = tmp_path / "few.yaml"
    assert main.main(["compile", "-o", str(output), "--max-attempts", str(number)]) == 0
    compiled = yaml.load(output.read_text(), yaml.CSafeLoader)
    conditions = [name for name in compiled["components"] if name.startswith("comp-condition-branches")]
    assert len(conditions) == number - 1
    asked = compiled["root"]["inputDefinitions"]["parameters"]["max_attempts"]
    assert asked["description"].startswith(f"The most attempts, 1 to {number}. ")
    assert asked["defaultValue"] == min(number, 5)


def test_the_loader_reads_it(path):
    loaded = components.load_component_from_file(str(path))
    assert loaded.name == "optimize"
    assert set(loaded.component_spec.inputs) == {
        "model", "store", "goal", "target", "recipe", "registry", "max_attempts", "name", "evaluation", "rollout",
    }  # fmt: skip


def test_every_parameter_of_the_pipeline_is_described(ir):
    parameters = ir["root"]["inputDefinitions"]["parameters"]
    assert not [name for name, parameter in parameters.items() if not parameter.get("description")]
    costly = {"max_attempts": "built and measured", "target": "cpu takes no GPU", "evaluation": "cost their time"}
    for name, costs in costly.items():
        assert costs in parameters[name]["description"]


def test_every_parameter_and_artifact_of_a_stage_is_described():
    """In the components that people compose; in what a backend gets there is no room for it."""
    missing = []
    for component, part in json_format.MessageToDict(optimize_pipeline(1).pipeline_spec)["components"].items():
        if "executorLabel" not in part:
            continue
        for side in ("inputDefinitions", "outputDefinitions"):
            for kind in ("parameters", "artifacts"):
                for name, port in part.get(side, {}).get(kind, {}).items():
                    if name != "Output" and side == "inputDefinitions" and not port.get("description"):
                        missing.append(f"{component}.{name}")
    assert missing == []


def test_model_and_store_have_no_default(ir):
    parameters = ir["root"]["inputDefinitions"]["parameters"]
    assert [name for name, parameter in parameters.items() if not parameter.get("isOptional")] == ["model", "store"]


def test_caching_is_off_everywhere(ir):
    """The backend never completes a branch of cache hits alone; the store's index is the cache."""
    assert len(tasks(ir)) > 10
    assert not [task["taskInfo"]["name"] for task in tasks(ir) if task.get("cachingOptions", {}).get("enableCache")]


def test_images_and_commands(ir):
    for executor in ir["deploymentSpec"]["executors"].values():
        container = executor["container"]
        assert container["image"] == images.CPU
        assert "pip install" not in " ".join([*container["command"], *container["args"]])


def test_an_attempt_is_a_chain_without_conditions(ir):
    assert len(attempts(ir)) == 1
    for attempt in attempts(ir):
        assert sorted(task["taskInfo"]["name"] for task in attempt.values()) == sorted(STEPS)
        assert not any("triggerPolicy" in task or "iterator" in task for task in attempt.values())


def test_conditions_read_closed_vocabularies(ir):
    """An operand that a lone condition cannot resolve is silently false, but for an output named `Output`."""
    conditions = [
        task["triggerPolicy"]["condition"]
        for dag in dags(ir).values()
        for task in dag["tasks"].values()
        if "condition" in task.get("triggerPolicy", {})
    ]
    (rolled,) = (condition for condition in conditions if "decide" not in condition)
    assert rolled == "inputs.parameter_values['pipelinechannel--roll-out-Output'] == 'rolled_back'"
    decided = [condition for condition in conditions if condition != rolled]
    assert len(decided) == 2 * 9  # If and Else behind each of nine decisions
    assert all("decide" in condition and "'retry'" in condition for condition in decided)


def test_the_chain_ends_in_the_gate_and_the_rollout_behind_it(ir):
    root = ir["root"]["dag"]["tasks"]
    readers = {
        name: {
            value["taskOutputParameter"]["producerTask"]
            for value in task.get("inputs", {}).get("parameters", {}).values()
            if "taskOutputParameter" in value
        }
        for name, task in root.items()
    }
    assert readers["gate"] == {"summarize"}
    (last,) = readers["summarize"]
    assert last.startswith("condition-branches-")
    assert [name for name, producers in readers.items() if "gate" in producers] == ["roll-out"]
    assert root["roll-out"]["inputs"]["parameters"]["rollout"] == {"componentInputParameter": "rollout"}
    (failing,) = (dag for name, dag in dags(ir).items() if "fail-rollout" in dag["tasks"])
    assert list(failing["tasks"]) == ["fail-rollout"]


def test_accelerators_are_asked_for_by_prepare(ir):
    """Each stage's count of accelerators is an output of `prepare`: nothing queues for what it will not use."""
    for attempt in attempts(ir):
        counts = {}
        for task in attempt.values():
            executor = ir["components"][task["componentRef"]["name"]]["executorLabel"]
            resources = ir["deploymentSpec"]["executors"][executor]["container"].get("resources", {})
            counts[task["taskInfo"]["name"]] = resources.get("accelerator", {}).get("resourceCount", "")
        assert [name for name, count in counts.items() if not count] == ["prepare"]
        own = {name: count.rpartition("prepare-")[2].rstrip("']}") for name, count in counts.items() if count}
        assert own == {name: {"build engine": "engine"}.get(name, name) for name in own}, "each by its own count"


def test_prepare_returns_a_count_for_every_task(ir):
    outputs = ir["components"]["comp-prepare"]["outputDefinitions"]["parameters"]
    tasks, fields = (*TASKS, "validate"), ("tolerations", "cpu", "memory", "image")
    said = {f"{task}_nodes" for task in tasks} | {f"{task}_{field}" for task in OPTIONAL for field in fields}
    assert set(outputs) == {"state", *tasks, *said}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "optimize.txt"], "output: 'optimize.txt' must be a .yaml or .json file in a folder that exists"),
        (["-o", "no/such/optimize.yaml"], "must be a .yaml or .json file in a folder that exists"),
        (["-o", "optimize.yaml", "--max-attempts", "0"], "max_attempts: 0 is not valid; write 1 to 10"),
        (["-o", "optimize.yaml", "--max-attempts", "11"], "max_attempts: 11 is not valid; write 1 to 10"),
        ([], "the following arguments are required: -o/--output"),
    ],
)
def test_bad_input(options, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main.main(["compile", *options]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


IMAGES = [
    ([], "", "image: is missing, and no cluster can pull what is built here"),
    (["--image", "registry/trimtab:2"], "registry/trimtab:2", ""),
    (["--profile", "profile.yaml"], "registry/cpu:1", ""),
    (["--profile", "profile.yaml", "--image", "registry/trimtab:2"], "registry/trimtab:2", ""),
]


@pytest.mark.parametrize(("options", "image", "refused"), IMAGES)
def test_no_image_that_a_cluster_cannot_pull(options, image, refused, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(images.VARIABLE)
    (tmp_path / "profile.yaml").write_text("images: {cpu: registry/cpu:1}")
    code = main.main(["compile", "-o", "optimize.yaml", "--max-attempts", "1", *options])
    said = " ".join(capsys.readouterr().err.split())
    if refused:
        assert code == 2 and refused in said and "images: {cpu: REGISTRY/trimtab-cpu-python" in said
        return
    text = (tmp_path / "optimize.yaml").read_text()
    assert code == 0 and image in text and "localhost/" not in text


PROFILE = """
gpu:
  node_selector: {nvidia.com/gpu.product: H100}
  tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
images: {cuda: registry/trimtab-cuda:1, engine: registry/trimtab-trtllm:1, pull_secrets: [registry]}
secrets: {trimtab-s3: {access_key: AWS_ACCESS_KEY_ID}}
gate_secrets: {trimtab-s3-gate: {access_key: AWS_ACCESS_KEY_ID}}
environment: {AWS_ENDPOINT_URL: "http://s3:8333"}
cache: {claim: trimtab-cache}
authority: {config_map: site-ca}
queue: gpus
shared_memory: 16Gi
labels: {team: compression}
signing:
  secret: trimtab-gate
  key: gate.pem
  password: gate.password
  validation: {secret: trimtab-validation, public: PUBLIC}
stage: {memory: 16Gi, cpu: "4", timeout_hours: 2, retries: 3}
stages: {distill: {memory: 64Gi, timeout_hours: 48}}
"""
ACCELERATED = ["calibrate", "prune", "distill", "recalibrate", "quantize", "build engine", "validate"]


@pytest.fixture(scope="module")
def profile(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The profile with a public key that is one."""
    public, _ = signing.generate(tmp_path_factory.mktemp("keys") / "validation")
    return PROFILE.replace("PUBLIC", json.dumps(public.read_text()))


@pytest.fixture(scope="module")
def placed(profile: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By the name of a task: its executor, its settings for Kubernetes and its retries."""
    folder = tmp_path_factory.mktemp("placed")
    (folder / "profile.yaml").write_text(profile)
    options = ["--max-attempts", "1", "--profile", str(folder / "profile.yaml"), "--image", "registry/trimtab:2"]
    assert main.main(["compile", "-o", str(folder / "optimize.yaml"), *options]) == 0
    spec, platform = yaml.load_all((folder / "optimize.yaml").read_text(), yaml.CSafeLoader)
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    found = {}
    for task in tasks(spec):
        label = spec["components"][task["componentRef"]["name"]]["executorLabel"]
        container = spec["deploymentSpec"]["executors"][label]["container"]
        found[task["taskInfo"]["name"]] = {**container, **settings[label], "retry": task.get("retryPolicy")}
    return found


def said(output: str) -> str:
    """The placeholder of what `prepare` says."""
    return f"{{{{$.inputs.parameters['pipelinechannel--prepare-{output}']}}}}"


def test_a_profile_places_the_stages_that_need_gpus(placed):
    for name in ACCELERATED:
        task = placed[name]
        assert task["emptyDirMounts"] == [
            {"volumeName": "shared-memory", "mountPath": "/dev/shm", "medium": "Memory", "sizeLimit": "16Gi"}
        ]
        # Argo ends a try that is under way, and begins no other, so long after the first one began.
        assert task["retry"]["maxRetryCount"] == 3
        assert int(task["retry"]["backoffMaxDuration"].rstrip("s")) >= 4 * int(task["activeDeadlineSeconds"])
        selector = task["nodeSelector"]["nodeSelectorJson"]["taskOutputParameter"]
        assert selector["producerTask"] == "prepare" and selector["outputParameterKey"].endswith("_nodes")
        assert task["activeDeadlineSeconds"] == str((48 if name == "distill" else 2) * 3600)


def test_what_always_works_has_the_profiles_machine(placed):
    for name in ("build engine", "validate"):
        task = placed[name]
        assert task["image"] == "registry/trimtab-trtllm:1"
        assert task["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
        assert task["resources"]["resourceMemoryLimit"] == task["resources"]["resourceMemoryRequest"] == "16Gi"


def test_what_may_pass_on_has_the_machine_that_prepare_says(placed):
    """Passing on would else ask for a model's memory, tolerate the taint of GPUs and pull their image."""
    for name in OPTIONAL:
        task = placed[name]
        resources = task["resources"]
        assert task["image"] == said(f"{name}_image")
        assert resources["resourceMemoryLimit"] == resources["resourceMemoryRequest"] == said(f"{name}_memory")
        assert resources["resourceCpuLimit"] == resources["resourceCpuRequest"] == said(f"{name}_cpu")
        (toleration,) = task["tolerations"]
        assert toleration["tolerationJson"]["taskOutputParameter"]["outputParameterKey"] == f"{name}_tolerations"


LABELS = [
    ("{nvidia.com/gpu.product: NVIDIA-H100-80GB-HBM3}", "h100"),
    ("{nvidia.com/gpu.product: NVIDIA-A100-SXM4-80GB}", "a100-80"),
    ("{nvidia.com/gpu.product: NVIDIA-L40S}", "l40s"),
    ("{nvidia.com/gpu.product: NVIDIA-GeForce-RTX-4090}", "cpu"),
    ("{pool: gpus}", "cpu"),
]


@pytest.mark.parametrize(("labels", "target"), LABELS)
def test_the_form_begins_with_the_gpu_of_the_cluster(labels, target):
    assert offered_target(Profile.parse(f"gpu: {{node_selector: {labels}}}")) == target


def test_prepare_knows_the_machines_of_the_profile(profile):
    offered = machines(Profile.parse(profile), "registry/trimtab:2")
    assert offered["small"] == "registry/trimtab:2" and offered["nodes"] == {"nvidia.com/gpu.product": "H100"}
    assert offered["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert offered["tasks"]["distill"] == {"cpu": "4", "memory": "64Gi", "image": "registry/trimtab-cuda:1"}
    assert offered["tasks"].keys() == set(OPTIONAL)


def test_small_tasks_want_no_gpu_node(placed):
    others = {name: task for name, task in placed.items() if name not in ACCELERATED}
    assert {"fetch model", "plan", "prepare", "summary", "deploy gate", "rollout"} <= set(others)
    for task in others.values():
        assert not {"tolerations", "nodeSelector", "emptyDirMounts"} & set(task)
        assert task["image"] == "registry/trimtab:2" and "accelerator" not in task.get("resources", {})


def test_refusals_are_not_tried_again(placed):
    for name in ("deploy gate", "rollout", "rolled back"):
        assert placed[name]["retry"] is None


def test_the_rollout_may_wait_for_days(placed):
    assert "activeDeadlineSeconds" not in placed["rollout"]


def test_every_task_reaches_the_store(placed):
    for task in placed.values():
        variables = {variable["name"]: variable["value"] for variable in task["env"]}
        assert variables.items() >= {"AWS_ENDPOINT_URL": "http://s3:8333", "TRIMTAB_CACHE": "/cache"}.items()
        secret = task["secretAsEnv"][0]
        assert secret["keyToEnv"] == [{"secretKey": "access_key", "envVar": "AWS_ACCESS_KEY_ID"}]
        assert task["pvcMount"][0]["mountPath"] == "/cache"
        assert task["podMetadata"]["labels"].items() >= {"team": "compression"}.items()
        assert [secret["secretName"] for secret in task["imagePullSecret"]] == ["registry"]


def test_a_site_that_signs_for_itself_and_queues_its_pods(placed):
    for name, task in placed.items():
        (volume,) = task["configMapAsVolume"]
        assert (volume["configMapName"], volume["mountPath"]) == ("site-ca", "/etc/trimtab/authority")
        variables = {variable["name"]: variable["value"] for variable in task["env"]}
        for variable in ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"):
            assert variables[variable] == "/etc/trimtab/authority/ca.crt"
        queue = task["podMetadata"]["labels"].get("kueue.x-k8s.io/queue-name")
        assert queue == ("gpus" if name in ACCELERATED else None)


def test_the_gate_alone_sees_the_signing_key(placed):
    """And must sign, with the key in its environment; models that somebody else made are read elsewhere."""
    own = {"deploy gate": ["TRIMTAB_SIGNING_KEY", "TRIMTAB_SIGNING_PASSWORD"], "validate": ["TRIMTAB_VALIDATION_KEY"]}
    for name, task in placed.items():
        variables = [entry["envVar"] for secret in task["secretAsEnv"] for entry in secret["keyToEnv"]]
        required = [variable["value"] for variable in task["env"] if variable["name"] == "TRIMTAB_REQUIRE_SIGNING"]
        assert (variables[1:], required) == (own.get(name, []), ["1"] if name == "deploy gate" else [])


def test_the_gate_alone_has_credentials_that_write_releases(placed):
    for name, task in placed.items():
        secret = task["secretAsEnv"][0]["secretName"]
        assert secret == ("trimtab-s3-gate" if name == "deploy gate" else "trimtab-s3")


def test_the_gate_is_told_whose_answers_count(placed):
    for name, task in placed.items():
        told = [variable["value"] for variable in task["env"] if variable["name"] == "TRIMTAB_VALIDATION_PUBLIC_KEY"]
        assert bool(told) == (name == "deploy gate") and all("PUBLIC KEY" in value for value in told)


def test_without_a_profile_nothing_is_bound_to_kubernetes(path):
    assert len(list(yaml.load_all(path.read_text(), yaml.CSafeLoader))) == 1


def test_without_a_profile_as_much_memory_is_asked_for_as_is_forecast(ir):
    """And no more than asked for: a forecast that is wrong kills nothing."""
    (attempt,) = attempts(ir)
    named = {task["taskInfo"]["name"]: task for task in attempt.values()}
    for name in OPTIONAL:
        executor = ir["components"][named[name]["componentRef"]["name"]]["executorLabel"]
        resources = ir["deploymentSpec"]["executors"][executor]["container"]["resources"]
        assert resources["resourceMemoryRequest"] == said(f"{name}_memory")
        assert "resourceMemoryLimit" not in resources


def test_the_root_shows_a_summary(ir):
    """As a page and as text, before the gate, which may fail the run."""
    artifacts = ir["components"]["comp-summarize"]["outputDefinitions"]["artifacts"]
    shown = {name: port["artifactType"]["schemaTitle"] for name, port in artifacts.items()}
    assert shown == {"report": "system.HTML", "summary": "system.Markdown", "outcome": "system.Artifact"}
    assert "summarize" in ir["root"]["dag"]["tasks"]


def test_the_form_offers_what_is_valid(ir):
    parameters = ir["root"]["inputDefinitions"]["parameters"]
    assert {name for name, parameter in parameters.items() if "literals" in parameter} == {"goal", "target"}
    assert parameters["goal"]["literals"] == list(GOALS) and parameters["target"]["literals"] == list(TARGETS)
    for name in ("goal", "target"):
        assert parameters[name]["defaultValue"] in parameters[name]["literals"]
        assert parameters[name]["description"].endswith(f": {', '.join(parameters[name]['literals'])}.")
