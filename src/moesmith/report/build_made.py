"""What a build made of what: experts, sizes, time, and the proof that it is what it should be."""

from __future__ import annotations

from typing import Any

from moesmith import console

from . import build_charts
from .markup import Html, join, table, tag
from .parts import Section, beside, chart, section, shown, to_table
from .theme import STAND_INS
from .values import NONE, figure, mapping, number, records


def made(build: dict[str, Any]) -> Section | None:
    """What was made of what, and the proof that it is what it should be."""
    entries = [(name, value) for name, value in _entries(build) if value]
    energy = shown(
        chart(
            build_charts.energy(build, STAND_INS),
            "energy",
            "Share of the energy that low rank keeps, by layer.",
        ),
        join("Of each source's difference from the base, squared and summed. ", to_table("t-energy")),
        "Energy that low rank keeps",
    )
    facts = tag("dl", [[tag("dt", name), tag("dd", value)] for name, value in entries]) if entries else None
    return section(
        "built",
        "Build",
        "What was built?",
        _experts(build),
        beside(energy, facts) if energy else facts,
    )


def _experts(build: dict[str, Any]) -> Html | None:
    found = records(build.get("experts"))
    if not found:
        return None
    words = [key for key in ("source", "adapter") if any(row.get(key) for row in found)]
    counts = [
        key for key in ("documents", "tokens") if any(figure(row.get(key)) is not None for row in found)
    ]
    rows = [
        [
            str(row.get("name") or index),
            *(tag("td", row.get(key) or NONE, class_="words path") for key in words),
            *(number(row.get(key)) for key in counts),
        ]
        for index, row in enumerate(found)
    ]
    head = ["expert", *(tag("th", key, scope="col", class_="words") for key in words), *counts]
    return table("Experts", head, rows, id="t-experts")


def _entries(build: dict[str, Any]) -> list[tuple[str, Any]]:
    """Names and words of what is not a list: class, sizes, time, proof."""

    def size(key: str) -> str | None:
        value = figure(build.get(key))
        return None if value is None else console.size(value)

    parameters, proof = mapping(build.get("parameters")), mapping(build.get("proof"))
    total, active = figure(parameters.get("total")), figure(parameters.get("active"))
    counts = [
        f"{console.count(value)} {words}"
        for value, words in ((total, "in all"), (active, "active per token"))
        if value
    ]
    copied, new = size("bytes_copied"), size("bytes_made")
    ways = [f"{value} {words}" for value, words in ((copied, "copied byte for byte"), (new, "made")) if value]
    written = size("bytes")
    shared = mapping(build.get("shared_expert"))
    source = shared.get("source_model")
    route = [build.get("route"), build.get("route_reason")]
    seconds = figure(build.get("seconds"))
    kind = [tag("code", build["class"]) if build.get("class") else None]
    kind += [join(f" ({build['model_type']})") if build.get("model_type") else None]
    modes = [
        (str(name).replace("_", " "), number(value))
        for name, value in mapping(build.get("modes")).items()
        if figure(value) is not None
    ]
    return [
        ("class", join(kind)),
        ("base model", build.get("base")),
        ("experts made by", build.get("init")),
        ("shared expert", f"{source}, weight {number(shared.get('weight'))}" if source else None),
        ("router made by", ": ".join(str(one) for one in route if one)),
        ("experts per token", number(build["top_k"]) if figure(build.get("top_k")) is not None else None),
        ("parameters", ", ".join(counts)),
        ("bytes", (f"{written}: " if written and ways else written or "") + ", ".join(ways)),
        ("time", console.duration(seconds) if seconds is not None else None),
        ("peak memory", size("peak_bytes")),
        ("peak memory, judging", size("judging_peak_bytes")),
        ("dtype", build.get("dtype")),
        ("seed", number(build["seed"]) if figure(build.get("seed")) is not None else None),
        *modes,
        ("adapters", _adapters(build)),
        ("proof", _proof(proof)),
    ]


def _adapters(build: dict[str, Any]) -> str:
    """How much of each adapter went into its expert, and what of it has no place in an FFN."""
    names = [str(one.get("name") or place) for place, one in enumerate(records(build.get("experts")))]
    said = []
    for row in records(mapping(build.get("modes")).get("adapters")):
        expert = row.get("expert")
        name = names[expert] if isinstance(expert, int) and 0 <= expert < len(names) else expert
        left = [f"{number(count)} {module}" for module, count in mapping(row.get("left_out")).items()]
        over = f", left out {', '.join(left)}" if left else ""
        said.append(f"{name}: {number(row.get('merged'))} matrices merged{over}")
    return "; ".join(said)


def _proof(proof: dict[str, Any]) -> Html | None:
    difference, tolerance = figure(proof.get("difference")), figure(proof.get("tolerance"))
    if difference is None:
        return join(proof["what"]) if proof.get("what") else None
    words = [f"{proof['what']}: {number(difference)}" if proof.get("what") else number(difference)]
    words += [f"at most {number(tolerance)} allowed"] if tolerance is not None else []
    words += [f"KL {number(proof['kl'])} nats"] if figure(proof.get("kl")) is not None else []
    words += [f"{number(proof['tokens'])} tokens"] if figure(proof.get("tokens")) is not None else []
    words += [str(proof["dtype"])] if proof.get("dtype") else []
    unit = f" ({proof['unit']})" if proof.get("unit") else ""
    failed = tolerance is not None and difference > tolerance
    bold = [" ", tag("b", "This is too much.", class_="failed")] if failed else None
    return join(", ".join(words) + unit, bold)
