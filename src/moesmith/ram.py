"""How much RAM this process may have, and how much can be had now.

The machine's, or less where a control group (a container, a systemd slice) sets a limit: Linux control groups
of version 1 and 2, nested ones included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MOUNTED = Path("/sys/fs/cgroup")
OWN = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class _Version:
    """Where a version of control groups keeps its figures."""

    folder: str
    limit: str
    current: str
    cached: tuple[str, str]
    """Rows of memory.stat: pages of files, which the kernel gives up when memory is short."""


_ONE = _Version(
    "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")
)
_TWO = _Version("", "memory.max", "memory.current", ("inactive_file", "active_file"))


def total() -> int:
    """Bytes of RAM there are for this process."""
    import psutil  # type: ignore[import-untyped]

    return min([int(psutil.virtual_memory().total), *(limit for limit, _ in _limits())])


def available() -> int:
    """Bytes of RAM that can be had now without swapping."""
    import psutil  # type: ignore[import-untyped]

    found = int(psutil.virtual_memory().available)
    return min([found, *(max(0, limit - taken) for limit, taken in _limits())])


def _limits() -> Iterator[tuple[int, int]]:
    """(limit, bytes taken less what the kernel would give up) of every group around this process that has a
    limit."""
    for folder, version in _groups():
        try:
            limit = (folder / version.limit).read_text().strip()
            if limit.isdecimal():  # else "max"
                rows = (line.split() for line in (folder / "memory.stat").read_text().splitlines())
                cached = sum(int(value) for name, value in rows if name in version.cached)
                yield int(limit), max(0, int((folder / version.current).read_text()) - cached)
        except (OSError, ValueError):
            continue


def _groups() -> Iterator[tuple[Path, _Version]]:
    """Folders of the groups this process is in, innermost first.

    A container may see the names its host gives to groups, while only its own is mounted: what does not exist
    is skipped, the mounted root is always among them.
    """
    try:
        lines = OWN.read_text().splitlines()
    except OSError:
        lines = []
    own = {_ONE: "/", _TWO: "/"}
    for line in lines:
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            own[_ONE] = path
        elif number == "0" and not controllers:
            own[_TWO] = path
    for version, path in own.items():
        root = MOUNTED / version.folder
        inner = root / path.lstrip("/")
        for folder in (inner, *inner.parents):
            yield folder, version
            if folder == root:
                break
