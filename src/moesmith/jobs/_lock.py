"""One writer per output folder: two commands given the same --out at once would mix their files.

The lock is the system's (`flock`) on a file in ~/.cache/moesmith/locks that is named after the folder, so the
output holds nothing of it, and a process that dies, however it dies, has let go. It does not reach another
machine that shares the disk, and where no lock can be made, none is held.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from moesmith.errors import UserError


@contextmanager
def only_writer(out: str | Path | None) -> Iterator[None]:
    """Hold the lock of `out` while the block runs; nothing for a command that writes no folder.

    Raises:
        UserError: another process holds it; names the process.
    """
    file = _lock_file(out) if out is not None else None
    if file is None:
        yield
        return
    import fcntl

    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(file, 32, 0).decode(errors="replace").strip() or "another one"
            raise UserError(
                f"{out} is being written by process {holder}",
                "wait for it, stop it, or choose another --out",
            ) from None
        os.truncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(file)  # lets go of the lock


def _lock_file(out: str | Path) -> int | None:
    """A file descriptor to lock; None where the file system offers none."""
    try:
        name = hashlib.sha256(os.fsencode(Path(out).expanduser().resolve())).hexdigest()[:32]
        folder = Path("~/.cache/moesmith/locks").expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except (OSError, RuntimeError):  # a home that is read-only, or none
        return None
