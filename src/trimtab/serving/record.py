"""What is written down of a built engine: `engine.json`, which says how it is opened, and where it may be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trimtab.base.errors import Failure
from trimtab.base.schema import Document
from trimtab.catalog.backends import BACKENDS
from trimtab.recipe import Engine

NAME = "engine.json"
#: Folder of the serialized engines, beside it.
RANKS = "engine"
#: Folder of the checkpoint that a back end reads in the export's place, beside it.
CHECKPOINT = "checkpoint"


class Device(Document):
    """The GPU that an engine was built on."""

    name: str
    compute_capability: tuple[int, int]


class Built(Document):
    """A built engine.

    `checkpoint` is the digest of the export that it serves, `translated` how it was written anew beside `engine.json`
    for a library that does not read it, empty where it does. `versions` are those of what built it; `kernels` say for
    each quantized layer what runs it; `arithmetic`, `weight_bytes` and `device_bytes` are the engine's own words and
    figures.
    """

    settings: Engine
    checkpoint: str
    translated: str = ""
    versions: dict[str, str] = {}
    device: Device | None = None
    kernels: dict[str, dict[str, Any]] = {}
    arithmetic: str = ""
    weight_bytes: int = 0
    device_bytes: int = 0

    def write(self, folder: Path) -> None:
        """Writes `engine.json`."""
        (folder / NAME).write_text(json.dumps(self.model_dump(mode="json"), indent=1), encoding="utf-8")

    def check(self, checkpoint: str, versions: dict[str, str], device: Device | None) -> None:
        """Refuses to open the engine for another export, or, where it is compiled, with what did not build it.

        A serialized engine is read by the TensorRT that wrote it, on the compute capability it was built for; another
        one ends in an assertion or in wrong kernels.

        Raises:
            Failure: `export_damaged` for another export; `unsupported`, names what differs.
        """
        if checkpoint != self.checkpoint:
            what = f"the engine was built from export {self.checkpoint[:12]}, and this one is {checkpoint[:12]}"
            raise Failure("export_damaged", what)
        if not BACKENDS[self.settings.backend].compiled:
            return
        for package in ("tensorrt_llm", "tensorrt"):
            built, here = self.versions.get(package), versions.get(package)
            if built != here:
                reason = f"the engine was built by {package} {built}, and here is {here or 'none'}; build it anew"
                raise Failure("unsupported", reason)
        built, here = self.device and self.device.compute_capability, device and device.compute_capability
        if built != here:
            names = [".".join(map(str, which)) if which else "no GPU" for which in (built, here)]
            reason = f"the engine was built for compute capability {names[0]}, and here is {names[1]}; build it anew"
            raise Failure("unsupported", reason)


def read(folder: Path) -> Built:
    """Reads `engine.json`."""
    return Built.model_validate_json((Path(folder) / NAME).read_text(encoding="utf-8"))
