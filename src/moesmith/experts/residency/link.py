"""Link: how the bytes of experts get to the device.

A link carries copies out beside the computation, in the order they were started. It knows nothing of layers
or of what is wanted next; `pool` decides that. `CudaLink` is for a GPU, `CpuLink` is its twin on a CPU (a
worker thread and memcpy: real asynchrony, same contract); tests bring their own with delays and faults.
Bytes of a memory-mapped checkpoint are read from the file, so a disk that fails is an error and no SIGBUS.

`CudaLink` has not been run on a GPU yet: unmeasured.
"""

from __future__ import annotations

import ctypes
import mmap
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...errors import UserError
from .pages import MappedFiles

PIECE = 8 << 20  # bytes carried between two looks at whether to stop; size of a bounce buffer
BOUNCE_BUFFERS = 3  # one is read into, one on its way to the device, one to spare


@dataclass(frozen=True)
class Copy:
    """One run of bytes to carry: `source` into `target`, of equal shape and dtype, both contiguous."""

    source: Tensor
    target: Tensor
    what: str = ""
    """For messages: "model.layers.3.mlp.experts, gate_up_proj, experts 0 to 7"."""
    disk: bool = False
    """The source is memory-mapped: it is read from its file, not touched through the mapping."""

    @property
    def nbytes(self) -> int:
        return self.target.numel() * self.target.element_size()


class Ticket(Protocol):
    """Copies under way."""

    nbytes: int

    def seconds(self) -> float | None:
        """How long the link was busy with them; None if unknown (not arrived, or not timed)."""

    def lead(self) -> float | None:
        """Seconds from their arrival to the first wait for them: above zero is slack, below a stall."""


class Link(Protocol):
    """What carries copies to one device. One computing thread (or stream) uses it."""

    name: str
    """For people: "memcpy", "pinned copies to cuda:0"."""
    device: torch.device
    """Of the targets."""
    pins: bool
    """`pinned` takes new memory."""
    timed: bool
    """Tickets shall know their seconds and lead."""

    def pinned(self, tensor: Tensor) -> Tensor:
        """The tensor as a home in RAM: itself on a CPU, a page-locked copy for a GPU."""

    def start(self, copies: Sequence[Copy], after: Any = None) -> Any:
        """Begin, behind all that was started before and behind `after`, a mark of `release`: a Ticket, at
        once."""

    def wait(self, ticket: Any) -> None:
        """What is computed from now on comes after these copies. UserError, naming the copy, if one
        failed."""

    def release(self) -> Any:
        """A mark behind everything computed so far, for a later `start` that overwrites what that read."""

    def close(self) -> None:
        """Drop what has not begun, end the copy under way and the threads. Twice is fine."""


class _Worker:
    """A thread that does tickets' work in order, one piece after the other, and can be stopped."""

    def __init__(self, name: str) -> None:
        self.stopping = threading.Event()
        self._lock = threading.Lock()
        self.queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._run, name=name, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (work := self.queue.get()) is not None:
            work()

    def put(self, work: Callable[[], None]) -> None:
        """Queue work that is sure to be done. RuntimeError if the thread has been told to end."""
        with self._lock:
            if self.stopping.is_set():
                raise RuntimeError("the experts' link is closed")
            self.queue.put(work)

    def stop(self) -> None:
        """Ends after the piece under way; what is in the queue runs too and sees `stopping`."""
        with self._lock:
            self.stopping.set()
            self.queue.put(None)
        if threading.current_thread() is not self.thread:
            self.thread.join()


def _failed(copy: Copy, error: Exception, files: MappedFiles) -> UserError:
    """One error for a copy that did not arrive, with layer and file."""
    region = files.region(copy.source) if copy.source.device.type == "cpu" else None
    place = f" from {region.path}" if region is not None else ""
    return UserError(
        f"{copy.what}: {copy.nbytes:,} bytes could not be brought{place} to {copy.target.device}: {error}",
        "the disk or the file is at fault: moesmith inspect FOLDER --verify checks it" if place else None,
    )


# ---------------------------------------------------------------- CPU


class CpuTicket:
    """Copies of a `CpuLink`."""

    def __init__(self, copies: Sequence[Copy]):
        self.copies = list(copies)
        self.nbytes = sum(copy.nbytes for copy in copies)
        self.done = threading.Event()
        self.error: UserError | None = None
        self.began = self.arrived = self.wanted = 0.0

    def seconds(self) -> float | None:
        return self.arrived - self.began if self.arrived else None

    def lead(self) -> float | None:
        return self.wanted - self.arrived if self.wanted and self.arrived else None


class CpuLink:
    """A thread that copies from one place in RAM, or from a file, to another."""

    def __init__(self) -> None:
        self.name = "memcpy"
        self.device = torch.device("cpu")
        self.pins = False
        self.timed = False  # two clock readings per ticket: always on
        self.files = MappedFiles()
        self._worker = _Worker("moesmith-link")
        # at the interpreter's end the thread stops before the memory it writes to goes
        self._stop = weakref.finalize(self, _Worker.stop, self._worker)

    def pinned(self, tensor: Tensor) -> Tensor:
        return tensor

    def start(self, copies: Sequence[Copy], after: Any = None) -> CpuTicket:
        # `after` is past already: on a CPU what was computed is done
        ticket = CpuTicket(copies)
        worker, files = self._worker, self.files
        worker.put(lambda: _carry(ticket, files, worker.stopping))
        return ticket

    def wait(self, ticket: CpuTicket) -> None:
        if not ticket.wanted:
            ticket.wanted = time.perf_counter()
        ticket.done.wait()
        if ticket.error is not None:
            raise ticket.error

    def release(self) -> None:
        return None

    def close(self) -> None:
        self._stop()
        self.files.close()


def _carry(ticket: CpuTicket, files: MappedFiles, stopping: threading.Event) -> None:
    """All copies of a ticket; a failure ends up in the ticket, for the one who waits."""
    ticket.began = time.perf_counter()
    for copy in ticket.copies:
        try:
            _carry_one(copy, files, stopping)
        except UserError as error:
            ticket.error = error
        except Exception as error:
            ticket.error = _failed(copy, error, files)
        if ticket.error is not None:
            break
    ticket.copies = []  # what they refer to may go
    ticket.arrived = time.perf_counter()
    ticket.done.set()


def _carry_one(copy: Copy, files: MappedFiles, stopping: threading.Event) -> None:
    place = files.place(copy.source) if copy.disk else None
    to, source = copy.target.data_ptr(), copy.source.data_ptr()
    for start in range(0, copy.nbytes, PIECE):
        if stopping.is_set():
            raise UserError(f"{copy.what}: the experts' link was closed before they arrived")
        count = min(PIECE, copy.nbytes - start)
        if place is None:
            ctypes.memmove(to + start, source + start, count)  # without the interpreter's lock
        else:
            files.read(place[0], place[1] + start, _memory(to + start, count))


def _memory(address: int, nbytes: int) -> memoryview:
    """Bytes at an address, to be written."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


# ---------------------------------------------------------------- CUDA (unmeasured)


class CudaTicket:
    """Copies of a `CudaLink`: events on its stream."""

    def __init__(self, copies: Sequence[Copy], timed: bool):
        self.copies = list(copies)
        self.nbytes = sum(copy.nbytes for copy in copies)
        self.timed = timed
        self.began = torch.cuda.Event(enable_timing=True) if timed else None
        self.arrived = torch.cuda.Event(enable_timing=timed)
        self.wanted: torch.cuda.Event | None = None
        self.submitted = threading.Event()
        """All its copies are in the stream: `arrived` means something from here on."""
        self.error: UserError | None = None

    def seconds(self) -> float | None:
        return _between(self.began, self.arrived) if self.submitted.is_set() else None

    def lead(self) -> float | None:
        return _between(self.arrived, self.wanted) if self.submitted.is_set() else None


def _between(first: torch.cuda.Event | None, second: torch.cuda.Event | None) -> float | None:
    """Seconds from one event to the other; None while one is not there yet."""
    if first is None or second is None or not first.query() or not second.query():
        return None
    return first.elapsed_time(second) / 1000


class CudaLink:
    """Copies on a stream of its own: from page-locked RAM, or from a file through page-locked bounce buffers
    that a thread reads into.

    Order: everything started goes to one stream, one ticket after the other, also when some come from RAM
    and some from files; so a place that is overwritten twice ends up with what was started last. The arena
    that copies write to is allocated once, before the first copy. `close` waits for the last one; for a
    model that is dropped without it, `record_stream` keeps the arena from going to others before that.
    Reading after arrival and overwriting after use are events: `wait` and `release`.
    """

    def __init__(self, device: torch.device | str | int):
        self.device = torch.device(device)
        if self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = f"pinned copies to {self.device}"
        self.pins = True
        self.timed = False
        self.stream = torch.cuda.Stream(self.device)
        self.files = MappedFiles()
        self._reader: _Worker | None = None
        self._reading = 0  # tickets in the reader's queue
        self._lock = threading.Lock()
        self._bounce: list[tuple[Tensor, torch.cuda.Event]] = []
        self._locked: list[Tensor] = []
        self._stop: Callable[[], object] = lambda: None
        self._unlock = weakref.finalize(self, _unlock, self.stream, self._locked)

    def pinned(self, tensor: Tensor) -> Tensor:
        """A page-locked copy. cudaHostRegister on memory of our own: the caching host allocator behind
        `pin_memory` rounds every tensor up to a power of two."""
        nbytes = tensor.numel() * tensor.element_size()
        if nbytes < 1 << 20:
            return tensor.pin_memory()
        memory = torch.frombuffer(mmap.mmap(-1, nbytes), dtype=torch.uint8)
        home = memory.view(tensor.dtype).view(tensor.shape)
        home.copy_(tensor)
        error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), nbytes, 0)
        if int(error):
            raise UserError(
                f"{nbytes:,} bytes of experts could not be page-locked in RAM (CUDA error {int(error)})",
                "experts.home: disk needs no page-locked memory; or raise the limit (ulimit -l)",
            )
        self._locked.append(memory)
        return home

    def start(self, copies: Sequence[Copy], after: torch.cuda.Event | None = None) -> CudaTicket:
        if not self._unlock.alive:
            raise RuntimeError("the experts' link is closed")
        ticket = CudaTicket(copies, self.timed)
        with self._lock:
            direct = self._reading == 0 and not any(copy.disk for copy in copies)
            if not direct:
                self._reading += 1
        if direct:
            self._submit(ticket, after)
            return ticket
        if self._reader is None:
            self._reader = _Worker("moesmith-link")
            self._stop = weakref.finalize(self, _Worker.stop, self._reader)
        reference = weakref.ref(self)  # the thread must not keep the link alive

        def submit() -> None:
            link = reference()
            if link is not None:
                link._submit_queued(ticket, after)

        self._reader.put(submit)
        return ticket

    def _submit_queued(self, ticket: CudaTicket, after: torch.cuda.Event | None) -> None:
        try:
            self._submit(ticket, after)
        except Exception as error:  # the device itself refused: who waits must not wait for ever
            ticket.error = UserError(f"experts could not be brought to {self.device}: {error}")
            ticket.submitted.set()
        finally:
            with self._lock:
                self._reading -= 1

    def _submit(self, ticket: CudaTicket, after: torch.cuda.Event | None) -> None:
        """Put a ticket's copies into the stream."""
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)  # not before what they overwrite has been used
            if ticket.began is not None:
                ticket.began.record(self.stream)
            for copy in ticket.copies:
                try:
                    self._submit_one(copy)
                except UserError as error:
                    ticket.error = error
                except Exception as error:
                    ticket.error = _failed(copy, error, self.files)
                if ticket.error is not None:
                    break
            ticket.arrived.record(self.stream)
        ticket.copies = []
        ticket.submitted.set()

    def _submit_one(self, copy: Copy) -> None:
        if copy.target.is_cuda:
            copy.target.record_stream(self.stream)
        place = self.files.place(copy.source) if copy.disk else None
        if place is None and not copy.disk:
            copy.target.copy_(copy.source, non_blocking=True)
            return
        target = copy.target.view(-1).view(torch.uint8)
        source = None if place is not None else copy.source.view(-1).view(torch.uint8)
        for start in range(0, copy.nbytes, PIECE):
            if self._reader is not None and self._reader.stopping.is_set():
                raise UserError(f"{copy.what}: the experts' link was closed before they arrived")
            count = min(PIECE, copy.nbytes - start)
            buffer, used = self._next_bounce()
            used.synchronize()  # its last piece has left for the device
            if place is None:
                assert source is not None
                buffer[:count].copy_(source[start : start + count])
            else:
                self.files.read(place[0], place[1] + start, _memory(buffer.data_ptr(), count))
            target[start : start + count].copy_(buffer[:count], non_blocking=True)
            used.record(self.stream)

    def _next_bounce(self) -> tuple[Tensor, torch.cuda.Event]:
        """The bounce buffer used longest ago, and the event behind its last use."""
        if len(self._bounce) < BOUNCE_BUFFERS:
            buffer = torch.empty(PIECE, dtype=torch.uint8, pin_memory=True)
            self._bounce.append((buffer, torch.cuda.Event()))
        else:
            self._bounce.append(self._bounce.pop(0))
        return self._bounce[-1]

    def wait(self, ticket: CudaTicket) -> None:
        compute = torch.cuda.current_stream(self.device)
        if ticket.timed and ticket.wanted is None:
            ticket.wanted = torch.cuda.Event(enable_timing=True)
            ticket.wanted.record(compute)
        ticket.submitted.wait()  # from RAM: true already; from a file: once it is read
        if ticket.error is not None:
            raise ticket.error
        compute.wait_event(ticket.arrived)

    def release(self) -> torch.cuda.Event:
        mark = torch.cuda.Event()
        mark.record(torch.cuda.current_stream(self.device))
        return mark

    def close(self) -> None:
        self._stop()
        self._unlock()
        self._bounce = []
        self.files.close()


def _unlock(stream: torch.cuda.Stream, memories: list[Tensor]) -> None:
    """Page-locked memory must be given back after the last copy from it, and before it is freed."""
    stream.synchronize()
    while memories:
        torch.cuda.cudart().cudaHostUnregister(memories.pop().data_ptr())
