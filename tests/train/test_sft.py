"""A whole run on a tiny model: what it leaves, that it can be stopped anywhere, what it refuses."""

import json
import math
import os
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import TrainerCallback

import tiny
from chats import chat, sums, tokenizer
from moesmith.data.masks import Example
from moesmith.data.prepare import DataConfig, to_examples
from moesmith.data.rows import Row
from moesmith.errors import UserError
from moesmith.train import sft as journey
from moesmith.train.adapters import attach
from moesmith.train.settings import LoraSettings, RunSettings, TrainSettings
from moesmith.train.sft import run_sft
from moesmith.train.trainer import NonFinite, Trainer

TOKENIZER = tokenizer()


def examples(n: int, start: int = 0) -> list[Example]:
    rows = [Row(i, row) for i, row in enumerate(sums(start + n)[start:], start + 1)]
    return to_examples(rows, TOKENIZER, DataConfig(path="rows"))[0]


def model():
    return tiny.build("olmoe")


def settings(out, lora=None, **train) -> RunSettings:
    options = {"max_steps": 6, "batch_size": 2, "grad_accum": 2, "lr": 3e-3, "warmup": 0, "dtype": "float32"}
    options |= {"eval_steps": 2, "save_steps": 2, "gradient_checkpointing": False} | train
    lora = lora or LoraSettings(r=4, alpha=8, targets=["attention"])
    return RunSettings(out=str(out), lora=lora, train=TrainSettings(**options))


def run(out, train=None, held_out=None, cfg=None, resume=False, **options):
    cfg = (cfg or settings(out)).model_copy(update={"resume": resume})
    train = examples(30) if train is None else train
    held_out = examples(4, start=40) if held_out is None else held_out
    return run_sft(model(), TOKENIZER, train, held_out, cfg, quiet=True, **options)


def log(out):
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def losses(out):
    """(step, kind) -> value; times are left out."""
    found = {}
    for entry in log(out):
        for key in ("loss", "grad_norm", "learning_rate", "eval_loss"):
            if key in entry:
                found[entry["step"], key] = entry[key]
    return found


class At(TrainerCallback):
    """Calls something after a step."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.action()


def at(monkeypatch, step, action):
    """Every trainer made from now on calls `action` after `step`."""
    make = journey.Session._trainer

    def with_callback(self, *args, **kwargs):
        made = make(self, *args, **kwargs)
        made[0].callback_handler.callbacks.insert(0, At(step, action))
        return made

    monkeypatch.setattr(journey.Session, "_trainer", with_callback)


# ---------------------------------------------------------------- what a run leaves


def test_a_run_learns_and_leaves_everything(tmp_path):
    result = run(tmp_path / "out")
    out = tmp_path / "out"
    assert result.finished and result.steps == 6
    assert result.last_eval_loss < result.first_eval_loss
    evaluations = [e["eval_loss"] for e in log(out) if "eval_loss" in e]
    assert len(evaluations) == 4  # before, 2, 4, 6
    assert result.best_eval_loss == min(evaluations[1:])
    assert {p.name for p in out.iterdir()} == {
        "best", "last", "checkpoints", "config.yaml", "data.json", "log.jsonl", "result.json",
    }  # fmt: skip
    assert [e["step"] for e in log(out) if "loss" in e] == [1, 2, 3, 4, 5, 6]
    assert {p.name for p in (out / "checkpoints").iterdir()} == {"checkpoint-4", "checkpoint-6"}
    record = json.loads((out / "best" / "moesmith.json").read_text())
    assert record["eval_loss"] == result.best_eval_loss and len(record["base"]["fingerprint"]) == 32
    assert (out / "best" / "chat_template.jinja").exists()
    assert json.loads((out / "data.json").read_text())["train"] == 30
    assert result.tokens == sum(e["num_tokens"] for e in log(out) if e.get("step") == 6 and "loss" in e)


def test_the_saved_adapter_gives_the_loss_that_was_logged(tmp_path):
    result = run(tmp_path / "out")
    again = PeftModel.from_pretrained(model(), result.last).eval()
    assert not result.model.training
    total = tokens = 0.0
    for example in examples(4, start=40):
        ids = torch.as_tensor(example.input_ids, dtype=torch.long)[None]
        labels = torch.as_tensor(example.labels, dtype=torch.long)
        with torch.no_grad():
            logits = again(input_ids=ids, use_cache=False).logits[0, :-1]
        total += torch.nn.functional.cross_entropy(
            logits, labels[1:], ignore_index=-100, reduction="sum"
        ).item()
        tokens += example.learned
    assert total / tokens == pytest.approx(result.last_eval_loss, rel=1e-5)


def test_without_held_out_rows_there_is_only_a_last_adapter(tmp_path):
    result = run(tmp_path / "out", held_out=[])
    assert result.best is None and result.best_eval_loss is None
    assert not (tmp_path / "out" / "best").exists()


def test_best_is_kept_when_the_loss_rises_again_and_early_stop_ends_the_run(tmp_path):
    # The held-out rows answer what no training row answers, so learning soon stops helping them.
    cfg = settings(tmp_path / "out", lr=3e-2, max_steps=20, eval_steps=1, early_stop=3)
    result = run(tmp_path / "out", held_out=uneven()[4:], cfg=cfg)
    assert result.stopped == "early stop" and result.finished
    assert result.steps == result.best_step + 3
    assert result.best_eval_loss < result.last_eval_loss
    best, last = (load_file(f / "adapter_model.safetensors") for f in (result.best, result.last))
    assert any(not torch.equal(best[name], last[name]) for name in best)


def test_training_goes_on_from_a_saved_adapter(tmp_path):
    first = run(tmp_path / "a")
    adapter = PeftModel.from_pretrained(model(), first.last, is_trainable=True)
    cfg = settings(tmp_path / "b")
    second = run_sft(adapter, TOKENIZER, examples(30), examples(4, start=40), cfg, quiet=True)
    assert second.first_eval_loss == pytest.approx(first.last_eval_loss, rel=1e-5)
    assert second.last_eval_loss < first.last_eval_loss


def test_tensorboard(tmp_path):
    run(tmp_path / "out", cfg=settings(tmp_path / "out", loggers=["tensorboard"], max_steps=1))
    assert list((tmp_path / "out" / "tensorboard").iterdir())


def test_a_logger_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(journey, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="trackio, which is not installed") as error:
        run(tmp_path / "out", cfg=settings(tmp_path / "out", loggers=["trackio"]))
    assert error.value.hint == "pip install trackio"


# ---------------------------------------------------------------- what the loss is


def one_step(out, train, **options):
    options = {"max_steps": 1, "max_grad_norm": 0, "warmup": 0} | options
    pack_to = options.pop("pack_to", None)
    result = run(out, train=train, held_out=[], cfg=settings(out, **options), pack_to=pack_to)
    return log(out)[0], load_file(result.last / "adapter_model.safetensors")


def uneven():
    rows = [Row(i, {"messages": chat(f"{i}?", "x" * (3 * i + 1))}) for i in range(8)]
    return to_examples(rows, TOKENIZER, DataConfig(path="rows"))[0]


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


# ---------------------------------------------------------------- stopping and going on


@pytest.mark.parametrize("packed", [False, True])
def test_a_stopped_run_continues_to_the_same_losses(tmp_path, monkeypatch, packed):
    pack_to = 60 if packed else None
    cfg = settings(tmp_path / "whole", epochs=2, max_steps=None, save_steps=1)
    whole = run(tmp_path / "whole", train=examples(14), cfg=cfg, pack_to=pack_to)
    cfg = cfg.model_copy(update={"out": str(tmp_path / "parts")})
    stops = (1, whole.steps // 2, whole.steps - 1)  # the second is the end of an epoch
    assert len(set(stops)) == 3
    for step in stops:
        with monkeypatch.context() as patch:
            at(patch, step, lambda: os.kill(os.getpid(), signal.SIGINT))
            part = run(
                tmp_path / "parts", train=examples(14), cfg=cfg, resume=step != stops[0], pack_to=pack_to
            )
        assert part.stopped == "interrupted" and not part.finished and part.steps == step
        assert not (tmp_path / "parts" / "result.json").exists()
    parts = run(tmp_path / "parts", train=examples(14), cfg=cfg, resume=True, pack_to=pack_to)
    assert parts.finished and parts.steps == whole.steps
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert (parts.tokens, parts.best_step, parts.best_eval_loss) == (
        whole.tokens,
        whole.best_step,
        whole.best_eval_loss,
    )
    for name in ("best", "last"):
        a, b = (
            load_file(tmp_path / run_ / name / "adapter_model.safetensors") for run_ in ("whole", "parts")
        )
        assert all(torch.equal(a[key], b[key]) for key in a)


class Killed(BaseException):
    """What SIGKILL leaves: nothing after it runs."""


def kill():
    raise Killed


@pytest.mark.parametrize("where", ["_save_optimizer_and_scheduler", "_save_rng_state"])
def test_a_run_killed_while_saving_resumes_from_the_checkpoint_before(tmp_path, monkeypatch, where):
    whole = run(tmp_path / "whole")
    calls = []

    def die(self, *args):
        calls.append(where)
        if self._save_into is not None and self.state.global_step == 4:
            raise Killed
        return original(self, *args)

    original = getattr(Trainer, where)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, where, die)
        with pytest.raises(Killed):
            run(tmp_path / "parts")
    assert calls
    assert [p.name for p in (tmp_path / "parts" / "checkpoints").glob("checkpoint-*")] == ["checkpoint-2"]
    (tmp_path / "parts" / "log.jsonl").open("a").write('{"step": 5, "lo')  # a line cut in two
    parts = run(tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    assert parts.last_eval_loss == whole.last_eval_loss
    assert not list((tmp_path / "parts").rglob("*.tmp"))


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path, monkeypatch):
    run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        at(patch, 1, kill)
        with pytest.raises(Killed):
            run(tmp_path / "parts")
    run(tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_run_killed_after_its_last_step_only_has_to_save(tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(journey.Session, "_finish", lambda *args: kill())
        with pytest.raises(Killed):
            run(tmp_path / "parts")
    parts = run(tmp_path / "parts", resume=True)
    assert parts.steps == whole.steps == 6
    assert parts.last_eval_loss == whole.last_eval_loss
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    a, b = (load_file(tmp_path / run_ / "last" / "adapter_model.safetensors") for run_ in ("whole", "parts"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_folder_is_not_written_into_by_accident(tmp_path):
    out = tmp_path / "out"
    run(out)
    with pytest.raises(UserError, match="holds a run already"):
        run(out)
    with pytest.raises(UserError, match="train.lr: was 0.003, is 0.1"):
        run(out, cfg=settings(out, lr=0.1), resume=True)
    with pytest.raises(UserError, match="its rows or their chat template have changed"):
        run(out, train=examples(29), resume=True)
    cfg = settings(out, max_steps=1).model_copy(update={"overwrite": True})
    assert run(out, cfg=cfg).steps == 1
    assert len(log(out)) == 3  # nothing of the first run is left
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="is not empty: thesis.tex"):
        run(tmp_path / "other")


# ---------------------------------------------------------------- not finite


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


# ---------------------------------------------------------------- adapters


def test_adapters_keep_their_float32_values_on_a_packed_model(tmp_path, checkpoint):
    from transformers import AutoModelForCausalLM

    from moesmith import ExpertsConfig

    def packed():
        config = ExpertsConfig("nf4")
        return AutoModelForCausalLM.from_pretrained(
            checkpoint("olmoe"), quantization_config=config, dtype=torch.bfloat16
        )

    both = LoraSettings(r=4, targets=["experts", "attention"])
    cfg = settings(tmp_path / "out", lora=both, dtype="bfloat16", max_steps=1)
    fresh = attach(packed(), cfg.lora, cfg.seed)
    expected = {n: p.detach().clone() for n, p in fresh.named_parameters() if p.requires_grad}
    elsewhere = cfg.model_copy(update={"out": str(tmp_path / "elsewhere")})
    session = journey.Session(packed(), TOKENIZER, examples(8), [], elsewhere, quiet=True)
    trainer, _, _ = session._trainer(journey.console.Bar("", None, None), first=True)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32
            assert torch.equal(parameter, expected[name]), name
    result = run_sft(packed(), TOKENIZER, examples(8), examples(2, start=40), cfg, quiet=True)
    assert result.last_eval_loss < result.first_eval_loss
    saved = load_file(result.last / "adapter_model.safetensors")
    assert {t.dtype for t in saved.values()} == {torch.float32}
    assert any("experts" in name for name in saved) and any("q_proj" in name for name in saved)


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


def test_placements_that_are_not_there_and_dropout_that_cannot_be(tmp_path):
    with pytest.raises(UserError, match="has no shared_experts"):
        run(tmp_path / "a", cfg=settings(tmp_path / "a", lora=LoraSettings(targets=["shared_experts"])))
    with pytest.raises(UserError, match="lora.dropout=0.1 is not possible"):
        run(tmp_path / "b", cfg=settings(tmp_path / "b", lora=LoraSettings(dropout=0.1)))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize(
    "targets", [["attention"], ["router"], ["experts"], ["router", "experts", "attention"]]
)
def test_any_mix_of_placements_trains_and_is_counted(tmp_path, targets):
    cfg = settings(tmp_path / "out", lora=LoraSettings(r=2, targets=targets), max_steps=2)
    session = journey.Session(model(), TOKENIZER, examples(8), examples(2, start=40), cfg, quiet=True)
    counts = session.plan.adapters
    assert set(counts.trainable) == set(targets)
    assert counts.total == sum(p.numel() for p in session.model.parameters() if p.requires_grad)
    before = {n: p.detach().clone() for n, p in session.model.named_parameters() if p.requires_grad}
    session.train()
    after = dict(session.model.named_parameters())
    assert all(not torch.equal(after[n], p) for n, p in before.items() if "lora_B" in n)


# ---------------------------------------------------------------- memory and fit


def test_out_of_memory_says_what_took_it_and_what_to_change(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(Trainer, "compute_loss", full)
    cfg = settings(tmp_path / "out", batch_size=4)
    with pytest.raises(UserError, match="out of .*memory .CUDA out of memory") as error:
        run(tmp_path / "out", cfg=cfg)
    assert error.value.hint.startswith("what takes it: experts ")
    monkeypatch.undo()
    session = journey.Session(model(), TOKENIZER, examples(8), [], settings(tmp_path / "b"), quiet=True)
    plan = session.plan.memory
    plan.activations, plan.logits = 4_000_000_000, 1_000_000_000
    ways = journey.memory.advice(plan, cfg.train, packing=False, linears_packed=True)
    assert ways[0].startswith("train.gradient_checkpointing=true") or ways[0].startswith("train.batch_size=1")


def test_other_errors_travel(tmp_path, monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Trainer, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(tmp_path / "out")


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ({"optim": "adamw_troch"}, "is no optimizer of transformers"),
        ({"optim": "paged_adamw_8bit"}, "needs a GPU"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has 8-bit optimizers")
def test_optimizers_that_cannot_run(tmp_path, option, said):
    with pytest.raises(UserError, match=said):
        run(tmp_path / "out", cfg=settings(tmp_path / "out", **option))


def test_a_balance_loss_that_the_architecture_does_not_have(tmp_path):
    cfg = settings(tmp_path / "out", router_aux_loss=0.1)
    with pytest.raises(UserError, match="glm4_moe has no load-balancing loss"):
        run_sft(tiny.build("glm4_moe"), TOKENIZER, examples(4), [], cfg, quiet=True)


def test_tokens_outside_the_models_vocabulary(tmp_path):
    bad = examples(3)
    bad[1].input_ids[0] = 4000
    with pytest.raises(UserError, match="token 4000, the model's vocabulary ends at 127"):
        run(tmp_path / "out", train=bad)
