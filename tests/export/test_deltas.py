"""What an adapter adds to each parameter: PEFT's own delta, in the orientation of the parameter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from moesmith.errors import UserError
from moesmith.export.deltas import Deltas
from moesmith.models.anatomy import meta_model
from moesmith.models.layers import adapter_targets


def adapted(model, out: Path, placements=("experts", "attention", "router"), **options):
    modules, parameters = adapter_targets(model, placements)
    options = {"r": 4, "lora_alpha": 8, "target_modules": modules, "target_parameters": parameters} | options
    made = get_peft_model(model, LoraConfig(**options))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in made.named_parameters():
        if ".lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    made.save_pretrained(out)
    return made


def meta(model) -> nn.Module:
    return meta_model(json.loads(model.config.to_json_string(use_diff=False)))


def by_peft(model) -> dict[str, torch.Tensor]:
    """Parameter -> the delta that PEFT computes for it."""
    found = {}
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLayer):
            leaf = getattr(module, "parameter_name", "weight")
            found[f"{name.replace('.base_layer', '')}.{leaf}"] = module.get_delta_weight("default").detach()
    return found


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "gemma4", "openai_privacy_filter"])
def test_a_delta_is_pefts(family: str, tmp_path: Path):
    model = adapted(tiny.build(family), tmp_path)
    wanted = by_peft(model)
    deltas = Deltas.read([tmp_path], meta(model))
    assert deltas.places.keys() == wanted.keys()
    assert set(deltas.placement.values()) == {"experts", "attention", "router"}
    stacks = {name for name in wanted if wanted[name].ndim == 3}
    assert deltas.transposed == (stacks if family in ("gpt_oss", "openai_privacy_filter") else set())
    for name, delta in wanted.items():
        torch.testing.assert_close(deltas.of(name).view(delta.shape), delta, rtol=1e-5, atol=1e-5)
        last = deltas.of_slice(name, deltas.places[name].shape[0] - 1)
        torch.testing.assert_close(last, delta[-1] if delta.ndim == 3 else delta, rtol=1e-5, atol=1e-5)
        weight = torch.randn_like(delta).to(torch.bfloat16)
        added = deltas.add(name, weight)
        assert added.dtype == torch.float32
        torch.testing.assert_close(added, weight.float() + delta, rtol=1e-5, atol=1e-5)
    alone = torch.randn(3, 4)
    assert torch.equal(deltas.add("model.norm.weight", alone), alone)


def test_a_square_stack_is_turned_by_what_the_module_says(tmp_path: Path):
    """gpt-oss-20b has hidden = expert width: no shape tells which side of down_proj is which."""
    config = tiny.config("gpt_oss")
    config.intermediate_size = config.hidden_size
    model = adapted(tiny.model_class("gpt_oss")(config), tmp_path, ["experts"])
    deltas = Deltas.read([tmp_path], meta(model))
    for name, delta in by_peft(model).items():
        torch.testing.assert_close(deltas.of(name), delta, rtol=1e-5, atol=1e-5)
        if "down_proj" in name:
            assert delta.shape[1] == delta.shape[2] and not torch.allclose(deltas.of(name).mT, delta)


def test_ranks_that_differ_by_parameter(tmp_path: Path):
    """PEFT doubles the rank of gate_up_proj when it converts an adapter on a list of experts."""
    options = {"rank_pattern": {"experts.gate_up_proj": 6}, "alpha_pattern": {"experts.gate_up_proj": 5}}
    model = adapted(tiny.build("olmoe"), tmp_path, ["experts"], use_rslora=True, **options)
    deltas = Deltas.read([tmp_path], meta(model))
    assert {part.rank for part in deltas.places.values()} == {4, 6}
    for name, delta in by_peft(model).items():
        torch.testing.assert_close(deltas.of(name), delta, rtol=1e-5, atol=1e-5)


def test_zero_is_zero_and_several_are_a_sum(tmp_path: Path):
    a = adapted(tiny.build("olmoe"), tmp_path / "a", ["attention"])
    b = adapted(tiny.build("olmoe"), tmp_path / "b", ["attention", "experts"], r=2, use_rslora=True)
    tensors = load_file(tmp_path / "b/adapter_model.safetensors")
    name = "model.layers.2.mlp.experts.down_proj"
    key = "base_model.model.model.layers.2.mlp.experts.lora_B.weight"
    tensors[key].zero_()
    save_file(tensors, tmp_path / "b/adapter_model.safetensors")
    deltas = Deltas.read([tmp_path / "a", tmp_path / "b"], meta(a))
    assert [place for place in deltas.places if deltas.is_zero(place)] == [name]
    one, two = by_peft(a), by_peft(b)
    for place in one:
        torch.testing.assert_close(deltas.of(place)[0], one[place] + two[place], rtol=1e-5, atol=1e-4)
    assert Deltas.read([], meta(a)).places == {}


def test_what_does_not_fit_is_refused(tmp_path: Path):
    adapted(tiny.build("olmoe"), tmp_path, ["experts"])
    with pytest.raises(UserError, match=r"which has no model.layers.0.mlp.experts \(6 of 6 places\)"):
        Deltas.read([tmp_path], nn.Linear(2, 2))
    other = tiny.config("olmoe")
    other.intermediate_size = 192
    wider = meta_model(json.loads(other.to_json_string(use_diff=False)) | {"architectures": None})
    with pytest.raises(
        UserError, match=r"gate_up_proj it is for \[8, 256, 64\], the model has \[8, 384, 64\]"
    ):
        Deltas.read([tmp_path], wider)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_embedding_A"] = torch.ones(1)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match="lora_embedding_A is no factor"):
        Deltas.read([tmp_path], wider)
