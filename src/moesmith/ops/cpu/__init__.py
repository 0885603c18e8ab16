"""Native CPU kernels, loaded through ctypes: block quantisation, and grouped products fused with unpacking.

Compiled on first use (see build.py). Without a compiler everything still works through plain PyTorch;
`status()` says in one line which it is and why. The `can_*` functions tell whether a call suits these
kernels; callers take another road when it does not.
"""

from __future__ import annotations

import ctypes
import functools
import os
from ctypes import POINTER, c_int, c_int32, c_int64, c_void_p
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..codebook import BITS, CAST_DTYPES, bounds_4bit, codebook, table_8bit

if TYPE_CHECKING:
    from ..stack import PackedStack

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_MIN_ELEMENTS = 50_000
"""Matrices smaller than this go through torch.mm, so that tiny models equal stock bit for bit."""

_BLOCKSIZES = frozenset(2**i for i in range(4, 20))
_FEW = 4
"""Rows that share one pass over the packed bytes in decode.c (FEW there)."""


class _Stack(ctypes.Structure):
    """`Stack` of kernels.h."""

    _fields_ = [
        ("codes", c_void_p), ("absmax", c_void_p), ("scale", c_void_p), ("offset", c_void_p),
        ("codebook", c_void_p), ("planes", c_void_p), ("absmax_codebook", c_void_p),
        ("where", c_void_p), ("experts", c_int64), ("rows", c_int64), ("columns", c_int64),
        ("scales", c_int64), ("row_blocks", c_int64), ("block_shift", c_int32), ("kind", c_int32),
    ]  # fmt: skip


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None, and a line about it."""
    if os.environ.get("MOESMITH_NO_NATIVE", "") not in ("", "0"):
        return None, "native kernels off: MOESMITH_NO_NATIVE is set"
    from . import build  # here, so that `python -m moesmith.ops.cpu.build` finds it not yet imported

    try:
        path = build.build()
        library = ctypes.CDLL(str(path))
    except (build.BuildError, OSError) as error:
        return None, f"native kernels off: {error}"
    p, i64, i32 = c_void_p, c_int64, c_int
    library.moesmith_features.restype = c_int
    library.moesmith_quantize_4bit.argtypes = [p, p, p, i64, i64, i32, p, p, i32]
    library.moesmith_quantize_8bit.argtypes = [p, p, p, i64, i64, i32, p, p, i32]
    library.moesmith_dequantize.argtypes = [p, p, p, i64, i64, i32, i32, p, i32]
    features = library.moesmith_features()
    if features & 2:
        library.moesmith_project.argtypes = [POINTER(_Stack), p, p, p, i32, p, p, i64, i32]
        library.moesmith_project_few.argtypes = [POINTER(_Stack), p, p, p, p, p, i64, i32]
        library.moesmith_gram.argtypes = [p, p, p, p, i64, i64, i64, i32, i32]
    level = {0: "plain C", 1: "AVX512"}.get(features, "AVX512-BF16, grouped products")
    return library, f"native kernels on: {level} ({path})"


def forget() -> None:
    """Look again on the next call: for tests, and after the environment changed."""
    _load.cache_clear()
    has_grouped.cache_clear()


def available() -> bool:
    """True if the native library is loaded (compiling it on the first call)."""
    return _load()[0] is not None


def status() -> str:
    """One line: on or off, at which level, or why not."""
    return _load()[1]


@functools.cache
def has_grouped() -> bool:
    """True if grouped products run natively: they need AVX512-BF16."""
    library = _load()[0]
    return library is not None and bool(library.moesmith_features() & 2)


def _library() -> ctypes.CDLL:
    library = _load()[0]
    assert library is not None, "guarded by can_*"
    return library


# ---------------------------------------------------------------- blocks


def can_quantize(matrix: Tensor, blocksize: int) -> bool:
    """CPU, fp32, bf16 or fp16, blocks of a multiple of 16."""
    return matrix.device.type == "cpu" and matrix.dtype in _TYPES and blocksize % 16 == 0 and available()


def quantize(matrix: Tensor, scheme: str, blocksize: int, codes: Tensor, absmax: Tensor) -> None:
    """Contiguous (N, D) into `codes` and `absmax`, both contiguous; shapes as in blockwise.quantize."""
    blocks = matrix.numel() // blocksize
    common = (matrix.data_ptr(), codes.data_ptr(), absmax.data_ptr(), blocks, blocksize, _TYPES[matrix.dtype])
    if BITS[scheme] == 4:
        midpoints, order = _tree(scheme)
        _library().moesmith_quantize_4bit(
            *common, midpoints.data_ptr(), order.data_ptr(), torch.get_num_threads()
        )
    else:
        table, first = table_8bit(scheme), _thresholds(scheme)
        _library().moesmith_quantize_8bit(
            *common, table.data_ptr(), first.data_ptr(), torch.get_num_threads()
        )


@functools.cache
def _tree(scheme: str) -> tuple[Tensor, Tensor]:
    midpoints, order = bounds_4bit(scheme)
    return midpoints.contiguous(), order.to(torch.int32)


@functools.cache
def _thresholds(scheme: str) -> Tensor:
    """First step of each code in table_8bit, (256,), as 16-bit words."""
    table = table_8bit(scheme).int()
    return torch.searchsorted(table, torch.arange(256, dtype=torch.int32)).to(torch.int32).to(torch.uint16)


def can_dequantize(codes: Tensor, absmax: Tensor, out: Tensor) -> bool:
    """CPU, contiguous, fp32 absmax, blocks of a multiple of 16."""
    blocksize = out.shape[-1] // absmax.shape[-1]
    return (
        codes.device.type == "cpu"
        and out.dtype in _TYPES
        and blocksize % 16 == 0
        and absmax.dtype == torch.float32
        and all(t.is_contiguous() for t in (codes, absmax, out))
        and available()
    )


def dequantize(codes: Tensor, absmax: Tensor, scheme: str, blocksize: int, out: Tensor) -> Tensor:
    """Fill and return `out` (..., N, D)."""
    _library().moesmith_dequantize(
        codes.data_ptr(), absmax.data_ptr(), out.data_ptr(), absmax.numel(), blocksize, BITS[scheme],
        _TYPES[out.dtype], codebook(scheme).data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


# ---------------------------------------------------------------- grouped products


def can_project(x: Tensor, stack: PackedStack) -> bool:
    """bf16 on a CPU that has it, and a stack large and regular enough."""
    if x.dtype != torch.bfloat16 or x.device.type != "cpu" or not has_grouped():
        return False
    _, rows, columns = stack.shape
    tensors = (stack.codes, stack.absmax, stack.scale, stack.offset, stack.where)
    return (
        rows * columns >= _MIN_ELEMENTS
        and rows % 16 == 0
        and columns % 16 == 0
        and (stack.codes.dtype in (torch.bfloat16, torch.float16) or stack.blocksize in _BLOCKSIZES)
        and all(t is None or (t.device.type == "cpu" and t.is_contiguous()) for t in tensors)
    )


def project(
    x: Tensor,
    stack: PackedStack,
    offsets: list[int],
    over_columns: bool,
    extra: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """As loop.project: per expert x @ W^T (over_columns) or x @ W, plus rows @ mats of `extra`. Contiguous
    bf16."""
    experts, rows, columns = stack.shape
    out = x.new_empty(len(x), rows if over_columns else columns)
    host = (c_int64 * (experts + 1))(*offsets)
    low, mats, rank = None, None, 0
    if extra is not None:
        low, mats = _pad_rank(*extra)
        rank = low.shape[1]
    described = ctypes.byref(_describe(stack))
    pointers = (0 if low is None else low.data_ptr(), 0 if mats is None else mats.data_ptr())
    tail = (*pointers, rank, torch.get_num_threads())
    hit = sum(a < b for a, b in zip(offsets, offsets[1:], strict=False))
    if over_columns and len(x) <= _FEW * hit:
        _library().moesmith_project_few(described, x.data_ptr(), out.data_ptr(), host, *tail)
    else:
        _library().moesmith_project(described, x.data_ptr(), out.data_ptr(), host, over_columns, *tail)
    return out


def _pad_rank(low: Tensor, mats: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels take ranks of a multiple of 8; zeros fill the rest."""
    missing = -low.shape[1] % 8
    if missing:
        low = torch.nn.functional.pad(low, (0, missing))
        mats = torch.nn.functional.pad(mats, (0, 0, 0, missing))
    return low.contiguous(), mats.contiguous()


def _describe(stack: PackedStack) -> _Stack:
    experts, rows, columns = stack.shape
    half = {torch.bfloat16: 2, torch.float16: 3}.get(stack.codes.dtype)
    described = _Stack(codes=stack.codes.data_ptr(), experts=experts, rows=rows, columns=columns)
    if stack.where is not None:
        described.where = stack.where.data_ptr()
    if half is not None:
        described.kind = half
        return described
    assert stack.absmax is not None and stack.scheme not in CAST_DTYPES
    described.kind = 0 if BITS[stack.scheme] == 4 else 1
    described.row_blocks = stack.absmax.shape[2]
    described.block_shift = (columns // stack.absmax.shape[2]).bit_length() - 1
    described.absmax = stack.absmax.data_ptr()
    described.codebook = codebook(stack.scheme).data_ptr()
    if described.kind == 1:
        described.planes = _planes(stack.scheme).data_ptr()
    if stack.scale is not None and stack.offset is not None:
        described.scale, described.offset = stack.scale.data_ptr(), stack.offset.data_ptr()
        described.scales = stack.scale.shape[1]
        described.absmax_codebook = codebook("int8").data_ptr()
    return described


@functools.cache
def _planes(scheme: str) -> Tensor:
    """The bytes of the codebook's fp32 values, least significant first, uint8 (4, 256)."""
    return codebook(scheme).view(torch.uint8).view(256, 4).t().contiguous()


def gram(p: Tensor, q: Tensor, offsets: list[int], dtype: torch.dtype) -> Tensor:
    """As loop.gram: per expert p^T q, (R, r) and (R, m) contiguous bf16 -> (E, r, m) in fp32 or bf16."""
    kind = dtype if dtype in (torch.float32, torch.bfloat16) else torch.float32
    experts, ranks, width = len(offsets) - 1, p.shape[1], q.shape[1]
    out = torch.empty(experts, ranks, width, dtype=kind)
    host = (c_int64 * (experts + 1))(*offsets)
    _library().moesmith_gram(
        p.data_ptr(),
        q.data_ptr(),
        out.data_ptr(),
        host,
        experts,
        ranks,
        width,
        _TYPES[kind],
        torch.get_num_threads(),
    )
    return out.to(dtype)
