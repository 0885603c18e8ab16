"""Rows to experts and back: values and gradients are those of plain indexing."""

import pytest
import torch

from moesmith.ops.routing import sort_by_expert
from moesmith.ops.rows import combine_rows, gather_rows

E, H = 4, 8
INDEX = {
    "spread": torch.randint(E, (9, 2), generator=torch.Generator().manual_seed(0)),
    "one token": torch.tensor([[3, 1]]),
    "top-1": torch.tensor([[2], [2], [0]]),
    "some elsewhere": torch.tensor([[0, E], [E, E], [1, 1]]),
    "no tokens": torch.empty(0, 2, dtype=torch.long),
}


def plain(hidden, weights, scale, index):
    """The same without sorting: (T, K, H) slots, those elsewhere weigh nothing."""
    slots = hidden[:, None, :] * scale[index.clamp(max=E - 1)][..., None]
    return (slots * (weights * (index < E))[..., None]).sum(1)


@pytest.mark.parametrize("case", INDEX)
def test_values_and_gradients_are_those_of_plain_indexing(case):
    index = INDEX[case]
    routing = sort_by_expert(index, E)
    scale = torch.randn(E)  # stands for what the experts do to a row
    hidden = torch.randn(len(index), H, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
    rows = gather_rows(hidden, routing) * scale[index.reshape(-1)[routing.perm]][:, None]
    ours, theirs = combine_rows(rows, weights, routing), plain(hidden, weights, scale, index)
    torch.testing.assert_close(ours, theirs)
    grad = torch.randn_like(ours)
    for got, want in zip(
        torch.autograd.grad(ours, (hidden, weights), grad),
        torch.autograd.grad(theirs, (hidden, weights), grad),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_fp32_weights_promote_bf16_rows():
    routing = sort_by_expert(INDEX["spread"], E)
    rows = torch.randn(routing.num_rows, H).bfloat16().requires_grad_(True)
    out = combine_rows(rows, torch.rand(9, 2), routing)
    assert out.dtype == torch.float32
    out.sum().backward()
    assert rows.grad.dtype == torch.bfloat16
