"""Law 3: the fast op is the reference op, output and gradient, for any shape and any split of rows over
experts. Law 1 at this floor: a packed stack and a stack holding its dequantised weights give the same bits.
"""

import contextlib

import pytest
import torch

from moesmith import ops
from moesmith.ops import cpu, reference
from scattered import elsewhere

# (experts, out, in): the last two are large enough for the native kernels
SMALL = [(4, 32, 64), (3, 48, 16), (1, 16, 128)]
LARGE = [(3, 272, 256), (2, 128, 1040)]
SPLITS = {
    "even": lambda e: [5] * e,
    "none": lambda e: [0] * e,
    "one token": lambda e: [0] * (e - 1) + [1],
    "all on one": lambda e: [67] + [0] * (e - 1),
    "few": lambda e: [i % 5 for i in range(e, 0, -1)],
    "ragged": lambda e: [(7 * i) % 12 for i in range(1, e + 1)],
    "many": lambda e: [400 if i == 0 else 3 for i in range(e)],
}


@pytest.fixture(params=["native", "plain"])
def road(request, monkeypatch):
    if request.param == "plain":
        for name in ("can_quantize", "can_dequantize", "can_project"):
            monkeypatch.setattr(cpu, name, lambda *_: False)
    elif not cpu.available():
        pytest.skip(cpu.status())
    return request.param


def case(shape, split, scheme, dtype, transposed, rank=None, double_quant=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    experts, rows, columns = shape
    wide_in, wide_out = (rows, columns) if transposed else (columns, rows)
    weight = torch.randn(shape, generator=generator) / wide_in**0.5
    stack = ops.PackedStack.quantize(weight, scheme, ops.pick_blocksize(columns), double_quant)
    offsets = [0]
    for n in SPLITS[split](experts):
        offsets.append(offsets[-1] + n)
    x = torch.randn(offsets[-1], wide_in, generator=generator).to(dtype).requires_grad_()
    lora = None
    if rank:
        a = (torch.randn(experts, rank, wide_in, generator=generator) / wide_in**0.5).requires_grad_()
        b = torch.randn(experts, wide_out, rank, generator=generator).requires_grad_()
        lora = ops.Lora(a, b, 0.75)
    grad = torch.randn(offsets[-1], wide_out, generator=generator).to(dtype)
    return x, stack, offsets, lora, grad


def oracle(x, stack, offsets, lora, grad, transposed):
    """reference.grouped_linear in fp64 over the weights the stack holds in x's dtype, with its gradients."""
    weight = stack.dense(x.dtype).double()
    inputs = [x] if lora is None else [x, lora.A, lora.B]
    leaves = [t.detach().to(x.dtype).double().requires_grad_() for t in inputs]
    extra = () if lora is None else (leaves[1], leaves[2], lora.scaling)
    y = reference.grouped_linear(leaves[0], weight, offsets, *extra, transposed=transposed)
    y.backward(grad.double())
    zero = [torch.zeros_like(t) if t.grad is None else t.grad for t in leaves]
    return y.detach(), zero


def close(got, want, dtype):
    # bf16 and fp16 round x A^T and the result; errors are relative to the size of the whole tensor
    tolerance = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}[dtype]
    assert got.shape == want.shape
    if want.numel():
        assert (got.double() - want).abs().max() <= tolerance * max(1e-6, float(want.abs().max()))


def check(shape, split, scheme, dtype, transposed, rank=None, double_quant=False):
    x, stack, offsets, lora, grad = case(shape, split, scheme, dtype, transposed, rank, double_quant)
    y = ops.grouped_linear(x, stack, offsets, lora, transposed)
    assert y.dtype == dtype
    y.backward(grad)
    want_y, want_grads = oracle(x, stack, offsets, lora, grad, transposed)
    close(y, want_y, dtype)
    close(x.grad, want_grads[0], dtype)
    if lora is not None:
        close(lora.A.grad, want_grads[1], dtype)
        close(lora.B.grad, want_grads[2], dtype)
        assert lora.A.grad.dtype == lora.A.dtype
        for e in range(shape[0]):
            if offsets[e] == offsets[e + 1]:
                assert not lora.A.grad[e].any() and not lora.B.grad[e].any()


@pytest.mark.parametrize("shape", SMALL + LARGE)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_reference(road, shape, split, transposed, dtype):
    check(shape, split, "nf4", dtype, transposed, rank=4)


@pytest.mark.parametrize("scheme", ops.SCHEMES)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_scheme(road, scheme, transposed, dtype):
    check((3, 272, 256), "ragged", scheme, dtype, transposed)
    check((3, 272, 256), "few", scheme, dtype, transposed)
    check((2, 128, 1040), "few", scheme, dtype, transposed)


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_double_quantised_absmax(road, scheme):
    check((3, 272, 256), "ragged", scheme, torch.bfloat16, False, rank=8, double_quant=True)
    check((3, 272, 256), "all on one", scheme, torch.bfloat16, True, double_quant=True)
    check((3, 272, 256), "few", scheme, torch.bfloat16, False, double_quant=True)


@pytest.mark.parametrize("rank", [1, 2, 3, 8, 16, 33])
@pytest.mark.parametrize("split", ["ragged", "many", "one token", "few"])
def test_any_rank(road, rank, split):
    check((3, 272, 256), split, "nf4", torch.bfloat16, False, rank=rank)


@pytest.mark.parametrize("scheme", ["int8", "fp8", "nf4", "fp4"])
@pytest.mark.parametrize("shape", [SMALL[0], LARGE[0]])
@pytest.mark.parametrize("split", ["even", "all on one", "many", "few"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("double_quant", [False, True])
def test_packed_is_the_dequantised_stack_bit_for_bit(road, scheme, shape, split, transposed, double_quant):
    for dtype in (torch.bfloat16, torch.float32):
        x, stack, offsets, _, grad = case(shape, split, scheme, dtype, transposed, double_quant=double_quant)
        dense = ops.PackedStack(stack.dense(dtype), scheme="bf16")
        results = []
        for one in (stack, dense):
            leaf = x.detach().clone().requires_grad_()
            y = ops.grouped_linear(leaf, one, offsets, transposed=transposed)
            y.backward(grad)
            results.append((y, leaf.grad))
        assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize(
    ("scheme", "double_quant"), [("nf4", False), ("nf4", True), ("int8", False), ("bf16", False)]
)
@pytest.mark.parametrize("shape", [SMALL[0], LARGE[0]])
@pytest.mark.parametrize("split", ["even", "one token", "many", "few"])
@pytest.mark.parametrize("transposed", [False, True])
def test_where_an_expert_lies_changes_no_bit(road, scheme, double_quant, shape, split, transposed):
    """Output and gradients, with the experts lent for the forward and lent again, elsewhere, for backward."""
    places = [6, 2, 5, 0][: shape[0]]
    for dtype in (torch.bfloat16, torch.float32):
        x, stack, offsets, lora, grad = case(shape, split, scheme, dtype, transposed, 4, double_quant)
        hit = [e for e in range(shape[0]) if offsets[e] < offsets[e + 1]]
        lent = elsewhere(stack, [p if e in hit else -1 for e, p in enumerate(places)], 7)
        later = elsewhere(stack, [p + 1 if e in hit else -1 for e, p in enumerate(places)], 9)
        results = []
        for one, again in ((stack, None), (lent, lambda later=later: contextlib.nullcontext(later))):
            leaves = [t.detach().clone().requires_grad_() for t in (x, lora.A, lora.B)]
            y = ops.grouped_linear(
                leaves[0], one, offsets, ops.Lora(leaves[1], leaves[2], 0.75), transposed, again
            )
            if one is lent:
                lent.codes.fill_(0)
            y.backward(grad)
            results.append([y, *(leaf.grad for leaf in leaves)])
        for resident, moved in zip(*results, strict=True):
            assert torch.equal(resident, moved)


def test_an_expert_with_rows_that_is_not_there_is_an_error(road):
    x, stack, offsets, _, grad = case((3, 272, 256), "even", "nf4", torch.bfloat16, False)
    gone = elsewhere(stack, [0, -1, 1], 2)
    with pytest.raises(RuntimeError, match=r"\[1\] are not there"):
        ops.grouped_linear(x, gone, offsets)
    y = ops.grouped_linear(x, stack, offsets, again=lambda: contextlib.nullcontext(gone))
    with pytest.raises(RuntimeError, match=r"\[1\] are not there"):
        y.backward(grad)


@pytest.mark.parametrize("transposed", [False, True])
def test_rows_do_not_see_each_other(road, transposed):
    """A row's result is the same alone among many as among other rows, and for any number of threads."""
    x, stack, offsets, lora, grad = case((2, 272, 256), "many", "nf4", torch.bfloat16, transposed, rank=8)
    full = ops.grouped_linear(x, stack, offsets, lora, transposed)
    part = ops.grouped_linear(x[:100].detach(), stack, [0, 100, 100], lora, transposed)
    assert torch.equal(full[:100], part)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert torch.equal(ops.grouped_linear(x, stack, offsets, lora, transposed), full)
    finally:
        torch.set_num_threads(threads)


def test_small_matrices_give_the_bits_of_torch(road):
    x, stack, offsets, _, _ = case((4, 32, 64), "even", "nf4", torch.bfloat16, False)
    dense = stack.dense(torch.bfloat16)
    want = torch.cat([x[5 * e : 5 * e + 5] @ dense[e].T for e in range(4)])
    assert torch.equal(ops.grouped_linear(x, stack, offsets), want)


def test_saves_nothing_dequantised(road):
    x, stack, offsets, lora, _ = case((3, 272, 256), "even", "nf4", torch.bfloat16, False, rank=8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.grouped_linear(x, stack, offsets, lora)
    assert sum(t.numel() for t in saved) <= x.numel() + 8 * len(x) + lora.A.numel() + lora.B.numel()
    saved.clear()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.grouped_linear(x, stack, offsets)
    assert not saved


def test_peft_layout_of_b(road):
    """B as PEFT stores it, (out, r*E) with the expert fastest: the gradient lands in that parameter."""
    x, stack, offsets, lora, grad = case((3, 272, 256), "ragged", "nf4", torch.bfloat16, False, rank=8)
    stored = lora.B.detach().permute(1, 2, 0).reshape(272, 24).clone().requires_grad_()
    view = ops.Lora(lora.A, stored.view(272, 8, 3).permute(2, 0, 1), lora.scaling)
    y = ops.grouped_linear(x, stack, offsets, view)
    assert torch.equal(y, ops.grouped_linear(x, stack, offsets, lora))
    y.backward(grad)
    ops.grouped_linear(x, stack, offsets, lora).backward(grad)
    assert torch.equal(stored.grad.view(272, 8, 3).permute(2, 0, 1), lora.B.grad)


def test_only_what_is_asked_for(road):
    x, stack, offsets, lora, grad = case((3, 272, 256), "ragged", "nf4", torch.bfloat16, False, rank=8)
    frozen = ops.Lora(lora.A.detach(), lora.B, lora.scaling)
    ops.grouped_linear(x.detach(), stack, offsets, frozen).backward(grad)
    assert x.grad is None and lora.B.grad is not None
    ops.grouped_linear(x, stack, offsets, ops.Lora(lora.A.detach(), lora.B.detach())).backward(grad)
    assert x.grad is not None
    with torch.no_grad():
        assert not ops.grouped_linear(x, stack, offsets, lora).requires_grad


def test_adapters_in_bf16(road):
    x, stack, offsets, lora, grad = case((3, 272, 256), "ragged", "nf4", torch.bfloat16, False, rank=8)
    half = ops.Lora(
        lora.A.detach().bfloat16().requires_grad_(), lora.B.detach().bfloat16().requires_grad_(), 0.75
    )
    ops.grouped_linear(x, stack, offsets, half).backward(grad)
    assert half.A.grad.dtype == half.B.grad.dtype == torch.bfloat16
    ops.grouped_linear(x, stack, offsets, lora).backward(grad)
    close(half.A.grad, lora.A.grad.double(), torch.bfloat16)
    close(half.B.grad, lora.B.grad.double(), torch.bfloat16)


def test_autocast_computes_in_its_dtype(road):
    x, stack, offsets, _, _ = case((4, 32, 64), "even", "nf4", torch.float32, False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.grouped_linear(x, stack, offsets)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.grouped_linear(x.bfloat16(), stack, offsets))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32


def test_errors_name_what_was_wanted():
    x, stack, offsets, lora, _ = case((4, 32, 64), "even", "nf4", torch.float32, False, rank=4)
    with pytest.raises(ValueError, match=r"wants \(R, 32\)"):
        ops.grouped_linear(x, stack, offsets, transposed=True)
    with pytest.raises(ValueError, match="wanted 5 from 0 to 20"):
        ops.grouped_linear(x, stack, [0, 5, 10, 20])
    with pytest.raises(ValueError, match=r"wanted \(4, r, 64\) and \(4, 32, r\)"):
        ops.grouped_linear(x, stack, offsets, ops.Lora(lora.B, lora.A))


def test_offsets_may_be_a_tensor(road):
    x, stack, offsets, _, _ = case((4, 32, 64), "even", "nf4", torch.float32, False)
    tensor = torch.tensor(offsets, dtype=torch.int32)
    assert torch.equal(ops.grouped_linear(x, stack, tensor), ops.grouped_linear(x, stack, offsets))
