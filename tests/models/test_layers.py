"""moe_layers and adapter_targets on every architecture: plain, on the meta device, packed, inside PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.experts.storage import named_experts
from moesmith.models.layers import (
    PLACEMENTS,
    adapter_targets,
    expert_id_tensors,
    moe_layers,
    per_expert_tensors,
    submodule,
)

# Placements that adapter_targets refuses, and the reason it gives.
REFUSED = {
    "deepseek_ocr2": {placement: "load" for placement in PLACEMENTS},
    "diffusion_gemma": {placement: "one tensor" for placement in PLACEMENTS},
    "laguna": {"shared_experts": "load"},
    "mistral_large4": {placement: "load" for placement in ("experts", "router", "shared_experts")},
    "qwen3_omni_moe_talker": {"attention": "code_predictor"},
    "unlimited_ocr": {placement: "load" for placement in PLACEMENTS},
}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> nn.Module:
    """The plain tiny model. Tests do not change it."""
    return tiny.build(family)


def targets(model: nn.Module, family: str) -> dict[str, tuple[list[str], list[str]]]:
    """placement -> targets, for the placements that the model has and PEFT can do."""
    found = {}
    for placement in PLACEMENTS:
        if placement not in REFUSED.get(family, {}):
            try:
                found[placement] = adapter_targets(model, [placement])
            except UserError as error:
                assert f"has no {placement}" in str(error)
    return found


def test_every_experts_module_has_its_layer(family: str, model: nn.Module):
    layers = moe_layers(model)
    assert [layer.experts for layer in layers] == [name for name, _ in named_experts(model)]
    for layer in layers:
        assert layer.num_experts == tiny.NUM_EXPERTS
        assert layer.num_experts % layer.n_group == 0
        assert submodule(model, layer.router) is not submodule(model, layer.name)


def test_the_router_runs_before_the_experts_and_gives_each_token_top_k(model: nn.Module):
    calls: list[str] = []
    top_k: dict[str, int] = {}
    hooks = []
    for layer in moe_layers(model):
        router, experts = submodule(model, layer.router), submodule(model, layer.experts)

        def called(*_, name=layer.router):
            calls.append(name)

        def routed(_, args, name=layer.experts):
            calls.append(name)
            top_k[name] = args[1].shape[1]

        hooks += [router.register_forward_hook(called), experts.register_forward_pre_hook(routed)]
    with torch.no_grad():
        model(**tiny.inputs(model))
    for hook in hooks:
        hook.remove()
    assert calls == [name for layer in moe_layers(model) for name in (layer.router, layer.experts)]
    assert top_k == {layer.experts: layer.top_k for layer in moe_layers(model)}


def test_meta_and_packed_models_have_the_same_layers_and_targets(
    family: str, model: nn.Module, checkpoint: Callable[[str], Path]
):
    with torch.device("meta"):
        on_meta = tiny.model_class(family)(tiny.config(family))
    packed = tiny.model_class(family).from_pretrained(
        checkpoint(family), quantization_config=ExpertsConfig("nf4"), dtype=torch.float32
    )
    for other in (on_meta, packed):
        assert moe_layers(other) == moe_layers(model)
        assert targets(other, family) == targets(model, family)
        for layer in moe_layers(model):
            assert per_expert_tensors(other, layer).items() >= per_expert_tensors(model, layer).items()
            assert expert_id_tensors(other, layer) == expert_id_tensors(model, layer)
    for layer in moe_layers(packed):
        scales = [name for name in per_expert_tensors(packed, layer) if name.endswith("_absmax")]
        assert len(scales) == 2


def test_placements_are_disjoint_and_in_the_text_decoder(family: str, model: nn.Module):
    found = targets(model, family)
    names = [name for modules, parameters in found.values() for name in [*modules, *parameters]]
    assert len(names) == len(set(names))
    for name in names:
        assert not any(word in name for word in ("lm_head", "embed", "vision", "visual", "audio"))
    for name in [name for modules, _ in found.values() for name in modules]:
        assert type(model.get_submodule(name)) is nn.Linear
    for name in [name for _, parameters in found.values() for name in parameters]:
        assert model.get_parameter(name).ndim in (2, 3)


def test_peft_adapts_exactly_the_targets_and_loads_them_back(family: str, model: nn.Module, tmp_path: Path):
    """PEFT changes or skips some targets silently, and when loading only warns of tensors it cannot place."""
    found = targets(model, family)
    if not found:
        pytest.skip(f"every placement of {family} is refused")
    modules, parameters = adapter_targets(model, found)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=modules, target_parameters=parameters)
    adapted = get_peft_model(tiny.build(family), config)
    assert moe_layers(adapted) == moe_layers(model)
    assert targets(adapted, family) == found

    generator = torch.Generator().manual_seed(0)
    lora = {name: parameter for name, parameter in adapted.named_parameters() if ".lora_" in name}
    assert len(lora) == 2 * (len(modules) + len(parameters))
    clean = [name.removeprefix("base_model.model.").replace(".base_layer", "") for name in lora]
    assert {name.partition(".lora_")[0] for name in clean} == {
        *modules,
        *(name.rpartition(".")[0] for name in parameters),
    }
    for name, parameter in lora.items():
        assert parameter.shape[0 if "lora_A" in name else 1] in (2, 2 * tiny.NUM_EXPERTS), (
            "PEFT changed the rank"
        )
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    adapted(**tiny.inputs(model)).logits.square().mean().backward()
    assert [
        name for name, parameter in lora.items() if parameter.grad is None or not parameter.grad.any()
    ] == []

    adapted.save_pretrained(tmp_path)
    again = dict(PeftModel.from_pretrained(tiny.build(family), tmp_path).named_parameters())
    assert [name for name, parameter in lora.items() if not torch.equal(parameter, again[name])] == []


@pytest.mark.parametrize(
    ("name", "placement", "reason"),
    [(name, placement, reason) for name, refused in REFUSED.items() for placement, reason in refused.items()],
)
def test_an_adapter_that_could_not_be_loaded_or_merged_is_refused(name: str, placement: str, reason: str):
    model = tiny.build(name)
    with pytest.raises(UserError, match=f"{reason}|has no {placement}"):
        adapter_targets(model, [placement])


def test_a_linear_that_peft_takes_for_experts_is_named_by_its_weight():
    """deepseek_v2's shared experts; qwen2_moe is not among the types that PEFT converts."""
    modules, parameters = adapter_targets(tiny.build("deepseek_v2"), ["shared_experts"])
    assert modules == [] and parameters[0] == "model.layers.1.mlp.shared_experts.gate_proj.weight"
    modules, parameters = adapter_targets(tiny.build("qwen2_moe"), ["shared_experts"])
    assert parameters == [] and modules[0] == "model.layers.0.mlp.shared_expert.gate_proj"


def test_the_same_linear_quantised_is_refused(checkpoint: Callable[[str], Path]):
    quantised = tiny.model_class("deepseek_v2").from_pretrained(
        checkpoint("deepseek_v2"), quantization_config=ExpertsConfig("nf4", linears="nf4")
    )
    with pytest.raises(UserError, match="while it is quantised"):
        adapter_targets(quantised, ["shared_experts"])
    modules, _ = adapter_targets(quantised, ["attention"])
    assert modules == adapter_targets(tiny.build("deepseek_v2"), ["attention"])[0]


@pytest.mark.parametrize(
    ("placements", "message"),
    [
        (["expert"], "unknown adapter placement 'expert'"),
        ([], "no adapter placement"),
        (
            ["experts", "shared_experts"],
            "Qwen3MoeForCausalLM has no shared_experts.*\nit has experts, attention",
        ),
    ],
)
def test_what_cannot_be_done_is_said(placements: list[str], message: str):
    with pytest.raises(UserError, match=message):
        adapter_targets(tiny.build("qwen3_moe"), placements)


def test_a_dense_model_has_no_layers():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=128
    )
    model = LlamaForCausalLM(config)
    assert moe_layers(model) == []
    with pytest.raises(UserError, match="has no experts"):
        adapter_targets(model, ["experts"])
