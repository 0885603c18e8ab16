"""Group routed rows by expert, and put them back.

A token routed to K experts becomes K rows. Sorting the rows by expert lets each expert see its rows as one
slice. Ids equal to num_experts mean "not on this rank, weight zero" (expert parallelism); their rows are
dropped.
"""

# T tokens, K top-k, E experts, R routed rows (T*K less the dropped ones), H features

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Routing:
    """Where each routed row comes from and which rows belong to which expert."""

    perm: Tensor
    """int64 (R,): position in top_k_index.flatten() of each row, sorted by expert, stable."""
    token_index: Tensor
    """int64 (R,): token of each row."""
    tokens_per_expert: Tensor
    """int64 (E,)."""
    offsets: list[int]
    """Length E+1, on the host: rows of expert e are offsets[e]:offsets[e+1]."""
    offsets_tensor: Tensor
    """The same on the device, int32 (E+1,)."""
    num_slots: int
    """T*K, dropped rows included."""
    top_k: int

    @property
    def num_rows(self) -> int:
        """R."""
        return self.offsets[-1]


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> Routing:
    """Expert ids (T, K), 0..num_experts (num_experts = skip), to a Routing. One host sync, for the offsets.

    ValueError for ids outside that range.
    """
    if top_k_index.dim() != 2:
        raise ValueError(f"top_k_index must be (T, K), got shape {tuple(top_k_index.shape)}")
    top_k = top_k_index.shape[1]
    ids, order = torch.sort(top_k_index.flatten(), stable=True)
    # one boundary more than E+1: rows past it would have ids above num_experts
    edges = torch.arange(num_experts + 2, device=ids.device, dtype=ids.dtype)
    bounds = torch.searchsorted(ids, edges)
    host = bounds.tolist()
    if host[0] != 0 or host[-1] != len(ids):
        raise ValueError(
            f"top_k_index has ids from {int(ids.min())} to {int(ids.max())}; "
            f"wanted 0..{num_experts - 1}, or {num_experts} to skip a slot"
        )
    bounds, host = bounds[:-1], host[:-1]
    perm = order[: host[-1]]
    return Routing(
        perm=perm,
        token_index=perm // top_k if top_k > 1 else perm,
        tokens_per_expert=bounds.diff(),
        offsets=host,
        offsets_tensor=bounds.to(torch.int32),
        num_slots=len(ids),
        top_k=top_k,
    )


def unsort(rows: Tensor, routing: Routing) -> Tensor:
    """Rows in expert order (R, H) back to token order (T, K, H); dropped slots are zero."""
    if routing.num_rows == routing.num_slots:
        inverse = torch.empty_like(routing.perm)
        inverse[routing.perm] = torch.arange(len(inverse), device=inverse.device)
        return rows[inverse].view(-1, routing.top_k, rows.shape[-1])
    slots = rows.new_zeros(routing.num_slots, rows.shape[-1])
    return slots.index_copy(0, routing.perm, rows).view(-1, routing.top_k, rows.shape[-1])
