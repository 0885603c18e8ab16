"""Short training runs of a tiny model, for the tests of training."""

import json

from transformers import TrainerCallback

import tiny
from chats import chat, sums, tokenizer
from moesmith.data.masks import Example
from moesmith.data.prepare import DataConfig, to_examples
from moesmith.data.rows import Row
from moesmith.train import sft as journey
from moesmith.train.settings import LoraSettings, RunSettings, TrainSettings
from moesmith.train.sft import run_sft

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
                assert (entry["step"], key) not in found, "a value is logged twice"
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


def uneven() -> list[Example]:
    """Rows whose answers have 1 to 22 letters."""
    rows = [Row(i, {"messages": chat(f"{i}?", "x" * (3 * i + 1))}) for i in range(8)]
    return to_examples(rows, TOKENIZER, DataConfig(path="rows"))[0]
