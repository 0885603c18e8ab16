"""The sections of pictures: each a function from its facts to HTML, or None where there is nothing to show.

A section says in a sentence what was found, shows it, and says how to read it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import charts
from .charts import Line
from .heat import heatmap
from .markup import Html, join, tag
from .parts import (
    Section,
    beside,
    chart,
    hint,
    layers_worst_first,
    matrix,
    names_of,
    section,
    sentence,
    shown,
    to_table,
    whole,
)
from .theme import NARROW, STAND_INS
from .values import (
    change,
    figure,
    figures,
    fixed,
    items,
    mapping,
    median,
    number,
    percent,
    records,
    short_list,
)

SAMPLES, SAMPLE_LENGTH = 12, 4000  # what the page shows of the canary; report.json has all


def build(facts: dict[str, Any]) -> list[Section]:
    """Every section that `facts` has something for, in the order of the page."""
    makers: list[Callable[[dict[str, Any]], Section | None]] = [
        pareto,
        divergence,
        heatmap,
        retained,
        concentration,
        domains,
        reliability,
        agreement,
        similarity,
        canary,
    ]
    return [made for maker in makers if (made := maker(facts)) is not None]


def pareto(facts: dict[str, Any]) -> Section | None:
    """Experts kept against the damage, one picture per measure."""
    pareto = mapping(facts.get("pareto"))
    series = records(pareto.get("series"))
    panes = []
    for measure in charts.MEASURES:
        wide = charts.pareto(pareto, measure, STAND_INS)
        narrow = charts.pareto(pareto, measure, STAND_INS, NARROW)
        if wide is not None:
            alt = (
                f"Line chart of {measure.axis} over the experts kept per layer, for {len(series)} candidates."
            )
            pictures = [
                chart(wide, f"pareto-{measure.key}", alt, "wide"),
                chart(narrow, f"pareto-narrow-{measure.key}", alt, "narrow"),
            ]
            panes.append((measure.name, pictures))
    if not panes:
        return None
    inputs = [
        [
            tag("input", type="radio", name="measure", id=f"m{index}", checked=index == 0),
            tag("label", name, for_=f"m{index}"),
        ]
        for index, (name, _) in enumerate(panes)
    ]
    bodies = [tag("div", pictures, class_=f"pane p{index}") for index, (_, pictures) in enumerate(panes)]
    choices = inputs if len(panes) > 1 else [tag("input", type="radio", id="m0", checked=True, hidden=True)]
    kinds = {str(one.get("kind")) for one in series}
    random = bool(records(pareto.get("random_band")))
    reading = [
        "Measured on text that the profile has not seen.",
        "Solid: experts dropped. Dashed: experts merged." if "merge" in kinds else None,
        "Star: after healing." if "healed" in kinds else None,
        "Grey: random choices of the same size; a criterion inside of the band is no better than chance."
        if random
        else None,
        "Vertical lines are 95 % intervals over documents.",
    ]
    return section(
        "pareto",
        "Curves",
        "How far can it be cut?",
        sentence(_best(series)),
        tag("div", choices, bodies, class_="tabs", role="group", aria_label="Measure"),
        hint(join(" ".join(filter(None, reading)), " ", to_table("t-candidates"))),
    )


def _best(series: list[dict[str, Any]]) -> str | None:
    """Who does least damage at the smallest count that several candidates were measured at."""
    by_count: dict[float, list[tuple[float, str]]] = {}
    for one in series:
        for point in records(one.get("points")):
            keep, kl = figure(point.get("keep")), figure(point.get("kl"))
            if keep is not None and kl is not None and one.get("kind") != "healed":
                by_count.setdefault(keep, []).append((kl, str(one.get("name", "?"))))
    counts = [count for count, found in by_count.items() if len(found) > 1]
    if not counts:
        return None
    few, many = min(counts), max(counts)
    parts = []
    for count in [many, few] if many != few else [few]:
        (kl, name), *others = sorted(by_count[count])
        parts.append(
            f"{name} at {count:g} experts (KL {number(kl)}; "
            f"the worst, {others[-1][1]}, {number(others[-1][0])})"
        )
    return f"Least damage: {'; '.join(parts)}."


def divergence(facts: dict[str, Any]) -> Section | None:
    """How far each candidate is from the original, with intervals."""
    rows = records(facts.get("divergence"))
    kl, ppl = [], []
    by_domain: dict[str, list[tuple[str, float, Any]]] = {}
    for row in rows:
        name = str(row.get("name", "?"))
        if (value := figure(row.get("kl_mean"))) is not None:
            kl.append((name, [("", value, row.get("kl_ci"))]))
        if (value := figure(row.get("ppl_ratio"))) is not None:
            ppl.append((name, [("", value, row.get("ppl_ratio_ci"))]))
        for domain, found in mapping(row.get("per_domain")).items():
            if (value := figure(ratio_of(found))) is not None:
                ends = mapping(found).get("ppl_ratio_ci", mapping(found).get("ci"))
                by_domain.setdefault(domain, []).append((name, value, ends))
    said = None
    if len(rows) == 1:
        row = rows[0]
        said = (
            f"The most likely next token is the same at {percent(row.get('top1'))} of the positions; "
            f"perplexity changes by {change(row.get('ppl_ratio'))}; "
            f"KL is {number(row.get('kl_mean'))} nats per token."
        )

    def picture(rows: Any, name: str, heading: str, axis: str, zero: float) -> Html | None:
        if not rows:
            return None
        alt = f"{heading}: {len(rows)} rows with 95 % intervals."
        return shown(chart(charts.intervals(rows, axis, zero, STAND_INS), name, alt), heading=heading)

    pictures = [
        picture(kl, "div-kl", "KL", "nats per token", 0),
        picture(ppl, "div-ppl", "Perplexity", "times the original", 1),
        picture(list(by_domain.items()), "div-domains", "Perplexity by domain", "times the original", 1),
    ]
    if not any(pictures):
        return None
    return section(
        "divergence",
        "Distance",
        "How far from the original?",
        sentence(said),
        tag("div", pictures, class_="row"),
        hint(join("On held-out text; lines are 95 % intervals over documents. ", to_table("t-divergence"))),
    )


def ratio_of(found: Any) -> Any:
    """A domain's perplexity ratio, given alone or as {"ppl_ratio": ...}."""
    return found.get("ppl_ratio", found.get("ratio")) if isinstance(found, dict) else found


def retained(facts: dict[str, Any]) -> Section | None:
    """What the kept experts hold of each layer's weighted output."""
    rows = records(facts.get("retained"))
    values = [figure(row.get("norm")) for row in rows]
    order = layers_worst_first(values)
    if not order:
        return None
    names = [str(row.get("layer", index)) for index, row in enumerate(rows)]
    worst = order[0]
    line = Line("retained", values, [row.get("ci") for row in rows])
    picture = charts.by_layer(names, [line], "weighted output norm kept, %", STAND_INS, 100, worst=worst)
    alt = (
        f"Share of the weighted output norm kept in each of {len(rows)} layers; worst: layer {names[worst]}."
    )
    said = (
        f"The worst layer, {names[worst]}, keeps {percent(values[worst], 2)} of its weighted output norm; "
        f"half of the layers keep {percent(median(values), 2)} or more."
    )
    weakest = tag("ol", [tag("li", f"layer {names[i]}: {percent(values[i], 2)}") for i in order[:6]])
    return section(
        "retained",
        "Layers",
        "What does each layer keep?",
        beside(
            shown(chart(picture, "retained", alt)),
            sentence(said),
            [tag("h3", "Weakest layers"), weakest] if len(order) > 6 else None,
            hint(to_table("t-retained")),
        ),
    )


def concentration(facts: dict[str, Any]) -> Section | None:
    """How unequal the experts are."""
    found = mapping(facts.get("concentration"))
    gini = figures(found.get("gini"))
    shares = {key: figures(found.get(key)) for key in ("top8_share", "bottom_half_share")}
    needed = {str(key): figures(value) for key, value in mapping(found.get("experts_for")).items()}
    count = max([len(gini), *map(len, shares.values()), *map(len, needed.values())])
    names = names_of(facts, count, found.get("layers"))
    lines = [Line(f"{key} %", values) for key, values in needed.items()]
    parts = [
        Line("Gini", gini),
        Line("top 8", shares["top8_share"]),
        Line("bottom half", shares["bottom_half_share"]),
    ]
    pictures = [
        shown(
            chart(
                charts.lorenz(found, STAND_INS),
                "lorenz",
                "Lorenz curves of the experts' contribution, by layer.",
            ),
            "The further from the diagonal, the fewer experts do the work.",
            "Lorenz curves",
        ),
        shown(
            chart(
                charts.by_layer(names, lines, "experts needed", STAND_INS, limits=(0, None)),
                "needed",
                "Experts needed for a share of the contribution, by layer.",
            ),
            "Experts, largest first, that hold this share of the contribution.",
            "Experts needed",
        ),
        shown(
            chart(
                charts.by_layer(names, parts, "share", STAND_INS, limits=(0, None)),
                "shares",
                "Gini coefficient, share of the top 8 and of the bottom half, by layer.",
            ),
            join("Gini: 0 is equal shares, 1 is one expert for everything. ", to_table("t-concentration")),
            "Gini and shares",
        ),
    ]
    there = [value for value in gini if value is not None]
    said = (
        f"Gini {fixed(median(gini))} in the median layer, {fixed(min(there))} to {fixed(max(there))}."
        if there
        else None
    )
    eighty = median(needed.get("80", []))
    experts = figure(mapping(facts.get("heatmap")).get("experts")) or figure(
        mapping(facts.get("pareto")).get("experts")
    )
    of = f" of {experts:g}" if experts else ""
    more = (
        f"80 % of the contribution comes from {eighty:g}{of} experts in the median layer."
        if eighty is not None
        else None
    )
    return section(
        "concentration",
        "Concentration",
        "How unequal are the experts?",
        sentence(said, more, dead_experts(found.get("dead"), names)),
        tag("div", pictures, class_="row") if any(pictures) else None,
    )


def dead_count(one: Any) -> int | None:
    """Dead experts of one layer, given as a count or as ids."""
    if isinstance(one, list):
        return len(one)
    value = figure(one)
    return None if value is None else int(value)


def dead_experts(dead: Any, names: list[str]) -> str | None:
    """How many experts were never chosen, and in which layers."""
    if not isinstance(dead, list):
        return None
    counts = [(names[i] if i < len(names) else str(i), dead_count(one), one) for i, one in enumerate(dead)]
    found = [(name, count, ids) for name, count, ids in counts if count]
    if not found:
        return "No expert was left without a token." if counts else None
    where = [
        f"layer {name}: {short_list(ids) if isinstance(ids, list) else count}" for name, count, ids in found
    ]
    total = sum(count for _, count, _ in found)
    words = "expert was" if total == 1 else "experts were"
    return f"{total:,} {words} never chosen ({short_list(where, 5)})."


def domains(facts: dict[str, Any]) -> Section | None:
    """Whether domains use different experts, and what pruning for one costs another."""
    found = mapping(facts.get("domains"))
    names = [str(name) for name in items(found.get("names"))]
    regret = [figures(row) for row in items(found.get("regret"))]
    size = figure(found.get("top"))
    best = f"{size:g} most used" if size else "top"
    overlap = matrix(f"Overlap of the {best} experts (Jaccard)", names, found.get("overlap"), fixed)
    pairs = [
        (value, names[i], names[j])
        for i, row in enumerate(regret)
        for j, value in enumerate(row)
        if i != j and value is not None and i < len(names) and j < len(names)
    ]
    top = max((value for value, _, _ in pairs), default=0.0)
    cost = matrix(
        "Loss of the row's domain when pruned for the column's",
        names,
        found.get("regret"),
        percent,
        top,
        warm=True,
    )
    drops = matrix("Overlap of what each would drop (Jaccard)", names, found.get("dropped_overlap"), fixed)
    chance = figure(found.get("chance"))
    values = [figures(row) for row in items(found.get("overlap"))]
    off = [value for i, row in enumerate(values) for j, value in enumerate(row) if i != j]
    said = more = None
    if (middle := median(off)) is not None:
        said = f"Two domains share {fixed(middle)} of their top experts in the median"
        said += f"; chance alone would give {fixed(chance)}." if chance is not None else "."
    if pairs:
        value, row, column = max(pairs)
        more = f"Most expensive: pruned for {column}, {row} loses {percent(value)} of its contribution."
    return section(
        "domains",
        "Domains",
        "Do domains use different experts?",
        sentence(said, more),
        tag("div", overlap, cost, drops, class_="row") if overlap or cost or drops else None,
    )


def reliability(facts: dict[str, Any]) -> Section | None:
    """Whether there was enough text to believe the ranks."""
    found = mapping(facts.get("reliability"))
    halves, tokens = figures(found.get("split_half")), mapping(found.get("tokens_per_expert"))
    names = names_of(facts, len(halves), found.get("layers"))
    low = min((value for value in halves if value is not None), default=0.0)
    top = 1 + 0.05 * (1 - low)  # room for a mark at 1, and no tick above it
    lines = [Line("split half", halves)]
    picture = charts.by_layer(names, lines, "rank agreement of two halves", STAND_INS, limits=(None, top))
    warning = found.get("warning")
    documents = f"{number(found['documents'])} " if figure(found.get("documents")) is not None else ""
    said = more = None
    order = layers_worst_first(halves)
    if order:
        said = (
            f"Ranked from one half of the {documents}documents and from the other, experts agree with "
            f"Spearman {fixed(median(halves))} in the median layer; lowest {fixed(halves[order[0]])} in "
            f"layer {names[order[0]]}."
        )
    if figure(tokens.get("min")) is not None:
        which = [f"{key} {tokens[key]}" for key in ("layer", "expert") if tokens.get(key) is not None]
        more = f"Tokens per expert: median {number(tokens.get('median'))}, fewest {number(tokens.get('min'))}"
        more += f" ({', '.join(which)})." if which else "."
    return section(
        "reliability",
        "Reliability",
        "Is there enough text behind it?",
        beside(
            shown(chart(picture, "halves", f"Split-half rank agreement in each of {len(halves)} layers.")),
            tag("p", tag("b", "Warning: "), warning, class_="warning", role="note") if warning else None,
            sentence(said, more),
            hint(join("1 is the same order from both halves, 0 is no relation. ", to_table("t-reliability")))
            if order
            else None,
        ),
    )


def agreement(facts: dict[str, Any]) -> Section | None:
    """Where the criteria disagree."""
    found = mapping(facts.get("agreement"))
    names = [str(name) for name in items(found.get("criteria"))]
    ranks = matrix("Rank agreement (Spearman)", names, found.get("spearman"), fixed)
    drops = matrix("Overlap of what they drop (Jaccard)", names, found.get("dropped_jaccard"), fixed)
    pairs = [
        (value, names[i], names[j])
        for i, row in enumerate(items(found.get("spearman")))
        for j, value in enumerate(figures(row))
        if j > i and value is not None and j < len(names)
    ]
    said = None
    if pairs:
        value, one, other = min(pairs)
        said = f"Furthest apart: {one} and {other}, Spearman {fixed(value)}."
    note = mapping(facts.get("units")).get("note")
    links = to_table("t-criteria", "What each criterion adds up") if mapping(found.get("units")) else None
    more = (
        to_table("t-units", "Layer by layer")
        if records(mapping(facts.get("units")).get("per_layer"))
        else None
    )
    words = join([whole(note), " "] if note else None, more, " " if more and links else None, links)
    return section(
        "agreement",
        "Criteria",
        "Do the criteria agree?",
        sentence(said),
        hint(words) if words else None,
        tag("div", ranks, drops, class_="row") if ranks or drops else None,
    )


def similarity(facts: dict[str, Any]) -> Section | None:
    """Whether experts resemble each other enough to be merged."""
    found = mapping(facts.get("similarity"))
    kinds = [("raw", "weights"), ("aligned", "weights, neurons aligned"), ("output", "outputs")]
    lines = [Line(words, figures(found.get(key))) for key, words in kinds]
    names = names_of(facts, max(len(line.values) for line in lines), found.get("layers"))
    picture = charts.by_layer(names, lines, "mean cosine of two experts", STAND_INS)
    return section(
        "similarity",
        "Similarity",
        "Are experts alike?",
        beside(
            shown(
                chart(
                    picture, "similarity", "Mean cosine of two experts by layer: weights, aligned, outputs."
                )
            ),
            sentence(str(found["note"]) if found.get("note") else None),
            hint(
                join(
                    "Mean over pairs of a layer. Neurons have no order, so raw weights look unlike even "
                    "where experts are copies. ",
                    to_table("t-similarity"),
                )
            )
            if picture
            else None,
        ),
    )


def canary(facts: dict[str, Any]) -> Section | None:
    """What the models write, side by side."""
    samples = records(mapping(facts.get("canary")).get("samples"))
    cards = [_sample(sample) for sample in samples[:SAMPLES]]
    rest = f"{len(samples) - SAMPLES} more samples are in report.json." if len(samples) > SAMPLES else None
    return section(
        "canary",
        "Samples",
        "What do they write?",
        hint(
            join(
                "Greedy answers to the same prompts, as they came. ",
                to_table("t-canary", "Loop rates and lengths"),
            )
            if records(mapping(facts.get("canary")).get("rows"))
            else "Greedy answers to the same prompts, as they came."
        )
        if cards
        else None,
        cards,
        hint(rest) if rest else None,
    )


def _sample(sample: dict[str, Any]) -> Html:
    def side(key: str, fallback: str) -> Html:
        text = sample.get(key)
        words = "" if text is None else str(text)
        cut = (
            f" … ({number(len(words) - SAMPLE_LENGTH)} more characters in report.json)"
            if len(words) > SAMPLE_LENGTH
            else ""
        )
        loop = tag("em", " loops") if sample.get(f"loop_{key}") else None
        body = (
            tag("pre", words[:SAMPLE_LENGTH], cut, dir="auto", tabindex="0")
            if words.strip()
            else hint("(empty answer)")
        )
        return tag("div", tag("h4", sample.get(f"{key}_name") or fallback, loop), body)

    prompt = sample.get("prompt")
    return tag(
        "article",
        tag("p", str(prompt)[:SAMPLE_LENGTH], class_="prompt", dir="auto") if prompt else None,
        tag("div", side("a", "original"), side("b", "candidate"), class_="sides"),
        class_="sample",
    )
