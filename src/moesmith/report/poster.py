"""report.png: the decisive picture of a page, for a chat, with title and verdict above it."""

from __future__ import annotations

import io
import textwrap
from typing import Any

from matplotlib.figure import Figure

from . import build_charts, charts, loop_charts, tasks, tool_charts, transfers
from .charts import MEASURES, Line, cut
from .parts import verdict
from .rounds import read_rounds
from .runs import layout, read_runs
from .theme import LIGHT, POSTER, style
from .values import figure, mapping, records

LEAST = 2.4  # inches that axes with their labels and legend need


def png(facts: dict[str, Any]) -> bytes:
    """The decisive picture, title and verdict above it.

    Of rounds their scores; of tool calls the scores of several runs, or what one run takes for what; of pairs
    their categories. Of a built model the perplexities, else its routing by layer. Of any other, the Pareto
    curves if there are any, else the heatmap, else the retained norm. Without any, the verdict alone.
    """
    built = mapping(facts.get("build"))
    picture = _asked(facts) or build_charts.perplexity(mapping(built.get("perplexity")), LIGHT, POSTER)
    picture = picture or build_charts.depth(built, LIGHT, POSTER)
    for measure in MEASURES:
        picture = picture or charts.pareto(mapping(facts.get("pareto")), measure, LIGHT, POSTER)
    picture = picture or charts.heatmap(mapping(facts.get("heatmap")), LIGHT)
    if picture is None:
        rows = records(facts.get("retained"))
        values = [figure(row.get("norm")) for row in rows]
        line = Line("retained", values, [row.get("ci") for row in rows])
        names = [str(row.get("layer")) for row in rows]
        picture = charts.by_layer(names, [line], "weighted output norm kept, %", LIGHT, 100)
    with style(LIGHT):
        if picture is None:
            picture = Figure(figsize=(POSTER[0] / 72, 1.6), layout="constrained")
        sentence = verdict(facts).get("sentence")
        lines = [str(facts.get("title") or "moesmith report"), str(sentence or "")]
        width = int(picture.get_figwidth() * 9)  # about the characters of this size on a line
        words = [line for text in lines if text for line in textwrap.wrap(cut(text, 400), width)]
        _room(picture, 26 * len(words) + 14)
        picture.suptitle("\n".join(words), x=0.015, ha="left", fontsize=13, linespacing=1.5)
        engine = picture.get_layout_engine()
        if engine is not None:
            engine.set(w_pad=0.14, h_pad=0.14)  # type: ignore[call-arg]
        file = io.BytesIO()
        picture.savefig(
            file, format="png", dpi=160, facecolor=LIGHT["page"], metadata={"Software": "moesmith"}
        )
    return file.getvalue()


def _room(picture: Figure, pixels: int) -> None:
    """Room above a picture that places its axes itself; the others make it on their own, if they are high
    enough to have some left."""
    width, height = picture.get_size_inches()
    more = pixels / 72
    if picture.get_layout_engine() is not None:
        if picture.axes:
            picture.set_size_inches(width, max(height, more + LEAST))
        return
    picture.set_size_inches(width, height + more)
    for axes in picture.axes:
        left, bottom, across, up = axes.get_position().bounds
        share = height / (height + more)
        axes.set_position((left, bottom * share, across, up * share))


def _asked(facts: dict[str, Any]) -> Figure | None:
    """The picture of rounds, tool calls, pairs or transfers; None for facts of anything else."""
    picture = loop_charts.scores(read_rounds(facts), LIGHT, POSTER)
    runs = read_runs(facts)
    if picture is None and len(runs) != 1:
        picture = tool_charts.score(runs, LIGHT, POSTER)
    for run in runs:
        if picture is None and run.confusion is not None:
            shown = layout([run.confusion])
            picture = tool_charts.confusion(run.confusion, shown, LIGHT) if shown.tools else None
    picture = picture or tool_charts.score(runs, LIGHT, POSTER) or tasks.picture(facts.get("tasks"), LIGHT)
    picture = picture or loop_charts.pairs(
        records(mapping(facts.get("pairs")).get("categories")), LIGHT, POSTER
    )
    return picture or transfers.stalls(mapping(facts.get("transfers")), LIGHT, POSTER)
