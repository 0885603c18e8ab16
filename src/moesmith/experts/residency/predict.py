"""Prediction: which experts the next MoE layer will likely want.

Its router is asked what it would choose, given what this layer's router was given: hidden states change
little from one layer to the next (Eliseev and Mazur 2023, arXiv 2312.17238). The question is put while this
layer's router runs, so that the answer is there when this layer's experts have been lent. A wrong answer
costs a transfer, never a result.
"""

# T tokens, K top-k, E experts

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

ROUTERS = ("gate", "router")
"""Attributes of a MoE block that may be its router, the first that exists."""

FEW_TOKENS = 16
"""More tokens than this want most of a layer anyway."""


def router_of(block: nn.Module) -> nn.Module | None:
    """The router beside a block's experts, adapters on it included; None if there is none by these names."""
    for name in ROUTERS:
        router = getattr(block, name, None)
        if isinstance(router, nn.Module):
            return router
    return None


class Prediction:
    """Asks one layer's router during the forward of the router before it.

    `layer` is the position of the layer it predicts.
    """

    def __init__(
        self,
        before: nn.Module,
        block: nn.Module,
        experts: nn.Module,
        layer: int,
        wanted: Callable[[int], bool] | None = None,
    ):
        """`before`: this layer's router; `block` and `experts`: of the layer to predict; `wanted`: whether an
        answer would be of use now (None: always)."""
        self.layer = layer
        self.wanted = wanted
        self.block = block
        self.experts = experts
        self.askable = router_of(block) is not None
        self._chosen: Tensor | None = None
        self._hook = before.register_forward_hook(self._ask, with_kwargs=True)

    def __deepcopy__(self, memo: dict) -> Prediction:
        return self  # as the lender it belongs to

    def take(self) -> list[int]:
        """The likely experts, ascending; empty when nobody was asked. Waits for the device to answer."""
        chosen, self._chosen = self._chosen, None
        if chosen is None:
            return []
        kept = getattr(self.experts, "experts_kept", None)
        chosen = chosen if kept is None else kept[chosen]
        # an id past the last expert means "computed elsewhere" or "nothing"
        num_experts: int = self.experts.num_experts  # type: ignore[assignment]
        return sorted({e for e in chosen.flatten().tolist() if 0 <= e < num_experts})

    def remove(self) -> None:
        """Stop watching."""
        self._hook.remove()
        self._chosen = None

    def _ask(self, before: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
        self._chosen = None
        index = chosen_experts(output)
        if not self.askable or index is None or torch.is_grad_enabled() or len(index) > FEW_TOKENS:
            return
        if self.wanted is not None and not self.wanted(self.layer):
            return
        router = router_of(self.block)
        assert router is not None, "askable"
        if router.training:  # it may draw noise, which the layer itself would then not get
            return
        try:
            # its own forward, past the hooks that record what really happens
            self._chosen = chosen_experts(type(router).forward(router, *args, **kwargs))
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, RuntimeError, AttributeError, KeyError):
            self._chosen = None
        self.askable = self._chosen is not None


def chosen_experts(output: Any) -> Tensor | None:
    """The ids (T, K) in what a router returned: its last integer tensor of two dimensions, else None."""
    tensors = output if isinstance(output, tuple | list) else (output,)
    for tensor in reversed(tensors):
        if isinstance(tensor, Tensor) and tensor.ndim == 2 and tensor.dtype in (torch.int64, torch.int32):
            return tensor
    return None
