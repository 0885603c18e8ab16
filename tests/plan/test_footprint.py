"""The parts of a footprint: counted ones are exact, the others move the way they must."""

import pytest

from moesmith.errors import UserError
from moesmith.plan.footprint import PARTS, Choice, Footprint, Work, footprint
from shapes import shape

TRAIN = Work("train", seq=64, batch=4, lora_r=4)
DECODE = Work("decode", seq=32, lora_targets=(), context=128)


def of(work=TRAIN, on_gpu=True, family="olmoe", **choice) -> Footprint:
    return footprint(shape(family), work, Choice(**choice), on_gpu)


def test_experts_adapters_and_optimizer_are_counted():
    counted = shape("olmoe")
    taken = of()
    trained = sum(counted.lora_parameters(4, TRAIN.lora_targets).values())
    assert taken.device["experts"] == sum(counted.expert_bytes("nf4"))
    assert taken.device["adapters"] == 4 * trained
    assert taken.device["gradients+optimizer"] == 12 * trained
    assert of(optim="paged_adamw_8bit").device["gradients+optimizer"] == 4 * trained
    assert of(optim="paged_adamw_8bit").ram["gradients+optimizer"] == 2 * trained


def test_experts_in_ram_leave_the_device_but_for_what_is_staged_and_kept():
    layers = shape("olmoe").expert_bytes("nf4")
    resident, away = of(), of(homes="ram")
    assert away.ram["experts"] == sum(layers)
    assert "experts" not in away.device
    assert away.device["staging"] == 2 * max(layers)
    assert of(homes="ram", slots=1).device["staging"] == max(layers)
    kept = of(homes="ram", kept=2)  # of 8
    assert kept.device["experts"] == sum(layers) // 4
    assert kept.device["staging"] == 2 * max(layers) * 3 // 4
    assert resident.device["dense"] == away.device["dense"]


def test_homes_are_one_per_layer_or_one_word():
    layers = shape("olmoe").expert_bytes("nf4")
    mixed = of(homes=("device", "ram", "disk"))
    assert mixed.device["experts"] == layers[0] and mixed.ram["experts"] == layers[1]
    with pytest.raises(UserError, match="2 homes for 3 MoE layers"):
        of(homes=("device", "ram"))


def test_on_a_cpu_what_is_packed_on_disk_is_mapped_and_not_anonymous():
    packed = {"scheme": "nf4", "quant_method": "moesmith"}
    from moesmith.plan.shape import Shape

    config = dict(shape("olmoe").config)
    mapped = footprint(Shape.of(config, packed), DECODE, Choice(), on_gpu=False)
    plain = footprint(Shape.of(config), DECODE, Choice(), on_gpu=False)
    assert mapped.peak == plain.peak
    weights = sum(mapped.device[part] for part in ("experts", "dense", "embeddings"))
    assert plain.anonymous - mapped.anonymous == weights
    on_disk = footprint(Shape.of(config, packed), DECODE, Choice(homes="disk"), on_gpu=False)
    assert on_disk.anonymous == mapped.anonymous and on_disk.peak < mapped.peak


def test_what_takes_less_takes_less():
    assert of(checkpointing=True).peak < of(checkpointing=False).peak
    assert of(batch_size=1).peak < of(batch_size=4).peak
    assert of(chunked_loss=True).peak <= of(chunked_loss=False).peak
    assert of(DECODE).peak < of(Work("decode", seq=32, lora_targets=(), context=4096)).peak
    pairs = Work("dpo", seq=64, batch=4, lora_r=4)
    assert of(TRAIN).peak < of(pairs).peak, "a pair is two rows"
    layer_major = of(grad_accum=4, layer_major=True)
    assert of(grad_accum=4).device["activations"] < layer_major.device["activations"]


def test_the_peak_is_the_sum_of_the_parts_in_their_order():
    taken = of()
    assert taken.peak == sum(n for _, n in taken.parts())
    assert [name for name, _ in taken.parts()] == [name for name in PARTS if taken.device.get(name)]
    assert taken.facts()["peak"] == taken.peak


def test_the_process_that_is_given_is_the_one_that_is_counted():
    shared = {"on_gpu": False, "process": 7_000_000_000}
    assert footprint(shape("olmoe"), TRAIN, Choice(), **shared).peak > 7_000_000_000
