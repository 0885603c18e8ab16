"""The plan that wins fits, is not refused by the commands, and leaves alone what was settled."""

from dataclasses import replace
from itertools import product

import pytest

from moesmith.errors import UserError
from moesmith.plan.choose import Budget, Planned, _too_large, best, choices, fits, plan_of, ranked, words
from moesmith.plan.footprint import Choice, Footprint, Work, footprint
from moesmith.plan.machine import assumed
from moesmith.plan.shape import Shape
from moesmith.plan.times import Times
from shapes import shape

TRAIN = Work("train", seq=64, batch=6, lora_r=4)
DECODE = Work("decode", seq=32, lora_targets=(), context=128)
RAM = 64_000_000_000


@pytest.fixture(scope="module")
def olmoe():
    return shape("olmoe")


def gpu(nbytes: float, ram: int = RAM, disk: bool = True) -> Budget:
    return Budget(int(nbytes), ram, disk, True)


def plan(olmoe, work, budget, **fixed):
    return best(olmoe, work, budget, assumed(budget.on_gpu), fixed)


@pytest.mark.parametrize("work", [TRAIN, DECODE], ids=["train", "decode"])
def test_where_everything_fits_everything_is_resident(olmoe, work):
    won = plan(olmoe, work, gpu(24e9))
    assert won.choice.homes == "device" and not won.choice.double_quant
    assert "everything fits" in won.why


@pytest.mark.parametrize("work", [TRAIN, DECODE], ids=["train", "decode"])
def test_in_less_memory_the_experts_leave_and_the_room_is_filled(olmoe, work):
    settled = {"scheme": "nf4", "double_quant": True, "linears": None}
    if work.kind == "train":
        settled |= {"checkpointing": True, "optim": "adamw_torch", "batch_size": 1}
    need, resident = (
        footprint(olmoe, work, Choice(**settled, homes=home, slots=1), True).peak
        for home in ("ram", "device")
    )
    budget = gpu((need + 0.7 * (resident - need)) / 0.95)
    won = plan(olmoe, work, budget, **settled)
    assert won.choice.homes == "ram"
    assert fits(won.footprint, budget)
    more = won.choice.kept if work.kind == "train" else won.choice.cache
    assert more > 0, "what is left over holds experts"


def test_every_plan_fits_and_none_trains_offloaded_without_checkpointing(olmoe):
    budget = gpu(0.9e9)
    for planned in ranked(olmoe, TRAIN, budget, assumed(True)):
        assert fits(planned.footprint, budget)
        assert planned.choice.checkpointing or not planned.choice.offloaded
        assert planned.choice.batch_size * planned.choice.grad_accum == TRAIN.batch


def test_what_is_settled_stays(olmoe):
    fixed = {"scheme": "int8", "homes": "disk", "batch_size": 2, "grad_accum": 3, "slots": 1}
    won = plan(olmoe, TRAIN, gpu(24e9), **fixed)
    assert {name: getattr(won.choice, name) for name in fixed} == fixed
    with pytest.raises(UserError, match="colour is nothing"):
        plan(olmoe, TRAIN, gpu(24e9), colour="red")


def test_a_model_packed_on_disk_is_planned_as_it_is_packed(olmoe):
    packed = {"scheme": "nf4", "double_quant": True, "linears": None, "blocksize": 64}
    shape = Shape.of(dict(olmoe.config), packed)
    for planned in ranked(shape, DECODE, gpu(24e9), assumed(True)):
        assert (planned.choice.scheme, planned.choice.double_quant, planned.choice.linears) == (
            "nf4",
            True,
            None,
        )


def test_when_nothing_fits_the_smallest_need_is_said(olmoe):
    with pytest.raises(UserError, match="of GPU memory at least, there is 100 MB") as error:
        plan(olmoe, TRAIN, gpu(100e6))
    assert "most of it is" in error.value.hint
    with pytest.raises(UserError, match="of RAM, there is 1.0 MB"):
        plan(olmoe, DECODE, gpu(24e9, ram=1_000_000))


def test_without_a_disk_nothing_lies_on_it(olmoe):
    budget = Budget(RAM, RAM, disk=False)
    assert {p.choice.homes for p in ranked(olmoe, DECODE, budget, assumed(False))} == {"device"}


def test_the_reason_names_what_the_next_better_one_needs(olmoe):
    settled = {"scheme": "nf4", "double_quant": True, "linears": None}
    need = footprint(olmoe, DECODE, Choice(double_quant=True, homes="ram", slots=1), True).peak
    won = plan(olmoe, DECODE, gpu(need / 0.95 + 100), **settled)
    assert won.choice.homes == "ram"
    assert "of GPU memory:" in won.why and "times as fast" in won.why


def test_words_name_storage_and_place(olmoe):
    choice = Choice(double_quant=True, homes="disk", cache=3)
    assert words(choice, olmoe) == "nf4 + double quant · experts on disk, 3 of each layer cached"


def test_on_a_gpu_experts_move_only_where_the_same_storage_does_not_fit_as_a_whole(olmoe):
    for nbytes in (0.8e9, 0.9e9, 1.2e9, 24e9):
        kinds = {True: set(), False: set()}
        for planned in ranked(olmoe, TRAIN, gpu(nbytes), assumed(True)):
            c = planned.choice
            kinds[c.offloaded].add((c.scheme, c.double_quant, c.linears))
        assert not kinds[True] & kinds[False]
    assert {p.choice.homes for p in ranked(olmoe, DECODE, gpu(24e9), assumed(True))} == {"device"}


def test_resident_is_never_slower_than_the_same_offloaded(olmoe):
    for work, on_gpu in product((TRAIN, DECODE), (True, False)):
        budget = Budget(RAM, RAM, True, on_gpu)
        for choice in choices(olmoe, work, budget, {"homes": "disk", "checkpointing": True}):
            here = replace(choice, homes="device", layer_major=False, slots=2)
            resident, offloaded = (plan_of(olmoe, work, c, budget, assumed(on_gpu)) for c in (here, choice))
            assert resident.times.seconds <= offloaded.times.seconds


def test_an_optimizer_in_8_bits_comes_before_experts_that_move(olmoe):
    plain, eight = (
        footprint(olmoe, TRAIN, Choice(optim=optim, batch_size=1, grad_accum=6), True).peak
        for optim in ("adamw_torch", "paged_adamw_8bit")
    )
    settled = {
        "scheme": "nf4",
        "double_quant": False,
        "linears": None,
        "checkpointing": True,
        "batch_size": 1,
    }
    won = plan(olmoe, TRAIN, gpu((plain + eight) / 2 / 0.95), **settled)
    assert (won.choice.homes, won.choice.optim) == ("device", "paged_adamw_8bit")


def test_a_packed_model_is_not_planned_as_something_else(olmoe):
    packed = Shape.of(dict(olmoe.config), {"scheme": "nf4", "double_quant": None, "blocksize": 64})
    for name, value in (("scheme", "int8"), ("linears", "nf4"), ("double_quant", True), ("blocksize", 128)):
        with pytest.raises(UserError, match=f"the model is packed with {name}="):
            plan(packed, DECODE, gpu(24e9), **{name: value})
    assert plan(packed, DECODE, gpu(24e9), double_quant=False).choice.scheme == "nf4"


def test_what_lacks_ram_only_is_told_the_plan_that_needs_least_of_it(olmoe):
    def found(home: str, device: int, ram: int) -> Planned:
        taken = Footprint({"experts": device}, {"process": ram})
        return Planned(Choice(homes=home), taken, Times(1.0, 1.0, "link"))

    plans = [found("ram", 2_000, 9_000_000), found("disk", 3_000, 4_750_000), found("device", 10_000, 950)]
    error = _too_large(olmoe, TRAIN, Budget(5_000, 1_000, True, True), plans)
    assert error.message.startswith("needs 5.0 MB of RAM, there is 1")
    assert "on disk" in error.hint and "process, 4.8 MB" in error.hint
    error = _too_large(olmoe, TRAIN, Budget(1_000, 10**9, True, True), plans)
    assert error.message.startswith("needs 2"), "no card is that small: the smallest one counts"


def test_no_choice_trains_without_checkpointing_while_experts_are_away(olmoe):
    for budget in (gpu(24e9), Budget(RAM, RAM, True)):
        found = list(choices(olmoe, TRAIN, budget))
        assert any(c.offloaded for c in found) and any(not c.checkpointing for c in found)
        assert all(c.checkpointing for c in found if c.offloaded)


def test_words_say_how_a_step_is_made_where_it_is_unusual(olmoe):
    choice = Choice(checkpointing=False, layer_major=True, optim="paged_adamw_8bit")
    assert words(choice, olmoe, training=True) == "nf4 · no checkpointing · layer-major · paged_adamw_8bit"
    assert words(choice, olmoe) == "nf4"


def test_a_plan_fits_up_to_the_headroom_of_both_memories():
    budget = Budget(1_000, 1_000, True, True)
    assert fits(Footprint({"experts": 950}, {"process": 950}), budget)
    assert not fits(Footprint({"experts": 951}, {"process": 1}), budget)
    assert not fits(Footprint({"experts": 1}, {"process": 951}), budget)
    assert fits(Footprint({"experts": 950}, {"process": 951}), Budget(1_000, 1_000)), "on a CPU it is one"
