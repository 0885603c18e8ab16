"""Peak memory of a stretch of work: what it took from the device, or from RAM as anonymous memory.

Anonymous memory is what cannot be dropped and read again from a file; a memory-mapped checkpoint does not
count.
"""

from __future__ import annotations

import ctypes
import gc
import sys
import threading
from pathlib import Path
from types import TracebackType

_STATUS = Path("/proc/self/status")


class PeakMemory:
    """`with PeakMemory() as peak: ...`, then `peak.nbytes`. RAM is sampled every 20 ms.

    Without Linux's /proc the whole resident set stands in for anonymous memory.
    """

    def __init__(self) -> None:
        self.ram = 0
        self.start = 0
        self.device: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        import torch

        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.ram = self.start = anonymous_memory()
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        import torch

        self._done.set()
        self._thread.join()
        self.ram = max(self.ram, anonymous_memory())
        if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
            self.device = torch.cuda.max_memory_allocated()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.ram = max(self.ram, anonymous_memory())

    @property
    def nbytes(self) -> int:
        """Peak bytes on the device if one was used, else of RAM."""
        return self.ram if self.device is None else self.device


def anonymous_memory() -> int:
    """Bytes of anonymous memory this process holds now."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    import psutil  # type: ignore[import-untyped]

    return psutil.Process().memory_info().rss


def give_back() -> None:
    """Return memory that nothing uses to the system.

    The C library keeps what it has freed: after three training steps of a 135M model that was 1.0 of 1.5 GB,
    and the next phase of the same process took its own on top.
    """
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl has not
        if trim is not None:
            trim(0)
