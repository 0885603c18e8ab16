"""Fine-tune an adapter on your chats: QLoRA over packed experts.

Give a YAML file with the keys below (examples/sft.yaml has them all, commented); flags win over it. The base
model stays packed and frozen, the adapter with the lowest held-out loss ends up in OUT/best, the newest in
OUT/last. --preview shows which tokens are learned, --dry-run counts everything and trains nothing, --resume
continues.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.data.settings import DataConfig
from moesmith.jobs import _fit
from moesmith.jobs._train import (
    QuantConfig,
    check_adapter,
    check_base,
    check_no_lora,
    is_over,
    load_model,
    load_tokenizer,
    say_done,
    say_model,
    say_plan,
    say_resume,
    say_train,
    say_written,
    settled,
    train_measured,
)
from moesmith.train.settings import RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moesmith.data.prepare import Prepared
    from moesmith.plan.footprint import Work
    from moesmith.train.folder import RunFolder
    from moesmith.train.sft import SFTResult

POSITIONAL = ("config",)
JSON = True
RANKS = True  # torchrun may start it
EXAMPLE = "moesmith sft examples/sft.yaml --train.lr 2e-4"
OUT_OF_MEMORY = "the model itself does not fit: quant.scheme=nf4, quant.linears=nf4, quant.double_quant=true"

PREVIEWED = 3  # rows that --preview shows when no number is given


class Config(RunSettings):
    model: str
    """Model folder or hub name, packed by `moesmith quantize` or not."""
    adapter: str | None = None
    """Train this adapter further instead of a fresh one; its rank and places are then its own."""
    quant: QuantConfig = QuantConfig()
    data: DataConfig
    preview: bool | int = False
    """Print so many rows with the learned tokens marked (3 without a number), and stop."""
    dry_run: bool = False
    """Count rows and parameters, estimate memory, and stop before training."""


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused: options that contradict each other, no such adapter."""
    _fit.check(cfg)
    if cfg.adapter is not None:
        check_adapter(cfg.adapter)
        check_no_lora(cfg.adapter, cfg.lora)


def run(cfg: Config) -> None:
    from moesmith.data.prepare import fingerprint
    from moesmith.train.adapters import continue_from
    from moesmith.train.folder import RunFolder
    from moesmith.train.sft import Session

    folder = RunFolder(cfg.out)
    given = set(cfg.quant.model_fields_set)
    if cfg.resume:
        _fit.take_chosen(cfg, folder.config)
        cfg.quant = settled(cfg.quant, cfg.model, cfg.adapter)
    if not (cfg.preview or cfg.dry_run) and is_over(folder, cfg):
        return
    tokenizer = load_tokenizer(cfg.model, cfg.adapter)
    prepared = read_data(cfg, tokenizer)
    if cfg.preview:
        show_preview(prepared, tokenizer, PREVIEWED if cfg.preview is True else cfg.preview)
        return
    if cfg.resume:
        folder.check_data(fingerprint(prepared.train, prepared.held_out))
    cfg.quant = settled(cfg.quant, cfg.model, cfg.adapter)
    if cfg.fit == "auto":
        _fit.choose(cfg, cfg.model, work_of(cfg, prepared), given, packing=cfg.data.packing)
    _fit.enforce(cfg)
    model, base = load_model(cfg.model, cfg.quant, cfg.train.dtype, cfg.experts, cfg.train.expert_parallel)
    with _fit.lent(model):
        if cfg.adapter is not None:
            check_base(cfg.adapter, base, cfg.model)
            model = continue_from(model, cfg.adapter)
        say_model(model)
        session = Session(
            model, tokenizer, prepared.train, prepared.held_out, cfg, base=base,
            pack_to=cfg.data.max_length if cfg.data.packing else None, data_facts=data_facts(prepared),
        )  # fmt: skip
        say_train(session, what="packed sequences" if session.pack_to else "rows")
        say_plan(session)
        if cfg.dry_run:
            console.say("dry run: nothing was trained, nothing was written")
            console.emit({"data": session.data, "plan": asdict(session.plan)})
            return
        if cfg.resume:
            say_resume(folder)
        result = train_measured(session)
        say_result(result, folder)
    console.emit({"data": session.data, "plan": asdict(session.plan), "result": result.facts()})


def work_of(cfg: Config, prepared: Prepared) -> Work:
    """What a step has to take."""
    longest = cfg.data.max_length if cfg.data.packing else max(map(len, prepared.train), default=1)
    learned = longest if cfg.data.packing else max((e.learned for e in prepared.train), default=1)
    return _fit.work_of(cfg, "train", longest, learned, cfg.adapter)


# ---------------------------------------------------------------- data


def read_data(cfg: Config, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Read, mask and count the rows, and say the counts."""
    from moesmith.data.prepare import describe, prepare

    prepared = prepare(tokenizer, cfg.data, cfg.seed)
    for i, line in enumerate(describe(prepared, cfg.data.train_on)):
        console.row("" if i else "data", line)
    return prepared


def data_facts(prepared: Prepared) -> dict[str, Any]:
    """Where the rows went, for data.json."""
    held_out = prepared.eval_counts.facts() if prepared.eval_counts else None
    return {"rows": prepared.counts.facts(), "held_out_rows": held_out}


def show_preview(prepared: Prepared, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Print the first rows with the learned tokens coloured, or in « » when colours cannot be shown."""
    from moesmith.data.preview import preview

    colour = console.stdout().is_terminal
    for example in prepared.train[:rows]:
        console.say()
        console.say(preview(tokenizer, example, colour))
    console.say("coloured tokens are learned" if colour else "« » tokens are learned", style="dim")


# ---------------------------------------------------------------- what the terminal shows


def say_result(result: SFTResult, folder: RunFolder) -> None:
    """How it ended, what was written, and what to do next."""
    if not result.finished:
        again = f"moesmith sft {folder.config} --resume"
        console.say(f"stopped after step {result.steps:,}, nothing lost · continue: {again}")
        return
    say_done(result, folder)
    first, best, last = result.first_eval_loss, result.best_eval_loss, result.last_eval_loss
    if first is not None and best is not None and last is not None:
        console.row(
            "loss",
            f"held-out {first:.3f} before → {best:.3f} best (step {result.best_step}) → {last:.3f} last",
        )
        if best >= first:
            console.warn("no adapter of this run is better on the held-out rows than the model without one")
    say_written(result)
