"""Running out of memory says what took it."""

import pytest
import torch

from moesmith.errors import UserError
from moesmith.train import sft as journey
from moesmith.train.trainer import Trainer
from runs import TOKENIZER, examples, model, run, settings


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


def test_a_run_stops_before_the_system_kills_it(tmp_path, monkeypatch):
    monkeypatch.setattr(journey.memory, "almost_full", lambda: True)
    with pytest.raises(UserError, match="the machine's memory is almost full"):
        run(tmp_path / "out")


def test_other_errors_travel(tmp_path, monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(Trainer, "compute_loss", broken)
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        run(tmp_path / "out")
