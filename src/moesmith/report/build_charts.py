"""The pictures of a built model: perplexity by who routes, routing over depth, load of each expert.

L layers, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

from .charts import Line, by_layer, cut, intervals, wide_range
from .parts import short_names
from .theme import WIDE, canvas, style, viridis
from .values import figure, figures, items, mapping, number, pair, records, visible

# kind of a row -> (heading, colour, marker), in the order of the picture; the first needs no heading
KINDS = {
    "router": ("", "c0", "o"),
    "control": ("routed otherwise", "muted", "s"),
    "oracle": ("label known", "c2", "D"),
    "source": ("dense models", "c1", "^"),
    "": ("others", "c5", "v"),
}
DIGITS = 4  # of a perplexity
CELLS = 10_000  # a map of more is too large for a page
MANY = 24  # domains up to which their gaps are drawn
STEPS = 24  # colours of the load's scale
COLLAPSED = 0.1  # of an even share: less than this and an expert is as good as unused


def label(name: Any, most: int = 40) -> str:
    """A name for a picture: one line, no control characters, not too long."""
    return cut(" ".join(visible(name).split()), most)


def grouped(perplexity: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(kind, its rows) in the order of KINDS; rows as the facts have them."""
    rows = records(perplexity.get("rows"))
    kinds = [(row, kind if (kind := str(row.get("kind"))) in KINDS else "") for row in rows]
    groups = [(kind, [row for row, own in kinds if own == kind]) for kind in KINDS]
    return [(kind, found) for kind, found in groups if found]


def ends_of_gap(perplexity: dict[str, Any]) -> tuple[float, float] | None:
    """(oracle, random): the best that routing can reach, and routing without any knowledge."""
    oracle = random = None
    for row in records(perplexity.get("rows")):
        if row.get("kind") == "oracle":
            oracle = figure(row.get("mean"))
        elif row.get("kind") == "control" and str(row.get("key", row.get("name"))).startswith("random"):
            random = figure(row.get("mean"))
    return None if oracle is None or random is None or not 0 < oracle < random else (oracle, random)


def perplexity(facts: dict[str, Any], palette: dict[str, str], size: tuple[int, int] = WIDE) -> Figure | None:
    """Perplexity of every row with its interval, grouped by kind; the gap between oracle and random shaded.

    The height follows from the rows, only the width of `size` counts. None where no row has a figure.
    """
    groups = [
        (kind, [row for row in rows if (figure(row.get("mean")) or 0) > 0]) for kind, rows in grouped(facts)
    ]
    groups = [(kind, rows) for kind, rows in groups if rows]
    if not groups:
        return None
    lines = sum(len(rows) for _, rows in groups) + 0.9 * sum(bool(KINDS[kind][0]) for kind, _ in groups)
    wide = size[0] > 500
    with style(palette):
        picture, axes = canvas((size[0], round(min(max(72 + 24 * lines, 150), 900))))
        if gap := ends_of_gap(facts):
            axes.axvspan(*gap, color=palette["muted"], alpha=0.13, linewidth=0)
        y, ticks, heads, seen = 0.0, list[tuple[float, str]](), list[int](), list[float]()
        own = 0 if groups[0][0] == "router" else None
        for kind, rows in groups:
            heading, tone, marker = KINDS[kind]
            if heading:
                heads.append(len(ticks))
                ticks.append((y, heading))
                y += 0.9
            for row in rows:
                seen += _row(axes, row, y, palette[tone], marker, palette["ink"])
                ticks.append((y, label(row.get("name", "?"), 34 if wide else 21)))
                y += 1
        axes.set_yticks([at for at, _ in ticks], [name for _, name in ticks])
        for index, words in enumerate(axes.get_yticklabels()):
            words.set_color(palette["muted" if index in heads else "ink"])
            words.set_fontsize(10 if index in heads else 11.5)
            words.set_fontweight("bold" if index == own else "normal")
        axes.set_ylim(y - 0.35, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="y", visible=False)
        _perplexity_axis(axes, seen, wide)
        axes.set_xlabel("perplexity" + (" (log scale)" if axes.get_xscale() == "log" else ""))
    return picture


def _row(axes: Axes, row: dict[str, Any], y: float, colour: str, marker: str, ink: str) -> list[float]:
    """A dot, its interval, its figure; what the axis has to hold."""
    value = float(row["mean"])
    ends = pair(row.get("mean_ci"))
    if ends and not 0 < ends[0] <= ends[1]:
        ends = None
    if ends:
        axes.hlines(y, *ends, color=colour, linewidth=2.4, alpha=0.75)
    axes.plot([value], [y], marker=marker, color=colour, linestyle="none", markersize=8)
    right = max(value, ends[1]) if ends else value
    axes.annotate(
        number(value, DIGITS),
        (right, y),
        xytext=(9, 0),
        textcoords="offset points",
        va="center",
        fontsize=11,
        color=ink,
    )
    return [value, *(ends or ())]


def _perplexity_axis(axes: Axes, seen: Sequence[float], wide: bool) -> None:
    """Logarithmic where the rows are far apart; room for the figures beside the dots."""
    low, high = min(seen), max(seen)
    if wide_range(list(seen), 4):
        axes.set_xscale("log")
        span = high / low
        axes.set_xlim(low / span**0.06, high * span ** (0.12 if wide else 0.28))
        few = (1, 3) if span < 1000 and not wide else (1,)
        subs = (1, 2, 5) if span < (100 if wide else 12) else few
        axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=9 if wide else 5))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    else:
        span = max(high - low, 0.02 * high)
        axes.set_xlim(low - 0.06 * span, high + (0.12 if wide else 0.28) * span)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if wide else 4))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def chances(build: dict[str, Any]) -> tuple[float | None, float | None]:
    """What chance gives the label's expert: the first place (or all weight), one of k places."""
    routing = mapping(build.get("routing"))
    first, chosen = figure(routing.get("chance_top1")), figure(routing.get("chance"))
    if first is None:
        count = len(items(routing.get("confusion"))) or len(items(build.get("experts")))
        first = 1 / count if count else None
    return first, chosen


def layer_names(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The names of the layers: their numbers, or their places."""
    return [label(name, 12) for name in short_names([str(row.get("layer", i)) for i, row in enumerate(rows)])]


def methods(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Every way to make a router that a layer has a figure for, in the order of the facts."""
    found = dict.fromkeys(name for row in rows for name in mapping(row.get("by_method")))
    return [
        name for name in found if any(figure(mapping(r.get("by_method")).get(name)) is not None for r in rows)
    ]


def depth(build: dict[str, Any], palette: dict[str, str], size: tuple[int, int] = WIDE) -> Figure | None:
    """Accuracy over the layers: the router as it is in the model, and every other way to make one."""
    rows = records(mapping(build.get("routing")).get("layers"))
    own = [figure(row.get("accuracy")) for row in rows]
    there = any(value is not None for value in own)
    route = str(build.get("route") or "")
    lines = [Line(f"{label(route or 'router', 18)} (this model)", own, bold=True)] if there else []
    for name in methods(rows):
        values = [figure(mapping(row.get("by_method")).get(name)) for row in rows]
        if name == route:  # the router of the model again, where it was fitted: the distance is what counts
            lines.insert(len(lines[:1]), Line(f"{label(name, 18)}, as fitted", values, dashed=True))
        else:
            lines.append(Line(label(name, 20), values))
    chance, _ = chances(build)
    levels = [("chance", chance)] if chance is not None else []
    return by_layer(
        layer_names(rows), lines, "label's expert first, %", palette, 100, (0, 100),
        levels=levels, size=size,
    )  # fmt: skip


def shares(build: dict[str, Any], palette: dict[str, str]) -> Figure | None:
    """Over the layers: the label's expert among the chosen, and its share of the weights."""
    routing = mapping(build.get("routing"))
    rows = records(routing.get("layers"))
    first, chosen = chances(build)
    found = [
        (Line("among the top-k", [figure(row.get("in_top_k")) for row in rows]), ("chance, top-k", chosen)),
        (Line("share of the weight", [figure(row.get("share")) for row in rows]), ("chance, share", first)),
    ]
    found = [(line, level) for line, level in found if any(value is not None for value in line.values)]
    if chosen is not None and chosen >= 1:  # all are chosen
        found = [(line, level) for line, level in found if level[0] != "chance, top-k"]
    levels = [(words, value) for _, (words, value) in found if value is not None]
    lines = [line for line, _ in found]
    return by_layer(layer_names(rows), lines, "label's expert, %", palette, 100, (0, 105), levels=levels)


def positions(build: dict[str, Any], palette: dict[str, str]) -> Figure | None:
    """Accuracy by the token's place in its text."""
    rows = records(mapping(build.get("routing")).get("positions"))
    names = [number(int(at)) if (at := figure(row.get("from"))) is not None else "" for row in rows]
    line = Line("accuracy", [figure(row.get("accuracy")) for row in rows])
    chance, _ = chances(build)
    levels = [("chance", chance)] if chance is not None else []
    return by_layer(
        names, [line], "label's expert first, %", palette, 100, (0, 100),
        levels=levels, across="from token",
    )  # fmt: skip


def collapsed(rows: Sequence[dict[str, Any]]) -> list[tuple[int, int]]:
    """(place of the layer, expert) of every expert with less than a tenth of an even share."""
    found = []
    for index, row in enumerate(rows):
        load = figures(row.get("load"))
        found += [(index, e) for e, x in enumerate(load) if x is not None and x < COLLAPSED / len(load)]
    return found


def load(
    rows: Sequence[dict[str, Any]], names: Sequence[str], palette: dict[str, str], size: tuple[int, int]
) -> Figure | None:
    """Experts by layers, the colour is the expert's share of the layer's tokens; collapsed ones are crossed.

    A layer's cells of one colour are one path: 16 bytes a cell instead of 130, and no picture to embed.
    """
    loads = [figures(row.get("load")) for row in rows]
    width = max(map(len, loads), default=0)
    top = max((value for one in loads for value in one if value is not None), default=0.0)
    if not width or top <= 0:
        return None
    colours = viridis(STEPS)
    shaded: dict[int, list[tuple[int, int]]] = {}
    for layer, one in enumerate(loads):
        for expert, value in enumerate(one):
            if value is not None:
                step = min(int(STEPS * max(value, 0.0) / top), STEPS - 1)
                shaded.setdefault(step, []).append((layer, expert))
    with style(palette):
        picture, axes = canvas((size[0], round(min(58 + max(15 * width, 60), 900))))
        for step, cells in sorted(shaded.items()):
            boxes = [Path(_box(x, y), closed=True) for x, y in cells]
            path = Path.make_compound_path(*boxes)
            axes.add_patch(PathPatch(path, facecolor=colours[step], edgecolor="none", linewidth=0))
        if crosses := collapsed(rows):
            x, y = zip(*crosses, strict=True)
            axes.plot(x, y, "x", color="#ffffff", markersize=4.5, markeredgewidth=1.2, linestyle="none")
        axes.set(xlim=(-0.6, len(loads) - 0.4), ylim=(width - 0.4, -0.6), xlabel="layer")
        most = 18 if size[0] > 500 else 14
        step = -(-width // 40)
        axes.set_yticks(range(0, width, step), [label(name, most) for name in names[:width:step]])
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16 if size[0] > 500 else 8, integer=True))
        layers = layer_names(rows)
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: layers[int(x)] if x == int(x) and 0 <= x < len(layers) else "")
        )
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
    return picture


def _box(x: float, y: float) -> list[tuple[float, float]]:
    """Corners of a cell, the first again at the end; a gap to the next is left."""
    left, right, top, bottom = x - 0.46, x + 0.46, y - 0.45, y + 0.45
    return [(left, top), (right, top), (right, bottom), (left, bottom), (left, top)]


def energy(build: dict[str, Any], palette: dict[str, str]) -> Figure | None:
    """Share of each difference's energy that low rank keeps, by layer."""
    found = mapping(mapping(build.get("modes")).get("energy"))
    lines = [Line(label(name, 12), figures(values)) for name, values in found.items()]
    count = max((len(line.values) for line in lines), default=0)
    names = [str(index) for index in range(count)]
    return by_layer(names, lines, "energy kept, %", palette, 100, (None, None))


def split(build: dict[str, Any], palette: dict[str, str], size: tuple[int, int]) -> Figure | None:
    """Share of what a dense FFN writes that k of its E parts hold: as routed, best, at random."""
    rows = records(mapping(build.get("split")).get("layers"))
    kinds = [("best", "best choice"), ("kept", "this router"), ("random", "random choice")]
    lines = [Line(words, [figure(row.get(key)) for row in rows], bold=key == "kept") for key, words in kinds]
    return by_layer(layer_names(rows), lines, "of what the FFN writes, %", palette, 100, size=size)


def gap_by_domain(build: dict[str, Any], palette: dict[str, str]) -> Figure | None:
    """Share of the gap between random and oracle that is closed, by domain."""
    found = mapping(build.get("perplexity"))
    series = [
        ("this router", mapping(found.get("gap_closed"))),
        ("embed", mapping(found.get("gap_closed_embed"))),
    ]
    rows: dict[str, list[tuple[str, float, Any]]] = {}
    for name, gap in series:
        for domain, one in mapping(gap.get("by_domain")).items():
            value = figure(one["mean"] if isinstance(one, dict) and "mean" in one else one)
            ends = pair(mapping(one).get("ci"))
            if value is not None:
                bounds = [100 * ends[0], 100 * ends[1]] if ends else None
                rows.setdefault(label(domain, 24), []).append((name, 100 * value, bounds))
    if not 0 < len(rows) <= MANY:
        return None
    return intervals(list(rows.items()), "of the gap closed, %", 100, palette)
