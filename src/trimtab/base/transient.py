"""Trouble that passes, waited for where nobody is there to start again: in a pod.

A pod that ends takes its scratch and its place on a GPU with it, and on a stock Kubeflow no pod that failed is begun
anew. So a lost connection, a store or a hub that answers 5xx, or a GPU that was taken away is tried again in the task's
own process, from where the work stands. On a machine of one's own the error is told at once, for the same command goes
on from the stages that were complete.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import TypeVar

from trimtab.base import progress
from trimtab.base.errors import Transient

Result = TypeVar("Result")

#: Seconds before each further try: a restart of a server, of a node's driver, of a zone's network.
PAUSES = (10.0, 60.0, 300.0)
#: What Kubernetes sets in every container.
POD = "KUBERNETES_SERVICE_HOST"
#: Ways in which a request gets no answer, by the names that requests, httpx and urllib3 give them.
LOST = {
    "ChunkedEncodingError", "ConnectError", "ConnectTimeout", "IncompleteRead", "MaxRetryError", "NewConnectionError",
    "ProtocolError", "ReadError", "ReadTimeout", "ReadTimeoutError", "RemoteProtocolError",
}  # fmt: skip
#: Answers of a server that will be well again.
STATUSES = (429, 500, 502, 503, 504)
#: What the CUDA runtime says of a GPU that is not there for us any more, and would be for another process; cudaError in
#: its API reference: ECCUncorrectable, DevicesUnavailable, HardwareStackError, SystemNotReady. The last is NVML's.
GPU_LOST = (
    "uncorrectable ECC error", "CUDA-capable device(s) is/are busy or unavailable", "hardware stack error",
    "system not yet initialized", "GPU is lost",
)  # fmt: skip


def insist(stage: str, action: Callable[[], Result]) -> Result:
    """Returns what an action returns; in a pod, tries again after trouble that passes.

    Raises:
        Transient: the trouble of the last try.
    """
    for pause in PAUSES if POD in os.environ else ():
        try:
            return action()
        except Transient as error:
            progress.report(stage, f"trying again in {pause:.0f} s: {error}")
        time.sleep(pause)
    return action()


def passes(error: BaseException) -> bool:
    """Whether another try of the same work may end otherwise."""
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    if any(kind.__name__ in LOST for kind in type(error).__mro__):
        return True
    if getattr(getattr(error, "response", None), "status_code", None) in STATUSES:
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in GPU_LOST)
