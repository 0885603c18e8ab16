"""The plan of a run is the planner's; running out of memory says what took it and what differed."""

import pytest
import torch

import tiny
from moesmith import ExpertsConfig, register
from moesmith.errors import UserError
from moesmith.plan.footprint import Choice, Work, footprint
from moesmith.plan.shape import Shape
from moesmith.train import memory
from moesmith.train import sft as journey
from moesmith.train.adapters import attach
from moesmith.train.settings import LoraSettings, TrainSettings
from moesmith.train.trainer import Trainer
from runs import TOKENIZER, examples, model, run, settings


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A folder with a packed checkpoint."""
    register()
    plain, folder = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("packed")
    tiny.build("qwen3_moe", dtype=torch.bfloat16).save_pretrained(plain)
    tiny.model_class("qwen3_moe").from_pretrained(
        plain, quantization_config=ExpertsConfig("nf4", double_quant=True), dtype=torch.bfloat16
    ).save_pretrained(folder)
    return folder


def test_the_plan_of_a_run_is_what_the_planner_says_of_its_checkpoint(packed):
    from moesmith.models.checkpoint import Checkpoint

    made = attach(
        tiny.model_class("qwen3_moe").from_pretrained(packed, dtype=torch.bfloat16), LoraSettings(r=4), 0
    )
    options = TrainSettings(batch_size=2, grad_accum=3)
    found = memory.plan(made, options, tokens=2 * 100, learned=2 * 30)
    work = Work("train", seq=100, batch=6, learned=30, lora_r=4)
    choice = Choice(scheme="nf4", double_quant=True, batch_size=2, grad_accum=3)
    planned = footprint(
        Shape.of_checkpoint(Checkpoint.open(packed)), work, choice, on_gpu=torch.cuda.is_available()
    )
    assert found.device == dict(planned.device)
    assert found.mapped == dict(planned.mapped)


def test_what_is_loaded_is_counted_part_by_part(packed):
    made = attach(
        tiny.model_class("qwen3_moe").from_pretrained(packed, dtype=torch.bfloat16), LoraSettings(r=4), 0
    )
    found = memory.plan(made, TrainSettings(), tokens=100, learned=30)
    assert sum(found.loaded.values()) == sum(p.nbytes for p in made.parameters())
    for part in ("experts", "dense", "embeddings"):
        assert found.loaded[part] == found.device[part]


def test_planned_against_measured_names_the_part_that_differed_most():
    plan = memory.MemoryPlan(
        device={"experts": 1000, "dense": 500, "adapters": 100, "activations": 400, "process": 50},
        loaded={"experts": 1500, "dense": 500, "adapters": 100},
    )
    lines = memory.compared(plan, peak=2600)
    assert lines[0] == "experts: planned 1.0 kB, measured 1.5 kB"
    assert "activations + process: planned 450 B, measured 500 B" in lines
    assert lines[-1] == "what differed most: experts, 500 B more than planned"
    plan.mapped = {"experts": 1000}
    plan.loaded["experts"] = 1000
    lines = memory.compared(plan, peak=1050)
    assert not any(line.startswith("experts") for line in lines)
    assert "activations + process: planned 450 B, measured 450 B" in lines
    assert "what differed" not in lines[-1]


def test_out_of_memory_says_what_took_it_and_what_to_change(tmp_path, monkeypatch):
    def full(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(Trainer, "compute_loss", full)
    cfg = settings(tmp_path / "out", batch_size=4)
    with pytest.raises(UserError, match="out of .*memory .CUDA out of memory") as error:
        run(tmp_path / "out", cfg=cfg)
    assert error.value.hint.startswith("planned: peak ")
    assert "\nexperts: planned " in error.value.hint
    monkeypatch.undo()
    session = journey.Session(model(), TOKENIZER, examples(8), [], settings(tmp_path / "b"), quiet=True)
    plan = session.plan.memory
    plan.device |= {"activations": 4_000_000_000, "logits": 1_000_000_000}
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
