"""Quantise and dequantise blocks of weights: nf4, fp4, int8, fp8 with one fp32 absmax per block; fp16, bf16
as plain casts.

The bytes equal bitsandbytes' CPU functions on each matrix, so packed checkpoints mean the same everywhere.
Which code does the work is chosen by device: the native kernels or plain PyTorch on a CPU, bitsandbytes' own
kernels on CUDA. Work goes matrix by matrix, so temporaries stay the size of one expert.
"""

# E experts, N rows, D columns, b blocksize

from __future__ import annotations

import torch
from torch import Tensor

from . import cpu, cuda, reference
from .codebook import BITS, CAST_DTYPES, SCHEMES, check_scheme, codebook

__all__ = [
    "BITS", "SCHEMES", "dequantize", "dequantize_absmax", "pick_blocksize", "quantize", "quantize_absmax",
]  # fmt: skip


def pick_blocksize(columns: int, blocksize: int = 64) -> int | None:
    """The largest of blocksize, blocksize/2, ... down to 16 that divides `columns`; None if none does."""
    while blocksize >= 16:
        if columns % blocksize == 0:
            return blocksize
        blocksize //= 2
    return None


def quantize(weight: Tensor, scheme: str, blocksize: int = 64) -> tuple[Tensor, Tensor | None]:
    """Pack float weights (..., N, D).

    Returns codes, uint8 (..., N, D/2) for nf4 and fp4 (first weight in the high nibble) or (..., N, D) for
    int8 and fp8, and absmax, fp32 (..., N, D/b). For fp16 and bf16: the cast weights and None. ValueError if
    D is no multiple of blocksize, or if a weight is not finite (the message counts them).
    """
    check_scheme(scheme)
    if not weight.is_floating_point() or weight.dim() < 2:
        raise ValueError(f"wanted a float tensor (..., N, D), got {weight.dtype} {tuple(weight.shape)}")
    if scheme in CAST_DTYPES:
        return weight.to(CAST_DTYPES[scheme]), None
    weight = weight.detach()
    *lead, rows, columns = weight.shape
    if blocksize < 2 or blocksize % 2 or columns % blocksize:
        hint = pick_blocksize(columns)
        advice = f"use blocksize={hint}" if hint else "store this matrix in 16 bits"
        raise ValueError(f"{columns} columns are no multiple of blocksize={blocksize}; {advice}")
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        weight = weight.float()

    flat = weight.reshape(-1, rows, columns)
    codes = torch.empty(len(flat), rows, columns * BITS[scheme] // 8, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(len(flat), rows, columns // blocksize, dtype=torch.float32, device=weight.device)
    for i, matrix in enumerate(flat):
        if cuda.can_quantize(matrix, scheme, blocksize):
            cuda.quantize(matrix, scheme, blocksize, codes[i], absmax[i])
        elif cpu.can_quantize(matrix, blocksize):
            cpu.quantize(matrix.contiguous(), scheme, blocksize, codes[i], absmax[i])
        else:
            packed, scales = reference.quantize_matrix(matrix, scheme, blocksize)
            codes[i].copy_(packed), absmax[i].copy_(scales)
    _check_finite(flat, absmax)
    return codes.view(*lead, rows, -1), absmax.view(*lead, rows, -1)


def _check_finite(flat: Tensor, absmax: Tensor) -> None:
    """A block with an infinity or a NaN has an absmax that is not finite (CUDA kernels may lose a NaN: count
    there)."""
    if flat.is_cuda:
        bad = int(torch.stack([(~torch.isfinite(matrix)).sum() for matrix in flat]).sum()) if len(flat) else 0
    elif torch.isfinite(absmax).all():
        return
    else:
        bad = sum(int((~torch.isfinite(matrix)).sum()) for matrix in flat)
    if bad:
        raise ValueError(
            f"{bad} of {flat.numel()} weights are not finite (nan or inf); the checkpoint is damaged: "
            "repair it, or store this tensor in 16 bits"
        )


def dequantize(
    codes: Tensor, absmax: Tensor | None, scheme: str, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Unpack to (..., N, D) of `dtype`: fp32 code times fp32 absmax, rounded once, exactly as bitsandbytes
    does.

    codes and absmax as `quantize` returns them; `out`, contiguous (..., N, D), is filled and returned if
    given.
    """
    check_scheme(scheme)
    if scheme in CAST_DTYPES or absmax is None:
        return codes.to(dtype) if out is None else out.copy_(codes)
    if out is None:
        columns = codes.shape[-1] * 8 // BITS[scheme]
        out = torch.empty(*codes.shape[:-1], columns, dtype=dtype, device=codes.device)
    blocksize = out.shape[-1] // absmax.shape[-1]
    if cuda.can_dequantize(codes, scheme, blocksize, dtype):
        return cuda.dequantize(codes, absmax, scheme, blocksize, out)
    if cpu.can_dequantize(codes, absmax, out):
        return cpu.dequantize(codes, absmax, scheme, blocksize, out)
    flat_out = out.view(-1, *out.shape[-2:])
    flat_codes, flat_absmax = codes.reshape(-1, *codes.shape[-2:]), absmax.reshape(-1, *absmax.shape[-2:])
    for i in range(len(flat_out)):
        flat_out[i].copy_(reference.dequantize(flat_codes[i], flat_absmax[i], scheme, dtype))
    return out


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise the absmax of a stack, (E, N, D/b) fp32, expert by expert ("double quantisation").

    Returns codes uint8 (E, N, D/b), scale fp32 (E, ceil(N*D/b/256)), offset fp32 (E,): per expert what
    bitsandbytes' compress_statistics gives, the mean subtracted, then the dynamic 8-bit map over blocks of
    256.
    """
    if absmax.dim() != 3 or absmax.dtype != torch.float32:
        raise ValueError(f"quantize_absmax wants fp32 (E, N, D/b), got {absmax.dtype} {tuple(absmax.shape)}")
    codes, scale, offset = zip(*[reference.quantize_absmax(one) for one in absmax], strict=True)
    return torch.stack(codes), torch.stack(scale), torch.stack(offset)


def dequantize_absmax(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """fp32 absmax (E, N, D/b) from what `quantize_absmax` returned."""
    flat = codes.flatten(1)
    per_code = scale.repeat_interleave(256, dim=1)[:, : flat.shape[1]]
    # three steps, each rounded: the bits of dequantising one expert alone
    return codebook("int8", codes.device)[flat.int()].mul_(per_code).add_(offset[:, None]).view(codes.shape)
