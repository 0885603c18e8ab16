"""Fit a router to calibration tokens in closed form.

Ridge regression from the router's actual input to a target per expert (for split FFNs: the norm of the expert's output,
so the router keeps the experts that would write most). Sums are in fp64; no gradient, no epochs.

Shapes: T tokens, H hidden size, E experts, I neurons per expert.
"""

from __future__ import annotations

import torch
from torch import Tensor


def expert_output_norms(activations: Tensor, down: Tensor, members: Tensor) -> Tensor:
    """||expert output|| of every expert on every token: (T, F), (H, F), (E, I) -> (T, E) fp32."""
    columns = [
        torch.linalg.vector_norm(activations[:, rows] @ down[:, rows].T, dim=1, dtype=torch.float32) for rows in members
    ]
    return torch.stack(columns, dim=1)


def fit_ridge_router(inputs: Tensor, target: Tensor, ridge: float = 1e-2, scale: float = 1e-3) -> Tensor:
    """Router rows that rank the experts of a token like `target`: (T, H), (T, E) -> (E, H) fp32.

    The target is divided by its mean over the experts of the token first: only the order inside a token matters, and
    tokens with massive activations would decide the fit. `ridge` is relative to the mean squared input.
    Logits come out with root mean square `scale` around their mean: at 1e-3 a softmax over the selected experts is
    uniform to about 0.1 %, so the router chooses experts and does not weigh them.
    """
    x = inputs.double()
    y = target.double() / target.double().mean(dim=1, keepdim=True).clamp_min(1e-30) - 1
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ y).T
    logits = x @ weight.T
    spread = (logits - logits.mean(dim=1, keepdim=True)).square().mean().sqrt()
    return (weight * (scale / spread.clamp_min(1e-30))).float()
