"""Grouped products as a loop of torch.mm over the experts that have rows: the road for any device, dtype and
size.

One expert is unpacked at a time, into one reused scratch matrix. The products have the shapes stock
transformers uses, so a packed model gives the bits of the stock model holding the dequantised weights.
"""

# R routed rows, E experts, r adapter rank

from __future__ import annotations

import torch
from torch import Tensor

from .stack import PackedStack

Extra = tuple[Tensor, Tensor] | None
"""rows (R, r) and mats (E, r, out): rows_e @ mats_e is added to the product of expert e."""


def project(
    x: Tensor, stack: PackedStack, offsets: list[int], over_columns: bool, extra: Extra = None
) -> Tensor:
    """Per expert x @ W^T if over_columns, else x @ W; x (R, in) contiguous -> (R, out) in x's dtype."""
    _, rows, columns = stack.shape
    out = x.new_empty(len(x), rows if over_columns else columns)
    scratch = None if stack.codes.dtype == x.dtype else x.new_empty(rows, columns)
    for e, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if start == end:
            continue
        weight = (
            stack.codes[stack.places([e])[0]] if scratch is None else stack.expert(e, x.dtype, out=scratch)
        )
        torch.mm(x[start:end], weight.t() if over_columns else weight, out=out[start:end])
        if extra is not None:
            out[start:end].addmm_(extra[0][start:end], extra[1][e])
    return out


def gram(p: Tensor, q: Tensor, offsets: list[int], dtype: torch.dtype) -> Tensor:
    """Per expert p^T q: (R, r), (R, m) -> (E, r, m) in `dtype`; zero for experts without rows."""
    out = torch.zeros(len(offsets) - 1, p.shape[1], q.shape[1], dtype=dtype, device=p.device)
    for e, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        if start < end:
            out[e].copy_(p[start:end].t() @ q[start:end])
    return out
