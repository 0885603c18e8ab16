"""Rows grouped by expert times packed expert matrices: forward and backward, one autograd function.

The packed weights are frozen. Nothing dequantised is kept: backward unpacks again from the same bytes, so
activation memory does not grow with the number of experts and no tensor of stack size exists in either
direction. A stack that may be gone by then (its memory lent for the forward only) is lent again for backward.
A low-rank adapter is applied in activation space. Which code runs is chosen per call by device,
dtype and size; all of them compute what `reference.grouped_linear` says.
"""

# R routed rows, E experts, r adapter rank; the stack is (E, out, in), or (E, in, out) if transposed

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu, cuda, loop
from .stack import PackedStack

Again = Callable[[], AbstractContextManager[PackedStack]]
"""Lends the stack of a forward once more, for its backward: the experts that had rows are in it."""


@dataclass
class Lora:
    """A low-rank delta per expert: scaling * B_e A_e is added to the matrix of expert e."""

    A: Tensor
    """(E, r, in)."""
    B: Tensor
    """(E, out, r); may be a non-contiguous view."""
    scaling: float = 1.0


def grouped_linear(
    x: Tensor,
    stack: PackedStack,
    offsets: Sequence[int] | Tensor,
    lora: Lora | None = None,
    transposed: bool = False,
    again: Again | None = None,
) -> Tensor:
    """x (R, in), rows of expert e at offsets[e]:offsets[e+1], times that expert's matrix -> (R, out) in x's
    dtype.

    Gradients reach x and the adapter; experts without rows get zero adapter gradients. `transposed` says the
    stack is (E, in, out). `again`: `stack` is only lent for this call, backward asks here. A Tensor of
    offsets costs a host sync. ValueError if the shapes do not fit together, RuntimeError if an expert with
    rows is not in the stack.
    """
    bounds = offsets.tolist() if isinstance(offsets, Tensor) else list(offsets)
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    _check(x, stack, bounds, lora, transposed)
    if lora is None:
        return _GroupedLinear.apply(x, None, None, 1.0, stack, bounds, transposed, again)
    return _GroupedLinear.apply(x, lora.A, lora.B, float(lora.scaling), stack, bounds, transposed, again)


def _check(x: Tensor, stack: PackedStack, bounds: list[int], lora: Lora | None, transposed: bool) -> None:
    experts, rows, columns = stack.shape
    wide_in, wide_out = (rows, columns) if transposed else (columns, rows)
    if x.dim() != 2 or x.shape[1] != wide_in:
        raise ValueError(
            f"x is {tuple(x.shape)}; a stack {stack.shape} with transposed={transposed} wants (R, {wide_in})"
        )
    if len(bounds) != experts + 1 or bounds[0] != 0 or bounds[-1] != len(x):
        raise ValueError(
            f"offsets has {len(bounds)} entries from {bounds[0]} to {bounds[-1]}; "
            f"wanted {experts + 1} from 0 to {len(x)} (one boundary per expert, covering every row)"
        )
    _check_there(stack, bounds)
    if lora is not None:
        rank = lora.A.shape[1] if lora.A.dim() == 3 else -1
        if lora.A.shape != (experts, rank, wide_in) or lora.B.shape != (experts, wide_out, rank):
            raise ValueError(
                f"adapter A {tuple(lora.A.shape)}, B {tuple(lora.B.shape)} do not fit; "
                f"wanted ({experts}, r, {wide_in}) and ({experts}, {wide_out}, r)"
            )


def _check_there(stack: PackedStack, bounds: list[int]) -> None:
    """RuntimeError if an expert with rows is not in the stack: the kernels do not look."""
    if stack.where is not None:
        stack.places([e for e in range(len(bounds) - 1) if bounds[e] < bounds[e + 1]])


def _project(
    x: Tensor, stack: PackedStack, offsets: list[int], over_columns: bool, extra: loop.Extra = None
) -> Tensor:
    """Per expert x @ W^T (over_columns: contract the stack's last dimension) or x @ W, plus rows @ mats of
    `extra`."""
    if x.is_cuda:
        return cuda.project(x, stack, offsets, over_columns, extra)
    if cpu.can_project(x, stack):
        return cpu.project(x, stack, offsets, over_columns, extra)
    return loop.project(x, stack, offsets, over_columns, extra)


def _gram(p: Tensor, q: Tensor, offsets: list[int], dtype: torch.dtype, like: PackedStack) -> Tensor:
    """Per expert p^T q: (R, r), (R, m) -> (E, r, m) in `dtype`; zero for experts without rows."""
    if p.is_cuda:
        return cuda.gram(p, q, offsets, dtype)
    if cpu.can_project(q, like):
        return cpu.gram(p, q, offsets, dtype)
    return loop.gram(p, q, offsets, dtype)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        lora_a: Tensor | None,
        lora_b: Tensor | None,
        scaling: float,
        stack: PackedStack,
        offsets: list[int],
        transposed: bool,
        again: Again | None,
    ) -> Tensor:
        x = x.contiguous()
        # what is lent is not held on to: its memory is someone else's by then
        ctx.again = (lambda: nullcontext(stack)) if again is None else again
        ctx.offsets, ctx.transposed, ctx.scaling = offsets, transposed, scaling
        if lora_a is None or lora_b is None:
            ctx.save_for_backward(None, None, None, None)
            return _project(x, stack, offsets, over_columns=not transposed)
        a = PackedStack(_cast_hit(lora_a, offsets, x.dtype), scheme="bf16")
        low_Rr = _project_low_rank(x, a, offsets, stack).mul_(scaling)
        # B arrives as PEFT stores it, expert fastest: this is its one contiguous copy, rank-major
        b_ErO = _cast_hit(lora_b.transpose(1, 2), offsets, x.dtype)
        y = _project(x, stack, offsets, not transposed, (low_Rr, b_ErO))
        wants_a, wants_b = ctx.needs_input_grad[1:3]
        ctx.save_for_backward(x if wants_a else None, low_Rr if wants_b else None, lora_a, lora_b)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        # first: under gradient checkpointing this runs the forward once more, which brings the experts back
        saved = ctx.saved_tensors
        with ctx.again() as stack:
            return _backward(ctx, stack, grad_y.contiguous(), *saved)


def _backward(
    ctx: Any,
    stack: PackedStack,
    grad_y: Tensor,
    x: Tensor | None,
    low_Rr: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
) -> tuple[Tensor | None, ...]:
    offsets, over_columns = ctx.offsets, ctx.transposed
    _check_there(stack, offsets)
    wants_x, wants_a, wants_b = ctx.needs_input_grad[:3]
    grad_x = grad_a = grad_b = None
    if lora_a is None or lora_b is None:
        if wants_x:
            grad_x = _project(grad_y, stack, offsets, over_columns)
        return grad_x, *[None] * 7
    if wants_x or wants_a:
        b = PackedStack(_cast_hit(lora_b.transpose(1, 2), offsets, grad_y.dtype), scheme="bf16")
        low_grad_Rr = _project_low_rank(grad_y, b, offsets, stack).mul_(ctx.scaling)
        if wants_x:
            a_ErI = _cast_hit(lora_a, offsets, grad_y.dtype)
            grad_x = _project(grad_y, stack, offsets, over_columns, (low_grad_Rr, a_ErI))
        if wants_a:
            assert x is not None, "kept for this"
            grad_a = _gram(low_grad_Rr, x, offsets, lora_a.dtype, stack)
    if wants_b:
        assert low_Rr is not None, "kept for this"
        grad_b = _gram(low_Rr, grad_y, offsets, lora_b.dtype, stack).transpose(1, 2)
    return grad_x, grad_a, grad_b, *[None] * 5


def _cast_hit(adapter: Tensor, offsets: list[int], dtype: torch.dtype) -> Tensor:
    """(E, r, m) in `dtype`, contiguous; when few experts have rows (decoding), only theirs are filled in.

    Free for an adapter that is so already: a caller that decodes many tokens may keep one prepared.
    """
    experts = len(offsets) - 1
    if adapter.dtype == dtype and adapter.is_contiguous():
        return adapter
    if offsets[-1] * 4 <= experts and adapter.device.type == "cpu":
        hit = torch.tensor([e for e in range(experts) if offsets[e] < offsets[e + 1]], dtype=torch.int64)
        out = torch.empty(adapter.shape, dtype=dtype)
        # each the faster one
        rows = adapter.index_select(0, hit) if adapter.is_contiguous() else adapter[hit]
        return out.index_copy_(0, hit, rows.to(dtype))
    return adapter.to(dtype).contiguous()


def _project_low_rank(x: Tensor, small: PackedStack, offsets: list[int], like: PackedStack) -> Tensor:
    """x times a small stack (E, r, in), transposed: takes the same road as the large stack `like`."""
    if x.is_cuda:
        return cuda.project(x, small, offsets, over_columns=True)
    if cpu.can_project(x, like):
        return cpu.project(x, small, offsets, over_columns=True)
    return loop.project(x, small, offsets, over_columns=True)
