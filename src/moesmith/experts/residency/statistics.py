"""What moved, and who waited for it: the counters of a residency as plain numbers.

Off until someone asks for them; then a few additions per layer. Times are read from the link's tickets
afterwards, so nothing is synchronised for them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .link import Ticket

PENDING = 4096  # tickets whose times are still open; older ones are read as they are


@dataclass
class LayerCounters:
    """Of one MoE layer."""

    layer: str
    bytes: int = 0
    """Brought to the device (mapped: read by the computation)."""
    fetches: int = 0
    """Transfers started, each of one or more experts."""
    hits: int = 0
    """Experts asked for that were there, or on their way."""
    misses: int = 0
    stall_s: float = 0.0
    """Time the computation waited for this layer's experts."""
    slack_s: float = 0.0
    """Time they were there before they were wanted."""
    predicted: int = 0
    predicted_right: int = 0


class Counters:
    """Sums per layer since they were made."""

    def __init__(self, link: str, names: Sequence[str]):
        self.link = link
        self.layers = [LayerCounters(name) for name in names]
        self.seconds = 0.0
        self.tokens = 0
        self.in_memory: int | None = None
        """Of the bytes: those that were in the page cache already (mapped only)."""
        self._open: deque[tuple[LayerCounters, Ticket]] = deque()

    def asked(self, layer: int, hits: int, misses: int) -> None:
        """One call's experts of a layer."""
        counters = self.layers[layer]
        counters.hits += hits
        counters.misses += misses

    def predicted(self, layer: int, expected: set[int], asked: Sequence[int]) -> None:
        """What was expected of a call, and what it asked for."""
        counters = self.layers[layer]
        counters.predicted += len(expected)
        counters.predicted_right += len(expected.intersection(asked))

    def fetched(self, layer: int, ticket: Ticket) -> None:
        """A transfer was started."""
        counters = self.layers[layer]
        counters.bytes += ticket.nbytes
        counters.fetches += 1
        self._open.append((counters, ticket))
        if len(self._open) > PENDING:
            self._read(*self._open.popleft())

    def touched(self, layer: int, nbytes: int, in_memory: int, seconds: float) -> None:
        """Mapped experts were computed with; `seconds` went into asking for them."""
        counters = self.layers[layer]
        counters.bytes += nbytes
        counters.fetches += 1
        counters.stall_s += seconds
        self.in_memory = (self.in_memory or 0) + in_memory

    def _read(self, counters: LayerCounters, ticket: Ticket) -> None:
        self.seconds += ticket.seconds() or 0.0
        lead = ticket.lead() or 0.0
        counters.stall_s += max(0.0, -lead)
        counters.slack_s += max(0.0, lead)

    def report(self) -> dict[str, Any]:
        """Plain numbers: sums, ratios (None without what they divide by), and one record per layer.

        `bandwidth` is bytes per second while the link was busy; `bytes_per_token` is None when no tokens
        were counted.
        """
        for _ in range(len(self._open)):
            counters, ticket = self._open.popleft()
            if ticket.seconds() is None or ticket.lead() is None:
                self._open.append((counters, ticket))  # under way, or not asked for yet
            else:
                self._read(counters, ticket)
        still = sum(ticket.seconds() or 0.0 for _, ticket in self._open)

        def total(name: str) -> Any:
            return sum(getattr(counters, name) for counters in self.layers)

        nbytes, hits, misses, seconds = total("bytes"), total("hits"), total("misses"), self.seconds + still
        record = {
            "link": self.link,
            "layers": [vars(counters).copy() for counters in self.layers],
            "bytes": nbytes,
            "seconds": seconds,
            "bandwidth": _ratio(nbytes, seconds),
            "fetches": total("fetches"),
            "hits": hits,
            "misses": misses,
            "hit_rate": _ratio(hits, hits + misses),
            "stall_s": total("stall_s"),
            "slack_s": total("slack_s"),
            "predicted": total("predicted"),
            "predicted_right": total("predicted_right"),
            "tokens": self.tokens,
            "bytes_per_token": _ratio(nbytes, self.tokens),
        }
        if self.in_memory is not None:
            record["in_memory"] = _ratio(self.in_memory, nbytes)
        return record


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
