"""A KServe InferenceService that runs trtllm-serve: serving.kserve.io/v1beta1."""

from __future__ import annotations

from typing import Any

from trimtab.catalog.backends import BACKENDS
from trimtab.serving.artifact import Served
from trimtab.serving.settings import longest_prompt, serve_command, target_version

#: Where KServe's storage initializer puts what the URI names.
MOUNT = "/mnt/models"
#: How a URI begins that names an image with the model below /models (`release.packing`).
MODELCAR = "oci://"
_PORT = 8080


def image(served: Served) -> str:
    """Returns NVIDIA's image of the version that serves."""
    return f"nvcr.io/nvidia/tensorrt-llm/release:{target_version(served.settings)}"


def inference_service(served: Served, model_uri: str, image_: str, arguments: str) -> dict[str, Any]:
    """Returns the InferenceService.

    Args:
        model_uri: where the cluster finds the checkpoint, `s3://…`, `pvc://claim/path` or `oci://image`, a modelcar;
            for `trtllm-legacy` a folder that holds `export` and `engine`, which no modelcar of trimtab does.
        image_: of the container.
        arguments: the content of the YAML that trtllm-serve reads; it is written into the container before it starts.
    """
    engines = BACKENDS[served.settings.backend].compiled
    model, engine = (f"{MOUNT}/export", f"{MOUNT}/engine") if engines else (MOUNT, "")
    config = "/tmp/llm_args.yaml"
    command = serve_command(served.settings, model, engine, config)
    command += ["--host", "0.0.0.0", "--port", str(_PORT)]
    gpus = str(served.settings.world_size)
    # A modelcar is a container beside this one, which links its /models there once it runs.
    wait = f"until [ -e {MOUNT}/config.json ]; do sleep 1; done; " if model_uri.startswith(MODELCAR) else ""
    container = {
        "name": "kserve-container",
        "image": image_,
        "command": ["/bin/sh", "-c", f'{wait}printf "%s" "$LLM_ARGS" > {config} && exec "$0" "$@"'],
        "args": command,
        "env": [{"name": "STORAGE_URI", "value": model_uri}, {"name": "LLM_ARGS", "value": arguments}],
        "ports": [{"containerPort": _PORT, "protocol": "TCP"}],
        "resources": {"requests": {"nvidia.com/gpu": gpus}, "limits": {"nvidia.com/gpu": gpus}},
        "readinessProbe": {"httpGet": {"path": "/health", "port": _PORT}, "periodSeconds": 10, "failureThreshold": 360},
        "volumeMounts": [{"name": "shm", "mountPath": "/dev/shm"}],
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {
            "name": _dns_name(served.name),
            "annotations": {
                "trimtab/verdict": served.reason or "not judged",
                "trimtab/longest-prompt": str(longest_prompt(served.settings)),
            },
        },
        "spec": {
            "predictor": {
                "minReplicas": 1,
                "containers": [container],
                # Ranks talk through shared memory, of which a container has 64 MiB.
                "volumes": [{"name": "shm", "emptyDir": {"medium": "Memory", "sizeLimit": "8Gi"}}],
            }
        },
    }


def _dns_name(name: str) -> str:
    """Kubernetes allows small letters, digits and '-'; KServe adds to the name, which has 63 characters at most."""
    letters = "".join(c if c.isascii() and c.isalnum() else "-" for c in name.lower())
    return letters.strip("-")[:40].strip("-") or "model"
