"""SHA-256 of every byte of a checkpoint's weights, tensor by tensor, kept beside them in checksums.json.

A byte that changed after writing names its file and its tensor. A file that is missing or cut short is
refused by `headers` before a weight is read. A checksum finds damage; it is no signature against forgery.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith.config import write_atomically
from moesmith.errors import UserError

from .headers import TensorHeader, read_headers, read_json

if TYPE_CHECKING:
    from torch import Tensor

CHECKSUMS = "checksums.json"
ALGORITHM = "sha256"
PIECE = 4 << 20  # bytes of a read
SHOWN = 3  # damaged tensors that an error names

Progress = Callable[[int], None]
"""Called with the bytes that were read since the last call, from several threads."""


@dataclass(frozen=True)
class Verified:
    """What was read and found as it was written."""

    files: int
    tensors: int
    nbytes: int


def write_checksums(folder: Path, progress: Progress | None = None) -> dict[str, str]:
    """Hash the weights of `folder` as they lie on disk and write checksums.json, whole or not at all.

    Returns:
        tensor -> sum, as hexadecimal digits.

    Raises:
        UserError: no readable checkpoint there.
    """
    found, _ = _hash(folder, progress)
    record = {"algorithm": ALGORITHM, "files": found}
    write_atomically(folder / CHECKSUMS, json.dumps(record, indent=1) + "\n")
    return {name: value for entry in found.values() for name, value in entry["tensors"].items()}


def has_checksums(folder: Path) -> bool:
    """Whether `verify` has something to compare with."""
    return (folder / CHECKSUMS).is_file()


def verify(folder: Path, progress: Progress | None = None) -> Verified:
    """Read every byte of a checkpoint's weights and compare with its checksums.json.

    Raises:
        UserError: no checksums, a file missing or cut short, or a byte that changed: names file and tensor.
    """
    folder = Path(folder)
    again = "copy the folder again from where it came, or pack the model again"
    if not has_checksums(folder):
        raise UserError(
            f"{folder} has no {CHECKSUMS}: nothing to verify with",
            "`moesmith quantize` writes it; pack the model again for one",
        )
    record = read_json(folder / CHECKSUMS)
    wanted = record.get("files")
    if record.get("algorithm") != ALGORITHM or not isinstance(wanted, dict) or not wanted:
        raise UserError(f"{folder / CHECKSUMS} lists no {ALGORITHM} sums", again)
    found, verified = _hash(folder, progress)
    if wanted == found:
        return verified
    wrong = list(_differences(wanted, found))
    more = f", and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
    raise UserError(f"{folder} is damaged: {', '.join(wrong[:SHOWN])}{more}", again)


def digest(tensor: Tensor) -> str:
    """The sum of a tensor's bytes as a safetensors file holds them."""
    import torch

    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.sha256(flat.view(torch.uint8).numpy().data).hexdigest()


def _hash(folder: Path, progress: Progress | None) -> tuple[dict[str, Any], Verified]:
    """file -> its size, the sum of what stands before its first tensor, and tensor -> sum."""
    headers = read_headers(folder)
    files: dict[str, list[TensorHeader]] = {}
    for header in headers.values():
        files.setdefault(header.file, []).append(header)
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        for file in sorted(files):
            tensors = sorted(files[file], key=lambda header: header.start)
            handle = os.open(folder / file, os.O_RDONLY)
            try:
                size = os.fstat(handle).st_size
                first = tensors[0].start
                ends = [tensors[-1].end, size]  # nothing between them, in a file that is as it should be
                starts = [0, *(header.start for header in tensors), ends[0]]
                stops = [first, *(header.end for header in tensors), ends[1]]
                sums = list(pool.map(partial(_sum, handle, progress), starts, stops))
            finally:
                os.close(handle)
            found[file] = {"bytes": size, "header": sums[0]}
            if tensors[-1].end != size:
                found[file]["rest"] = sums[-1]
            names = [header.name for header in tensors]
            found[file]["tensors"] = dict(sorted(zip(names, sums[1:-1], strict=True)))
    return found, Verified(len(found), len(headers), sum(entry["bytes"] for entry in found.values()))


def _sum(handle: int, progress: Progress | None, start: int, end: int) -> str:
    """Hash bytes `start` to `end` of an open file. Reads with pread: a mapped file that breaks kills."""
    sums = hashlib.sha256()
    while start < end:
        piece = os.pread(handle, min(PIECE, end - start), start)
        if not piece:
            break  # cut short since its header was read: the sum says so
        sums.update(piece)
        start += len(piece)
        if progress is not None:
            progress(len(piece))
    return sums.hexdigest()


def _differences(wanted: dict[str, Any], found: dict[str, Any]) -> Any:
    """What differs, in words, file by file."""
    for file in sorted(wanted.keys() | found.keys()):
        if file not in found:
            yield f"{file} is no part of it any more"
        elif file not in wanted:
            yield f"{file} has no checksums"
        else:
            old, new = wanted[file], found[file]
            before, after = old.get("tensors", {}), new["tensors"]
            tensors = [
                name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)
            ]
            yield from (f"{name} in {file}" for name in tensors)
            if not tensors and old.get("bytes") != new["bytes"]:
                yield f"{file} has {new['bytes']:,} bytes, not {old.get('bytes', 0):,}"
            elif not tensors and old != new:
                yield f"the header of {file}"
