"""Where the experts lie of a model that is going to answer: from flags, or from the planner (`--fit auto`).

`chat` and `serve` share the flags (`PlaceFlags`), what they come to for a model (`settle` -> `Place`) and the
step that puts the experts there once the model is loaded (`put_experts`). Loading is theirs: experts that
are not to lie on the device are loaded on the CPU, memory-mapped where the model is packed on disk.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesmith import console
from moesmith.config import JobConfig, flag
from moesmith.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from moesmith.models.checkpoint import Checkpoint
    from moesmith.plan.choose import Budget, Planned
    from moesmith.plan.footprint import Work
    from moesmith.plan.shape import Shape

LAYOUT = ("scheme", "double_quant", "linears", "blocksize")  # how a model is packed
PROMPT = 1024  # tokens of a prompt that a plan makes room for
CACHED = 2  # experts of so many tokens stay on the device, unless --cache says otherwise


class PlaceFlags(JobConfig):
    """Where the experts lie."""

    fit: Literal["auto", "none"] = "none"
    """auto takes the fastest plan that fits for what of --scheme, --experts, --kept, --cache is not given."""
    experts: Literal["device", "ram", "disk"] = "device"
    """Where packed experts lie: on the device, in RAM, or in the files of a packed model."""
    kept: int = 0
    """Experts of each layer that never leave the device, when they lie in RAM or on disk."""
    cache: int | None = None
    """Recently used experts of each layer that stay on the device; without it, those of two tokens."""
    hot: Path | None = None
    """Folder of `moesmith profile`: its most used experts are the kept ones; without it, the first."""
    cold_on_cpu: bool = False
    """Compute with experts that are not on the GPU where they lie, on the CPU, instead of fetching them."""
    vram: str | None = None
    """GPU memory that --fit auto may plan with, such as 12GB; without it, all there is."""
    ram: str | None = None
    """RAM that --fit auto may plan with, such as 32GB; without it, all there is."""
    transfers: Path | None = None
    """Folder for a page on what was fetched: report.html, report.json."""
    verify: bool = False
    """Check the packed files against their checksums first."""


@dataclass(frozen=True)
class Place:
    """Where the experts of one model go, and how it is packed if it is packed on the way in."""

    homes: str | tuple[str, ...] = "device"
    kept: int = 0
    cache: int | None = None
    slots: int = 2
    hot: Path | None = None
    cold_on_cpu: bool = False
    packing: dict[str, Any] | None = None
    """scheme, double_quant, linears, blocksize that the planner chose; None: it did not choose"""
    plan: dict[str, Any] | None = None
    """what the planner says, for a program; None: it was not asked"""

    @property
    def offloaded(self) -> bool:
        """Whether any expert lies somewhere else than on the device."""
        words = (self.homes,) if isinstance(self.homes, str) else self.homes
        return any(word != "device" for word in words)


def check_place(cfg: PlaceFlags) -> None:
    """Refuse flags that contradict each other, and a profile that is not there.

    Raises:
        UserError: they do.
    """
    from moesmith.config import no_such_file

    for name in ("kept", "cache"):
        value = getattr(cfg, name)
        if value is not None and value < 0:
            raise UserError(f"--{name} {value}: wanted 0 experts or more")
    if cfg.fit == "none":
        for name in ("vram", "ram"):
            if getattr(cfg, name) is not None:
                raise UserError(f"--{name} is what --fit auto plans with", "add --fit auto")
    if cfg.experts == "device" and (cfg.fit == "none" or "experts" in cfg.model_fields_set):
        for name in ("kept", "cache", "hot", "cold_on_cpu", "transfers"):
            if name in cfg.model_fields_set:
                raise UserError(
                    f"{flag(name)} is about experts that do not lie on the device",
                    "add --experts ram or --experts disk",
                )
    if cfg.hot is not None and not cfg.kept and cfg.fit == "none":
        raise UserError(
            "--hot says which experts are kept, and none are", "add --kept, how many of each layer"
        )
    if cfg.hot is not None and not (cfg.hot / "profile.json").is_file():
        raise no_such_file(cfg.hot / "profile.json", "hot")
    if cfg.vram is not None or cfg.ram is not None:
        from moesmith.plan.machine import parse_size

        for size in (cfg.vram, cfg.ram):
            if size is not None:
                parse_size(size)


def settle(
    cfg: PlaceFlags,
    checkpoint: Checkpoint,
    base: dict[str, Any] | None,
    work: Work | None = None,
    scheme: str | None = None,
    on_gpu: bool = False,
) -> Place:
    """What the flags come to for this model.

    Args:
        base: how the adapter's base was packed (its moesmith.json), None without one.
        work: what is to be done with the model; needed for --fit auto only.
        scheme: --scheme, if it was given.

    Raises:
        UserError: experts on disk of a model that is not packed there, nothing that fits, checksums that
            differ.
    """
    if cfg.verify:
        check_files(checkpoint)
    place = Place(cfg.experts, cfg.kept, cfg.cache, hot=cfg.hot, cold_on_cpu=cfg.cold_on_cpu)
    if cfg.fit == "auto":
        assert work is not None
        place = plan_place(cfg, checkpoint, base, work, scheme, on_gpu)
    if not place.offloaded:
        if cfg.transfers is not None:
            console.note("the experts all lie on the device: nothing is transferred, and no page is written")
        return place
    if not any("expert" in name for name in checkpoint.tensors):
        raise UserError(f"--experts {cfg.experts}: {checkpoint.name} has no experts", "leave --experts out")
    if scheme == "none":
        raise UserError(
            "--scheme none leaves the experts to transformers, which cannot move them",
            "--scheme bf16 keeps them in 16 bits too",
        )
    if checkpoint.quantization is not None and not checkpoint.is_packed:
        method = checkpoint.quantization.get("quant_method")
        raise UserError(
            f"{checkpoint.name} is quantised by {method}: moesmith cannot move its experts",
            "leave --experts out",
        )
    if "disk" in place.homes and not checkpoint.is_packed:
        raise UserError(
            f"experts on disk: {checkpoint.name} is not packed there",
            f"moesmith quantize {checkpoint.name} --out packed, then give that folder",
        )
    return place


def put_experts(model: nn.Module, place: Place, device: Any) -> Any:
    """Move the experts of a loaded model to their homes and everything else to `device`.

    Returns:
        what lends them (`Residency` or `Mapped`), counting; None when all lie on the device.

    Raises:
        UserError: homes, kept and cached experts that do not fit.
    """
    if not place.offloaded:
        return None
    from moesmith.experts.residency.attach import attach
    from moesmith.experts.residency.policy import Policy

    policy = Policy(
        homes=place.homes,
        kept=place.kept,
        cache=default_cache(model) if place.cache is None else place.cache,
        slots=place.slots,
        hot=hottest(place.hot, model) if place.hot is not None and place.kept else None,
        cold_on_cpu=place.cold_on_cpu,
    )
    lender = attach(model, policy, device)
    if lender is not None:
        lender.reset_statistics()  # which switches them on
    return lender


def default_cache(model: nn.Module) -> int:
    """Experts per layer of `CACHED` tokens."""
    from moesmith.models.layers import text_layers

    return CACHED * max((layer.top_k for layer in text_layers(unwrapped(model))), default=0)


def hottest(profile: Path, model: nn.Module) -> dict[int, list[int]]:
    """Layer position (as `Policy.hot` counts them) -> its experts, most used first.

    Raises:
        UserError: no profile there, or one of another model.
    """
    from moesmith.experts.residency.attach import packed_experts
    from moesmith.prune.stats import Profile

    layers = {stats.name: stats for stats in Profile.read(profile).layers}
    found = {}
    packed = packed_experts(model)
    for position, (name, module) in enumerate(packed):
        stats = layers.get(name)
        if stats is None:
            continue
        experts = int(getattr(module, "num_experts", stats.num_experts))
        if stats.num_experts != experts:
            raise UserError(
                f"{profile} is of another model: {stats.num_experts} experts in {name}, here {experts}"
            )
        found[position] = stats.total("tokens").argsort(descending=True, stable=True).tolist()
    if not found:
        raise UserError(f"{profile} is of another model: it has no {packed[0][0] if packed else 'experts'}")
    return found


def unwrapped(model: Any) -> Any:
    """The model inside of PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def check_files(checkpoint: Checkpoint) -> None:
    """Check the packed files against their checksums.

    Raises:
        UserError: a byte differs, or the model has none.
    """
    from moesmith.models import checksums

    if checkpoint.folder is None:
        raise UserError(f"--verify: {checkpoint.name} is no folder")
    checksums.verify(checkpoint.folder)


# ---------------------------------------------------------------- the planner


def decode_work(
    checkpoint: Checkpoint,
    adapters: Sequence[Path],
    dtype: str,
    context: int | None,
    streams: int | None = None,
) -> Work:
    """What the planner has to know about answering.

    Args:
        adapters: folders; all of them are in memory.
        dtype: --dtype.
        context: tokens of prompt and answer; None: what the model can see, 4,096 at most.
        streams: answers written at once, for a server; None: a conversation.
    """
    from moesmith.models.headers import read_header
    from moesmith.plan.footprint import Work

    text = checkpoint.config.get("text_config") or checkpoint.config
    longest = min(4096, text.get("max_position_embeddings") or 4096)
    context = longest if context is None else context
    tensors = [
        tensor
        for folder in adapters
        if (file := folder / "adapter_model.safetensors").is_file()
        for tensor in read_header(file).values()
    ]
    if dtype == "auto":
        dtype = str(text.get("dtype") or text.get("torch_dtype") or "bfloat16")
    return Work(
        "decode" if streams is None else "serve",
        seq=min(context, PROMPT),
        lora_targets=(),
        adapter_dtype="float32" if any(tensor.dtype == "F32" for tensor in tensors) else dtype,
        dtype=dtype.removeprefix("torch."),
        context=context,
        streams=streams or 1,
        trained=sum(prod(tensor.shape) for tensor in tensors),
    )


def plan_place(
    cfg: PlaceFlags,
    checkpoint: Checkpoint,
    base: dict[str, Any] | None,
    work: Work,
    scheme: str | None,
    on_gpu: bool,
) -> Place:
    """The fastest way that fits, with what was given taken as it is.

    Raises:
        UserError: nothing fits; the message says the smallest need.
    """
    from moesmith.plan import choose
    from moesmith.plan.shape import Shape

    if not any("expert" in name for name in checkpoint.tensors):
        raise UserError(f"--fit auto: {checkpoint.name} has no experts to place", "leave --fit out")
    if checkpoint.quantization is not None and not checkpoint.is_packed:
        raise UserError(f"--fit auto: {checkpoint.name} is quantised by another library", "leave --fit out")
    fixed: dict[str, Any] = {}
    known = checkpoint.quantization if checkpoint.is_packed else base
    for key in LAYOUT:
        if known and known.get(key) is not None:
            fixed[key] = known[key]
    if known and "scheme" in fixed:  # what its record leaves out it does not have
        fixed.setdefault("double_quant", False)
        fixed.setdefault("linears", None)
    if scheme is not None:
        fixed["scheme"] = "bf16" if scheme == "none" else scheme
    fixed |= {
        ("homes" if name == "experts" else name): getattr(cfg, name)
        for name in ("experts", "kept", "cache")
        if name in cfg.model_fields_set
    }
    budget = budget_of(cfg, on_gpu, checkpoint.is_packed)
    shape = Shape.of_checkpoint(checkpoint)
    planned = choose.best(shape, work, budget, fixed=fixed)
    choice = planned.choice
    say_plan(planned, budget, shape)
    return Place(
        homes=choice.homes,
        kept=choice.kept,
        cache=choice.cache,
        slots=choice.slots,
        hot=cfg.hot,
        cold_on_cpu=cfg.cold_on_cpu,
        packing=None if checkpoint.is_packed else {key: getattr(choice, key) for key in LAYOUT},
        plan=planned.facts() | {"budget": budget.device_bytes},
    )


def budget_of(cfg: PlaceFlags, on_gpu: bool, disk: bool) -> Budget:
    """What the planner may take: what was said, else what is free."""
    from moesmith.plan.choose import Budget
    from moesmith.plan.machine import parse_size

    if cfg.vram is not None and not on_gpu:
        raise UserError("--vram: there is no GPU to hold it", "--ram is what a CPU computes in")
    vram, ram = (None if size is None else parse_size(size) for size in (cfg.vram, cfg.ram))
    return Budget.of_machine(vram=vram, ram=ram, on_gpu=on_gpu, disk=disk)


def say_plan(planned: Planned, budget: Budget, shape: Shape) -> None:
    """`plan     peak 7.1 GB of 12.0 GB: experts 5.0 GB · ...`, what it is, and why."""
    from moesmith.plan.choose import words

    peak, most = console.size(planned.footprint.peak), console.size(budget.device_bytes)
    console.note(f"plan     peak {peak} of {most}: {planned.footprint}")
    console.note(f"         {words(planned.choice, shape)} · {planned.why}")
