"""The loss, and steps that are not finite."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from moesmith.errors import UserError
from moesmith.train import sft as journey
from moesmith.train.trainer import NonFinite, Trainer
from runs import log, run, settings, uneven


def one_step(out, train, **options):
    options = {"max_steps": 1, "max_grad_norm": 0, "warmup": 0} | options
    pack_to = options.pop("pack_to", None)
    result = run(out, train=train, held_out=[], cfg=settings(out, **options), pack_to=pack_to)
    return log(out)[0], load_file(result.last / "adapter_model.safetensors")


def test_every_learned_token_weighs_the_same_however_rows_are_batched(tmp_path):
    reference, weights = one_step(tmp_path / "a", uneven(), batch_size=8, grad_accum=1)
    for i, options in enumerate(
        ({"batch_size": 1, "grad_accum": 8}, {"batch_size": 2, "grad_accum": 4},
         {"batch_size": 1, "grad_accum": 8, "pack_to": 120},
         {"batch_size": 8, "grad_accum": 1, "pack_to": 120},
         {"batch_size": 2, "grad_accum": 4, "gradient_checkpointing": True}),
    ):  # fmt: skip
        logged, other = one_step(tmp_path / str(i), uneven(), **options)
        assert logged["loss"] == pytest.approx(reference["loss"], rel=1e-5), options
        assert logged["grad_norm"] == pytest.approx(reference["grad_norm"], rel=1e-3), options
        for name in weights:
            torch.testing.assert_close(other[name], weights[name], rtol=0, atol=2e-4)


def test_the_fused_loss_is_checked_against_the_models_own_logits(tmp_path, monkeypatch):
    summed = Trainer._summed_loss
    monkeypatch.setattr(
        Trainer, "_summed_loss", lambda self, *args: (summed(self, *args)[0] * 1.5, summed(self, *args)[1])
    )
    with pytest.raises(UserError, match="the chunked loss is"):
        run(tmp_path / "out")


def test_cosine_ends_at_its_floor_after_the_warm_up(tmp_path):
    run(
        tmp_path / "out",
        held_out=[],
        cfg=settings(tmp_path / "out", max_steps=10, warmup=2, lr=1e-3, min_lr_ratio=0.2),
    )
    rates = [entry["learning_rate"] for entry in log(tmp_path / "out")]
    assert rates[:2] == [5e-4, 1e-3]
    assert rates[-1] == pytest.approx(2e-4)
    assert rates[2:] == sorted(rates[2:], reverse=True)


def test_router_balance_loss_only_when_asked_for(tmp_path):
    run(tmp_path / "a", held_out=[], cfg=settings(tmp_path / "a", max_steps=1))
    run(tmp_path / "b", held_out=[], cfg=settings(tmp_path / "b", max_steps=1, router_aux_loss=0.1))
    without, with_it = log(tmp_path / "a")[0], log(tmp_path / "b")[0]
    assert "aux_loss" not in without
    assert with_it["loss"] == pytest.approx(without["loss"] + 0.1 * with_it["aux_loss"], rel=1e-4)


def poison(monkeypatch, rows, how):
    """Every batch with one of these rows gets a loss or a gradient that is not finite."""
    original = Trainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = original(self, model, inputs, *args, **kwargs)
        if set(rows) & set(inputs["rows"]) and self.model.training:
            if how == "loss":
                return loss * float("nan")
            parameter = next(p for p in self.model.parameters() if p.requires_grad)
            return loss + (parameter * 0).sum().sqrt() * 0  # its value is 0, its gradient 0 * inf
        return loss

    monkeypatch.setattr(Trainer, "compute_loss", compute_loss)


@pytest.mark.parametrize("how", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(tmp_path, monkeypatch, how):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, optimizer, **kwargs):
            adapter = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
            moments = [s["exp_avg"].clone() for s in optimizer.state.values()]
            seen.append((adapter.clone(), torch.cat([m.flatten() for m in moments]) if moments else None))

    make = journey.Session._trainer

    def with_watch(self, *args, **kwargs):
        made = make(self, *args, **kwargs)
        made[0].add_callback(Watch())
        return made

    monkeypatch.setattr(journey.Session, "_trainer", with_watch)
    poison(monkeypatch, [7], how)
    out = tmp_path / "out"
    result = run(out, cfg=settings(out, epochs=1, max_steps=None, grad_accum=3))
    skipped = [json.loads(line) for line in (out / "nonfinite.jsonl").read_text().splitlines()]
    assert len(skipped) == result.skipped == 1
    assert skipped[0]["not_finite"] == how
    assert 7 in skipped[0]["bad_rows"] and set(skipped[0]["bad_rows"]) <= set(skipped[0]["rows"])
    assert len(skipped[0]["rows"]) == 6
    assert len(skipped[0]["bad_rows"]) == (2 if how == "loss" else 6)
    step = skipped[0]["step"]
    assert 1 < step < result.steps
    before, after, later = seen[step - 2], seen[step - 1], seen[step]
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert torch.isfinite(later[0]).all() and not torch.equal(after[0], later[0])
    entries = {e["step"]: e for e in log(out) if "learning_rate" in e}
    assert "loss" not in entries[step] and entries[step]["skipped"] == 1
    assert all(math.isfinite(v) for e in log(out) for v in e.values())
    # the schedule counts the steps that were taken
    assert entries[step + 1]["learning_rate"] == pytest.approx(entries[step]["learning_rate"], rel=1e-6)
    assert entries[step + 1]["learning_rate"] < entries[step - 1]["learning_rate"]


def test_too_many_in_a_row_end_the_run(tmp_path, monkeypatch):
    poison(monkeypatch, range(100), "loss")
    out = tmp_path / "out"
    with pytest.raises(NonFinite, match="2 steps in a row had a loss that is not finite") as error:
        run(out, cfg=settings(out, max_nonfinite=2))
    assert "nonfinite.jsonl" in error.value.hint
    assert len((out / "nonfinite.jsonl").read_text().splitlines()) == 2


def test_a_finite_step_starts_the_count_again(tmp_path, monkeypatch):
    poison(monkeypatch, [2, 9, 21], "loss")
    out = tmp_path / "out"
    options = {
        "epochs": 1,
        "max_steps": None,
        "batch_size": 1,
        "grad_accum": 1,
        "eval_steps": 50,
        "save_steps": 50,
    }
    result = run(out, cfg=settings(out, max_nonfinite=3, **options))
    assert result.finished and result.skipped == 3


def test_an_adapter_that_gets_no_gradient_is_an_error(tmp_path, monkeypatch):
    make = journey.Session._trainer

    def cut(self, *args, **kwargs):
        made = make(self, *args, **kwargs)
        layer = next(m for n, m in self.model.named_modules() if n.endswith("layers.0.self_attn.q_proj"))
        layer.lora_B["default"].register_forward_hook(lambda module, args, output: output.detach())
        return made

    monkeypatch.setattr(journey.Session, "_trainer", cut)
    with pytest.raises(UserError, match="2 trainable tensors got no gradient.*q_proj"):
        run(tmp_path / "out")
