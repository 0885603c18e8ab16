"""Times move the way they must: what is moved less, hidden or faster takes less."""

from dataclasses import replace

from moesmith.plan.footprint import Choice, Work
from moesmith.plan.machine import assumed
from moesmith.plan.times import distinct, hit_rate, times
from shapes import shape

TRAIN = Work("train", seq=64, batch=8, lora_r=4)
DECODE = Work("decode", seq=32, lora_targets=(), context=128)
CARD = replace(assumed(True), link=1e6)  # a link so slow that it decides


def of(work, machine=CARD, spare=None, **choice):
    return times(shape("olmoe"), work, Choice(**choice), machine, spare)


def test_a_step_moves_every_layer_twice_per_forward_and_once_if_layer_major():
    layers = sum(shape("olmoe").expert_bytes("nf4"))
    assert of(TRAIN, homes="ram", grad_accum=8).moved == 16 * layers
    assert of(TRAIN, homes="ram", grad_accum=8, layer_major=True).moved == 2 * layers
    assert of(TRAIN, homes="ram", grad_accum=8, kept=4).moved == 8 * layers, "half of the experts stay"
    assert of(TRAIN, grad_accum=8).moved == 0


def test_two_slots_hide_the_copies_and_one_does_not():
    two, one = of(TRAIN, homes="ram"), of(TRAIN, homes="ram", slots=1)
    assert two.bound == one.bound == "link"
    assert one.seconds > two.seconds


def test_a_token_fetches_the_routed_experts_that_are_not_there():
    layers, top_k, experts = sum(shape("olmoe").expert_bytes("nf4")), 2, 8
    assert of(DECODE, homes="ram").moved == layers * top_k // experts
    assert of(DECODE, homes="ram", cache=4).moved < of(DECODE, homes="ram", cache=2).moved
    assert of(DECODE, homes="ram", cache=8).moved == 0


def test_on_a_cpu_only_what_the_page_cache_cannot_hold_is_read():
    cpu = assumed(False)
    total = sum(shape("olmoe").expert_bytes("nf4"))
    assert of(DECODE, cpu, spare=2 * total, homes="disk").moved == 0
    assert of(DECODE, cpu, spare=total // 2, homes="disk").moved > 0
    assert of(DECODE, cpu, homes="device").seconds < of(DECODE, cpu, spare=2 * total, homes="disk").seconds


def test_checkpointing_takes_a_third_pass():
    cpu = assumed(False)
    ratio = of(TRAIN, cpu, checkpointing=True).seconds / of(TRAIN, cpu, checkpointing=False).seconds
    assert abs(ratio - 1.5) < 0.01


def test_more_streams_reach_more_experts_but_never_more_than_there_are():
    layer = shape("olmoe").experts[0]
    reached = [distinct(layer, streams) for streams in (1, 2, 8, 1000)]
    assert reached[0] == layer.top_k and reached == sorted(reached) and reached[-1] <= layer.num_experts
    assert hit_rate(0, 8) == 0 and hit_rate(8, 8) == 1 and hit_rate(2, 8) > 2 / 8
