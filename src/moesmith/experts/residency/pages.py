"""Memory-mapped tensors: which file they come from, whether they are in memory, and asking for them early.

Linux only (/proc/self/maps, mincore, madvise); elsewhere no tensor counts as mapped, which is always right
and sometimes slow.
"""

from __future__ import annotations

import bisect
import ctypes
import functools
import mmap
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

_WILLNEED = 3
_PAGE = mmap.PAGESIZE


@dataclass(frozen=True)
class Region:
    """One stretch of memory backed by a file."""

    start: int
    end: int
    offset: int
    """Of `start` in the file."""
    inode: int
    path: str


def regions() -> list[Region]:
    """All stretches of this process's memory that are backed by a file, by address."""
    found = []
    try:
        with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                fields = line.rstrip("\n").split(maxsplit=5)
                if len(fields) == 6 and fields[5].startswith("/") and fields[4] != "0":
                    start, end = (int(address, 16) for address in fields[0].split("-"))
                    found.append(Region(start, end, int(fields[2], 16), int(fields[4]), fields[5]))
    except OSError:
        pass
    return found


class MappedFiles:
    """Looks tensors up among the mapped files, reads them again when a tensor is in none it knows, and reads
    bytes from them."""

    def __init__(self) -> None:
        self._regions: list[Region] = []
        self._looked = -1.0
        self._open: dict[str, int | None] = {}

    def region(self, tensor: Tensor) -> Region | None:
        """The file region that holds the whole of a contiguous tensor; None if it is ordinary memory, or was
        mapped less than a second ago (the list of regions is read at most once a second)."""
        start = tensor.data_ptr()
        end = start + tensor.numel() * tensor.element_size()
        found = self._lookup(start, end)
        if found is None and time.monotonic() > self._looked + 1:
            self._regions, self._looked = regions(), time.monotonic()
            found = self._lookup(start, end)
        return found

    def _lookup(self, start: int, end: int) -> Region | None:
        i = bisect.bisect_right(self._regions, start, key=lambda region: region.start) - 1
        if i >= 0 and self._regions[i].start <= start and end <= self._regions[i].end:
            return self._regions[i]
        return None

    def place(self, tensor: Tensor) -> tuple[str, int] | None:
        """Path and offset of a mapped tensor's first byte, None if it is not mapped or the file at that path
        is another one by now."""
        region = self.region(tensor)
        if region is None:
            return None
        if region.path not in self._open:
            self._open[region.path] = _open_same(region)
        if self._open[region.path] is None:
            return None
        return region.path, region.offset + tensor.data_ptr() - region.start

    def read(self, path: str, offset: int, into: memoryview) -> None:
        """Fill `into` from a file that `place` named. OSError, also when the file has become too short."""
        number = self._open[path]
        assert number is not None, "place() gave this path"
        filled = 0
        while filled < len(into):
            count = os.preadv(number, [into[filled:]], offset + filled)
            if count == 0:
                raise OSError(f"the file ends at byte {offset + filled:,}, {len(into) - filled:,} too early")
            filled += count

    def close(self) -> None:
        for number in self._open.values():
            if number is not None:
                os.close(number)
        self._open = {}


def _open_same(region: Region) -> int | None:
    """The file of a region opened for reading; None if there is another file under that name, or none."""
    try:
        number = os.open(region.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(number).st_ino == region.inode:
        return number
    os.close(number)
    return None


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    return libc


def _whole_pages(start: int, nbytes: int) -> tuple[int, int]:
    """First address and length of the pages that hold these bytes."""
    first = start // _PAGE * _PAGE
    return first, -(-(start + nbytes) // _PAGE) * _PAGE - first


def will_need(start: int, nbytes: int) -> None:
    """Begin reading these mapped bytes into memory (madvise WILLNEED). Errors are nothing to act on."""
    _libc().madvise(*_whole_pages(start, nbytes), _WILLNEED)


def bytes_in_memory(start: int, nbytes: int) -> int:
    """How many of these mapped bytes are in memory, by whole pages.

    The kernel tells only who could write the file; to others everything seems to be in memory.
    """
    first, length = _whole_pages(start, nbytes)
    pages = ctypes.create_string_buffer(length // _PAGE)
    if _libc().mincore(first, length, pages):
        return nbytes
    there = sum(byte & 1 for byte in pages.raw)
    return nbytes if there * _PAGE == length else min(there * _PAGE, nbytes)


_answer = threading.local()


def seems_in_memory(start: int, nbytes: int) -> bool:
    """Whether first, middle and last page are in memory: what tells a cold expert from a warm one for the
    price of three system calls (together 6 us, madvise over 3 MB of warm pages 37)."""
    if not hasattr(_answer, "page"):
        _answer.page = ctypes.create_string_buffer(1)
    page, mincore = _answer.page, _libc().mincore
    for address in (start, start + nbytes // 2, start + nbytes - 1):
        if mincore(address - address % _PAGE, 1, page) == 0 and not page.raw[0] & 1:
            return False
    return True


def tells_residency(paths: Sequence[str]) -> bool:
    """Whether mincore says the truth about these files: they are ours, or we may write them."""
    for path in paths:
        try:
            if os.stat(path).st_uid != os.geteuid() and not os.access(path, os.W_OK):
                return False
        except OSError:
            return False
    return True
