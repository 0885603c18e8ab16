"""A layer-major step is the step: same loss, same gradients, and each layer is visited once each way."""

import itertools

import pytest
import torch
from torch import nn

import tiny
from moesmith.errors import UserError
from moesmith.models.layers import moe_layers, submodule
from moesmith.train import layer_major
from moesmith.train.settings import LoraSettings, TrainSettings
from runs import examples, losses, run, settings

FAST = ("olmoe", "gemma4", "gpt_oss", "qwen3_5_moe", "deepseek_v4")
ROWS, PART = 6, 2


def training(family):
    """A tiny model that trains with checkpointing, and nothing random in it."""
    model = tiny.build(family).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for layer in moe_layers(model):
        submodule(model, layer.router).eval()  # PhiMoE's draws lots while it trains
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def rows_of(model, batch=ROWS, length=24):
    """Rows of different lengths, padded on the right."""
    inputs = tiny.inputs(model, batch, length)
    for i in range(batch):
        inputs["attention_mask"][i, length - 3 * i :] = 0
    return inputs


def parts_of(inputs):
    return [{k: v[i : i + PART] for k, v in inputs.items()} for i in range(0, ROWS, PART)]


def step(model, batches):
    """Summed loss of all batches, and the gradients of their mean over tokens."""
    model.zero_grad()
    summed = 0.0
    total = sum(int(inputs["attention_mask"].sum()) for inputs in batches)
    for inputs in batches:
        logits = model(**inputs, use_cache=False).logits
        labels = inputs["input_ids"] % logits.shape[-1]
        labels = torch.where(inputs["attention_mask"].bool(), labels, -100)[:, -logits.shape[1] :]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
        (loss / total).backward()
        summed += loss.item()
    return summed, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=[] if f in FAST else [pytest.mark.slow]) for f in tiny.FAMILIES]
)
def test_a_step_has_the_loss_and_gradients_of_gradient_accumulation(family):
    model = training(family)
    inputs = rows_of(model)
    if "input_ids" not in inputs:
        pytest.skip("takes another model's states")
    loss, gradients = step(model, parts_of(inputs))
    with layer_major.in_slices(model, PART):
        ours, found = step(model, [inputs])
    assert ours == pytest.approx(loss, rel=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        near = 2e-5 * float(gradient.abs().max()) + 1e-7
        torch.testing.assert_close(
            found[name], gradient, rtol=2e-3, atol=near, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_keys_and_values_shared_between_layers_stay_with_their_slice():
    config = tiny.config("gemma4")
    text = config.text_config
    text.num_kv_shared_layers, text.layer_types = 1, ["sliding_attention", "full_attention", "full_attention"]
    torch.manual_seed(0)
    model = tiny.model_class("gemma4")(config)
    tiny._disturb(model, torch.Generator().manual_seed(0))
    model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    inputs = rows_of(model)
    loss, gradients = step(model, parts_of(inputs))
    with layer_major.in_slices(model, PART):
        ours, found = step(model, [inputs])
    assert ours == pytest.approx(loss, rel=1e-5)
    assert found.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-3, atol=2e-5 * float(gradient.abs().max()))


def test_a_run_has_the_losses_of_a_plain_run(tmp_path):
    """20 steps; the last one has fewer rows than the others."""

    def found(out, layer_major):
        lora = LoraSettings(r=4, alpha=8, targets=["attention", "experts"])
        cfg = settings(
            tmp_path / out, lora, max_steps=20, batch_size=2, grad_accum=2, lr=1e-3, eval_steps=10,
            gradient_checkpointing=True, layer_major=layer_major,
        )  # fmt: skip
        run(tmp_path / out, examples(27), cfg=cfg)
        return losses(tmp_path / out)

    plain, major = found("plain", False), found("major", True)
    assert plain.keys() == major.keys()
    for key, value in plain.items():
        assert major[key] == pytest.approx(value, rel=2e-4), key


def visits(model, batches):
    """Rows per visit of each layer's experts, in order, the recompute of backward included."""
    seen, hooks = [], []
    for i, layer in enumerate(moe_layers(model)):

        def note(module, args, i=i):
            seen.append((i, len(args[0])))

        hooks.append(submodule(model, layer.experts).register_forward_pre_hook(note))
    step(model, batches)
    for hook in hooks:
        hook.remove()
    return seen


def test_every_layer_is_visited_once_upwards_and_once_downwards():
    model = training("olmoe")
    inputs = rows_of(model)
    plain = [layer for layer, _ in itertools.groupby(i for i, _ in visits(model, parts_of(inputs)))]
    with layer_major.in_slices(model, PART):
        found = visits(model, [inputs])
    turns = [layer for layer, _ in itertools.groupby(i for i, _ in found)]
    assert turns == [0, 1, 2, 1, 0]
    assert plain == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1, 2, 1, 0]
    assert {rows for _, rows in found} == {PART * 24}
    assert len(found) == 2 * len(moe_layers(model)) * ROWS // PART


def test_rows_that_fit_into_a_slice_and_a_cache_go_the_usual_way():
    model = tiny.build("olmoe")
    inputs = tiny.inputs(model, 4, 16)
    expected = model(**inputs, use_cache=False).logits
    answer = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with layer_major.in_slices(model, 4):
        assert torch.equal(model(**inputs, use_cache=False).logits, expected)
    with layer_major.in_slices(model, 1):
        assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), answer)
        torch.testing.assert_close(model(**inputs, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_layers_are_what_they_were_afterwards():
    model = tiny.build("gemma4")
    before = {name: type(module) for name, module in model.named_modules()}
    names = [type(module).__name__ for module in model.modules()]
    with pytest.raises(ZeroDivisionError), layer_major.in_slices(model, 1):
        assert [type(module).__name__ for module in model.modules()] == names
        assert {name: type(module) for name, module in model.named_modules()} != before
        raise ZeroDivisionError
    assert {name: type(module) for name, module in model.named_modules()} == before
    assert not any("_layer_major" in vars(module) for module in model.modules())


def test_what_the_trainer_is_told():
    settings = TrainSettings(batch_size=2, grad_accum=8)
    assert layer_major.rows_and_passes(settings) == (2, 8)
    settings.layer_major = True
    assert layer_major.rows_and_passes(settings) == (16, 1)


def test_what_cannot_be_cut_into_rows_is_refused():
    settings = TrainSettings(layer_major=True)
    layer_major.check(settings, packing=False)
    with pytest.raises(UserError, match="packed sequences are one row"):
        layer_major.check(settings, packing=True)
    settings.gradient_checkpointing = False
    with pytest.raises(UserError, match="without gradient checkpointing"):
        layer_major.check(settings, packing=False)
    layer_major.check(TrainSettings(gradient_checkpointing=False), packing=True)
