"""What every training run promises, whatever its loss is.

- A step with a loss or gradient that is not finite changes nothing: its whole accumulation window is dropped.
- A checkpoint folder is whole or has another name.
- Every trainable parameter gets a gradient, in the first step and after every evaluation.
- Only the positions whose next token is scored reach the output head, on a CPU too.
- Several processes do what one would do (`together.py`), and drop a step together.

Mixed into TRL's trainers: in `trainer.py` for the tokens of a text, in `preference_trainer.py` for pairs.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.trainer import OPTIMIZER_NAME

from moesmith import ranks
from moesmith.config import write_atomically
from moesmith.errors import UserError

from .folder import CHECKPOINT, RunFolder, replace_folder
from .together import Together, gathered

STATE = "moesmith_state.json"


@dataclass
class RunState:
    """What a run knows beyond transformers' own state; saved in every checkpoint."""

    best_loss: float = math.inf
    best_step: int = 0
    first_loss: float | None = None
    """held-out loss before the first step"""
    last_loss: float | None = None
    stale: int = 0
    """evaluations in a row without a better held-out loss"""
    skipped: int = 0
    """steps dropped because something was not finite"""
    skipped_in_row: int = 0
    tokens: int = 0
    """tokens trained on, context included, padding not"""
    seconds: float = 0.0
    """training time, all sessions together"""
    passes: dict[str, int] = field(default_factory=dict)
    """sequences that went through the model, by what for; counted where more than one model is asked"""


@dataclass
class Window:
    """The forward passes of one optimizer step, as they are taken."""

    metrics: dict[str, int]
    """length of each metric list before this window"""
    rows: list[int] = field(default_factory=list)
    bad_rows: list[int] = field(default_factory=list)
    tokens: int = 0


class NonFinite(UserError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class Careful(Together):
    """See the module's docstring. `folder` gets checkpoints and records; a batch names its rows."""

    def __init__(
        self, *args: Any, folder: RunFolder, max_nonfinite: int, keep_checkpoints: int, **kwargs: Any
    ):
        self.folder = folder
        self.max_nonfinite = max_nonfinite
        self.keep_checkpoints = keep_checkpoints
        self.run_state = RunState()
        self._window: Window | None = None
        self._learned: Tensor | None = None
        self._save_into: Path | None = None
        self._check_gradients = True
        self._watch: tuple[set[str], list[Any]] | None = None
        self._skipped_now = False
        super().__init__(*args, **kwargs)
        self._plain = self.accelerator.unwrap_model(self.model).get_base_model()
        self._hook = self._plain.base_model.register_forward_hook(self._keep_learned)

    def _send_telemetry(self) -> None:
        """A private training run tells nobody about itself."""

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No unfilled model card in every checkpoint."""

    def release(self) -> None:
        """Leave the model to others: evaluation mode, and no hook of ours on it."""
        self._hook.remove()
        self.model.eval()

    # --- the positions that are scored ---

    def _keep_learned(self, module: nn.Module, args: Any, output: Any) -> Any:
        """After the backbone: keep the hidden states (B, T, H) whose next token is learned, as (1, N, H)."""
        if self._learned is not None:
            hidden = output.last_hidden_state
            output.last_hidden_state = hidden.reshape(-1, hidden.shape[-1])[self._learned][None]
        return output

    @contextmanager
    def _only(self, learned: Tensor) -> Iterator[None]:
        """Within: only these of the batch's B*T positions reach the output head, (N,) indices."""
        self._learned = learned
        try:
            yield
        finally:
            self._learned = None

    # --- a step that is not finite ---

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        window = self._window
        if window is None:
            lengths = {name: len(values) for name, values in self._metrics["train"].items()}
            window = self._window = Window(lengths)
            self._watch = _ran(self.model) if self._check_gradients else None
        window.rows += inputs["rows"]
        if "spare" not in inputs:
            mask = inputs.get("attention_mask")
            window.tokens += inputs["input_ids"].numel() if mask is None else int(mask.sum())
        rows = inputs["rows"]
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            window.bad_rows += rows
            return torch.zeros_like(loss)
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The last call before the optimizer steps: here a window is accepted or dropped."""
        norm = super()._get_grad_norm(model, grad_norm)
        window, self._window = self._window, None
        assert window is not None, "a step without a forward pass"
        if self._watch is not None:
            self._check_every_gradient(*self._watch)
        bad = bool(window.bad_rows) or not math.isfinite(float(norm))
        if self.together:
            found = ranks.add(torch.tensor([float(bad), window.tokens], dtype=torch.float64))
            bad, window.tokens = bool(found[0]), int(found[1]) // self.get_tp_size()
        self._skipped_now = bad
        # accelerate's own mark for a step that fp16 scaling skipped: the learning rate does not move on.
        self.optimizer._is_overflow = bad
        if bad:
            self._drop(model, window, norm)
        else:
            self.run_state.skipped_in_row = 0
            self.run_state.tokens += window.tokens
        return norm

    def _drop(self, model: nn.Module, window: Window, norm: Any) -> None:
        """Forget a window: no gradient for the optimizer, no loss for the log. Count it and name its rows."""
        model.zero_grad(set_to_none=True)
        if self.together:
            window.rows, window.bad_rows = self.dropped_rows(window.rows, window.bad_rows)
        metrics = self._metrics["train"]
        kept = {name: values[: window.metrics.get(name, 0)] for name, values in metrics.items()}
        metrics.clear()
        metrics.update({name: values for name, values in kept.items() if values})
        self.run_state.skipped += 1
        self.run_state.skipped_in_row += 1
        what = "loss" if window.bad_rows else "gradient"
        step = self.state.global_step + 1
        record = {
            "step": step,
            "not_finite": what,
            "rows": window.rows,
            "bad_rows": window.bad_rows or window.rows,
        }
        self.folder.append(self.folder.nonfinite, record)
        if self.run_state.skipped_in_row >= self.max_nonfinite:
            raise NonFinite(
                f"{self.run_state.skipped_in_row} steps in a row had a {what} that is not finite, "
                f"the last was step {step}",
                f"their rows are in {self.folder.nonfinite}; lower train.lr, or look at these rows "
                "(train.max_nonfinite allows more such steps)",
            )

    def _check_every_gradient(self, ran: set[str], hooks: list[Any]) -> None:
        """After a window: an adapter that ran must have a gradient; one that never ran is frozen."""
        for hook in hooks:
            hook.remove()
        self._check_gradients, self._watch = False, None
        without = [n for n, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        lost = [name for name in without if name.partition(".lora_")[0] in ran]
        if lost:
            raise UserError(
                f"{len(lost)} trainable tensors got no gradient, the first is {lost[0]}",
                "they would stay as they are; moesmith loads models so that linears stay trainable on a CPU",
            )
        for name, parameter in self.model.named_parameters():
            if name in without:
                parameter.requires_grad_(False)
        self.unused += without

    # --- evaluation and log ---

    def _evaluated(self, metrics: dict[str, Any]) -> None:
        """Log what an evaluation found, tell the callbacks, and look at gradients again after it."""
        self._check_gradients = True
        self.log(dict(metrics))
        handler: Any = self.callback_handler
        self.control: Any = handler.on_evaluate(self.args, self.state, self.control, metrics)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._skipped_now and "loss" in logs:
            logs = {key: value for key, value in logs.items() if key not in ("loss", "grad_norm")}
            logs["skipped"] = self.run_state.skipped
        super().log(logs, start_time)

    # --- checkpoints ---

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._save_into) if self._save_into is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place, then give it its name; then remove the oldest."""
        step = self.state.global_step
        self._save_into = self.folder.checkpoints / f".{step}.tmp"
        name = CHECKPOINT.format(step=step)
        try:
            super()._save_checkpoint(model, trial)
            passes = self.all_passes()  # by then every process has written its part
            if ranks.is_main():
                state = {**asdict(self.run_state), "passes": passes}
                write_atomically(self._save_into / name / STATE, json.dumps(state))
                replace_folder(self.folder.checkpoints / name, (self._save_into / name).rename)
                self._save_into.rmdir()
        finally:
            self._save_into = None
        self.folder.keep_newest(self.keep_checkpoints)

    def all_passes(self) -> dict[str, int]:
        """`RunState.passes` of all processes together."""
        parts = ranks.gather(self.run_state.passes)
        return {what: sum(part.get(what, 0) for part in parts) for part in parts for what in part}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Only the adapter, also where the model is split over processes."""
        if self.is_fsdp_enabled and (weights := gathered(self.model)) is not None:
            self._save(output_dir, state_dict=weights)
        else:
            super().save_model(output_dir, _internal_call)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        split = bool(self.is_fsdp_enabled)
        if (Path(resume_from_checkpoint) / OPTIMIZER_NAME).is_file() == split:
            how = "whole" if split else "split over processes"
            begun = "without sharding" if split else "with train.sharding=fsdp2, or accelerate's FSDP"
            raise UserError(
                f"{resume_from_checkpoint} was written with weights {how}: its optimizer has another form",
                f"go on as it was begun: {begun}",
            )
        self._load_weights(resume_from_checkpoint, model)
        state = json.loads((Path(resume_from_checkpoint) / STATE).read_text(encoding="utf-8"))
        self.run_state = RunState(**state)

    def _load_weights(self, checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(checkpoint, model)


def _ran(model: nn.Module) -> tuple[set[str], list[Any]]:
    """Names of adapted modules that run from now on, filled by hooks; and the hooks."""
    ran: set[str] = set()
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer):
            hooks.append(module.register_forward_hook(functools.partial(_note, ran, name)))
    return ran, hooks


def _note(ran: set[str], name: str, *_: Any) -> None:
    ran.add(name)
