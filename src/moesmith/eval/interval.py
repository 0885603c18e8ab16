"""How sure a share is that was counted on few items."""

from __future__ import annotations

from math import sqrt


def wilson(hits: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of hits / n, at 95 % by default.

    Unlike hits / n +- z * standard error it stays inside 0..1 and says something at 0 of n. Wilson 1927.

    Raises:
        ValueError: no items, or more hits than items.
    """
    if n < 1 or not 0 <= hits <= n:
        raise ValueError(f"{hits} hits of {n}: wanted 0 <= hits <= n and n >= 1")
    share, spread = hits / n, z * z / n
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, centre - half), min(1.0, centre + half)
