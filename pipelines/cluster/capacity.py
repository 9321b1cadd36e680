"""What the namespace of a run has room for, asked in its pods before one waits for ever: quotas, and limits of a pod.

Kubernetes does not start a pod that alone asks for more than a ResourceQuota or a LimitRange allows, and Argo goes on
asking. What others use at the moment is waited for. Nodes are not looked at: to list them takes a right on the whole
cluster, and an autoscaler may bring larger ones.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kubernetes import client, config
from kubernetes.utils import parse_quantity
from urllib3 import exceptions as network

from trimtab import stages
from trimtab.base import progress
from trimtab.base.errors import Failure
from trimtab.base.transient import POD
from trimtab.loop.state import State, fail

NAMESPACE = Path("/var/run/secrets/kubernetes.io/serviceaccount/namespace")
TIMEOUT = 10


def refuse_there(state: State, offered: Mapping[str, Any]) -> State:
    """Refuses an attempt with a task whose pod the namespace would never start; the next recipe may need less.

    In a pod alone, and only as far as its service account may read quotas: what cannot be read refuses nothing.

    Args:
        offered: as `stages.machines` has it; in `always` also CPU and memory of the tasks that always work, and in
            `resource` the name under which the cluster counts accelerators.
    """
    if state.verdict or POD not in os.environ:
        return state
    try:
        limits = list(_limits())
    except (client.ApiException, network.HTTPError, config.ConfigException, OSError) as error:
        why = getattr(error, "reason", None) or type(error).__name__
        progress.report("prepare", f"quotas of the namespace are not known ({why}); a pod that exceeds one waits")
        return state
    for task, machine in stages.machines(state, offered).items():
        machine = {**offered["always"].get(task, {}), **machine}
        asked = {offered["resource"]: machine["accelerators"], "cpu": machine["cpu"], "memory": machine["memory"]}
        for what, most, whose in limits:
            if asked.get(what) and parse_quantity(asked[what]) > parse_quantity(most):
                less = "less into the profile" if what in ("cpu", "memory") else "a smaller engine.tensor_parallel_size"
                said = f"asks for {asked[what]} of {what}, and {whose} allows {most}; have that raised, or write {less}"
                return fail(state, task, Failure("does_not_fit", f"{task} {said}"))
    return state


def _limits() -> Iterator[tuple[str, str, str]]:
    """Yields what one pod may ask for at most: a resource, a quantity, and what says so."""
    configuration = client.Configuration()
    config.load_incluster_config(client_configuration=configuration)
    configuration.retries = False
    api, namespace = client.CoreV1Api(client.ApiClient(configuration)), NAMESPACE.read_text(encoding="utf-8").strip()
    for quota in api.list_namespaced_resource_quota(namespace, _request_timeout=TIMEOUT).items:
        if quota.spec.scopes or quota.spec.scope_selector:
            continue  # of other pods, perhaps
        for name, most in (quota.spec.hard or {}).items():
            what = name.removeprefix("requests.").removeprefix("limits.")
            yield what, most, f"ResourceQuota '{quota.metadata.name}' of namespace '{namespace}'"
    for found in api.list_namespaced_limit_range(namespace, _request_timeout=TIMEOUT).items:
        for limit in found.spec.limits:
            for name, most in (limit.max or {}).items() if limit.type in ("Container", "Pod") else ():
                yield name, most, f"LimitRange '{found.metadata.name}' of namespace '{namespace}'"
