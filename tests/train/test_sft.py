"""A whole run on a tiny model: what it leaves, and that it can be stopped anywhere."""

import json
import os
import signal

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

import tiny
from moesmith.errors import UserError
from moesmith.train import arguments
from moesmith.train import sft as journey
from moesmith.train.sft import run_sft
from moesmith.train.trainer import Trainer
from runs import TOKENIZER, at, examples, log, losses, model, run, settings, uneven


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
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="trackio, which is not installed") as error:
        run(tmp_path / "out", cfg=settings(tmp_path / "out", loggers=["trackio"]))
    assert error.value.hint == "pip install trackio"


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
