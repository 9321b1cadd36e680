"""What a run's parameters may not hold, because of what runs them.

Kubeflow Pipelines writes them into an Argo Workflow, and Argo fills in whatever looks like one of its tags, or fails
the run for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trimtab.base.errors import InputError

TAG = "{{"


def refuse_tags(parameters: Mapping[str, Any]) -> None:
    """Refuses parameters that Argo would change.

    Raises:
        InputError: names the parameter, and where in it.
    """
    for name, value in parameters.items():
        before, tag, after = str(value).partition(TAG)
        if tag:
            found = f"…{before[-20:]}{tag}{after[:20]}…".replace("\n", " ")
            raise InputError(
                f"{name}: '{found}' has '{TAG}', which a cluster's Argo Workflows reads as a tag of its own; write it "
                f"without two braces in a row"
            )
