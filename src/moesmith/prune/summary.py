"""What a profile says about a model, as plain data: the profile's part of a report.

Concentration, domains, how sure the ranking is, how far the criteria agree, and with a plan what it keeps of
every layer. Intervals are 95 %, by drawing whole documents again within their domain: tokens of one document
are not independent, nor are the pieces of one long row, which count as one document.
"""

# L layers, D domains, E experts, N documents, B bootstrap draws

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesmith.data.pieces import row_numbers
from moesmith.errors import UserError
from moesmith.prune.criteria import CRITERIA, combine, domain_weights, per_domain, scores
from moesmith.prune.plan import UNITS, Keep, Plan, keep_order, kept_share

if TYPE_CHECKING:
    from moesmith.prune.stats import LayerStats, Profile

FEW_TOKENS = 100  # below this many routed tokens an expert's rank is mostly noise
SHARES = (50, 80, 95, 99)
DRAWS, HALVES = 400, 20  # of the bootstrap; random splits of the documents
# Criteria that derive from different quantities; the others of the table are near copies of one of these.
COMPARED = ("contribution", "prompt_norm", "reap", "easyep", "man", "frequency", "gate", "ean_ca", "max_norm")

# name -> (label, unit); the first two as shares of the layer, the means as they are
HEATMAPS = {
    "contribution": ("contribution", "% of the layer's sum of g‖f‖"),
    "frequency": ("usage", "% of the layer's selections"),
    "reap": ("REAP", "mean g‖f‖ per use"),
    "man": ("output norm", "mean ‖f‖ per use"),
}


def profile_facts(profile: Profile, plan: Plan | None = None, seed: int = 0) -> dict[str, Any]:
    """The sections heatmap, retained, concentration, domains, reliability, agreement, units and notes.

    Without a plan the dropped set that domains and criteria are compared on is an eighth of the experts.
    """
    keep = plan.keep if plan else _default_keep(profile)
    units = unit_facts(profile, keep)
    facts: dict[str, Any] = {
        "heatmap": heatmap_facts(profile, plan),
        "concentration": concentration_facts(profile),
        "domains": domain_facts(profile, keep),
        "reliability": reliability_facts(profile, seed),
        "agreement": agreement_facts(profile, keep),
        "units": units,
        "notes": [units["note"]],
    }
    if plan:
        facts["retained"] = retained_facts(profile, plan, seed)
    return facts


def short_names(profile: Profile) -> list[str]:
    """model.layers.3.mlp -> 3, unless that would name two layers alike."""
    names = []
    for layer in profile.layers:
        numbers = [part for part in layer.layer.split(".") if part.isdigit()]
        names.append(numbers[-1] if numbers else layer.layer)
    return names if len(set(names)) == len(names) else [layer.layer for layer in profile.layers]


# ---------------------------------------------------------------- pictures


def heatmap_facts(profile: Profile, plan: Plan | None) -> dict[str, Any]:
    """Layer x expert of a few statistics, all domains and each, three significant digits."""
    statistics_: dict[str, Any] = {}
    for name, (label, unit) in HEATMAPS.items():
        by_domain: dict[str, list] = {"all": []}
        by_domain.update({domain: [] for domain in profile.domains})
        for layer in profile.layers:
            table = _all_and_each(layer, name)
            for domain, values in zip(by_domain, table.tolist(), strict=True):
                by_domain[domain].append([float(f"{value:.3g}") for value in values])
        statistics_[name] = {"label": label, "unit": unit, "by_domain": by_domain}
    dropped = plan.drop if plan else {}
    return {
        "layers": short_names(profile),
        "experts": max(layer.num_experts for layer in profile.layers),
        "statistics": statistics_,
        "dropped": [dropped.get(layer.layer, []) for layer in profile.layers],
    }


def _all_and_each(layer: LayerStats, name: str) -> Tensor:
    """(1 + D, E): the statistic over all domains together, then over each; shares in percent."""
    key = {"contribution": "contribution", "frequency": "tokens", "reap": "contribution", "man": "norm"}[name]

    def with_all(sums: Tensor) -> Tensor:
        return torch.cat([sums.sum(0, keepdim=True), sums])

    value = with_all(layer.sums[key])
    if name in ("contribution", "frequency"):
        return 100 * _share(value)
    return _divide(value, with_all(layer.sums["tokens"]))


def concentration_facts(profile: Profile) -> dict[str, Any]:
    """How unequal the contributions are: Lorenz curves, Gini, experts needed for a share, dead experts."""
    lorenz: dict[str, list[list[float]]] = {}
    gini, top8, bottom, dead = [], [], [], []
    experts_for: dict[str, list[int]] = {str(share): [] for share in SHARES}
    curves = []
    for name, layer in zip(short_names(profile), profile.layers, strict=True):
        share = _share(layer.total("contribution"))
        ascending = share.sort().values
        curve = torch.cat([torch.zeros(1, dtype=share.dtype), ascending.cumsum(0)])
        E = layer.num_experts
        lorenz[name] = _thin(curve)
        curves.append(curve)
        gini.append(round(gini_of(share), 4))
        descending = ascending.flip(0)
        held = descending.cumsum(0)
        for wanted in SHARES:
            experts_for[str(wanted)].append(int((held < wanted / 100 - 1e-12).sum()) + 1)
        top8.append(round(float(descending[:8].sum()), 4))
        bottom.append(round(float(ascending[: E // 2].sum()), 4))
        dead.append((layer.total("tokens") == 0).nonzero().flatten().tolist())
    if len({len(curve) for curve in curves}) == 1:
        lorenz = {"all": _thin(torch.stack(curves).mean(0)), **lorenz}
    return {
        "layers": short_names(profile),
        "unit": "sum over tokens of g‖f‖",
        "lorenz": lorenz,
        "gini": gini,
        "experts_for": experts_for,
        "top8_share": top8,
        "bottom_half_share": bottom,
        "dead": dead,
    }


def gini_of(share: Tensor) -> float:
    """Gini coefficient of non-negative shares: 0 all equal, (E - 1) / E one holds everything."""
    E, total = len(share), float(share.sum())
    if total == 0:
        return 0.0
    rank = torch.arange(1, E + 1, dtype=share.dtype)
    return float(((2 * rank - E - 1) * share.sort().values).sum()) / (E * total)


def _thin(curve: Tensor, points: int = 33) -> list[list[float]]:
    """At most `points` points of a Lorenz curve, ends included, as [share of experts, share of mass]."""
    last = len(curve) - 1
    index = sorted({round(i * last / (points - 1)) for i in range(points)})
    return [[round(i / last, 4), round(float(curve[i]), 5)] for i in index]


# ---------------------------------------------------------------- domains


def domain_facts(profile: Profile, keep: Keep) -> dict[str, Any]:
    """Do domains use the same experts, and what does a domain lose under another's drop set?

    overlap: mean over layers of the Jaccard index of the domains' best quarter of the experts. regret: share
    of the row domain's contribution held by the experts that the column domain alone would drop, as many per
    layer as the plan drops.
    """
    D = len(profile.domains)
    overlap, regret = torch.zeros(D, D), torch.zeros(D, D)
    dropped_overlap = torch.zeros(D, D)
    chances, sizes = [], []
    for layer in profile.layers:
        shares = per_domain(layer, "contribution")
        E, size = layer.num_experts, max(layer.num_experts // 4, 1)
        orders = [keep_order(shares[d], set(), layer.n_group) for d in range(D)]
        tops = [set(order[:size]) for order in orders]
        drops = [order[len(keep[layer.layer]) :] for order in orders]
        for a in range(D):
            for b in range(D):
                overlap[a, b] += jaccard(tops[a], tops[b]) / len(profile.layers)
                dropped_overlap[a, b] += jaccard(set(drops[a]), set(drops[b])) / len(profile.layers)
                regret[a, b] += float(shares[a, drops[b]].sum()) / len(profile.layers)
        chances.append(size / (2 * E - size))  # two random sets share size^2 / E on average
        sizes.append(size)
    return {
        "names": profile.domains,
        "tokens": profile.domain_tokens().tolist(),
        "overlap": _rounded(overlap),
        "chance": round(statistics.fmean(chances), 4),
        "top": max(sizes),
        "dropped_overlap": _rounded(dropped_overlap),
        "regret": _rounded(regret),
    }


# ---------------------------------------------------------------- how sure


def reliability_facts(profile: Profile, seed: int = 0, halves: int = HALVES) -> dict[str, Any]:
    """Would other documents rank the experts the same, and has every expert been seen often enough?

    split_half: per layer the Spearman correlation between contributions on two random halves of the
    documents (halved within each domain), mean over `halves` splits; None with fewer than two documents.
    """
    splits = list(_halves(profile, seed, halves))
    split_half: list[float | None] = []
    fewest, where = float("inf"), (0, 0)
    for index, layer in enumerate(profile.layers):
        values = layer.per_document["contribution"]
        found = [spearman(values[a].sum(0), values[b].sum(0)) for a, b in splits]
        split_half.append(round(statistics.fmean(found), 4) if found else None)
        tokens = layer.total("tokens")
        if float(tokens.min()) < fewest:
            fewest, where = float(tokens.min()), (index, int(tokens.argmin()))
    everywhere = torch.cat([layer.total("tokens") for layer in profile.layers])
    below = int((everywhere < FEW_TOKENS).sum())
    name = short_names(profile)[where[0]]
    warning = None
    if below:
        warning = (
            f"{below} of {len(everywhere)} experts were routed fewer than {FEW_TOKENS} tokens, the fewest "
            f"{fewest:.0f} (layer {name}, expert {where[1]}): their ranks are mostly noise, profile more text"
        )
    return {
        "layers": short_names(profile),
        "split_half": split_half,
        "tokens_per_expert": {
            "min": int(fewest),
            "median": int(everywhere.median()),
            "below": below,
            "layer": name,
            "expert": where[1],
        },
        "documents": len(_rows(profile)[1]),
        "warning": warning,
    }


def _halves(profile: Profile, seed: int, halves: int) -> list[tuple[Tensor, Tensor]]:
    """Random halves of the documents as index tensors, the pieces of a row on one side; a domain's odd row
    goes to a random side."""
    row_of, domain_of = _rows(profile)
    if len(domain_of) < 2:
        return []
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(halves):
        sides: tuple[list[Tensor], list[Tensor]] = ([], [])
        odd = int(torch.randint(2, (1,), generator=generator))
        for domain in range(len(profile.domains)):
            mine = (domain_of == domain).nonzero().flatten()
            mine = mine[torch.randperm(len(mine), generator=generator)]
            half = len(mine) // 2 + (len(mine) % 2) * odd
            odd = 1 - odd if len(mine) % 2 else odd
            sides[0].append(mine[:half])
            sides[1].append(mine[half:])
        a, b = (torch.isin(row_of, torch.cat(side)).nonzero().flatten() for side in sides)
        found.append((a, b))
    return [(a, b) for a, b in found if len(a) and len(b)]


def retained_facts(profile: Profile, plan: Plan, seed: int = 0) -> list[dict[str, Any]]:
    """Per layer: the share of weighted output norm that the plan keeps, with its interval.

    The unit is the plan's; the interval is that of the per-token contribution or of prompt_norm, both of
    which are sums over documents.
    """
    unit = plan.meta.get("unit", "contribution")
    weights = domain_weights(profile.domains, plan.domains)
    draws = _draws(profile, seed, weights)
    rows = []
    for name, layer in zip(short_names(profile), profile.layers, strict=True):
        kept = plan.keep[layer.layer]
        documents = _unit_of_documents(layer, unit)
        interval = None
        if documents is not None and draws is not None:
            interval = _interval(_retained_draws(documents, kept, profile, draws, weights))
        tokens = layer.total("tokens")
        rows.append(
            {
                "layer": name,
                "norm": round(kept_share(per_domain(layer, unit), kept, weights), 5),
                "ci": interval,
                "unit": unit,
                "keep": len(kept),
                "tokens_min": int(tokens.min()),
                "tokens_median": int(tokens.median()),
            }
        )
    return rows


def _unit_of_documents(layer: LayerStats, unit: str) -> Tensor | None:
    """(N, E): what each document adds to the unit; None for one that profiles keep no documents of."""
    if unit == "prompt_norm":
        return layer.per_document["contribution_sq"].sqrt()
    return layer.per_document.get(unit)


def _rows(profile: Profile) -> tuple[Tensor, Tensor]:
    """Row of every document, (N,), and domain of every row: the pieces of one row are one document here."""
    row_of = torch.tensor(row_numbers(document.id for document in profile.documents), dtype=torch.long)
    domain_of = torch.zeros(int(row_of.max()) + 1 if len(row_of) else 0, dtype=torch.long)
    domain_of[row_of] = profile.document_domains()
    return row_of, domain_of


def _draws(profile: Profile, seed: int, weights: Tensor | None) -> Tensor | None:
    """(B, N) how often each document is drawn: whole rows, with replacement within their domain.

    None where a domain that has a say has one row only: drawn again it is always itself.
    """
    row_of, domain_of = _rows(profile)
    heard = range(len(profile.domains)) if weights is None else weights.nonzero().flatten().tolist()
    if any(int((domain_of == domain).sum()) == 1 for domain in heard):
        return None
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(DRAWS, len(domain_of), dtype=torch.float64)
    for domain in range(len(profile.domains)):
        mine = (domain_of == domain).nonzero().flatten()
        if len(mine):
            drawn = mine[torch.randint(len(mine), (DRAWS, len(mine)), generator=generator)]
            counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return counts[:, row_of]


def _retained_draws(
    documents: Tensor, kept: list[int], profile: Profile, draws: Tensor, weights: Tensor | None
) -> Tensor:
    """(B,) retained share under each draw of the documents."""
    domain_of = profile.document_domains()
    held, total = documents[:, kept].sum(-1), documents.sum(-1)
    shares = []
    for domain in range(len(profile.domains)):
        mine = domain_of == domain
        if float(total[mine].sum()) > 0:
            shares.append((domain, _divide(draws[:, mine] @ held[mine], draws[:, mine] @ total[mine])))
    table = torch.stack([share for _, share in shares])
    if weights is None:
        return table.amin(0)
    weight = weights[[domain for domain, _ in shares]]
    return (weight / weight.sum()) @ table if float(weight.sum()) else table.mean(0)


def _interval(values: Tensor) -> list[float]:
    low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()
    return [round(low, 5), round(high, 5)]


# ---------------------------------------------------------------- do criteria agree?


def agreement_facts(profile: Profile, keep: Keep) -> dict[str, Any]:
    """Spearman between criteria (mean over layers) and the Jaccard index of the sets they would drop."""
    found = {}
    for name in COMPARED:
        try:
            found[name] = scores(profile, name)
        except UserError:  # easyep where the residual stream is out of sight
            continue
    names = list(found)
    n = len(names)
    rank, same = torch.eye(n), torch.eye(n)
    for a in range(n):
        for b in range(a):
            rhos, overlaps = [], []
            for layer in profile.layers:
                first, second = found[names[a]][layer.layer], found[names[b]][layer.layer]
                rhos.append(spearman(first, second))
                count = len(keep[layer.layer])
                drops = [set(keep_order(x, set(), layer.n_group)[count:]) for x in (first, second)]
                overlaps.append(jaccard(*drops))
            rank[a, b] = rank[b, a] = statistics.fmean(rhos)
            same[a, b] = same[b, a] = statistics.fmean(overlaps)
    return {
        "criteria": names,
        "units": {name: CRITERIA[name].unit for name in names},
        "spearman": _rounded(rank),
        "dropped_jaccard": _rounded(same),
    }


def unit_facts(profile: Profile, keep: Keep) -> dict[str, Any]:
    """The two figures both called contribution: the sum over tokens, and the norm over a whole document.

    Per layer their Spearman correlation and the experts that only one of them would drop. Sums over all
    domains, as both are published.
    """
    rows: list[dict[str, Any]] = []
    for name, layer in zip(short_names(profile), profile.layers, strict=True):
        values = [layer.total(unit) for unit in UNITS]
        count = len(keep[layer.layer])
        first, second = (set(keep_order(value, set(), layer.n_group)[count:]) for value in values)
        rows.append(
            {
                "layer": name,
                "spearman": round(spearman(*values), 4),
                "only_contribution_drops": sorted(first - second),
                "only_prompt_norm_drops": sorted(second - first),
            }
        )
    differing = [row for row in rows if row["only_contribution_drops"]]
    swapped = sum(len(row["only_contribution_drops"]) for row in rows)
    total = sum(layer.num_experts - len(keep[layer.layer]) for layer in profile.layers)
    worst = min(rows, key=lambda row: row["spearman"])
    note = (
        "contribution is the sum over tokens of g‖f‖; prompt_norm sums one norm per document over its tokens "
        "and so grows with the square root of their number. "
        f"Their ranks correlate {worst['spearman']:.3f} or more (lowest in layer {worst['layer']}); "
    )
    if differing:
        note += f"{swapped} of {total} dropped experts differ, in {len(differing)} of {len(rows)} layers"
    else:
        note += f"both would drop the same {total} experts"
    return {"per_layer": rows, "dropped": total, "differ": swapped, "note": note}


# ---------------------------------------------------------------- arithmetic


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors, equal values sharing their mean rank; 0 if one is constant."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale else 0.0


def _ranks(values: Tensor) -> Tensor:
    """Ranks from 0, (n,) fp64; ties get the mean of the ranks they cover."""
    _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts + 1) / 2)[inverse]


def jaccard(a: set[int], b: set[int]) -> float:
    """Shared part of the union; two empty sets are equal."""
    return len(a & b) / len(a | b) if a or b else 1.0


def _share(values: Tensor) -> Tensor:
    return _divide(values, values.sum(-1, keepdim=True))


def _divide(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))


def _rounded(table: Tensor) -> list[list[float]]:
    return [[round(value, 4) for value in row] for row in table.tolist()]


def _default_keep(profile: Profile) -> Keep:
    """The best seven eighths of every layer by contribution, in whole steps of its groups."""
    keep = {}
    for layer in profile.layers:
        count = max(layer.num_experts * 7 // 8 // layer.n_group * layer.n_group, layer.top_k)
        order = keep_order(combine(per_domain(layer, "contribution"), None), set(), layer.n_group)
        keep[layer.layer] = sorted(order[:count])
    return keep
