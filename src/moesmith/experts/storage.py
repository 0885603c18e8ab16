"""How a MoE layer's experts are stored: which parameters they are and what each one holds.

An experts module is one that transformers decorated with `@use_experts_implementation`: it keeps the
weights of all its experts in stacked 3-D parameters, `gate_up_proj` (or `up_proj` without a gate) and
`down_proj`. Packing keeps the module and swaps each stack for uint8 codes *of the same name*, with the
block scales beside it:

    gate_up_proj                 uint8   (E, N, D/2) two 4-bit codes per byte, or (E, N, D) 8-bit codes
    gate_up_proj_absmax          fp32    (E, N, D/blocksize)       one scale per block
with double quantisation instead
    gate_up_proj_absmax          uint8   (E, N, D/blocksize)       8-bit codes of the scales
    gate_up_proj_absmax_scale    fp32    (E, ceil(blocks/256))     one scale per 256 scales
    gate_up_proj_absmax_offset   fp32    (E,)                      mean of an expert's scales

E experts; N rows and D columns of one expert's matrix as the model stores it. Logical shape and block size
follow from these shapes; the scheme is the module's `experts_scheme`. Nothing else is needed to compute or
to reload.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

from ..ops.blockwise import SCHEMES
from ..ops.stack import PackedStack

WEIGHT_NAMES = ("gate_up_proj", "up_proj", "down_proj")
SCALE_SUFFIXES = ("_absmax", "_absmax_scale", "_absmax_offset")
PASSTHROUGH = {"bf16": torch.bfloat16, "fp16": torch.float16}


def is_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches this module's forward through its experts interface."""
    down = getattr(module, "down_proj", None)
    return hasattr(module, "_is_expert_parallel") and isinstance(down, torch.Tensor) and down.ndim == 3


def named_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(name, module) of every experts module of a model, adapters looked through."""
    for name, module in model.named_modules():
        if is_experts(module):
            yield name, module


def weight_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the stacked weights this experts module has, input projection first."""
    names = (name for name in WEIGHT_NAMES if isinstance(getattr(module, name, None), torch.Tensor))
    return tuple(name for name in names if getattr(module, name).ndim == 3)


def scheme_of(module: nn.Module) -> str | None:
    """Storage scheme of an experts module that moesmith loaded, None for any other module."""
    return getattr(module, "experts_scheme", None)


def mark(module: nn.Module, scheme: str) -> None:
    """Make `module` one whose stacks are read with `stack` and whose adapters run in activation space."""
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} is not one of {', '.join(SCHEMES)}")
    holder = cast(Any, module)
    holder.experts_scheme = scheme
    # weight name -> list of active adapters, filled by the PEFT wrapper during a forward
    holder.experts_lora = {}
    # weight name -> the adapter as decoding wants it, see `forward`
    holder.experts_lora_decoding = {}


def stack(module: nn.Module, name: str) -> PackedStack:
    """The stacked weight `name` of a marked experts module, packed or passed through.

    Raises:
        RuntimeError: block scales are no longer fp32 (someone cast the whole model).
    """
    codes = getattr(module, name)
    if codes.dtype != torch.uint8:  # a passthrough scheme, or a stack that no block size fits
        return PackedStack(codes, scheme="fp16" if codes.dtype == torch.float16 else "bf16")
    absmax, scale, offset = (getattr(module, name + suffix, None) for suffix in SCALE_SUFFIXES)
    scales = absmax if scale is None else scale
    if scales is None or scales.dtype != torch.float32:
        raise RuntimeError(
            f"{name}: scales are {getattr(scales, 'dtype', None)}, wanted float32: the model was cast. "
            "Pass dtype= to from_pretrained instead of casting the loaded model."
        )
    return PackedStack(codes, absmax, scale, offset, module.experts_scheme)


def packed_parameters(name: str, packed: PackedStack) -> dict[str, nn.Parameter]:
    """The frozen parameters that hold `packed` under `name`."""
    parts = zip(
        ("", *SCALE_SUFFIXES), (packed.codes, packed.absmax, packed.scale, packed.offset), strict=True
    )
    return {
        name + suffix: nn.Parameter(part, requires_grad=False) for suffix, part in parts if part is not None
    }


def packed_placeholder(
    shape: torch.Size, scheme: str, blocksize: int, double_quant: bool, device: torch.device | str = "meta"
) -> PackedStack:
    """Empty packed tensors for a stack of logical `shape` (E, N, D)."""
    experts, rows, columns = shape
    blocks = columns // blocksize
    code_columns = columns // 2 if scheme in ("nf4", "fp4") else columns
    codes = torch.empty(experts, rows, code_columns, dtype=torch.uint8, device=device)
    absmax_dtype = torch.uint8 if double_quant else torch.float32
    absmax = torch.empty(experts, rows, blocks, dtype=absmax_dtype, device=device)
    if not double_quant:
        return PackedStack(codes, absmax, None, None, scheme)
    scale = torch.empty(experts, -(-rows * blocks // 256), dtype=torch.float32, device=device)
    offset = torch.empty(experts, dtype=torch.float32, device=device)
    return PackedStack(codes, absmax, scale, offset, scheme)
