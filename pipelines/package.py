"""The pipeline as a file for a Kubeflow Pipelines server."""

from __future__ import annotations

import os
from pathlib import Path

from trimtab.errors import InputError
from trimtab.profile import Profile


def write(output: Path, unrolled: int, image: str = "", profile: Profile | None = None) -> None:
    """Compiles `optimize` into a YAML file.

    Args:
        output: a .yaml, .yml or .json file in a folder that exists.
        unrolled: the most attempts that a run may ask for, 1 to 10.
        image: container image of all stages; "" for that of this version.
        profile: the cluster's; None for none.

    Raises:
        InputError: the file cannot be written there.
    """
    if output.suffix not in (".yaml", ".yml", ".json") or not output.absolute().parent.is_dir():
        raise InputError(f"output: '{output}' must be a .yaml or .json file in a folder that exists")
    if image:
        os.environ["TRIMTAB_IMAGE"] = image  # read where the components are declared
    from kfp import compiler

    from trimtab.pipelines.optimize import optimize_pipeline

    compiler.Compiler().compile(optimize_pipeline(unrolled, profile), str(output))
