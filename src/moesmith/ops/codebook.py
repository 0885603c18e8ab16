"""The codebooks of the packed schemes, and how a value picks its code.

Identical to bitsandbytes' (tests compare every entry): NF4 from QLoRA (arXiv 2305.14314), FP4 with two
exponent bits and one mantissa bit, the signed dynamic map of "8-bit Optimizers via Block-wise Quantization"
(arXiv 2110.02861) for int8, and a signed 4-exponent, 3-mantissa map for fp8. A weight is `codebook[code] *
absmax` of its block.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

SCHEMES = ("fp16", "bf16", "int8", "fp8", "nf4", "fp4")
"""Storage schemes by falling fidelity."""

BITS = {"fp16": 16, "bf16": 16, "int8": 8, "fp8": 8, "nf4": 4, "fp4": 4}
"""Bits per weight, without the block scales."""

CAST_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
"""Schemes that are plain casts: no codes, no absmax."""

NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0, 0.0, -0.0625, -8.0, -12.0, -4.0, -6.0, -2.0, -3.0)

# Codes in the order of their values. FP4 has two zeros (codes 0 and 8); a zero weight gets code 0.
_ORDER = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}


def check_scheme(scheme: str) -> None:
    """Raise ValueError unless `scheme` is one of SCHEMES."""
    if scheme not in BITS:
        raise ValueError(f"scheme={scheme!r} is unknown; choose one of {', '.join(SCHEMES)}")


@functools.cache
def codebook(scheme: str, device: str | torch.device = "cpu") -> Tensor:
    """The values of the codes, fp32: (16,) for nf4 and fp4, (256,) for int8 and fp8."""
    build = {"nf4": lambda: torch.tensor(NF4), "fp4": _fp4, "int8": _dynamic_map, "fp8": _fp8_map}
    if scheme not in build:
        raise ValueError(f"scheme={scheme!r} has no codebook; choose one of {', '.join(build)}")
    return build[scheme]().to(device)


def _fp4() -> Tensor:
    values = torch.tensor(FP4)
    return values / values.abs().max()


def _dynamic_map() -> Tensor:
    """Seven decades, each with twice the fractions of the one below; signs; 0 and 1. Sorted, asymmetric:
    [-0.993, 1]."""
    values: list[float] = []
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        values += ((10 ** (-6 + decade)) * means).tolist()
        values += (-(10 ** (-6 + decade)) * means).tolist()
    return torch.tensor(sorted([*values, 0.0, 1.0]), dtype=torch.float32)


def _fp8_map() -> Tensor:
    """Sign, 4 exponent bits, 3 mantissa bits, divided by the largest. Zero appears twice (codes 127, 128)."""
    values = []
    for exponent in range(16):
        for mantissa in range(8):
            fraction = mantissa / 8
            value = (1 + fraction) * 2.0 ** (9 - exponent) if exponent else fraction * 2.0**-8
            values += [value, -value]
    code = torch.tensor(sorted(values))
    return code / code.max()


@functools.cache
def bounds_4bit(scheme: str, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
    """(15 midpoints between neighbouring values, 16 codes in the order of their values) for nf4 and fp4."""
    order = torch.tensor(_ORDER[scheme], device=device)
    values = codebook(scheme, device)[order]
    return (values[:-1] + values[1:]) / 2, order


@functools.cache
def table_8bit(scheme: str, device: str | torch.device = "cpu") -> Tensor:
    """Code of each of 65,536 even steps over [-1, 1], uint8: how bitsandbytes' CPU kernel looks up int8 and
    fp8."""
    code = codebook(scheme)
    step = torch.arange(65536, dtype=torch.float32)
    position = (step + step) / 65535.0 - 1.0
    return torch.bucketize(position, (code[1:] + code[:-1]) * 0.5).to(torch.uint8).to(device)
