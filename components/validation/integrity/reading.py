"""Both checkpoints as streams: what is compared next is read while what was read before is compared.

Files are read, not mapped: the pages of a mapped file count as memory of whoever has read them, here of both
checkpoints whole, and a GPU takes what it gets from pinned memory several times as fast.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

from trimtab.base.errors import Failure
from trimtab.model.headers import Tensor, header_bytes, read_header
from trimtab.runtime.checkpoint.model_files import Export

#: How many items are read beside each other, and so the most that is held beside what is being compared.
AHEAD = 4
_TYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip

Item, Read = TypeVar("Item"), TypeVar("Read")


class Stream(Export):
    """A model folder whose tensors are read from their files into memory of their own, pinned where there is a GPU.

    Raises:
        InputError, Failure: as `Export`; and a header that cannot be read.
    """

    def __init__(self, folder: Path):
        super().__init__(folder)
        self._places: dict[str, tuple[Path, int, Tensor]] = {}
        for file in self._files:
            path = self.folder / file
            base = header_bytes(path)
            self._places |= {tensor.name: (path, base + tensor.begin, tensor) for tensor in read_header(path)}

    def tensor(self, name: str) -> torch.Tensor:
        """Reads one tensor.

        Raises:
            Failure: `export_damaged`, it is missing, or its file ends before it does.
        """
        if not self.has(name):
            return super().tensor(name)  # which says so
        path, begin, about = self._places[name]
        data = torch.empty(about.end - about.begin, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
        left = memoryview(data.numpy())
        with path.open("rb", buffering=0) as file:
            file.seek(begin)
            while len(left):
                if not (count := file.readinto(left)):
                    raise Failure("export_damaged", f"{path.name}: ends within {name}")
                left = left[count:]
        return data.view(_TYPES[about.dtype]).view(about.shape)


def ahead(items: Iterable[Item], read: Callable[[Item], Read]) -> Iterator[tuple[Item, Read]]:
    """Yields each item with what `read` returns for it, in order; what follows is read meanwhile.

    Raises:
        Failure: what `read` raises, when its item's turn has come.
    """
    pool = ThreadPoolExecutor(AHEAD)
    waiting: deque[tuple[Item, Future[Read]]] = deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(read, item)))
            if len(waiting) > AHEAD:
                first, found = waiting.popleft()
                yield first, found.result()
        while waiting:
            first, found = waiting.popleft()
            yield first, found.result()
    finally:
        # Not waited for: what is left of a generator may be collected in a thread of its own pool.
        pool.shutdown(wait=False, cancel_futures=True)
