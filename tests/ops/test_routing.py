"""Sorting by expert groups every routed row once, keeps order within an expert, and undoes itself."""

import pytest
import torch

from moesmith import ops
from moesmith.ops import reference


@pytest.mark.parametrize(
    "tokens, top_k, experts", [(1, 1, 1), (1, 8, 64), (13, 3, 4), (0, 2, 4), (200, 2, 300)]
)
def test_equals_reference(tokens, top_k, experts):
    ids = torch.randint(0, experts + 1, (tokens, top_k), generator=torch.Generator().manual_seed(tokens))
    routing = ops.sort_by_expert(ids, experts)
    perm, offsets = reference.sort_by_expert(ids, experts)
    assert routing.perm.tolist() == perm and routing.offsets == offsets
    assert routing.offsets_tensor.tolist() == offsets
    assert routing.tokens_per_expert.tolist() == [b - a for a, b in zip(offsets, offsets[1:], strict=False)]
    assert routing.token_index.tolist() == [p // top_k for p in perm]
    assert routing.num_rows == int((ids < experts).sum())


@pytest.mark.parametrize("sentinels", [False, True])
def test_unsort_undoes_the_sort(sentinels):
    ids = torch.randint(0, 5 + sentinels, (11, 3), generator=torch.Generator().manual_seed(2))
    slots = torch.randn(33, 7, requires_grad=True)
    routing = ops.sort_by_expert(ids, 5)
    back = ops.unsort(slots[routing.perm], routing)
    assert back.shape == (11, 3, 7)
    kept = (ids < 5).view(-1, 1)
    assert torch.equal(back.view(33, 7), slots * kept)
    back.sum().backward()
    assert torch.equal(slots.grad, kept.expand(-1, 7).float())


def test_ids_out_of_range_are_refused():
    with pytest.raises(ValueError, match="ids from 0 to 6; wanted 0..3, or 4 to skip"):
        ops.sort_by_expert(torch.tensor([[0, 6]]), 4)
    with pytest.raises(ValueError, match="ids from -1 to 2"):
        ops.sort_by_expert(torch.tensor([[2, -1]]), 4)


def test_int32_ids():
    assert ops.sort_by_expert(torch.tensor([[1, 0]], dtype=torch.int32), 2).perm.tolist() == [1, 0]
