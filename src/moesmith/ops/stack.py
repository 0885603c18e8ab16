"""PackedStack: one layer's expert matrices, packed.

Holds references to the tensors of an experts module and knows how to turn one expert back into a dense
matrix. Four-bit schemes store two weights per byte, the first in the high nibble; absmax is fp32, or uint8
codes with `scale` and `offset` when it is quantised itself ("double quantisation"). The schemes fp16 and bf16
store plain 16-bit weights in `codes` and have no absmax.
"""

# E experts, N rows, D columns, b blocksize

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import blockwise
from .codebook import BITS


@dataclass
class PackedStack:
    """Stacked expert matrices of logical shape (E, N, D)."""

    codes: Tensor
    """uint8 (E, N, D/2) for nf4, fp4; uint8 (E, N, D) for int8, fp8; float (E, N, D) for fp16, bf16."""
    absmax: Tensor | None = None
    """(E, N, D/b): fp32, or uint8 when `scale` and `offset` are given."""
    scale: Tensor | None = None
    """fp32 (E, ceil(N*D/b/256)): block scales of a quantised absmax."""
    offset: Tensor | None = None
    """fp32 (E,): mean of a quantised absmax."""
    scheme: str = "nf4"

    @classmethod
    def quantize(
        cls, weight: Tensor, scheme: str, blocksize: int = 64, double_quant: bool = False
    ) -> PackedStack:
        """Pack (E, N, D) float weights. ValueError if D is no multiple of blocksize or a weight is not
        finite."""
        codes, absmax = blockwise.quantize(weight, scheme, blocksize)
        scale = offset = None
        if double_quant and absmax is not None:
            absmax, scale, offset = blockwise.quantize_absmax(absmax)
        return cls(codes, absmax, scale, offset, scheme)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Logical (E, N, D)."""
        experts, rows, columns = self.codes.shape
        return experts, rows, columns * 2 if BITS.get(self.scheme) == 4 else columns

    @property
    def blocksize(self) -> int | None:
        """Weights per absmax; None for 16-bit schemes."""
        return None if self.absmax is None else self.shape[2] // self.absmax.shape[2]

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        tensors = (self.codes, self.absmax, self.scale, self.offset)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def absmax_of(self, experts: slice | list[int]) -> Tensor | None:
        """fp32 absmax (e, N, D/b) of some experts, dequantised if it was quantised."""
        if self.absmax is None or self.scale is None or self.offset is None:
            return None if self.absmax is None else self.absmax[experts]
        return blockwise.dequantize_absmax(self.absmax[experts], self.scale[experts], self.offset[experts])

    def expert(self, e: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Expert e as a dense (N, D) matrix, written to `out` if given."""
        part = slice(e, e + 1)
        dense_out = None if out is None else out[None]
        return blockwise.dequantize(self.codes[part], self.absmax_of(part), self.scheme, dtype, dense_out)[0]

    def some(self, experts: list[int], dtype: torch.dtype) -> Tensor:
        """Several experts, ascending, as (len(experts), N, D)."""
        # a run of neighbours is a view; anything else copies the packed bytes
        run = experts[-1] - experts[0] + 1 == len(experts)
        part = slice(experts[0], experts[-1] + 1) if run else experts
        return blockwise.dequantize(self.codes[part], self.absmax_of(part), self.scheme, dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All experts, (E, N, D). As large as it sounds: for merging, exporting and tests."""
        return blockwise.dequantize(self.codes, self.absmax_of(slice(None)), self.scheme, dtype)
