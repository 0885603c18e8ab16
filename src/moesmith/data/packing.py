"""Several rows in one sequence, and the proof that they do not see each other there.

Rows stand one after another with positions that start again at 0; transformers builds a block-diagonal attention mask
from them. Layers that carry a state along the sequence (Mamba, linear attention, short convolutions) would leak it
from row to row, so a model is probed before its rows are packed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moesmith.errors import UserError

from .masks import IGNORED, Example

# Rounding moves logits a little; a leak moves them as far as an unmasked sequence does.
TOLERATED_SHARE_OF_LEAK = 0.1


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Rows grouped into sequences of at most `max_length` tokens: longest first, each where it fits most tightly.

    Deterministic; the order of the rows decides between equals.
    """
    bins: list[list[Example]] = []
    by_room: dict[int, list[int]] = {}  # free tokens -> bins with that many, oldest first
    for example in sorted(examples, key=len, reverse=True):
        size = len(example)
        room = next((r for r in range(size, max_length + 1) if by_room.get(r)), None)
        if room is None:
            bins.append([])
            index, room = len(bins) - 1, max_length
        else:
            index = by_room[room].pop(0)
        bins[index].append(example)
        if room > size:
            by_room.setdefault(room - size, []).append(index)
    return bins


def concatenate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """One sequence of several rows: input_ids, labels, position_ids, each (1, T). A row's first token is not learned."""
    input_ids = torch.cat([torch.as_tensor(e.input_ids, dtype=torch.long) for e in examples])
    labels = torch.cat([torch.as_tensor(e.labels, dtype=torch.long) for e in examples])
    position_ids = torch.cat([torch.arange(len(e)) for e in examples])
    labels[position_ids == 0] = IGNORED
    return {"input_ids": input_ids[None], "labels": labels[None], "position_ids": position_ids[None]}


@torch.no_grad()
def check_isolation(model: nn.Module, examples: Sequence[Example], length: int = 48) -> float:
    """Compare a row's logits alone with its logits behind another row.

    Args:
        model: in the state it will be trained in; put in evaluation mode for the check and back.
        examples: two of them are used, cut to `length` tokens.

    Returns:
        The deviation as a share of what the same two rows deviate when nothing separates them.

    Raises:
        UserError: the second row sees the first one.
    """
    first, second = _two_rows(examples, length)
    device = next(p.device for p in model.parameters())
    training = model.training
    model.eval()
    try:
        alone = _logits(model, second, torch.arange(len(second)), device)
        both = torch.cat([first, second])
        positions = torch.cat([torch.arange(len(first)), torch.arange(len(second))])
        packed = _logits(model, both, positions, device)[len(first) :]
        mixed = _logits(model, both, torch.arange(len(both)), device)[len(first) :]
    finally:
        model.train(training)
    leak = (mixed - alone).abs().mean().item()
    deviation = (packed - alone).abs().mean().item()
    if deviation > TOLERATED_SHARE_OF_LEAK * leak and deviation > 1e-5 * alone.abs().mean().item():
        raise UserError(
            "packed rows would see each other in this model: the logits of a row behind another one move by "
            f"{deviation:.3g}, by {leak:.3g} without any separation",
            "set data.packing=false (layers that carry a state along the sequence cannot be packed)",
        )
    return deviation / leak if leak else 0.0


def _two_rows(examples: Sequence[Example], length: int) -> tuple[Tensor, Tensor]:
    chosen = sorted(examples, key=len, reverse=True)[:2]
    first, second = chosen[0], chosen[-1]
    rows = [torch.as_tensor(e.input_ids[:length], dtype=torch.long) for e in (first, second)]
    return rows[0], rows[1].flip(0) if torch.equal(rows[0], rows[1]) else rows[1]


def _logits(model: nn.Module, ids: Tensor, positions: Tensor, device: torch.device) -> Tensor:
    inputs: dict[str, Any] = {"input_ids": ids[None].to(device), "position_ids": positions[None].to(device)}
    return model(**inputs, use_cache=False).logits[0].float().cpu()
