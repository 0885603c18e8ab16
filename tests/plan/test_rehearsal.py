"""Playing a step without memory books what a real step takes."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import tiny
from moesmith.plan.rehearsal import Ledger, Rehearsal, _extended, _repeats, rehearse
from moesmith.plan.shape import Shape
from moesmith.train.adapters import attach
from moesmith.train.settings import LoraSettings
from shapes import shape

MB = 1 << 20


def meta(*size: int) -> torch.Tensor:
    return torch.empty(*size, device="meta")


def test_the_ledger_books_a_tensor_until_nobody_holds_it():
    x = meta(MB // 4)
    ledger = Ledger()
    ledger.ignore(x)
    with ledger:
        a = x * 2
        view = a.view(-1, 4)
        assert ledger.live == MB, "a view is not a second tensor"
        b = a + 1
        assert ledger.live == 2 * MB
        del a
        assert ledger.live == 2 * MB, "the view holds it"
        del view
        assert ledger.live == MB
        b.add_(1)
        assert ledger.live == MB, "in place"
    assert ledger.peak >= 2 * MB


def test_what_autograd_keeps_is_live_until_backward():
    weight = nn.Parameter(meta(64, 64))
    weight.grad = meta(64, 64)
    x = meta(1024, 64)
    ledger = Ledger()
    for tensor in (weight, weight.grad, x):
        ledger.ignore(tensor)
    with ledger:
        loss = (x @ weight).exp().sum()  # keeps the exponentials
        kept = ledger.live
        assert kept >= 1024 * 64 * 4
        loss.backward()
        del loss
        assert ledger.live < kept // 10


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "gemma3_moe_text", "deepseek_v3", "qwen3_next"])
def test_checkpointing_leaves_less_and_more_tokens_leave_more(family):
    counted = shape(family)
    common = {"lora_r": 4, "lora_targets": ("experts", "attention")}
    plain = rehearse(counted, 128, False, **common)
    checkpointed = rehearse(counted, 128, True, **common)
    longer = rehearse(counted, 256, False, **common)
    prompt = rehearse(counted, 128, None)
    assert plain and checkpointed and longer and prompt, "every one of these can be played"
    assert prompt.between < checkpointed.between < plain.between < longer.between
    assert prompt.peak < checkpointed.peak < plain.peak < longer.peak


def test_what_the_real_model_keeps_for_backward_is_what_was_booked():
    """Against autograd's own hooks on the CPU: the tensors that are saved, each once."""
    model = attach(tiny.build("olmoe"), LoraSettings(r=4, targets=["attention"]), seed=0)
    own = {p.untyped_storage().data_ptr() for p in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no other takes its place
        return tensor

    model.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(input_ids=torch.arange(3, 99)[None], use_cache=False, logits_to_keep=1)
    real = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    played = rehearse(shape("olmoe"), 96, False, 4, ("attention",), "float32", "float32")
    assert played is not None
    assert 0.8 < played.between / real < 1.25


@pytest.mark.parametrize(
    ("family", "layers", "more"),
    [
        ("olmoe", 8, {}),
        ("gpt_oss", 10, {"layer_types": ["sliding_attention", "full_attention"] * 5}),
        pytest.param("deepseek_v3", 10, {}, marks=pytest.mark.slow),
        pytest.param(
            "qwen3_next", 20, {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 5},
            marks=pytest.mark.slow,
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("checkpointing", [True, False, None])
def test_layers_that_repeat_are_added_up_to_what_all_of_them_take(family, layers, more, checkpointing):
    config = {**shape(family).config, "num_hidden_layers": layers, **more}
    if not more:
        config.pop("layer_types", None)
        config.pop("mlp_layer_types", None)
    deep = Shape.of(config)
    assert _repeats(deep.kinds), "something repeats"
    how = {"lora_r": 4, "lora_targets": () if checkpointing is None else ("experts", "attention")}
    added = rehearse(deep, 128, checkpointing, **how)
    whole = rehearse(replace(deep, kinds=()), 128, checkpointing, **how)
    assert added and whole
    assert added.between == pytest.approx(whole.between, rel=1e-3)
    assert added.peak == pytest.approx(whole.peak, rel=1e-3)


def test_what_repeats_is_found_from_the_end():
    assert _repeats((1,) * 10) == [(2, 1)]
    assert _repeats((7, 1, 1, 1, 1, 1, 1, 1, 1, 1)) == [(2, 1)]
    assert _repeats((1, 1, 2) * 6) == [(3, 3)]
    assert _repeats((2, *(1, 1, 2) * 6)) == [(3, 3)] or _repeats((2, *(1, 1, 2) * 6)) == [(4, 3)]
    assert _repeats((1, 2, 3, 4, 5, 6, 7, 8)) == [] == _repeats(())
    assert _repeats((1, 1, 1, 1, 1, 1, 1, 1, 1, 2)) == [], "the last one is played too"


def test_a_peak_that_does_not_grow_evenly_is_not_added_up():
    deep = replace(shape("olmoe"), kinds=(1,) * 10)
    assert _extended(Rehearsal(10, 50), Rehearsal(20, 60), deep, 2, 1) == Rehearsal(90, 130)
    assert _extended(Rehearsal(10, 50), Rehearsal(20, 50), deep, 2, 1) is None, "one layer outweighs the rest"
