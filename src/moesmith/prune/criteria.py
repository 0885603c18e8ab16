"""Which experts matter: every published per-expert score, from the sums one profiling pass has stored.

For expert e and the tokens T_e that were routed to it: g is the routing weight as the experts call receives
it (after renormalisation and scaling), f the expert's output before that weight, y the layer's routed sum.
Each score is a function of one layer's sums to (D, E), higher means keep; an expert that no token of a domain
reached scores 0 there. `scores` brings the domains together.
"""

# D domains, E experts

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.prune.stats import LayerStats, Profile

Domains = str | Mapping[str, float]
"""How domains become one score: "mean", "max", or a weight for each domain."""


@dataclass(frozen=True)
class Criterion:
    """A score and what a reader has to know about it."""

    score: Callable[[LayerStats], Tensor]
    unit: str
    mass: bool = False
    """whether a share of its sum is a share of weighted output norm, which `--retain` may be asked in"""


def scores(profile: Profile, criterion: str, domains: Domains = "mean", seed: int = 0) -> dict[str, Tensor]:
    """One score per expert: MoELayer.name -> (E,) fp64; sums to 1 at most, to D by "max".

    Args:
        criterion: a key of CRITERIA.
        domains: each domain is divided by its sum over the layer's experts first, so that neither its length
            nor the layer's scale counts. Then "mean", "max" over domains, or the weighted mean.
        seed: for "random" only.

    Raises:
        UserError: an unknown criterion or domain, a score this profile cannot give.
    """
    if criterion not in CRITERIA:
        raise UserError(f"unknown score {criterion!r}", f"choose from {', '.join(CRITERIA)}")
    weights = domain_weights(profile.domains, domains)
    return {
        layer.layer: combine(per_domain(layer, criterion, seed + index), weights)
        for index, layer in enumerate(profile.layers)
    }


def per_domain(layer: LayerStats, criterion: str, seed: int = 0) -> Tensor:
    """A layer's scores, (D, E), each domain's divided by their sum; a domain without tokens is all zero."""
    raw = random(layer, seed) if criterion == "random" else CRITERIA[criterion].score(layer)
    if not bool(raw.isfinite().all()):
        raise UserError(
            f"{criterion} is not known for {layer.layer}",
            "easyep needs the residual stream beside the experts, which this architecture hides: "
            "choose another --score"
            if criterion == "easyep"
            else "profile again: the statistics of this layer are damaged",
        )
    return _ratio(raw, raw.sum(-1, keepdim=True))


def combine(shares: Tensor, weights: Tensor | None) -> Tensor:
    """(D, E) shares -> (E,): the largest over domains where `weights` is None, else the weighted sum."""
    return shares.amax(0) if weights is None else weights @ shares


def domain_weights(names: list[str], domains: Domains) -> Tensor | None:
    """(D,) weights that sum to 1; None stands for "max". Raises UserError for a domain there is none of."""
    if domains == "max":
        return None
    if domains == "mean":
        return torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    if isinstance(domains, str):
        raise UserError(f"--domains {domains}", "use mean, max, or weights: code=2,math=1")
    unknown = [name for name in domains if name not in names]
    if unknown:
        raise UserError(f"the profile has no domain {unknown[0]!r}", f"it has {', '.join(names)}")
    weights = torch.tensor([float(domains.get(name, 0.0)) for name in names], dtype=torch.float64)
    if not bool((weights >= 0).all()) or not bool(weights.isfinite().all()) or float(weights.sum()) <= 0:
        raise UserError("domain weights must be 0 or more, and one of them above 0")
    return weights / weights.sum()


def parse_domains(text: str) -> Domains:
    """The words of the command line: "mean", "max", or "code=2,math=1"."""
    if text in ("mean", "max"):
        return text
    try:
        pairs = [part.split("=") for part in text.split(",")]
        return {name.strip(): float(weight) for name, weight in pairs}
    except ValueError:
        raise UserError(f"--domains {text}", "use mean, max, or weights: code=2,math=1") from None


# ---------------------------------------------------------------- counts and gates


def frequency(layer: LayerStats) -> Tensor:
    """|T_e|, tokens. Usage; the count that every profiler has."""
    return layer.sums["tokens"]


def gate(layer: LayerStats) -> Tensor:
    """sum g over T_e. Usage weighted by the router's confidence (SEER-MoE, 2404.05089)."""
    return layer.sums["gate"]


def esft_gate(layer: LayerStats) -> Tensor:
    """Mean g over all tokens of the domain, 0 where the expert was not chosen (ESFT, 2407.01906)."""
    return _ratio(layer.sums["gate"], _all_tokens(layer))


def esft_token(layer: LayerStats) -> Tensor:
    """Share of the domain's selections, |T_e| / (K tokens) (ESFT, 2407.01906)."""
    return _ratio(layer.sums["tokens"], layer.top_k * _all_tokens(layer))


# ---------------------------------------------------------------- norms of the expert's output


def ean(layer: LayerStats) -> Tensor:
    """sum ‖f‖ over T_e, output norm x tokens. Expert activation norm (REAP's code)."""
    return layer.sums["norm"]


def man(layer: LayerStats) -> Tensor:
    """mean ‖f‖ over T_e, output norm. Says nothing about how often the expert is used."""
    return _ratio(layer.sums["norm"], layer.sums["tokens"])


def msan(layer: LayerStats) -> Tensor:
    """mean ‖f‖^2 over T_e, squared output norm (2606.15716)."""
    return _ratio(layer.sums["norm_sq"], layer.sums["tokens"])


def ean_ca(layer: LayerStats) -> Tensor:
    """‖mean f over T_e‖, output norm: what is left after opposite outputs cancel (REAP's code).

    Profiles hold the mean over all domains, so every domain has the same score.
    """
    norm = layer.mean_output.double().norm(dim=-1)
    return norm.expand(layer.sums["tokens"].shape).clone()


def max_norm(layer: LayerStats) -> Tensor:
    """max ‖f‖ over T_e, output norm. One token decides."""
    return layer.max_norm.double()


# ---------------------------------------------------------------- what reaches the layer's output


def contribution(layer: LayerStats) -> Tensor:
    """sum g‖f‖ over T_e, weighted output norm x tokens. What the expert adds, summed over tokens."""
    return layer.sums["contribution"]


def reap(layer: LayerStats) -> Tensor:
    """mean g‖f‖ over T_e, weighted output norm: per use, however rare the use (REAP, 2510.13999)."""
    return _ratio(layer.sums["contribution"], layer.sums["tokens"])


def prompt_norm(layer: LayerStats) -> Tensor:
    """sum over documents of sqrt(sum_t g^2‖f‖^2): the norm of the weighted outputs over a whole document.

    Grows with the square root of a document's tokens, so many small contributions count for less than in
    `contribution`. The unit of the published 128 -> 109 maps of Gemma-4.
    """
    return layer.sums["prompt_norm"]


def easyep(layer: LayerStats) -> Tensor:
    """sum g‖f‖ max(0, 1 - cos(h, h + y)), h the residual: weighted by how far the layer turns the token
    (EASY-EP, 2504.06792)."""
    return layer.sums["easyep"]


def relative(layer: LayerStats) -> Tensor:
    """sum g^2‖f‖^2 / ‖y‖^2, tokens: the expert's energy as a share of the layer's routed output."""
    return layer.sums["relative"]


def random(layer: LayerStats, seed: int = 0) -> Tensor:
    """The control: uniform in (0, 1), the same for every domain and for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(layer.num_experts, generator=generator, dtype=torch.float64)
    return draw.expand(layer.sums["tokens"].shape).clone()


CRITERIA: dict[str, Criterion] = {
    "contribution": Criterion(contribution, "sum over tokens of g‖f‖", mass=True),
    "reap": Criterion(reap, "mean over routed tokens of g‖f‖"),
    "prompt_norm": Criterion(prompt_norm, "sum over documents of ‖g f‖ over the whole document", mass=True),
    "easyep": Criterion(easyep, "sum over tokens of g‖f‖ (1 - cos(h, h + y))", mass=True),
    "relative": Criterion(relative, "sum over tokens of g²‖f‖² / ‖y‖²"),
    "man": Criterion(man, "mean over routed tokens of ‖f‖"),
    "msan": Criterion(msan, "mean over routed tokens of ‖f‖²"),
    "ean": Criterion(ean, "sum over routed tokens of ‖f‖"),
    "ean_ca": Criterion(ean_ca, "norm of the mean of f"),
    "max_norm": Criterion(max_norm, "largest ‖f‖"),
    "frequency": Criterion(frequency, "tokens"),
    "gate": Criterion(gate, "sum over routed tokens of g"),
    "esft_gate": Criterion(esft_gate, "mean of g over all tokens"),
    "esft_token": Criterion(esft_token, "share of selections"),
    "random": Criterion(random, "a seeded draw"),
}


def _all_tokens(layer: LayerStats) -> Tensor:
    """(D, 1) tokens of each domain that this layer routed: every token makes K choices."""
    return layer.sums["tokens"].sum(-1, keepdim=True) / layer.top_k


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0: an expert that was never reached has no mean."""
    return torch.where(b == 0, 0.0, a / torch.where(b == 0, 1.0, b))
