"""What was fetched while a model answered: of the last answer, of all of them, as a page.

Counters only grow (`Residency.statistics()`), so an answer's figures are the difference of two readings: from
its first token on, since reading a prompt goes through nearly all experts whatever is cached. Of several
conversations at once (`serve`) there are figures of all together only.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console

if TYPE_CHECKING:
    from moesmith.jobs._experts_place import Place

SUMS = ("bytes", "fetches", "hits", "misses", "stall_s", "slack_s", "predicted", "predicted_right")
# What /metrics says of all layers together: key, its name there, help.
COUNTED = (
    ("bytes", "expert_bytes_total", "Bytes of experts that were fetched"),
    ("fetches", "expert_fetches_total", "Experts that were fetched"),
    ("hits", "expert_hits_total", "Experts asked for that were on the device"),
    ("misses", "expert_misses_total", "Experts asked for that were not"),
    ("stall_s", "expert_stall_seconds_total", "Seconds that computing waited for experts"),
    ("seconds", "expert_link_seconds_total", "Seconds that the link was busy"),
)


class Transfers:
    """Readings of one lender's counters.

    Args:
        lender: `Residency` or `Mapped`, counting.
        experts_bytes: of all experts whose home is not the device.
        link_bandwidth: bytes a second that the link gives alone; None if it was not measured.
    """

    def __init__(self, lender: Any, experts_bytes: int | None = None, link_bandwidth: float | None = None):
        self.lender = lender
        known = {"experts_bytes": experts_bytes, "link_bandwidth": link_bandwidth}
        self.known = {key: value for key, value in known.items() if value is not None}
        self.last: dict[str, Any] | None = None
        self._prompts: list[dict[str, Any]] = []
        self._busy = 0.0
        self._mark, self._since = lender.statistics(), time.perf_counter()

    def begin(self) -> None:
        """A prompt is going to be read."""
        self._mark, self._since = self.lender.statistics(), time.perf_counter()

    def first(self) -> None:
        """It has been read: the first token of the answer is there."""
        self._prompts.append(self._until_now())
        self.begin()

    def end(self) -> dict[str, Any]:
        """The answer has ended: what its tokens took, and `prompt`, what reading took."""
        self.last = self._until_now()
        self._busy += self.last["elapsed"]
        if self._prompts:
            self.last["prompt"] = _brief(self._prompts[-1:])
        return self.last

    def all(self) -> dict[str, Any]:
        """Everything since the model was loaded, prompts apart where they are known."""
        found = self.lender.statistics()
        for prompt in self._prompts:
            found = difference(found, prompt)
        found |= self.known | ({"elapsed": self._busy} if self._busy else {})
        return found | ({"prompt": _brief(self._prompts)} if self._prompts else {})

    def _until_now(self) -> dict[str, Any]:
        found = difference(self.lender.statistics(), self._mark)
        return found | self.known | {"elapsed": time.perf_counter() - self._since}

    def totals(self) -> list[tuple[str, str, float]]:
        """(name, help, value) of counters for /metrics."""
        found = self.lender.statistics()
        return [(name, about, float(found.get(key) or 0)) for key, name, about in COUNTED]


def _brief(prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {key: sum(one.get(key) or 0 for one in prompts) for key in ("bytes", "tokens", "elapsed")}


def watch(lender: Any, model: Any, place: Place, on_gpu: bool) -> Transfers | None:
    """`Transfers` of what `put_experts` returned for this model; None for None."""
    if lender is None:
        return None
    from moesmith.experts.residency.attach import packed_experts, stacks
    from moesmith.plan.machine import known

    modules = [module for _, module in packed_experts(model)]
    homes = (place.homes,) * len(modules) if isinstance(place.homes, str) else place.homes
    away = [module for module, home in zip(modules, homes, strict=True) if home != "device"]
    nbytes = sum(stack_bytes(stack) for module in away for stack in stacks(module).values())
    machine = known(on_gpu)
    own = machine.disk if "disk" in homes else machine.link
    return Transfers(lender, nbytes, own if machine.measured else None)


def stack_bytes(stack: Any) -> int:
    """Bytes of a packed stack, scales included."""
    parts = (stack.codes, stack.absmax, stack.scale, stack.offset)
    return sum(part.nbytes for part in parts if part is not None)


def difference(after: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Figures of what happened between two readings; rates are made anew."""
    earlier = {row["layer"]: row for row in before.get("layers") or []}
    rows = []
    for row in after.get("layers") or []:
        old = earlier.get(row["layer"], {})
        rows.append(row | {key: row[key] - old.get(key, 0) for key in SUMS if key in row})
    found = after | {"layers": rows}
    for key in (*SUMS, "seconds", "tokens"):
        if after.get(key) is not None:
            found[key] = after[key] - (before.get(key) or 0)
    nbytes, hits, misses = (found.get(key) or 0 for key in ("bytes", "hits", "misses"))
    found["bandwidth"] = _ratio(nbytes, found.get("seconds"))
    found["bytes_per_token"] = _ratio(nbytes, found.get("tokens"))
    found["hit_rate"] = _ratio(hits, hits + misses)
    if "in_memory" in after:  # a share of the bytes
        there = [(one.get("in_memory") or 0) * (one.get("bytes") or 0) for one in (after, before)]
        found["in_memory"] = _ratio(there[0] - there[1], nbytes)
    return found


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


def say(facts: dict[str, Any]) -> None:
    """The figures of one answer, on stderr."""
    from moesmith.report.transfers import verdict, waited

    if not facts:
        console.note("nothing was counted")
        return
    found = verdict(facts)
    for line in (found.get("sentence"), *found.get("points", [])):
        if line:
            console.note(line)
    rows = facts.get("layers") or []
    slow = sorted(rows, key=lambda row: -(row.get("stall_s") or 0))[:3]
    longest = (slow[0].get("stall_s") or 0) if slow else 0
    if waited(facts) and longest:
        there = [row for row in slow if (row.get("stall_s") or 0) > longest / 10]
        words = (f"{row['layer']} ({console.duration(row['stall_s'])})" for row in there)
        console.note(f"waited longest at {', '.join(words)}")


def page(folder: Path, facts: dict[str, Any], title: str, command: str, **how: Any) -> Path:
    """Write the page of a session's transfers into `folder`; returns its path."""
    import sys

    from moesmith import __version__
    from moesmith.report import write_report
    from moesmith.report.transfers import verdict

    written = write_report(
        folder,
        {
            "title": f"Transfers of {title}",
            "verdict": verdict(facts),
            "transfers": facts,
            "how": {
                "command": command,
                **{key: value for key, value in how.items() if value is not None},
                "versions": {"moesmith": __version__, "python": sys.version.split()[0]},
            },
        },
    )
    console.note(f"transfers: {written}")
    return written
