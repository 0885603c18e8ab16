"""Mean next-token loss of a model on given token ids."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@torch.inference_mode()
def text_loss(
    model: Any, input_ids: Tensor, batch_size: int = 4, on_batch: Callable[[int], None] | None = None
) -> Tensor:
    """Nats per token of every sequence: (N, S) without padding -> (N,) fp64, logits taken in fp32.

    `on_batch` is called with the number of sequences done.
    """
    was_training = model.training
    model.eval()
    losses = []
    for rows in input_ids.split(batch_size):
        rows = rows.to(model.device)
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1]
        for row, row_logits in zip(rows, logits, strict=True):  # one at a time: fp32 logits are large
            losses.append(cross_entropy(row_logits.float(), row[1:]).double().cpu())
        if on_batch:
            on_batch(len(losses))
    model.train(was_training)
    return torch.stack(losses)
