"""Safetensors files put together from byte ranges of other files: no torch, and no tensor is held.

A new file is a header and then, for each tensor, ranges of existing files, a few bytes, or bytes that are
made when their turn comes. Long ranges are copied inside the kernel (copy_file_range, else sendfile); short
ones are read together. Memory stays at two buffers and one made part however large the checkpoint is.
"""

from __future__ import annotations

import errno
import json
import math
import os
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from moesmith.errors import UserError
from moesmith.models.headers import DTYPE_BITS, INDEX, SINGLE

SHARD_BYTES = 5_000_000_000
KERNEL = 64 << 20  # bytes per call to the kernel: progress moves, and Ctrl-C is heard
BUFFER = 1 << 20  # of a read; 8 MB buffers took seven times as long (first touch of fresh pages)
ALIGNMENT = 64  # of the data: the format asks for 8, vector loads from a memory map like a cache line
SHORT = 64 << 10  # ranges below this are gathered before they are written

# What a file system answers that cannot copy this way; the next way is tried.
UNSUPPORTED = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTSOCK}
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True)
class Piece:
    """Part of a tensor's data: the byte `runs` (offset, length) of each of `rows` rows, `stride` bytes apart.

    One row is the usual case: experts along the first dimension are ranges of the whole tensor.
    """

    file: str
    """below the source folder; an absolute path is taken as it is, so that sources can be mixed"""
    start: int
    """of the first row, in the file"""
    runs: tuple[tuple[int, int], ...]
    rows: int = 1
    stride: int = 0

    @property
    def nbytes(self) -> int:
        return self.rows * sum(length for _, length in self.runs)


@dataclass(frozen=True)
class Made:
    """Bytes that are made when their place in the file is reached, and dropped after."""

    nbytes: int
    make: Callable[[], bytes | memoryview]


@dataclass(frozen=True)
class NewTensor:
    """One tensor of the file to be written; `parts` in order are its data."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Piece | bytes | Made, ...]

    @property
    def nbytes(self) -> int:
        return -(-math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8)


def write_checkpoint(
    source: Path,
    out: Path,
    tensors: list[NewTensor],
    on_bytes: Callable[[int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write `tensors`, whose pieces lie in files of `source`, to shards in `out`; names of the files written.

    Tensors go to the shards in the order given; an index is written when there is more than one shard.

    Args:
        on_bytes: called with the number of bytes since the last call.

    Raises:
        UserError: the disk is full, or a source file ends before a range does.
    """
    shards = split_shards(tensors, shard_bytes)
    names = [f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    names = [SINGLE] if len(shards) == 1 else names
    with full_disk(out):
        for name, shard in zip(names, shards, strict=True):
            _write_file(source, out / name, shard, on_bytes or (lambda count: None))
        if len(shards) > 1:
            weight_map = {t.name: name for name, shard in zip(names, shards, strict=True) for t in shard}
            total = sum(tensor.nbytes for tensor in tensors)
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (out / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


def split_shards(tensors: list[NewTensor], shard_bytes: int) -> list[list[NewTensor]]:
    """Tensors in order, as many to a shard as fit; one that is larger has a shard of its own."""
    shards: list[list[NewTensor]] = [[]]
    used = 0
    for tensor in tensors:
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += tensor.nbytes
    return shards


def header_bytes(tensors: list[NewTensor]) -> bytes:
    """Length and JSON of a safetensors file that holds `tensors` in this order, padded with spaces."""
    entries: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


@contextmanager
def full_disk(folder: Path) -> Iterator[None]:
    """Turns a full disk into a UserError."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise UserError(
                f"writing to {folder} failed: {os.strerror(error.errno or 0).lower()}",
                "free some space, or give --out on another disk; the unfinished folder can be deleted",
            ) from None
        raise


def _write_file(source: Path, path: Path, tensors: list[NewTensor], on_bytes: Callable[[int], None]) -> None:
    # Wide dtypes first, so that every tensor starts at a multiple of its element size.
    ordered = sorted(tensors, key=lambda tensor: -DTYPE_BITS[tensor.dtype])
    with open(path, "xb", buffering=0) as file:
        _write_all(file, header_bytes(ordered))
        copier = _Copier(source, file, on_bytes)
        for tensor in ordered:
            assert tensor.nbytes == sum(_size(part) for part in tensor.parts), tensor
            for part in tensor.parts:
                copier.add(part)
        copier.close()


class _Copier:
    """Appends pieces to a file. Ranges that follow each other in the same source become one."""

    def __init__(self, source: Path, file: BinaryIO, on_bytes: Callable[[int], None]):
        self.source = source
        self.file = file
        self.on_bytes = on_bytes
        self.ways = [_copy_file_range, _sendfile]
        self.name = ""
        self.handle: int | None = None
        self.start = self.end = 0  # the range that waits for a neighbour
        self.gathered = bytearray()

    def add(self, part: Piece | bytes | Made) -> None:
        if isinstance(part, bytes):
            self._flush_range()
            self._gather(part)
            return
        if isinstance(part, Made):
            self._flush_range()
            self._make(part)
            return
        if part.file != self.name:
            self._flush_range()
            self._open(part.file)
        if part.rows > 1 and part.stride <= BUFFER:
            self._flush_range()
            self._strided(part)
            return
        for row in range(part.rows):
            for offset, length in part.runs:
                start = part.start + row * part.stride + offset
                if start != self.end:
                    self._fetch(start, length)  # the disk reads it while the range before it is copied
                    self._flush_range()
                    self.start = self.end = start
                self.end += length

    def close(self) -> None:
        self._flush_range()
        self._flush_gathered()
        self._open("")

    def _open(self, name: str) -> None:
        if self.handle is not None:
            os.close(self.handle)
        self.handle = os.open(self.source / name, os.O_RDONLY) if name else None
        self.name = name
        if self.handle is not None and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def _fetch(self, start: int, length: int) -> None:
        if self.handle is not None and length >= SHORT and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.handle, start, min(length, KERNEL), os.POSIX_FADV_WILLNEED)

    def _flush_range(self) -> None:
        start, self.start = self.start, self.end
        length = self.end - start
        if not length:
            return
        if length < SHORT:
            self._gather(self._read(start, length))
            return
        self._flush_gathered()
        assert self.handle is not None
        while length:
            count = self._kernel(start, min(length, KERNEL))
            if not count:
                data = self._read(start, min(length, BUFFER))
                _write_all(self.file, data)
                count = len(data)
            self.on_bytes(count)
            start += count
            length -= count

    def _kernel(self, start: int, length: int) -> int:
        """Bytes the kernel copied; 0 when it cannot on these file systems."""
        assert self.handle is not None
        while self.ways:
            try:
                count = self.ways[0](self.handle, self.file.fileno(), start, length)
            except OSError as error:
                if error.errno not in UNSUPPORTED:
                    raise
                count = 0
            if count:
                return count
            self.ways.pop(0)  # some file systems say 0 instead of an error; at a file's end reading says so
        return 0

    def _strided(self, piece: Piece) -> None:
        """Rows read together, their runs picked in memory."""
        for first in range(0, piece.rows, max(1, BUFFER // piece.stride)):
            rows = min(max(1, BUFFER // piece.stride), piece.rows - first)
            width = max(offset + length for offset, length in piece.runs)
            span = (rows - 1) * piece.stride + width  # the last row may end with the file
            data = self._read(piece.start + first * piece.stride, span)
            block = np.zeros(rows * piece.stride, np.uint8)
            block[:span] = np.frombuffer(data, np.uint8)
            table = block.reshape(rows, piece.stride)
            self._gather(
                np.concatenate([table[:, o : o + length] for o, length in piece.runs], axis=1).tobytes()
            )

    def _make(self, part: Made) -> None:
        data = memoryview(part.make()).cast("B")
        assert len(data) == part.nbytes, f"{len(data)} bytes were made, {part.nbytes} promised"
        self._flush_gathered()
        for start in range(0, len(data), KERNEL):
            _write_all(self.file, data[start : start + KERNEL])
            self.on_bytes(min(KERNEL, len(data) - start))

    def _read(self, start: int, length: int) -> bytes:
        assert self.handle is not None
        parts = []
        while length:
            data = os.pread(self.handle, length, start)
            if not data:
                raise UserError(
                    f"{self.source / self.name} is cut short: it ends before byte {start + length:,}",
                    "fetch the file again",
                )
            parts.append(data)
            start += len(data)
            length -= len(data)
        return b"".join(parts)

    def _gather(self, data: bytes) -> None:
        self.gathered += data
        if len(self.gathered) >= BUFFER:
            self._flush_gathered()

    def _flush_gathered(self) -> None:
        if self.gathered:
            _write_all(self.file, self.gathered)
            self.on_bytes(len(self.gathered))
            self.gathered = bytearray()


def _copy_file_range(source: int, target: int, start: int, length: int) -> int:
    if not hasattr(os, "copy_file_range"):
        return 0
    return os.copy_file_range(source, target, length, offset_src=start)


def _sendfile(source: int, target: int, start: int, length: int) -> int:
    return os.sendfile(target, source, start, length)


def _write_all(file: BinaryIO, data: bytes | bytearray | memoryview) -> None:
    view = memoryview(data)
    while view:
        view = view[file.write(view) :]


def _size(part: Piece | bytes | Made) -> int:
    return len(part) if isinstance(part, bytes) else part.nbytes
