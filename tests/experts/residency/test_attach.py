"""The model around experts that lie elsewhere: saved, moved, cast, copied, wrapped; and the way back."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import tiny
from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.experts.residency import attach as seam
from moesmith.experts.residency.attach import attach, detach, names_at_home, packed_experts, residency_of
from moesmith.experts.residency.link import CpuLink
from moesmith.experts.residency.policy import Policy
from moesmith.experts.storage import stack
from offloaded import adapted, assert_same, load, outputs

Checkpoint = Callable[[str], Path]


def test_state_dict_and_save_pretrained_give_the_whole_model(checkpoint: Checkpoint, tmp_path: Path):
    model = load("gpt_oss", checkpoint("gpt_oss"), ExpertsConfig("nf4", double_quant=True))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "resident")
    attach(model, Policy("ram", slots=1))
    outputs(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    model.save_pretrained(tmp_path / "evicted")
    first, second = (load_file(tmp_path / kind / "model.safetensors") for kind in ("resident", "evicted"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    detach(model)


def test_the_model_may_be_moved_and_cast_around_them(checkpoint: Checkpoint):
    model = load("gpt_oss", checkpoint("gpt_oss"))
    order = list(model.state_dict())
    homes = {name: p.data_ptr() for name, p in model.named_parameters() if p.dtype == torch.uint8}
    attach(model, Policy("ram"))
    model.to(torch.bfloat16)
    (_, module), *_ = packed_experts(model)
    assert module.gate_up_proj_bias.dtype == torch.bfloat16 and module.down_proj_absmax.dtype == torch.float32
    assert {name: p.data_ptr() for name, p in model.named_parameters() if p.dtype == torch.uint8} == homes
    assert list(model.state_dict()) == order
    want = load("gpt_oss", checkpoint("gpt_oss"))
    scales = {name: p.data for name, p in want.named_parameters() if "_absmax" in name}
    want.to(torch.bfloat16)
    for name, scale in scales.items():
        want.get_parameter(name).data = scale
    assert_same(outputs(model), outputs(want))
    detach(model)
    assert not any("_apply" in module.__dict__ for module in model.modules())
    model.to("meta")
    assert all(p.is_meta for p in model.parameters())


def test_only_the_experts_stay(checkpoint: Checkpoint):
    model = load("gpt_oss", checkpoint("gpt_oss"))
    attach(model, Policy("ram"))
    model.to("meta")
    stayed = {name for name, p in model.named_parameters() if not p.is_meta}
    assert stayed == set(names_at_home(model))
    packed = {name for name, p in model.named_parameters() if ".experts." in name and "_bias" not in name}
    assert stayed == packed
    detach(model)


def test_attaching_again_and_detaching(checkpoint: Checkpoint):
    model = load("olmoe", checkpoint("olmoe"))
    want = outputs(model)
    first = attach(model, Policy("ram"))
    second = attach(model, Policy("ram", slots=1))
    assert residency_of(model) is second is not first
    copy = deepcopy(model)
    assert_same(outputs(copy), want)
    detach(model)
    detach(model)
    assert residency_of(model) is None and not any(m._forward_hooks for m in model.modules())
    assert_same(outputs(model), want)
    assert attach(model, Policy()) is None
    assert_same(outputs(model), want)


def test_a_home_per_layer(checkpoint: Checkpoint):
    model = load("olmoe", checkpoint("olmoe"))
    want = outputs(model)
    attach(model, Policy(("device", "ram", "ram"), slots=1))
    assert ["experts_residency" in m.__dict__ for _, m in packed_experts(model)] == [False, True, True]
    assert_same(outputs(model), want)
    detach(model)


def test_adapters_before_and_after(checkpoint: Checkpoint):
    """PEFT may wrap a model whose experts are away, or find them sent away later."""
    resident = adapted(load("olmoe", checkpoint("olmoe"))).eval()
    early, late = load("olmoe", checkpoint("olmoe")), adapted(load("olmoe", checkpoint("olmoe"))).eval()
    attach(early, Policy("ram", slots=1))
    early = adapted(early).eval()
    attach(late, Policy("ram", slots=1))
    assert [name for name, _ in packed_experts(late)] == [f"model.layers.{i}.mlp.experts" for i in range(3)]
    want = outputs(resident)
    assert_same(outputs(early), want)
    assert_same(outputs(late), want)
    detach(early), detach(late)


def test_errors_and_nothing_left_behind(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="no experts that moesmith loaded"):
        attach(nn.Linear(2, 2), Policy("ram"))
    model = load("olmoe", checkpoint("olmoe"))
    with pytest.raises(UserError, match="2 homes for 3 MoE layers"):
        attach(model, Policy(("ram", "disk")))

    def broken(*args: Any) -> None:
        raise UserError("does not fit")

    monkeypatch.setattr(seam, "Residency", broken)
    with pytest.raises(UserError, match="does not fit"):
        attach(model, Policy("ram"))
    assert residency_of(model) is None and not any("_apply" in m.__dict__ for m in model.modules())


def test_a_link_of_ones_own_stages_mapped_experts_on_a_cpu(checkpoint: Checkpoint, tmp_path: Path):
    load("olmoe", checkpoint("olmoe")).save_pretrained(tmp_path)
    model = tiny.model_class("olmoe").from_pretrained(tmp_path, dtype=torch.float32).eval()
    want = outputs(model)
    attach(model, Policy("disk", slots=1), link=CpuLink())
    assert_same(outputs(model), want)
    shapes = [stack(module, "down_proj").shape for _, module in packed_experts(model)]
    assert shapes == [(tiny.NUM_EXPERTS, tiny.HIDDEN, tiny.EXPERT)] * 3
    detach(model)


def test_taking_it_off_ends_its_thread(checkpoint: Checkpoint):
    model = load("olmoe", checkpoint("olmoe"))
    link = CpuLink()
    residency = attach(model, Policy("ram"), link=link)
    assert residency is not None and link._worker.thread.is_alive()
    detach(model)
    assert not link._worker.thread.is_alive()
