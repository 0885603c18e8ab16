"""Every op of this floor in a few lines of plain PyTorch: the definition, the fallback, and what the tests
compare against.

Slow and simple on purpose. Works on any device and dtype; gradients come from autograd.
"""

# E experts, N rows (out), D columns (in), b blocksize, T tokens, K top-k, R routed rows, r adapter rank

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .codebook import BITS, CAST_DTYPES, bounds_4bit, codebook, table_8bit


def quantize_matrix(weight: Tensor, scheme: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """(N, D) -> codes (N, D) or (N, D/2) uint8, absmax (N, D/b) fp32. Bytes equal bitsandbytes' CPU
    functions."""
    blocks = weight.float().reshape(-1, blocksize)
    absmax = blocks.abs().amax(dim=-1)
    if BITS[scheme] == 4:
        # the reciprocal first, then the product: dividing instead moves ties
        scaled = (blocks * (1.0 / absmax.clamp(min=1e-38))[:, None]).clamp(-1, 1).flatten()
        midpoints, order = bounds_4bit(scheme, weight.device)
        codes = order[torch.bucketize(scaled, midpoints, out_int32=True)].to(torch.uint8)
        codes = (codes[::2] << 4) | codes[1::2]
    else:
        # a denormal absmax has an infinite reciprocal: 0 * inf = nan counts as the lowest step
        scaled = (blocks * (1.0 / absmax)[:, None]).nan_to_num(nan=-1.0).clamp(-1, 1).flatten()
        # double stands in for the fused multiply-add: the product and the sum are exact, then one rounding
        step = ((scaled + 1) * 0.5).double().mul_(65535.0).add_(0.5).float().to(torch.int32)
        codes = table_8bit(scheme, weight.device)[step.long()]
        codes = codes.view(-1, blocksize).masked_fill_((absmax == 0)[:, None], 0)
    return codes.view(weight.shape[0], -1), absmax.view(weight.shape[0], -1)


def dequantize(codes: Tensor, absmax: Tensor | None, scheme: str, dtype: torch.dtype) -> Tensor:
    """codes and absmax of any leading shape -> weights (..., N, D): fp32 code times fp32 absmax, rounded
    once."""
    if scheme in CAST_DTYPES or absmax is None:
        return codes.to(dtype)
    if BITS[scheme] == 4:
        codes = torch.stack([codes >> 4, codes & 15], dim=-1).flatten(-2)
    values = codebook(scheme, codes.device)[codes.int()]
    blocks = values.view(*absmax.shape, -1) * absmax[..., None]
    return blocks.view(codes.shape).to(dtype)


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax of one expert, any shape -> codes uint8 same shape, scale fp32 (ceil(n/256),), offset fp32."""
    offset = absmax.mean()
    centred = (absmax - offset).flatten()
    full = len(centred) // 256 * 256
    parts = [centred[:full].view(-1, 256), centred[full:].view(1, -1)]
    packed = [quantize_matrix(part, "int8", part.shape[1]) for part in parts if part.numel()]
    codes = torch.cat([codes.flatten() for codes, _ in packed])
    return codes.view(absmax.shape), torch.cat([scale.flatten() for _, scale in packed]), offset


def dequantize_absmax(codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The inverse of quantize_absmax for one expert, fp32."""
    per_code = scale.repeat_interleave(256)[: codes.numel()]
    return (codebook("int8", codes.device)[codes.flatten().int()] * per_code + offset).view(codes.shape)


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> tuple[list[int], list[int]]:
    """(T, K) -> flat positions grouped by expert, original order within one; boundaries of the groups, length
    E+1."""
    flat = top_k_index.flatten().tolist()
    groups = [[i for i, expert in enumerate(flat) if expert == e] for e in range(num_experts)]
    offsets = [0]
    for group in groups:
        offsets.append(offsets[-1] + len(group))
    return [i for group in groups for i in group], offsets


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    offsets: Sequence[int],
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    transposed: bool = False,
) -> Tensor:
    """Rows of x grouped by expert, (R, in), times that expert's matrix (E, out, in), or (E, in, out) if
    transposed.

    With an adapter, lora_a (E, r, in) and lora_b (E, out, r), adds scaling * (x A^T) B^T.
    """
    parts = []
    for e in range(len(offsets) - 1):
        rows = x[offsets[e] : offsets[e + 1]]
        out = rows @ (weight[e] if transposed else weight[e].T)
        if lora_a is not None and lora_b is not None:
            out = out + scaling * (rows @ lora_a[e].to(x.dtype).T) @ lora_b[e].to(x.dtype).T
        parts.append(out)
    return torch.cat(parts)
