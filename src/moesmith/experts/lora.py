"""LoRA on packed experts, in the stock PEFT format.

PEFT's `ParamWrapper` adds B @ A of every expert to the whole weight stack in each forward. The subclass
here hands the two factors to the experts function instead, which applies them to the rows an expert
received. Parameters, names and file format stay PEFT's, so `get_peft_model`, `PeftModel.from_pretrained`,
TRL and resume work unchanged, and stock PEFT loads the adapter on the 16-bit model.

PEFT stores lora_A as (E*r, in) with the expert slowest and lora_B as (out, r*E) with the expert fastest.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import peft.tuners.lora.model as peft_lora
import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from ..ops.grouped import Lora
from .storage import scheme_of, stack, weight_names


class ParamWrapper(peft_layer.ParamWrapper):  # PEFT recognises nested wrappers by this class name
    """One stacked weight of a packed experts module with its adapters.

    Raises (on merge):
        ValueError: the stack is packed; a low-rank delta cannot be added to codes.
    """

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        self.num_experts, rows, columns = stack(self.get_base_layer(), self.parameter_name).shape
        self._param_ndim = 3
        return rows, columns  # PEFT swaps them unless the module is transposed

    def expert_lora(self, adapter: str) -> Lora:
        """The adapter's factors as views, A (E, r, in) and B (E, out, r)."""
        A, B = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        A = A.view(self.num_experts, -1, A.shape[-1])
        B = B.view(B.shape[0], -1, self.num_experts).permute(2, 0, 1)
        return Lora(A, B, self.scaling[adapter])

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        adapters = [self.expert_lora(name) for name in active_adapters if name in self.lora_A]
        running: dict[str, list[Lora]] = self.get_base_layer().experts_lora
        running[self.parameter_name] = adapters
        try:
            yield
        finally:
            running.pop(self.parameter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if self.get_param().dtype == torch.uint8:
            scheme = scheme_of(self.get_base_layer())
            raise ValueError(
                f"{self.parameter_name} is packed to {scheme}: an adapter cannot be merged into it. "
                "Load the 16-bit model (scheme='bf16') with this adapter and merge there."
            )
        super().merge(safe_merge=safe_merge, adapter_names=adapter_names)


_stock_dispatch = peft_lora.dispatch_default


def _dispatch(
    target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any
) -> nn.Module | None:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if parameter_name is not None and scheme_of(base) is not None and parameter_name in weight_names(base):
        return ParamWrapper(target, adapter_name, parameter_name=parameter_name, config=config, **kwargs)
    return _stock_dispatch(target, adapter_name, config=config, parameter_name=parameter_name, **kwargs)


def register() -> None:
    """Let PEFT choose the wrapper for packed experts; every other target reaches its own dispatcher.

    `LoraConfig._register_custom_module` would do this too, but is not saved with an adapter: loading one by
    its folder would build the stock wrapper and fail.
    """
    peft_lora.dispatch_default = _dispatch


def unregister() -> None:
    """Put PEFT's own dispatcher back."""
    peft_lora.dispatch_default = _stock_dispatch
