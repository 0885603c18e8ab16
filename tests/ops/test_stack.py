"""A packed stack knows its logical shape and gives back each expert."""

import pytest
import torch

from moesmith import ops


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


def test_bytes():
    weight = torch.randn(2, 64, 512)
    count = weight.numel()
    assert ops.PackedStack.quantize(weight, "nf4").nbytes == count // 2 + count // 64 * 4
    assert ops.PackedStack.quantize(weight, "bf16").nbytes == count * 2
    double = ops.PackedStack.quantize(weight, "nf4", double_quant=True)
    assert double.nbytes == count // 2 + count // 64 + 2 * 4 * (2 + 1)
