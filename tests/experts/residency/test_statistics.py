"""Counters as plain numbers."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest

from moesmith.experts.residency import statistics
from moesmith.experts.residency.statistics import Counters


@dataclass
class Told:
    """A ticket that knows its times."""

    nbytes: int
    busy: float | None = None
    ahead: float | None = None

    def seconds(self):
        return self.busy

    def lead(self):
        return self.ahead


def test_nothing_counted_is_zeros_and_nones():
    record = Counters("memcpy", ["a"]).report()
    assert record["bytes"] == record["seconds"] == record["hits"] == 0
    assert record["bandwidth"] is record["hit_rate"] is record["bytes_per_token"] is None
    assert json.loads(json.dumps(record)) == record
    assert "in_memory" not in record


def test_sums_ratios_stalls_and_slack():
    counters = Counters("memcpy", ["a", "b"])
    counters.fetched(0, Told(100, 0.5, 0.2))
    counters.fetched(1, Told(300, 1.5, -0.3))
    counters.asked(0, 3, 1)
    counters.predicted(1, {1, 2, 3}, [2, 3, 4])
    counters.tokens += 4
    record = counters.report()
    assert (record["bytes"], record["seconds"], record["bandwidth"]) == (400, 2.0, 200.0)
    assert (record["hit_rate"], record["bytes_per_token"], record["fetches"]) == (0.75, 100.0, 2)
    assert (record["stall_s"], record["slack_s"]) == (0.3, 0.2)
    assert (record["predicted"], record["predicted_right"]) == (3, 2)
    assert record["layers"][0] == {
        "layer": "a", "bytes": 100, "fetches": 1, "hits": 3, "misses": 1, "stall_s": 0.0, "slack_s": 0.2,
        "predicted": 0, "predicted_right": 0,
    }  # fmt: skip
    assert counters.report() == record  # asked twice, counted once


def test_times_that_come_later_are_counted_then():
    counters, ticket = Counters("memcpy", ["a"]), Told(10)
    counters.fetched(0, ticket)
    assert counters.report()["seconds"] == 0
    ticket.busy = 2.0
    assert counters.report()["seconds"] == 2 and counters.report()["seconds"] == 2
    ticket.ahead = 1.0
    record = counters.report()
    assert (record["seconds"], record["slack_s"]) == (2, 1)


def test_open_tickets_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(statistics, "PENDING", 3)
    counters = Counters("memcpy", ["a"])
    for _ in range(10):
        counters.fetched(0, Told(1, 1.0, None))
    assert len(counters._open) == 3
    assert counters.report()["seconds"] == pytest.approx(10)
