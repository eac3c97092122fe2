"""Memory: what is free, what this process holds, and what tensors a computation makes."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MEMINFO = Path("/proc/meminfo")  # Linux alone has them
STATM = Path("/proc/self/statm")
M_MMAP_THRESHOLD = -3  # glibc's mallopt(3)
OWN_BYTES = 2**24, 2**25  # least and most size from which on freed blocks can be the kernel's


class Tally(TorchDispatchMode):
    """While it is on: bytes of the tensors that operations have made and that are alive, and the most there were.

    What kernels allocate for themselves is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count what it made."""
        for given in tree_leaves((args, kwargs)):
            self._count(given, 0)
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            self._count(made, None)
        self.peak = max(self.peak, self.alive)
        return out

    def _count(self, value: Any, size: int | None) -> None:
        if not isinstance(value, Tensor):
            return
        storage = value.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if size is None else size
        self._known.add(key)
        self.alive += size
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


def return_what_is_freed(size: int) -> None:
    """Have glibc give freed tensors of ``size`` bytes and more back to the kernel, from now on; nothing elsewhere.

    Left alone it keeps freed blocks of up to 32 MB, among which later ones find no room: volumes just below that took
    twice the memory that was alive. Below 16 MB they stay: a network's activations are quicker where they were before.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, min(max(size, OWN_BYTES[0]), OWN_BYTES[1]))


def free_bytes(device: torch.device) -> int | None:
    """Memory that a run may still take there; None where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "cpu" and MEMINFO.is_file():
        lines = dict(line.split(":", 1) for line in MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return None


def held_bytes(device: torch.device) -> int:
    """Memory that this process holds there already; 0 where that is not known."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    if device.type == "cpu" and STATM.is_file():
        return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def out_of_memory(error: BaseException) -> bool:
    """Whether torch says with this error that an allocation failed, on a GPU or on a CPU."""
    said = str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and ("can't allocate memory" in said or "not enough memory" in said)
    )
