"""The section of transfers: what was fetched from RAM or disk, what waited for it, and what the link gave.

Facts are `facts["transfers"]`, the dictionary of `Residency.statistics()`: layers (layer, bytes, fetches,
hits, misses, stall_s, slack_s), bytes, seconds, bandwidth, hit_rate, tokens, bytes_per_token, predicted,
predicted_right, link; in_memory for experts that are computed with where they are mapped: the share of their
bytes that was in the page cache. Beside those, from whoever knows them: elapsed (seconds of the answers),
link_bandwidth (bytes a second that the link gives alone), experts_bytes (all of them: what whole layers would
move for a token) and prompt (bytes, tokens, elapsed of reading prompts, if the rest is without it). Stall is
time that computing waited for bytes; slack, time that bytes were there before they were used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from moesmith import console

from . import charts
from .charts import Line
from .loop_charts import place
from .markup import Html, join, table, tag
from .parts import Section, chart, hint, keep_used, section, sentence, short_names, shown, to_table
from .theme import NARROW, STAND_INS, WIDE, canvas, style
from .values import NONE, figure, mapping, number, percent, records

Row = dict[str, Any]


def sections(facts: dict[str, Any]) -> list[Section]:
    """Waiting by layer; what was moved and how fast; every figure."""
    found = mapping(facts.get("transfers"))
    parts = [waiting(found), moved(found), figures(found)]
    return [one for one in parts if one is not None]


def verdict(found: dict[str, Any]) -> dict[str, Any]:
    """What the page opens with: {"level", "sentence", "points"}; {} for nothing known."""
    nbytes, tokens = figure(found.get("bytes")), figure(found.get("tokens"))
    if nbytes is None:
        return {}
    share, hits = waited(found), figure(found.get("hit_rate"))
    per_token, there = _per_token(found), figure(found.get("in_memory"))
    amount = console.size(nbytes if per_token is None else per_token)
    each = "" if per_token is None else " for each token"
    if nbytes == 0:
        said = "Nothing was fetched: every expert that was asked for was there."
    elif there is not None:
        said = f"{amount} of mapped experts were read{each}; {percent(there)} of that was in memory already."
    else:
        said = f"{amount} of experts were fetched{each}"
        if share is not None:
            said += f", and computing waited for them {percent(share, 0 if share >= 0.1 else 1)} of the time"
        said += "."
    points = [
        f"{percent(hits)} of the experts asked for were there already, or on their way."
        if hits is not None and there is None
        else None,
        _against_layers(found),
        _against_link(found),
        f"{number(int(tokens))} tokens in {console.duration(elapsed)}."
        if tokens and (elapsed := figure(found.get("elapsed")))
        else None,
        _prompts(mapping(found.get("prompt"))),
    ]
    return {"level": "info", "sentence": said, "points": [point for point in points if point]}


def waited(found: dict[str, Any]) -> float | None:
    """Share of the time that computing stood still for a transfer."""
    elapsed = figure(found.get("elapsed"))
    stalls = [figure(row.get("stall_s")) for row in records(found.get("layers"))]
    there = [stall for stall in stalls if stall is not None]
    return min(sum(there) / elapsed, 1.0) if there and elapsed else None


# ---------------------------------------------------------------- the parts


def waiting(found: dict[str, Any]) -> Section | None:
    """The decisive picture: by layer, how long computing waited and how early the bytes were."""
    rows = records(found.get("layers"))
    wide, narrow = stalls(found, STAND_INS, WIDE), stalls(found, STAND_INS, NARROW)
    if wide is None:
        return None
    stall, slack = _sum(rows, "stall_s"), _sum(rows, "slack_s")
    worst = max(rows, key=lambda row: figure(row.get("stall_s")) or 0.0)
    names = _names(rows)
    words = f"Computing waited {_time(stall)} for experts"
    if stall and len(rows) > 1:
        words += f", most at layer {names[rows.index(worst)]} ({_time(figure(worst.get('stall_s')))})"
    said = f"What came before it was used was {_time(slack)} early." if slack else None
    alt = f"{words}, by layer."
    return section(
        "transfers",
        "Waiting",
        "Did the experts arrive in time?",
        sentence(f"{words}.", said),
        chart(wide, "stalls", alt, "wide"),
        chart(narrow, "stalls-narrow", alt, "narrow"),
        hint(
            join(
                "Up: computing stood still until bytes came. Down: bytes were there before they were used. ",
                to_table("t-transfers"),
            )
        ),
    )


def stalls(found: dict[str, Any], palette: dict[str, str], size: tuple[int, int] = WIDE) -> Figure | None:
    """Stall above the line and slack under it, a bar per layer, per token where the tokens are known."""
    rows = records(found.get("layers"))
    up = [figure(row.get("stall_s")) for row in rows]
    down = [figure(row.get("slack_s")) for row in rows]
    if not any(value is not None for value in [*up, *down]):
        return None
    tokens = figure(found.get("tokens"))
    scale = 1000 / tokens if tokens else 1.0
    names = _names(rows)
    with style(palette):
        picture, axes = canvas((size[0], 330 if size[0] > 500 else 300))
        at = range(len(rows))
        for values, sign, colour, name in ((up, 1, "c1", "computing waited"), (down, -1, "c0", "came early")):
            heights = [sign * scale * (value or 0.0) for value in values]
            if any(heights):
                axes.bar(at, heights, width=0.72, color=palette[colour], label=name)
        axes.axhline(0, color=palette["muted"], linewidth=1)
        axes.set_xlim(-0.7, len(rows) - 0.3)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=16 if size[0] > 500 else 8, integer=True))
        axes.xaxis.set_major_formatter(
            FuncFormatter(lambda x, _: names[int(x)] if x == int(x) and 0 <= x < len(names) else "")
        )
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{abs(y):g}"))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=7))
        axes.grid(axis="x", visible=False)
        axes.tick_params(axis="both", length=0)
        axes.set(xlabel="layer", ylabel="ms per token" if tokens else "seconds")
        if axes.get_legend_handles_labels()[0]:
            picture.legend(loc=place(size), ncols=2, handlelength=1.2, columnspacing=1.4)
    return picture


def moved(found: dict[str, Any]) -> Section | None:
    """Bytes and hits by layer; the bandwidth beside what the link gives alone."""
    rows = records(found.get("layers"))
    names = _names(rows)
    tokens = figure(found.get("tokens"))
    per = tokens or 1.0
    megabytes = [None if (n := figure(row.get("bytes"))) is None else n / per / 1e6 for row in rows]
    hits = [hit_rate(row) for row in rows]
    axis = "MB per token" if tokens else "MB"
    drawn = [
        _layers("What was fetched", "moved", names, megabytes, axis, None) if len(rows) > 1 else None,
        _layers("What was there already", "hits", names, hits, "of the experts asked for, %", 100)
        if len(rows) > 1
        else None,
        shown(
            chart(_link(found), "link", "Bandwidth reached beside what the link gives alone."), None, "Link"
        ),
    ]
    pictures = [one for one in drawn if one is not None]
    words = [_fetched(found), _guessed(found), None if drawn[-1] else _against_link(found)]
    if not pictures and not any(words):
        return None
    return section(
        "moved",
        "Bytes",
        "What was moved, and how fast?",
        sentence(*words),
        tag("div", pictures, class_="row") if pictures else None,
    )


def _layers(
    heading: str, slug: str, names: Sequence[str], values: list[float | None], axis: str, top: float | None
) -> Html | None:
    scaled = [None if value is None else value * (top or 1) for value in values]
    picture = charts.by_layer(
        names, [Line(heading.lower(), scaled)], axis, STAND_INS, limits=(0, 1.04 * top if top else None)
    )
    return shown(chart(picture, slug, f"{heading}, {axis}, by layer."), None, heading)


def _link(found: dict[str, Any]) -> Figure | None:
    """Two bars: what was reached, and what the link gives alone."""
    reached, own = figure(found.get("bandwidth")), figure(found.get("link_bandwidth"))
    if not reached or not own:
        return None
    with style(STAND_INS):
        picture, axes = canvas((NARROW[0], 130))
        values = [reached / 1e9, own / 1e9]
        axes.barh([0, 1], values, height=0.55, color=[STAND_INS["c0"], STAND_INS["muted"]])
        for y, value in enumerate(values):
            axes.annotate(f" {number(value)}", (value, y), va="center", fontsize=10.5, color=STAND_INS["ink"])
        axes.set_yticks([0, 1], ["reached", "the link's own"])
        axes.set_ylim(1.5, -0.5)
        axes.set_xlim(0, 1.25 * max(values))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
        axes.grid(axis="y", visible=False)
        axes.tick_params(axis="both", length=0)
        axes.set_xlabel("GB/s")
    return picture


def figures(found: dict[str, Any]) -> Section | None:
    """A row per layer, the whole in bold."""
    rows = records(found.get("layers"))
    if not rows:
        return None
    names = _names(rows)
    head = ["layer", "fetched", "fetches", "there", "not there", "hit rate", "waited, s", "early, s"]
    body = [
        [
            names[index],
            _bytes(row.get("bytes")),
            number(row.get("fetches")),
            number(row.get("hits")),
            number(row.get("misses")),
            percent(hit_rate(row)),
            number(figure(row.get("stall_s"))),
            number(figure(row.get("slack_s"))),
        ]
        for index, row in enumerate(rows)
    ]
    whole: Row = {
        key: _sum(rows, key) for key in ("bytes", "fetches", "hits", "misses", "stall_s", "slack_s")
    }
    if len(rows) > 1:
        counts = [None if whole[key] is None else int(whole[key]) for key in ("fetches", "hits", "misses")]
        body.append(
            [
                "all", _bytes(whole["bytes"]), *map(number, counts), percent(hit_rate(whole)),
                number(whole["stall_s"]), number(whole["slack_s"]),
            ]
        )  # fmt: skip
    return section(
        "transfer-figures",
        "Figures",
        "Every layer",
        table("Transfers by layer", *keep_used(head, body), id="t-transfers"),
    )


# ---------------------------------------------------------------- what is said


def hit_rate(row: dict[str, Any]) -> float | None:
    """Share of the experts asked for that were there, of one layer."""
    hits, misses = figure(row.get("hits")), figure(row.get("misses"))
    return None if hits is None or misses is None or hits + misses == 0 else hits / (hits + misses)


def _per_token(found: dict[str, Any]) -> float | None:
    said = figure(found.get("bytes_per_token"))
    nbytes, tokens = figure(found.get("bytes")), figure(found.get("tokens"))
    return said if said is not None else nbytes / tokens if nbytes is not None and tokens else None


def _against_layers(found: dict[str, Any]) -> str | None:
    """How much less that is than whole layers for every token."""
    every, per_token = figure(found.get("experts_bytes")), _per_token(found)
    if not every or not per_token:
        return None
    words = f"All experts are {console.size(every)}: moving whole layers for each token would take"
    return f"{words} {number(every / per_token)} times as much."


def _against_link(found: dict[str, Any]) -> str | None:
    reached, own = figure(found.get("bandwidth")), figure(found.get("link_bandwidth"))
    if not reached:
        return None
    words = f"The link ({found['link']})" if isinstance(found.get("link"), str) else "The link"
    words += f" moved {_rate(reached)}"
    return (
        f"{words}, {percent(reached / own, 0)} of the {_rate(own)} that it gives alone."
        if own
        else f"{words}."
    )


def _prompts(found: dict[str, Any]) -> str | None:
    """What reading the prompts took, beside all the other figures."""
    nbytes, tokens = figure(found.get("bytes")), figure(found.get("tokens"))
    if nbytes is None or not tokens:
        return None
    words = f"Reading the prompts, not counted above: {console.size(nbytes)} for {number(int(tokens))} tokens"
    elapsed = figure(found.get("elapsed"))
    return f"{words} in {console.duration(elapsed)}." if elapsed else f"{words}."


def _fetched(found: dict[str, Any]) -> str | None:
    nbytes, hits = figure(found.get("bytes")), figure(found.get("hit_rate"))
    if nbytes is None:
        return None
    words = f"{console.size(nbytes)} in all"
    per_token = _per_token(found)
    words += f", {console.size(per_token)} for each token" if per_token is not None else ""
    return f"{words}; {percent(hits)} of what was asked for was there." if hits is not None else f"{words}."


def _guessed(found: dict[str, Any]) -> str | None:
    """How good the guesses at the next layer's experts were."""
    made, right = figure(found.get("predicted")), figure(found.get("predicted_right"))
    if not made or right is None:
        return None
    return f"Of {number(int(made))} experts expected ahead, {percent(right / made)} were asked for."


def _names(rows: Sequence[Row]) -> list[str]:
    return short_names([str(row.get("layer") or index) for index, row in enumerate(rows)])


def _sum(rows: Sequence[Row], key: str) -> float | None:
    there = [value for row in rows if (value := figure(row.get(key))) is not None]
    return sum(there) if there else None


def _bytes(value: Any) -> str:
    nbytes = figure(value)
    return NONE if nbytes is None else console.size(nbytes)


def _rate(value: float) -> str:
    return f"{console.size(value)}/s"


def _time(seconds: float | None) -> str:
    """Seconds as people say them, milliseconds below a tenth."""
    if seconds is None:
        return NONE
    return f"{number(1000 * seconds)} ms" if 0 < seconds < 0.1 else console.duration(seconds)
