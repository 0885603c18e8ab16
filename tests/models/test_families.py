"""Each row of the families table, and the default rule, against the real classes."""

from __future__ import annotations

import inspect
import re
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

import tiny
from moesmith.errors import UserError
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
    r"mixer\.fc[12]_latent_proj$|mlp\.(pre|post)_expert_proj$": "a projection around the experts",
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
    """By structure: whatever the router or the block itself holds with a dimension of E, or E + 1."""
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
    monkeypatch.setattr("moesmith.models.layers._refuse_unsound", lambda *args: None)
    placed: set[str] = set()
    for placement in PLACEMENTS:
        try:
            modules, parameters = adapter_targets(model, [placement])
        except UserError:  # the model has none
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


READS_WEIGHT = {"granitemoehybrid": "out_proj", "nemotron_h": "out_proj", "jamba": "dt_proj"}


def test_no_module_reads_the_weight_of_a_linear_that_gets_an_adapter(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    """An adapter changes what a linear returns; who takes `self.out_proj.weight` instead would not see it."""
    monkeypatch.setattr("moesmith.models.layers._refuse_unsound", lambda *args: None)
    placed = {name for placement in PLACEMENTS for name in modules_of(model, placement)}
    for model_type, leaf in READS_WEIGHT.items():
        if moe_layers(model)[0].model_type == model_type:
            left_out = {
                n for n, m in model.named_modules() if n.endswith(f".{leaf}") and type(m) is nn.Linear
            }
            assert not left_out & placed
            assert any(reads_weight(model, name) for name in left_out)
    assert [name for name in placed if reads_weight(model, name)] == []


def modules_of(model: nn.Module, placement: str) -> list[str]:
    """Linears of a placement, those that are named by their weight included; none if the model has none."""
    try:
        modules, parameters = adapter_targets(model, [placement])
    except UserError:
        return []
    names = [name.removesuffix(".weight") for name in parameters if name.endswith(".weight")]
    return modules + [name for name in names if type(model.get_submodule(name)) is nn.Linear]


def reads_weight(model: nn.Module, name: str) -> bool:
    """Whether the class that holds the linear uses its weight, other than to ask for its dtype or device."""
    parent, _, leaf = name.rpartition(".")
    source = source_of(type(model.get_submodule(parent)))
    return re.search(rf"self\.{leaf}\.weight\b(?!\.(dtype|device|shape))", source) is not None


source_of = cache(inspect.getsource)  # parses the whole file each time


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
@pytest.mark.parametrize(
    "name", ["deepseek_ocr2", "laguna", "mistral_large4", "unlimited_ocr", "deepseek_v3"]
)
def test_peft_loses_the_adapters_that_the_table_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """When PEFT is repaired this fails, and the row can go. test_layers shows that it loses no others."""
    model = tiny.build(name)
    monkeypatch.setattr("moesmith.models.layers._refuse_unsound", lambda *args: None)
    lost = set()
    for placement in PLACEMENTS:
        modules, parameters = adapter_targets(model, [placement])
        config = LoraConfig(
            r=2, target_modules=modules, target_parameters=parameters, init_lora_weights=False
        )
        adapted = get_peft_model(tiny.build(name), config)
        adapted.save_pretrained(tmp_path / placement)
        again = dict(PeftModel.from_pretrained(tiny.build(name), tmp_path / placement).named_parameters())
        lora = {key: value for key, value in adapted.named_parameters() if ".lora_" in key}
        if not all(torch.equal(value, again[key]) for key, value in lora.items()):
            lost.add(placement)
    assert lost == set(moe_layers(model)[0].family.lost_adapters)
