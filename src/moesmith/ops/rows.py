"""Send every token's hidden state to its experts' rows, and bring the rows' weighted sum back.

The two moves are each other's transpose, so the backward of either is written with the other one: a gather
and a sum over the top-k, in a fixed order, where autograd would scatter-add row by row.
"""

# T tokens, K top-k, R routed rows sorted by expert, H features

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .routing import Routing, unsort


def gather_rows(hidden: Tensor, routing: Routing) -> Tensor:
    """(T, H) -> (R, H): each routed row's token."""
    return _Gather.apply(hidden, routing)


def combine_rows(rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
    """(R, H) rows and (T, K) routing weights -> (T, H): the weighted sum of each token's rows.

    The product and the sum have the dtype that torch promotes `rows` and `weights` to; dropped slots count
    as zero.
    """
    return _Combine.apply(rows, weights, routing)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, routing: Routing) -> Tensor:
        ctx.routing = routing
        return hidden[routing.token_index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_rows: Tensor) -> tuple[Tensor, None]:
        return unsort(grad_rows, ctx.routing).sum(dim=1), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, routing: Routing) -> Tensor:
        weights_R = weights.reshape(-1)[routing.perm].unsqueeze(-1)
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights_R)
        ctx.routing, ctx.rows_dtype, ctx.weights_dtype = routing, rows.dtype, weights.dtype
        return unsort(rows * weights_R, routing).sum(dim=1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights_R = ctx.saved_tensors
        grad_R = grad[ctx.routing.token_index]
        grad_weights = None
        if rows is not None:
            flat = grad.new_zeros(ctx.routing.num_slots, dtype=ctx.weights_dtype)
            flat[ctx.routing.perm] = (grad_R * rows).sum(dim=-1, dtype=torch.float32).to(flat.dtype)
            grad_weights = flat.view(-1, ctx.routing.top_k)
        grad_rows = (grad_R * weights_R).to(ctx.rows_dtype) if ctx.needs_input_grad[0] else None
        return grad_rows, grad_weights, None
