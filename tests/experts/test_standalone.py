"""The stand-alone primitives: quickstart shapes, flat activation memory, gradients only in the adapters."""

import pytest
import torch
from torch.nn import functional as F

from moesmith import Experts4bit, ExpertsLoRA, ExpertsNbit
from moesmith.experts.storage import stack


@pytest.fixture
def quickstart():
    torch.manual_seed(0)
    gate_up, down = torch.randn(8, 2 * 256, 128), torch.randn(8, 128, 256)
    hidden, index, weights = torch.randn(10, 128), torch.randint(8, (10, 2)), torch.rand(10, 2)
    return gate_up, down, hidden, index, weights


def dense_reference(gate_up, down, hidden, index, weights):
    """Each token through each of its experts, one at a time."""
    out = torch.zeros_like(hidden)
    for t in range(hidden.shape[0]):
        for e, w in zip(index[t].tolist(), weights[t], strict=True):
            gate, up = (hidden[t] @ gate_up[e].T).chunk(2)
            out[t] += w * ((F.silu(gate) * up) @ down[e].T)
    return out


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int8", "fp8", "bf16", "fp16"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_forward_is_the_dense_model_of_the_dequantised_weights(quickstart, quant_type, double_quant):
    gate_up, down, *call = quickstart
    if double_quant and quant_type in ("bf16", "fp16"):
        with pytest.raises(ValueError, match="double_quant"):
            ExpertsNbit.from_float(gate_up, down, quant_type, double_quant=True)
        return
    base = ExpertsNbit.from_float(gate_up, down, quant_type, torch.float32, double_quant=double_quant)
    dense = [stack(base, name).dense(torch.float32) for name in ("gate_up_proj", "down_proj")]
    torch.testing.assert_close(base(*call), dense_reference(*dense, *call), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("quant_type", ["nf4", "int8"])
def test_quickstart_trains_the_adapters_and_nothing_else(quickstart, quant_type):
    gate_up, down, *call = quickstart
    base = ExpertsNbit.from_float(gate_up, down, quant_type=quant_type, compute_dtype=torch.float32)
    model = ExpertsLoRA(base, r=8, alpha=16)
    torch.testing.assert_close(model(*call), base(*call), rtol=0, atol=0)  # B is zero at the start
    packed = {name: p.clone() for name, p in base.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    target, losses = torch.randn(10, 128), []
    for _ in range(10):
        loss = (model(*call) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(p, packed[name]) for name, p in base.named_parameters())


def test_adapter_equals_the_model_with_the_delta_added(quickstart):
    gate_up, down, *call = quickstart
    base = ExpertsNbit.from_float(gate_up, down, "nf4", torch.float32)
    model = ExpertsLoRA(base, r=4, alpha=8)
    torch.nn.init.normal_(model.gate_up_lora_B, std=0.1)
    torch.nn.init.normal_(model.down_lora_B, std=0.1)
    merged = [
        stack(base, "gate_up_proj").dense(torch.float32) + 2.0 * model.gate_up_lora_B @ model.gate_up_lora_A,
        stack(base, "down_proj").dense(torch.float32) + 2.0 * model.down_lora_B @ model.down_lora_A,
    ]
    expected = dense_reference(*[m.detach() for m in merged], *call)
    torch.testing.assert_close(model(*call), expected, rtol=1e-4, atol=1e-3)


def test_state_dict_round_trip_is_bit_equal(quickstart):
    gate_up, down, *call = quickstart
    first = ExpertsNbit.from_float(gate_up, down, "nf4", double_quant=True)
    second = ExpertsNbit.from_float(
        torch.zeros_like(gate_up), torch.zeros_like(down), "nf4", double_quant=True
    )
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(*call), second(*call))


def test_saved_activations_do_not_grow_with_the_number_of_experts():
    def saved_bytes(experts: int) -> int:
        torch.manual_seed(0)
        base = Experts4bit.from_float(torch.randn(experts, 256, 64), torch.randn(experts, 64, 128))
        model = ExpertsLoRA(base, r=4)
        frozen = {p.data_ptr() for p in model.parameters()}
        total = 0

        def pack(tensor):
            nonlocal total
            if tensor.untyped_storage().data_ptr() not in frozen and tensor.is_floating_point():
                total += tensor.nbytes
            return tensor

        hidden, index = torch.randn(32, 64, requires_grad=True), torch.randint(4, (32, 2))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            model(hidden, index, torch.rand(32, 2))
        return total

    few, many = saved_bytes(4), saved_bytes(64)
    dense_stack = 64 * 256 * 64 * 4
    assert (
        many - few < dense_stack / 8
    )  # adapter copies (r of 64 columns) may grow, dequantised weights may not


@pytest.mark.parametrize(
    ("gate_up", "down", "message"),
    [
        ((8, 512, 128), (8, 128, 128), "wanted"),
        ((512, 128), (128, 256), "3-D"),
        ((8, 512, 100), (8, 100, 256), "multiple of 16"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(gate_up, down, message):
    with pytest.raises(ValueError, match=message):
        ExpertsNbit.from_float(torch.randn(gate_up), torch.randn(down))


def test_weights_that_are_not_finite_are_refused_by_name():
    gate_up, down = torch.randn(4, 128, 64), torch.randn(4, 64, 64)
    down[2, 3, 5] = float("nan")
    with pytest.raises(ValueError, match="down_proj, expert 2"):
        ExpertsNbit.from_float(gate_up, down)
