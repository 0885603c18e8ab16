"""Fit a router to calibration tokens in closed form.

Ridge regression from the router's actual input to a target per expert (for split FFNs: the norm of the
expert's output, so the router keeps the experts that would write most). No gradient, no epochs; the solve
is in fp64.

Shapes: T tokens, H hidden size, E experts, I neurons per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_output_norms(activations: Tensor, down: Tensor, members: Tensor) -> Tensor:
    """||expert output|| of every expert on every token: (T, F), (H, F), (E, I) -> (T, E) fp32."""
    columns = [
        torch.linalg.vector_norm(activations[:, rows] @ down[:, rows].T, dim=1, dtype=torch.float32)
        for rows in members
    ]
    return torch.stack(columns, dim=1)


def fit_ridge_router(inputs: Tensor, target: Tensor, ridge: float = 1e-2, scale: float = 1e-4) -> Tensor:
    """Router rows that rank the experts of a token like `target`: (T, H), (T, E) -> (E, H) fp32.

    The target is divided by its mean over the experts of the token first: only the order inside a token
    matters, and tokens with massive activations would decide the fit. `ridge` is relative to the mean
    squared input. Logits come out with root mean square `scale` around their mean: so small that a softmax
    over the chosen experts is uniform, and the router chooses experts without weighing them. fp32 still
    tells 1e-7 apart.
    """
    x = inputs.float()
    y = target.float() / target.float().mean(dim=1, keepdim=True).clamp_min(1e-30) - 1
    gram = (x.T @ x).double()
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, (x.T @ y).double()).T.float()
    logits = x @ weight.T
    spread = (logits - logits.mean(dim=1, keepdim=True)).square().mean().sqrt()
    return weight * (scale / spread.clamp_min(1e-30))


def kept_share(target: Tensor, logits: Tensor, top_k: int) -> float:
    """Mean share of a token's summed target that its `top_k` experts hold: (T, E), (T, E) -> 0..1."""
    chosen = logits.topk(top_k, dim=1).indices
    return float((target.gather(1, chosen).sum(dim=1) / target.sum(dim=1)).mean())
