"""Several rows in one sequence, and the proof that they do not see each other there.

Rows stand one after another with positions that start again at 0; transformers builds a block-diagonal
attention mask from them. Layers that carry a state along the sequence (Mamba, linear attention, short
convolutions) would leak it from row to row, so a model is probed before its rows are packed.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moesmith.errors import UserError

from .masks import IGNORED, Example

# Share of what two rows do to each other when nothing separates them. Measured on 57 tiny families in bf16:
# models that keep rows apart come to 0.0000 and at most 0.0013, the others to 0.08 and 0.023 or more.
TOLERATED_CONTENT = 0.01
TOLERATED_PLACE = 0.02

PROBED = 256  # tokens of the row that is compared; the row before it is as long as packing allows


def pack(examples: Sequence[Example], max_length: int) -> list[list[Example]]:
    """Rows grouped into sequences of at most `max_length` tokens: longest first, where it fits most tightly.

    Deterministic; the order of the rows decides between equals.
    """
    bins: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for example in sorted(examples, key=len, reverse=True):
        at = bisect.bisect_left(rooms, (len(example), -1))
        if at == len(rooms):
            bins.append([])
            room, index = max_length, len(bins) - 1
        else:
            room, index = rooms.pop(at)
        bins[index].append(example)
        bisect.insort(rooms, (room - len(example), index))
    return bins


def concatenate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """One sequence of several rows: input_ids, labels, position_ids, each (1, T).

    A row's first token is not learned: the token before it belongs to another row.
    """
    input_ids = torch.cat([torch.as_tensor(e.input_ids, dtype=torch.long) for e in examples])
    labels = torch.cat([torch.as_tensor(e.labels, dtype=torch.long) for e in examples])
    position_ids = torch.cat([torch.arange(len(e)) for e in examples])
    labels[position_ids == 0] = IGNORED
    return {"input_ids": input_ids[None], "labels": labels[None], "position_ids": position_ids[None]}


@torch.no_grad()
def check_isolation(model: Any, examples: Sequence[Example], max_length: int) -> None:
    """Prove that a packed row is computed as if it were alone.

    The hidden states of a row B are compared in three sequences of the same length, so that rounding is the
    same too: behind a row A, behind other content in A's place, and in front of A.

    Args:
        model: a causal language model of transformers, without adapters.
        examples: rows to take A and B from.
        max_length: tokens in a packed sequence.

    Raises:
        UserError: B's hidden states follow what is in A, or whether B comes first.
    """
    device = next(model.parameters()).device
    backbone, training = model.base_model, model.training
    ordered = sorted(examples, key=len)
    b = _tokens(ordered[len(ordered) // 2], PROBED)
    a = torch.cat([_tokens(e, max_length) for e in ordered[::-1][:64]])[: max(max_length - len(b), len(b))]
    other = a.flip(0).roll(1)

    def hidden(rows: tuple[Tensor, Tensor], separate: bool = True) -> tuple[Tensor, Tensor]:
        ids = torch.cat(rows)
        positions = (
            torch.cat([torch.arange(len(row)) for row in rows]) if separate else torch.arange(len(ids))
        )
        states = backbone(
            input_ids=ids[None].to(device), position_ids=positions[None].to(device), use_cache=False
        )
        first, second = states.last_hidden_state[0].float().split([len(rows[0]), len(rows[1])])
        return first, second

    model.eval()
    try:
        behind, behind_other, before = hidden((a, b))[1], hidden((other, b))[1], hidden((b, a))[0]
        mixed = hidden((a, b), separate=False)[1]
    finally:
        model.train(training)
    leak = float((mixed - before).abs().mean())
    content = float((behind - behind_other).abs().mean())
    place = float((behind - before).abs().mean())
    if content > TOLERATED_CONTENT * leak or place > TOLERATED_PLACE * leak:
        why = "what stands" if content > TOLERATED_CONTENT * leak else "how much stands"
        share = max(content, place) / leak if leak else float("inf")
        raise UserError(
            f"{type(model).__name__} cannot be trained on packed rows: a row changes with {why} before it "
            f"({share:.0%} of the change without any separation)",
            "data.packing=false (attention that does not know where rows begin, or a layer with a state)",
        )


def _tokens(example: Example, most: int) -> Tensor:
    return torch.as_tensor(example.input_ids[:most], dtype=torch.long)
