"""The tables behind the pictures, and how everything was measured."""

from __future__ import annotations

import math
from typing import Any

from . import build_tables
from .markup import Html, join, prose, table, tag
from .parts import Section, keep_used, layers_worst_first, names_of, section, with_interval
from .sections import dead_count, ratio_of
from .values import (
    NONE,
    change,
    figure,
    figures,
    fixed,
    items,
    mapping,
    number,
    percent,
    records,
    short_list,
)


def build(facts: dict[str, Any]) -> list[Section]:
    """The tables that `facts` has something for, as one section; then notes; then how it was measured."""
    makers = [
        divergence,
        candidates,
        canary,
        retained,
        concentration,
        reliability,
        criteria,
        units,
        similarity,
        *build_tables.MAKERS,
    ]
    found = [
        section("tables", "Tables", "Tables", [maker(facts) for maker in makers]),
        section("notes", "Notes", "Notes", _notes(facts)),
        section("how", "Method", "How was it measured?", how(facts)),
    ]
    return [one for one in found if one is not None]


def divergence(facts: dict[str, Any]) -> Html | None:
    """KL, agreement and perplexity of each candidate, then of each domain."""
    found = records(facts.get("divergence"))
    if not found:
        return None
    rows = [[row.get("name", "?"), *_distance(row)] for row in found]
    head = ["candidate", *DISTANCE]
    caption = "Distance from the original (KL in nats per token)"
    whole = table(caption, *keep_used(head, rows), id="t-divergence")
    domains = [
        [
            f"{row.get('name', '?')}, {domain}" if len(found) > 1 else domain,
            *_distance(one if isinstance(one, dict) else {"ppl_ratio": one}),
        ]
        for row in found
        for domain, one in mapping(row.get("per_domain")).items()
    ]
    if not domains:
        return whole
    return join(
        whole, table("The same by domain", *keep_used(["domain", *DISTANCE], domains), id="t-domains")
    )


DISTANCE = ["KL, mean", "KL, median", "KL, 99th pct.", "same top token", "perplexity", "from", "to", "tokens"]


def _distance(row: dict[str, Any]) -> list[Any]:
    """The cells under DISTANCE. Perplexity as its change; from and to are the two perplexities."""
    return [
        with_interval(number(row.get("kl_mean")), row.get("kl_ci")),
        number(row.get("kl_median")),
        number(row.get("kl_p99")),
        percent(row.get("top1")),
        with_interval(change(ratio_of(row)), row.get("ppl_ratio_ci", row.get("ci")), change),
        number(row.get("ppl_a", row.get("a"))),
        number(row.get("ppl_b", row.get("b"))),
        number(row.get("tokens")),
    ]


def candidates(facts: dict[str, Any]) -> Html | None:
    """Every point of the curves, grouped by count; the least KL of each count in bold."""
    pareto = mapping(facts.get("pareto"))
    points = [
        (keep, one, point)
        for one in records(pareto.get("series"))
        for point in records(one.get("points"))
        if (keep := figure(point.get("keep"))) is not None
    ]
    band = {
        keep: row
        for row in records(pareto.get("random_band"))
        if (keep := figure(row.get("keep"))) is not None
    }
    if not points and not band:
        return None
    domains = list(dict.fromkeys(name for _, _, point in points for name in mapping(point.get("ppl"))))
    body = []
    columns = 7 + len(domains)
    for count in sorted({keep for keep, _, _ in points} | set(band), reverse=True):
        here = [(one, point) for keep, one, point in points if keep == count]
        here.sort(key=lambda pair: figure(pair[1].get("kl")) or math.inf)
        for index, (one, point) in enumerate(here):
            kind = one.get("kind")
            name = str(one.get("name", "?"))
            name += f" ({kind})" if kind in ("merge", "healed") and str(kind) not in name else ""
            best = "best" if index == 0 and len(here) > 1 else None
            ppl = mapping(point.get("ppl"))
            cells = [
                tag("td", with_interval(number(point.get("kl")), point.get("kl_ci")), class_=best),
                *(tag("td", number(point.get(key))) for key in ("kl_median", "kl_p99")),
                tag("td", percent(point.get("top1"))),
                tag("td", change(point.get("ppl_ratio"))),
                *(tag("td", change(ppl.get(domain))) for domain in domains),
            ]
            body.append(_candidate(count, name, cells, first=index == 0))
        if count in band:
            row = band[count]
            words = f"{number(row.get('kl_lo'))} to {number(row.get('kl_hi'))}"
            cells = [tag("td", words), tag("td", number(row.get("kl_median")))]
            empty = [tag("td", NONE) for _ in range(columns - 4)]
            body.append(_candidate(count, "random, range", cells + empty, first=not here))
    perplexities = mapping(mapping(pareto.get("original")).get("ppl"))
    original = [f"{name} {number(value)}" for name, value in perplexities.items()]
    names = [
        "KL, mean",
        "KL, median",
        "KL, 99th pct.",
        "same top token",
        "perplexity",
        *(f"… {d}" for d in domains),
    ]
    head = tag(
        "tr",
        tag("th", "kept", scope="col"),
        tag("th", "candidate", scope="col", class_="words"),
        [tag("th", name, scope="col") for name in names],
    )
    caption = "Candidates by experts kept (KL in nats per token; bold: least at that count)"
    inner = tag(
        "table",
        tag("caption", tag("span", caption)),
        tag("thead", head),
        tag("tbody", body),
        id="t-candidates",
    )
    note = tag("p", f"Original, perplexity: {', '.join(original)}.", class_="hint") if original else None
    return join(tag("div", inner, class_="scroll", tabindex="0", role="region", aria_label=caption), note)


def _candidate(count: float, name: str, cells: list[Html], first: bool) -> Html:
    words = [tag("th", f"{count:g}", scope="row"), tag("td", name, class_="words")]
    return tag("tr", words, cells, class_="group" if first else None)


def canary(facts: dict[str, Any]) -> Html | None:
    """Loops, lengths and ends of the greedy answers."""
    rows = [
        [
            row.get("name", "?"),
            percent(row.get("loop_rate")),
            "×" + number(row.get("length_ratio")) if figure(row.get("length_ratio")) is not None else NONE,
            percent(row.get("eos_rate")),
            percent(row.get("empty_rate")),
            number(row.get("n")),
        ]
        for row in records(mapping(facts.get("canary")).get("rows"))
    ]
    if not rows:
        return None
    head = [
        "",
        "answers that loop",
        "length, times the original's",
        "answers that end",
        "empty answers",
        "answers",
    ]
    return table("Canary: greedy answers", *keep_used(head, rows), id="t-canary")


def retained(facts: dict[str, Any]) -> Html | None:
    """What each layer keeps; the worst one in bold."""
    found = records(facts.get("retained"))
    values = [figure(row.get("norm")) for row in found]
    rows = [
        [
            row.get("layer", index),
            number(row.get("keep")),
            with_interval(percent(row.get("norm"), 2), row.get("ci"), lambda v: percent(v, 2)),
            number(row.get("tokens_min")),
            number(row.get("tokens_median")),
        ]
        for index, row in enumerate(found)
    ]
    if not rows:
        return None
    head = ["layer", "experts", "weighted output norm kept", "tokens per expert, fewest", "median"]
    worst = layers_worst_first(values)[:1] if len(rows) > 1 else []
    units = list(dict.fromkeys(str(row["unit"]) for row in found if row.get("unit")))
    caption = f"Kept per layer (measured by {units[0]})" if len(units) == 1 else "Kept per layer"
    return table(caption, *keep_used(head, rows), bold=worst, id="t-retained")


def concentration(facts: dict[str, Any]) -> Html | None:
    """Gini, experts needed, shares and dead experts of each layer."""
    found = mapping(facts.get("concentration"))
    columns: dict[str, list[str]] = {"Gini": [fixed(v) for v in figures(found.get("gini"))]}
    for share, values in mapping(found.get("experts_for")).items():
        columns[f"experts for {share} %"] = [NONE if v is None else number(int(v)) for v in figures(values)]
    columns["top 8"] = [percent(v) for v in figures(found.get("top8_share"))]
    columns["bottom half"] = [percent(v) for v in figures(found.get("bottom_half_share"))]
    dead = found.get("dead")
    columns["never chosen"] = [number(dead_count(one)) for one in dead] if isinstance(dead, list) else []
    unit = f" ({found['unit']})" if found.get("unit") else ""
    caption = f"Concentration of the contribution{unit} per layer"
    return _per_layer(caption, "t-concentration", facts, columns, found.get("layers"))


def reliability(facts: dict[str, Any]) -> Html | None:
    """Split-half agreement of each layer."""
    found = mapping(facts.get("reliability"))
    columns = {"Spearman of two halves": [number(value) for value in figures(found.get("split_half"))]}
    return _per_layer(
        "Split-half reliability per layer", "t-reliability", facts, columns, found.get("layers")
    )


def criteria(facts: dict[str, Any]) -> Html | None:
    """What each criterion adds up."""
    units = mapping(mapping(facts.get("agreement")).get("units"))
    rows = [[name, tag("td", unit, class_="words wrap")] for name, unit in units.items()]
    return (
        table("What each criterion adds up", ["criterion", "unit"], rows, id="t-criteria") if rows else None
    )


def units(facts: dict[str, Any]) -> Html | None:
    """Where the two figures called contribution disagree."""
    rows = [
        [
            row.get("layer", index),
            number(row.get("spearman")),
            *(
                short_list(items(row.get(key)), 12) or "none"
                for key in ("only_contribution_drops", "only_prompt_norm_drops")
            ),
        ]
        for index, row in enumerate(records(mapping(facts.get("units")).get("per_layer")))
    ]
    head = ["layer", "Spearman", "dropped by contribution alone", "dropped by prompt_norm alone"]
    return table("Two figures called contribution", head, rows, id="t-units") if rows else None


def similarity(facts: dict[str, Any]) -> Html | None:
    """Mean cosine between the experts of each layer."""
    found = mapping(facts.get("similarity"))
    columns = {
        words: [number(value) for value in figures(found.get(key))]
        for key, words in (("raw", "weights"), ("aligned", "weights, neurons aligned"), ("output", "outputs"))
    }
    return _per_layer(
        "Mean cosine of two experts per layer", "t-similarity", facts, columns, found.get("layers")
    )


def _per_layer(
    caption: str, key: str, facts: dict[str, Any], columns: dict[str, list[str]], own: Any = None
) -> Html | None:
    count = max(map(len, columns.values()), default=0)
    if not count:
        return None
    names = names_of(facts, count, own)
    rows = [
        [names[i], *(values[i] if i < len(values) else NONE for values in columns.values())]
        for i in range(count)
    ]
    return table(caption, *keep_used(["layer", *columns], rows), id=key)


def _notes(facts: dict[str, Any]) -> Html | None:
    said = mapping(facts.get("units")).get("note")  # stands with the criteria already
    notes = facts.get("notes")
    notes = [note for note in notes if note and note != said] if isinstance(notes, list) else []
    return tag("ul", [tag("li", prose(note)) for note in notes]) if notes else None


def how(facts: dict[str, Any]) -> Html | None:
    """Command, versions, seeds, hashes: what it takes to measure it again."""
    entries = []
    for key, value in mapping(facts.get("how")).items():
        if value is None or value == {} or value == []:
            continue
        if isinstance(value, dict):
            shown: Any = ", ".join(f"{name} {one}" for name, one in value.items() if one is not None)
        elif key == "command" or key.endswith("hash"):
            shown = tag("code", value)
        elif isinstance(value, list):
            shown = ", ".join(map(str, value))
        else:
            shown = number(value) if isinstance(value, float) else value
        entries += [tag("dt", key.replace("_", " ")), tag("dd", shown)]
    return tag("dl", entries) if entries else None
