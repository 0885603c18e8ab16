"""Packed experts for people with their own model: plain modules over the same functions, no transformers
model needed.

E experts, H model dim, I expert hidden dim, T tokens, K experts per token. Weight layout and adapter names
follow the fused convention: `gate_up_proj` (E, 2I, H) with the gate rows first, `down_proj` (E, H, I).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.blockwise import SCHEMES
from ..ops.grouped import Lora
from .forward import experts_forward
from .quantizer import ExpertsConfig, pack_stack
from .storage import PASSTHROUGH, mark, packed_parameters, stack

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
}


class ExpertsNbit(nn.Module):
    """A frozen stack of experts stored as nf4, fp4, int8, fp8, bf16 or fp16. Build it with `from_float`."""

    schemes: tuple[str, ...] = SCHEMES
    has_bias = is_transposed = has_post_expert_norm = False

    def __init__(self, num_experts: int, activation: str = "silu", has_gate: bool = True):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is not one of {', '.join(ACTIVATIONS)}")
        self.num_experts = num_experts
        self.has_gate = has_gate
        self.act_fn = ACTIVATIONS[activation]
        self.compute_dtype: torch.dtype | None = None

    @classmethod
    def from_float(
        cls,
        gate_up: Tensor,
        down: Tensor,
        quant_type: str = "nf4",
        compute_dtype: torch.dtype | None = None,
        blocksize: int = 64,
        double_quant: bool = False,
        has_gate: bool = True,
        activation: str = "silu",
    ) -> Self:
        """Pack `gate_up` (E, 2I, H), or (E, I, H) without a gate, and `down` (E, H, I).

        `compute_dtype` is what the matrices are multiplied in; None takes the dtype of the input.

        Raises:
            ValueError: shapes that do not belong together, an unknown `quant_type`, or a weight that is not
                finite.
        """
        if quant_type not in cls.schemes:
            raise ValueError(
                f"quant_type={quant_type!r} is not one of {', '.join(cls.schemes)} that {cls.__name__} holds"
            )
        if gate_up.ndim != 3 or down.ndim != 3:
            raise ValueError(
                f"want 3-D stacks, got gate_up {tuple(gate_up.shape)} and down {tuple(down.shape)}"
            )
        experts, hidden, inner = down.shape
        wanted = (experts, 2 * inner if has_gate else inner, hidden)
        if gate_up.shape != wanted:
            raise ValueError(
                f"gate_up is {tuple(gate_up.shape)}, wanted {wanted} for down {tuple(down.shape)}"
            )
        config = ExpertsConfig(quant_type, double_quant=double_quant, blocksize=blocksize)
        self = cls(experts, activation, has_gate)
        self.compute_dtype = compute_dtype
        mark(self, quant_type)
        for name, dense in (("gate_up_proj" if has_gate else "up_proj", gate_up), ("down_proj", down)):
            if quant_type in PASSTHROUGH:
                frozen = dense.detach().to(PASSTHROUGH[quant_type], copy=True)
                self.register_parameter(name, nn.Parameter(frozen, requires_grad=False))
                continue
            for key, parameter in packed_parameters(name, pack_stack(dense.detach(), config, name)).items():
                self.register_parameter(key, parameter)
        return self

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, H), (T, K) expert ids, (T, K) routing weights -> (T, H), the weighted sum of each token's
        experts.
        """
        x = hidden_states if self.compute_dtype is None else hidden_states.to(self.compute_dtype)
        return experts_forward(self, x, top_k_index, top_k_weights).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        scheme = self.experts_scheme
        shapes = {
            name: stack(self, name).shape
            for name in ("gate_up_proj", "up_proj", "down_proj")
            if hasattr(self, name)
        }
        return f"{scheme}, " + ", ".join(f"{name}={tuple(shape)}" for name, shape in shapes.items())


class Experts4bit(ExpertsNbit):
    """`ExpertsNbit` with 4 bits per weight: `quant_type` is nf4 or fp4."""

    schemes = ("nf4", "fp4")


class ExpertsLoRA(nn.Module):
    """Trainable low-rank adapters (fp32) on every expert of a frozen `ExpertsNbit`; only they get gradients.

    `gate_up_lora_A` (E, r, H), `gate_up_lora_B` (E, 2I, r), `down_lora_A` (E, r, I), `down_lora_B` (E, H, r);
    the delta is alpha/r * B @ A, and B starts at zero (LoRA, arXiv 2106.09685).
    """

    def __init__(self, base: ExpertsNbit, r: int, alpha: float = 16.0):
        super().__init__()
        if r <= 0:
            raise ValueError(f"r={r} must be positive")
        self.base = base
        self.r = r
        self.scaling = alpha / r
        self._weights = {"gate_up": "gate_up_proj" if base.has_gate else "up_proj", "down": "down_proj"}
        for short, name in self._weights.items():
            experts, rows, columns = stack(base, name).shape
            lender = getattr(base, "experts_residency", None)
            device = getattr(base, name).device if lender is None else lender.device
            A = torch.empty(experts, r, columns, device=device)
            nn.init.uniform_(
                A, -1 / math.sqrt(columns), 1 / math.sqrt(columns)
            )  # nn.Linear's range, as PEFT does
            self.register_parameter(f"{short}_lora_A", nn.Parameter(A))
            self.register_parameter(
                f"{short}_lora_B", nn.Parameter(torch.zeros(experts, rows, r, device=device))
            )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As `ExpertsNbit.forward`, with the adapters running."""
        for short, name in self._weights.items():
            A, B = getattr(self, f"{short}_lora_A"), getattr(self, f"{short}_lora_B")
            self.base.experts_lora[name] = [Lora(A, B, self.scaling)]
        try:
            return self.base(hidden_states, top_k_index, top_k_weights)
        finally:
            self.base.experts_lora.clear()
