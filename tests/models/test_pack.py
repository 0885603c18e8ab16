"""A checkpoint packed layer by layer holds the tensors of one packed in memory."""

import json

import pytest
import torch

from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.models.checkpoint import model_class, read_config
from moesmith.models.checksums import digest
from moesmith.models.headers import read_headers
from moesmith.models.pack import LayerPacker
from tiny import FAMILIES

FEW = ("olmoe", "gemma4", "gpt_oss", "qwen3_vl_moe", "nemotron_h")
REFUSED = ("diffusion_gemma",)  # encoder and decoder share their layers
SETTINGS = {"packed": {"linears": "nf4", "double_quant": True}, "kept": {"scheme": "fp8", "linears": "int8"}}


def tensors(folder):
    """name -> dtype, shape, bytes"""
    return {
        name: (h.dtype, h.shape, (folder / h.file).read_bytes()[h.start : h.end])
        for name, h in read_headers(folder).items()
    }


def roads(source, tmp_path, **settings):
    """The folder that save_pretrained writes, and ours."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    load = model_class(read_config(source)).from_pretrained
    config = ExpertsConfig(**settings)
    load(source, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}).save_pretrained(
        whole
    )
    parts.mkdir()
    packer = LayerPacker.start(source, ExpertsConfig(**settings), torch.bfloat16)
    written = list(packer.write(parts))
    assert written == packer.parts
    return whole, parts, packer


def check(source, tmp_path, **settings):
    whole, parts, packer = roads(source, tmp_path, **settings)
    assert tensors(whole) == tensors(parts)
    assert json.loads((whole / "config.json").read_text()) == json.loads((parts / "config.json").read_text())
    assert not [path.name for path in parts.iterdir() if path.name.startswith(".")]
    again = model_class(read_config(parts)).from_pretrained(parts)
    loaded = {n: digest(t) for n, t in again.state_dict().items() if isinstance(t, torch.Tensor)}
    tied = again.all_tied_weights_keys
    assert {n: s for n, s in loaded.items() if n in packer.sums or n not in tied} == packer.sums


@pytest.mark.parametrize("family", FEW)
def test_layer_by_layer_is_in_memory(family, checkpoint, tmp_path):
    check(checkpoint(family), tmp_path, **SETTINGS["packed"])


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in REFUSED])
def test_every_family(family, settings, checkpoint, tmp_path):
    check(checkpoint(family), tmp_path, **SETTINGS[settings])


def test_a_stack_that_stays_in_16_bits_goes_back_to_one_tensor_per_expert(checkpoint, tmp_path):
    source = checkpoint("olmoe")
    whole, parts, _ = roads(source, tmp_path, scheme="bf16")
    assert tensors(whole) == tensors(parts)


def test_one_layer_at_most_is_in_memory(checkpoint, tmp_path):
    packer = LayerPacker.start(checkpoint("olmoe"), ExpertsConfig("nf4"), torch.bfloat16)
    for _ in packer.write(tmp_path):
        held = [name for name, p in packer.model.named_parameters() if "layers" in name and not p.is_meta]
        assert held == []


def test_models_that_cannot_be_read_by_layers_are_refused(checkpoint):
    with pytest.raises(UserError, match="decoder layers in 2 stacks"):
        LayerPacker.start(checkpoint(REFUSED[0]), ExpertsConfig("nf4"), torch.bfloat16)


def test_weights_that_are_not_finite_are_refused(checkpoint, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    shutil.copytree(checkpoint("olmoe"), source)
    weights = load_file(source / "model.safetensors")
    name = next(n for n in weights if "layers.1" in n and "experts" in n)
    weights[name][0, 0] = float("inf")
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    packer = LayerPacker.start(source, ExpertsConfig("nf4"), torch.bfloat16)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="layers.1.*expert 0"):
        list(packer.write(tmp_path / "out"))
