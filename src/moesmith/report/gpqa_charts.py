"""The picture of multiple choice: right answers by run and by way of reading, against guessing."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from .build_charts import label
from .theme import MARKERS, SERIES, WIDE, canvas, style
from .values import figure, mapping, pair, percent

READINGS = ("flexible", "strict", "lm-eval flexible", "lm-eval strict")


def readings(run: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(way of reading, score) of one run, those that have a share."""
    harness = mapping(run.get("harness"))
    scores = (run.get("flexible"), run.get("strict"), harness.get("flexible"), harness.get("strict"))
    found = [(name, mapping(one)) for name, one in zip(READINGS, scores, strict=True)]
    return [(name, one) for name, one in found if figure(one.get("rate")) is not None]


def score(runs: list[dict[str, Any]], palette: dict[str, str], size: tuple[int, int] = WIDE) -> Figure | None:
    """A row per run and reading: the share as a dot, its interval as a line, the figure beside it."""
    rows = [(str(run.get("name") or "run"), key, one) for run in runs for key, one in readings(run)]
    if not rows:
        return None
    wide = size[0] > 500
    chances = {1 / choices for run in runs if (choices := figure(run.get("choices")))}
    with style(palette):
        picture, axes = canvas((size[0], 70 + 30 * len(rows)))
        for chance in chances:
            axes.axvline(100 * chance, color=palette["muted"], linewidth=1, linestyle=(0, (4, 3)))
        for y, (_, key, one) in enumerate(rows):
            place = READINGS.index(key)
            colour = palette[SERIES[place]]
            rate = 100 * (figure(one.get("rate")) or 0)
            low, high = (100 * end for end in pair(one.get("interval")) or (rate / 100, rate / 100))
            axes.hlines(y, low, high, color=colour, linewidth=2.4, alpha=0.75)
            axes.plot([rate], [y], marker=MARKERS[place], markersize=7.5, color=colour, linestyle="none")
            axes.annotate(
                percent(rate / 100), (max(high, rate), y), xytext=(8, 0), textcoords="offset points",
                va="center", fontsize=10.5, color=palette["ink"],
            )  # fmt: skip
        several = len(runs) > 1
        names = [f"{label(name, 24 if wide else 10)} · {key}" if several else key for name, key, _ in rows]
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-2, 112 if wide else 130)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6 if wide else 3))
        axes.set_xticks([tick for tick in axes.get_xticks() if 0 <= tick <= 100])
        axes.tick_params(axis="both", length=0)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel("right answers, %")
    return picture
