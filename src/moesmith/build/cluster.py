"""Group the neurons of an FFN into equal experts by what they do together.

Neurons that are active on the same tokens land in the same expert, so that a token can leave whole experts
out. A neuron's weight on a token is |h_f(t)| * ||down_f||, the size of what it writes to the residual
stream.

Shapes: T tokens, F neurons, E experts, I = F / E neurons per expert.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moesmith.errors import UserError


def neuron_profiles(activations: Tensor, down_norm: Tensor) -> Tensor:
    """Unit profile of every neuron over the tokens: (T, F), (F,) -> (F, T) fp32.

    Each token is scaled to sum 1 first: otherwise the few tokens with massive activations are the whole
    profile.
    """
    size = activations.float().abs() * down_norm.float()
    size = size / size.sum(dim=1, keepdim=True).clamp_min(1e-20)
    return F.normalize(size.T, dim=1)


def cluster_neurons(profiles: Tensor, num_experts: int, seed: int = 0, iterations: int = 12) -> Tensor:
    """Balanced spherical k-means: (F, T) -> members (E, I), each neuron index exactly once, sorted in each
    row.

    Raises UserError if `num_experts` does not divide F.
    """
    neurons = profiles.shape[0]
    if neurons % num_experts:
        counts = ", ".join(str(n) for n in range(2, min(neurons, 256) + 1) if neurons % n == 0)
        raise UserError(
            f"{neurons} neurons cannot be split into {num_experts} equal experts", f"counts that do: {counts}"
        )
    # Centred, so that "on for every token" is not a likeness: what is left is when a neuron is busier than
    # usual.
    points = F.normalize(profiles - profiles.mean(dim=0), dim=1)
    generator = torch.Generator().manual_seed(seed)
    centres = points[_spread_start(points, num_experts, generator)]
    for _ in range(iterations):
        owner = balanced_assignment(points @ centres.T)
        sums = torch.zeros_like(centres).index_add_(0, owner, points)
        centres = F.normalize(sums, dim=1)
    return owner.argsort(stable=True).view(num_experts, -1)


def balanced_assignment(score: Tensor) -> Tensor:
    """Give every row one column, all columns equally often: (F, E) -> (F,) column of each row.

    Stable matching: rows propose to their best column, a full column keeps its best rows. One round is
    vectorised.
    """
    rows, columns = score.shape
    room = rows // columns
    allowed = score.clone()
    while True:
        held, owner = allowed.max(dim=1)
        # Order by column, best first inside it; a row's place in its column decides whether it stays.
        order = held.argsort(descending=True)
        order = order[owner[order].argsort(stable=True)]
        counts = torch.bincount(owner, minlength=columns)
        place = torch.arange(rows) - (counts.cumsum(0) - counts)[owner[order]]
        rejected = order[place >= room]
        if not len(rejected):
            return owner
        allowed[rejected, owner[rejected]] = -torch.inf


def _spread_start(points: Tensor, num_experts: int, generator: torch.Generator) -> Tensor:
    """k-means++ seeds: (E,) distinct row indices, each drawn far from those before."""
    chosen = [int(torch.randint(len(points), (1,), generator=generator))]
    nearest = 1 - points @ points[chosen[0]]
    for _ in range(num_experts - 1):
        weight = nearest.clamp_min(0) + 1e-12
        weight[chosen] = 0
        chosen.append(int(torch.multinomial(weight, 1, generator=generator)))
        nearest = torch.minimum(nearest, 1 - points @ points[chosen[-1]])
    return torch.tensor(chosen)
