"""The best way to run a model within a budget: enumerate, drop what does not fit, rank.

What is enumerated: the storage of the experts and of the linears, where the experts lie, how many of them
stay on the device, checkpointing, rows per forward pass, layer-major accumulation, and on a GPU the
optimizer. What the user has settled stays. Of choices about as fast as each other the better storage wins,
then the plainer place, then the optimizer in full precision; int8 is offered only where all of it fits on the
device, and on a GPU experts are moved only where they do not fit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from typing import Any

from moesmith.console import size
from moesmith.errors import UserError
from moesmith.ram import total

from .footprint import Choice, Footprint, Work, footprint
from .machine import Machine, known
from .shape import Shape
from .times import Times, times

HEADROOM = 0.95
"""of the budget is used: the estimate is good to some per cent, and an allocator wastes some"""
ALIKE = 1.25
"""times whose ratio is below this count as the same: the estimate tells no smaller differences apart"""


@dataclass(frozen=True)
class Budget:
    """What there is. On a CPU the device is the RAM: give both the same."""

    device_bytes: int
    ram_bytes: int
    disk: bool = True
    """whether experts may stay on disk: the model is packed there, or can be"""
    on_gpu: bool = False

    @classmethod
    def of_machine(
        cls, vram: int | None = None, ram: int | None = None, on_gpu: bool | None = None, disk: bool = True
    ) -> Budget:
        """The budget of this machine, or of one with so much; a GPU's memory only where there is one."""
        import torch

        if on_gpu is None:
            on_gpu = vram is not None or torch.cuda.is_available()
        ram = ram or total()
        if not on_gpu:
            return cls(ram, ram, disk, False)
        if vram is None:
            vram = torch.cuda.get_device_properties(0).total_memory
        return cls(vram, ram, disk, True)


@dataclass(frozen=True)
class Planned:
    """A choice with what it takes, how long, and why it was chosen."""

    choice: Choice
    footprint: Footprint
    times: Times
    why: str = ""

    def facts(self) -> dict[str, Any]:
        """The same for a program."""
        return {
            "choice": asdict(self.choice), "footprint": self.footprint.facts(), "times": asdict(self.times),
            "why": self.why,
        }  # fmt: skip


def best(
    shape: Shape,
    work: Work,
    budget: Budget,
    machine: Machine | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> Planned:
    """The best choice that fits.

    Args:
        machine: its rates; None: as measured here before, else cautious defaults.
        fixed: fields of `Choice` that the user has settled -> value.

    Raises:
        UserError: nothing fits; the smallest need is said.
    """
    return ranked(shape, work, budget, machine, fixed)[0]


def ranked(
    shape: Shape,
    work: Work,
    budget: Budget,
    machine: Machine | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> list[Planned]:
    """Every choice that fits, the best first. Same arguments and errors as `best`."""
    machine = machine or known(budget.on_gpu)
    found = [plan_of(shape, work, choice, budget, machine) for choice in choices(shape, work, budget, fixed)]
    fitting = [planned for planned in found if fits(planned.footprint, budget)]
    if not fitting:
        raise _too_large(shape, work, budget, found)
    if budget.on_gpu:  # moving experts saves nothing where the same storage fits as a whole
        whole = {_storage(planned.choice) for planned in fitting if not planned.choice.offloaded}
        fitting = [p for p in fitting if not p.choice.offloaded or _storage(p.choice) not in whole]
    fitting.sort(key=_order)
    first = fitting[0]
    fastest = first.times.seconds
    alike = [p for p in fitting if p.times.seconds <= ALIKE * fastest]
    others = [p for p in fitting if p.times.seconds > ALIKE * fastest]
    alike.sort(key=lambda p: (*_quality(p.choice), *_order(p)))
    winners = alike + others
    training = work.kind in ("train", "dpo")
    winners[0] = replace(winners[0], why=_why(winners[0], found, fitting, budget, shape, training))
    return winners


def plan_of(shape: Shape, work: Work, choice: Choice, budget: Budget, machine: Machine) -> Planned:
    """One choice with its figures; what room is left is filled with experts that stay on the device."""
    choice = _filled(shape, work, choice, budget)
    taken = footprint(shape, work, choice, budget.on_gpu)
    spare = max(
        0, int(HEADROOM * budget.ram_bytes) - (sum(taken.ram.values()) if budget.on_gpu else taken.peak)
    )
    return Planned(choice, taken, times(shape, work, choice, machine, spare))


def fits(taken: Footprint, budget: Budget) -> bool:
    """Whether it goes into the budget with some headroom."""
    if taken.peak > HEADROOM * budget.device_bytes:
        return False
    return not budget.on_gpu or sum(taken.ram.values()) <= HEADROOM * budget.ram_bytes


# ---------------------------------------------------------------- what there is to choose from

QUALITY = (("bf16", False), ("fp16", False), ("int8", False), ("fp8", False), ("nf4", False), ("nf4", True))
"""(scheme, double quant), the best first"""
SCHEMES = (("int8", False), ("nf4", False), ("nf4", True))
LINEARS = (None, "int8", "nf4")


def choices(
    shape: Shape, work: Work, budget: Budget, fixed: Mapping[str, Any] | None = None
) -> Iterator[Choice]:
    """Every choice worth looking at.

    Raises:
        UserError: `fixed` names something that is no field of `Choice`.
    """
    settled = dict(fixed or {})
    unknown = settled.keys() - {field.name for field in fields(Choice)}
    if unknown:
        raise UserError(f"{sorted(unknown)[0]} is nothing that a plan chooses")
    if shape.quantization is not None:  # packed on disk: as it is
        for name, plain in (
            ("scheme", None),
            ("double_quant", False),
            ("linears", None),
            ("blocksize", None),
        ):
            there = shape.quantization.get(name) or plain
            if there is None and name != "linears":
                continue
            if settled.setdefault(name, there) != there:
                raise UserError(
                    f"{name}={settled[name]}: the model is packed with {name}={there}",
                    "leave it out, or give the original 16-bit checkpoint",
                )
    training = work.kind in ("train", "dpo")
    axes: dict[str, tuple[Any, ...]] = {
        "linears": LINEARS[:: 2 if budget.on_gpu else 1] if shape.linears else (None,),
        "homes": _homes(shape, budget),
        "slots": (2, 1) if budget.on_gpu else (2,),
    }
    if training:
        axes["checkpointing"] = (True, False)
        axes["optim"] = ("adamw_torch", "paged_adamw_8bit") if budget.on_gpu else ("adamw_torch",)
        axes["batch_size"] = tuple(n for n in (1, 2, 4, 8, 16, 32) if work.batch % n == 0)
        axes["layer_major"] = (False, True) if budget.on_gpu and work.batch > 1 else (False,)
    pairs = [
        pair for pair in SCHEMES
        if settled.get("scheme", pair[0]) == pair[0] and settled.get("double_quant", pair[1]) == pair[1]
    ] or [(settled.get("scheme", "nf4"), settled.get("double_quant", False))]  # fmt: skip
    names = [name for name in axes if name not in settled]
    for (scheme, double_quant), *values in product(pairs, *(axes[name] for name in names)):
        made = {"scheme": scheme, "double_quant": double_quant, **dict(zip(names, values, strict=True))}
        made |= settled
        made.setdefault("grad_accum", -(-work.batch // made.get("batch_size", 1)) if training else 1)
        choice = Choice(**made)
        offloaded = choice.offloaded
        if offloaded and scheme == "int8" and "scheme" not in settled:
            continue  # twice the bytes to move for a little fidelity
        if training and offloaded and not choice.checkpointing:
            continue  # refused by every command: a layer has left the device before its backward
        if not offloaded and (choice.layer_major or (choice.slots != 2 and "slots" not in settled)):
            continue
        if choice.layer_major and choice.grad_accum == 1:
            continue
        yield choice


def _homes(shape: Shape, budget: Budget) -> tuple[str, ...]:
    if not shape.experts:
        return ("device",)
    homes = ("device", "ram") if budget.on_gpu else ("device",)
    return (*homes, "disk") if budget.disk else homes


def _filled(shape: Shape, work: Work, choice: Choice, budget: Budget) -> Choice:
    """With as many experts of each layer on the device as there is room for.

    Training: experts that never leave. Decoding: recently routed ones, which need no profile.
    """
    homes = choice.homes_of(len(shape.experts))
    if not budget.on_gpu or not choice.offloaded or choice.kept or choice.cache or not shape.experts:
        return choice
    name = "kept" if work.kind in ("train", "dpo") else "cache"
    room = HEADROOM * budget.device_bytes - footprint(shape, work, choice, True).peak
    if room <= 0:
        return choice
    layers = shape.expert_bytes(choice.scheme, choice.double_quant, choice.blocksize)
    units = [
        nbytes / e.num_experts
        for e, nbytes, home in zip(shape.experts, layers, homes, strict=True)
        if home != "device"
    ]
    most = max(e.num_experts for e in shape.experts)
    # Staging shrinks by one unit a slot for every kept expert.
    cost = sum(units) - (choice.slots * max(units) if name == "kept" else 0)
    count = min(int(room // cost), most - 1) if cost > 0 else 0
    return replace(choice, kept=count) if name == "kept" else replace(choice, cache=count)


# ---------------------------------------------------------------- ranking


def _order(planned: Planned) -> tuple[float, ...]:
    """Fast first, then what takes less, then the plainer."""
    choice = planned.choice
    return (planned.times.seconds, planned.footprint.peak, choice.slots)


def _quality(choice: Choice) -> tuple[int, int, int, int]:
    """The better storage first, then the plainer place, then the optimizer in full precision."""
    pair = (choice.scheme, choice.double_quant)
    scheme = QUALITY.index(pair) if pair in QUALITY else len(QUALITY)
    return (scheme, LINEARS.index(choice.linears), _place(choice), int("8bit" in choice.optim))


def _storage(choice: Choice) -> tuple[Any, ...]:
    return (choice.scheme, choice.double_quant, choice.linears)


def _place(choice: Choice) -> int:
    """The plainer home first."""
    homes = {choice.homes} if isinstance(choice.homes, str) else set(choice.homes)
    return max(("device", "ram", "disk").index(home) for home in homes)


def kind_of(choice: Choice) -> tuple[Any, ...]:
    """What makes two choices different to a person: storage and place."""
    return (*_storage(choice), choice.homes)


def words(choice: Choice, shape: Shape, training: bool = False) -> str:
    """How a person names it.

    Args:
        training: say how a step is made too, where that is not the usual way.
    """
    said = [choice.scheme + (" + double quant" if choice.double_quant else "")]
    if choice.linears:
        said.append(f"linears {choice.linears}")
    homes = set(choice.homes_of(len(shape.experts)))
    if homes - {"device"}:
        place = " and ".join(sorted(homes - {"device"}))
        kept = f", {choice.kept} of each layer kept" if choice.kept else ""
        cached = f", {choice.cache} of each layer cached" if choice.cache else ""
        said.append(f"experts in {place}".replace("in disk", "on disk") + kept + cached)
    if training:
        said += ["no checkpointing"] if not choice.checkpointing else []
        said += ["layer-major"] if choice.layer_major else []
        said += [choice.optim] if choice.optim != "adamw_torch" else []
    return " · ".join(said)


def _why(
    winner: Planned,
    found: list[Planned],
    fitting: list[Planned],
    budget: Budget,
    shape: Shape,
    training: bool,
) -> str:
    """One line: why this one, and what the next better one would need."""
    fastest = winner.times.seconds <= min(p.times.seconds for p in fitting)
    of = "the fastest" if fastest else "the best storage among the fastest"
    of = f"{of} of {len(fitting)} that fit" if len(fitting) > 1 else "the only one that fits"
    if winner.choice.offloaded:
        why = f"{of}; bound by {winner.times.bound}"
    else:
        why = f"everything fits; {of}, bound by {winner.times.bound}"
    faster = [
        p for p in found
        if p.times.seconds < winner.times.seconds / ALIKE and not fits(p.footprint, budget)
    ]  # fmt: skip
    if faster:
        nearest = min(faster, key=lambda p: p.footprint.peak)
        need = size(nearest.footprint.peak / HEADROOM)
        ratio = winner.times.seconds / nearest.times.seconds
        where = "of GPU memory" if budget.on_gpu else "of RAM"
        why += f". With {need} {where}: {words(nearest.choice, shape, training)}, {ratio:.1f} times as fast"
    return why


def _too_large(shape: Shape, work: Work, budget: Budget, found: list[Planned]) -> UserError:
    # What fits the device and lacks only RAM is nearer than what takes less of the device and more RAM.
    there = HEADROOM * budget.device_bytes
    least = min(
        found, key=lambda p: (max(p.footprint.peak, there), sum(p.footprint.ram.values()), p.footprint.peak)
    )
    need, ram = least.footprint.peak / HEADROOM, sum(least.footprint.ram.values()) / HEADROOM
    kind = "GPU memory" if budget.on_gpu else "RAM"
    if need <= budget.device_bytes and budget.on_gpu:
        text = f"needs {size(ram)} of RAM, there is {size(budget.ram_bytes)}"
    else:
        text = f"needs {size(need)} of {kind} at least, there is {size(budget.device_bytes)}"
    lacking = least.footprint.ram if need <= budget.device_bytes and budget.on_gpu else least.footprint.device
    largest = max(lacking.items(), key=lambda part: part[1])
    hint = f"the smallest plan: {words(least.choice, shape)}; most of it is {largest[0]}, {size(largest[1])}"
    if largest[0] in ("activations", "logits"):
        hint += f"; shorter rows than {work.seq:,} tokens take less"
    return UserError(text, hint)
