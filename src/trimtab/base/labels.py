"""Kubernetes' recommended labels (https://kubernetes.io/docs/concepts/overview/working-with-objects/common-labels/), of
the objects that trimtab itself makes; those of `manifests/` stand in their kustomizations."""

from __future__ import annotations

from trimtab import __version__

_PREFIX = "app.kubernetes.io/"


def recommended(component: str, name: str, version: str = __version__) -> dict[str, str]:
    """Returns the labels of an object.

    Args:
        component: what the object is within trimtab, such as "pipeline".
        name: of the application, which is also its instance; cut to the 63 characters of a label.
        version: of the application.
    """
    said = {
        "name": name[:63].rstrip("-._"),
        "instance": name[:63].rstrip("-._"),
        "version": version,
        "component": component,
        "part-of": "trimtab",
        "managed-by": "trimtab",
    }
    return {f"{_PREFIX}{key}": value for key, value in said.items()}
