"""Where experts go: flags that contradict each other, what a model does not allow, a profile, a plan."""

import types

import pytest
import torch

import profiles
import tiny
from moesmith.errors import UserError
from moesmith.experts.quantizer import ExpertsConfig
from moesmith.experts.residency.attach import packed_experts
from moesmith.jobs import _experts_place as room
from moesmith.jobs._experts_place import Place, PlaceFlags, check_place, decode_work, settle
from moesmith.models.checkpoint import Checkpoint
from moesmith.plan import choose
from moesmith.plan.footprint import Choice


@pytest.fixture(scope="module")
def model(checkpoint):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        checkpoint("olmoe"), quantization_config=ExpertsConfig("nf4"), dtype=torch.bfloat16
    )


@pytest.fixture(scope="module")
def packed(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    model.save_pretrained(folder)
    return Checkpoint.open(folder)


@pytest.fixture(scope="module")
def plain(checkpoint):
    return Checkpoint.open(checkpoint("olmoe"))


@pytest.fixture
def asked(monkeypatch):
    """What the planner was asked; it answers with `asked.choice`."""
    seen = types.SimpleNamespace(choice=Choice(homes="disk", kept=3, cache=5, slots=1, double_quant=True))

    def best(shape, work, budget, machine=None, fixed=None):
        seen.shape, seen.work, seen.budget, seen.fixed = shape, work, budget, fixed
        times = types.SimpleNamespace(seconds=0.1)
        return types.SimpleNamespace(
            choice=seen.choice, footprint=choose.Footprint({"experts": 7 * 10**9}), times=times,
            why="the fastest", facts=lambda: {"why": "the fastest"},
        )  # fmt: skip

    monkeypatch.setattr(choose, "best", best)
    return seen


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"kept": -1}, "--kept -1"),
        ({"cache": -1, "experts": "ram"}, "--cache -1"),
        ({"vram": "12GB"}, "--vram is what --fit auto plans with"),
        ({"ram": "12GB", "experts": "disk"}, "--ram is what --fit auto plans with"),
        ({"kept": 4}, "--kept is about experts that do not lie on the device"),
        ({"experts": "device", "transfers": "t", "fit": "auto"}, "--transfers is about"),
        ({"cold_on_cpu": True}, "--cold-on-cpu is about"),
        ({"experts": "ram", "hot": "nowhere", "kept": 2}, "no such file"),
        ({"experts": "ram", "hot": "nowhere"}, "--hot says which experts are kept"),
        ({"fit": "auto", "ram": "lots"}, "lots"),
    ],
)
def test_flags_that_cannot_be_are_refused(flags, words):
    with pytest.raises(UserError, match=words):
        check_place(PlaceFlags(**flags))


@pytest.mark.parametrize(
    "flags",
    [
        {},
        {"experts": "ram", "kept": 4, "cache": 0},
        {"experts": "disk", "transfers": "t"},
        {"fit": "auto", "kept": 4, "ram": "12GB", "vram": "8GB"},
    ],
)
def test_flags_that_go_together_are_taken(flags):
    check_place(PlaceFlags(**flags))


def test_without_flags_experts_lie_on_the_device(packed, plain):
    for checkpoint in (packed, plain):
        place = settle(PlaceFlags(), checkpoint, None)
        assert place == Place() and not place.offloaded
    assert Place(("device", "disk")).offloaded and not Place(("device", "device")).offloaded


def test_what_a_model_does_not_allow(packed, plain):
    with pytest.raises(UserError, match="not packed there") as error:
        settle(PlaceFlags(experts="disk"), plain, None)
    assert f"moesmith quantize {plain.name}" in error.value.hint
    assert settle(PlaceFlags(experts="ram"), plain, None).homes == "ram"
    assert settle(PlaceFlags(experts="disk"), packed, None).homes == "disk"
    with pytest.raises(UserError, match="--scheme none"):
        settle(PlaceFlags(experts="ram"), plain, None, scheme="none")
    dense = types.SimpleNamespace(name="m", quantization=None, is_packed=False, tensors={"mlp.w": None})
    with pytest.raises(UserError, match="has no experts"):
        settle(PlaceFlags(experts="ram"), dense, None)
    other = types.SimpleNamespace(
        name="m", quantization={"quant_method": "gptq"}, is_packed=False, tensors={"mlp.experts.w": None}
    )
    for flags in (PlaceFlags(experts="ram"), PlaceFlags(fit="auto")):
        with pytest.raises(UserError, match="quantised by"):
            settle(flags, other, None, work="any")


def test_a_page_of_nothing_is_not_promised(asked, packed, capsys):
    asked.choice = Choice()
    settle(PlaceFlags(fit="auto", transfers="t"), packed, None, decode_work(packed, [], "auto", 64))
    assert "no page is written" in capsys.readouterr().err


# ---------------------------------------------------------------- a profile


def profile_of(model, tokens):
    made = profiles.profile(tokens)
    for stats, (name, _) in zip(made.layers, packed_experts(model), strict=True):
        stats.name = name
    return made


def test_the_hottest_experts_are_those_with_most_tokens_layer_by_layer(model, tmp_path):
    tokens = torch.randint(
        1, 90, (tiny.LAYERS, 6, tiny.NUM_EXPERTS), generator=torch.Generator().manual_seed(0)
    )
    profile_of(model, tokens).write(tmp_path)
    found = room.hottest(tmp_path, model)
    wanted = tokens.sum(1).argsort(descending=True, stable=True).tolist()
    assert found == dict(enumerate(wanted)) and wanted[0] != wanted[1]


def test_the_hottest_are_found_under_an_adapter(model, tmp_path):
    from peft import LoraConfig, get_peft_model

    tokens = torch.randint(1, 90, (tiny.LAYERS, 6, tiny.NUM_EXPERTS))
    profile_of(model, tokens).write(tmp_path)
    before = room.hottest(tmp_path, model)
    lora = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    adapted = get_peft_model(model, lora)
    try:
        assert room.hottest(tmp_path, adapted) == before
        assert room.default_cache(adapted) == 2 * tiny.TOP_K
    finally:
        adapted.unload()


def test_a_profile_of_another_model_is_refused(model, tmp_path):
    elsewhere = profiles.random_profile(tiny.LAYERS, experts=tiny.NUM_EXPERTS)
    for stats in elsewhere.layers:
        stats.name = f"decoder.{stats.name}"
    elsewhere.write(tmp_path / "names")
    with pytest.raises(UserError, match="of another model"):
        room.hottest(tmp_path / "names", model)
    profile_of(model, torch.ones(tiny.LAYERS, 6, 2 * tiny.NUM_EXPERTS)).write(tmp_path / "sizes")
    with pytest.raises(UserError, match="16 experts"):
        room.hottest(tmp_path / "sizes", model)


# ---------------------------------------------------------------- the planner


def test_a_plan_is_taken_as_it_is_and_said(asked, packed, capsys):
    work = decode_work(packed, [], "auto", 300)
    place = settle(PlaceFlags(fit="auto", ram="24GB"), packed, None, work)
    assert (place.homes, place.kept, place.cache, place.slots) == ("disk", 3, 5, 1)
    assert place.packing is None, "it is packed on disk already"
    assert (asked.budget.ram_bytes, asked.budget.disk, asked.budget.on_gpu) == (24 * 10**9, True, False)
    assert (asked.work.kind, asked.work.context, asked.work.streams) == ("decode", 300, 1)
    assert asked.shape.packed_on_disk and place.plan["why"] == "the fastest"
    said = capsys.readouterr().err
    assert "plan     peak 7.0 GB of 24.0 GB: experts 7.0 GB" in said and "experts on disk" in said


def test_what_is_settled_is_not_planned(asked, packed, plain):
    work = decode_work(packed, [], "auto", None)
    settle(PlaceFlags(fit="auto", experts="disk", cache=4), packed, None, work)
    assert (asked.fixed["homes"], asked.fixed["cache"]) == ("disk", 4) and "kept" not in asked.fixed
    assert (asked.fixed["scheme"], asked.fixed["double_quant"]) == ("nf4", False), "as it lies on disk"

    asked.choice = Choice(homes="device", scheme="fp4")
    settle(PlaceFlags(fit="auto"), plain, None, work)
    assert asked.fixed == {} and not asked.budget.disk
    base = {"scheme": "fp4", "double_quant": True, "blocksize": 128, "linears": None, "path": "x"}
    settle(PlaceFlags(fit="auto"), plain, base, work)
    assert asked.fixed == {"scheme": "fp4", "double_quant": True, "blocksize": 128, "linears": None}
    settle(PlaceFlags(fit="auto"), plain, None, work, scheme="int8")
    assert asked.fixed == {"scheme": "int8"}


def test_a_model_that_is_not_packed_is_packed_as_planned(asked, plain):
    asked.choice = Choice(homes="ram", scheme="nf4", double_quant=True, blocksize=64, linears="int8")
    place = settle(PlaceFlags(fit="auto"), plain, None, decode_work(plain, [], "auto", None))
    assert place.packing == {"scheme": "nf4", "double_quant": True, "blocksize": 64, "linears": "int8"}


def test_a_gpu_that_is_not_there_has_no_memory(packed):
    with pytest.raises(UserError, match="no GPU"):
        settle(PlaceFlags(fit="auto", vram="8GB"), packed, None, decode_work(packed, [], "auto", None))


def test_nothing_fits_into_a_megabyte(packed):
    with pytest.raises(UserError, match="needs"):
        settle(PlaceFlags(fit="auto", ram="1MB"), packed, None, decode_work(packed, [], "auto", None))


def test_the_planner_hears_of_adapters_and_answers_at_once(plain, tmp_path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(3, 5), "b": torch.zeros(7)}, tmp_path / "adapter_model.safetensors")
    work = decode_work(plain, [tmp_path, tmp_path], "bfloat16", None, streams=6)
    assert (work.kind, work.streams, work.trained, work.adapter_dtype) == ("serve", 6, 44, "float32")
    assert (work.dtype, work.context, work.seq) == ("bfloat16", 256, 256)
