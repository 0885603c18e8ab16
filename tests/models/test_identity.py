"""A model is known by its hash, and its packed or cast copies by their routers."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from moesmith import ExpertsConfig
from moesmith.models.identity import model_hash, router_hash

# Routers with rows that belong to no expert, or two routers in one matrix on disk.
WITHOUT = {"ernie4_5_vl_moe", "inkling", "zaya"}


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name not in WITHOUT])
def test_every_family_has_routers_on_disk(family, checkpoint):
    assert router_hash(checkpoint(family), {tiny.NUM_EXPERTS})


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gemma4", "qwen3_next", "deepseek_v3", "gpt_oss"])
def test_a_packed_copy_has_the_same_routers_and_another_hash(family, checkpoint, tmp_path):
    load = tiny.model_class(family).from_pretrained
    packed = load(checkpoint(family), quantization_config=ExpertsConfig("nf4"), dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path)
    assert router_hash(tmp_path, {tiny.NUM_EXPERTS}) == router_hash(checkpoint(family), {tiny.NUM_EXPERTS})
    assert model_hash(tmp_path) != model_hash(checkpoint(family))


def test_another_seed_is_another_model(checkpoint, tmp_path):
    tiny.build("olmoe", seed=1).save_pretrained(tmp_path)
    assert router_hash(tmp_path, {8}) != router_hash(checkpoint("olmoe"), {8})


@pytest.mark.parametrize("name", ["mtp.layers.0.mlp.gate.weight", "model.layers.3.mlp.gate.weight"])
def test_routers_of_heads_that_are_not_loaded_do_not_count(name, checkpoint, tmp_path):
    model = tiny.build("olmoe")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({**load_file(file), name: torch.randn(8, 64)}, file, metadata={"format": "pt"})
    assert router_hash(tmp_path, {8}) == router_hash(checkpoint("olmoe"), {8})
    assert model_hash(tmp_path) != model_hash(checkpoint("olmoe"))


def test_matrices_that_happen_to_have_so_many_rows_do_not_count(checkpoint, tmp_path):
    model = tiny.build("olmoe")
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    more = {"model.layers.0.mlp.experts.0.gate_proj.weight2": torch.randn(8, 64)}
    save_file({**load_file(file), **more}, file, metadata={"format": "pt"})
    assert router_hash(tmp_path, {8}) == router_hash(checkpoint("olmoe"), {8})
