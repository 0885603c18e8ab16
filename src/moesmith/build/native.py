"""Which native Mixture-of-Experts class a dense model fits into, and its config.

A class fits when attention, norms, positions and head are the same, so that only the FFN changes and
engines that know the class run the result. That is checked here on the config, and on every tensor when
weights are filled in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

from moesmith.errors import UserError


@dataclass(frozen=True)
class NativeMoE:
    """The MoE class for one dense architecture, and how its config names things."""

    model_type: str
    width: str
    """config field: neurons per expert"""
    num_experts: str
    fixed: dict[str, Any] = field(default_factory=dict)
    """fields that this use of the class needs"""


# dense model_type -> class with the same attention
NATIVE = {
    "llama": NativeMoE("mixtral", "intermediate_size", "num_local_experts"),
    "mistral": NativeMoE("mixtral", "intermediate_size", "num_local_experts"),
    "qwen3": NativeMoE("qwen3_moe", "moe_intermediate_size", "num_experts", {"norm_topk_prob": True}),
}

# Fields of a dense config that say nothing about what the model computes, or that other fields repeat.
HARMLESS = {
    "_name_or_path", "architectures", "dtype", "max_window_layers", "model_type", "pretraining_tp",
    "quantization_config", "transformers_version",
}  # fmt: skip


def native_config(dense: PreTrainedConfig, num_experts: int, top_k: int) -> PreTrainedConfig:
    """Config of the MoE whose experts are equal slices of `dense`'s FFN.

    Raises:
        UserError: no class fits, or counts that do not divide; see the message.
    """
    target = NATIVE.get(dense.model_type)
    if target is None:
        known = ", ".join(f"{name} → {moe.model_type}" for name, moe in NATIVE.items())
        raise UserError(
            f"no native MoE class is known to have the attention and norms of {dense.model_type!r}",
            f"dense architectures that can be split: {known}",
        )
    if not 1 <= top_k <= num_experts:
        raise UserError(f"top_k={top_k} must be between 1 and num_experts={num_experts}")
    width, rest = divmod(dense.intermediate_size, num_experts)
    if rest:
        raise UserError(
            f"num_experts={num_experts} does not divide the FFN width {dense.intermediate_size}",
            f"counts that do: {', '.join(str(n) for n in _divisors(dense.intermediate_size))}",
        )
    config_class = CONFIG_MAPPING[target.model_type]
    taken = set(config_class().to_dict())
    values = dense.to_dict()
    _check_nothing_lost(dense, values, taken, target.model_type)
    carried = {key: value for key, value in values.items() if key in taken and key not in HARMLESS}
    carried |= {
        target.width: width,
        target.num_experts: num_experts,
        "num_experts_per_tok": top_k,
        **target.fixed,
    }
    # Said outright: the classes read it, not all of them declare it, and it need not be hidden_size / heads.
    head_dim = getattr(dense, "head_dim", None) or dense.hidden_size // dense.num_attention_heads
    carried["head_dim"] = head_dim
    config = config_class(**carried)
    config.dtype = dense.dtype
    return config


def _check_nothing_lost(
    dense: PreTrainedConfig, values: dict[str, Any], taken: set[str], model_type: str
) -> None:
    """Refuse a model that uses something its MoE class has no field for."""
    plain = type(dense)(num_hidden_layers=dense.num_hidden_layers).to_dict()
    lost = {
        key: value
        for key, value in values.items()
        if key in plain and key not in taken | HARMLESS | {"head_dim"} and value != plain[key]
    }
    if lost:
        uses = ", ".join(f"{key}={value}" for key, value in sorted(lost.items()))
        raise UserError(
            f"{dense.model_type} with {uses}: {model_type} has no such option, the result would differ"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(2, 257) if number % n == 0]
