"""The pipelines as files for a Kubeflow Pipelines server."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from trimtab.base import labels
from trimtab.base.errors import InputError
from trimtab.components import images
from trimtab.stages.profile import Profile

if TYPE_CHECKING:
    from kfp.dsl.base_component import BaseComponent

#: The pipelines, and what each is for. On a server they are called `server_name`.
PIPELINES = {
    "optimize": "Compresses a language model and releases it only when measurements say that it is still good.",
    "rebuild": "Releases a model anew when what it is made of has changed; for schedules.",
}
#: What the first task of `rebuild` is called on the page of a run.
REVIEW = "what changed?"
#: What the rollout is called there, and the task that fails a run whose release was rolled back.
ROLLOUT, ROLLED_BACK = "rollout", "rolled back"


def server_name(pipeline: str) -> str:
    """Returns what a pipeline is called on a server."""
    return f"trimtab-{pipeline}"


def image_for(given: str, profile: Profile | None) -> str:
    """Returns the image of all that needs no GPU, for a cluster: the given one, the profile's, or TRIMTAB_IMAGE's.

    Raises:
        InputError: none is named. What is built on this machine has a name that no cluster can pull.
    """
    named = given or (profile and profile.images.cpu) or os.environ.get(images.VARIABLE, "")
    if not named:
        what = images.CPU.rpartition("/")[2]
        raise InputError(
            f"image: is missing, and no cluster can pull what is built here; push it and write --image "
            f"REGISTRY/{what}, images: {{cpu: REGISTRY/{what}}} in the profile, or {images.VARIABLE}"
        )
    return named


def write(
    output: Path, unrolled: int, image: str = "", profile: Profile | None = None, pipeline: str = "optimize"
) -> None:
    """Compiles a pipeline into a YAML file, as small as a backend wants it.

    Args:
        output: a .yaml, .yml or .json file in a folder that exists.
        unrolled: the most attempts that a run may ask for, 1 to 10.
        image: container image of all stages; "" for that of this version.
        profile: the cluster's; None for none.
        pipeline: one of PIPELINES.

    Raises:
        InputError: the file cannot be written there.
    """
    if output.suffix not in (".yaml", ".yml", ".json") or not output.absolute().parent.is_dir():
        raise InputError(f"output: '{output}' must be a .yaml or .json file in a folder that exists")
    from kfp import compiler

    from trimtab.pipelines.optimize import optimize_pipeline
    from trimtab.pipelines.rebuild import rebuild_pipeline
    from trimtab.pipelines.shrinking import shrink

    builders = {"optimize": optimize_pipeline, "rebuild": rebuild_pipeline}
    built = builders[pipeline](unrolled, profile, image)
    if image:
        _use_image(built, image)
    shrink(built)
    compiler.Compiler().compile(built, str(output))


def _use_image(pipeline: BaseComponent, image: str) -> None:
    """Puts another image in place of the stages' own; what a profile chose stays."""
    executors = pipeline.pipeline_spec.deployment_spec.fields["executors"].struct_value.fields
    for executor in executors.values():
        container = executor.struct_value.fields["container"].struct_value.fields
        if container["image"].string_value == images.CPU:
            container["image"].string_value = image


def version_name(package: Path, pipeline: str) -> str:
    """Returns what a version of the pipeline is called: after the digest of its file, so that it is there once."""
    return f"{server_name(pipeline)}-{hashlib.sha256(package.read_bytes()).hexdigest()[:12]}"


def write_objects(
    output: Path, unrolled: int, image: str = "", profile: Profile | None = None, pipeline: str = "optimize"
) -> None:
    """Compiles a pipeline into a Pipeline and a PipelineVersion, objects of a cluster whose KFP keeps them there.

    Arguments and errors are those of `write`.
    """
    write(output, unrolled, image, profile, pipeline)
    spec, *platform = yaml.load_all(output.read_text(encoding="utf-8"), yaml.CSafeLoader)
    whole, name = server_name(pipeline), version_name(output, pipeline)
    version = {"pipelineName": whole, "displayName": name, "pipelineSpec": spec}
    if platform:
        version["platformSpec"] = platform[0]
    about = {"description": spec["pipelineInfo"]["description"]}
    objects = [_object("Pipeline", whole, about), _object("PipelineVersion", name, version)]
    partial = output.with_name(output.name + ".partial")
    partial.write_text(yaml.dump_all(objects, Dumper=yaml.CSafeDumper, sort_keys=False), encoding="utf-8")
    partial.replace(output)


def _object(kind: str, name: str, spec: dict[str, Any]) -> dict[str, Any]:
    about = {"name": name, "labels": labels.recommended("pipeline", name=spec.get("pipelineName", name))}
    return {"apiVersion": "pipelines.kubeflow.org/v2beta1", "kind": kind, "metadata": about, "spec": spec}
