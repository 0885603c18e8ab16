"""Colours, fonts and sizes of the report's pictures, and of the page around them.

A figure is drawn with a palette. For the page the palette holds stand-ins (#010101, ...), which `svg.inline`
turns into the page's CSS variables; for the PNG it is the light theme itself.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

import matplotlib
import matplotlib.colors
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# One table for page and pictures: name -> (light, dark). Series: Okabe and Ito's colours, darkened on white
# and lightened on black until each has 3:1 against its background; markers and dashes say it without colour.
COLOURS = {
    "ink": ("#1a1d21", "#e9ebee"),
    "muted": ("#5b636d", "#a2abb6"),
    "rule": ("#d9dde2", "#333a43"),
    "page": ("#ffffff", "#14171b"),
    "card": ("#f5f7f9", "#1c2026"),
    "tint": ("#2b7fc4", "#3d8fd6"),
    "warm": ("#d9652b", "#d2682f"),
    "safe": ("#0b6e4f", "#4fd1a1"),
    "caution": ("#8a5300", "#f2b84b"),
    "stop": ("#b3261e", "#ff8d85"),
    "info": ("#1c5d99", "#7cbcf5"),
    "c0": ("#0072b2", "#56b4e9"),
    "c1": ("#d05a00", "#ff8f4a"),
    "c2": ("#00805f", "#2ecfa1"),
    "c3": ("#b04f92", "#e695ca"),
    "c4": ("#946c00", "#e8bb3c"),
    "c5": ("#5b4bc4", "#a99cff"),
    "c6": ("#8c3b2e", "#d98b7c"),
    "c7": ("#3b6f7d", "#86c3d1"),
}
SERIES = [name for name in COLOURS if re.fullmatch(r"c\d", name)]
MARKERS = "os^DvPXhp<>8"

STAND_INS = {name: f"#0101{index:02x}" for index, name in enumerate(COLOURS, 1)}
LIGHT = {name: light for name, (light, _) in COLOURS.items()}
VARIABLES = {colour: f"var(--{name})" for name, colour in STAND_INS.items()}

WIDE, NARROW, SMALL, POSTER = (940, 390), (340, 400), (340, 245), (900, 500)  # width, height in CSS pixels


@contextlib.contextmanager
def style(palette: dict[str, str]) -> Iterator[None]:
    """matplotlib's defaults (never the user's), then ours."""
    ours = {
        "svg.fonttype": "none",
        "svg.hashsalt": "moesmith",
        "text.parse_math": False,  # a name with two dollar signs is a name
        "font.family": "DejaVu Sans",  # comes with matplotlib: the same layout on every machine
        "font.size": 11.5,
        "axes.labelsize": 11.5,
        "xtick.labelsize": 10.5,
        "ytick.labelsize": 10.5,
        "legend.fontsize": 11,
        "text.color": palette["ink"],
        "axes.labelcolor": palette["muted"],
        "axes.edgecolor": palette["rule"],
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": palette["rule"],
        "grid.linewidth": 0.8,
        "xtick.color": palette["rule"],
        "ytick.color": palette["rule"],
        "xtick.labelcolor": palette["muted"],
        "ytick.labelcolor": palette["muted"],
        "figure.facecolor": "none",
        "legend.frameon": False,
        "lines.linewidth": 1.8,
        "lines.markersize": 5.5,
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(ours)
        yield


def canvas(size: tuple[int, int]) -> tuple[Figure, Axes]:
    """A figure of `size` CSS pixels (one point of matplotlib is one pixel of the page) and its one axes."""
    picture = Figure(figsize=(size[0] / 72, size[1] / 72), dpi=72, layout="constrained")
    return picture, picture.subplots()


def viridis(count: int = 32) -> list[str]:
    """Stops of the heatmap's scale, dark to light: perceptually uniform, safe for colour-blind eyes."""
    scale = matplotlib.colormaps["viridis"]
    return [matplotlib.colors.to_hex(scale(index / (count - 1))) for index in range(count)]
