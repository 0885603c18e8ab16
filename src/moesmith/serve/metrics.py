"""Counters and histograms in Prometheus' text format. Used in the event loop's thread only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # seconds

COUNTERS = {
    "requests_total": "HTTP requests by route and status",
    "prompt_tokens_total": "Tokens of prompts",
    "generated_tokens_total": "Tokens of answers",
    "answers_total": "Answers by model and how they ended",
}
HISTOGRAMS = {
    "first_token_seconds": "From the request to its first token",
    "answer_seconds": "From the request to the end of its answer",
    "token_seconds": "Between two tokens of an answer, the mean of each answer",
}


class Metrics:
    """What happened since the start."""

    def __init__(self) -> None:
        self.counts: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        self.seen: dict[str, list[float]] = {name: [0.0] * (len(BUCKETS) + 2) for name in HISTOGRAMS}
        self.also: Callable[[], list[tuple[str, str, float]]] = list
        """(name, help, value) of counters that are kept elsewhere (experts that are fetched)"""

    def add(self, name: str, n: float = 1, **labels: str) -> None:
        """Count something."""
        assert name in COUNTERS
        self.counts[name, tuple(sorted(labels.items()))] += n

    def observe(self, name: str, seconds: float) -> None:
        """One more duration: counted per bucket, then all, then their sum."""
        row = self.seen[name]
        for place, limit in enumerate(BUCKETS):
            row[place] += seconds <= limit
        row[-2] += 1
        row[-1] += seconds

    def text(self, gauges: Iterable[tuple[str, str, float]]) -> str:
        """Everything, with (name, help, value) of what is measured now."""
        lines = []
        for name, about in COUNTERS.items():
            lines += [f"# HELP moesmith_{name} {about}", f"# TYPE moesmith_{name} counter"]
            rows = [(labels, value) for (which, labels), value in self.counts.items() if which == name]
            lines += [f"moesmith_{name}{_labels(labels)} {value:g}" for labels, value in sorted(rows)]
        for name, about in HISTOGRAMS.items():
            row = self.seen[name]
            lines += [f"# HELP moesmith_{name} {about}", f"# TYPE moesmith_{name} histogram"]
            for limit, value in zip([*BUCKETS, "+Inf"], row[:-1], strict=True):
                lines.append(f'moesmith_{name}_bucket{{le="{limit}"}} {value:g}')
            lines += [f"moesmith_{name}_sum {row[-1]:.6f}", f"moesmith_{name}_count {row[-2]:g}"]
        for name, about, value in self.also():
            lines += [f"# HELP moesmith_{name} {about}", f"# TYPE moesmith_{name} counter"]
            lines.append(f"moesmith_{name} {value!r}")
        for name, about, value in gauges:
            lines += [f"# HELP moesmith_{name} {about}", f"# TYPE moesmith_{name} gauge"]
            lines.append(f"moesmith_{name} {value!r}")
        return "\n".join(lines) + "\n"


def _labels(labels: tuple[tuple[str, str], ...]) -> str:
    if not labels:
        return ""
    escaped = (
        (key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for key, value in labels
    )
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped) + "}"
