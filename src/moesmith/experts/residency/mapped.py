"""Mapped: experts on disk, computed with where they are mapped, on a CPU.

The same methods as `pool.Residency`, but nothing is copied: the page cache is the cache. Experts asked for
are read ahead all at once (madvise WILLNEED) instead of page by page, and so are the next layer's, in the
order of `policy.Course`. An expert whose first, middle and last pages are in memory is not asked for.
"""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ...ops.stack import PackedStack
from . import pages
from .arena import Homes, tensors_of
from .policy import Course, Policy
from .statistics import Counters

WARM = 64  # lends that found everything in memory: from then on only every PROBE-th looks
PROBE = 17  # no divisor of a number of layers, so that every layer has its turn

Span = tuple[int, int]
"""Address and number of bytes."""
_Requests = queue.SimpleQueue[list[Span] | None]


class Mapped:
    """Lends mapped experts as they are."""

    def __init__(self, homes: Homes, policy: Policy, statistics: bool = False):
        """Raises UserError for a policy that does not fit. Layers that are not memory-mapped are fine: there
        is nothing to read for them."""
        policy.check(len(homes))
        self.homes, self.policy, self.device = homes, policy, torch.device("cpu")
        self._stacks = [dict(stacks) for stacks in homes.values()]
        self._experts = [next(iter(stacks.values())).shape[0] for stacks in self._stacks]
        self._bases, paths = _mapped_tensors(self._stacks)
        # where mincore tells us nothing, the kernel is asked for everything, warm or not
        self._ask = _ask_for_cold if pages.tells_residency(paths) else _ask_for_all
        self._course = Course([layer for layer, bases in enumerate(self._bases) if bases])
        self._expected: dict[int, set[int]] = {}
        self._ahead: int | None = None
        self._lends = self._warm = 0
        self._counters: Counters | None = None
        self._requests: _Requests = queue.SimpleQueue()
        thread = threading.Thread(target=_read_ahead, args=(self._requests, self._ask), daemon=True)
        thread.start()
        self._stop = weakref.finalize(self, _stop, self._requests, thread)
        if statistics:
            self.reset_statistics()

    @contextmanager
    def lend(
        self, layer: int, experts: Sequence[int], rows: int, training: bool, tokens: int | None = None
    ) -> Iterator[dict[str, PackedStack]]:
        """The layer's stacks, whole; reading of these experts has begun, and of the next layer's if this call
        wants many."""
        if layer in self._course.place:
            start = time.perf_counter()
            spans = self._spans(layer, experts)
            there = None if self._counters is None else _experts_in_memory(spans, len(experts))
            self._lends += 1
            if self._looks():
                self._warm = self._warm + 1 if self._ask(spans) else 0
            expected = self._expected.pop(layer, None)
            self._course.reach(layer, training)
            many = training or 2 * len(experts) >= self._experts[layer]
            if self.policy.prefetch and many and self._warm < WARM:
                self._read_next()
            if self._counters is not None and there is not None:
                self._count(layer, experts, spans, there, expected, start)
                if layer == self._course.layers[0] and self._course.up:
                    self._counters.tokens += rows if tokens is None else tokens
        yield self._stacks[layer]

    @contextmanager
    def again(self, layer: int, experts: Sequence[int] | None = None) -> Iterator[dict[str, PackedStack]]:
        """The layer's stacks, whole."""
        yield self._stacks[layer]

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """Begin reading these experts, in a thread."""
        if self.policy.prefetch and layer in self._course.place:
            self._expected[layer] = {int(e) for e in experts}
            self._requests.put(self._spans(layer, experts))

    def wants_prediction(self, layer: int) -> bool:
        """Whether `expect` for this layer would be of use: not while everything is in memory."""
        return self.policy.prefetch and layer in self._course.place and self._looks()

    def _looks(self) -> bool:
        """Whether this is a call that looks what is in memory: 200 us for 8 experts."""
        return self._warm < WARM or self._lends % PROBE == 0

    def there(self, layer: int, experts: Iterable[int] | None = None) -> list[int]:
        """All of them."""
        return list(range(self._experts[layer]) if experts is None else experts)

    def at_home(self, layer: int) -> Mapping[str, PackedStack]:
        """The layer's stacks, whole."""
        return self._stacks[layer]

    def _read_next(self) -> None:
        """Begin reading the layer that comes after this one, whole, once."""
        upcoming = self._course.upcoming()
        next(upcoming)
        layer = next(upcoming, None)
        if layer is not None and layer != self._ahead:
            self._requests.put(self._spans(layer, range(self._experts[layer])))
        self._ahead = layer

    def _spans(self, layer: int, experts: Sequence[int]) -> list[Span]:
        """Where these experts lie, expert by expert."""
        return [(address + e * each, each) for e in experts for address, each in self._bases[layer]]

    def _count(
        self,
        layer: int,
        experts: Sequence[int],
        spans: list[Span],
        there: list[int],
        expected: set[int] | None,
        start: float,
    ) -> None:
        assert self._counters is not None, "counting"
        whole = sum(nbytes for _, nbytes in spans) // max(len(experts), 1)
        hits = sum(nbytes == whole for nbytes in there)
        self._counters.asked(layer, hits, len(experts) - hits)
        if expected is not None:
            self._counters.predicted(layer, expected, experts)
        self._counters.touched(layer, whole * len(experts), sum(there), time.perf_counter() - start)

    def statistics(self) -> dict[str, Any]:
        """As `pool.Residency.statistics`. Bytes are those computed with; `in_memory` is the share of them
        that was in the page cache when asked for, a hit an expert that was there whole, and stalls are the
        time that asking took: page faults happen inside the computation."""
        return {} if self._counters is None else self._counters.report()

    def reset_statistics(self) -> None:
        """Count from zero; switches counting on."""
        self._counters = Counters("mapped file", list(self.homes))

    def __deepcopy__(self, memo: dict[int, Any]) -> Mapped:
        return self  # a copied model computes with the same frozen experts

    def close(self) -> None:
        """End the reading thread. Twice is fine."""
        self._stop()


def _mapped_tensors(layers: Sequence[Mapping[str, PackedStack]]) -> tuple[list[list[Span]], list[str]]:
    """Per layer: address and bytes per expert of every tensor that lies in a file; and those files."""
    files, paths = pages.MappedFiles(), set()
    found: list[list[Span]] = []
    for stacks in layers:
        found.append([])
        for _, _, tensor in tensors_of(stacks):
            region = files.region(tensor)
            if region is not None:
                paths.add(region.path)
                found[-1].append((tensor.data_ptr(), tensor[:1].numel() * tensor.element_size()))
    return found, sorted(paths)


def _ask_for_cold(spans: list[Span]) -> bool:
    """Begin reading what seems not to be in memory; whether all was."""
    cold = [(address, nbytes) for address, nbytes in spans if not pages.seems_in_memory(address, nbytes)]
    _ask_for_all(cold)
    return not cold


def _ask_for_all(spans: list[Span]) -> bool:
    for address, nbytes in spans:
        pages.will_need(address, nbytes)
    return False


def _experts_in_memory(spans: list[Span], experts: int) -> list[int]:
    """Bytes in memory per expert."""
    parts = len(spans) // max(experts, 1)
    there = [pages.bytes_in_memory(address, nbytes) for address, nbytes in spans]
    return [sum(there[i * parts : (i + 1) * parts]) for i in range(experts)]


def _read_ahead(requests: _Requests, ask: Callable[[list[Span]], bool]) -> None:
    """The reading thread: madvise itself waits while a disk's queue is full."""
    while (spans := requests.get()) is not None:
        ask(spans)


def _stop(requests: _Requests, thread: threading.Thread) -> None:
    requests.put(None)
    if thread is not threading.current_thread():
        thread.join()
