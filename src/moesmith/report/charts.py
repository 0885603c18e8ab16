"""The report's pictures as matplotlib figures, drawn with a palette of `theme.py`.

No pyplot: nothing global is touched.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib.patches
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from .theme import MARKERS, POSTER, SERIES, SMALL, WIDE, canvas, style
from .values import figure, figures, items, mapping, pair, records

Point = tuple[float, float, tuple[float, float] | None]  # experts kept, value, its interval


@dataclass(frozen=True)
class Measure:
    """One way to look at a candidate: key in a point, words around it, the value of no change."""

    key: str
    name: str
    axis: str
    unchanged: float
    share: bool = False  # shown in percent


MEASURES = [
    Measure("kl", "KL, mean", "KL to the original, nats per token", 0.0),
    Measure("kl_p99", "KL, 99th percentile", "KL to the original, 99th percentile, nats", 0.0),
    Measure("top1", "top-1 agreement", "same most likely token, % of positions", 1.0, share=True),
    Measure("ppl_ratio", "perplexity", "perplexity, times the original", 1.0),
]


@dataclass(frozen=True)
class Line:
    """One line of a chart over layers."""

    label: str
    values: list[float | None]
    bounds: list[Any] | None = None  # [low, high] per layer
    bold: bool = False
    dashed: bool = False


def pareto(
    facts: dict[str, Any], measure: Measure, palette: dict[str, str], size: tuple[int, int] = WIDE
) -> Figure | None:
    """Experts kept against `measure`: a line per criterion, merging dashed, healed starred, random grey.

    None where no series has a figure of this measure.
    """
    lines = [(series, _points(series, measure.key)) for series in records(facts.get("series"))]
    lines = [(series, points) for series, points in lines if points]
    if not lines:
        return None
    factor = 100 if measure.share else 1
    heights = [point[1] for _, points in lines for point in points]
    log = not measure.share and wide_range(heights, 20 if measure.unchanged == 0 else 3)
    with style(palette):
        picture, axes = canvas(size)
        if log:
            axes.set_yscale("log")
            lines = [(series, [point for point in points if point[1] > 0]) for series, points in lines]
        if measure.key == "kl":
            _random_band(axes, facts, palette, log)
        for look, (series, points) in zip(
            _looks([series for series, _ in lines], palette), lines, strict=True
        ):
            if points:
                _series(axes, str(series.get("name", "?")), points, look, factor)
        experts = figure(facts.get("experts"))
        if experts and not log:
            axes.plot(
                [experts],
                [measure.unchanged * factor],
                "o",
                markersize=7,
                color=palette["ink"],
                markerfacecolor="none",
                label="original",
                zorder=5,
            )
        _experts_axis(
            axes, sorted({point[0] for _, points in lines for point in points}), experts, size[0] > 500
        )
        axes.set_ylabel(measure.axis)
        _plain_ticks(axes, log)
        if size[0] < 500:
            picture.legend(loc="outside lower left", ncols=2, handlelength=2.4, columnspacing=1.4)
        else:
            picture.legend(loc="outside right upper", handlelength=2.6, labelspacing=0.65)
    return picture


def lorenz(concentration: dict[str, Any], palette: dict[str, str]) -> Figure | None:
    """Share of the contribution against share of the experts, smallest first; diagonal: equal shares."""
    curves = mapping(concentration.get("lorenz"))
    drawn = {name: _thin(_pairs(points)) for name, points in curves.items()}
    drawn = {name: points for name, points in drawn.items() if len(points) > 1}
    if not drawn:
        return None
    with style(palette):
        picture, axes = canvas(SMALL)
        axes.plot(
            [0, 100], [0, 100], color=palette["muted"], linewidth=1, linestyle=(0, (4, 3)), label="equal"
        )
        first = True
        for name, points in drawn.items():
            x, y = [100 * p[0] for p in points], [100 * p[1] for p in points]
            if name == "all":
                axes.plot(x, y, color=palette["c0"], linewidth=2.6, label="all layers", zorder=4)
            else:
                axes.plot(
                    x,
                    y,
                    color=palette["c1"],
                    linewidth=0.9,
                    alpha=0.55,
                    label="each layer" if first else None,
                )
                first = False
        axes.set(xlim=(0, 100), ylim=(0, 100), xlabel="experts, % (smallest first)", ylabel="contribution, %")
        axes.legend(loc="upper left")
    return picture


def by_layer(
    names: Sequence[str],
    lines: Sequence[Line],
    axis: str,
    palette: dict[str, str],
    factor: float = 1,
    limits: tuple[float | None, float | None] = (None, None),
    worst: int | None = None,
    levels: Sequence[tuple[str, float]] = (),
    across: str = "layer",
    size: tuple[int, int] = SMALL,
) -> Figure | None:
    """Values over the layers, one line each, with intervals where there are any. `worst` marks one layer.

    `levels` are dashed lines at one height, such as chance. `across` says what the names are, if not layers.
    """
    lines = [line for line in lines if any(value is not None for value in line.values)]
    if not lines:
        return None
    with style(palette):
        picture, axes = canvas(size)
        for index, line in enumerate(lines):
            colour, at = palette[SERIES[index % len(SERIES)]], range(len(line.values))
            if line.bounds:
                for i, bounds in enumerate(line.bounds):
                    if ends := pair(bounds):
                        axes.vlines(
                            i, factor * ends[0], factor * ends[1], color=colour, linewidth=1.2, alpha=0.6
                        )
            y = [float("nan") if value is None else factor * value for value in line.values]
            axes.plot(
                at,
                y,
                color=colour,
                marker=MARKERS[index % len(MARKERS)],
                label=line.label,
                markersize=4 if len(y) > 12 else 5.5,
                linewidth=2.8 if line.bold else 1.4,
                linestyle=(0, (3, 1.5)) if line.dashed else "-",
                zorder=5 if line.bold else None,
            )
        for index, (label, level) in enumerate(levels):
            dashes = (0, (4, 3)) if index == 0 else (0, (1, 2))
            axes.axhline(
                factor * level,
                color=palette["muted"],
                linewidth=1.4,
                linestyle=dashes,
                label=label,
                zorder=1.5,
            )
        if worst is not None:
            value = lines[0].values[worst]
            if value is not None:
                axes.plot(
                    [worst],
                    [factor * value],
                    "o",
                    markersize=11,
                    markerfacecolor="none",
                    markeredgewidth=1.6,
                    color=palette["stop"],
                    label=f"worst: layer {names[worst]}",
                )
        axes.set_ylim(*limits)
        if all(value is None or value == int(value) for line in lines for value in line.values):
            axes.yaxis.set_major_locator(MaxNLocator(nbins=7, integer=True))
        axes.margins(x=0.04)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if size[0] < 500 else 16, integer=True))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: str(names[int(x)]) if x == int(x) and 0 <= x < len(names) else "")
        )
        axes.grid(axis="x", visible=False)
        axes.set(xlabel=across, ylabel=axis)
        if size[0] >= 500:
            picture.legend(loc="outside right upper", handlelength=2.2, labelspacing=0.65)
        elif len(lines) > 1 or worst is not None or levels:
            picture.legend(
                loc="outside upper left",
                ncols=2 if levels else 4,
                handlelength=1.4,
                columnspacing=1,
                handletextpad=0.4,
            )
    return picture


def intervals(
    rows: Sequence[tuple[str, Sequence[tuple[str, float, Any]]]],
    axis: str,
    zero: float,
    palette: dict[str, str],
) -> Figure:
    """Named rows, one under the other, of one (series, value, [low, high]) or more each.

    A line stands where nothing would have changed. A series has one colour and marker in every row.
    """
    series = list(dict.fromkeys(name for _, found in rows for name, _, _ in found))
    step = 0.62 / max(len(series), 1)
    with style(palette):
        picture, axes = canvas((SMALL[0], 66 + (26 if len(series) < 3 else 11 * len(series)) * len(rows)))
        axes.axvline(zero, color=palette["muted"], linewidth=1, linestyle=(0, (4, 3)))
        for index, name in enumerate(series):
            colour = palette[SERIES[index % len(SERIES)]]
            points = [
                (y + (index - (len(series) - 1) / 2) * step, value, pair(bounds))
                for y, (_, found) in enumerate(rows)
                for one, value, bounds in found
                if one == name
            ]
            for y, _, ends in points:
                if ends:
                    axes.hlines(y, *ends, color=colour, linewidth=2)
            axes.plot(
                [value for _, value, _ in points],
                [y for y, _, _ in points],
                color=colour,
                linestyle="none",
                marker=MARKERS[index % len(MARKERS)],
                label=cut(name, 40),
            )
        axes.set_yticks(range(len(rows)), [cut(name, 24) for name, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(axis="y", visible=False)
        axes.set_xlabel(axis)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.margins(x=0.08)
        if len(series) > 1:
            picture.legend(loc="outside lower left", handlelength=1, labelspacing=0.3)
    return picture


def heatmap(facts: dict[str, Any], palette: dict[str, str]) -> Figure | None:
    """The first statistic over all domains, each layer against its largest (for the PNG)."""
    found = default_statistic(facts)
    if found is None:
        return None
    label, rows = found
    width = max(map(len, rows))
    shown = [[value if value is not None else float("nan") for value in row] for row in rows]
    tops = [max((value for value in row if value is not None), default=0.0) for row in rows]
    shares = [
        [value / top if top > 0 else 0.0 for value in row] + [float("nan")] * (width - len(row))
        for row, top in zip(shown, tops, strict=True)
    ]
    with style(palette):
        picture, axes = canvas((POSTER[0], min(max(200, 90 + 14 * len(rows)), 900)))
        image = axes.imshow(shares, cmap="viridis", aspect="auto", vmin=0, vmax=1, interpolation="nearest")
        for layer, dropped in enumerate(items(facts.get("dropped"))[: len(rows)]):
            for expert in map(figure, items(dropped)):
                if expert is None:
                    continue
                axes.add_patch(
                    matplotlib.patches.Rectangle(
                        (expert - 0.42, layer - 0.42), 0.84, 0.84, fill=False, edgecolor="white", linewidth=1
                    )
                )
        names = [str(name) for name in facts.get("layers") or range(len(rows))]
        step = max(1, len(rows) // 12)
        axes.set_yticks(range(0, len(rows), step), names[: len(rows) : step])
        axes.grid(visible=False)
        axes.set(
            xlabel="expert" + (" (dropped ones outlined)" if any(items(facts.get("dropped"))) else ""),
            ylabel="layer",
        )
        bar = picture.colorbar(image, ax=axes, pad=0.01, fraction=0.03, ticks=[0, 0.5, 1])
        bar.outline.set_visible(False)  # type: ignore[operator]
        bar.set_label(f"{label}, of the largest in the layer")
    return picture


def default_statistic(facts: dict[str, Any]) -> tuple[str, list[list[float | None]]] | None:
    """(label, L x E) of the statistic a heatmap opens with: contribution if there, over all domains."""
    statistics = {
        k: s for k, s in mapping(facts.get("statistics")).items() if mapping(mapping(s).get("by_domain"))
    }
    if not statistics:
        return None
    key = "contribution" if "contribution" in statistics else next(iter(statistics))
    chosen = statistics[key]
    domains = chosen["by_domain"]
    rows = [figures(row) for row in items(domains.get("all") or next(iter(domains.values())))]
    return (str(chosen.get("label", key)), rows) if any(rows) else None


def _points(series: dict[str, Any], key: str) -> list[Point]:
    """(experts kept, value, interval) of the points that have both figures, by experts kept."""
    found = []
    for point in records(series.get("points")):
        keep, value = figure(point.get("keep")), figure(point.get(key))
        if keep is not None and value is not None:
            found.append((keep, value, pair(point.get(f"{key}_ci"))))
    return sorted(found, key=lambda point: point[0])


def wide_range(values: list[float], factor: float) -> bool:
    """Whether the figures span more than `factor`, so that a linear axis would hide the small ones."""
    positive = [value for value in values if value > 0]
    return bool(positive) and max(positive) > factor * min(positive)


def _looks(series: list[dict[str, Any]], palette: dict[str, str]) -> list[dict[str, Any]]:
    """Colour, marker and dash of each series; a healed one has the colour of the one it is named after."""
    looks: list[dict[str, Any]] = []
    colours: dict[str, str] = {}
    for one in series:
        kind, name = one.get("kind"), str(one.get("name", "?"))
        if kind == "random":
            looks.append({"color": palette["muted"], "linestyle": ":", "marker": "x"})
            continue
        base = max((n for n in colours if kind == "healed" and name.startswith(n)), key=len, default=None)
        index = len(colours)
        colour = colours[base] if base is not None else palette[SERIES[index % len(SERIES)]]
        colours.setdefault(name, colour)
        look: dict[str, Any] = {"color": colour, "marker": MARKERS[index % len(MARKERS)], "linestyle": "-"}
        if kind == "merge":
            look |= {"linestyle": (0, (5, 2)), "markerfacecolor": "none"}
        if kind == "healed":
            look |= {
                "marker": "*",
                "markersize": 14,
                "linestyle": (0, (1, 1)),
                "linewidth": 1.2,
                "zorder": 6,
                "markeredgecolor": palette["ink"],
                "markeredgewidth": 0.7,
            }
        looks.append(look)
    return looks


def _series(
    axes: Axes,
    name: str,
    points: list[Point],
    look: dict[str, Any],
    factor: float,
) -> None:
    x, y = [point[0] for point in points], [factor * point[1] for point in points]
    axes.plot(x, y, label=cut(name, 28), **look)
    for keep, _, ends in points:
        if ends:
            axes.vlines(
                keep, factor * ends[0], factor * ends[1], color=look["color"], linewidth=1.2, alpha=0.6
            )


def _random_band(axes: Axes, facts: dict[str, Any], palette: dict[str, str], log: bool) -> None:
    band = sorted(
        (keep, low, high, figure(row.get("kl_median")))
        for row in records(facts.get("random_band"))
        for keep, low, high in [(figure(row.get("keep")), figure(row.get("kl_lo")), figure(row.get("kl_hi")))]
        if keep is not None and low is not None and high is not None and (low > 0 or not log)
    )
    if not band:
        return
    x, low, high, middle = zip(*band, strict=True)
    if len(band) == 1:  # an area of no width would not be seen
        axes.vlines(x, low, high, color=palette["muted"], linewidth=9, alpha=0.3, label="random, range")
    else:
        axes.fill_between(
            x, low, high, color=palette["muted"], alpha=0.22, linewidth=0, label="random, range"
        )
    if None not in middle:
        axes.plot(x, middle, color=palette["muted"], linestyle=":", linewidth=1.5, label="random, median")


def _experts_axis(axes: Axes, kept: list[float], experts: float | None, wide: bool) -> None:
    """Ticks at the counts that were measured; above, the share that was dropped."""
    ends = [*kept, experts] if experts else kept
    ticks = _apart(ends, 0.05 if wide else 0.08)
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.set_xlabel(f"experts kept per layer, of {experts:g}" if experts else "experts kept per layer")
    axes.margins(x=0.04)
    axes.grid(axis="x", visible=False)
    if experts:
        top = axes.secondary_xaxis("top")
        ticks = _apart(ends, 0.06 if wide else 0.2)
        top.set_xticks(ticks, [_dropped(value / experts) for value in ticks])
        top.spines["top"].set_visible(False)
        top.tick_params(length=0)


def _dropped(kept: float) -> str:
    return "all" if kept == 1 else f"−{100 * (1 - kept):.3g} %"


def _apart(values: list[float], share: float) -> list[float]:
    """Of the values, largest first, those at least `share` of the whole span from the one before."""
    span, chosen = max(values) - min(values), list[float]()
    for value in sorted(set(values), reverse=True):
        if not chosen or chosen[-1] - value >= share * span:
            chosen.append(value)
    return chosen


def _plain_ticks(axes: Axes, log: bool) -> None:
    """0.01 instead of 10⁻²; labels between the decades only where there is less than one and a half."""
    if not log:
        return
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axes.yaxis.set_major_formatter(plain)
    low, high = axes.get_ylim()
    axes.yaxis.set_minor_formatter(plain if high < 30 * low else NullFormatter())
    axes.tick_params(axis="y", which="minor", length=0)


def _pairs(points: Any) -> list[tuple[float, float]]:
    return [ends for point in points if (ends := pair(point))] if isinstance(points, list) else []


def _thin(points: list[tuple[float, float]], most: int = 40) -> list[tuple[float, float]]:
    """At most about `most` of the points, the last included: a curve of 129 looks the same."""
    step = -(-len(points) // most) or 1
    return points[:-1:step] + points[-1:]


def cut(text: str, most: int) -> str:
    """Text of at most so many characters."""
    return text if len(text) <= most else text[: most - 1] + "…"
