"""Fit a router to calibration tokens in closed form.

Ridge regression from the router's actual input to a target per expert (for split FFNs: the norm of the
expert's output, so the router keeps the experts that would write most). No gradient, no epochs; the solve
is in fp64.

Shapes: T tokens, H hidden size, E experts, I neurons per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Root mean square of the logits of a router that chooses and does not weigh. bf16 ranks logits as well at
# this scale as at any, fp32 nearly. fp16 runs out of exponent: rows of 1e-6 have a few bits left.
SCALE, SCALE_FP16 = 1e-4, 2e-3
CHUNK = 2048  # tokens in fp32 at a time


def expert_output_norms(activations: Tensor, down: Tensor, members: Tensor) -> Tensor:
    """||expert output|| of every expert on every token: (T, F), (H, F), (E, I) -> (T, E) fp32."""
    columns = [
        torch.linalg.vector_norm(activations[:, rows] @ down[:, rows].T, dim=1, dtype=torch.float32)
        for rows in members
    ]
    return torch.stack(columns, dim=1)


def fit_ridge_router(inputs: Tensor, target: Tensor, ridge: float = 1e-2, scale: float = SCALE) -> Tensor:
    """Router rows that rank the experts of a token like `target`: (T, H), (T, E) -> (E, H) fp32.

    The target is divided by its mean over the experts of the token first: only the order inside a token
    matters, and tokens with massive activations would decide the fit. `ridge` is relative to the mean
    squared input. Logits come out with root mean square `scale` around their mean: so small that a softmax
    over the chosen experts is uniform, and the router chooses experts without weighing them. fp32 still
    tells 1e-7 apart. The logits of a token add up to 0, so no digits go to what experts have in common.
    """
    hidden, experts = inputs.shape[1], target.shape[1]
    y = target.float() / target.float().mean(dim=1, keepdim=True).clamp_min(1e-30) - 1
    gram = torch.zeros(hidden, hidden, dtype=torch.float64, device=inputs.device)
    moment = torch.zeros(hidden, experts, dtype=torch.float64, device=inputs.device)
    for x, part in zip(inputs.split(CHUNK), y.split(CHUNK), strict=True):
        gram += x.float().T @ x.float()
        moment += x.float().T @ part
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, moment).T.float()
    squares = 0.0
    for x in inputs.split(CHUNK):
        logits = x.float() @ weight.T
        squares += float((logits - logits.mean(dim=1, keepdim=True)).square().sum(dtype=torch.float64))
    spread = (squares / target.numel()) ** 0.5
    return weight * (scale / max(spread, 1e-30))


def kept_share(target: Tensor, logits: Tensor, top_k: int) -> float:
    """Mean share of a token's summed target that its `top_k` experts hold: (T, E), (T, E) -> 0..1."""
    chosen = logits.topk(top_k, dim=1).indices
    return float((target.gather(1, chosen).sum(dim=1) / target.sum(dim=1)).mean())


def picked_share(target: Tensor, logits: Tensor, top_k: int) -> float:
    """Mean share of a token's `top_k` largest targets that are among its `top_k` logits: (T, E) -> 0..1."""
    chosen, wanted = (
        torch.zeros_like(x).scatter_(1, x.topk(top_k, dim=1).indices, 1) for x in (logits, target)
    )
    return float((chosen.float() * wanted.float()).sum(dim=1).mean()) / top_k
