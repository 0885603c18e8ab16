"""The folder a command writes: whole or not there, and nobody else's work is touched.

A job writes into `<out>.tmp`, which carries a marker while it is unfinished, and renames it at the end. An
output that stands there already is replaced only when asked, and only if it holds the record that moesmith
leaves beside everything it writes.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from moesmith import console
from moesmith.errors import UserError
from moesmith.models.checkpoint import RECORD

INCOMPLETE = ".incomplete"  # marks a folder that a killed run left behind


def check_place(out: Path, source: Path | None, overwrite: bool, record: str = RECORD) -> None:
    """Raise UserError unless `out` is free to be created or, with `overwrite`, an earlier output of ours.

    Args:
        source: the folder that is read; it must not stand where `out` will, nor below it.
        record: the file by which an earlier output is known.
    """
    if source is not None and out.resolve() == source.resolve():
        raise UserError(f"--out {out} is the model itself")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise UserError(f"{out} exists", "choose another --out, or --overwrite to replace it")
    if not (out / record).is_file():
        raise UserError(
            f"{out} has no {record}: moesmith did not write it, so --overwrite leaves it alone",
            "choose another --out",
        )
    if source is not None and source.resolve().is_relative_to(out.resolve()):
        raise UserError(f"--out {out} holds the model that is read", "choose another --out")


def check_space(out: Path, needed: int, what: str) -> None:
    """Raise UserError when the disk of `out` has less than `needed` bytes and 1 % free; `what` takes them."""
    folder = out.absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < 1.01 * needed:
        raise UserError(
            f"{folder} has {console.size(free)} free, {what} takes {console.size(needed)}",
            "free some space, or give --out on another disk",
        )


def start_folder(out: Path) -> Path:
    """A fresh `<out>.tmp`, marked incomplete. What a killed run left there is removed, nothing else."""
    temporary = out.with_name(out.name + ".tmp")
    if temporary.exists():
        if not (temporary / INCOMPLETE).exists():
            raise UserError(
                f"{temporary} is in the way", "moesmith writes there first; move it or choose another --out"
            )
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    (temporary / INCOMPLETE).touch()
    return temporary


def finish_folder(temporary: Path, out: Path) -> None:
    """Put the finished folder in its place; one that stood there is removed last."""
    for path in temporary.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors makes files only their owner can read
        _sync(path)
    (temporary / INCOMPLETE).unlink()
    _sync(temporary)
    replaced = out.with_name(out.name + ".old")
    if out.exists():
        out.rename(replaced)
    temporary.rename(out)
    _sync(out.absolute().parent)
    if replaced.exists():
        shutil.rmtree(replaced)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
