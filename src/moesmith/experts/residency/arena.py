"""Arena: the memory on the device that offloaded experts take turns in, and who lies where in it.

One arena per shape of layer: tensors with so many positions, for the kept experts of its layers, their caches
and the staging slots. Layers may differ in the number of experts. Also here: what is checked and done before
the first copy (page-locking the homes in RAM). What is fetched when is `pool`'s.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ... import ram
from ...errors import UserError
from ...ops.stack import PackedStack
from .link import Link
from .pages import MappedFiles
from .policy import Policy

PARTS = ("codes", "absmax", "scale", "offset")
Homes = Mapping[str, Mapping[str, PackedStack]]
"""Name of an experts module -> weight name -> all its experts, in order; layers 0, 1, ... in this order."""


@dataclass
class Slot:
    """A run of positions that hold experts of one layer at a time."""

    start: int
    layer: Layer | None = None
    mark: Any = None
    """Of the link, behind the last use."""

    @property
    def busy(self) -> bool:
        """An expert in it is lent."""
        return self.layer is not None and any(self.layer.lies_in_slot(e) for e in self.layer.lent)


@dataclass(eq=False)
class Arena:
    """The tensors on the device for all layers of one shape."""

    tensors: dict[tuple[str, str], Tensor]
    """(weight name, part) -> (positions, ...)."""
    slots: list[Slot]


@dataclass(eq=False)
class Layer:
    """One MoE layer: where its experts are and who holds them."""

    index: int
    name: str
    stacks: Mapping[str, PackedStack]
    """At home: all experts."""
    disk: bool
    num_experts: int
    kept: list[int]
    seat: dict[int, int]
    """Expert that may leave -> its place within a slot: ascending, so that neighbours travel together."""
    where: Tensor
    """int64 (E,): position in the arena, -1 not there. What a lent stack reads."""
    position: Any
    """The same memory as a NumPy array: a Tensor's element costs a microsecond each."""
    arena: Arena
    lent_stacks: dict[str, PackedStack]
    runs: list[tuple[str, Tensor, Tensor]]
    """(weight name, at home, in the arena) of every tensor."""
    free: list[int] = field(default_factory=list)
    """Cache positions that hold nothing."""
    cached: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """Expert -> cache position, least recently used first."""
    slot: Slot | None = None
    on_the_way: dict[int, Any] = field(default_factory=dict)
    """Expert -> ticket nobody has waited for yet."""
    lent: Counter[int] = field(default_factory=Counter)
    mark: Any = None
    last: list[int] = field(default_factory=list)
    """Experts lent last."""
    expected: set[int] | None = None
    """Guessed for the next lend."""
    guessed: set[int] = field(default_factory=set)
    """Those of them that were not there."""
    trust: float = 0.75
    """How many of these guesses have been right lately."""
    asked: int = 0
    """Whether a guess would be welcome: so many times."""

    def absent(self, experts: Iterable[int]) -> list[int]:
        return [e for e in experts if self.position[e] < 0]

    def judge(self, asked: Sequence[int]) -> None:
        """What was guessed against what is asked for."""
        if self.guessed:
            right = len(self.guessed.intersection(asked)) / len(self.guessed)
            self.trust += (right - self.trust) / 8
        self.expected, self.guessed = None, set()

    def lies_in_slot(self, e: int) -> bool:
        seat = self.seat.get(e)
        return self.slot is not None and seat is not None and self.position[e] == self.slot.start + seat


def tensors_of(stacks: Mapping[str, PackedStack]) -> Iterator[tuple[str, str, Tensor]]:
    """(weight name, part, tensor) of a layer."""
    for name, stack in stacks.items():
        for part in PARTS:
            tensor = getattr(stack, part)
            if tensor is not None:
                yield name, part, tensor


def pin(homes: Homes, policy: Policy, link: Link) -> None:
    """Replace the tensors of homes in RAM by page-locked ones, if the link wants them so.

    What lies in RAM of its own already gives it back, a layer at a time; mapped files keep their pages.
    """
    in_ram = [stacks for layer, stacks in enumerate(homes.values()) if policy.home(layer) == "ram"]
    if not in_ram or not link.pins:
        return
    sizes = [sum(stack.nbytes for stack in stacks.values()) for stacks in in_ram]
    mapped, files = 0, MappedFiles()
    for stacks in in_ram:
        tensors = [t for _, _, t in tensors_of(stacks) if files.region(t) is not None]
        mapped += sum(t.numel() * t.element_size() for t in tensors)
    there = ram.available()
    if max(mapped, *sizes) > there:
        raise UserError(
            f"{sum(sizes) / 1e9:,.1f} GB of experts ({len(sizes)} MoE layers) are to be page-locked in RAM; "
            f"{there / 1e9:,.1f} GB are available",
            "experts.home: disk for all layers, or for some of them",
        )
    for stacks in in_ram:
        for _, _, tensor in tensors_of(stacks):
            tensor.data = link.pinned(tensor.data)


def _shape_class(stacks: Mapping[str, PackedStack]) -> tuple[Any, ...]:
    """What layers must share to lie in the same tensors: everything but the number of experts."""
    parts = tuple((name, part, t.shape[1:], t.dtype) for name, part, t in tensors_of(stacks))
    return tuple(stack.scheme for stack in stacks.values()), parts


def by_shape(homes: Homes, policy: Policy) -> dict[Any, list[tuple[int, str, Mapping[str, PackedStack]]]]:
    """Layers that are not at home on the device, by shape: (index, name, stacks)."""
    classes: dict[Any, list[tuple[int, str, Mapping[str, PackedStack]]]] = {}
    for index, (name, stacks) in enumerate(homes.items()):
        if policy.home(index) != "device":
            classes.setdefault(_shape_class(stacks), []).append((index, name, stacks))
    return classes


@dataclass(frozen=True)
class Sizes:
    """Positions of one arena."""

    kept: list[list[int]]
    cache: list[int]
    slots: int
    slot: int

    @classmethod
    def of(cls, members: Sequence[tuple[int, str, Mapping[str, PackedStack]]], policy: Policy) -> Sizes:
        counts = [next(iter(stacks.values())).shape[0] for _, _, stacks in members]
        kept = [
            policy.kept_experts(index, count) for (index, _, _), count in zip(members, counts, strict=True)
        ]
        leaving = [count - len(some) for count, some in zip(counts, kept, strict=True)]
        moving = sum(count > 0 for count in leaving)
        if moving and not policy.slots:
            raise UserError(
                "slots=0: experts that are not all kept on the device need at least one staging slot"
            )
        return cls(
            kept, [min(policy.cache, count) for count in leaving], min(policy.slots, moving), max(leaving)
        )

    @property
    def positions(self) -> int:
        return sum(map(len, self.kept)) + sum(self.cache) + self.slots * self.slot


def device_bytes(homes: Homes, policy: Policy) -> int:
    """What `Residency` takes on the device for these homes."""
    total = 0
    for members in by_shape(homes, policy).values():
        one = sum(t[:1].numel() * t.element_size() for _, _, t in tensors_of(members[0][2]))
        total += Sizes.of(members, policy).positions * one
    return total


def make_arena(
    members: Sequence[tuple[int, str, Mapping[str, PackedStack]]], policy: Policy, link: Link
) -> dict[int, Layer]:
    """The arena of one shape and the layers that share it."""
    sizes = Sizes.of(members, policy)
    like = members[0][2]
    for index, name, stacks in members:
        for weight, part, t in tensors_of(stacks):
            assert t.is_contiguous(), f"{name}.{weight}, {part} of layer {index}: one expert after the other"
    try:
        tensors = {
            (name, part): torch.empty((sizes.positions, *t.shape[1:]), dtype=t.dtype, device=link.device)
            for name, part, t in tensors_of(like)
        }
    except torch.OutOfMemoryError as error:
        one = sum(t[:1].numel() * t.element_size() for _, _, t in tensors_of(like))
        raise UserError(
            f"{sizes.positions * one / 1e9:,.1f} GB for experts could not be had on {link.device}: "
            f"{sum(map(len, sizes.kept))} kept, {sum(sizes.cache)} cached, "
            f"{sizes.slots} slots of {sizes.slot}",
            "fewer experts.kept, experts.cache or experts.slots",
        ) from error
    position = sum(map(len, sizes.kept)) + sum(sizes.cache)
    slots = [Slot(position + i * sizes.slot) for i in range(sizes.slots)]
    arena = Arena(tensors, slots)
    layers, position = {}, 0
    for (index, name, stacks), kept, cache in zip(members, sizes.kept, sizes.cache, strict=True):
        count = next(iter(stacks.values())).shape[0]
        where = torch.full((count,), -1, dtype=torch.int64)
        places = where.numpy()
        for e in sorted(kept):
            places[e] = position
            position += 1
        leaving = [e for e in range(count) if e not in set(kept)]
        layers[index] = Layer(
            index, name, stacks, policy.home(index) == "disk", count, kept,
            {e: i for i, e in enumerate(leaving)}, where, places, arena,
            {key: _within(tensors, key, stack.scheme, where) for key, stack in stacks.items()},
            [(key, t.data, tensors[key, part]) for key, part, t in tensors_of(stacks)],
            free=list(range(position, position + cache)),
        )  # fmt: skip
        position += cache
    return layers


def _within(tensors: Mapping[tuple[str, str], Tensor], name: str, scheme: str, where: Tensor) -> PackedStack:
    """What a layer lends under a weight's name: all of the arena, and where its own experts lie."""
    absmax, scale, offset = (tensors.get((name, part)) for part in PARTS[1:])
    return PackedStack(tensors[name, "codes"], absmax, scale, offset, scheme, where)
