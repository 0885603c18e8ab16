"""PackedStack: one layer's expert matrices, packed.

Holds references to the tensors of an experts module and knows how to turn one expert back into a dense
matrix. Four-bit schemes store two weights per byte, the first in the high nibble; absmax is fp32, or uint8
codes with `scale` and `offset` when it is quantised itself ("double quantisation"). The schemes fp16 and bf16
store plain 16-bit weights in `codes` and have no absmax.

The tensors need not hold the experts in order, nor all of them: with `where`, expert e lies at position
where[e]. Rows keep their order and adapters their indices, so a product reads the same numbers in the same
order wherever its experts lie, and gives the same bits.
"""

# E experts, P positions in the tensors (E of them without `where`), N rows, D columns, b blocksize

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import blockwise
from .codebook import BITS


@dataclass
class PackedStack:
    """Stacked expert matrices of logical shape (E, N, D)."""

    codes: Tensor
    """uint8 (P, N, D/2) for nf4, fp4; uint8 (P, N, D) for int8, fp8; float (P, N, D) for fp16, bf16."""
    absmax: Tensor | None = None
    """(P, N, D/b): fp32, or uint8 when `scale` and `offset` are given."""
    scale: Tensor | None = None
    """fp32 (P, ceil(N*D/b/256)): block scales of a quantised absmax."""
    offset: Tensor | None = None
    """fp32 (P,): mean of a quantised absmax."""
    scheme: str = "nf4"
    where: Tensor | None = None
    """int64 (E,) on the host: the position of each expert, -1 if it is not there. None: all, in order."""

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
        experts = experts if self.where is None else len(self.where)
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
        """Bytes of all tensors together, whoever's experts they hold."""
        tensors = (self.codes, self.absmax, self.scale, self.offset)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)

    def places(self, experts: Sequence[int]) -> list[int]:
        """Positions of some experts in the tensors. RuntimeError if one is not there."""
        if self.where is None:
            return list(experts)
        positions = self.where.tolist()
        found = [positions[e] for e in experts]
        missing = [e for e, place in zip(experts, found, strict=True) if place < 0]
        if missing:
            raise RuntimeError(f"experts {missing} are not there; the stack has {self._present()}")
        return found

    def _present(self) -> str:
        assert self.where is not None, "a stack without positions has all its experts"
        return f"{int((self.where >= 0).sum())} of {len(self.where)} experts"

    def absmax_of(self, experts: slice | Sequence[int]) -> Tensor | None:
        """fp32 absmax (e, N, D/b) of some experts, dequantised if it was quantised."""
        if isinstance(experts, slice):
            experts = range(*experts.indices(self.shape[0]))
        return self._absmax_at(self.places(experts))

    def _absmax_at(self, places: list[int]) -> Tensor | None:
        if self.absmax is None:
            return None
        absmax = _take(self.absmax, places)
        if self.scale is None or self.offset is None:
            return absmax
        return blockwise.dequantize_absmax(absmax, _take(self.scale, places), _take(self.offset, places))

    def expert(self, e: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Expert e as a dense (N, D) matrix, written to `out` if given."""
        place = self.places([e])
        dense_out = None if out is None else out[None]
        return blockwise.dequantize(
            _take(self.codes, place), self._absmax_at(place), self.scheme, dtype, dense_out
        )[0]

    def some(self, experts: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Several experts, in the order named, as (len(experts), N, D)."""
        places = self.places(experts)
        return blockwise.dequantize(_take(self.codes, places), self._absmax_at(places), self.scheme, dtype)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All experts, (E, N, D). As large as it sounds: for merging, exporting and tests."""
        return self.some(range(self.shape[0]), dtype)


def _take(tensor: Tensor, places: list[int]) -> Tensor:
    """Some positions of a tensor: a view of neighbours in order, else a copy of the packed bytes."""
    first = places[0] if places else 0
    if places == list(range(first, first + len(places))):
        return tensor[first : first + len(places)]
    # non_blocking: a plain copy from pageable memory would wait for the stream
    return tensor.index_select(0, torch.tensor(places).to(tensor.device, non_blocking=True))
