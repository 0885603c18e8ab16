"""Tensors in memory become what a stock save_pretrained writes, a group at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from moesmith import ExpertsConfig
from moesmith.experts.storage import named_experts, weight_names
from moesmith.export.layout import Layout
from moesmith.models.anatomy import meta_model
from moesmith.models.checkpoint import read_config
from moesmith.models.headers import read_headers

Checkpoint = Callable[[str], Path]
SAMPLE = (
    "ernie4_5_vl_moe",
    "gemma4",
    "gpt_oss",
    "inkling2",
    "minimax_m3_vl",
    "mixtral",
    "qwen3_vl_moe",
    "zaya",
)
REST = [family for family in tiny.FAMILIES if family not in SAMPLE]


def check(family: str, folder: Path) -> None:
    meta = meta_model(read_config(folder))
    saved = [name for name in meta.state_dict() if name not in meta.all_tied_weights_keys]
    layout = Layout(meta, read_headers(folder), saved)
    states = tiny.model_class(family).from_pretrained(folder).state_dict()
    on_disk = load_file(folder / "model.safetensors")
    assert sorted(name for group in layout.groups for name in group.live) == sorted(saved)
    assert sorted(name for group in layout.groups for name in group.disk) == sorted(on_disk)
    for group in layout.groups:
        tensors = layout.to_disk(group, {name: states[name] for name in group.live})
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == group.disk
        for name, tensor in tensors.items():
            assert torch.equal(tensor, on_disk[name]), name


@pytest.mark.parametrize("family", SAMPLE)
def test_a_group_at_a_time_is_save_pretrained(family: str, checkpoint: Checkpoint):
    check(family, checkpoint(family))


@pytest.mark.slow
@pytest.mark.parametrize("family", REST)
def test_a_group_at_a_time_is_save_pretrained_everywhere(family: str, checkpoint: Checkpoint):
    check(family, checkpoint(family))


@pytest.mark.parametrize("family", ["granitemoe", "mixtral", "qwen3_vl_moe"])
def test_of_a_packed_model_the_layout_is_the_architectures(
    family: str, checkpoint: Checkpoint, tmp_path: Path
):
    """Packed stacks are stored joined, whatever the architecture does; their scales are found."""
    packed = tiny.model_class(family).from_pretrained(
        checkpoint(family), quantization_config=ExpertsConfig("nf4", double_quant=True)
    )
    packed.save_pretrained(tmp_path)
    meta = meta_model(read_config(checkpoint(family)))
    stored = read_headers(tmp_path)
    layout = Layout(meta, stored)
    assert {name for group in layout.groups for name in group.disk} == read_headers(checkpoint(family)).keys()
    assert layout.scales.keys() == {
        f"{name}.{weight}" for name, module in named_experts(meta) for weight in weight_names(module)
    }
    for stack, names in layout.scales.items():
        assert stored[next(d for d, live in layout.in_memory.items() if live == stack)].dtype == "U8"
        assert [stored[name].dtype for name in names if name] == ["U8", "F32", "F32"]


def test_of_two_layouts_the_one_that_was_found_is_written(checkpoint: Checkpoint):
    """A checkpoint that stores its stacks joined, as some are published, keeps doing so."""
    meta = meta_model(read_config(checkpoint("qwen3_moe")))
    apart = {
        name for group in Layout(meta, read_headers(checkpoint("qwen3_moe"))).groups for name in group.disk
    }
    joined = {name for group in Layout(meta, meta.state_dict()).groups for name in group.disk}
    assert "model.layers.0.mlp.experts.7.up_proj.weight" in apart
    assert joined == meta.state_dict().keys()
