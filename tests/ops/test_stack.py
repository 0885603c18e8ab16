"""A packed stack knows its logical shape and gives back each expert."""

import pytest
import torch

from moesmith import ops
from scattered import elsewhere


@pytest.mark.parametrize("scheme", ops.SCHEMES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_shape_blocksize_and_experts(scheme, double_quant):
    weight = torch.randn(3, 8, 96)
    stack = ops.PackedStack.quantize(weight, scheme, 32, double_quant)
    assert stack.shape == (3, 8, 96)
    assert stack.blocksize == (None if ops.BITS[scheme] == 16 else 32)
    dense = stack.dense(torch.float32)
    assert (dense - weight).abs().max() < 0.7
    scratch = torch.empty(8, 96)
    for e in range(3):
        assert torch.equal(stack.expert(e, torch.float32), dense[e])
        assert stack.expert(e, torch.float32, out=scratch).data_ptr() == scratch.data_ptr()
        assert torch.equal(scratch, dense[e])


@pytest.mark.parametrize("scheme", ops.SCHEMES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_experts_may_lie_anywhere(scheme, double_quant):
    stack = ops.PackedStack.quantize(torch.randn(4, 8, 96), scheme, 32, double_quant)
    spread = elsewhere(stack, [5, 2, -1, 3], 7)
    assert spread.shape == (4, 8, 96) and spread.blocksize == stack.blocksize
    dense = stack.dense(torch.float32)
    for e in (0, 1, 3):
        assert torch.equal(spread.expert(e, torch.float32), dense[e])
    for chosen in ([0, 1, 3], [1, 3], [3], [3, 0], []):
        assert torch.equal(spread.some(chosen, torch.float32), dense[chosen])
    if stack.absmax is not None:
        assert torch.equal(spread.absmax_of([1, 3]), stack.absmax_of([1, 3]))
        whole = elsewhere(stack, [3, 2, 1, 0], 4)
        assert torch.equal(whole.absmax_of(slice(1, 3)), stack.absmax_of([1, 2]))
    assert torch.equal(elsewhere(stack, [1, 3, 0, 2], 4).dense(torch.float32), dense)


def test_an_expert_that_is_not_there_is_named():
    spread = elsewhere(ops.PackedStack.quantize(torch.randn(4, 8, 64), "nf4"), [5, 2, -1, 3], 7)
    with pytest.raises(RuntimeError, match=r"\[2\] are not there.* 3 of 4"):
        spread.expert(2, torch.float32)
    with pytest.raises(RuntimeError, match="not there"):
        spread.dense(torch.float32)


def test_bytes():
    weight = torch.randn(2, 64, 512)
    count = weight.numel()
    assert ops.PackedStack.quantize(weight, "nf4").nbytes == count // 2 + count // 64 * 4
    assert ops.PackedStack.quantize(weight, "bf16").nbytes == count * 2
    double = ops.PackedStack.quantize(weight, "nf4", double_quant=True)
    assert double.nbytes == count // 2 + count // 64 + 2 * 4 * (2 + 1)
