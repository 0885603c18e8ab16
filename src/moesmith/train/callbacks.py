"""What happens beside the training loop: bar, log file, best adapter, stopping early, stopping politely."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from transformers import TrainerCallback

from moesmith import console, ranks
from moesmith.errors import UserError

from . import memory
from .folder import RunFolder


class Stop:
    """A request to stop after the step that is running."""

    ECHO = 5.0  # seconds: a launcher hands on a Ctrl-C that the terminal gave its processes too

    def __init__(self) -> None:
        self.reason: str | None = None
        self._before: dict[int, Any] = {}
        self._asked = 0.0

    def _ask(self, number: int, frame: FrameType | None) -> None:
        several = ranks.world() > 1
        if self.reason is not None:  # asked twice: now
            if several and time.monotonic() - self._asked < self.ECHO:
                return
            signal.signal(number, self._before[number])
            raise KeyboardInterrupt
        self._asked = time.monotonic()
        self.reason = "interrupted" if number == signal.SIGINT else "terminated"
        if not several:  # else it may be the launcher's answer to a process that has died
            console.note("finishing this step, then saving (again to stop at once)")

    def agree(self) -> None:
        """Take over the reason that any process has: all of them stop after the same step."""
        if ranks.world() == 1:
            return
        reasons = [reason for reason in ranks.gather(self.reason) if reason is not None]
        if reasons:
            self.reason = reasons[0]
            console.note("saving, then stopping")

    @contextlib.contextmanager
    def listening(self) -> Iterator[Stop]:
        """Ctrl-C and SIGTERM ask instead of killing. Does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            self._before[number] = signal.signal(number, self._ask)
        try:
            yield self
        finally:
            for number, handler in self._before.items():
                signal.signal(number, handler)


class StopCallback(TrainerCallback):
    """Saves a checkpoint and ends training when someone asked."""

    def __init__(self, stop: Stop):
        self.stop = stop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.stop.agree()
        if self.stop.reason is not None and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True


class LogCallback(TrainerCallback):
    """Every logged value goes to log.jsonl."""

    def __init__(self, folder: RunFolder):
        self.folder = folder

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if state.is_world_process_zero and "train_runtime" not in logs:
            values = {key: value for key, value in logs.items() if key != "total_flos"}
            self.folder.append(self.folder.log, {"step": state.global_step, **values})


class EvaluationCallback(TrainerCallback):
    """Keeps the adapter with the lowest held-out loss; stops the run when that loss no longer falls."""

    def __init__(
        self, run_state: Callable[[], Any], save_best: Callable[[], Path], patience: int | None, quiet: bool
    ):
        self.run_state = run_state
        self.save_best = save_best
        self.patience = patience
        self.quiet = quiet
        self.stopped_early = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if (
            args.eval_strategy != "no" and state.global_step >= state.max_steps
        ):  # whatever the interval is, the last adapter has a figure
            control.should_evaluate = True

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **kwargs: Any
    ) -> None:
        loss, step, run = metrics["eval_loss"], state.global_step, self.run_state()
        run.last_loss = loss
        line = f"step {step}  held-out loss {loss:.4f}"
        if "eval_margin" in metrics:
            margin, right = (metrics.get(f"{n}_norm", metrics[n]) for n in ("eval_margin", "eval_accuracy"))
            line += f" · margin {margin:.3g} · {100 * right:.0f} % the right way round"
            line += f" · rewards {metrics['eval_rewards_chosen']:.2g}, {metrics['eval_rewards_rejected']:.2g}"
            line += f" · KL {metrics['eval_kl']:.2g}"
        if step == 0:
            run.first_loss = loss
            line += " (before training)"
        elif loss < run.best_loss:
            run.best_loss, run.best_step, run.stale = loss, step, 0
            line += f" (best) → {self.save_best()}"
        else:
            run.stale += 1
            line += f" (best {run.best_loss:.4f} at step {run.best_step})"
        if self.patience is not None and run.stale >= self.patience and step < state.max_steps:
            self.stopped_early = True
            control.should_save = True
            control.should_training_stop = True
            line += f" · {run.stale} evaluations without a better one: stopping"
        if not self.quiet and state.is_world_process_zero:
            console.say(line)


class ProgressCallback(TrainerCallback):
    """The bar: step, loss, learning rate, tokens per second, memory, time left. Also keeps the clock."""

    def __init__(self, run_state: Callable[[], Any], bar: console.Bar):
        self.run_state = run_state
        self.bar = bar
        self.seen = 0
        self._started = 0.0
        self._evaluating = 0.0
        self._session_tokens = 0
        self._session_seconds = 0.0
        self._before: tuple[int, float] = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.bar.total = state.max_steps
        self._before = (self.run_state().tokens, self.run_state().seconds)
        self._mark = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._mark = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = self.run_state()
        run.seconds += time.monotonic() - self._mark
        self.seen = memory.peak(self.seen)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        if "learning_rate" not in logs:
            return
        run = self.run_state()
        tokens, seconds = run.tokens - self._before[0], run.seconds - self._before[1]
        loss = f"loss {logs['loss']:.3f}" if "loss" in logs else f"skipped ({run.skipped})"
        rate = f"{tokens / seconds:,.0f} tok/s" if seconds else ""
        margin = f"margin {logs['rewards/margins']:.2g}" if "rewards/margins" in logs else ""
        lr = f"lr {logs['learning_rate']:.1e}"
        parts = [f"step {state.global_step}/{state.max_steps}", loss, margin, lr, rate]
        self.bar.update(state.global_step, " · ".join([*filter(None, parts), console.size(self.seen)]))


class MemoryCallback(TrainerCallback):
    """Stops before the system kills the process for its RAM; a GPU raises an error of its own."""

    def __init__(self, explain: Callable[[str], UserError]):
        self.explain = explain

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if memory.almost_full():
            raise self.explain("the machine's memory is almost full")
