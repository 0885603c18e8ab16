"""Law 2: our bytes are bitsandbytes' bytes, and fidelity falls in the stated order."""

import math

import pytest
import torch

from moesmith import ops
from moesmith.ops import blockwise, cpu, reference

bnb = pytest.importorskip("bitsandbytes.functional")

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["native", "plain"])
def road(request, monkeypatch):
    """The same test through the native kernels and through plain PyTorch."""
    if request.param == "plain":
        monkeypatch.setattr(cpu, "can_quantize", lambda *_: False)
        monkeypatch.setattr(cpu, "can_dequantize", lambda *_: False)
    elif not cpu.available():
        pytest.skip(cpu.status())
    return request.param


def awkward(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Weights with zero blocks, denormal blocks, huge and tiny blocks, and exact ties between codes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * 0.02
    flat = weight.view(-1)
    flat[:64] = 0
    flat[64:128] = 0
    flat[70] = 1e-40
    flat[128:192] = 1e-39
    flat[130] = 0
    flat[192:256] *= 1e-37
    flat[256:320] *= 1e30
    flat[320:384] = -0.0
    flat[384:448] = torch.linspace(-1, 1, 64)
    for i, scheme in enumerate(("nf4", "fp4", "int8", "fp8")):
        code = ops.codebook(scheme).sort().values
        middles = (code[1:] + code[:-1]) / 2
        start = 512 + 512 * i
        flat[start : start + 255] = middles.repeat(17)[:255]
        flat[start : start + 512 : 64] = 1.0
    return weight


def bnb_quantize(matrix: torch.Tensor, scheme: str, blocksize: int):
    if ops.BITS[scheme] == 4:
        codes, state = bnb.quantize_4bit(matrix, blocksize=blocksize, quant_type=scheme)
    else:
        codes, state = bnb.quantize_blockwise(matrix, code=ops.codebook(scheme), blocksize=blocksize)
    return codes, state


def flush(values: torch.Tensor) -> torch.Tensor:
    """bitsandbytes' bf16 output loses denormals where the processor's own conversion instruction does; ours
    keeps them."""
    return values.masked_fill(values.abs() <= 2.0**-126, 0) if values.dtype == torch.bfloat16 else values


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("blocksize", [32, 64, 128])
def test_bytes_equal_bitsandbytes(road, scheme, dtype, blocksize):
    stack = torch.stack([awkward(24, 256, seed) for seed in range(2)]).to(dtype)
    stack = stack.nan_to_num(posinf=6e4, neginf=-6e4)
    codes, absmax = ops.quantize(stack, scheme, blocksize)
    assert codes.shape == (2, 24, 256 * ops.BITS[scheme] // 8) and absmax.shape == (2, 24, 256 // blocksize)
    for e, matrix in enumerate(stack):
        want, state = bnb_quantize(matrix, scheme, blocksize)
        assert torch.equal(codes[e].view(-1), want.view(-1))
        assert torch.equal(absmax[e].view(-1), state.absmax)
        for out in FLOATS:
            state.dtype = out
            unpack = bnb.dequantize_4bit if ops.BITS[scheme] == 4 else bnb.dequantize_blockwise
            ours = ops.dequantize(codes[e], absmax[e], scheme, out)
            assert ours.dtype == out
            assert torch.equal(flush(ours.view(-1)), flush(unpack(want, state).view(-1)))


@pytest.mark.parametrize("scheme", ["nf4", "fp4", "int8", "fp8"])
@pytest.mark.parametrize(
    "columns, blocksize", [(16, 16), (48, 16), (96, 32), (2048, 64), (192, 64), (512, 512)]
)
def test_roads_agree_on_any_width(road, scheme, columns, blocksize):
    weight = torch.randn(3, 5, columns, generator=torch.Generator().manual_seed(columns))
    codes, absmax = ops.quantize(weight, scheme, blocksize)
    for e in range(3):
        want, scales = reference.quantize_matrix(weight[e], scheme, blocksize)
        assert torch.equal(codes[e], want) and torch.equal(absmax[e], scales)
    for dtype in FLOATS:
        assert torch.equal(
            ops.dequantize(codes, absmax, scheme, dtype), reference.dequantize(codes, absmax, scheme, dtype)
        )


def test_codebooks_equal_bitsandbytes():
    assert torch.equal(ops.codebook("nf4"), bnb.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(ops.codebook("fp4"), bnb.get_4bit_type("fp4", device="cpu"))
    assert torch.equal(ops.codebook("int8"), bnb.create_dynamic_map())
    assert torch.equal(ops.codebook("fp8"), bnb.create_fp8_map(True, 4, 3, 8))


def test_every_code_survives_a_round_trip(road):
    """Each representable value, with the block's largest present, quantises to itself."""
    for scheme in ("nf4", "fp4", "fp8"):
        values = ops.codebook(scheme)
        weight = values.repeat(math.ceil(1024 / len(values)))[:1024].view(4, 256).clone()
        weight[:, ::32] = 1.0
        codes, absmax = ops.quantize(weight, scheme, 32)
        if scheme != "fp8":  # fp8 near zero is finer than the 65,536 steps of the lookup
            assert torch.equal(ops.dequantize(codes, absmax, scheme, torch.float32), weight)


def test_fidelity_order(road):
    weight = torch.randn(4, 128, 512, generator=torch.Generator().manual_seed(1)) * 0.02
    errors = []
    for scheme in ops.SCHEMES:
        codes, absmax = ops.quantize(weight, scheme)
        errors.append(
            float((ops.dequantize(codes, absmax, scheme, torch.float32) - weight).norm() / weight.norm())
        )
    assert errors == sorted(errors) and len(set(errors)) == len(errors)
    assert errors[-1] < 0.2


@pytest.mark.parametrize("rows, columns", [(24, 256), (7, 192), (2, 64)])
def test_double_quantised_absmax_equals_bitsandbytes(rows, columns):
    weight = torch.stack([torch.randn(rows, columns) for _ in range(2)])
    _, absmax = ops.quantize(weight, "nf4")
    codes, scale, offset = ops.quantize_absmax(absmax)
    restored = ops.dequantize_absmax(codes, scale, offset)
    for e, matrix in enumerate(weight):
        _, state = bnb.quantize_4bit(matrix, blocksize=64, quant_type="nf4", compress_statistics=True)
        assert torch.equal(codes[e].view(-1), state.absmax.view(-1))
        assert torch.equal(scale[e], state.state2.absmax)
        assert torch.equal(offset[e], state.offset)
        want = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
        assert torch.equal(restored[e].view(-1), want.view(-1))


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_counted(road, scheme, bad):
    weight = torch.randn(2, 8, 128)
    weight[1, 3, 5] = bad
    weight[1, 7, 127] = bad
    with pytest.raises(ValueError, match="2 of 2048 weights are not finite"):
        ops.quantize(weight, scheme)


def test_plain_casts():
    weight = torch.randn(2, 3, 10)
    codes, absmax = ops.quantize(weight, "bf16")
    assert absmax is None and torch.equal(codes, weight.bfloat16())
    assert torch.equal(ops.dequantize(codes, None, "bf16", torch.float32), weight.bfloat16().float())


def test_errors_say_what_to_do():
    with pytest.raises(ValueError, match=r"96 columns are no multiple of blocksize=64; use blocksize=32"):
        ops.quantize(torch.randn(1, 2, 96), "nf4")
    with pytest.raises(ValueError, match="store this matrix in 16 bits"):
        ops.quantize(torch.randn(1, 2, 100), "nf4")
    with pytest.raises(ValueError, match="choose one of fp16, bf16, int8"):
        ops.quantize(torch.randn(1, 2, 64), "nf5")


def test_pick_blocksize():
    assert [blockwise.pick_blocksize(n) for n in (2048, 96, 48, 40, 64)] == [64, 32, 16, None, 64]
    assert blockwise.pick_blocksize(256, 128) == 128


def test_non_contiguous_input(road):
    weight = torch.randn(128, 64, 4).permute(2, 0, 1)
    assert torch.equal(ops.quantize(weight, "nf4")[0], ops.quantize(weight.contiguous(), "nf4")[0])
    into = torch.randn(4, 64, 128).transpose(1, 2)
    assert torch.equal(ops.quantize(into, "int8")[0], ops.quantize(into.contiguous(), "int8")[0])
