"""The GPU road: bitsandbytes unpacks bounded chunks of experts, torch's grouped matmul multiplies them.

No host sync per expert: the offsets are on the host already. A chunk is a run of experts that have rows, at
most CHUNK_BYTES of 16-bit weights, so the transient does not grow with the number of experts. A handful of
single rows (decoding) may go through bitsandbytes' 4-bit GEMV, once a probe has shown that it computes the
right thing for this configuration.

Nothing here needs a GPU to be tested: on CPU tensors the same functions run with CPU kernels underneath.
"""

# R routed rows, E experts, r adapter rank, c experts of one chunk

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .codebook import BITS, codebook

if TYPE_CHECKING:
    from .stack import PackedStack

CHUNK_BYTES = 256 << 20
"""Most bytes of dense weights that exist at a time. 64 OLMoE experts (gate_up) fill it twice over."""

GEMV_ROWS = 16
"""Up to this many rows, each alone with its expert, may go through the GEMV."""

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_BLOCKSIZES = {4: (32, 64, 128, 256, 512, 1024, 2048, 4096), 8: (64, 128, 256, 512, 1024, 2048, 4096)}
# bitsandbytes counts elements in 32 bits
_MOST_ELEMENTS = 1 << 30


# ---------------------------------------------------------------- blocks


def can_quantize(matrix: Tensor, scheme: str, blocksize: int) -> bool:
    """On CUDA, with a blocksize bitsandbytes has kernels for."""
    return (
        matrix.is_cuda
        and matrix.dtype in _FLOATS
        and matrix.numel() <= _MOST_ELEMENTS
        and blocksize in _BLOCKSIZES[BITS[scheme]]
    )


def quantize(matrix: Tensor, scheme: str, blocksize: int, codes: Tensor, absmax: Tensor) -> None:
    """(N, D) into `codes` and `absmax`; shapes as in blockwise.quantize."""
    import bitsandbytes  # noqa: F401  (registers the operators)

    matrix = matrix.contiguous()
    if BITS[scheme] == 4:
        packed, scales = torch.ops.bitsandbytes.quantize_4bit(matrix, blocksize, scheme, torch.uint8)
    else:
        code = codebook(scheme, matrix.device)
        packed, scales = torch.ops.bitsandbytes.quantize_blockwise(matrix, code, blocksize)
    codes.copy_(packed.view(codes.shape))
    absmax.copy_(scales.view(absmax.shape))


def can_dequantize(codes: Tensor, scheme: str, blocksize: int, dtype: torch.dtype) -> bool:
    """On CUDA, to a type and with a blocksize bitsandbytes has kernels for."""
    return codes.is_cuda and dtype in _FLOATS and blocksize in _BLOCKSIZES[BITS[scheme]]


def dequantize(codes: Tensor, absmax: Tensor, scheme: str, blocksize: int, out: Tensor) -> Tensor:
    """Fill and return `out` (..., N, D), contiguous."""
    import bitsandbytes  # noqa: F401  (registers the operators)

    flat, flat_codes = out.view(-1), codes.reshape(-1)
    flat_absmax = absmax.float().reshape(-1)
    step = _MOST_ELEMENTS // blocksize * blocksize
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        scales = flat_absmax[start // blocksize : (start + step) // blocksize]
        if BITS[scheme] == 4:
            packed = flat_codes[start // 2 : (start + step) // 2].view(-1, 1)
            torch.ops.bitsandbytes.dequantize_4bit.out(
                packed, scales, blocksize, scheme, part.shape, out.dtype, out=part
            )
        else:
            packed, code = flat_codes[start : start + step], codebook(scheme, codes.device)
            torch.ops.bitsandbytes.dequantize_blockwise.out(
                packed, scales, code, blocksize, out.dtype, out=part
            )
    return out


# ---------------------------------------------------------------- grouped products


def project(
    x: Tensor,
    stack: PackedStack,
    offsets: list[int],
    over_columns: bool,
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As loop.project: per expert x @ W^T (over_columns) or x @ W, plus rows @ mats of `extra`."""
    _, rows, columns = stack.shape
    hit = [e for e in range(len(offsets) - 1) if offsets[e] < offsets[e + 1]]
    if over_columns and _suits_gemv(x, stack, len(hit)):
        out = _gemv(x, stack, hit)
    else:
        out = x.new_empty(len(x), rows if over_columns else columns)
        for chunk in _chunks(hit, rows * columns * x.element_size()):
            first, last = offsets[chunk[0]], offsets[chunk[-1] + 1]
            weight = stack.some(chunk, x.dtype)
            ends = [offsets[e + 1] - first for e in chunk]
            out[first:last] = grouped_mm(
                x[first:last], weight.transpose(1, 2) if over_columns else weight, ends
            )
    if extra is not None and hit:
        low, mats = extra
        out += grouped_mm(low, mats[_index(hit, x.device)], [offsets[e + 1] for e in hit])
    return out


def _chunks(hit: list[int], matrix_bytes: int) -> Iterator[list[int]]:
    per_chunk = max(1, CHUNK_BYTES // matrix_bytes)
    for i in range(0, len(hit), per_chunk):
        yield hit[i : i + per_chunk]


def _index(values: list[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    # non_blocking: a plain copy from pageable memory would wait for the stream
    return torch.tensor(values, dtype=dtype).to(device, non_blocking=True)


def grouped_mm(x: Tensor, weight: Tensor, ends: list[int]) -> Tensor:
    """Rows of group i of x, ending at ends[i], times weight[i]: (R, in), (c, in, out) -> (R, out). No group
    is empty."""
    if _suits_grouped_mm(x, x.shape[1], weight.shape[2]):
        return torch.nn.functional.grouped_mm(x, weight, offs=_index(ends, x.device, torch.int32))
    starts = [0, *ends[:-1]]
    return torch.cat([x[a:b] @ w for a, b, w in zip(starts, ends, weight, strict=True)])


def gram(p: Tensor, q: Tensor, offsets: list[int], dtype: torch.dtype) -> Tensor:
    """As loop.gram: per expert p^T q, (R, r) and (R, m) -> (E, r, m) in `dtype`; zero for experts without
    rows."""
    hit = [e for e in range(len(offsets) - 1) if offsets[e] < offsets[e + 1]]
    out = torch.zeros(len(offsets) - 1, p.shape[1], q.shape[1], dtype=dtype, device=p.device)
    if not hit:
        return out
    ends = [offsets[e + 1] for e in hit]
    # only groups with rows: for an empty one the kernel leaves garbage on some cards (pytorch issue 172439)
    if _suits_grouped_mm(p, p.shape[1], q.shape[1]):
        products = torch.nn.functional.grouped_mm(p.t(), q, offs=_index(ends, p.device, torch.int32))
    else:
        products = torch.stack([p[a:b].t() @ q[a:b] for a, b in zip([0, *ends[:-1]], ends, strict=True)])
    out[_index(hit, p.device)] = products.to(dtype)
    return out


def _suits_grouped_mm(x: Tensor, *widths: int) -> bool:
    """bf16, rows of a multiple of 16 bytes, and on CUDA an SM80 card or newer."""
    if (
        x.dtype != torch.bfloat16
        or any(w % 8 for w in widths)
        or not hasattr(torch.nn.functional, "grouped_mm")
    ):
        return False
    return not x.is_cuda or _capability(x.device) >= (8, 0)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


# ---------------------------------------------------------------- decoding


def _suits_gemv(x: Tensor, stack: PackedStack, hit: int) -> bool:
    _, rows, columns = stack.shape
    return (
        x.is_cuda
        and 0 < len(x) <= GEMV_ROWS
        and hit == len(x)
        and BITS.get(stack.scheme) == 4
        and stack.blocksize in _BLOCKSIZES[4]
        and gemv_is_right(stack.scheme, rows, columns, stack.blocksize, x.dtype, x.device)
    )


def _gemv(x: Tensor, stack: PackedStack, hit: list[int]) -> Tensor:
    _, rows, columns = stack.shape
    code = codebook(stack.scheme, x.device)
    scales = stack.absmax_of(hit)
    assert scales is not None, "four-bit stacks have an absmax"
    lines = [
        torch.ops.bitsandbytes.gemv_4bit(
            x[i : i + 1],
            stack.codes[place].view(-1, 1),
            [rows, columns],
            scales[i].view(-1),
            code,
            stack.blocksize,
        )
        for i, place in enumerate(stack.places(hit))
    ]
    return torch.cat(lines)


@functools.cache
def gemv_is_right(
    scheme: str, rows: int, columns: int, blocksize: int, dtype: torch.dtype, device: torch.device
) -> bool:
    """Once per configuration: does bitsandbytes' GEMV equal unpacking and multiplying, within 2 % of the
    largest value?

    A kernel that refuses the configuration counts as wrong.
    """
    from .stack import PackedStack

    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1, rows, columns, generator=generator).to(device, dtype)
    x = torch.randn(1, columns, generator=generator).to(device, dtype)
    stack = PackedStack.quantize(weight, scheme, blocksize)
    want = x.float() @ stack.expert(0, torch.float32).t()
    try:
        got = _gemv(x, stack, [0]).float()
    except (RuntimeError, ValueError):
        return False
    return bool((got - want).abs().max() <= 0.02 * want.abs().max())
