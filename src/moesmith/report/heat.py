"""The layer x expert map: its data, packed, and the controls that page.js brings to life."""

from __future__ import annotations

import json
from typing import Any

from .markup import Html, join, tag
from .parts import Section, hint, names_of, section, sentence
from .theme import viridis
from .values import items, mapping, pack

VALUES = 380_000  # two characters each: about 760 kB, so that a page stays below 1 MB


def heatmap(facts: dict[str, Any]) -> Section | None:
    """Layer x expert, any statistic, any domain: data for the script."""
    heat = mapping(facts.get("heatmap"))
    statistics: dict[str, dict[str, Any]] = {}
    domains, cut, room = ["all"], list[str](), VALUES
    for key, one in mapping(heat.get("statistics")).items():
        found = mapping(mapping(one).get("by_domain"))
        if sum(map(_size, found.values())) > room:
            alone = "all" if found.get("all") else next(iter(found), "all")
            found = {alone: found.get(alone)}
            cut.append(str(one.get("label") or key))
        room -= sum(map(_size, found.values()))
        packed = {name: pack(rows) for name, rows in found.items() if rows}
        packed = {name: one for name, one in packed.items() if any(one["rows"])}
        if packed:
            statistics[key] = {
                "label": str(one.get("label") or key),
                "unit": str(one.get("unit") or ""),
                "by_domain": packed,
            }
            domains += [name for name in packed if name not in domains]
    if not statistics:
        return None
    dropped = [ids if isinstance(ids, list) else [] for ids in items(heat.get("dropped"))]
    start = "contribution" if "contribution" in statistics else next(iter(statistics))
    layers = max(len(one["rows"]) for stat in statistics.values() for one in stat["by_domain"].values())
    data = {
        "layers": names_of(facts, layers),
        "domains": [name for name in domains if any(name in one["by_domain"] for one in statistics.values())],
        "statistics": statistics,
        "dropped": dropped if any(dropped) else [],
        "colours": viridis(),
        "start": {"statistic": start, "domain": "all"},
    }
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    counts = sorted(len(ids) for ids in dropped)
    said = None
    if any(counts):
        each = f"{counts[0]}" if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
        said = (
            f"Each layer drops {each} of {heat.get('experts', 'its')} experts: those with the white outline."
        )
    return section(
        "heatmap",
        "Experts",
        "Which experts matter?",
        sentence(said),
        hint(f"Too large for a page, so without domains: {', '.join(cut)}. report.json has them.")
        if cut
        else None,
        tag("noscript", hint("This map needs JavaScript. Its figures are in report.json.")),
        tag("div", _heat_controls(), _heat_body(bool(any(counts))), id="heat-app", hidden=True),
        tag("script", Html(text), type="application/json", id="heat-data"),
    )


def _size(rows: Any) -> int:
    return sum(len(row) for row in rows if isinstance(row, list)) if isinstance(rows, list) else 0


def _heat_controls() -> Html:
    def select(words: str, key: str, *options: tuple[str, str]) -> Html:
        choices = [tag("option", name, value=value) for value, name in options]
        return tag("label", words, tag("select", choices, id=key))

    scales = (
        ("layer", "within each layer"),
        ("model", "over the whole model"),
        ("rank", "rank in the layer"),
    )
    return tag(
        "div",
        select("Statistic", "heat-statistic"),
        select("Domain", "heat-domain"),
        select("Colour", "heat-scale", *scales),
        select("Order", "heat-order", ("id", "expert number"), ("value", "largest first")),
        class_="controls",
    )


def _heat_body(dropped: bool) -> Html:
    inner = tag(
        "div",
        tag("div", id="heat-ticks", class_="heat-ticks", aria_hidden="true"),
        tag("canvas", id="heat", role="img", aria_label="Heatmap of layers by experts"),
        class_="heat-inner",
        id="heat-inner",
    )
    label = "Heatmap. Arrow keys move from expert to expert, Enter lists every statistic of one."
    scroll = tag(
        "div", inner, class_="heat-scroll", id="heat-scroll", tabindex="0", role="group", aria_label=label
    )
    rows = tag("div", id="heat-rows", class_="heat-rows", aria_hidden="true")
    key = tag(
        "p",
        tag("span", id="heat-low"),
        tag("span", class_="bar", id="heat-bar", aria_hidden="true"),
        tag("span", id="heat-high"),
        [tag("span", class_="box", aria_hidden="true"), "dropped"] if dropped else None,
        tag("span", class_="hole", aria_hidden="true"),
        "no figure",
        class_="key",
    )
    return join(
        tag(
            "div",
            tag("div", rows, scroll, class_="heat-frame"),
            tag("div", class_="tip", id="heat-tip", role="status"),
            class_="heat",
            id="heat-box",
        ),
        key,
        hint(
            "One row per layer, one cell per expert. Point, tap or use the arrow keys for a value; click or "
            "Enter for all statistics of that expert. Values on this page have three digits."
        ),
        tag("div", id="heat-detail", class_="scroll", aria_live="polite"),
        tag(
            "details",
            tag("summary", "This map as a table"),
            tag("div", class_="scroll"),
            id="heat-table",
            data_large="1",
        ),
    )
