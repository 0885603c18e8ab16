"""Which experts stay: a profile and a wish become a plan, and the plan a JSON file.

The wish is a count, a share to cut, or a share of weighted output norm to retain. Every layer keeps the same
number, because that is what servers and stock checkpoints can hold; counts of their own per layer are an
option for masks in this package. Nothing here loads a model: a plan takes milliseconds, so cut again at will.
"""

# D domains, E experts of a layer

from __future__ import annotations

import heapq
import json
import math
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moesmith import __version__
from moesmith.config import write_atomically
from moesmith.errors import UserError
from moesmith.prune.criteria import CRITERIA, Domains, combine, domain_weights, per_domain

if TYPE_CHECKING:
    from moesmith.prune.stats import LayerStats, Profile

Keep = dict[str, list[int]]
"""MoELayer.name -> kept expert ids, ascending, in the original numbering"""

FILE = "expert_drop_metadata.json"
FORMAT = 1
UNITS = ("contribution", "prompt_norm")  # the two figures both known as "contribution"
ENOUGH = 1 - 1e-9  # of a wished share: a sum of shares is not exact


@dataclass
class Plan:
    """What stays, in every MoE layer. Layers are named by their MoE block (MoELayer.name)."""

    keep: Keep
    score: str
    domains: str | dict[str, float]
    counts: dict[str, int]
    """layer -> experts kept"""
    meta: dict[str, Any]
    """what was asked, what followed from it, and hashes of model, corpus and profile"""
    merge: str | None = None
    """how dropped experts are merged into kept ones; None drops them"""
    groups: dict[str, list[int]] | None = None
    """layer -> group of each original expert, for merging"""
    num_experts: dict[str, int] = field(default_factory=dict)
    """layer -> experts before"""
    scores: dict[str, list[float]] = field(default_factory=dict)
    """layer -> score of each original expert"""
    retained: dict[str, float] = field(default_factory=dict)
    """layer -> share of `meta["unit"]` that the kept experts hold"""

    @property
    def drop(self) -> Keep:
        """The other experts of every layer."""
        return {
            name: sorted(set(range(self.num_experts[name])) - set(kept)) for name, kept in self.keep.items()
        }

    @property
    def count(self) -> int | None:
        """Experts that every layer keeps; None where the layers differ."""
        counts = set(self.counts.values())
        return counts.pop() if len(counts) == 1 else None

    def write(self, path: Path) -> Path:
        """Write `expert_drop_metadata.json`, into a folder or under the given name. Returns its path."""
        path = path / FILE if path.is_dir() else path
        drop = self.drop
        layers = {
            name: {
                "num_experts": self.num_experts[name],
                "keep": kept,
                "drop": drop[name],
                "retained": self.retained.get(name),
                "scores": self.scores.get(name),
                **({"groups": self.groups[name]} if self.groups else {}),
            }
            for name, kept in self.keep.items()
        }
        content = {
            "format": FORMAT,
            "method": {"score": self.score, "domains": self.domains, "merge": self.merge},
            **self.meta,
            "versions": {
                "moesmith": __version__,
                **{name: metadata.version(name) for name in ("torch", "transformers")},
            },
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "layers": layers,
        }
        write_atomically(path, json.dumps(content, indent=1) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Read what `write` wrote. Raises UserError for no such file, or one that contradicts itself."""
        path = path / FILE if path.is_dir() else path
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            method, layers = content.pop("method"), content.pop("layers")
            if content.pop("format") != FORMAT:
                raise KeyError("format")
            plan = cls(
                keep={name: [int(e) for e in layer["keep"]] for name, layer in layers.items()},
                score=method["score"],
                domains=method["domains"],
                counts={name: len(layer["keep"]) for name, layer in layers.items()},
                meta={key: value for key, value in content.items() if key not in ("versions", "date")},
                merge=method["merge"],
                groups={name: layer["groups"] for name, layer in layers.items() if "groups" in layer} or None,
                num_experts={name: int(layer["num_experts"]) for name, layer in layers.items()},
                scores={name: layer["scores"] for name, layer in layers.items() if layer["scores"]},
                retained={
                    name: layer["retained"] for name, layer in layers.items() if layer["retained"] is not None
                },
            )
            dropped = {name: [int(e) for e in layer["drop"]] for name, layer in layers.items()}
        except FileNotFoundError:
            raise UserError(f"no such file: {path}") from None
        except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
            raise UserError(
                f"{path} is not a plan of this version", "moesmith prune --dry-run makes one"
            ) from None
        for name, kept in plan.keep.items():
            if sorted(kept + dropped[name]) != list(range(plan.num_experts[name])):
                raise UserError(f"{path}: keep and drop of {name} are not its experts, each once")
        return plan


def make_plan(
    profile: Profile,
    keep: int | None = None,
    cut: float | None = None,
    retain: float | None = None,
    score: str = "contribution",
    domains: Domains = "mean",
    protect: int = 0,
    per_layer: bool = False,
    super_experts: bool = True,
    multiple: int = 1,
    seed: int = 0,
) -> Plan:
    """A plan for exactly one of three wishes.

    Args:
        keep: experts that stay in every layer.
        cut: share of the experts to drop at most, 0 to 1.
        retain: share of weighted output norm that every layer keeps at least, 0 to 1: the smallest uniform
            count that does. The unit is the score's own where it is such a norm, else `contribution`.
        score, domains, seed: as in `criteria.scores`.
        protect: this many of the best experts of every layer and domain stay.
        per_layer: a count per layer, with the same total; with `retain` the smallest that each layer needs.
        super_experts: experts with massive activations stay.
        multiple: kept counts are rounded up to a multiple of it.

    Raises:
        UserError: a wish no plan can meet; names what can be.
    """
    if sum(wish is not None for wish in (keep, cut, retain)) != 1:
        raise UserError("give exactly one of keep, cut and retain")
    layers = profile.layers
    weights = domain_weights(profile.domains, domains)
    shares = {layer.layer: per_domain(layer, score, seed + i) for i, layer in enumerate(layers)}
    combined = {name: combine(share, weights) for name, share in shares.items()}
    supers = find_super_experts(layers) if super_experts else {}
    protected = {name: best_of_domains(share, protect) for name, share in shares.items()}
    forced = {name: supers.get(name, set()) | protected[name] for name in shares}
    orders = {la.layer: keep_order(combined[la.layer], forced[la.layer], la.n_group) for la in layers}
    unit = retain_unit(score)
    mass = {layer.layer: per_domain(layer, unit) for layer in layers}

    steps = {layer.layer: math.lcm(multiple, layer.n_group) for layer in layers}
    floors = {la.layer: _floor(la, forced[la.layer], steps[la.layer], protected[la.layer]) for la in layers}
    notes: list[str] = []
    extra: dict[str, Any] = {}
    if retain is not None:
        counts, extra["retain"] = _retaining(
            profile, retain, unit, orders, mass, weights, floors, steps, per_layer
        )
    else:
        count = _asked_count(layers, keep, cut, floors, steps, multiple, notes)
        counts = dict.fromkeys(orders, count)
        if per_layer:
            floor = {la.layer: max(floors[la.layer], min(count, 2 * la.top_k)) for la in layers}
            counts = greedy_counts(combined, orders, counts, floor, steps)

    kept = {name: sorted(order[: counts[name]]) for name, order in orders.items()}
    meta = {
        "asked": {k: v for k, v in (("keep", keep), ("cut", cut), ("retain", retain)) if v is not None},
        "budget": "layer" if per_layer else "uniform",
        "protect": protect,
        "multiple": multiple,
        "unit": unit,
        "super_experts": {name: sorted(ids) for name, ids in supers.items() if ids},
        "protected": {name: sorted(ids) for name, ids in protected.items() if ids},
        **({"seed": seed} if score == "random" else {}),
        **extra,
        "notes": notes,
        "profile": {key: profile.meta.get(key) for key in ("model", "model_hash", "corpus_hash", "date")},
    }
    return Plan(
        keep=kept,
        score=score,
        domains=domains if isinstance(domains, str) else dict(domains),
        counts=counts,
        meta=meta,
        num_experts={layer.layer: layer.num_experts for layer in layers},
        scores={name: [float(f"{value:.6g}") for value in values] for name, values in combined.items()},
        retained={name: kept_share(mass[name], ids, weights) for name, ids in kept.items()},
    )


# ---------------------------------------------------------------- which experts


def keep_order(score: Tensor, forced: set[int], n_group: int = 1) -> list[int]:
    """All experts of a layer, the first to keep first: forced ones, then by score, equal ones by id.

    Group-limited routers compare groups of neighbouring experts, so each group keeps as many as the others:
    the best of every group, then the second of every group, and so on. Any prefix that is a multiple of
    n_group is a choice the router can run.
    """
    values = score.tolist()
    size = len(values) // n_group
    groups = [
        sorted(range(g * size, (g + 1) * size), key=lambda e: (e not in forced, -values[e], e))
        for g in range(n_group)
    ]
    return [group[rank] for rank in range(size) for group in groups]


def best_of_domains(shares: Tensor, n: int) -> set[int]:
    """The n best experts of every domain, (D, E) -> ids; experts that a domain never reached are not best."""
    found: set[int] = set()
    for domain in shares.tolist():
        order = sorted(range(len(domain)), key=lambda e: (-domain[e], e))
        found |= {e for e in order[:n] if domain[e] > 0}
    return found


def find_super_experts(layers: list[LayerStats]) -> dict[str, set[int]]:
    """Experts with massive activations, which models break without: layer -> ids.

    Those whose largest |f_i| is above max(99.5th percentile, a tenth of the largest), both over all experts
    of the model; the last quarter of the layers has large outputs in every model and is left out (REAP's
    code, which compares signed values; these are absolute).
    """
    largest = [layer.max_abs.amax(0).double() for layer in layers]
    everywhere = torch.cat(largest)
    threshold = max(float(everywhere.quantile(0.995)), float(everywhere.max()) / 10)
    early = int(len(layers) * 0.75)
    return {
        layer.layer: set((values > threshold).nonzero().flatten().tolist())
        for layer, values in list(zip(layers, largest, strict=True))[:early]
    }


def _floor(layer: LayerStats, forced: set[int], step: int, protected: set[int]) -> int:
    """Fewest experts the layer can keep: what routing needs, and everything forced, in whole steps."""
    size = layer.num_experts // layer.n_group
    fullest = max(sum(e // size == group for e in forced) for group in range(layer.n_group))
    floor = math.ceil(max(fewest_to_route(layer), fullest * layer.n_group) / step) * step
    if floor > layer.num_experts:
        what = f"its {len(protected)} protected experts" if protected else f"what it has to keep ({floor})"
        raise UserError(
            f"{layer.layer}: no multiple of {step} up to {layer.num_experts} holds {what}",
            "lower --protect or --multiple" if protected else "lower --multiple",
        )
    return floor


def fewest_to_route(layer: LayerStats) -> int:
    """Fewest experts the layer's router can choose from.

    Top-k; with groups two in each, whose scores such routers add up to compare groups, and enough in those
    groups that a token's experts come from.
    """
    if layer.n_group == 1:
        return layer.top_k
    return layer.n_group * max(2, math.ceil(layer.top_k / layer.topk_group))


# ---------------------------------------------------------------- how many


def _asked_count(
    layers: list[LayerStats],
    keep: int | None,
    cut: float | None,
    floors: dict[str, int],
    steps: dict[str, int],
    multiple: int,
    notes: list[str],
) -> int:
    """The uniform count that --keep or --cut means, checked against every layer."""
    sizes = {layer.num_experts for layer in layers}
    if len(sizes) > 1:
        raise UserError(
            f"layers have {' and '.join(map(str, sorted(sizes)))} experts: one count does not fit all of them"
        )
    experts = sizes.pop()
    step = math.lcm(*steps.values())
    if cut is not None:
        if not 0 < cut < 1:
            raise UserError(f"cut {cut:g} is no share of the experts", "a cut is above 0 % and below 100 %")
        exact = experts - math.floor(experts * cut + 1e-9)  # 15 % of 128 drops 19: never more than asked
        count = math.ceil(exact / step) * step
        if count >= experts:
            raise UserError(
                f"a cut of {100 * cut:g} % is less than one step of {step} of {experts} experts",
                f"the smallest cut is {100 * step / experts:.4g} %",
            )
        if count != exact:
            notes.append(f"{exact} rounded up to {count}, a multiple of {step}")
    else:
        assert keep is not None
        top_k = max(layer.top_k for layer in layers)
        if keep < top_k:
            raise UserError(
                f"keep {keep} is fewer than the {top_k} experts a token uses",
                f"--keep {top_k} is the fewest this model can run with",
            )
        if keep >= experts:
            raise UserError(f"keep {keep} of {experts} experts drops none", f"at most --keep {experts - 1}")
        groups = math.lcm(*(layer.n_group for layer in layers))
        if multiple == 1 and keep % groups:
            below, above = keep // groups * groups, math.ceil(keep / groups) * groups
            nearest = [str(n) for n in (below, above) if top_k <= n < experts]
            raise UserError(
                f"keep {keep}: the router compares {groups} groups, which must keep equally many",
                f"the nearest counts are {' and '.join(nearest)}" if nearest else None,
            )
        count = math.ceil(keep / step) * step
        if count >= experts:
            raise UserError(f"{keep} rounded up to a multiple of {step} is all {experts} experts")
        if count != keep:
            notes.append(f"{keep} rounded up to {count}, a multiple of {step}")
    for layer in layers:
        if count < floors[layer.layer]:
            raise UserError(
                f"{layer.layer} has to keep {floors[layer.layer]} experts (top-{layer.top_k}, protected and "
                f"super experts), the plan keeps {count}",
                f"--keep {max(floors.values())} or more, or lower --protect"
                if max(floors.values()) < experts
                else "nothing is left to drop: lower --protect",
            )
    return count


def retain_unit(score: str) -> str:
    """The figure whose share `retain` speaks of: the score's own where it is a weighted output norm."""
    return score if CRITERIA[score].mass else "contribution"


def kept_share(mass: Tensor, kept: list[int], weights: Tensor | None) -> float:
    """Share of the mass (D, E) that the kept experts hold: weighted over domains, or of the worst domain."""
    return float(_over_domains(mass, mass[:, kept].sum(-1, keepdim=True), weights)[0])


def smallest_uniform_count(
    profile: Profile,
    retain: float,
    score: str = "contribution",
    domains: Domains = "mean",
    unit: str | None = None,
) -> int:
    """Fewest experts per layer with which every layer keeps `retain` of the unit's sum, in order of score.

    The seed of this idea measures `unit="prompt_norm"`; `contribution` is the sum over tokens. Protection,
    groups and multiples are `make_plan`'s business. E if nothing can be dropped.
    """
    weights = domain_weights(profile.domains, domains)
    smallest = 0
    for layer in profile.layers:
        order = keep_order(combine(per_domain(layer, score), weights), set())
        mass = per_domain(layer, unit or retain_unit(score))
        smallest = max(smallest, layer.top_k, _count_for(mass, order, weights, retain))
    return smallest


def _count_for(mass: Tensor, order: list[int], weights: Tensor | None, retain: float) -> int:
    """Length of the shortest prefix of `order` that holds `retain` of the mass (D, E)."""
    held = _over_domains(mass, mass[:, order].cumsum(-1), weights)
    enough = (held >= retain * ENOUGH).nonzero()
    return int(enough[0]) + 1 if len(enough) else len(order)


def _over_domains(mass: Tensor, held: Tensor, weights: Tensor | None) -> Tensor:
    """(D, n) shares held in each domain -> (n,). A domain that never reached the layer has no say."""
    total = mass.sum(-1)
    present = total > 0
    if not bool(present.any()):
        return torch.zeros(held.shape[1], dtype=held.dtype)
    share = held[present] / total[present, None]
    if weights is None:
        return share.amin(0)
    weight = weights[present]
    if float(weight.sum()) == 0:
        return share.mean(0)
    return (weight / weight.sum()) @ share


def _retaining(
    profile: Profile,
    retain: float,
    unit: str,
    orders: dict[str, list[int]],
    mass: dict[str, Tensor],
    weights: Tensor | None,
    floors: dict[str, int],
    steps: dict[str, int],
    per_layer: bool,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Counts with which every layer keeps the share, and what the two units would have said."""
    if not 0 < retain < 1:
        raise UserError(f"retain {retain:g} is no share", "a share is above 0 % and below 100 %")
    experts = {layer.layer: layer.num_experts for layer in profile.layers}

    def counts_in(mass: dict[str, Tensor]) -> dict[str, int]:
        counts = {}
        for name, order in orders.items():
            count = max(floors[name], _count_for(mass[name], order, weights, retain))
            counts[name] = min(math.ceil(count / steps[name]) * steps[name], experts[name])
        if per_layer:
            return counts
        step = math.lcm(*steps.values())
        highest = math.ceil(max(counts.values()) / step) * step
        return dict.fromkeys(counts, min(highest, *experts.values()))

    counts = counts_in(mass)
    by_unit = {unit: counts}
    for other in UNITS:
        if other != unit:
            by_unit[other] = counts_in({la.layer: per_domain(la, other) for la in profile.layers})
    if all(counts[name] >= experts[name] for name in counts):
        shares = {
            name: kept_share(mass[name], order[: len(order) - steps[name]], weights)
            for name, order in orders.items()
        }
        worst = min(shares, key=lambda name: shares[name])
        raise UserError(
            f"no cut retains {100 * retain:g} % of {unit} in every layer: without its "
            f"{steps[worst]} least expert{'s' if steps[worst] > 1 else ''} "
            f"{worst} keeps {100 * shares[worst]:.2f} %",
            f"the first cut is at --retain {math.floor(10000 * shares[worst]) / 100:g}%",
        )
    needs = {name: _count_for(mass[name], order, weights, retain) for name, order in orders.items()}
    return counts, {
        "share": retain,
        "unit": unit,
        "decided_by": max(needs, key=lambda name: needs[name]),
        "keep_by_unit": {name: max(found.values()) for name, found in by_unit.items()},
    }


def random_like(profile: Profile, plan: Plan, seed: int = 0) -> Keep:
    """The control of a plan: as many experts of every layer, drawn at random; super experts stay too."""
    keep = {}
    for index, layer in enumerate(profile.layers):
        draw = per_domain(layer, "random", seed + index)[0]
        forced = set(plan.meta.get("super_experts", {}).get(layer.layer, ()))
        keep[layer.layer] = sorted(keep_order(draw, forced, layer.n_group)[: plan.counts[layer.layer]])
    return keep


def greedy_counts(
    combined: dict[str, Tensor],
    orders: dict[str, list[int]],
    counts: dict[str, int],
    floors: dict[str, int],
    steps: dict[str, int],
) -> dict[str, int]:
    """Counts of their own per layer with the total of `counts`: drop where the least of a layer's score goes.

    Each step takes the last `steps[name]` experts of the layer whose loss, as a share of that layer's score,
    is smallest; no layer goes below its floor. Shares of different layers are compared as if a lost percent
    meant the same everywhere, which is a guess: measure the plan.
    """
    now = {name: len(order) for name, order in orders.items()}
    surplus = sum(now.values()) - sum(counts.values())

    def cost(name: str) -> float:
        last = orders[name][now[name] - steps[name] : now[name]]
        total = float(combined[name].sum())
        return float(combined[name][last].sum()) / total if total else 0.0

    heap = [(cost(name), index, name) for index, name in enumerate(orders)]
    heapq.heapify(heap)
    while surplus > 0 and heap:
        _, index, name = heapq.heappop(heap)
        if now[name] - steps[name] < floors[name] or steps[name] > surplus:
            continue
        now[name] -= steps[name]
        surplus -= steps[name]
        heapq.heappush(heap, (cost(name), index, name))
    return now
