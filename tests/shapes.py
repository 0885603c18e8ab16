"""What the planner counts of the tiny models."""

from functools import cache

import tiny
from moesmith.plan.shape import Shape


@cache
def shape(family: str) -> Shape:
    """The shape of a tiny model's config."""
    return Shape.of({**tiny.config(family).to_dict(), "architectures": [tiny.model_class(family).__name__]})
