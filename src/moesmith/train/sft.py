"""Supervised fine-tuning of an adapter: one call that leaves the best and the last adapter in a folder.

`run_sft` is the journey behind `moesmith sft`, for programs: a loaded model, a tokenizer, prepared examples.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as transformers_logging
from trl import SFTConfig

from moesmith import console, ranks
from moesmith.data.masks import Example
from moesmith.data.packing import check_isolation, pack
from moesmith.data.prepare import fingerprint
from moesmith.errors import UserError
from moesmith.experts.residency.attach import residency_of
from moesmith.models.checkpoint import base_record

from . import layer_major, memory
from .adapters import AdapterCounts, attach, cast_trainable, count_adapters, save_adapter, trainable
from .arguments import check_same_everywhere, check_settings, passes_of, shared_arguments
from .batches import Collator, to_dataset
from .callbacks import EvaluationCallback, LogCallback, MemoryCallback, ProgressCallback, Stop, StopCallback
from .careful import Careful, RunState
from .folder import RunFolder
from .head_tiles import small_tiles
from .settings import RunSettings
from .together import gathered
from .trainer import Trainer

EVALUATIONS = 10  # and checkpoints, in a run that does not say how many


@dataclass
class SFTResult:
    """What a run came to. Losses are nats per held-out token; None without held-out examples."""

    steps: int
    first_eval_loss: float | None
    """before training"""
    best_eval_loss: float | None
    best_step: int | None
    last_eval_loss: float | None
    best: Path | None
    """folder of the adapter with the lowest held-out loss"""
    last: Path
    """folder of the adapter after the last step"""
    model: PeftModel
    """the model with that adapter, in evaluation mode"""
    seconds: float
    """training alone, without evaluation and loading; all sessions of a resumed run"""
    tokens: int
    peak_bytes: int
    skipped: int
    """steps dropped for a loss or gradient that was not finite"""
    stopped: str | None = None
    """why it ended before its last step: "interrupted", "terminated", "early stop"; None when it did not"""
    history: list[dict[str, Any]] = field(default_factory=list)
    """every logged value, one dict per step or evaluation"""

    def facts(self) -> dict[str, Any]:
        """The same for a program, without the model and the history."""
        kept = {key: value for key, value in vars(self).items() if key not in ("model", "history")}
        return {key: str(value) if isinstance(value, Path) else value for key, value in kept.items()}

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to resume."""
        return self.stopped in (None, "early stop")


@dataclass
class Plan:
    """What a run will do, before it does it."""

    steps: int
    eval_steps: int
    save_steps: int
    sequences: int
    """rows, or packed sequences, of one epoch"""
    adapters: AdapterCounts
    memory: memory.MemoryPlan
    tokens_per_forward: int
    """largest forward pass, padding included"""


def run_sft(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Example],
    held_out: Sequence[Example],
    cfg: RunSettings,
    *,
    pack_to: int | None = None,
    base: dict[str, Any] | None = None,
    data_facts: dict[str, Any] | None = None,
    quiet: bool = False,
) -> SFTResult:
    """Train an adapter on `train` and keep the one with the lowest loss on `held_out`.

    Args:
        model: as loaded, packed or not; or with an adapter on it, which is then trained further.
        train, held_out: from `moesmith.data.prepare`. Without held-out examples there is no best adapter.
        pack_to: put several examples into sequences of this many tokens.
        base: which model the adapter belongs to, for moesmith.json; worked out from the model if not given.
        data_facts: what else data.json should say about the rows.
        quiet: no bar and no lines.

    Raises:
        UserError: see the message; among them a folder that is in use, a placement the model does not have,
            packing in a model that mixes packed rows, too many steps that were not finite, no memory left.
    """
    return Session(
        model, tokenizer, train, held_out, cfg, pack_to=pack_to, base=base, data_facts=data_facts, quiet=quiet
    ).train()


class Session:
    """A training run, ready to start: everything is built and checked, nothing has been trained."""

    trainer_class: type[Careful] = Trainer
    rows_per_sequence = 1
    """rows of a batch that one sequence becomes"""

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Example],
        held_out: Sequence[Example],
        cfg: RunSettings,
        *,
        pack_to: int | None = None,
        base: dict[str, Any] | None = None,
        data_facts: dict[str, Any] | None = None,
        quiet: bool = False,
    ):
        if not train:
            raise UserError("no rows to train on")
        ranks.join()
        offloaded = residency_of(_plain(model)) is not None
        check_settings(cfg.train, _plain(model).config.get_text_config(), offloaded)
        layer_major.check(cfg.train, pack_to is not None)
        self.cfg, self.tokenizer, self.held_out, self.quiet = cfg, tokenizer, held_out, quiet
        self.pack_to = pack_to
        self.folder = RunFolder(cfg.out)
        self.folder.check(cfg, cfg.resume, cfg.overwrite)
        digest = fingerprint(train, held_out)
        if cfg.resume:
            self.folder.check_data(digest)
        self.data = {
            "fingerprint": digest,
            "train": len(train),
            "held_out": len(held_out),
            **(data_facts or {}),
        }
        self.base = base or base_record(_plain(model), _plain(model).name_or_path)
        check_same_everywhere(self.base, digest, cfg)
        if pack_to is not None:
            check_isolation(_plain(model), train, pack_to)
        self.sequences = self.as_sequences(train) if pack_to is None else pack(train, pack_to)
        self.held_out_sequences = self.as_sequences(held_out)
        fresh = not isinstance(model, PeftModel)
        with _quiet_libraries():
            self.model: PeftModel = attach(model, cfg.lora, cfg.seed) if fresh else model
        adapters = count_adapters(self.model, cfg.lora.targets if fresh else None)
        self.plan = self._make_plan(adapters)
        self.notes = self._check_fit()
        self.stop = Stop()

    # --- what another kind of row or loss changes ---

    def as_sequences(self, rows: Sequence[Any]) -> list[list[Example]]:
        """The examples of every row, without packing."""
        return [[row] for row in rows]

    def tokens_of(self, sequence: list[Example]) -> int:
        """Tokens of a forward pass of one sequence, padding included."""
        return sum(map(len, sequence))

    def datasets(self) -> tuple[Any, Any]:
        """What is trained on and what is held out, None if nothing is, as the collator takes them."""
        held_out = to_dataset(self.held_out_sequences) if self.held_out else None
        return to_dataset(self.sequences), held_out

    def collator(self) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
        """Dataset rows -> a batch."""
        return Collator(pad_token(self.tokenizer), packed=self.pack_to is not None)

    def arguments(self, first: bool) -> TrainingArguments:
        """Our options in TRL's words. `first`: nothing was trained yet; the run starts with an evaluation."""
        return SFTConfig(
            **shared_arguments(self, first),
            dataset_kwargs={"skip_prepare_dataset": True},  # rows are tokenized and masked already
        )

    def prepare(self, trainer: Any) -> None:
        """What another loss needs, before the first batch and before a checkpoint is loaded."""

    def check_loss(self, trainer: Any) -> None:
        """Refuse an architecture whose logits TRL's fused head does not know."""
        shortest = min((e for sequence in self.sequences for e in sequence), key=len)
        alone = Collator(pad_token(self.tokenizer), packed=False)
        trainer.check_loss(alone([to_dataset([[shortest]])[0]]))

    def save(self, path: Path, facts: dict[str, Any]) -> None:
        """Write the adapter as it is now. Every process calls it, rank 0 writes."""
        with self._whole_experts():
            weights = gathered(self.model)
            if ranks.is_main():
                save_adapter(path, self.model, self.tokenizer, self.base, self.facts_of(facts), weights)
        ranks.barrier()

    def facts_of(self, facts: dict[str, Any]) -> dict[str, Any]:
        """What moesmith.json says about the adapter."""
        return facts

    def _whole_experts(self) -> contextlib.AbstractContextManager[Any]:
        """Within: adapters of experts that are split over processes are whole."""
        from . import expert_parallel

        return expert_parallel.whole(self.model)

    def result(self, trainer: Any, **common: Any) -> SFTResult:
        """What the run came to."""
        return SFTResult(**common)

    # --- before ---

    def _check_fit(self) -> list[str]:
        """Whether tokens and lengths belong to this model. Returns what is odd but allowed."""
        longest = max(len(e) for s in (*self.sequences, *self.held_out_sequences) for e in s)
        vocabulary = _plain(self.model).get_input_embeddings().num_embeddings
        largest = max(int(e.input_ids.max()) for s in self.sequences for e in s)
        if largest >= vocabulary:
            raise UserError(
                f"a row has token {largest}, the model's vocabulary ends at {vocabulary - 1}",
                "the tokenizer is not this model's",
            )
        window = getattr(_plain(self.model).config.get_text_config(), "max_position_embeddings", None)
        if window and longest > window:
            return [f"the longest row has {longest:,} tokens, the model was made for {window:,}"]
        return []

    def _make_plan(self, adapters: AdapterCounts) -> Plan:
        settings = self.cfg.train
        forwards = math.ceil(len(self.sequences) / settings.batch_size)
        per_epoch = math.ceil(forwards / settings.grad_accum)
        steps = settings.max_steps or max(1, math.ceil(per_epoch * settings.epochs))
        every = max(1, steps // EVALUATIONS)
        widest = sorted(map(self.tokens_of, self.sequences), reverse=True)[: settings.batch_size]
        tokens = sum(widest) if self.pack_to else settings.batch_size * widest[0]
        most = sorted((sum(e.learned for e in s) for s in self.sequences), reverse=True)[
            : settings.batch_size
        ]
        return Plan(
            steps=steps,
            eval_steps=settings.eval_steps or every,
            save_steps=settings.save_steps or every,
            sequences=len(self.sequences),
            adapters=adapters,
            memory=memory.plan(self.model, settings, tokens, sum(most)),
            tokens_per_forward=tokens,
        )

    # --- the run ---

    def train(self) -> SFTResult:
        """Run it to its end, or until someone asks it to stop."""
        folder, cfg = self.folder, self.cfg
        checkpoint = folder.newest_checkpoint() if cfg.resume else None
        ranks.barrier()  # every process has looked at the folder before rank 0 changes it
        folder.begin(cfg, resume=checkpoint is not None)
        folder.record_data(self.data)
        step = int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0
        if checkpoint:
            folder.forget_after(step)
        try:
            with _quiet_libraries(), small_tiles():
                no_bar = console.Bar("", None, None)  # what is done before training may have one of its own
                trainer, progress, evaluation = self._trainer(no_bar, first=checkpoint is None)
                bar = _bar(self.plan.steps, self.quiet)
                with bar as progress.bar, self.stop.listening(), self._in_slices():
                    if step < self.plan.steps:
                        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                    elif checkpoint:
                        trainer._load_from_checkpoint(str(checkpoint))
                        trainer.state.global_step = step
        except (RuntimeError, MemoryError) as error:
            if ranks.lost(error):
                newest = folder.newest_checkpoint()
                raise ranks.ended(
                    f"{newest} is whole: the same command with --resume goes on from it"
                    if newest
                    else "there was no checkpoint yet"
                ) from error
            if not memory.is_out_of_memory(error):
                raise
            raise self._out_of_memory(memory.first_line(error)) from error
        return self._finish(trainer, progress.seen, evaluation.stopped_early)

    def _in_slices(self) -> contextlib.AbstractContextManager[Any]:
        """Within: the layers take the rows of a step in slices, if a step is one forward pass."""
        if not self.cfg.train.layer_major:
            return contextlib.nullcontext()
        return layer_major.in_slices(self.model, self.cfg.train.batch_size * self.rows_per_sequence)

    def _trainer(self, bar: console.Bar, first: bool) -> tuple[Any, ProgressCallback, EvaluationCallback]:
        settings = self.cfg.train
        values = {name: p.detach().clone() for name, p in trainable(self.model).items()}
        train, held_out = self.datasets()
        trainer_class = self.trainer_class
        if settings.expert_parallel > 1:
            from . import expert_parallel

            trainer_class = expert_parallel.trainer_class(trainer_class, self.model)
        trainer = trainer_class(
            self.model,
            args=self.arguments(first),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=self.tokenizer,
            data_collator=self.collator(),
            folder=self.folder,
            max_nonfinite=settings.max_nonfinite,
            keep_checkpoints=settings.keep_checkpoints,
            window=passes_of(settings)[1],
        )
        cast_trainable(self.model, values, getattr(torch, settings.adapter_dtype))
        del values
        with trainer.freezing_unused():
            self.check_loss(trainer)
        self.prepare(trainer)

        def run_state() -> RunState:
            return trainer.run_state

        def save_best() -> Path:
            facts = {"step": trainer.state.global_step, "eval_loss": trainer.run_state.best_loss}
            self.save(self.folder.best, facts)
            return self.folder.best

        progress = ProgressCallback(run_state, bar)
        evaluation = EvaluationCallback(run_state, save_best, settings.early_stop, self.quiet)
        trainer.remove_callback(PrinterCallback)
        for callback in (progress, LogCallback(self.folder), MemoryCallback(self._out_of_memory), evaluation):
            trainer.add_callback(callback)
        trainer.add_callback(StopCallback(self.stop))
        if "tensorboard" in settings.loggers and ranks.is_main():
            from torch.utils.tensorboard import SummaryWriter

            trainer.add_callback(TensorBoardCallback(SummaryWriter(self.folder.path / "tensorboard")))
        return trainer, progress, evaluation

    def _finish(self, trainer: Any, seen: int, stopped_early: bool) -> SFTResult:
        trainer.release()
        run, step = trainer.run_state, trainer.state.global_step
        self.plan.adapters.unused = trainer.unused
        facts = {"step": step, "eval_loss": run.last_loss if self.held_out else None}
        self.save(self.folder.last, facts)  # and every process waits for the records of rank 0
        stopped = "early stop" if stopped_early else self.stop.reason if step < self.plan.steps else None
        has_best = self.folder.best.is_dir()
        result = self.result(
            trainer,
            steps=step,
            first_eval_loss=run.first_loss,
            best_eval_loss=run.best_loss if has_best else None,
            best_step=run.best_step if has_best else None,
            last_eval_loss=run.last_loss if self.held_out else None,
            best=self.folder.best if has_best else None,
            last=self.folder.last,
            model=self.model,
            seconds=run.seconds,
            tokens=run.tokens,
            peak_bytes=memory.peak(seen),
            skipped=run.skipped,
            stopped=stopped,
            history=self.folder.history(),
        )
        if result.finished:
            self.folder.write_result(result.facts())
        return result

    def _out_of_memory(self, what: str) -> UserError:
        packed = self.base.get("linears") is not None
        return UserError(
            *memory.report(what, self.plan.memory, self.cfg.train, self.pack_to is not None, packed)
        )


def pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """What to pad with. It is masked everywhere, so any token does."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _plain(model: PreTrainedModel | PeftModel) -> Any:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _bar(steps: int, quiet: bool) -> contextlib.AbstractContextManager[console.Bar]:
    return contextlib.nullcontext(console.Bar("", None, None)) if quiet else console.bar("", steps)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Keep advice meant for users of TRL and transformers themselves off the terminal."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(level)
