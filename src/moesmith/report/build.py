"""The sections of a built model: what each router costs, where routing works, who gets what, what it is.

Facts are `facts["build"]`, as docs/report.md names them. A section is None where there is nothing to show.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import build_charts
from .build_charts import DIGITS, grouped
from .build_made import made
from .markup import Html, join, tag
from .parts import (
    Section,
    chart,
    hint,
    matrix,
    section,
    sentence,
    shown,
    to_table,
    verdict,
    whole,
    with_interval,
)
from .theme import NARROW, STAND_INS, WIDE, viridis
from .values import NONE, figure, figures, items, mapping, number, pair, percent, records, short_list

MOVED = 0.05  # accuracy lost from the fit to the model that is worth a sentence
FEW = 10  # documents of a domain below which its interval is too narrow to be taken at its word
BESIDE = 8  # experts up to which the matrix and the map stand side by side


SAME = "All experts are the same, so every router gives the dense model: there is nothing to route yet."


def sections(facts: dict[str, Any]) -> list[Section]:
    """Every section that `facts["build"]` has something for, in the order of the page."""
    build = mapping(facts.get("build"))
    found = [perplexity(build, verdict(facts)), routing(build), load(build), split(build), made(build)]
    return [one for one in found if one is not None]


def perplexity(build: dict[str, Any], opening: dict[str, Any]) -> Section | None:
    """The decisive picture: perplexity by who routes, and the share of the possible gain that is reached."""
    found = mapping(build.get("perplexity"))
    wide = build_charts.perplexity(found, STAND_INS, WIDE)
    narrow = build_charts.perplexity(found, STAND_INS, NARROW)
    rows = [row for _, rows in grouped(found) for row in rows]
    named = "; ".join(f"{row.get('name', '?')} {number(row.get('mean'), DIGITS)}" for row in rows)
    alt = f"Perplexity of {len(rows)} ways to route and models, lower is better: {named}."
    kinds = {kind for kind, _ in grouped(found)}
    said = whole(found.get("verdict"))
    said = said if said != whole(opening.get("sentence")) else None
    same = build.get("identical") is True
    closed = _closed(found) if "oracle" in kinds and "of the gap" not in (said or "") and not same else None
    text = [
        f"{number(found[key])} {key}" for key in ("documents", "tokens") if figure(found.get(key)) is not None
    ]
    gap = bool(build_charts.ends_of_gap(found))
    reading = [
        f"On {' with '.join(text)} of {_text(build)}." if text else None,
        "Lower is better." if wide else None,
        "Lines are 95 % intervals over documents." if any(pair(row.get("mean_ci")) for row in rows) else None,
        "Shaded: the gap between random routing and the oracle, which knows each text's label."
        if gap
        else None,
        _few(found),
    ]
    domains = build_charts.gap_by_domain(build, STAND_INS)
    words = " ".join(filter(None, reading))
    tables = [
        _by_domain(found),
        shown(
            chart(domains, "gap-domains", "Share of the gap closed in each domain."),
            "100 % is the oracle, 0 % random routing; no share where these two are not surely apart.",
            "Gap closed by domain",
        ),
    ]
    few = all(tables) and len(items(found.get("domains"))) <= 4
    return section(
        "perplexity",
        "Perplexity",
        "Do the experts help, and does the router find them?"
        if "oracle" in kinds
        else "What is it worth, against other routing and the dense model?",
        sentence(said, closed, SAME if same else None),
        chart(wide, "perplexity", alt, "wide"),
        chart(narrow, "perplexity-narrow", alt, "narrow"),
        hint(words) if words and wide else None,
        tag("div", tables, class_="row" if few else None) if any(tables) else None,
    )


def _few(perplexity: dict[str, Any]) -> str | None:
    """That intervals over so few documents are not to be taken at their word."""
    fewest = figure(perplexity.get("fewest"))
    if fewest is None or fewest >= FEW:
        return None
    documents = "a single document" if fewest <= 1 else f"{number(int(fewest))} documents"
    why = "which has no interval" if fewest <= 1 else "so the intervals are narrower than they should be"
    return f"One domain has {documents}, {why}: judge on more text before you rely on small differences."


def _text(build: dict[str, Any]) -> str:
    """What the text is that everything was judged on."""
    held_out = mapping(build.get("routing")).get("held_out")
    words = {True: "held-out text", False: "the text that the routers were fitted on"}
    return words[held_out] if isinstance(held_out, bool) else "text"


def _closed(perplexity: dict[str, Any]) -> str | None:
    """`This router closes 83 % [79, 87] of the gap between random routing and the oracle; embed 41 %.`"""

    def share(gap: dict[str, Any]) -> str | None:
        if figure(gap.get("mean")) is None:
            return None
        ends = pair(gap.get("ci"))
        words = f" [{100 * ends[0]:.0f}, {100 * ends[1]:.0f}]".replace("-", "−") if ends else ""
        return f"{percent(gap['mean'], 0)}{words}".replace(" ", "\N{NO-BREAK SPACE}")

    own, embed = mapping(perplexity.get("gap_closed")), mapping(perplexity.get("gap_closed_embed"))
    reason = str(own.get("reason") or "")
    if closed := share(own):
        other = share(embed)
        more = f"; embed closes {other}" if other else ""
        said = f"This router closes {closed} of the gap between random routing and the oracle{more}."
        return f"{said} {whole(reason)}" if reason else said
    return f"No share of a gap can be given: {reason.rstrip('.')}." if reason else None


def _by_domain(perplexity: dict[str, Any]) -> Html | None:
    """Rows by domains; the tint says how far a figure is above the best of its column."""
    groups = grouped(perplexity)
    rows = [mapping(row.get("by_domain")) for _, found in groups for row in found]
    if not rows:
        return None
    named = [str(name) for name in items(perplexity.get("domains"))] or [name for row in rows for name in row]
    best = {
        name: min(there)
        for name in dict.fromkeys(named)
        if (there := [value for row in rows if (value := figure(row.get(name))) is not None])
    }
    names = ["perplexity", "all", *(build_charts.label(name, 32) for name in best)]
    body = []
    for kind, found in groups:
        for index, row in enumerate(found):
            own, name = kind == "router" and index == 0, build_charts.label(row.get("name", "?"), 60)
            cells = [
                tag("th", tag("b", name) if own else name, scope="row"),
                tag("td", with_interval(_ppl(row.get("mean")), row.get("mean_ci"), _ppl), class_="whole"),
                [_shaded(figure(mapping(row.get("by_domain")).get(d)), low) for d, low in best.items()],
            ]
            body.append(tag("tr", cells, class_="group" if index == 0 and len(groups) > 1 else None))
    caption = "Perplexity by domain" if best else "Perplexity"
    inner = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", tag("tr", [tag("th", name, scope="col") for name in names])),
        tag("tbody", body),
        id="t-perplexity",
        class_="matrix ppl",
    )
    return tag(
        "div",
        tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption),
        hint("Bold: the best of a domain. The tint: how far above it, full at twice.") if best else None,
    )


def _shaded(value: float | None, best: float) -> Html:
    over = max(value / best - 1, 0.0) if value is not None and best > 0 else 0.0
    top = value is not None and value == best
    style = f"--tone:var(--warm);--v:{min(52 * over, 52):.0f}%"
    return tag("td", _ppl(value), class_="best" if top else None, style=style)


def _ppl(value: Any) -> str:
    """One digit more than other figures: rows that differ by a percent should not read the same."""
    return number(value, DIGITS)


def routing(build: dict[str, Any]) -> Section | None:
    """At which depth the experts can be told apart, by every way to make a router."""
    found = mapping(build.get("routing"))
    rows = records(found.get("layers"))
    names = build_charts.layer_names(rows)
    chance, _ = build_charts.chances(build)
    wide = build_charts.depth(build, STAND_INS, WIDE)
    narrow = build_charts.depth(build, STAND_INS, NARROW)
    alt = f"Tokens that go to their label's expert first, over {len(rows)} layers, by way to make the router."
    values = [figure(row.get("accuracy")) for row in rows]
    order = sorted((i for i, v in enumerate(values) if v is not None), key=lambda i: values[i] or 0.0)
    mean = figure(found.get("accuracy"))
    against = f" (chance {percent(chance)})" if chance is not None else ""
    said = None
    if mean is not None:
        ends = pair(found.get("accuracy_ci"))
        within = f" [{100 * ends[0]:.1f}, {100 * ends[1]:.1f}]" if ends else ""
        said = f"{percent(mean)}{within} of the tokens go to their label's expert first{against}."
    more = None
    if len(order) > 1 and values[order[0]] != values[order[-1]]:
        low, high = order[0], order[-1]
        more = (
            f"Layer {names[high]} tells the experts apart best, {percent(values[high])}; "
            f"layer {names[low]} least, {percent(values[low])}."
        )
    texts = _majority(found)
    positions = build_charts.positions(build, STAND_INS)
    pictures = [
        shown(
            chart(
                build_charts.shares(build, STAND_INS),
                "shares-depth",
                "Label's expert, by layer, against chance.",
            ),
            "The weight counts: an expert that is chosen second adds less.",
            "Chosen at all, and its weight",
        ),
        shown(
            chart(positions, "positions", "Accuracy by the token's place in its text."),
            join("The first tokens say little about their text. ", to_table("t-positions")),
            "By place in the text",
        ),
    ]
    if not (wide or any(pictures)):
        return None
    tokens = f"{number(found['tokens'])} tokens" if figure(found.get("tokens")) is not None else "tokens"
    held_out = found.get("held_out")
    seen = f"All figures are of {tokens} that the routers were fitted on: on other text they are worse."
    text = f"On {tokens} that no router was fitted on." if held_out else None
    means = "Means over the labels." if mean is not None else None
    thin = "Thick: as it is in the model. Others: as fitted, on what the base's FFNs read." if wide else None
    return section(
        "routing",
        "Routing",
        "At which depth can routing tell the experts apart?",
        sentence(said, _moved(found, str(build.get("route"))), more, texts),
        tag("p", tag("b", "Not held out."), f" {seen}", class_="warning") if held_out is False else None,
        chart(wide, "depth", alt, "wide"),
        chart(narrow, "depth-narrow", alt, "narrow"),
        hint(join(" ".join(filter(None, [text, means, thin])), " ", to_table("t-layers"))),
        tag("div", pictures, class_="row") if any(pictures) else None,
    )


def _majority(routing: dict[str, Any]) -> str | None:
    """In how many documents the label's expert is the most used one; counted where the count is known."""
    majority, documents = figure(routing.get("majority")), figure(routing.get("documents"))
    if majority is None:
        return None
    share = (
        f"{round(majority * documents):,} of {documents:,.0f} documents" if documents else percent(majority)
    )
    words = share if documents else f"{share} of the documents"
    return f"In {words} the most used expert is the label's."


def _moved(routing: dict[str, Any], route: str) -> str | None:
    """How much of the fitted accuracy is lost in the model, where experts change what later layers read.

    A fit leaves the first token of a text out, so the model's figure is taken without it too.
    """
    pairs = [
        (own, fitted)
        for row in records(routing.get("layers"))
        if (own := figure(row.get("accuracy"))) is not None
        and (fitted := figure(mapping(row.get("by_method")).get(route))) is not None
    ]
    own, fitted = (_mean([both[i] for both in pairs]) for i in range(2))
    if own is None or fitted is None:
        return None
    first, tokens = next(iter(records(routing.get("positions"))), {}), figure(routing.get("tokens"))
    there, at_first = figure(first.get("tokens")), figure(first.get("accuracy"))
    if first.get("to") == 0 and tokens and there and at_first is not None and tokens > there:
        own = (own * tokens - at_first * there) / (tokens - there)
    if fitted - own < MOVED:
        return None
    return (
        f"As fitted, on what the base's FFNs read, it was {percent(fitted)}: "
        "in the model the experts change what the layers after them read."
    )


def expert_names(build: dict[str, Any], count: int) -> list[str]:
    """Names for `count` experts: the recipe's, several of one entry numbered; their ids where none fit."""
    names = [str(row.get("name") or index) for index, row in enumerate(records(build.get("experts")))]
    if names and count == len(names):
        return names
    if len(names) > 1 and count % len(names) == 0:
        each = count // len(names)
        return [f"{name} {part}" for name in names for part in range(each)]
    return [f"expert {index}" for index in range(count)]


def load(build: dict[str, Any]) -> Section | None:
    """Whose tokens go where, and how evenly the experts are used."""
    found = mapping(build.get("routing"))
    rows = records(found.get("layers"))
    confusion = [figures(row) for row in items(found.get("confusion"))]
    names = expert_names(build, len(confusion))
    unseen = _without_text(confusion)
    square = matrix(
        "Label (row) and first expert (column), % of the label's tokens",
        [build_charts.label(name, 24) for name in names],
        confusion if len(names) ** 2 <= build_charts.CELLS else None,
        lambda share: NONE if figure(share) is None else f"{100 * share:.0f}",
        diagonal=True,
    )
    width = max((len(figures(row.get("load"))) for row in rows), default=0)
    experts = expert_names(build, width)
    heat = _load_map(rows, experts)
    row = "row" if square and heat and width <= BESIDE else None
    return section(
        "load",
        "Load",
        "Who gets whose tokens?" if square else "How evenly are the experts used?",
        sentence(_mixed(confusion, names), _collapsed(rows, experts, unseen), _unseen(unseen, names)),
        tag("div", square, heat, class_=row) if square or heat else None,
    )


def _load_map(rows: Sequence[dict[str, Any]], experts: Sequence[str]) -> Html | None:
    """The load of every expert in every layer, on a phone and on a desk."""
    width = len(experts)
    if width * len(rows) > build_charts.CELLS:
        return hint("The load of each expert is in report.json: too many for a picture.")
    alt = f"Share of the routing weight of each of {width} experts in each of {len(rows)} layers."
    narrow = build_charts.load(rows, experts, STAND_INS, NARROW)
    if narrow is None:
        return None
    wide = build_charts.load(rows, experts, STAND_INS, WIDE) if width > BESIDE else None
    top = max(value for row in rows for value in figures(row.get("load")) if value is not None)
    return shown(
        join(
            chart(wide, "load", alt, "wide"),
            chart(narrow, "load-narrow", alt, "narrow" if wide else "small"),
        ),
        join(
            _scale(top, bool(build_charts.collapsed(rows))),
            f"Even use would be {percent(1 / width)} each. ",
            to_table("t-layers"),
        ),
        "Load of each expert",
    )


def _scale(top: float, crossed: bool) -> Html:
    colours = ",".join(viridis())
    return tag(
        "span",
        tag("span", "0"),
        tag("span", class_="bar", style=f"background:linear-gradient(90deg,{colours})", aria_hidden="true"),
        tag("span", f"{percent(top)} of the layer's routing weight"),
        tag("span", tag("span", "×", class_="cross", aria_hidden="true"), " under a tenth of even use")
        if crossed
        else None,
        class_="key",
    )


def _mixed(confusion: Sequence[Sequence[float | None]], names: Sequence[str]) -> str | None:
    """The two labels that are mixed up most."""
    pairs = [
        (value, names[i], names[j])
        for i, row in enumerate(confusion)
        for j, value in enumerate(row)
        if i != j and value is not None and value > 0 and j < len(names)
    ]
    if not pairs:
        return None
    value, label, other = max(pairs, key=lambda pair: pair[0])
    return f"Most often mixed up: {percent(value)} of the tokens of {label} go to {other} first."


def _without_text(confusion: Sequence[Sequence[float | None]]) -> list[int]:
    """Labels that no text was judged of, where others have text."""
    empty = [i for i, row in enumerate(confusion) if not any(value is not None for value in row)]
    return empty if len(empty) < len(confusion) else []


def _unseen(unseen: Sequence[int], names: Sequence[str]) -> str | None:
    if not unseen:
        return None
    named = short_list([names[label] for label in unseen])
    return f"No text of {named} was judged, so nothing can be said of how it is found."


def _collapsed(rows: Sequence[dict[str, Any]], names: Sequence[str], unseen: Sequence[int]) -> str | None:
    """Experts with less than a tenth of an even share, by name and layer; one without text of its own need
    not have more."""
    if not any(figures(row.get("load")) for row in rows):
        return None
    layers = build_charts.layer_names(rows)
    by_expert: dict[int, list[str]] = {}
    for layer, expert in build_charts.collapsed(rows):
        if expert not in unseen:
            by_expert.setdefault(expert, []).append(layers[layer])
    if not by_expert:
        return (
            None
            if unseen
            else "No expert has collapsed: each gets at least a tenth of an even share in every layer."
        )

    def where(found: list[str]) -> str:
        if len(found) == len(rows):
            return "every layer" if len(rows) > 1 else f"layer {found[0]}"
        return f"layer{'s' if len(found) > 1 else ''} {short_list(found)}"

    said = [f"{names[expert]} in {where(found)}" for expert, found in sorted(by_expert.items())]
    more = f" and {len(said) - 8} more" if len(said) > 8 else ""
    return f"Collapsed (less than a tenth of an even share): {'; '.join(said[:8])}{more}."


def split(build: dict[str, Any]) -> Section | None:
    """How much of a dense FFN is left when only k of its parts are computed."""
    found = mapping(build.get("split"))
    rows = records(found.get("layers"))
    wide = build_charts.split(build, STAND_INS, WIDE)
    narrow = build_charts.split(build, STAND_INS, NARROW)
    alt = f"Share of what the dense FFN writes that the chosen parts keep, over {len(rows)} layers."
    loss = {key: value for key, value in mapping(found.get("text_loss")).items() if figure(value) is not None}
    said = [f"{str(key).replace('_', ' ')} {number(value)}" for key, value in loss.items()]
    kept = [(figure(row.get("kept")), figure(row.get("random")), figure(row.get("best"))) for row in rows]
    means = [_mean([row[i] for row in kept]) for i in range(3)]
    words = None
    if means[0] is not None:
        others = [
            f"{percent(mean)} {who}"
            for mean, who in zip(
                means[1:], ("with parts chosen at random", "with the best choice"), strict=True
            )
            if mean is not None
        ]
        words = (
            f"The router's choice keeps {percent(means[0])} of what the dense FFN writes, mean of the layers"
        )
        words += f"; {' and '.join(others)}." if others else "."
    fitted = "On the text the routers were fitted on. " if found.get("held_out") is False else None
    return section(
        "split",
        "Split",
        "What does a split keep of the dense FFN?",
        sentence(words, f"Loss on text, nats per token: {', '.join(said)}." if said else None),
        chart(wide, "split", alt, "wide"),
        chart(narrow, "split-narrow", alt, "narrow"),
        hint(join(fitted, "Shares of the summed norms of the parts. ", to_table("t-split")))
        if wide
        else None,
    )


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return math.fsum(there) / len(there) if there else None
