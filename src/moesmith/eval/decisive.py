"""What a router is worth in perplexity: between random routing and an oracle that knows each text's expert.

gap closed = (PPL_random - PPL_router) / (PPL_random - PPL_oracle), where PPL is exp of the mean over domains
of the mean nats per token. Intervals are 95 % bootstrap over the documents of each domain (`routing.drawn`);
all rows see the same draws, so differences and ratios of rows are paired. Of fewer than about ten documents
per domain (`fewest`) they are still too narrow.
"""

# N texts, M documents of a domain, D domains, X rows of the table, W draws

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moesmith.errors import UserError

from .bootstrap import ROUNDS, SEED, Interval
from .routed import Choose, mixed, moe_text_layers
from .routing import Labelled, Losses, document_numbers, drawn, losses, middle

Floats = NDArray[np.float64]

# Rows in the order of the table. Other keys are dense source models and come last.
KINDS = {
    "router": "router", "embed": "control", "random": "control", "uniform": "control", "oracle": "oracle",
    "base": "source",
}  # fmt: skip

NOTHING = 1e-4
"""Nats per token below which two rows are the same: what 16-bit rounding alone can do."""


def decisive(
    rows: Mapping[str, Losses], texts: Sequence[Labelled], names: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """The table of perplexities, the gap closed and one sentence on what it means.

    Args:
        rows: `losses` of the same texts by key: "router", "embed", "random 0", "random 1", ... (averaged to
            one row), "uniform", "oracle", "base" (the dense base model); any other key is a dense source.
        names: key -> what the row is called in the table.

    Returns:
        plain data. A `ci` is None where a domain has fewer than two documents. `gap_closed["mean"]` is None,
        with a `reason`, where random routing is not above the oracle, in `by_domain` also where it is not
        beyond the interval of that domain; `gap_closed_embed` is None without that row. `verdict` is None
        without an oracle or random row. `useful`: the router is below random routing and the best dense
        model, each beyond the interval; not if one of them or the interval is missing.

    Raises:
        UserError: rows measured on different tokens.
    """
    assert "router" in rows, "the table is about a router"
    table = _table(rows, texts)
    names = names or {}
    out = []
    for x, key in enumerate(table.keys):
        runs = sum(_row(other) == "random" for other in rows) if key == "random" else 1
        out.append(
            {
                "name": names.get(key, f"random (mean of {runs})" if runs > 1 else key),
                "key": key,
                "kind": KINDS.get(key, "source"),
                "mean": math.exp(table.nats[x]),
                "mean_ci": None if table.drawn is None else middle(np.exp(table.drawn[:, x])),
                "by_domain": {d: math.exp(table.by_domain[i, x]) for i, d in enumerate(table.domains)},
            }
        )
    pairs = [("oracle", "base"), ("router", "base"), ("router", "random"), ("router", "oracle")]
    differences = [
        {"what": f"{a} - {b}", "nats": table.less(b, a)[0], "ci": table.less(b, a)[1]}
        for a, b in pairs
        if a in table.keys and b in table.keys
    ]
    gap = _gap(table, "router")
    gap_embed = _gap(table, "embed") if "embed" in table.keys else None
    return {
        "domains": table.domains,
        "documents": table.documents,
        "fewest": table.fewest,
        "tokens": table.tokens,
        "rows": out,
        "gap_closed": gap,
        "gap_closed_embed": gap_embed,
        "differences": differences,
        "useful": table.drawn is not None
        and "random" in table.keys
        and (dense := table.best_dense()) is not None
        and all(table.better("router", key) for key in ("random", dense)),
        "verdict": _verdict(table, gap, gap_embed),
    }


@dataclass
class _Table:
    """Mean nats per token of every row."""

    keys: list[str]
    domains: list[str]
    nats: Floats
    """(X,) mean over domains"""
    by_domain: Floats
    """(D, X)"""
    drawn: Floats | None
    """(W, X) `nats` of resampled documents; None where a domain has fewer than two"""
    drawn_by_domain: list[Floats | None]
    """the same of each domain"""
    documents: int
    fewest: int
    """documents of the domain that has the fewest"""
    tokens: int

    def ppl(self, key: str) -> float:
        return math.exp(self.nats[self.keys.index(key)])

    def best_dense(self) -> str | None:
        """The dense model, base or source, that is best alone; None if none was measured."""
        dense = [key for key in self.keys if KINDS.get(key, "source") == "source"]
        return min(dense, key=lambda key: self.nats[self.keys.index(key)], default=None)

    def less(self, key: str, than: str) -> tuple[float, Interval | None]:
        """Nats per token by which `key` is below `than`, and the interval: nats(than) - nats(key)."""
        x, y = self.keys.index(key), self.keys.index(than)
        ci = None if self.drawn is None else middle(self.drawn[:, y] - self.drawn[:, x])
        return float(self.nats[y] - self.nats[x]), ci

    def better(self, key: str, than: str) -> bool:
        """Whether `key` is below `than` beyond the interval; on the figure itself where there is none."""
        value, ci = self.less(key, than)
        return (value if ci is None else ci[0]) > NOTHING

    def better_in(self, domain: int, key: str, than: str) -> bool:
        """The same in one domain."""
        x, y = self.keys.index(key), self.keys.index(than)
        drawn = self.drawn_by_domain[domain]
        nats = self.by_domain[domain]
        return float(nats[y] - nats[x] if drawn is None else middle(drawn[:, y] - drawn[:, x])[0]) > NOTHING


def _row(key: str) -> str:
    """The row that a measurement belongs to."""
    return "random" if key.split(" ")[0] == "random" else key


def _table(rows: Mapping[str, Losses], texts: Sequence[Labelled]) -> _Table:
    counted = next(iter(rows.values()))
    tokens_N = np.array([tokens for _, tokens in counted], np.float64)
    columns: dict[str, list[Floats]] = {}
    for key, measured in rows.items():
        if [tokens for _, tokens in measured] != [tokens for _, tokens in counted]:
            raise UserError(
                f"{key} was measured on other tokens than {next(iter(rows))}",
                "their perplexities can only be compared on the same texts and tokenizer",
            )
        column = np.array([nats for nats, _ in measured], np.float64)
        columns.setdefault(_row(key), []).append(column)
    assert len(texts) == len(tokens_N), (len(texts), len(tokens_N))
    keys = [*(key for key in KINDS if key in columns), *(key for key in columns if key not in KINDS)]
    nats_NX = np.stack([np.mean(columns[key], axis=0) for key in keys], axis=1)

    domains = list(dict.fromkeys(text.domain for text in texts))
    number = np.array(document_numbers(texts))
    by_domain = np.zeros((len(domains), len(keys)))
    found: list[Floats | None] = []
    for d, domain in enumerate(domains):
        mine = np.array([text.domain == domain for text in texts])
        by_domain[d] = nats_NX[mine].sum(0) / tokens_N[mine].sum()
        # A seed per domain: domains of equal size would be drawn alike, and their errors would add up.
        found.append(drawn(nats_NX[mine], tokens_N[mine], number[mine], SEED + d))
    whole = [one for one in found if one is not None]
    mean = sum(whole, np.zeros((ROUNDS, len(keys)))) / len(domains) if len(whole) == len(found) else None
    pairs = {(text.domain, one) for text, one in zip(texts, number.tolist(), strict=True)}
    counts = list(Counter(domain for domain, _ in pairs).values())
    tokens = int(tokens_N.sum())
    return _Table(keys, domains, by_domain.mean(0), by_domain, mean, found, sum(counts), min(counts), tokens)


# ---------------------------------------------------------------- the gap


def _gap(table: _Table, key: str) -> dict[str, Any]:
    """The share of the gap that `key` closes, of the mean and in each domain."""
    missing = [other for other in ("random", "oracle") if other not in table.keys]
    if missing:
        return {"mean": None, "ci": None, "by_domain": {}, "reason": f"no {missing[0]} routing was measured"}
    x, r, o = (table.keys.index(name) for name in (key, "random", "oracle"))

    def closed(nats: Floats) -> float | None:
        if nats[r] - nats[o] <= NOTHING:
            return None
        ppl = np.exp(nats)
        return float((ppl[r] - ppl[x]) / (ppl[r] - ppl[o]))

    by_domain = {
        # next to nothing divided by next to nothing can be any number
        domain: closed(table.by_domain[i]) if table.better_in(i, "oracle", "random") else None
        for i, domain in enumerate(table.domains)
    }
    mean, ci, reason = closed(table.nats), None, None
    if mean is None:
        reason = (
            f"random routing is not above the oracle: {_p(table, 'random')} against {_p(table, 'oracle')}"
        )
    elif table.drawn is None:
        reason = "no interval: a domain has a single document"
    elif not table.better("oracle", "random"):
        # A ratio whose denominator may be 0 has no interval.
        reason = "no interval: random routing is not above the oracle in all draws"
    else:
        ppl = np.exp(table.drawn[table.drawn[:, r] - table.drawn[:, o] > NOTHING])
        ci = middle((ppl[:, r] - ppl[:, x]) / (ppl[:, r] - ppl[:, o]))
    return {"mean": mean, "ci": ci, "by_domain": by_domain, "reason": reason}


def _verdict(table: _Table, gap: dict[str, Any], gap_embed: dict[str, Any] | None) -> str | None:
    """One sentence: whether the experts are worth anything, and what the router makes of them."""
    if not {"random", "oracle"} <= set(table.keys):
        return None
    router, random, oracle = (_p(table, key) for key in ("router", "random", "oracle"))
    if "base" in table.keys and not table.better("oracle", "base"):
        base = _p(table, "base")
        if table.better("router", "base"):
            return (
                "each text's own expert is no better than the base here, but the router's mixture is: "
                f"perplexity {router} against {base} (base) and {oracle} (oracle)"
            )
        word = "nothing"
        if table.better("base", "oracle"):
            word = "nothing but harm"
        elif oracle != base and table.less("oracle", "base")[0] > NOTHING:
            word = "nothing beyond the interval"
        helped = [d for i, d in enumerate(table.domains) if table.better_in(i, "oracle", "base")]
        where = f"; they help in {', '.join(helped)}" if helped else ""
        return (
            f"the experts add {word} on this text: perplexity {oracle} with each text's own expert, "
            f"{base} of the base model{where}"
        )
    if gap["mean"] is None:
        return (
            f"there is nothing for a router to gain on this text: perplexity {random} with random routing, "
            f"{oracle} with each text's own expert"
        )
    if not table.better("oracle", "random"):
        return (
            "what a router can gain on this text is within the interval: perplexity "
            f"{random} with random routing, {oracle} with each text's own expert"
        )
    if not table.better("router", "random"):
        word = "worse than" if table.better("random", "router") else "no better than"
        return (
            f"the router is {word} random routing: perplexity {router} against {random}, "
            f"{oracle} with each text's own expert"
        )
    said = f"closes {_percent(gap)} of the gap between random and oracle routing"
    if gap_embed and gap_embed["mean"] is not None:
        said += f"; embed closes {_percent(gap_embed)}"
    if dense := table.best_dense():
        figures = f"perplexity {router} against {_p(table, dense)}"
        if table.better("router", dense):
            said += f"; {figures} of the best dense model ({dense})"
        else:
            word = "is worse" if table.better(dense, "router") else "is no better"
            said += f", but {word} than the best dense model ({dense}): {figures}"
    if "uniform" in table.keys and table.better("uniform", "router"):
        said += f"; all experts with equal weights do better: perplexity {_p(table, 'uniform')}"
    if table.better("router", "oracle"):
        return f"the router is better than the oracle, as a choice for every token can be: it {said}"
    return f"the router {said}"


def _p(table: _Table, key: str) -> str:
    return f"{table.ppl(key):,.2f}"


def _percent(gap: dict[str, Any]) -> str:
    """83 % [79, 87]"""
    ci = f" [{_hundredths(gap['ci'][0])}, {_hundredths(gap['ci'][1])}]" if gap["ci"] else ""
    return f"{_hundredths(gap['mean'])} %{ci}"


def _hundredths(share: float) -> str:
    """0.83 -> 83. What is less than all gets a digit more before it reads 100."""
    text = f"{100 * share:.0f}"
    if share < 1 and text == "100":
        text = f"{100 * share:.1f}"
    return text.replace("-", "\N{MINUS SIGN}")


# ---------------------------------------------------------------- where it matters


def by_depth(
    model: Any,
    texts: Sequence[Labelled],
    choices: Mapping[str, Choose],
    elsewhere: Choose,
    parts: int = 3,
    on_part: Callable[[str, int], None] | None = None,
) -> dict[str, list[dict[str, Any]]]:
    """Every choice in one part of the depth at a time, `elsewhere` (an oracle, random rows) in all others.

    Returns:
        name -> per part the MoE layers `from` to `to`, the `perplexity` and the `losses` of each text.
    """
    count = len(moe_text_layers(model))
    edges = [round(i * count / parts) for i in range(parts + 1)]
    spans = [range(a, b) for a, b in zip(edges, edges[1:], strict=False) if b > a]
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in choices}
    for name, choose in choices.items():
        for number, span in enumerate(spans):
            if on_part:
                on_part(name, number)
            measured = losses(model, texts, choose=mixed([(span, choose)], elsewhere), name=name)
            ppl = _table({"router": measured}, texts).ppl("router")
            found[name].append({"from": span[0], "to": span[-1], "perplexity": ppl, "losses": measured})
    return found
