"""Counts that are said out loud: what was packed, what was asked for and is not, what trains and what is
frozen.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from .storage import SCALE_SUFFIXES, named_experts, scheme_of, stack, weight_names


@dataclass
class Counts:
    """Figures of a live model. Matrices are one expert's matrices; bytes are as stored."""

    matrices: dict[str, int] = field(default_factory=dict)
    """scheme -> how many expert matrices are stored in it"""
    not_packed: list[str] = field(default_factory=list)
    """stacks that a packing scheme was asked for and that are held in 16 or 32 bits"""
    expert_parameters: int = 0
    expert_bytes: int = 0
    expert_bytes_16bit: int = 0
    other_parameters: int = 0
    other_bytes: int = 0
    trainable: int = 0
    frozen: int = 0


def count(model: nn.Module) -> Counts:
    """Count a model loaded with `ExpertsConfig`, with or without adapters."""
    counts = Counts()
    matrices: Counter[str] = Counter()
    held: set[int] = set()
    for name, module in named_experts(model):
        for weight in weight_names(module):
            parameter = getattr(module, weight)
            if id(parameter) in held:  # experts tied to another module's
                continue
            packed: Any = stack(module, weight) if scheme_of(module) else None
            shape = packed.shape if packed is not None else parameter.shape
            stored = "16-bit" if packed is None else (scheme_of(module) or "")
            if packed is not None and packed.codes.dtype != torch.uint8 and stored not in ("bf16", "fp16"):
                counts.not_packed.append(f"{name}.{weight}")
                stored = "16-bit"
            matrices[stored] += 2 * shape[0] if weight == "gate_up_proj" else shape[0]
            parts = [getattr(module, weight + suffix, None) for suffix in ("", *SCALE_SUFFIXES)]
            held |= {id(part) for part in parts if part is not None}
            counts.expert_bytes += sum(part.nbytes for part in parts if part is not None)
            counts.expert_parameters += prod(shape)
            counts.expert_bytes_16bit += 2 * prod(shape)
    for parameter in model.parameters():
        logical = _logical_numel(parameter)
        if parameter.requires_grad:
            counts.trainable += logical
        elif id(parameter) not in held:
            counts.frozen += logical
        if id(parameter) not in held:
            counts.other_parameters += logical
            counts.other_bytes += parameter.nbytes
    counts.frozen += counts.expert_parameters
    counts.matrices = dict(matrices)
    return counts


def _logical_numel(parameter: nn.Parameter) -> int:
    """Weights a parameter stands for: bitsandbytes' 4-bit linears keep two in one byte."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()
