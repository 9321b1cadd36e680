"""A cluster that rollouts talk to over HTTP: a stand-in for Kubernetes and KServe."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from kubernetes import client
from kubernetes_server import KubernetesServer

from trimtab.components.deployment.rollout.cluster import Cluster


@pytest.fixture
def server() -> Iterator[KubernetesServer]:
    found = KubernetesServer()
    yield found
    found.close()


@pytest.fixture
def cluster(server: KubernetesServer) -> Cluster:
    """With little patience for an API that fails, in seconds."""
    return Cluster(client.ApiClient(client.Configuration(host=server.host)), "serving", patience=0.3)
