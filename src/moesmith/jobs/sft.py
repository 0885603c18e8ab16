"""Fine-tune an adapter on your chats: QLoRA over packed experts.

Give a YAML file with the keys below (examples/sft.yaml has them all, commented); flags win over it. The base
model stays packed and frozen, the adapter with the lowest held-out loss ends up in OUT/best, the newest in
OUT/last. --preview shows which tokens are learned, --dry-run counts everything and trains nothing, --resume
continues.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Literal

from moesmith import console
from moesmith.config import JobConfig
from moesmith.data.settings import DataConfig
from moesmith.errors import UserError
from moesmith.train.settings import RunSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moesmith.data.prepare import Prepared
    from moesmith.train.folder import RunFolder
    from moesmith.train.sft import Session, SFTResult

POSITIONAL = ("config",)
JSON = True
EXAMPLE = "moesmith sft examples/sft.yaml --train.lr 2e-4"
OUT_OF_MEMORY = "the model itself does not fit: quant.scheme=nf4, quant.linears=nf4, quant.double_quant=true"

PREVIEWED = 3  # rows that --preview shows when no number is given


class QuantConfig(JobConfig):
    """How a model that is not packed yet is held. One that is packed on disk is taken as it is."""

    scheme: Literal["nf4", "fp4", "int8", "fp8", "bf16", "fp16"] = "nf4"
    """Storage of the experts: nf4, fp4, int8, fp8 in blocks; bf16 and fp16 keep them whole."""
    linears: Literal["nf4", "int8"] | None = None
    """Attention, shared experts and dense MLPs: nf4 or int8 by bitsandbytes, none leaves them."""
    double_quant: bool = False
    """Store the block scales in 8 bits too: 4.13 instead of 4.5 bits per weight."""
    blocksize: int = 64
    """Weights per scale."""


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


def run(cfg: Config) -> None:
    from moesmith.data.prepare import fingerprint
    from moesmith.train.folder import RunFolder
    from moesmith.train.sft import Session

    folder = RunFolder(cfg.out)
    if not (cfg.preview or cfg.dry_run):
        folder.check(cfg, cfg.resume, cfg.overwrite)
        if cfg.resume and folder.result.exists():
            console.say(f"{folder.path} is finished: there is nothing left to resume")
            return
    tokenizer = load_tokenizer(cfg.model)
    prepared = read_data(cfg, tokenizer)
    if cfg.preview:
        show_preview(prepared, tokenizer, PREVIEWED if cfg.preview is True else cfg.preview)
        return
    if cfg.resume:
        folder.check_data(fingerprint(prepared.train, prepared.held_out))
    model, base = load_model(cfg)
    say_model(model)
    session = Session(
        model, tokenizer, prepared.train, prepared.held_out, cfg,
        pack_to=cfg.data.max_length if cfg.data.packing else None, base=base, data_facts=data_facts(prepared),
    )  # fmt: skip
    say_plan(session, cfg)
    if cfg.dry_run:
        console.say("dry run: nothing was trained, nothing was written")
        console.emit({"data": session.data, "plan": asdict(session.plan)})
        return
    if cfg.resume:
        checkpoint = folder.newest_checkpoint()
        console.say(
            f"continuing from {checkpoint}"
            if checkpoint
            else "no checkpoint yet: starting from the beginning"
        )
    result = session.train()
    say_result(result, folder)
    console.emit({"data": session.data, "plan": asdict(session.plan), "result": result.facts()})


# ---------------------------------------------------------------- data


def load_tokenizer(model: str) -> PreTrainedTokenizerBase:
    """The model's tokenizer, before its weights are read: data is checked first."""
    from transformers import AutoTokenizer

    from moesmith.models.checkpoint import Checkpoint, check_architecture, resolve

    folder = resolve(model)
    checkpoint = Checkpoint.open(folder)
    check_architecture(checkpoint.config)
    if not checkpoint.has_tokenizer:
        raise UserError(
            f"{folder} has no tokenizer", "copy tokenizer.json and tokenizer_config.json of the model there"
        )
    return AutoTokenizer.from_pretrained(folder)


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


# ---------------------------------------------------------------- model


def load_model(cfg: Config) -> tuple[Any, dict[str, Any]]:
    """The model with packed experts and perhaps an adapter, and the record of the base it is."""
    import torch

    from moesmith.models.checkpoint import Checkpoint, base_record, local_folder, model_class, resolve
    from moesmith.train.adapters import continue_from

    folder = resolve(cfg.model)
    checkpoint = Checkpoint.open(folder)
    if not console.stderr().is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()
    model = model_class(checkpoint.config).from_pretrained(
        folder,
        quantization_config=packing(cfg, checkpoint),
        dtype=getattr(torch, cfg.train.dtype),
        device_map={"": 0} if torch.cuda.is_available() else None,
    )
    place = str(folder.resolve()) if local_folder(cfg.model) is not None else cfg.model
    base = base_record(model, place)
    if cfg.adapter is not None:
        if cfg.lora.model_fields_set:
            asked = ", ".join(f"lora.{name}" for name in sorted(cfg.lora.model_fields_set))
            raise UserError(
                f"adapter={cfg.adapter} has its own rank and places, but {asked} is given too",
                "leave one out",
            )
        model = continue_from(model, cfg.adapter)
    return model, base


def packing(cfg: Config, checkpoint: Any) -> Any:
    """How to pack a model that is in 16 bits on disk; None for one that is packed as asked for already."""
    from moesmith.experts.quantizer import ExpertsConfig

    stored = checkpoint.quantization
    if stored is None:
        quant = cfg.quant
        return ExpertsConfig(
            quant.scheme, linears=quant.linears, double_quant=quant.double_quant, blocksize=quant.blocksize
        )
    if not checkpoint.is_packed:
        raise UserError(
            f"{cfg.model} is quantised already ({stored.get('quant_method')})",
            "give the original 16-bit checkpoint",
        )
    for name in sorted(cfg.quant.model_fields_set):
        wanted, there = getattr(cfg.quant, name), stored.get(name)
        if wanted != there:
            raise UserError(
                f"quant.{name}={wanted}: {cfg.model} is packed with {name}={there}",
                "leave quant out to take it as it is, or give the original 16-bit checkpoint",
            )
    return None


# ---------------------------------------------------------------- what the terminal shows


def say_model(model: Any) -> None:
    """Matrices by scheme, and what was asked for and could not be packed."""
    from moesmith.experts.report import count

    counts = count(model)
    packed = [
        f"{n:,} expert matrices {'in' if s in KEPT else 'packed to'} {s}" for s, n in counts.matrices.items()
    ]
    console.row(
        "model", " · ".join([*packed, f"{len(counts.not_packed)} left in 16 bits that were asked for"])
    )


KEPT = ("bf16", "fp16", "16-bit")


def say_plan(session: Session, cfg: Config) -> None:
    """Trainable parameters by placement, steps, and the memory a step is expected to take."""
    from moesmith.train import memory

    plan, train = session.plan, cfg.train
    adapters = plan.adapters
    share = 100 * adapters.total / (adapters.total + adapters.frozen)
    rank = session.model.peft_config[session.model.active_adapter].r
    places = " + ".join(f"{name} {n:,}" for name, n in adapters.trainable.items())
    frozen = console.count(adapters.frozen)
    console.row(
        "train", f"{places}, r={rank}: {adapters.total:,} parameters ({share:.2g} %) · frozen {frozen}"
    )
    what = "packed sequences" if session.pack_to else "rows"
    steps = (
        f"{plan.steps:,} steps of {train.batch_size} × {train.grad_accum} {what}, {plan.sequences:,} an epoch"
    )
    evaluation = f"evaluation every {plan.eval_steps:,}, " if session.held_out else ""
    console.row("", f"{steps} · {evaluation}checkpoint every {plan.save_steps:,}")
    limit = memory.limit()
    of = f" of {console.size(limit)}" if limit else ""
    console.row("plan", f"peak about {console.size(plan.memory.peak)}{of}: {plan.memory}")
    for note in session.notes:
        console.warn(note)
    if limit and plan.memory.peak > limit:
        packed = session.base.get("linears") is not None
        ways = memory.advice(plan.memory, train, session.pack_to is not None, packed)
        console.warn("this may not fit" + (f"; change first: {ways[0]}" if ways else ""))


def say_result(result: SFTResult, folder: RunFolder) -> None:
    """How it ended, what was written, and what to do next."""
    if not result.finished:
        again = f"moesmith sft {folder.config} --resume"
        console.say(f"stopped after step {result.steps:,}, nothing lost · continue: {again}")
        return
    done = [f"{result.steps:,} steps in {console.duration(result.seconds)}", f"{result.tokens:,} tokens"]
    if result.seconds:
        done.append(f"{result.tokens / result.seconds:,.0f} tok/s")
    done.append(f"peak {console.size(result.peak_bytes)}")
    if result.skipped:
        done.append(f"{result.skipped} skipped as not finite, see {folder.nonfinite}")
    if result.stopped:
        done.append(result.stopped)
    console.row("done", " · ".join(done))
    first, best, last = result.first_eval_loss, result.best_eval_loss, result.last_eval_loss
    if first is not None and best is not None and last is not None:
        console.row(
            "loss",
            f"held-out {first:.3f} before → {best:.3f} best (step {result.best_step}) → {last:.3f} last",
        )
        if best >= first:
            console.warn("no adapter of this run is better on the held-out rows than the model without one")
    if result.best is not None:
        console.row("written", f"{result.best}, {result.last}")
    else:
        console.row("written", f"{result.last} (no best one: no rows were held out)")
    console.next_command(f"moesmith chat --adapter {result.best or result.last}")
