"""The GPU road: its chunking and grouping on CPU tensors, and the same laws on a card."""

import pytest
import torch

from moesmith import ops
from moesmith.ops import blockwise, cuda, loop, reference
from scattered import elsewhere

SPLITS = ([5, 0, 7, 1], [0, 0, 0, 3], [0, 0, 0, 0], [2, 2, 2, 2], [9, 0, 0, 0])


def case(split, scheme="nf4", dtype=torch.bfloat16, device="cpu"):
    generator = torch.Generator().manual_seed(sum(split))
    weight = torch.randn(4, 48, 64, generator=generator) / 8
    stack = ops.PackedStack.quantize(weight.to(device), scheme, 64, double_quant=scheme == "nf4")
    offsets = [0, *torch.tensor(split).cumsum(0).tolist()]
    x = torch.randn(offsets[-1], 64, generator=generator).to(device, dtype)
    g = torch.randn(offsets[-1], 48, generator=generator).to(device, dtype)
    return stack, offsets, x, g


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("chunk", [1, 2, 64])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [8, 3])
def test_chunks_and_groups(monkeypatch, split, chunk, dtype, rank):
    stack, offsets, x, g = case(split, dtype=dtype)
    monkeypatch.setattr(cuda, "CHUNK_BYTES", chunk * 48 * 64 * x.element_size())
    low, mats = torch.randn(len(x), rank).to(dtype), torch.randn(4, rank, 48).to(dtype)
    tolerance = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {}
    for rows, over_columns, extra in ((x, True, None), (x, True, (low, mats)), (g, False, None)):
        got = cuda.project(rows, stack, offsets, over_columns, extra)
        torch.testing.assert_close(got, loop.project(rows, stack, offsets, over_columns, extra), **tolerance)
        moved = elsewhere(stack, [5, 1, 2, 0], 6)
        assert torch.equal(cuda.project(rows, moved, offsets, over_columns, extra), got)
    torch.testing.assert_close(
        cuda.gram(low, x, offsets, torch.float32), loop.gram(low, x, offsets, torch.float32), **tolerance
    )


def test_never_more_than_a_chunk_at_a_time(monkeypatch):
    stack, offsets, x, _ = case([5, 0, 7, 1])
    sizes = []
    real = blockwise.dequantize
    monkeypatch.setattr(blockwise, "dequantize", lambda *a: sizes.append(len(a[0])) or real(*a))
    monkeypatch.setattr(cuda, "CHUNK_BYTES", 2 * 48 * 64 * 2)
    cuda.project(x, stack, offsets, True)
    assert sizes == [2, 1]  # three experts have rows


def test_some_experts():
    stack, *_ = case([1, 1, 1, 1])
    dense = stack.dense(torch.float32)
    for chosen in ([0, 1, 2, 3], [1, 2], [0, 3], [2]):
        assert torch.equal(stack.some(chosen, torch.float32), dense[chosen])


def test_gemv_stays_off_without_a_card():
    stack, *_, x, _ = case([1, 1, 1, 1])
    assert not cuda._suits_gemv(x, stack, 4)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ops.SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dequantise_on_the_card(scheme, dtype):
    """Bytes made on either device unpack to the same bits on both."""
    stack, *_ = case([1, 1, 1, 1], scheme, device="cuda")
    absmax = stack.absmax_of(slice(None))
    want = reference.dequantize(stack.codes.cpu(), None if absmax is None else absmax.cpu(), scheme, dtype)
    assert torch.equal(stack.dense(dtype).cpu(), want)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ops.SCHEMES)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_linear_on_the_card(scheme, split, transposed):
    stack, offsets, x, g = case(split, scheme, device="cuda")
    rows, grad = (g, x) if transposed else (x, g)
    wide_in, wide_out = rows.shape[1], grad.shape[1]
    leaves = [
        rows.detach().requires_grad_(),
        (torch.randn(4, 8, wide_in, device="cuda") / 8).requires_grad_(),
        torch.randn(4, wide_out, 8, device="cuda").requires_grad_(),
    ]
    y = ops.grouped_linear(leaves[0], stack, offsets, ops.Lora(leaves[1], leaves[2], 0.5), transposed)
    y.backward(grad)
    doubles = [t.detach().to(x.dtype).double().requires_grad_() for t in leaves]
    want = reference.grouped_linear(
        doubles[0], stack.dense(x.dtype).double(), offsets, *doubles[1:], scaling=0.5, transposed=transposed
    )
    want.backward(grad.double())
    torch.testing.assert_close(y.double(), want, rtol=2e-2, atol=5e-2)
    for leaf, double in zip(leaves, doubles, strict=True):
        expected = torch.zeros_like(double) if double.grad is None else double.grad
        torch.testing.assert_close(leaf.grad.double(), expected, rtol=2e-2, atol=1e-1)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["nf4", "fp4"])
def test_gemv_on_the_card(scheme):
    weight = torch.randn(4, 256, 512, device="cuda") / 16
    stack = ops.PackedStack.quantize(weight, scheme)
    x = torch.randn(2, 512, device="cuda", dtype=torch.bfloat16)
    if not cuda.gemv_is_right(scheme, 256, 512, 64, x.dtype, x.device):
        pytest.skip("the probe refused this card's GEMV")
    got = ops.grouped_linear(x, stack, [0, 1, 1, 2, 2])
    dense = stack.dense(torch.float32)
    want = torch.stack([x[0].float() @ dense[0].T, x[1].float() @ dense[2].T])
    torch.testing.assert_close(got.float(), want, rtol=2e-2, atol=5e-2)
