"""What a stage has used: seconds, memory, and the most that its scratch and its output took of the disk."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from trimtab.planning.resources import Resources

#: Seconds between two looks at the disk.
LOOK = 2.0


class DiskPeak:
    """The most bytes that were seen in some folders; a file with several names counts once."""

    def __init__(self, folders: tuple[Path, ...]):
        self._folders, self.bytes = folders, 0

    def look(self) -> None:
        """Counts what is there now."""
        sizes = {}
        for folder in self._folders:
            for path in folder.rglob("*"):
                with suppress(OSError):  # it was moved meanwhile
                    if path.is_file():
                        about = path.stat()
                        sizes[about.st_dev, about.st_ino] = about.st_size
        self.bytes = max(self.bytes, sum(sizes.values()))


@contextmanager
def disk_watched(*folders: Path) -> Iterator[DiskPeak]:
    """Looks now and then at what is in the folders while the body runs, and once more at its end."""
    peak, over = DiskPeak(folders), threading.Event()

    def watch() -> None:
        while not over.wait(LOOK):
            peak.look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield peak
        peak.look()
    finally:
        over.set()
        thread.join()


def used(metrics: Mapping[str, Any], seconds: float) -> Resources:
    """Returns what a result says that its work has used."""
    gpu = round(metrics.get("peak_gpu_bytes", 0))
    return Resources(
        gpus=1 if gpu else 0,
        gpu_bytes=gpu,
        host_bytes=round(metrics.get("peak_memory_bytes", 0)),
        disk_bytes=round(metrics.get("peak_disk_bytes", 0)),
        seconds=round(seconds, 1),
    )


def together(first: Resources | None, second: Resources) -> Resources:
    """Returns what two pieces of work have used one after the other."""
    if first is None:
        return second
    most = {name: max(getattr(first, name), getattr(second, name)) for name in Resources.model_fields}
    return Resources(**{**most, "seconds": round(first.seconds + second.seconds, 1)})
