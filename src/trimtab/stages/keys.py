"""What a result is found by: the work, what it was given, and the environment that the work declares.

A result is true under conditions. Work that computes with torch gives other numbers in another version of it; a speed
is one of a device; an engine is opened by the library that built it. So each stage declares what of its surroundings
shapes its result, that goes into its key, and nothing else does: a new image makes new results of what it shapes.

| declared | whose result | in the key |
|---|---|---|
| nothing | pure data | – |
| libraries | tensors: statistics, checkpoints, exports | the versions of these libraries |
| libraries, engine, device | what is built for a device or measured on it | also the back end's, and the device |

Where a key is computed: by the stage itself, in the task whose child process does the work, so that both are one image
and one machine. Who must know it elsewhere:

- `accelerators`, in a task without GPU and of another image, follows keys only as far as libraries are declared, with
  the versions that the stages' own tasks have written into the run's state (`face.run`). It never guesses a device.
- the gate and the attempt's page compute no key: the evidence and the trees' manifests name what was recorded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trimtab.base import environment
from trimtab.base.schema import digest
from trimtab.catalog.backends import BACKENDS
from trimtab.store.tree import Tree


@dataclass(frozen=True)
class Environment:
    """What of its surroundings shapes a piece of work.

    `libraries` are names of packages whose versions do. With `measured` the engine does too, by the libraries of its
    back end, and the device.
    """

    libraries: tuple[str, ...] = ()
    measured: bool = False

    def here(self, backend: str) -> dict[str, Any]:
        """Returns what is declared as it is in this image, on this machine; plain JSON."""
        libraries = {*self.libraries, *(BACKENDS[backend].packages if self.measured else ())}
        device = {"device": environment.device()} if self.measured else {}
        return {"libraries": environment.installed(sorted(libraries)), **device}

    def in_image(self, versions: Mapping[str, str]) -> dict[str, Any]:
        """Returns what `here` returns in an image with these versions, where nothing is measured."""
        assert not self.measured, "a device is known where it is"
        return {"libraries": {name: versions[name] for name in sorted(self.libraries) if name in versions}}


#: Of tensors that torch computes on models that transformers loads.
TENSORS = Environment(("torch", "transformers"))
#: Of tensors that ModelOpt rounds, packs and describes besides.
QUANTIZED = Environment(("torch", "transformers", "nvidia-modelopt"))
#: The libraries that any tensors depend on.
SHAPING = QUANTIZED.libraries
#: Of what is built for a device, or measured on it.
MEASURED = Environment(measured=True)


def key(
    work: str,
    version: int,
    parameters: Mapping[str, Any],
    inputs: Mapping[str, Tree | None],
    environment: Mapping[str, Any],
) -> str:
    """Returns the key of a result in the store's index, 64 hex digits."""
    digests = {name: tree.digest if tree else None for name, tree in inputs.items()}
    return digest([work, version, parameters, digests, environment])
