"""What is counted from a config is what the real model, PEFT and the cache have."""

import pytest
import torch
from transformers import DynamicCache

import tiny
from moesmith.errors import UserError
from moesmith.models.layers import PLACEMENTS
from moesmith.train.adapters import attach, count_adapters
from moesmith.train.settings import LoraSettings
from shapes import shape

# per expert, fused, transposed with biases, dense layers first, a shared expert, two sets a layer
SOME = ("olmoe", "gemma4", "gpt_oss", "deepseek_v3", "qwen2_moe", "ernie4_5_vl_moe")


@pytest.mark.parametrize("family", SOME)
def test_parameters_are_those_of_the_real_model(family):
    assert shape(family).parameters == sum(p.numel() for p in tiny.build(family).parameters())


@pytest.mark.parametrize("family", SOME)
def test_an_adapter_has_the_parameters_that_peft_gives_it(family):
    counted = shape(family)
    targets = [place for place in PLACEMENTS if counted.lora.get(place)]
    model = attach(tiny.build(family), LoraSettings(r=3, targets=targets), seed=0)
    assert counted.lora_parameters(3, targets) == count_adapters(model, targets).trainable


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in tiny.FAMILIES if f not in SOME])
def test_an_adapter_on_the_experts_of_every_other_family(family):
    counted = shape(family)
    try:
        model = attach(tiny.build(family), LoraSettings(r=3, targets=["experts"]), seed=0)
    except UserError:  # PEFT could train it and not load it back
        return
    assert counted.lora_parameters(3, ["experts"]) == count_adapters(model, ["experts"]).trainable


def test_a_placement_that_is_not_there_is_refused():
    with pytest.raises(UserError, match="olmoe has no shared_experts"):
        shape("olmoe").lora_parameters(4, ["shared_experts"])


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "gemma3_moe_text"])
def test_the_cache_has_the_bytes_that_generation_keeps(family):
    model = tiny.build(family)
    tokens = 40  # more than the sliding window
    cache = DynamicCache(config=model.config)
    for token in range(tokens):
        ids = torch.tensor([[3 + token % 50]])
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    kept = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    width = cache.layers[0].keys.element_size()
    planned = shape(family).cache_bytes(tokens, width=width)
    assert kept <= planned <= 1.3 * kept  # a sliding layer keeps one token less than its window


def test_double_quantised_scales_take_less_and_16_bits_most():
    counted = shape("olmoe")
    sizes = [
        sum(counted.expert_bytes(scheme, double_quant))
        for scheme, double_quant in (("nf4", True), ("nf4", False), ("int8", False), ("bf16", False))
    ]
    assert sizes == sorted(sizes) and len(set(sizes)) == 4
