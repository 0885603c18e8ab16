"""Each row of the families table, and the default rule, against the real classes."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import tiny
from moesmith.models import families
from moesmith.models.families import FAMILIES, Family, family
from moesmith.models.layers import (
    PLACEMENTS,
    adapter_targets,
    expert_id_tensors,
    moe_layers,
    per_expert_tensors,
    submodule,
)

# Linears of a decoder layer that no placement takes, and why.
LEFT_OUT = {
    r"self_attn\.(compressor\.)?indexer\.": "chooses positions: no gradient",
    r"mlp\.shared_expert_gate$": "one output: how much of the shared expert",
    r"(mamba|mixer)\.(out|dt)_proj$": "kernels read the weight itself",
    r"mixer\.fc[12]_latent_proj$|mlp\.(pre|post)_expert_proj$": "around the experts of nemotron_h, muse_spark",
    r"vision_moe\.": "text never reaches it",
    r"layernorm\.mlp\.|hyper_connection\.|per_layer_(input_gate|projection)$": "no attention and no MLP",
}


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    return tiny.build(request.param)


def own_tensors(module: nn.Module, recurse: bool) -> dict[str, Tensor]:
    return dict([*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)])


def test_every_row_is_a_model_type_that_exists_and_differs_from_the_default():
    model_types = {layer.model_type for name in tiny.FAMILIES for layer in moe_layers(tiny.build(name))}
    assert FAMILIES.keys() <= model_types
    assert Family() not in FAMILIES.values()
    assert family("olmoe") == family(None) == Family()


def test_the_table_names_every_router_tensor_that_has_one_row_per_expert(model: nn.Module):
    """By structure: whatever the router or the block itself holds with a dimension of E, or E and one more."""
    for layer in moe_layers(model):
        router = own_tensors(submodule(model, layer.router), recurse=True)
        block = own_tensors(submodule(model, layer.name), recurse=False)
        tensors = {f"{layer.router}.{k}": t for k, t in router.items()}
        tensors |= {f"{layer.name}.{k}": t for k, t in block.items()}
        by_shape = {
            name: dim
            for name, tensor in tensors.items()
            for dim, size in enumerate(tensor.shape)
            if size in (layer.num_experts, layer.num_experts + 1)
        }
        named = per_expert_tensors(model, layer)
        assert {k: dim for k, dim in named.items() if not k.startswith(layer.experts + ".")} == by_shape
        integers = {name for name, tensor in tensors.items() if not tensor.is_floating_point()}
        assert set(expert_id_tensors(model, layer)) == integers


def test_the_table_names_every_expert_tensor(model: nn.Module):
    for layer in moe_layers(model):
        experts = own_tensors(submodule(model, layer.experts), recurse=False)
        assert {f"{layer.experts}.{name}" for name in experts} <= per_expert_tensors(model, layer).keys()


def test_each_name_in_a_row_is_found_in_the_model(model: nn.Module):
    """An exception that the class does not have would be a typing error that nothing else notices."""
    for model_type in {layer.model_type for layer in moe_layers(model)} & FAMILIES.keys():
        row, layers = FAMILIES[model_type], [x for x in moe_layers(model) if x.model_type == model_type]
        names = {part for name, _ in model.named_modules() for part in name.split(".")}
        for field in fields(Family):
            value = getattr(row, field.name)
            if value == field.default:
                continue
            if field.name in ("shared_experts", "attention", "dense_mlp", "no_adapter"):
                assert set(value) <= names
            elif field.name == "lost_adapters":
                assert set(value) <= set(PLACEMENTS)
            else:
                parent = layers[0].name if field.name == "block_per_expert" else layers[0].router
                tensors = own_tensors(submodule(model, parent), recurse=True)
                assert set(value) <= tensors.keys()


def test_every_linear_of_the_decoder_is_placed_or_left_out_for_a_reason(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    without_refusals(model, monkeypatch)
    placed: set[str] = set()
    for placement in PLACEMENTS:
        try:
            modules, parameters = adapter_targets(model, [placement])
        except ValueError:
            continue
        placed |= {*modules, *(name.removesuffix(".weight") for name in parameters)}
    stacks = {re.sub(r"\.\d+(\..*)?$", "", layer.name) for layer in moe_layers(model)}
    linears = {
        name
        for name, module in model.named_modules()
        if type(module) is nn.Linear and any(name.startswith(stack + ".") for stack in stacks)
    }
    unplaced = {name for name in linears - placed if not any(re.search(p, name) for p in LEFT_OUT)}
    assert unplaced == set()


def without_refusals(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let adapter_targets answer where it would refuse."""
    monkeypatch.setattr("moesmith.models.layers._refuse_unsound", lambda *args: None)


@pytest.mark.parametrize("name", ["deepseek_ocr2", "laguna", "mistral_large4", "unlimited_ocr", "deepseek_v3"])
def test_peft_loses_the_adapters_that_the_table_says(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """When PEFT is repaired this fails, and the row can go."""
    model = tiny.build(name)
    without_refusals(model, monkeypatch)
    lost = set()
    for placement in PLACEMENTS:
        try:
            modules, parameters = adapter_targets(model, [placement])
        except ValueError:
            lost |= {placement} & set(moe_layers(model)[0].family.lost_adapters)  # has none of it
            continue
        config = LoraConfig(r=2, init_lora_weights=False, target_modules=modules, target_parameters=parameters)
        adapted = get_peft_model(tiny.build(name), config)
        adapted.save_pretrained(tmp_path / placement)
        with pytest.warns() if placement in moe_layers(model)[0].family.lost_adapters else nothing():
            again = PeftModel.from_pretrained(tiny.build(name), tmp_path / placement)
        theirs = dict(again.named_parameters())
        lora = {key: value for key, value in adapted.named_parameters() if ".lora_" in key}
        if not all(torch.equal(value, theirs[key]) for key, value in lora.items()):
            lost.add(placement)
    assert lost == set(moe_layers(model)[0].family.lost_adapters)
