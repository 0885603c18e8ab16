"""Run a MoE model with another routing than its router's, for as long as a `with` block lasts.

    with routed(model, by_rows(rows, top_k=2)):
        model(input_ids=ids)

The experts are called with the ids and weights of a `Choose`; router, shared expert and weights stay as they
are, so it works for every decorated class, packed or not. The hidden states a `Choose` sees are the experts'
input: in Mixtral, Qwen2/3-MoE, FlexOlmo and the Gemma MoEs that is what the router reads too.

Weights are those of experts whose outputs add up as they are. Where `down_proj` was folded by a factor (a
dense FFN split into slices), `scale` has to undo it: 1/K for one slice, E/K for all of them.
"""

# B texts of a batch, T tokens of it with padding, H hidden, E experts, K experts per token by the router,
# k by a choice, G experts of a group

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from moesmith.errors import UserError
from moesmith.models.layers import MoELayer, submodule, text_layers

Choose = Callable[[int, Tensor], tuple[Tensor, Tensor]]
"""Number of the MoE layer, hidden (T, H) -> top_k_index int64 (T, k), top_k_weights (T, k); any k."""


@contextmanager
def routed(model: nn.Module, choose: Choose) -> Iterator[None]:
    """Give every MoE layer's experts these ids and weights, the weights in the dtype of the router's.

    Layers are numbered 0, 1, ... in order, those without experts left out.

    Raises:
        UserError: the model has no MoE layers; an expert was chosen that it has not (while it runs).
    """
    with ExitStack() as stack:
        for number, layer in enumerate(moe_text_layers(model)):
            hook = _replaced(number, layer, choose)
            handle = submodule(model, layer.experts).register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        yield


def moe_text_layers(model: nn.Module) -> list[MoELayer]:
    """The MoE layers that text runs through; UserError for a dense model."""
    layers = text_layers(model)
    if not layers:
        raise UserError(f"{type(model).__name__} has no MoE layers, so it has no routing")
    return layers


def _replaced(number: int, layer: MoELayer, choose: Choose) -> Callable[[nn.Module, Any], tuple[Tensor, ...]]:
    def hook(_experts: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, given_index, given_weights = args
        index, weights = choose(number, hidden.reshape(-1, hidden.shape[-1]))
        assert index.shape == weights.shape and len(index) == len(given_index), (index.shape, weights.shape)
        largest = int(index.max())  # the experts functions take num_experts for "skip" and check nothing else
        if largest >= layer.num_experts:
            raise UserError(f"{layer.name}: expert {largest} was chosen, it has {layer.num_experts}")
        return hidden, index.to(given_index.dtype), weights.to(given_weights.dtype)

    return hook


# ---------------------------------------------------------------- choices


def by_rows(rows: Sequence[Tensor], top_k: int, scale: float = 1.0) -> Choose:
    """What a router with these rows does, (E, H) per layer: softmax in fp32, top-k, renormalised to sum 1.

    The logits are taken in the dtype of the rows. So a model's own rows give the bits of its own router.
    """

    def choose(layer: int, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        rows_EH = rows[layer].to(hidden_TH.device)
        probabilities_TE = linear(hidden_TH.to(rows_EH.dtype), rows_EH).float().softmax(-1)
        weights, index = probabilities_TE.topk(top_k, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        return index, weights if scale == 1 else weights * scale

    return choose


def uniform(num_experts: int, scale: float = 1.0) -> Choose:
    """All experts with weight 1/E each."""

    def choose(_layer: int, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        index = torch.arange(num_experts, device=hidden_TH.device).expand(len(hidden_TH), -1)
        return index, torch.full(index.shape, scale / num_experts, device=hidden_TH.device)

    return choose


class Forced:
    """One expert with weight 1 for every token of a text: that of its label (the oracle), or always `expert`.

    In a model of virtual groups it is the G experts of the label's group with 1/G each, because their
    `down_proj` is folded by G. An oracle is told the labels of every batch, see `set_labels`.
    """

    def __init__(self, expert: int | None = None, group: int = 1, scale: float = 1.0):
        self.expert, self.group, self.scale = expert, group, scale
        self.labels_B: Tensor | None = None

    def __call__(self, _layer: int, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        tokens, device = len(hidden_TH), hidden_TH.device
        if self.expert is not None:
            label_T = torch.full((tokens,), self.expert, device=device)
        else:
            assert self.labels_B is not None, "an oracle needs set_labels before the model runs"
            assert tokens % len(self.labels_B) == 0, (tokens, len(self.labels_B))
            label_T = self.labels_B.to(device).repeat_interleave(tokens // len(self.labels_B))
        index = label_T[:, None] * self.group + torch.arange(self.group, device=device)
        return index, torch.full(index.shape, self.scale / self.group, device=device)


class _Mixed:
    """See `mixed`."""

    def __init__(self, parts: Sequence[tuple[range, Choose]], otherwise: Choose):
        self.parts, self.otherwise = list(parts), otherwise

    def __call__(self, layer: int, hidden_TH: Tensor) -> tuple[Tensor, Tensor]:
        mine = (choose for layers, choose in self.parts if layer in layers)
        return next(mine, self.otherwise)(layer, hidden_TH)


def mixed(parts: Sequence[tuple[range, Choose]], otherwise: Choose) -> Choose:
    """A choice per range of layers; the first range that a layer is in decides."""
    return _Mixed(parts, otherwise)


def needs_labels(choose: Choose) -> bool:
    """Whether an oracle is in it."""
    return any(oracle.expert is None for oracle in _forced(choose))


def set_labels(choose: Choose, labels_B: Tensor) -> None:
    """Tell the oracle, also one inside `mixed`, the expert of each text of the batch to come, int64 (B,)."""
    for oracle in _forced(choose):
        oracle.labels_B = labels_B


def _forced(choose: Choose) -> Iterator[Forced]:
    if isinstance(choose, Forced):
        yield choose
    elif isinstance(choose, _Mixed):
        for inner in (*(inner for _, inner in choose.parts), choose.otherwise):
            yield from _forced(inner)
