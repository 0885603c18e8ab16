"""The experts of an answer as a map in the terminal: a line per layer, a mark per expert."""

from __future__ import annotations

import math
from typing import Any

from rich.text import Text

from moesmith import console

MARKS = "▁▂▃▄▅▆▇█"
NONE = "·"
# The colours of the page's map, from few tokens to many.
COLOURS = ("#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#fde725")


def show(facts: dict[str, Any], width: int | None = None) -> None:
    """Print a picture (`moesmith.serve.experts.picture`) on stderr, `width` columns wide."""
    err = console.stderr()
    room = (width or (err.width if err.is_terminal else 100)) - 7
    total = len(facts["tokens"])
    shares = [[count / total for count in row] for row in facts["counts"]]
    high = max(max(row) for row in shares)
    together = -(-facts["experts"] // max(1, room))
    for name, row in zip(facts["layers"], shares, strict=True):
        line = Text(f"{_number(name):>5}  ", style="dim")
        for start in range(0, len(row), together):
            share = max(row[start : start + together])  # of several in one place, the busiest is shown
            at = max(0, math.ceil(len(MARKS) * share / high) - 1) if high else 0
            line.append(MARKS[at] if share else NONE, style=COLOURS[at] if share else "dim")
        err.print(line, soft_wrap=True)
    console.note(summary(facts) + (f" · one place stands for {together} experts" if together > 1 else ""))


def summary(facts: dict[str, Any]) -> str:
    """Layers, experts, tokens; the busiest expert; how many got nothing."""
    total = len(facts["tokens"])
    cells = [(n, layer, e) for layer, row in enumerate(facts["counts"]) for e, n in enumerate(row)]
    count, layer, expert = max(cells, key=lambda cell: cell[0])
    even = facts["top_k"][layer] / len(facts["counts"][layer])
    others = sum(cell[0] == count for cell in cells) - 1
    idle = sum(n == 0 for n, *_ in cells) / len(cells)
    top = " to ".join(str(k) for k in sorted({min(facts["top_k"]), max(facts["top_k"])}))
    with_others = f" and {others} other{'s' if others > 1 else ''}" if others else ""
    return (
        f"{len(facts['layers'])} layers × {facts['experts']} experts, top-{top}, {total:,} tokens · "
        f"busiest: layer {_number(facts['layers'][layer])} expert {expert}{with_others}, "
        f"{count / total:.0%} (even use: {even:.0%}) · {idle:.0%} of the experts got none"
    )


def _number(name: str) -> str:
    """model.layers.12.mlp -> 12"""
    return next((part for part in name.split(".") if part.isdigit()), name)
