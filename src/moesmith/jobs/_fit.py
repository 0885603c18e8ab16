"""Fitting a run onto a machine: `fit: auto`, `vram`, `ram` and the `experts` block of sft and dpo.

`auto` asks the planner for the best choice within the budget, with everything the user gave held fixed, and
writes what it chose into the run's options. `place` puts a loaded model's experts where the options say.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from moesmith import console, ranks
from moesmith.config import write_atomically
from moesmith.errors import UserError
from moesmith.train.settings import ExpertsPlace, RunSettings

if TYPE_CHECKING:
    from moesmith.models.checkpoint import Checkpoint
    from moesmith.plan.choose import Planned
    from moesmith.plan.footprint import Work
    from moesmith.train.memory import MemoryPlan
    from moesmith.train.sft import SFTResult

TRANSFERS = "transfers.json"
M_MMAP_THRESHOLD, LARGE = -3, 1 << 18  # of glibc's malloc.h; bytes of a block that counts as large
FAR = 1.25  # times the plan, from which on a peak within its limits is worth a line

# Fields of the planner's Choice -> (section, field) of the options of a run.
FIELDS = {
    "scheme": ("quant", "scheme"),
    "double_quant": ("quant", "double_quant"),
    "linears": ("quant", "linears"),
    "blocksize": ("quant", "blocksize"),
    "homes": ("experts", "home"),
    "kept": ("experts", "kept"),
    "slots": ("experts", "slots"),
    "checkpointing": ("train", "gradient_checkpointing"),
    "optim": ("train", "optim"),
    "batch_size": ("train", "batch_size"),
    "grad_accum": ("train", "grad_accum"),
    "layer_major": ("train", "layer_major"),
}


# ---------------------------------------------------------------- before anything is loaded


def check(cfg: RunSettings) -> None:
    """Refuse options that contradict each other, before anything is loaded.

    Raises:
        UserError: experts that would be gone before their backward, places without experts in them, a size
            that is none, a GPU budget without a GPU.
    """
    from moesmith.plan.machine import parse_size

    place, train = cfg.experts, cfg.train
    if place.offloaded and not train.gradient_checkpointing:
        raise UserError(
            f"experts.home={_words(place)} with train.gradient_checkpointing=false: a layer's experts have "
            "left the device before its backward",
            "train.gradient_checkpointing=true, or leave experts.home out",
        )
    given = [name for name in ("kept", "slots", "profile") if getattr(place, name)]
    if given and not place.offloaded and ("home" in place.model_fields_set or cfg.fit == "none"):
        raise UserError(
            f"experts.{given[0]} is given, but all experts are on the device", "experts.home=ram, or disk"
        )
    if place.profile is not None and not place.kept and cfg.fit == "none":
        raise UserError("experts.profile says which experts to keep, but experts.kept is 0", "experts.kept=8")
    if place.offloaded and train.expert_parallel > 1:
        raise UserError(
            f"experts.home={_words(place)} with train.expert_parallel={train.expert_parallel}: each process "
            "holds its own experts, on its device",
            "leave one of them out",
        )
    for name in ("vram", "ram"):
        if (text := getattr(cfg, name)) is not None:
            try:
                parse_size(text)
            except UserError as error:
                raise UserError(f"{name}={text}: {error.message}", error.hint) from None
    if cfg.vram is not None and not _on_gpu():
        raise UserError(
            f"vram={cfg.vram}: there is no GPU here",
            "on a CPU, ram is the budget; `moesmith plan MODEL --vram 12GB` plans for another machine",
        )


def check_checkpoint(place: ExpertsPlace, name: str, checkpoint: Checkpoint) -> None:
    """Refuse experts on disk that are not packed there; verify the files if asked to.

    Raises:
        UserError: they are not, or a file is not what was written.
    """
    if "disk" in place.home and not checkpoint.is_packed:
        raise UserError(
            f"experts.home=disk: {name} is not packed on disk",
            f"moesmith quantize {name} --out {Path(name).name}-nf4, then give that folder as model",
        )
    if place.verify and checkpoint.folder is not None:
        from moesmith.models.checksums import verify

        verify(checkpoint.folder)


def take_chosen(cfg: Any, config: Path) -> None:
    """For a run that is resumed: what `fit: auto` chose when it began, from its config.yaml."""
    if cfg.fit != "auto" or not config.is_file():
        return
    saved = yaml.safe_load(config.read_text(encoding="utf-8"))
    for section, field in FIELDS.values():
        options = getattr(cfg, section)
        if field not in options.model_fields_set and field in (saved.get(section) or {}):
            setattr(options, field, saved[section][field])
    cfg.fit = "none"


# ---------------------------------------------------------------- --fit auto


def choose(cfg: Any, name: str, work: Work, given: set[str], packing: bool = False) -> Planned:
    """Let the planner settle what was not given, and say what it chose.

    Args:
        cfg: options of sft or dpo; what is chosen is written into them, and `fit` becomes none.
        name: the model.
        work: what a step has to take.
        given: options of `quant` that were given; a packed model or an adapter's base settles them all.
        packing: rows lie end to end, so a step cannot be cut into rows.

    Raises:
        UserError: nothing fits; the smallest need is said.
    """
    from moesmith.models.checkpoint import Checkpoint, resolve
    from moesmith.plan.choose import Budget, best
    from moesmith.plan.machine import parse_size
    from moesmith.plan.shape import Shape

    checkpoint = Checkpoint.open(resolve(name))
    vram, ram = (None if text is None else parse_size(text) for text in (cfg.vram, cfg.ram))
    budget = Budget.of_machine(vram=vram, ram=ram, on_gpu=_on_gpu(), disk=checkpoint.is_packed)
    budget = ranks.gather(budget)[0]  # all processes of a run choose the same
    if checkpoint.is_packed or cfg.adapter is not None:
        given = set(type(cfg.quant).model_fields)
    planned = best(
        Shape.of_checkpoint(checkpoint), work, budget, fixed=fixed_by(cfg, given, packing, budget.on_gpu)
    )
    write(cfg, planned.choice, budget.on_gpu)
    of = console.size(budget.device_bytes)
    console.row("fit", f"{describe(cfg)} · about {console.size(planned.footprint.peak)} of {of}")
    if planned.why:
        console.row("", planned.why)
    return planned


def fixed_by(cfg: Any, quant: set[str], packing: bool, on_gpu: bool) -> dict[str, Any]:
    """Fields of `Choice` that are not the planner's to choose: what was given, and what follows from it.

    Args:
        quant: the options of `quant` that count as given.
    """
    fixed: dict[str, Any] = {"chunked_loss": True, "cache": 0}
    for field, (section, name) in FIELDS.items():
        options = getattr(cfg, section)
        if name in (quant if section == "quant" else options.model_fields_set):
            fixed[field] = getattr(options, name)
    if "homes" in fixed:
        fixed["homes"] = homes_of(cfg.experts, on_gpu)
    if fixed.get("slots", 0) is None:
        del fixed["slots"]
    if "batch_size" in fixed or "grad_accum" in fixed:  # the rows of a step are what the user says
        fixed |= {"batch_size": cfg.train.batch_size, "grad_accum": cfg.train.grad_accum}
    if fixed.get("checkpointing") is False or cfg.train.expert_parallel > 1:
        fixed["homes"] = "device"
    if packing:
        fixed["layer_major"] = False
    return fixed


def homes_of(place: ExpertsPlace, on_gpu: bool) -> str | tuple[str, ...]:
    """Where the experts really are: on a CPU, RAM is the device unless `slots` asks for staging."""
    if on_gpu or place.slots is not None or "ram" not in place.home:
        return place.homes
    homes = tuple("device" if home == "ram" else home for home in place.home)
    return homes[0] if len(set(homes)) == 1 else homes


def write(cfg: Any, choice: Any, on_gpu: bool) -> None:
    """Put what was chosen into the options of the run."""
    for field, (section, name) in FIELDS.items():
        value = getattr(choice, field)
        if field == "homes":
            value = [value] if isinstance(value, str) else list(value)
        if field == "slots" and (not choice.offloaded or not on_gpu):
            continue
        if field == "kept" and not choice.offloaded:
            continue
        setattr(getattr(cfg, section), name, value)
    # What has no meaning now would be refused when the run's config.yaml is given again.
    if not choice.offloaded:
        cfg.experts.kept, cfg.experts.slots = 0, None
    if not choice.offloaded or not choice.kept:
        cfg.experts.profile = None
    cfg.fit = "none"


def work_of(cfg: Any, kind: str, longest: int, learned: int, adapter: str | None = None) -> Work:
    """What a training step has to take, in the planner's words.

    Args:
        longest: tokens of the longest row (of a pair: of one of its two).
        learned: learned tokens of the row that has most.
        adapter: trained further; None for a fresh one.
    """
    from moesmith.plan.footprint import Work

    return Work(
        kind=kind,  # type: ignore[arg-type]
        seq=longest,
        batch=cfg.train.batch_size * cfg.train.grad_accum,
        lora_r=cfg.lora.r,
        lora_targets=tuple(cfg.lora.targets),
        adapter_dtype=cfg.train.adapter_dtype,
        dtype=cfg.train.dtype,
        learned=learned,
        trained=None if adapter is None else parameters_of(adapter),
    )


def parameters_of(adapter: str) -> int | None:
    """Parameters of a saved adapter, from its file's header; None for one that is not on this disk."""
    from math import prod

    from safetensors import safe_open

    file = Path(adapter).expanduser() / "adapter_model.safetensors"
    if not file.is_file():
        return None
    with safe_open(file, framework="pt") as tensors:
        return sum(prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118


def describe(cfg: Any) -> str:
    """How the run is held, in one line."""
    quant, place, train = cfg.quant, cfg.experts, cfg.train
    where = {"device": "resident", "ram": "in RAM", "disk": "on disk"}
    homes = place.homes
    parts = [f"experts {quant.scheme}{' + double quant' if quant.double_quant else ''}"]
    if isinstance(homes, str):
        parts[0] += f" {where[homes]}"
    else:
        counts = {home: homes.count(home) for home in dict.fromkeys(homes)}
        parts[0] += ", " + ", ".join(f"{n} layers {where[home]}" for home, n in counts.items())
    if place.offloaded and place.kept:
        parts.append(f"{place.kept} of each layer kept on the device")
    if quant.linears:
        parts.append(f"linears {quant.linears}")
    parts.append(
        f"{train.batch_size} × {train.grad_accum} rows" + (", layer-major" if train.layer_major else "")
    )
    parts.append("checkpointing" if train.gradient_checkpointing else "no checkpointing")
    if train.optim != "adamw_torch":
        parts.append(train.optim)
    return " · ".join(parts)


# ---------------------------------------------------------------- the budget


def limit(cfg: RunSettings) -> int | None:
    """Bytes the run may take on what trains: the user's, or all there is."""
    from moesmith.plan.machine import parse_size
    from moesmith.train import memory

    given = cfg.vram if _on_gpu() else cfg.ram
    there = memory.limit()
    if given is None:
        return there
    return parse_size(given) if there is None else min(parse_size(given), there)


def enforce(cfg: RunSettings) -> None:
    """Let no more than `vram` be taken of the GPU; RAM has no such switch."""
    if cfg.vram is None or not _on_gpu():
        return
    import torch

    there = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, (limit(cfg) or there) / there))


def _on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


# ---------------------------------------------------------------- experts in their place


def hottest(profile: str | Path, model: Any) -> dict[int, list[int]]:
    """MoE layer -> its experts, the ones that most tokens were sent to first, from a `moesmith profile`.

    Args:
        model: loaded; its experts modules in the order of `named_experts` are layers 0, 1, ...

    Raises:
        UserError: no profile there, or one of a model with other layers.
    """
    from moesmith.experts.storage import named_experts
    from moesmith.prune.stats import Profile

    read = Profile.read(Path(profile).expanduser())
    profiled = {layer.name: layer for layer in read.layers}
    hot = {}
    for index, (name, module) in enumerate(named_experts(model)):
        layer = profiled.get(name.replace(".base_layer", "").removeprefix("base_model.model."))
        if layer is None:
            continue
        experts: Any = module
        if layer.num_experts != experts.num_experts:
            raise UserError(
                f"{profile}: {name} had {layer.num_experts} experts when it was profiled, now it has "
                f"{experts.num_experts}",
                "profile this model",
            )
        hot[index] = layer.total("tokens").argsort(descending=True, stable=True).tolist()
    if not hot:
        raise UserError(f"{profile} knows none of this model's layers", "it is a profile of another model")
    return hot


def place(model: Any, place: ExpertsPlace, device: int | None) -> Any | None:
    """Put the experts where they are to wait, the rest on the device, and say it.

    On a CPU, RAM is the device: experts there are only staged when `slots` asks for it, which is how
    offloaded training is tried without a GPU.

    Returns:
        the residency, None when nothing is lent.
    """
    from moesmith.experts.residency.attach import attach
    from moesmith.experts.residency.policy import Policy

    homes = homes_of(place, device is not None)
    if homes == "device":
        console.note("experts.home=ram: on a CPU that is where the model is anyway")
        return None
    hot = None if place.profile is None else hottest(place.profile, model)
    policy = Policy(homes=homes, kept=place.kept, slots=place.slots or 2, hot=hot)
    residency = attach(model, policy, "cpu" if device is None else f"cuda:{device}")
    if residency is not None and place.statistics:
        residency.reset_statistics()
    return residency


def keep_heap_whole() -> None:
    """Let the C library take every large block from the system and give it back, instead of from its heap.

    Between the slices of a layer-major step small tensors stay while large ones come and go, and glibc's
    aligned allocations leave holes that nothing fits into: a step of 8 rows of a 135M MoE (30 layers) took
    3.8 GB, and 0.65 GB like this (one run each, 2 cores). It costs some processor time, since the pages of
    every large tensor are taken and zeroed again. Linux, CPU only.
    """
    import ctypes
    import sys

    if sys.platform == "linux" and not _on_gpu():
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc has it
        if set_option is not None:
            set_option(M_MMAP_THRESHOLD, LARGE)


@contextmanager
def lent(model: Any) -> Iterator[None]:
    """Within, experts are lent; at the end the threads that carry them end, however it ends."""
    from moesmith.experts.residency.attach import detach

    try:
        yield
    finally:
        detach(model)


def write_transfers(cfg: RunSettings, model: Any) -> None:
    """OUT/transfers.json, and what was moved in one line, if statistics were asked for."""
    from moesmith.experts.residency.attach import residency_of

    residency = residency_of(model)
    if residency is None or not cfg.experts.statistics or not ranks.is_main():
        return
    figures = residency.statistics()
    path = Path(cfg.out).expanduser() / TRANSFERS
    write_atomically(path, json.dumps({"transfers": figures}, indent=2) + "\n")
    said = f"{console.size(figures['bytes'])} of experts moved"
    if figures.get("bandwidth"):
        said += f" at {console.size(figures['bandwidth'])}/s"
    stall = sum(layer.get("stall_s", 0.0) for layer in figures.get("layers", ()))
    console.row("moved", f"{said} · waited for {console.duration(stall)} · {path}")


def say_difference(result: SFTResult, planned: MemoryPlan, within: int | None) -> None:
    """Which part it was, when a run took more than it was given, or far more than was planned."""
    from moesmith.train import memory

    over = within is not None and result.peak_bytes > within
    if not over and result.peak_bytes <= FAR * planned.own:
        return
    given = f", {console.size(within)} allowed" if over and within else ""
    text = (
        f"peak {console.size(result.peak_bytes)}, {console.size(planned.own)} planned{given}: "
        + " · ".join(memory.compared(planned, result.peak_bytes))
    )
    (console.warn if over else console.note)(text)


def _words(place: ExpertsPlace) -> str:
    homes = place.homes
    return homes if isinstance(homes, str) else ",".join(homes)
