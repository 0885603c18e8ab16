"""Will it fit, and how: memory of every way to run a model, the fastest that fits, the command to run it.

Works from config.json and the safetensors headers alone, like `inspect`. Without --vram it plans for this
machine; with it, for a card of that size. Times come from rates that --measure takes once (under 20 s) and
remembers; before that from cautious defaults, and the page says so.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from moesmith import console
from moesmith.config import JobConfig
from moesmith.errors import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from moesmith.plan.choose import Budget, Planned
    from moesmith.plan.footprint import Work
    from moesmith.plan.machine import Machine
    from moesmith.plan.shape import Shape

POSITIONAL = ("model",)
JSON = True
SEAMS = False
EXAMPLE = "moesmith plan Qwen/Qwen3-30B-A3B --vram 12GB --ram 32GB"

WIDTH = 11  # of the labels
ROWS = 6  # of the table of choices
KINDS = {"sft": "train", "dpo": "dpo", "chat": "decode", "serve": "serve"}


class Config(JobConfig):
    model: str
    """Model folder, a folder holding only config.json, or a hub name."""
    for_: Literal["sft", "dpo", "chat", "serve"] = "sft"
    """What it is for."""
    vram: str | None = None
    """GPU memory to plan for, like 12GB; without it, this machine's."""
    ram: str | None = None
    """RAM to plan for; without it, this machine's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if --vram is given or one is there."""
    seq: int = 2048
    """Tokens of a row (sft, dpo), or of a prompt (chat, serve)."""
    batch: int = 1
    """Rows of a forward pass at most (sft, dpo)."""
    grad_accum: int = 16
    """Forward passes of an optimizer step, at --batch rows."""
    lora_r: int = 16
    """Rank of the adapter (sft, dpo)."""
    lora_targets: list[str] = ["experts", "attention"]
    """Where it goes."""
    context: int = 4096
    """Tokens of a conversation (chat, serve)."""
    streams: int = 8
    """Answers written at once (serve)."""
    scheme: Literal["nf4", "fp4", "int8", "fp8", "bf16"] | None = None
    """Storage of the experts; without it, chosen."""
    linears: Literal["nf4", "int8", "none"] | None = None
    """Storage of attention and dense MLPs; without it, chosen."""
    double_quant: bool | None = None
    """Block scales in 8 bits too; without it, chosen."""
    experts: Literal["device", "ram", "disk"] | None = None
    """Where the experts lie; without it, chosen."""
    checkpointing: bool | None = None
    """Recompute activations in backward; without it, chosen (sft, dpo)."""
    measure: bool = False
    """Measure this machine's rates first."""


def check(cfg: Config) -> None:
    """Refuse sizes that are none and a folder that is not there, before the model is built."""
    from moesmith.models.checkpoint import Checkpoint, local_folder
    from moesmith.plan.machine import parse_size

    for text in (cfg.vram, cfg.ram):
        if text is not None:
            parse_size(text)
    if cfg.device == "cpu" and cfg.vram is not None:
        raise UserError("--vram is of a GPU, --device cpu has none", "give --ram")
    for name in ("seq", "batch", "grad_accum", "lora_r", "context", "streams"):
        if getattr(cfg, name) < 1:
            raise UserError(f"{name}={getattr(cfg, name)} must be at least 1")
    if local_folder(cfg.model) is not None:
        Checkpoint.open(cfg.model, weights=False)


def run(cfg: Config) -> None:
    from moesmith.models.checkpoint import Checkpoint, check_architecture
    from moesmith.plan.choose import ranked
    from moesmith.plan.shape import Shape

    checkpoint = Checkpoint.open(cfg.model, weights=False)
    check_architecture(checkpoint.config)
    shape = Shape.of_checkpoint(checkpoint)
    budget, machine = surroundings(cfg)
    work = work_of(cfg)
    plans = ranked(shape, work, budget, machine, settled(cfg))
    console.emit(
        {
            "model": cfg.model,
            "budget": {"device": budget.device_bytes, "ram": budget.ram_bytes, "gpu": budget.on_gpu},
            "machine": vars(machine),
            "plan": plans[0].facts(),
            "others": [plan.facts() for plan in distinct(plans, shape)[1:ROWS]],
        }
    )
    show(cfg, shape, work, budget, machine, plans)


# ---------------------------------------------------------------- what was asked


def surroundings(cfg: Config) -> tuple[Budget, Machine]:
    """What there is, and how fast it is.

    Raises:
        UserError: a GPU is asked for by --device cuda alone, and there is none.
    """
    import torch

    from moesmith.plan.choose import Budget
    from moesmith.plan.machine import assumed, known, measure, parse_size

    has_gpu = torch.cuda.is_available()
    on_gpu = cfg.device != "cpu" and (cfg.device == "cuda" or cfg.vram is not None or has_gpu)
    if on_gpu and not has_gpu and cfg.vram is None:
        raise UserError("torch sees no GPU here", "say how large the card is: --vram 12GB")
    if cfg.measure:
        machine = measure(has_gpu)
        if machine.on_gpu != on_gpu:
            console.warn("measured the CPU; the times below are for a card, by cautious defaults")
            machine = assumed(on_gpu)
    else:
        machine = known(on_gpu)
    vram, ram = (parse_size(text) if text is not None else None for text in (cfg.vram, cfg.ram))
    return Budget.of_machine(vram, ram, on_gpu), machine


def work_of(cfg: Config) -> Work:
    """What is to be done, in the planner's words."""
    from moesmith.plan.footprint import Work

    kind: Any = KINDS[cfg.for_]
    training = kind in ("train", "dpo")
    return Work(
        kind=kind, seq=cfg.seq, batch=cfg.batch * cfg.grad_accum, lora_r=cfg.lora_r,
        lora_targets=tuple(cfg.lora_targets) if training else (), context=max(cfg.context, cfg.seq),
        streams=cfg.streams,
    )  # fmt: skip


def settled(cfg: Config) -> dict[str, Any]:
    """What the user has settled, by field of `Choice`."""
    found: dict[str, Any] = {}
    for name, value in (
        ("scheme", cfg.scheme), ("double_quant", cfg.double_quant), ("homes", cfg.experts),
        ("checkpointing", cfg.checkpointing),
    ):  # fmt: skip
        if value is not None:
            found[name] = value
    if cfg.linears is not None:
        found["linears"] = None if cfg.linears == "none" else cfg.linears
    if cfg.for_ in ("sft", "dpo"):
        found["batch_size"], found["grad_accum"] = cfg.batch, cfg.grad_accum
    return found


# ---------------------------------------------------------------- the page

COLOURS = {
    "experts": "blue", "dense": "cyan", "embeddings": "bright_cyan", "adapters": "green",
    "gradients+optimizer": "bright_green", "activations": "magenta", "logits": "bright_magenta",
    "kv cache": "yellow", "staging": "bright_blue", "process": "bright_black",
}  # fmt: skip
SHADES = "█▓▒░"  # neighbours differ without colours too
BAR = 60


def show(
    cfg: Config, shape: Shape, work: Work, budget: Budget, machine: Machine, plans: list[Planned]
) -> None:
    """The page a person reads."""
    from moesmith.plan.choose import words

    winner = plans[0]
    kind = f"{console.size(budget.device_bytes)} of " + ("GPU memory" if budget.on_gpu else "RAM")
    if budget.on_gpu:
        kind += f", {console.size(budget.ram_bytes)} of RAM"
    console.say(f"{shape.model_type} for {cfg.for_} in {kind}", style="bold")
    console.row("plan", f"{words(winner.choice, shape)}{_training_words(winner, work)}", WIDTH)
    console.row("why", winner.why, WIDTH)
    console.say()
    _show_budget(winner.footprint.device, budget.device_bytes, "peak", "GPU" if budget.on_gpu else "RAM")
    if budget.on_gpu:
        _show_budget(winner.footprint.ram, budget.ram_bytes, "peak", "RAM")
    elif winner.footprint.mapped:
        mapped = sum(winner.footprint.mapped.values())
        console.row(
            "", f"{console.size(mapped)} of it memory-mapped: the system may drop it and read it again", WIDTH
        )
    console.say()
    console.row("time", _time_words(winner, work), WIDTH)
    said = f"measured on {machine.name}" if machine.measured else "cautious defaults, not measured"
    here = "" if machine.measured else f" · for this machine's: moesmith plan {cfg.model} --measure"
    console.row("rates", said + here, WIDTH)
    console.say()
    _show_choices(shape, work, plans)
    console.next_command(*commands(cfg, shape, winner))


def _training_words(planned: Planned, work: Work) -> str:
    choice = planned.choice
    if work.kind not in ("train", "dpo"):
        return ""
    said = f" · {choice.batch_size} × {choice.grad_accum} rows a step"
    said += " · checkpointing" if choice.checkpointing else " · no checkpointing"
    if choice.layer_major:
        said += " · layer-major"
    return said + (f" · {choice.optim}" if choice.optim != "adamw_torch" else "")


def _time_words(planned: Planned, work: Work) -> str:
    times = planned.times
    per = console.duration(times.seconds) if times.seconds >= 0.1 else f"{1000 * times.seconds:.0f} ms"
    unit = (
        "a step"
        if work.kind in ("train", "dpo")
        else "a token" + (f" of {work.streams}" if work.kind == "serve" else "")
    )
    moved = f", {console.size(times.moved)} of experts moved" if times.moved else ""
    return (
        f"about {per} {unit}, {console.count(times.tokens_per_second)} tok/s · bound by {times.bound}{moved}"
    )


def _show_budget(parts: Any, budget: int, label: str, kind: str) -> None:
    """A bar as long as the budget, and what each part of it is."""
    from rich.text import Text

    total = sum(parts.values())
    used = f"{console.size(total)} of {console.size(budget)} {kind}"
    bar = Text()
    scale = BAR / max(budget, total)
    end = drawn = 0
    legend = []
    for index, (name, nbytes) in enumerate(parts.items()):
        end += nbytes
        cells = round(end * scale) - drawn
        drawn += cells
        shade = SHADES[index % len(SHADES)]
        bar.append(shade * cells, style=COLOURS.get(name, "white"))
        legend.append(_key(shade, name, nbytes))
    bar.append("·" * max(0, BAR - drawn), style="dim")
    console.row(label, Text.assemble(bar, "  ", used), WIDTH)
    line = Text()
    for index, entry in enumerate(legend):
        if index:
            line.append(" · ")
        line.append_text(entry)
    console.row("", line, WIDTH)


def _key(shade: str, name: str, nbytes: int) -> Text:
    from rich.text import Text

    return Text.assemble((shade, COLOURS.get(name, "white")), f" {name} {console.size(nbytes)}")


def distinct(plans: list[Planned], shape: Shape) -> list[Planned]:
    """The first plan of every storage and place."""
    from moesmith.plan.choose import kind_of

    found: dict[Any, Planned] = {}
    for planned in plans:
        found.setdefault(kind_of(planned.choice), planned)
    return list(found.values())


def _show_choices(shape: Shape, work: Work, plans: list[Planned]) -> None:
    """What else fits, one line for every storage and place."""
    from moesmith.plan.choose import words

    rows = []
    for planned in distinct(plans, shape)[:ROWS]:
        seconds = planned.times.seconds
        per = console.duration(seconds) if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"
        ram = sum(planned.footprint.ram.values())
        rows.append(
            [
                words(planned.choice, shape, work.kind in ("train", "dpo")),
                console.size(planned.footprint.peak),
                console.size(ram) if ram else "",
                per,
            ]
        )
    header = ["what fits", "device", "RAM", "a step" if work.kind in ("train", "dpo") else "a token"]
    console.table(header, rows)
    console.say()


def commands(cfg: Config, shape: Shape, planned: Planned) -> list[str]:
    """How to run the plan."""
    choice, model = planned.choice, cfg.model
    found = []
    pack = [f"--scheme {choice.scheme}"] if choice.scheme != "nf4" else []
    pack += ["--double-quant"] if choice.double_quant else []
    pack += [f"--linears {choice.linears}"] if choice.linears else []
    if not shape.packed_on_disk and choice.scheme != "bf16":
        found.append(" ".join(["moesmith quantize", model, "--out packed/", *pack]))
        model = "packed/"
    place = []
    if choice.offloaded and isinstance(choice.homes, str):
        training = cfg.for_ in ("sft", "dpo")
        name = "--experts.{}" if training else "--{}"
        place.append(f"{'--experts.home' if training else '--experts'} {choice.homes}")
        for key in ("kept", "cache"):
            if getattr(choice, key):
                place.append(f"{name.format(key)} {getattr(choice, key)}")
        if training and choice.layer_major:
            place.append("--train.layer-major")
    if cfg.for_ in ("sft", "dpo"):
        if not choice.checkpointing:
            place.append("--train.gradient-checkpointing false")
        if choice.optim != "adamw_torch":
            place.append(f"--train.optim {choice.optim}")
        place.append(f"--train.batch-size {choice.batch_size} --train.grad-accum {choice.grad_accum}")
        place.append(f"--data.max-length {cfg.seq} --lora.r {cfg.lora_r}")
        found.append(" ".join([f"moesmith {cfg.for_} run.yaml --model {model}", *place]))
    else:
        found.append(" ".join([f"moesmith {cfg.for_} {model}", *place]))
    return found
