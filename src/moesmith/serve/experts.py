"""Which experts a text went through: one forward over it, watched inside the experts calls.

A server cannot watch while it answers: its batches mix the tokens of many clients. So an answer is read once
more, alone, when somebody wants to see it; the model gives the same routes, up to rounding. The output of the
watched forward is bit for bit what it is unwatched.
"""

# T tokens watched, K experts per token, E experts, L MoE layers

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moesmith.errors import UserError
from moesmith.experts.forward import use_experts_function
from moesmith.models.layers import MoELayer, submodule, text_layers

PER_TOKEN = 400_000  # ids in `chosen` at most: about 1.5 MB of JSON


@torch.no_grad()
def picture(model: nn.Module, ids: Sequence[int], start: int = 0) -> dict[str, Any]:
    """The experts that the tokens of `ids` from `start` on were sent to, as plain JSON data.

    Args:
        model: any model with MoE layers, packed or not, adapters on it or not.
        ids: the whole text; what stands before `start` is read but not counted.

    Returns:
        layers: L names; experts: E of the largest layer; top_k: K of each layer;
        counts: per layer, per expert, the tokens sent there; a layer's counts add up to T * K (fewer where a
        slot routes nowhere);
        weights: per layer, per expert, the mean routing weight of those tokens, 0 where there are none;
        tokens: the T ids;
        chosen: per layer, token after token, the K experts of each; of the first `chosen_tokens` tokens only.

    Raises:
        UserError: no MoE layer, nothing to count, or experts that are not shown the text's tokens.
    """
    total = len(ids) - start
    if start < 0 or total < 1:
        raise UserError(f"{len(ids)} tokens from {start} on: nothing to show")
    layers = text_layers(model)
    if not layers:
        raise UserError("the model has no MoE layers, so there are no experts to show")
    seen = _watch(model, layers, torch.tensor([list(ids)]))
    shown = min(total, max(1, PER_TOKEN // sum(layer.top_k for layer in layers)))
    counts, weights, chosen = [], [], []
    for layer in layers:
        index_TK, weight_TK = (tensor[start:] for tensor in seen[layer.experts])
        taken, mean = _sums(index_TK, weight_TK, layer.num_experts)
        counts.append(taken.tolist())
        weights.append([round(value, 5) for value in mean.tolist()])
        chosen.append(index_TK[:shown].tolist())
    return {
        "layers": [layer.name for layer in layers],
        "experts": max(layer.num_experts for layer in layers),
        "top_k": [layer.top_k for layer in layers],
        "counts": counts,
        "weights": weights,
        "tokens": [int(token) for token in ids[start:]],
        "chosen": chosen,
        "chosen_tokens": shown,
    }


def _watch(model: nn.Module, layers: list[MoELayer], ids: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Experts module -> (ids (S, K), weights (S, K)) of every token of one forward, on the CPU."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with _watching(model, layers, seen):
        # The logits of the last token only: those of a whole text times the vocabulary can be gigabytes.
        model(input_ids=ids.to(_device(model)), use_cache=False, logits_to_keep=1)
    for layer in layers:
        tokens = len(seen[layer.experts][0]) if layer.experts in seen else 0
        if tokens != ids.shape[1]:
            raise UserError(
                f"{layer.experts} was given {tokens} of the text's {ids.shape[1]} tokens",
                "this model sends only some tokens through these experts; they cannot be shown",
            )
    return seen


@contextmanager
def _watching(
    model: nn.Module, layers: list[MoELayer], seen: dict[str, tuple[Tensor, Tensor]]
) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(use_experts_function(model))
        for layer in layers:
            module: Any = submodule(model, layer.experts)
            module.experts_observer = _observer(layer.experts, seen)
            stack.callback(delattr, module, "experts_observer")
        yield


def _observer(name: str, seen: dict[str, tuple[Tensor, Tensor]]) -> Any:
    def observe(
        module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, *_: Any
    ) -> None:
        seen[name] = top_k_index.detach().cpu(), top_k_weights.detach().float().cpu()

    return observe


def _sums(index_TK: Tensor, weight_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Tokens sent to each expert, int64 (E,), and their mean routing weight, (E,)."""
    index, weight = index_TK.reshape(-1), weight_TK.reshape(-1)
    # A slot that routes nowhere: an id past the last expert, or one with the weight 0 (zaya's skip expert).
    real = (index < num_experts) & (weight != 0)
    index, weight = index[real], weight[real]
    taken = torch.bincount(index, minlength=num_experts)
    total = torch.zeros(num_experts).index_add_(0, index, weight)
    return taken, total / taken.clamp_min(1)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
