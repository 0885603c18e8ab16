"""The tables behind the pictures of a built model. Perplexities and experts stand beside their pictures."""

from __future__ import annotations

from typing import Any

from . import build_charts
from .markup import Html, table
from .parts import keep_used, with_interval
from .values import figure, figures, fixed, mapping, number, percent, records


def layers(facts: dict[str, Any]) -> Html | None:
    """Accuracy, load and temperature of each layer, and the accuracy of every way to make the router."""
    rows = records(mapping(mapping(facts.get("build")).get("routing")).get("layers"))
    others = build_charts.methods(rows)
    head = [
        "layer", "first", "among the top-k", "share of the weight", "documents, by majority",
        "entropy of the load", "least load", "most load", "temperature", *others,
    ]  # fmt: skip
    body = []
    for name, row in zip(build_charts.layer_names(rows), rows, strict=True):
        load = [value for value in figures(row.get("load")) if value is not None]
        body.append(
            [
                name,
                *(percent(row.get(key)) for key in ("accuracy", "in_top_k", "share", "majority")),
                fixed(row.get("entropy"), 3),
                percent(min(load, default=None)),
                percent(max(load, default=None)),
                number(row.get("temperature")),
                *(percent(mapping(row.get("by_method")).get(other)) for other in others),
            ]
        )
    caption = "Routing per layer: the label's expert, the load, and the accuracy of other routers"
    return table(caption, *keep_used(head, body), id="t-layers") if body else None


def positions(facts: dict[str, Any]) -> Html | None:
    """Accuracy by the token's place in its text."""
    rows = records(mapping(mapping(facts.get("build")).get("routing")).get("positions"))
    body = [
        [
            " to ".join(
                number(int(at)) for key in ("from", "to") if (at := figure(row.get(key))) is not None
            ),
            percent(row.get("accuracy")),
            number(row.get("tokens")),
        ]
        for row in rows
    ]
    return (
        table(
            "Routing by place in the text",
            ["place", "label's expert first", "tokens"],
            body,
            id="t-positions",
        )
        if body
        else None
    )


def energy(facts: dict[str, Any]) -> Html | None:
    """What low rank keeps of the differences, per layer."""
    found = mapping(mapping(mapping(facts.get("build")).get("modes")).get("energy"))
    columns = {str(name): figures(values) for name, values in found.items()}
    count = max(map(len, columns.values()), default=0)
    body = [
        [str(i), *(percent(values[i] if i < len(values) else None) for values in columns.values())]
        for i in range(count)
    ]
    return (
        table("Energy that low rank keeps, per layer", ["layer", *columns], body, id="t-energy")
        if body
        else None
    )


def split(facts: dict[str, Any]) -> Html | None:
    """What a split keeps of the dense FFN, per layer."""
    rows = records(mapping(mapping(facts.get("build")).get("split")).get("layers"))
    body = [
        [name, *(percent(row.get(key)) for key in ("kept", "best", "random", "picked"))]
        for name, row in zip(build_charts.layer_names(rows), rows, strict=True)
    ]
    head = ["layer", "this router", "best choice", "random choice", "of the largest k, picked"]
    return (
        table("Kept of what the dense FFN writes, per layer", *keep_used(head, body), id="t-split")
        if body
        else None
    )


def differences(facts: dict[str, Any]) -> Html | None:
    """Pairs of rows of the perplexities in nats, with intervals."""
    rows = records(mapping(mapping(facts.get("build")).get("perplexity")).get("differences"))
    body = [
        [
            str(row.get("what", "?")).replace(" - ", " − "),
            with_interval(fixed(row.get("nats"), 4), row.get("ci"), lambda v: fixed(v, 4)),
        ]
        for row in rows
        if figure(row.get("nats")) is not None
    ]
    caption = "Differences in nats per token, paired; below 0 the first is better"
    return table(caption, ["", "difference"], body, id="t-differences") if body else None


MAKERS = (differences, layers, positions, energy, split)
