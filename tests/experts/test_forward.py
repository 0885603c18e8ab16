"""Seam 2: the packed experts function beside the stock one, on every shape of routing."""

import pytest
import torch
from transformers import GptOssConfig, MixtralConfig
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from moesmith import ExpertsConfig
from moesmith.experts.forward import EXPERTS_FUNCTION, experts_forward
from moesmith.experts.quantizer import pack_stack
from moesmith.experts.storage import mark, packed_parameters, stack, weight_names

E, H, F = 8, 64, 128


def experts(kind: str):
    torch.manual_seed(0)
    sizes = dict(hidden_size=H, intermediate_size=F, num_local_experts=E)
    module = (
        MixtralExperts(MixtralConfig(**sizes)) if kind == "mixtral" else GptOssExperts(GptOssConfig(**sizes))
    )
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return module.requires_grad_(False)


def pack(module, scheme="nf4"):
    """Pack in place; returns the dense stacks the codes stand for."""
    mark(module, scheme)
    dense = {}
    for name in weight_names(module):
        packed = pack_stack(getattr(module, name), ExpertsConfig(scheme))
        dense[name] = packed.dense(torch.float32)
        for key, parameter in packed_parameters(name, packed).items():
            module.register_parameter(key, parameter)
    return dense


ROUTINGS = {
    "spread": torch.randint(E, (24, 2), generator=torch.Generator().manual_seed(0)),
    "one token": torch.tensor([[3, 5]]),
    "all on one expert": torch.full((9, 2), 4),
    "empty experts": torch.tensor([[0, 7], [7, 0], [0, 7]]),
    "no tokens": torch.empty(0, 2, dtype=torch.long),
}


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])  # gpt_oss: transposed, interleaved, biases
@pytest.mark.parametrize("routing", ROUTINGS)
def test_equals_the_stock_function_on_the_dequantised_weights(kind, routing):
    index = ROUTINGS[routing]
    hidden, weights = torch.randn(index.shape[0], H), torch.rand(index.shape)
    packed, stock = experts(kind), experts(kind)
    for name, dense in pack(packed).items():
        getattr(stock, name).data.copy_(dense)
    got = experts_forward(packed, hidden, index, weights)
    assert got.shape == hidden.shape
    if len(index):
        torch.testing.assert_close(
            got, grouped_mm_experts_forward(stock, hidden, index, weights), rtol=0, atol=1e-6
        )


def test_an_id_equal_to_num_experts_contributes_nothing():
    module = experts("mixtral")
    pack(module)
    hidden, weights = torch.randn(5, H), torch.rand(5, 2)
    index = torch.tensor([[0, E], [E, E], [3, 4], [E, 1], [2, 2]])
    got = experts_forward(module, hidden, index, weights)
    zeroed = experts_forward(module, hidden, index.clamp(max=E - 1), weights * (index < E))
    torch.testing.assert_close(got, zeroed)
    assert torch.equal(got[1], torch.zeros(H))


def test_an_id_beyond_that_is_an_error():
    module = experts("mixtral")
    pack(module)
    with pytest.raises(ValueError, match="ids from"):
        experts_forward(module, torch.randn(1, H), torch.tensor([[0, E + 1]]), torch.rand(1, 2))


def test_a_module_that_is_not_ours_takes_the_stock_road():
    module = experts("mixtral")
    call = torch.randn(6, H), torch.randint(E, (6, 2)), torch.rand(6, 2)
    assert torch.equal(experts_forward(module, *call), grouped_mm_experts_forward(module, *call))
    assert ALL_EXPERTS_FUNCTIONS[EXPERTS_FUNCTION] is experts_forward


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_the_gradient_of_the_input_and_of_the_weights_is_the_stock_one(kind):
    packed, stock = experts(kind), experts(kind)
    for name, dense in pack(packed).items():
        getattr(stock, name).data.copy_(dense)
    index, grad = torch.randint(E, (12, 2)), torch.randn(12, H)
    grads = []
    for function, module in ((experts_forward, packed), (grouped_mm_experts_forward, stock)):
        torch.manual_seed(1)
        hidden = torch.randn(12, H, requires_grad=True)
        weights = torch.rand(12, 2, requires_grad=True)
        function(module, hidden, index, weights).backward(grad)
        grads.append((hidden.grad, weights.grad))
    for ours, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_routing_weights_in_fp32_with_hidden_states_in_bf16():
    module = experts("mixtral")
    pack(module)
    hidden = torch.randn(6, H).bfloat16()
    out = experts_forward(module, hidden, torch.randint(E, (6, 2)), torch.rand(6, 2))
    assert out.dtype == torch.bfloat16
    assert stack(module, "down_proj").shape == (E, H, F)
