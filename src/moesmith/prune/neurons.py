"""One expert as a set of neurons: read it from its stacks, put its neurons in another order, line two up.

An expert's function does not depend on the order of its F neurons: a row of gate and up, the same row's
biases and the same column of down move together. Two experts can be compared or averaged neuron by neuron
only after a matching of their neurons. How a module lays its stacks out is told by the flags of
transformers' decorator (`is_transposed`, `is_concatenated`, `has_gate`, `has_bias`).
"""

# E experts, F neurons of one expert, X numbers that belong to one neuron

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..experts.storage import scheme_of, stack, weight_names

Weights = dict[str, Tensor]
"""one expert's matrices and biases by their name in the module"""


def expert_names(module: Any) -> tuple[str, ...]:
    """Names of the stacked tensors one expert has a slice of: weights, then biases."""
    names = weight_names(module)
    return names + tuple(f"{name}_bias" for name in names if module.has_bias)


def expert_weights(module: Any, expert: int) -> Weights:
    """One expert's matrices and biases, fp32, laid out as the module has them; packed ones dequantised."""
    found = {}
    for name in expert_names(module):
        tensor = getattr(module, name)
        if tensor.dtype == torch.uint8 and scheme_of(module) is not None:
            found[name] = stack(module, name).expert(expert, torch.float32)
        else:
            found[name] = tensor[expert].detach().float()
    return found


def num_neurons(module: Any) -> int:
    """F: length of the dimension between the two products."""
    name = "down_proj"
    shape = stack(module, name).shape if scheme_of(module) is not None else module.down_proj.shape
    return shape[1] if module.is_transposed else shape[2]


def permuted(module: Any, weights: Weights, order: Tensor) -> Weights:
    """The same expert with neuron `order[i]` in place i; `order` (F,) holds every neuron once."""
    return {
        name: tensor if axis is None else tensor.index_select(axis, places(module, order) if wide else order)
        for name, tensor, axis, wide in _located(module, weights)
    }


def as_neurons(module: Any, weights: Weights) -> Tensor:
    """(F, X): everything that belongs to one neuron in a row. The down projection's bias belongs to none."""
    parts = []
    for _, tensor, axis, wide in _located(module, weights):
        if axis is None:
            continue
        rows = tensor.movedim(axis, 0).reshape(tensor.shape[axis], -1)
        if wide:  # gate and up of one neuron side by side
            half = len(rows) // 2
            gate, up = (rows[:half], rows[half:]) if module.is_concatenated else (rows[::2], rows[1::2])
            rows = torch.cat([gate, up], dim=1)
        parts.append(rows)
    return torch.cat(parts, dim=1)


def places(module: Any, order: Tensor) -> Tensor:
    """(F,) neurons -> (2F,) rows of gate_up_proj that are theirs: [gate; up], or gate and up in turns."""
    if module.is_concatenated:
        return torch.cat([order, order + len(order)])
    return torch.stack([2 * order, 2 * order + 1], dim=1).flatten()


def align(reference: Tensor, other: Tensor) -> Tensor:
    """The order (F,) of `other`'s neurons that lies closest to `reference`: both (F, X).

    Maximises the sum of inner products, thus the cosine of the two whole experts: an assignment problem,
    solved exactly (weight matching, Ainsworth et al., Git Re-Basin, 2022). F^3 in the worst case.
    """
    from scipy.optimize import linear_sum_assignment

    gains = (reference @ other.T).cpu().double().numpy()
    _, order = linear_sum_assignment(gains, maximize=True)
    return torch.from_numpy(order).to(other.device)


def order_is_free(module: Any) -> bool:
    """Whether this module's activation treats every neuron alike, so that their order does not matter.

    Tried, not assumed: a family whose activation mixes neighbours must not be aligned.
    """
    generator = torch.Generator().manual_seed(0)
    neurons, device = num_neurons(module), module.down_proj.device
    order = torch.randperm(neurons, generator=generator)
    wide = places(module, order) if module.has_gate else order
    x = torch.randn(4, len(wide), generator=generator)
    activation = module._apply_gate if module.has_gate else module.act_fn
    with torch.no_grad():
        straight, moved = activation(x.to(device)), activation(x[:, wide].to(device))
    return bool(torch.allclose(straight[:, order.to(device)], moved, rtol=1e-5, atol=1e-6))


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two tensors of the same shape, taken as one long vector each."""
    a, b = normalize(a.flatten(), dim=0), normalize(b.flatten(), dim=0)
    return float(a @ b)


def _located(module: Any, weights: Weights) -> list[tuple[str, Tensor, int | None, bool]]:
    """(name, tensor, axis of the neurons or None, whether the axis is 2F long) of an expert's tensors."""
    found: list[tuple[str, Tensor, int | None, bool]] = []
    for name, tensor in weights.items():
        first = not name.startswith("down_proj")
        wide = first and module.has_gate
        if name.endswith("_bias"):
            found.append((name, tensor, 0 if first else None, wide))
        else:
            found.append((name, tensor, int(first == module.is_transposed), wide))
    return found
