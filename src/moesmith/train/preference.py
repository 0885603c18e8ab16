"""Direct preference optimisation of an adapter: one call, and a folder with the best and the last adapter.

`run_dpo` is the journey behind `moesmith dpo`, for programs: a loaded model, a tokenizer, prepared pairs. The
losses are TRL's. The reference is the model as it comes in, its adapter included, before a checkpoint is
loaded. Its log-probabilities are computed pair by pair in the way the policy's are, so that at batch size 1
the first margin is exactly 0; `reference.py` keeps them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import DPOConfig

from moesmith import console
from moesmith.data.masks import Example
from moesmith.data.preferences import Pair
from moesmith.errors import UserError
from moesmith.plan.footprint import CPU_TILE

from .adapters import trainable
from .arguments import shared_arguments, splits
from .batches import PairCollator, to_dataset
from .margins import warnings_of
from .preference_trainer import KL_PAIRS, PreferenceTrainer
from .reference import (
    Logps,
    ReferenceCache,
    ReferenceFacts,
    look_ahead,
    look_up,
    pair_digest,
    reference_key,
)
from .settings import DPORunSettings, DPOSettings
from .sft import Session, SFTResult, pad_token
from .stack import digest_of_model

__all__ = ["DPOResult", "PreferenceSession", "PreferenceTrainer", "run_dpo"]

LOSSES = (
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
    "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
)  # fmt: skip
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")  # the ones that read label_smoothing
BETA, BETA_NORM = 0.1, 5.0  # of sigmoid_norm: Tulu 3, arXiv 2411.15124


@dataclass
class DPOResult(SFTResult):
    """What a run on pairs came to. Losses, margins and accuracies are means over held-out pairs.

    Margins are those the loss sees: per token for sigmoid_norm and ipo.
    """

    first_margin: float | None = None
    best_margin: float | None = None
    last_margin: float | None = None
    first_accuracy: float | None = None
    best_accuracy: float | None = None
    last_accuracy: float | None = None
    best_kl: float | None = None
    """KL(reference || policy) in nats per token of held-out completions"""
    last_kl: float | None = None
    reference: dict[str, Any] = field(default_factory=dict)
    """see `ReferenceFacts`"""
    passes: dict[str, int] = field(default_factory=dict)
    """sequences that went through the model: policy, reference, evaluation, kl, check"""
    warnings: list[str] = field(default_factory=list)


def run_dpo(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    train: Sequence[Pair],
    held_out: Sequence[Pair],
    cfg: DPORunSettings,
    *,
    base: dict[str, Any] | None = None,
    data_facts: dict[str, Any] | None = None,
    quiet: bool = False,
) -> DPOResult:
    """Train an adapter to prefer the chosen answers, and keep the one with the lowest held-out loss.

    Args:
        model: as loaded: a fresh adapter is put on it; with an adapter: that one is trained further; with a
            stack (`train.stack`): its new adapter is trained. As it comes in, it is also the reference.
        train, held_out: pairs from `moesmith.data.preferences`.
        base: which model the adapter belongs to, for moesmith.json; worked out from the model if not given.
        data_facts: what else data.json should say about the pairs.
        quiet: no bar and no lines.

    Raises:
        UserError: see the message; what `run_sft` refuses, a loss TRL does not have, a reference cache of
            another model.
    """
    session = PreferenceSession(
        model, tokenizer, train, held_out, cfg, base=base, data_facts=data_facts, quiet=quiet
    )
    result = session.train()
    assert isinstance(result, DPOResult)
    return result


def beta_of(settings: DPOSettings) -> float:
    """The beta that is used: the one asked for, or the loss's own."""
    if settings.beta is not None:
        return settings.beta
    return BETA_NORM if "sigmoid_norm" in settings.loss else BETA


def check_dpo(cfg: DPORunSettings) -> None:
    """Refuse what TRL would refuse later or take without a word.

    Raises:
        UserError: a loss TRL does not have, options that do not belong to it, or dropout.
    """
    settings = cfg.dpo
    if cfg.lora.dropout:
        raise UserError(
            f"lora.dropout={cfg.lora.dropout}: the reference has no dropout, so the model has none either",
            "lora.dropout=0",
        )
    for name in settings.loss:
        if name not in LOSSES:
            raise UserError(f"dpo.loss={name} is no preference loss of TRL", f"it has {', '.join(LOSSES)}")
    weights, smoothing = settings.loss_weights, settings.label_smoothing
    if weights is not None and len(weights) != len(settings.loss):
        raise UserError(f"dpo.loss_weights has {len(weights)} values for {len(settings.loss)} losses")
    if "exo_pair" in settings.loss and smoothing == 0:
        raise UserError("dpo.loss=exo_pair needs dpo.label_smoothing above 0", "its paper uses 0.001")
    if "robust" in settings.loss and smoothing >= 0.5:
        raise UserError(f"dpo.label_smoothing={smoothing}: the robust loss needs less than 0.5")
    if smoothing and not set(settings.loss) & set(SMOOTHED):
        raise UserError(
            f"dpo.label_smoothing={smoothing} does nothing to {', '.join(settings.loss)}",
            f"it is read by {', '.join(SMOOTHED)}",
        )
    others = [name for name in settings.loss if name not in ("sigmoid_norm", "sft")]
    if settings.beta is None and "sigmoid_norm" in settings.loss and others:
        raise UserError(
            f"dpo.loss has sigmoid_norm and {others[0]}, which want betas of other sizes", "give dpo.beta"
        )


class PreferenceSession(Session):
    """A run on pairs, ready to start: everything is built and checked, nothing has been trained."""

    trainer_class = PreferenceTrainer
    rows_per_sequence = 2
    cfg: DPORunSettings

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        train: Sequence[Pair],
        held_out: Sequence[Pair],
        cfg: DPORunSettings,
        **options: Any,
    ):
        check_dpo(cfg)
        if splits(cfg.train) and cfg.dpo.reference == "recompute":
            raise UserError(
                "dpo.reference=recompute with weights that are split: the reference's are not kept in pieces",
                "dpo.reference=cached",
            )
        if cfg.train.expert_parallel > 1:
            raise UserError(
                f"train.expert_parallel={cfg.train.expert_parallel} is for sft",
                "train.expert_parallel=1; torchrun without it trains on different pairs in each process",
            )
        self.pairs, self.held_out_pairs = list(train), list(held_out)
        self.reference = ReferenceFacts(cfg.dpo.reference)
        super().__init__(model, tokenizer, train, held_out, cfg, **options)  # type: ignore[arg-type]
        # before the trainer rounds the adapter, so that it is the same whenever it is asked for
        self.adapter_digest = digest_of_model(self.model)
        if cfg.train.batch_size == 1 and any(name.startswith("aot") for name in cfg.dpo.loss):
            self.notes.append("aot compares pairs of a batch with each other: train.batch_size=1 has one")

    def as_sequences(self, rows: Sequence[Any]) -> list[list[Example]]:
        return [[pair.chosen, pair.rejected] for pair in rows]

    def tokens_of(self, sequence: list[Example]) -> int:
        return len(sequence) * max(map(len, sequence))

    def datasets(self) -> tuple[Any, Any]:
        train = to_dataset(self.sequences, pair=[pair_digest(pair) for pair in self.pairs])
        digests = [pair_digest(pair) for pair in self.held_out_pairs]
        return train, to_dataset(self.held_out_sequences, pair=digests) if digests else None

    def collator(self) -> PairCollator:
        self._collator = PairCollator(pad_token(self.tokenizer), {})
        return self._collator

    def arguments(self, first: bool) -> TrainingArguments:
        dpo = self.cfg.dpo
        return DPOConfig(
            **{**shared_arguments(self, first), "per_device_eval_batch_size": 1},
            loss_type=list(dpo.loss),
            loss_weights=dpo.loss_weights,
            beta=beta_of(dpo),
            label_smoothing=dpo.label_smoothing,
        )

    def _batch(self, pair: Pair) -> dict[str, Any]:
        """A pair alone."""
        return PairCollator(pad_token(self.tokenizer), {})([to_dataset(self.as_sequences([pair]))[0]])

    def check_loss(self, trainer: Any) -> None:
        shortest = min(self.pairs, key=lambda pair: len(pair.chosen) + len(pair.rejected))
        trainer.check_logps(self._batch(shortest))

    def _cache(self) -> tuple[ReferenceCache, dict[str, Any]]:
        """The reference's file, and what its numbers depend on."""
        train = self.cfg.train
        places = sorted({name.partition(".lora_")[0].split(".")[-1] for name in trainable(self.model)})
        key, made_of = reference_key(
            self.base,
            self.adapter_digest,
            self.model,
            dtype=train.dtype,
            adapter_dtype=train.adapter_dtype,
            places=places,
            head_tile=CPU_TILE,  # another tile sums the vocabulary in another order
        )
        return ReferenceCache(self.cfg.dpo.reference_cache, key), made_of

    def look_ahead(self) -> ReferenceFacts:
        """What the reference will take: pairs found in its file, and pairs still to be computed."""
        pairs = [*self.pairs, *self.held_out_pairs]
        if self.cfg.dpo.reference == "recompute":
            return ReferenceFacts("recompute", pairs=len({pair_digest(pair) for pair in pairs}))
        return look_ahead(self._cache()[0], pairs)

    def prepare(self, trainer: Any) -> None:
        """Ask the reference, while the model is still it."""
        trainer.remember_said([self._batch(pair) for pair in self.held_out_pairs[:KL_PAIRS]])
        if self.cfg.dpo.reference == "recompute":
            trainer.remember_start()
            return
        cache, made_of = self._cache()
        cache.describe(made_of)

        def compute(pair: Pair) -> Logps:
            chosen, rejected = trainer.reference_logps(trainer._prepare_inputs(self._batch(pair)))
            return float(chosen), float(rejected)

        values, self.reference = look_up(cache, [*self.pairs, *self.held_out_pairs], compute, self.quiet)
        trainer.references.update(values)
        self._collator.references = trainer.references

    def facts_of(self, facts: dict[str, Any]) -> dict[str, Any]:
        return {**facts, "dpo": {"loss": self.cfg.dpo.loss, "beta": beta_of(self.cfg.dpo)}}

    def result(self, trainer: Any, **common: Any) -> DPOResult:
        by_step = {entry["step"]: entry for entry in common["history"] if "eval_loss" in entry}
        first, last = by_step.get(0), by_step[max(by_step)] if by_step else None
        best = by_step.get(common["best_step"])
        values: dict[str, Any] = {}
        for name, entry in (("first", first), ("best", best), ("last", last)):
            entry = entry or {}
            values[f"{name}_margin"] = entry.get("eval_margin_norm", entry.get("eval_margin"))
            values[f"{name}_accuracy"] = entry.get("eval_accuracy_norm", entry.get("eval_accuracy"))
            if name != "first":
                values[f"{name}_kl"] = entry.get("eval_kl")
        result = DPOResult(**common, **values, reference=self.reference.facts(), passes=trainer.all_passes())
        if result.finished:
            result.warnings = warnings_of(first, last)
        for text in result.warnings if not self.quiet else ():
            console.warn(text)
        return result
