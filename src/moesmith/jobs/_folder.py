"""The folder a command writes: whole or not there, and nobody else's work is touched.

A job writes into `<out>.tmp`, which carries a marker while it is unfinished, and renames it at the end. An
output that stands there already is replaced only when asked, and only if it holds the record that moesmith
leaves beside everything it writes; it waits as `<out>.old` until the new one has its place. Links are
followed: what is written and renamed lies beside the folder itself, on its disk.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from moesmith import console
from moesmith.errors import UserError
from moesmith.models.checkpoint import RECORD

INCOMPLETE = ".incomplete"  # marks a folder that a killed run left behind
WHOLE = "whole"  # written to the marker of a folder that only waits for its name


def check_place(out: Path, source: Path | None, overwrite: bool, record: str = RECORD) -> None:
    """Raise UserError unless `out` is free to be created or, with `overwrite`, an earlier output of ours.

    Args:
        source: the folder that is read; it must not stand where `out` will, nor below it.
        record: the file by which an earlier output is known.
    """
    real = out.resolve()
    if source is not None and real == source.resolve():
        raise UserError(f"--out {out} is the model itself")
    if os.path.ismount(real):
        raise UserError(
            f"--out {out} is where a disk is mounted: a folder that is written beside it would be on another",
            f"give a folder below it: --out {out / 'out'}",
        )
    if Path.cwd().is_relative_to(real):
        raise UserError(
            f"--out {out} is the folder you are in, or holds it", "give the name of a folder to create"
        )
    _check_waiting(real)
    if not real.exists() or _is_empty(real):
        return
    if not overwrite:
        raise UserError(f"{out} exists", "choose another --out, or --overwrite to replace it")
    if not (real / record).is_file():
        raise UserError(
            f"{out} has no {record}: moesmith did not write it, so --overwrite leaves it alone",
            "choose another --out",
        )
    if source is not None and source.resolve().is_relative_to(real):
        raise UserError(f"--out {out} holds the model that is read", "choose another --out")


def check_space(out: Path, needed: int, what: str) -> None:
    """Raise UserError when the disk of `out` has less than `needed` bytes and 1 % free; `what` takes them."""
    folder = out.resolve().parent  # where the temporary folder will be
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < 1.01 * needed:
        raise UserError(
            f"{folder} has {console.size(free)} free, {what} takes {console.size(needed)}",
            "free some space, or give --out on another disk",
        )


def start_folder(out: Path) -> Path:
    """A fresh `<out>.tmp`, marked incomplete. What killed runs left behind is removed, nothing else.

    Raises:
        UserError: something else has the name, or a finished output that a killed run did not rename.
    """
    out = out.resolve()
    _check_waiting(out)
    temporary, replaced = _beside(out)
    if replaced.exists() and out.exists():  # a run that was killed while it removed this
        _remove(replaced)
    if temporary.exists():
        shutil.rmtree(temporary)
    temporary.mkdir(parents=True)
    (temporary / INCOMPLETE).touch()
    return temporary


def finish_folder(temporary: Path, out: Path) -> None:
    """Put the finished folder in its place; one that stood there is removed last.

    Killed in between, it leaves a whole output under one of the names, and `start_folder` says which.
    """
    out = out.resolve()
    for path in temporary.rglob("*"):
        if path.is_file():
            path.chmod(0o644)  # safetensors makes files only their owner can read
        _sync(path)
    _mark(temporary)
    replaced = None
    if out.is_dir() and _is_empty(out):
        out.rmdir()
    elif out.exists():
        _mark(out)
        replaced = out.rename(_beside(out)[1])
    temporary.rename(out)
    _sync(out.parent)
    (out / INCOMPLETE).unlink()
    if replaced is not None:
        _remove(replaced)


def _beside(out: Path) -> tuple[Path, Path]:
    """Where the output is written, and where the one that it replaces waits."""
    return out.with_name(out.name + ".tmp"), out.with_name(out.name + ".old")


def _check_waiting(out: Path) -> None:
    """Raise UserError for a folder beside `out` that is in the way: somebody else's, or a finished output."""
    temporary, replaced = _beside(out)
    for path in (temporary, replaced):
        if path.exists() and not (path / INCOMPLETE).exists() and (path == temporary or out.exists()):
            raise UserError(
                f"{path} is in the way",
                f"moesmith needs the name beside {out.name}; move it or choose another --out",
            )
    if temporary.exists() and (temporary / INCOMPLETE).read_text() == WHOLE:
        again = f"rm -r {temporary}" if out.exists() else f"mv {temporary} {out}"
        raise UserError(
            f"{temporary} is a finished output: a run was stopped just before it was renamed",
            f"{again}{', or move it to look at it' if out.exists() else ''}",
        )


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def _mark(folder: Path) -> None:
    """The folder is whole, and ours to remove."""
    (folder / INCOMPLETE).write_text(WHOLE)
    _sync(folder / INCOMPLETE)
    _sync(folder)


def _remove(folder: Path) -> None:
    """Remove a folder, its marker last: stopped in between, the rest is still known as ours."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != INCOMPLETE:
            path.unlink()
    shutil.rmtree(folder)


def _sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
