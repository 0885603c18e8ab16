"""Teach a model which of two answers to prefer: direct preference optimisation of an adapter.

Give a YAML file with the keys below (examples/dpo.yaml has them all, commented); flags win over it. An
adapter from `moesmith sft` stays frozen under the new one and is part of the reference; OUT/best and OUT/last
hold the two as one adapter. --preview shows pairs and what is learned of them, --dry-run counts everything
and trains nothing, --resume continues.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from moesmith import console
from moesmith.data.settings import PreferenceConfig
from moesmith.errors import UserError
from moesmith.jobs import _fit
from moesmith.jobs._train import (
    QuantConfig,
    check_adapter,
    check_base,
    check_no_lora,
    is_over,
    load_model,
    load_tokenizer,
    recorded_base,
    say_done,
    say_model,
    say_plan,
    say_resume,
    say_train,
    say_written,
    settled,
    train_measured,
)
from moesmith.train.settings import DPORunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moesmith.data.preferences import PreparedPairs
    from moesmith.plan.footprint import Work
    from moesmith.train.folder import RunFolder
    from moesmith.train.preference import DPOResult, PreferenceSession

POSITIONAL = ("config",)
JSON = True
RANKS = True  # torchrun may start it
EXAMPLE = "moesmith dpo examples/dpo.yaml --adapter out/sft/best --data.path pairs.jsonl"
OUT_OF_MEMORY = "the model itself does not fit: quant.scheme=nf4, quant.linears=nf4, quant.double_quant=true"

PREVIEWED = 3  # pairs that --preview shows when no number is given


class Config(DPORunSettings):
    model: str | None = None
    """Model folder or hub name, packed or not; without it, the base that the adapter names."""
    adapter: str | None = None
    """Adapter the model already has, from `moesmith sft` or `moesmith dpo`; a part of the reference."""
    adapter_mode: Literal["stack", "continue"] = "stack"
    """stack trains a new adapter over it and leaves it as it is; continue trains it further."""
    quant: QuantConfig = QuantConfig()
    data: PreferenceConfig
    preview: bool | int = False
    """Print so many pairs with the learned tokens marked (3 without a number), and stop."""
    dry_run: bool = False
    """Count pairs and parameters, estimate memory, and stop before training."""


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused: no model, no such adapter, options without their adapter."""
    _fit.check(cfg)
    if cfg.train.expert_parallel > 1:
        raise UserError(
            f"train.expert_parallel={cfg.train.expert_parallel} is for sft",
            "dpo splits with train.sharding=fsdp2",
        )
    if cfg.adapter is None:
        if cfg.adapter_mode == "continue":
            raise UserError("adapter_mode=continue without an adapter", "give adapter too")
    else:
        check_adapter(cfg.adapter)
        if cfg.adapter_mode == "continue":
            check_no_lora(cfg.adapter, cfg.lora)
    named_model(cfg)


def run(cfg: Config) -> None:
    from moesmith.data.prepare import fingerprint
    from moesmith.train.folder import RunFolder
    from moesmith.train.preference import DPOResult, PreferenceSession, check_dpo

    check_dpo(cfg)
    folder = RunFolder(cfg.out)
    given = set(cfg.quant.model_fields_set)
    if cfg.resume:
        _fit.take_chosen(cfg, folder.config)
        cfg.quant = settled(cfg.quant, named_model(cfg), cfg.adapter)
    if not (cfg.preview or cfg.dry_run) and is_over(folder, cfg):
        return
    tokenizer = load_tokenizer(named_model(cfg), cfg.adapter)
    prepared = read_data(cfg, tokenizer)
    if cfg.preview:
        show_preview(prepared, tokenizer, PREVIEWED if cfg.preview is True else cfg.preview)
        return
    if cfg.resume:
        folder.check_data(fingerprint(prepared.train, prepared.held_out))
    cfg.quant = settled(cfg.quant, named_model(cfg), cfg.adapter)
    if cfg.fit == "auto":
        _fit.choose(cfg, named_model(cfg), work_of(cfg, prepared), given)
    _fit.enforce(cfg)
    model, base = load_model(named_model(cfg), cfg.quant, cfg.train.dtype, cfg.experts)
    with _fit.lent(model):
        model = with_adapter(cfg, model, base)
        session = PreferenceSession(
            model,
            tokenizer,
            prepared.train,
            prepared.held_out,
            cfg,
            base=base,
            data_facts=data_facts(prepared),
        )
        say_train(session, over=cfg.adapter if cfg.adapter_mode == "stack" else None, what="pairs")
        say_reference(session)
        say_plan(session)
        if cfg.dry_run:
            console.say("dry run: nothing was trained, nothing was written")
            console.emit({"data": session.data, "plan": asdict(session.plan)})
            return
        if cfg.resume:
            say_resume(folder)
        try:
            result = train_measured(session)
        except KeyboardInterrupt:
            if not folder.history():  # in the reference pass: what it computed is in its file
                console.say(f"stopped before the first step, nothing lost · continue: {again(folder)}")
            raise
        assert isinstance(result, DPOResult)
        say_result(result, folder)
    console.emit({"data": session.data, "plan": asdict(session.plan), "result": result.facts()})


def work_of(cfg: Config, prepared: PreparedPairs) -> Work:
    """What a step has to take: a pair is two rows."""
    longest = max((pair.longest for pair in prepared.train), default=1)
    learned = max((-(-pair.learned // 2) for pair in prepared.train), default=1)
    return _fit.work_of(cfg, "dpo", longest, learned, cfg.adapter if cfg.adapter_mode == "continue" else None)


def named_model(cfg: Config) -> str:
    """The model asked for, else the one the adapter was trained on."""
    name = cfg.model or recorded_base(cfg.adapter).get("path")
    if name is None:
        raise UserError("missing model", "a model folder or hub name, or an adapter that names its base")
    return str(name)


# ---------------------------------------------------------------- data


def read_data(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> PreparedPairs:
    """Read, mask and count the pairs, and say the counts."""
    from moesmith.data.preferences import describe_pairs, prepare_pairs, warnings_of

    prepared = prepare_pairs(tokenizer, cfg.data, cfg.seed)
    for i, line in enumerate(describe_pairs(prepared)):
        console.row("" if i else "data", line)
    for text in warnings_of(prepared):
        console.warn(text)
    return prepared


def data_facts(prepared: PreparedPairs) -> dict[str, Any]:
    """Where the rows went, and how long the answers are, for data.json."""
    from moesmith.data.preferences import Lengths

    held_out = prepared.eval_counts.facts() if prepared.eval_counts else None
    lengths = asdict(Lengths.of([*prepared.train, *prepared.held_out]))
    return {"rows": prepared.counts.facts(), "held_out_rows": held_out, "lengths": lengths}


def show_preview(prepared: PreparedPairs, tokenizer: PreTrainedTokenizerBase, pairs: int) -> None:
    """Print the first pairs with the learned tokens coloured, or in « » when colours cannot be shown."""
    from moesmith.data.preview import preview_pair

    colour = console.stdout().is_terminal
    for pair in prepared.train[:pairs]:
        console.say()
        console.say(preview_pair(tokenizer, pair, colour))
    what = "coloured tokens" if colour else "« » tokens"
    console.say(
        f"{what} are learned: those of chosen become likelier, those of rejected less likely", style="dim"
    )


# ---------------------------------------------------------------- model


def with_adapter(cfg: Config, model: Any, base: dict[str, Any]) -> Any:
    """The model as it is before training: with the adapter from before, and one to train over it; said."""
    from moesmith.train.adapters import continue_from
    from moesmith.train.stack import stack

    if cfg.adapter is not None:
        check_base(cfg.adapter, base, named_model(cfg))
        if cfg.adapter_mode == "stack":
            model = stack(model, cfg.adapter, cfg.lora, cfg.seed)
        else:
            model = continue_from(model, cfg.adapter)
    say_model(model)
    return model


# ---------------------------------------------------------------- what the terminal shows


def say_reference(session: PreferenceSession) -> None:
    """What the pairs are compared with, and how much of it is still to be computed."""
    ahead = session.look_ahead()
    if ahead.mode == "recompute":
        console.row("against", "the reference, this model before training: computed again in every step")
        return
    parts = [f"{ahead.found:,} pairs known from an earlier run"] if ahead.found else []
    if ahead.computed:
        parts.append(f"{ahead.computed:,}{'' if parts else ' pairs'} to compute once, before the first step")
    console.row("against", f"the reference, this model before training: {' · '.join(parts)}")
    console.row("", f"kept in {ahead.file}")


def say_computed(result: DPOResult) -> None:
    """What the reference pass took."""
    made = result.reference
    if made.get("computed"):
        speed = f", {made['tokens'] / made['seconds']:,.0f} tok/s" if made["seconds"] else ""
        took = f"{made['computed']:,} pairs in {console.duration(made['seconds'])}{speed}"
        console.row("against", f"{took} · {console.size(made['bytes'])} in the file, for the next run too")


def again(folder: RunFolder) -> str:
    """The command that continues a run."""
    return f"moesmith dpo {folder.config} --resume"


def say_result(result: DPOResult, folder: RunFolder) -> None:
    """How it ended, what was written, and what to do next."""
    if not result.finished:
        console.say(f"stopped after step {result.steps:,}, nothing lost · continue: {again(folder)}")
        return
    say_computed(result)
    say_done(result, folder)
    first, best, last = result.first_eval_loss, result.best_eval_loss, result.last_eval_loss
    if first is not None and best is not None and last is not None:
        console.row(
            "loss",
            f"held-out {first:.3f} before → {best:.3f} best (step {result.best_step}) → {last:.3f} last",
        )
        console.row("", figures(result))
        if best >= first and not result.warnings:
            console.warn(
                "no adapter of this run is better on the held-out pairs than the model before: more pairs, "
                "or another train.lr"
            )
    say_written(result)


def figures(result: DPOResult) -> str:
    """Margin, accuracy and distance of the best adapter on the held-out pairs."""
    parts = []
    if result.best_margin is not None:
        parts.append(f"margin {result.best_margin:+.3f}")
    if result.best_accuracy is not None:
        parts.append(f"the chosen one preferred in {100 * result.best_accuracy:.0f} %")
    if result.best_kl is not None and math.isfinite(result.best_kl):
        parts.append(f"KL to the model before {result.best_kl:.4f} nats per token")
    return " · ".join(parts)
