"""Confidence intervals by resampling documents.

The tokens of one document resemble each other, so tokens are not drawn but whole documents are, with
replacement: percentile bootstrap (Efron 1979). The draws depend on the seed and the number of documents
alone, so every statistic of the same documents, and every candidate judged on them, sees the same draws
(paired). With few documents (under about 20) such intervals are somewhat too narrow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

ROUNDS = 2000
QUANTILE_ROUNDS = 400  # each costs a pass over all tokens
SEED = 0
SHARE = 0.95
_BLOCK = 4_000_000  # drawn counts in memory at a time

Interval = tuple[float, float]


def draws(documents: int, rounds: int = ROUNDS, seed: int = SEED) -> Iterator[NDArray[np.int64]]:
    """How often each document is drawn in each round, (some rounds, documents), block after block."""
    rng = np.random.default_rng(seed)
    step = max(1, _BLOCK // documents)
    for start in range(0, rounds, step):
        yield rng.multinomial(documents, np.full(documents, 1 / documents), size=min(step, rounds - start))


def ratio_interval(
    numerator: ArrayLike,
    denominator: ArrayLike,
    transform: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None,
    rounds: int = ROUNDS,
    seed: int = SEED,
) -> Interval | None:
    """95 % interval of sum(numerator) / sum(denominator), both (documents,); None for fewer than two.

    Means per token, rates, and differences of means are all of this form. `transform` is applied to each
    drawn ratio, e.g. np.exp for a ratio of perplexities.
    """
    a, b = np.asarray(numerator, np.float64), np.asarray(denominator, np.float64)
    if len(a) < 2:
        return None
    ratios = np.concatenate([(counts @ a) / (counts @ b) for counts in draws(len(a), rounds, seed)])
    return _middle(ratios if transform is None else transform(ratios))


def quantile(values: ArrayLike, share: float) -> float:
    """The smallest value that at least `share` of the values do not exceed."""
    return float(np.quantile(np.asarray(values), share, method="inverted_cdf"))


def quantile_intervals(
    values: ArrayLike,
    document: ArrayLike,
    shares: Sequence[float],
    rounds: int = QUANTILE_ROUNDS,
    seed: int = SEED,
) -> list[Interval | None]:
    """95 % interval of each quantile of token values. Values (T,), the document 0..N-1 of each (T,)."""
    x, owner = np.asarray(values), np.asarray(document)
    documents = int(owner.max()) + 1
    if documents < 2:
        return [None] * len(shares)
    order = np.argsort(x, kind="stable")
    x, owner = x[order], owner[order]
    found: list[list[float]] = [[] for _ in shares]
    for counts in draws(documents, rounds, seed):
        for count in counts:
            below = np.cumsum(count[owner])
            for i, share in enumerate(shares):
                place = np.searchsorted(below, np.ceil(share * below[-1] - 1e-9))
                found[i].append(float(x[min(place, len(x) - 1)]))
    return [_middle(np.asarray(f)) for f in found]


def _middle(samples: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(samples, [(1 - SHARE) / 2, (1 + SHARE) / 2])
    return float(low), float(high)
