"""How alike the experts of a layer are: weights as they lie and after matching neurons, and outputs.

Weights are compared as one long vector per expert. As they lie, two experts look unrelated even where they
compute the same, because the order of an expert's neurons is arbitrary; matching them removes exactly that.
Matching is solved for sampled pairs, whose number and seed are part of the answer.
"""

# E experts, P sampled pairs

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from ..models.layers import moe_layers, submodule
from .merge import weight_cosines
from .neurons import align, as_neurons, cosine, expert_weights, num_neurons, order_is_free, permuted
from .stats import Profile

MATCHED_NEURONS = 6000  # neurons of all sampled pairs of a layer: matching takes up to F^3 per pair
MOST_PAIRS = 32


@dataclass(frozen=True)
class Similarity:
    """Mean cosine over pairs of different experts of one layer."""

    layer: str
    raw: float
    """of the weights, every pair"""
    aligned: float | None
    """of the weights after matching neurons, sampled pairs; None where order is not free"""
    raw_sampled: float
    """of the weights as they lie, of the same sampled pairs: what `aligned` is to be compared with"""
    output: float | None
    """of the mean outputs, every pair of experts that have one; None without a profile"""
    pairs: int
    """how many pairs were matched"""


def similarity(
    model: nn.Module,
    profile: Profile | None = None,
    seed: int = 0,
    on_layer: Callable[[], None] | None = None,
) -> list[Similarity]:
    """One row per MoE layer. Reads weights, runs nothing; a packed stack is dequantised expert by expert."""
    outputs = {layer.name: layer.mean_output for layer in profile.layers} if profile else {}
    rows = []
    for number, layer in enumerate(moe_layers(model)):
        module = submodule(model, layer.experts)
        with torch.no_grad():
            cosines = weight_cosines(module, layer.num_experts)
            pairs = sample_pairs(layer.num_experts, _pair_count(module), seed + number)
            aligned = [aligned_cosine(module, a, b) for a, b in pairs] if order_is_free(module) else []
        mean_output = outputs.get(layer.experts)
        rows.append(
            Similarity(
                layer=layer.name,
                raw=off_diagonal_mean(cosines),
                aligned=sum(aligned) / len(aligned) if aligned else None,
                raw_sampled=float(torch.stack([cosines[a, b] for a, b in pairs]).mean()),
                output=None if mean_output is None else output_cosine(mean_output),
                pairs=len(aligned),
            )
        )
        if on_layer:
            on_layer()
    return rows


def facts(rows: list[Similarity], seed: int = 0) -> dict[str, Any]:
    """The report's `similarity` section."""
    pairs = sorted({row.pairs for row in rows})
    sampled = f"{pairs[0]}" if len(pairs) == 1 else f"{pairs[0]} to {pairs[-1]}"
    return {
        "layers": [row.layer for row in rows],
        "raw": [row.raw for row in rows],
        "aligned": [row.aligned for row in rows],
        "output": [row.output for row in rows],
        "note": f"mean cosine of pairs of experts; matched neurons: {sampled} sampled pairs per layer "
        f"(seed {seed}), the rest: all pairs. Random weights of any size give a raw cosine near 0, and "
        "matching alone raises it a little: the order of neurons is chosen to fit.",
    }


def sample_pairs(num_experts: int, count: int, seed: int) -> list[tuple[int, int]]:
    """`count` different pairs a < b, all of them where there are no more."""
    every = list(combinations(range(num_experts), 2))
    if len(every) <= count:
        return every
    chosen = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:count]
    return [every[i] for i in sorted(chosen.tolist())]


def aligned_cosine(module: Any, a: int, b: int) -> float:
    """Cosine of two experts' weights with b's neurons in the order that fits a's best."""
    mine, theirs = expert_weights(module, a), expert_weights(module, b)
    order = align(as_neurons(module, mine), as_neurons(module, theirs))
    theirs = permuted(module, theirs, order)
    return cosine(*(torch.cat([part[name].flatten() for name in part]) for part in (mine, theirs)))


def off_diagonal_mean(cosines: Tensor) -> float:
    """Mean of (E, E) without the diagonal."""
    experts = len(cosines)
    return float((cosines.sum() - cosines.diagonal().sum()) / max(experts * (experts - 1), 1))


def output_cosine(mean_output: Tensor) -> float | None:
    """Mean cosine of (E, D) mean outputs over pairs of experts that were used; None for fewer than two."""
    used = mean_output[mean_output.norm(dim=1) > 0].double()
    if len(used) < 2:
        return None
    rows = normalize(used, dim=1)
    return off_diagonal_mean(rows @ rows.T)


def _pair_count(module: Any) -> int:
    return max(3, min(MOST_PAIRS, MATCHED_NEURONS // num_neurons(module)))
