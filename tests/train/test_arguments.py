"""What a launcher's configuration and our options for several processes say to each other."""

import pytest

from moesmith.errors import UserError
from moesmith.train.arguments import check_settings, splits
from moesmith.train.settings import TrainSettings


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")


def refused(match, offloaded=False, **options):
    with pytest.raises(UserError, match=match):
        check_settings(TrainSettings(**options), None, offloaded)


def test_splitting_weights_in_two_ways_is_refused(two):
    refused("both split the same weights", sharding="fsdp2", expert_parallel=2)
    refused("both would place the same weights", offloaded=True, sharding="fsdp2")
    check_settings(TrainSettings(sharding="fsdp2"), None, False)


def test_layers_take_as_many_rows_in_every_process(two):
    refused("layer_major with train.grad_accum=3", layer_major=True, grad_accum=3)
    check_settings(TrainSettings(layer_major=True, grad_accum=4), None, False)


def test_accelerates_own_fsdp_is_sharding_too(two, monkeypatch):
    assert not splits(TrainSettings())
    assert splits(TrainSettings(sharding="fsdp2"))
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert splits(TrainSettings())
    refused("asks for FSDP, and experts.home", offloaded=True)
    refused("asks for FSDP, and train.expert_parallel", expert_parallel=2)
    check_settings(TrainSettings(), None, False)


def test_another_precision_or_engine_than_ours_is_refused(two, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_settings(TrainSettings(dtype="bfloat16"), None, False)
    refused("mixed_precision: bf16, and train.dtype is float32", dtype="float32")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    refused("mixed_precision: fp16", dtype="bfloat16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_settings(TrainSettings(dtype="bfloat16"), None, False)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    refused("asks for DeepSpeed")
