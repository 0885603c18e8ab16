"""Packed stacks whose experts lie somewhere else in larger tensors, as a residency's do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moesmith import ops


def elsewhere(stack: ops.PackedStack, where: Sequence[int], places: int) -> ops.PackedStack:
    """The same experts at the positions `where` of tensors that hold garbage everywhere else; -1: dropped."""
    positions = torch.tensor(where)

    def spread(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        shape = (places, *tensor.shape[1:])
        out = torch.full(shape, torch.nan if tensor.is_floating_point() else 255, dtype=tensor.dtype)
        for e, place in enumerate(where):
            if place >= 0:
                out[place] = tensor[e]
        return out

    parts = (spread(t) for t in (stack.codes, stack.absmax, stack.scale, stack.offset))
    return ops.PackedStack(*parts, stack.scheme, positions)
