"""The next layer's router is asked past its hooks, and only while decoding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import tiny
from moesmith import ExpertsConfig
from moesmith.experts.residency.attach import attach, detach, packed_experts
from moesmith.experts.residency.policy import Policy
from moesmith.experts.residency.predict import FEW_TOKENS, Prediction, router_of
from moesmith.models.layers import adapter_targets, moe_layers, submodule


class Recorded:
    """A residency's `expect`, written down; it always has use for a prediction."""

    def __init__(self, model: nn.Module):
        self.residency = attach(model, Policy("ram", cache=4))
        for _, module in packed_experts(model):
            if module.experts_residency.prediction is not None:
                module.experts_residency.prediction.wanted = None
        self.expected: list[tuple[int, list[int]]] = []
        real = self.residency.expect
        self.residency.expect = lambda layer, experts: (
            self.expected.append((layer, experts)) or real(layer, experts)
        )


@pytest.fixture
def model(checkpoint: Callable[[str], Path]) -> nn.Module:
    return load("olmoe", checkpoint)


def load(family: str, checkpoint: Callable[[str], Path]) -> nn.Module:
    return tiny.model_class(family).from_pretrained(
        checkpoint(family), quantization_config=ExpertsConfig("nf4"), dtype=torch.float32
    ).eval()  # fmt: skip


@torch.no_grad()
def test_it_says_what_the_next_router_would_choose_of_this_ones_input(model: nn.Module):
    recorded = Recorded(model)
    blocks = [submodule(model, layer.name) for layer in moe_layers(model)]
    inputs: list[torch.Tensor] = []
    for block in blocks:
        block.gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model(torch.tensor([[7, 9]]))
    assert len(inputs) == 3, "predicting runs no hooks"
    want = [(i + 1, sorted(set(blocks[i + 1].gate(inputs[i])[2].flatten().tolist()))) for i in range(2)]
    assert recorded.expected == want
    detach(model)


def test_not_with_gradients_not_for_many_tokens_not_while_training(model: nn.Module):
    recorded = Recorded(model)
    model(torch.tensor([[7]]))
    with torch.no_grad():
        model(torch.arange(1, FEW_TOKENS + 2)[None])
        model.train()
        model(torch.tensor([[7]]))
    assert recorded.expected == []
    model.eval()
    with torch.no_grad():
        model(torch.tensor([[7]]))
    assert [layer for layer, _ in recorded.expected] == [1, 2]
    detach(model)


@torch.no_grad()
def test_masked_experts_are_named_by_their_own_ids(model: nn.Module):
    recorded = Recorded(model)
    modules = [module for _, module in packed_experts(model)]
    model(torch.tensor([[7]]))
    before = [experts for _, experts in recorded.expected]
    recorded.expected.clear()
    modules[1].experts_kept = torch.tensor([7, 6, 5, 4, 3, 2, 1, 0])
    model(torch.tensor([[7]]))
    assert recorded.expected[0] == (1, sorted(7 - e for e in before[0]))
    detach(model)


@torch.no_grad()
def test_a_router_that_cannot_be_asked_is_left_alone(model: nn.Module):
    recorded = Recorded(model)
    blocks = [submodule(model, layer.name) for layer in moe_layers(model)]
    calls = []

    class Shy(type(blocks[1].gate)):
        def forward(self, hidden, *more):
            calls.append(len(more))
            if len(calls) == 1:
                raise ValueError("not now")
            return super().forward(hidden)

    blocks[1].gate.__class__ = Shy
    for _ in range(2):
        model(torch.tensor([[7]]))
    assert [layer for layer, _ in recorded.expected] == [2, 2]
    assert len(calls) == 3, "asked once, then only run"
    detach(model)


@torch.no_grad()
def test_not_while_the_residency_has_no_use_for_it(model: nn.Module):
    recorded = Recorded(model)
    for _, module in packed_experts(model):
        if module.experts_residency.prediction is not None:
            module.experts_residency.prediction.wanted = lambda layer: layer == 2
    model(torch.tensor([[7]]))
    assert [layer for layer, _ in recorded.expected] == [2]
    detach(model)


def test_detached_nothing_watches(model: nn.Module):
    Recorded(model)
    assert any(module._forward_hooks for module in model.modules())
    detach(model)
    assert not any(module._forward_hooks for module in model.modules())
    attach(model, Policy("ram", prefetch=False))
    assert not any(module._forward_hooks for module in model.modules())
    detach(model)


@torch.no_grad()
def test_through_adapters_on_the_router(model: nn.Module):
    from peft import LoraConfig, get_peft_model

    modules, parameters = adapter_targets(model, ("experts", "router"))
    model = get_peft_model(
        model, LoraConfig(r=2, target_modules=modules, target_parameters=parameters)
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.5)
    recorded = Recorded(model)
    want: list[list[int]] = []
    gates = [submodule(model, layer.name).gate for layer in moe_layers(model)]
    gates[0].register_forward_hook(
        lambda _, args, __: want.append(sorted(set(gates[1](args[0])[2].flatten().tolist())))
    )
    model(torch.tensor([[7]]))
    assert recorded.expected[0] == (1, want[0])
    detach(model)


@pytest.mark.parametrize("family", ["gpt_oss", "gemma4", "deepseek_v3", "jamba"])
@torch.no_grad()
def test_other_families(family: str, checkpoint: Callable[[str], Path]):
    model = load(family, checkpoint)
    recorded = Recorded(model)
    model(torch.tensor([[7]]))
    layers = len(packed_experts(model))
    assert [layer for layer, _ in recorded.expected] == list(range(1, layers))
    assert all(0 <= e < tiny.NUM_EXPERTS for _, experts in recorded.expected for e in experts)
    detach(model)


def test_a_block_without_a_router():
    assert router_of(nn.Linear(2, 2)) is None
    before = nn.Linear(2, 2)
    prediction = Prediction(before, nn.Linear(2, 2), nn.Linear(2, 2), 1)
    with torch.no_grad():
        before(torch.ones(1, 2))
    assert prediction.take() == []
