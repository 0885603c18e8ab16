"""What the commands that train an adapter share: the model, the adapter it starts from, and what is said."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesmith import console, ranks
from moesmith.config import JobConfig, no_such_file
from moesmith.errors import UserError
from moesmith.jobs import _fit

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from moesmith.train.folder import RunFolder
    from moesmith.train.settings import ExpertsPlace, LoraSettings, RunSettings
    from moesmith.train.sft import Session, SFTResult


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


# ---------------------------------------------------------------- adapter and tokenizer


def check_adapter(adapter: str) -> None:
    """Refuse a folder that holds no adapter, before anything is loaded.

    Raises:
        UserError: no such folder, or none with an adapter in it.
    """
    folder = Path(adapter).expanduser()
    if not folder.exists():
        if adapter.count("/") != 1 or adapter.startswith((".", "~", "/")):
            raise no_such_file(folder, "adapter")
        return  # a hub name
    if not (folder / "adapter_config.json").is_file():
        inner = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
        hint = f"did you mean {inner[0]}?" if inner else "an adapter folder holds adapter_config.json"
        raise UserError(f"adapter={adapter} holds no adapter (no adapter_config.json)", hint)


def check_no_lora(adapter: str, lora: LoraSettings) -> None:
    """An adapter that is trained further has its own rank and places.

    Raises:
        UserError: some were given too.
    """
    if lora.model_fields_set:
        asked = ", ".join(f"lora.{name}" for name in sorted(lora.model_fields_set))
        raise UserError(
            f"adapter={adapter} has its own rank and places, but {asked} is given too", "leave one out"
        )


def recorded_base(adapter: str | None) -> dict[str, Any]:
    """What a local adapter says about the model it was trained on; empty when nothing says it."""
    from moesmith.models.checkpoint import RECORD, read_json

    if adapter is None or not (record := Path(adapter).expanduser() / RECORD).is_file():
        return {}
    return read_json(record).get("base") or {}


def check_base(adapter: str, base: dict[str, Any], model: str) -> None:
    """Refuse an adapter that was trained on another base than the one that is loaded.

    Args:
        base: the record of the loaded model.
        model: its name, for the message.

    Raises:
        UserError: it was.
    """
    recorded = recorded_base(adapter)
    if not recorded.get("fingerprint"):
        console.warn(f"{adapter} does not say which model it was trained on: nothing checks that it fits")
    elif recorded["fingerprint"] != base["fingerprint"]:
        words = [recorded.get("scheme"), "double quant" if recorded.get("double_quant") else None]
        how = ", ".join(word for word in words if word)
        raise UserError(
            f"{adapter} was trained on another base than {model}",
            f"its base: {recorded['path']}" + (f" ({how})" if how else ""),
        )


def load_tokenizer(model: str, adapter: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer, before the weights are read: data is checked first.

    An adapter brings the tokenizer and the chat template it was trained with; otherwise it is the model's.
    """
    from transformers import AutoTokenizer

    from moesmith.models.checkpoint import Checkpoint, check_architecture, has_tokenizer, resolve

    folder = resolve(model)
    checkpoint = Checkpoint.open(folder)
    check_architecture(checkpoint.config)
    beside = Path(adapter).expanduser() if adapter is not None else None
    if beside is not None and has_tokenizer(beside):
        return AutoTokenizer.from_pretrained(beside)
    if not checkpoint.has_tokenizer:
        raise UserError(
            f"{folder} has no tokenizer", "copy tokenizer.json and tokenizer_config.json of the model there"
        )
    return AutoTokenizer.from_pretrained(folder)


# ---------------------------------------------------------------- model


def settled(quant: QuantConfig, name: str, adapter: str | None) -> QuantConfig:
    """What `quant` leaves open, as the model on disk is packed, else as the adapter's base was.

    So a run's config.yaml says how its model really is held.
    """
    from moesmith.models.checkpoint import Checkpoint, resolve

    checkpoint = Checkpoint.open(resolve(name))
    known = checkpoint.quantization if checkpoint.is_packed else recorded_base(adapter)
    values = quant.model_dump()
    for field in values.keys() - quant.model_fields_set:
        if known and known.get(field) is not None:
            values[field] = known[field]
    return QuantConfig(**values)


def load_model(
    name: str,
    quant: QuantConfig,
    dtype: str,
    experts: ExpertsPlace | None = None,
    expert_parallel: int = 1,
) -> tuple[Any, dict[str, Any]]:
    """The model with packed experts, and the record of the base it is.

    Args:
        name: a folder or a hub name.
        quant: how it is packed if it is not yet; must be how it is if it is.
        experts: where its experts wait; None: on the device.
        expert_parallel: processes that share them.

    Raises:
        UserError: experts on disk of a model that is not packed there; a profile of another model.
    """
    import torch

    from moesmith.models.checkpoint import Checkpoint, base_record, local_folder, model_class, resolve

    folder = resolve(name)
    checkpoint = Checkpoint.open(folder)
    if not console.stderr().is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()
    if experts is not None:
        _fit.check_checkpoint(experts, name, checkpoint)
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    here: dict[str, Any] = {"device_map": None if device is None else {"": device}}
    if experts is not None and experts.offloaded:
        here = {"device_map": None}  # in RAM or memory-mapped; `place` moves what belongs on the device
    elif expert_parallel > 1:
        from moesmith.train import expert_parallel as ep

        ep.check(checkpoint.config, expert_parallel)
        here = ep.loading(expert_parallel)
    model = model_class(checkpoint.config).from_pretrained(
        folder, quantization_config=packing(name, quant, checkpoint), dtype=getattr(torch, dtype), **here
    )
    place = str(folder.resolve()) if local_folder(name) is not None else name
    base = base_record(model, place)
    if experts is not None and experts.offloaded:
        _fit.place(model, experts, device)
    return model, base


def packing(name: str, quant: QuantConfig, checkpoint: Any) -> Any:
    """How to pack a model that is in 16 bits on disk; None for one that is packed as asked for already."""
    from moesmith.experts.quantizer import ExpertsConfig

    stored = checkpoint.quantization
    if stored is None:
        return ExpertsConfig(
            quant.scheme, linears=quant.linears, double_quant=quant.double_quant, blocksize=quant.blocksize
        )
    if not checkpoint.is_packed:
        raise UserError(
            f"{name} is quantised already ({stored.get('quant_method')})",
            "give the original 16-bit checkpoint",
        )
    for field in sorted(quant.model_fields_set):
        wanted, there = getattr(quant, field), stored.get(field)
        if wanted != there:
            raise UserError(
                f"quant.{field}={wanted}: {name} is packed with {field}={there}",
                "leave quant out to take it as it is, or give the original 16-bit checkpoint",
            )
    return None


# ---------------------------------------------------------------- what the terminal shows


KEPT = ("bf16", "fp16", "16-bit")


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


def say_train(session: Session, over: str | None = None, what: str = "rows") -> None:
    """Trainable parameters by placement, and the steps.

    Args:
        over: a frozen adapter under the trained one.
        what: what a batch consists of.
    """
    plan, train = session.plan, session.cfg.train
    adapters = plan.adapters
    share = 100 * adapters.total / (adapters.total + adapters.frozen)
    rank = session.model.peft_config[session.model.active_adapter].r
    places = " + ".join(f"{name} {n:,}" for name, n in adapters.trainable.items())
    frozen = console.count(adapters.frozen) + (f", {over} among them" if over else "")
    console.row(
        "train", f"{places}, r={rank}: {adapters.total:,} parameters ({share:.2g} %) · frozen {frozen}"
    )
    steps = (
        f"{plan.steps:,} steps of {train.batch_size} × {train.grad_accum} {what}, {plan.sequences:,} an epoch"
    )
    if ranks.world() > 1:
        steps += f" · over {ranks.world()} processes"
    evaluation = f"evaluation every {plan.eval_steps:,}, " if session.held_out else ""
    console.row("", f"{steps} · {evaluation}checkpoint every {plan.save_steps:,}")


def say_plan(session: Session) -> None:
    """The memory a step is expected to take, and what is odd but allowed."""
    from moesmith.train import memory

    plan = session.plan
    limit = _fit.limit(session.cfg)
    of = f" of {console.size(limit)}" if limit else ""
    console.row("plan", f"peak about {console.size(plan.memory.peak)}{of}: {plan.memory}")
    if plan.memory.ram:
        parts = " · ".join(f"{name} {console.size(n)}" for name, n in plan.memory.ram.items())
        console.row("", f"RAM {console.size(sum(plan.memory.ram.values()))}: {parts}")
    for note in session.notes:
        console.warn(note)
    if limit and plan.memory.own > limit:
        packed = session.base.get("linears") is not None
        ways = memory.advice(plan.memory, session.cfg.train, session.pack_to is not None, packed)
        console.warn("this may not fit" + (f"; change first: {ways[0]}" if ways else ""))


def train_measured(session: Session) -> Any:
    """Train, with the peak of its memory watched; what was moved, and a peak above the plan, are said."""
    from moesmith.jobs._memory import PeakMemory

    if session.cfg.train.layer_major:
        _fit.keep_heap_whole()
    with PeakMemory() as peak:
        result = session.train()
    if peak.nbytes > result.peak_bytes:
        result.peak_bytes = peak.nbytes
        if result.finished and session.folder.result.exists():
            session.folder.write_result(result.facts())
    _fit.write_transfers(session.cfg, session.model)
    _fit.say_difference(result, session.plan.memory, _fit.limit(session.cfg))
    return result


def say_resume(folder: RunFolder) -> None:
    """Where a resumed run goes on."""
    checkpoint = folder.newest_checkpoint()
    console.say(
        f"continuing from {checkpoint}" if checkpoint else "no checkpoint yet: starting from the beginning"
    )


def is_over(folder: RunFolder, cfg: RunSettings) -> bool:
    """Check the folder before anything is loaded. True, and said, when there is nothing left to resume."""
    folder.check(cfg, cfg.resume, cfg.overwrite)
    if cfg.resume and folder.result.exists():
        console.say(f"{folder.path} is finished: there is nothing left to resume")
        return True
    return False


def say_done(result: SFTResult, folder: RunFolder) -> None:
    """Steps, speed and memory of a run that is over."""
    done = [f"{result.steps:,} steps in {console.duration(result.seconds)}", f"{result.tokens:,} tokens"]
    if result.seconds:
        done.append(f"{result.tokens / result.seconds:,.0f} tok/s")
    done.append(f"peak {console.size(result.peak_bytes)}")
    if result.skipped:
        done.append(f"{result.skipped} skipped as not finite, see {folder.nonfinite}")
    if result.stopped:
        done.append(result.stopped)
    console.row("done", " · ".join(done))


def say_written(result: SFTResult) -> None:
    """What was written, and what to do next."""
    if result.best is not None:
        console.row("written", f"{result.best}, {result.last}")
    else:
        console.row("written", f"{result.last} (no best one: no rows were held out)")
    console.next_command(f"moesmith chat --adapter {result.best or result.last}")
