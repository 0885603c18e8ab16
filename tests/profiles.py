"""Synthetic profiles, for tests of what is made from one: every sum consistent with its documents."""

from __future__ import annotations

import torch
from torch import Tensor

from moesmith.prune.stats import Document, LayerStats, Profile


def profile(
    tokens: Tensor, norm: Tensor | None = None, domains: int = 2, top_k: int = 2, n_group: int = 1
) -> Profile:
    """A profile in which expert e of layer l gives every one of its tokens the same output norm and gate.

    Args:
        tokens: (L, N, E) tokens that each document sends to each expert; documents take the domains in turn.
        norm: (L, E) norm of the expert's output, 1 unless given. The gate is 1 / top_k.
    """
    L, N, E = tokens.shape
    tokens = tokens.double()
    norm = torch.ones(L, E, dtype=torch.float64) if norm is None else norm.double()
    names = ["code", "math", "prose", "law", "logic"][:domains]
    of = [names[n % domains] for n in range(N)]
    documents = [Document(f"d{n}", of[n], int(tokens[0, n].sum()) // top_k, f"hash{n}") for n in range(N)]
    layers = [_layer(i, tokens[i], norm[i], of, names, top_k, n_group) for i in range(L)]
    meta = {"model": "synthetic", "model_hash": "m", "corpus_hash": "c", "date": "today"}
    return Profile(layers, names, documents, meta)


def random_profile(
    layers: int = 3,
    documents: int = 10,
    experts: int = 16,
    domains: int = 2,
    top_k: int = 2,
    n_group: int = 1,
    seed: int = 0,
    tokens: int = 200,
) -> Profile:
    """Experts of unequal use and norm; `tokens` is the mean per document and expert."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    popularity = rand(layers, 1, experts) + 0.1
    counts = (2 * tokens * popularity * (0.5 + rand(layers, documents, experts))).round()
    return profile(counts, 0.5 + rand(layers, experts), domains, top_k, n_group)


def _layer(
    index: int, tokens: Tensor, norm: Tensor, of: list[str], names: list[str], top_k: int, n_group: int
) -> LayerStats:
    gate = 1 / top_k
    per_document = {
        "tokens": tokens,
        "gate": tokens * gate,
        "norm": tokens * norm,
        "contribution": tokens * gate * norm,
        "contribution_sq": tokens * (gate * norm) ** 2,
    }
    rows = {name: [n for n, domain in enumerate(of) if domain == name] for name in names}

    def by_domain(values: Tensor) -> Tensor:
        return torch.stack([values[rows[name]].sum(0) for name in names])

    sums = {name: by_domain(values) for name, values in per_document.items()}
    sums["gate_sq"] = sums["tokens"] * gate**2
    sums["norm_sq"] = sums["tokens"] * norm**2
    sums["easyep"] = sums["contribution"] * 0.1
    sums["relative"] = sums["contribution_sq"] / sums["contribution_sq"].sum().clamp_min(1e-9)
    sums["prompt_norm"] = by_domain(per_document["contribution_sq"].sqrt())
    E = tokens.shape[1]
    reached = (sums["tokens"] > 0).double()
    mean_output = (torch.eye(E, 8) + 0.01) * norm[:, None] * (reached.amax(0) > 0)[:, None]
    return LayerStats(
        name=f"model.layers.{index}.mlp.experts",
        layer=f"model.layers.{index}.mlp",
        num_experts=E,
        top_k=top_k,
        n_group=n_group,
        topk_group=n_group,
        sums=sums,
        max_norm=reached * norm,
        max_abs=reached * norm,
        mean_output=mean_output.float(),
        coactivation=torch.zeros(E, E, dtype=torch.float64),
        per_document=per_document,
    )
