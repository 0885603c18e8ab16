"""Residency: brings experts to the device in time and says where they lie there.

All that is on the device lies in one arena per shape of layer: the kept experts, each layer's cache of
recently routed ones, and staging slots that each hold one layer without its kept experts. An expert's place
is a position in the arena's tensors; `PackedStack.where` of a layer lists them, so nothing is ever moved or
reordered on the device.

Flow (training, or at least half of a layer's experts asked for): whole layers are staged ahead in the order
of `policy.Course`. Decoding: only the experts asked for that are not there are fetched, into the cache. What
is lent is held; everything else may be overwritten once what the computation read there has been read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from ...errors import UserError
from ...ops.stack import PackedStack
from .arena import Homes, Layer, Slot, by_shape, make_arena, pin
from .link import Copy, Link
from .policy import Course, Policy
from .statistics import Counters

TRUST = 0.5  # of guesses that have to be fetched, how many must have been right lately


class Residency:
    """Lends experts of a model's MoE layers on the device."""

    def __init__(self, homes: Homes, policy: Policy, link: Link, statistics: bool = False):
        """Pin the homes in RAM, make the arenas, fetch the kept experts.

        A link that pins replaces the tensors' data (`tensor.data = ...`) layer by layer, so that parameters
        that share them follow and at most one layer lies in RAM twice.

        Raises:
            UserError: homes to pin that do not fit the RAM available (nothing is pinned then), no slot,
                arenas that do not fit the device, a kept expert that cannot be read.
        """
        policy.check(len(homes))
        self.policy, self.link, self.device = policy, link, link.device
        self.homes = homes
        self._lock = threading.RLock()
        self._counters: Counters | None = None
        self._at: dict[int, Layer] = {}
        try:
            pin(homes, policy, link)
            for members in by_shape(homes, policy).values():
                self._at.update(make_arena(members, policy, link))
            self._fetch_kept()
        except BaseException:
            link.close()
            raise
        moving = sorted(index for index, layer in self._at.items() if layer.seat)
        self._course = Course(moving)
        if statistics:
            self.reset_statistics()

    # ------------------------------------------------------------ lending

    @contextmanager
    def lend(
        self, layer: int, experts: Sequence[int], rows: int, training: bool, tokens: int | None = None
    ) -> Iterator[dict[str, PackedStack]]:
        """These experts of a layer are on the device inside the block, and stay. May be nested.

        Args:
            layer: position in `homes`.
            experts: distinct ids.
            rows: routed rows of this call.
            training: its backward will ask for the same experts (`again`).
            tokens: of this call, for statistics; None: `rows`.

        Returns:
            weight name -> stack with `where`. Experts not asked for may or may not be there.

        Raises:
            UserError: a copy failed (layer and file named), or all slots are in use by outer blocks.
        """
        if layer not in self._at:
            yield dict(self.at_home(layer))
            return
        it = self._at[layer]
        experts = [int(e) for e in experts]

        def prepare() -> None:
            if layer in self._course.place:
                self._course.reach(layer, training)
            flow = training or 2 * len(experts) >= it.num_experts
            self._count(it, experts, rows if tokens is None else tokens)
            it.judge(experts)
            it.last = experts
            for e in experts:
                if e in it.cached:
                    it.cached.move_to_end(e)
            self._fetch(it, it.absent(experts), into_cache=not flow)
            if flow and self.policy.prefetch:
                self._stage_ahead()

        with self._held(it, experts, prepare) as stacks:
            yield stacks

    @contextmanager
    def again(self, layer: int, experts: Sequence[int] | None = None) -> Iterator[dict[str, PackedStack]]:
        """In backward: the experts lent last for this layer, or these of them.

        Raises:
            UserError: they were evicted before their backward (training without gradient checkpointing).
        """
        if layer not in self._at:
            yield dict(self.at_home(layer))
            return
        it = self._at[layer]
        wanted = it.last if experts is None else [int(e) for e in experts]

        def prepare() -> None:
            gone = it.absent(wanted)
            if gone:
                raise UserError(
                    f"{it.name}: {len(gone)} of {len(wanted)} experts were evicted before their backward",
                    "training with offloaded experts needs gradient checkpointing "
                    "(train.gradient_checkpointing: true), and experts.slots of at least as many MoE layers "
                    "as one checkpointed block has",
                )

        with self._held(it, wanted, prepare) as stacks:
            yield stacks

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        """Likely to be asked for soon: fetch them if there is room that nobody uses. Never waits.

        Of guesses that would have to be fetched, half must have been right lately: a wrong one costs the link
        as much as it would be asked for, and pushes out of the cache what may be wanted.
        """
        if layer not in self._at or not self.policy.prefetch:
            return
        it = self._at[layer]
        with self._lock:
            it.expected = {int(e) for e in experts}
            absent = it.absent(sorted(it.expected))
            it.guessed = set(absent)
            if it.trust >= TRUST:
                self._fetch(it, absent, into_cache=True, guess=True)

    def wants_prediction(self, layer: int) -> bool:
        """Whether it is worth asking what this layer will want: something is not there, a guess has
        somewhere to go beside the layer computed now, and guesses have been right (else every 16th time, to
        see whether they have become so)."""
        it = self._at.get(layer)
        if it is None or not self.policy.prefetch:
            return False
        with self._lock:
            room = it.free or it.cached or len(it.arena.slots) > 1
            if not room or not it.absent(it.seat):
                return False
            it.asked += 1
            return it.trust >= TRUST or it.asked % 16 == 0

    def there(self, layer: int, experts: Iterable[int] | None = None) -> list[int]:
        """Those of `experts` (None: of all) that are on the device or on their way."""
        if layer not in self._at:
            return list(self._all(layer) if experts is None else experts)
        it = self._at[layer]
        with self._lock:
            return [e for e in (range(it.num_experts) if experts is None else experts) if it.position[e] >= 0]

    def at_home(self, layer: int) -> Mapping[str, PackedStack]:
        """The layer's stacks where they lie at home: whole, on the CPU unless their home is the device."""
        return list(self.homes.values())[layer]

    def _all(self, layer: int) -> range:
        return range(next(iter(self.at_home(layer).values())).shape[0])

    @contextmanager
    def _held(
        self, it: Layer, experts: list[int], prepare: Callable[[], None]
    ) -> Iterator[dict[str, PackedStack]]:
        """Hold experts, so that none makes room for another; prepare, wait for them, hand them out; let go,
        also when interrupted."""
        held = False
        try:
            with self._lock:
                it.lent.update(experts)
                held = True
                prepare()
            self._arrive(it, experts)
            yield it.lent_stacks
        finally:
            if held:
                self._let_go(it, experts)

    def _let_go(self, it: Layer, experts: list[int]) -> None:
        mark = None
        try:
            mark = self.link.release()
        finally:
            with self._lock:
                it.lent.subtract(experts)
                it.lent = +it.lent
                it.mark = mark
                if it.slot is not None:
                    it.slot.mark = mark

    def _arrive(self, it: Layer, experts: list[int]) -> None:
        """Put what is computed next behind the arrival of these experts."""
        tickets = {id(ticket): ticket for e in experts if (ticket := it.on_the_way.get(e)) is not None}
        for ticket in tickets.values():
            failed = True
            try:
                self.link.wait(ticket)
                failed = False
            finally:
                with self._lock:
                    for e in [e for e, other in it.on_the_way.items() if other is ticket]:
                        del it.on_the_way[e]
                        if failed:  # a later lend tries again
                            self._drop(it, e)

    # ------------------------------------------------------------ fetching and evicting

    def _fetch(self, it: Layer, experts: Sequence[int], into_cache: bool, guess: bool = False) -> None:
        """Begin to bring experts of a layer that are not there: to its cache as far as there is room, else to
        its slot. A guess takes only room that nobody uses, and may bring none."""
        if not experts:
            return
        room = self._make_room(it, len(experts), guess) if into_cache else []
        to_cache = list(zip(experts, room, strict=False))
        if to_cache:
            try:
                self._start(it, to_cache, it.mark)
            except BaseException:
                it.free += room
                raise
            it.cached.update(to_cache)
        if rest := experts[len(to_cache) :]:
            self._stage(it, rest, self._passing(it) if guess else None)

    def _make_room(self, it: Layer, count: int, guess: bool) -> list[int]:
        """At most `count` free positions of a layer's cache; what was used longest ago goes, but for a guess
        nothing that the last call used."""
        stays = {*it.last, *(it.expected or ())} if guess else set()
        for e in list(it.cached):
            if len(it.free) >= count:
                break
            if not it.lent[e] and e not in stays:
                self._drop(it, e)
        taken, it.free = it.free[:count], it.free[count:]
        return taken

    def _drop(self, it: Layer, e: int) -> None:
        """An expert is not on the device any more."""
        if e in it.cached:
            it.free.append(it.cached.pop(e))
        it.on_the_way.pop(e, None)
        it.position[e] = -1

    def _passing(self, it: Layer) -> list[Layer]:
        """The layer that is computed now and those after it up to this one."""
        return [self._at[index] for index in self._course.upcoming() if index <= it.index]

    def _stage_ahead(self) -> None:
        """Stage whole layers in the order they will be wanted, as far as there are slots for this one and
        them."""
        open_seats = {id(it.arena): len(it.arena.slots) for it in self._at.values() if it.seat}
        soon: list[Layer] = []
        for index in self._course.upcoming():
            it = self._at[index]
            if open_seats[id(it.arena)]:
                open_seats[id(it.arena)] -= 1
                soon.append(it)
            if not any(open_seats.values()):
                break
        for it in soon[1:]:
            self._stage(it, it.absent(it.seat), soon)

    def _stage(self, it: Layer, experts: Sequence[int], staying: Sequence[Layer] | None) -> None:
        """Begin to bring experts of a layer to its slot.

        A layer without one gets a slot that is free, else the one whose layer will be wanted last. Layers
        `staying` keep theirs, then nothing may happen; None: it has to be, UserError if it cannot.
        """
        if not experts:
            return
        if it.slot is None:
            slot = self._slot_for(it, staying or ())
            if slot is None and staying is not None:
                return
            if slot is None:
                raise UserError(
                    f"{it.name}: all {len(it.arena.slots)} staging slots are in use",
                    "experts.slots: one more",
                )
            self._evict(slot)
            slot.layer, it.slot = it, slot
        start = it.slot.start
        self._start(it, [(e, start + it.seat[e]) for e in experts], it.slot.mark)

    def _slot_for(self, it: Layer, staying: Sequence[Layer]) -> Slot | None:
        """The slot that can be spared best; None if there is none."""
        turn = {index: i for i, index in enumerate(self._course.upcoming())}

        def next_use(slot: Slot) -> float:
            return float("inf") if slot.layer is None else turn.get(slot.layer.index, len(turn))

        spare = [slot for slot in it.arena.slots if slot.layer not in staying and not slot.busy]
        return max(spare, key=next_use, default=None)

    def _evict(self, slot: Slot) -> None:
        """Take a slot from its layer. Copies still under way to it end before later ones begin: a link keeps
        their order."""
        it = slot.layer
        if it is not None:
            for e in [e for e in it.seat if it.lies_in_slot(e)]:
                self._drop(it, e)
            slot.layer = it.slot = None

    def _start(self, it: Layer, places: Sequence[tuple[int, int]], mark: Any) -> None:
        """Begin to carry (expert, position) pairs of a layer to the device, neighbours together."""
        copies = []
        for first, position, count in _runs(places):
            whose = f"experts {first} to {first + count - 1}" if count > 1 else f"expert {first}"
            for name, home, target in it.runs:
                source, room = home[first : first + count], target[position : position + count]
                copies.append(Copy(source, room, f"{it.name}, {name}, {whose}", it.disk))
        ticket = self.link.start(copies, mark)
        for e, position in places:
            it.position[e] = position
            it.on_the_way[e] = ticket
        if self._counters is not None:
            self._counters.fetched(it.index, ticket)

    def _fetch_kept(self) -> None:
        """Bring the experts that never leave, and wait for them."""
        mark = self.link.release()
        for it in self._at.values():
            it.mark = mark
            for slot in it.arena.slots:
                slot.mark = mark
            if it.kept:
                self._start(it, [(e, int(it.position[e])) for e in sorted(it.kept)], mark)
        for it in self._at.values():
            self._arrive(it, it.kept)

    # ------------------------------------------------------------ figures, end

    @property
    def device_bytes(self) -> int:
        """Bytes of all arenas on the device; layers whose home is the device are not in them."""
        arenas = {id(layer.arena): layer.arena for layer in self._at.values()}
        return sum(t.numel() * t.element_size() for arena in arenas.values() for t in arena.tensors.values())

    def _count(self, it: Layer, experts: list[int], tokens: int) -> None:
        """Statistics of a lend, before anything is fetched for it."""
        if self._counters is None:
            return
        misses = len(it.absent(experts))
        self._counters.asked(it.index, len(experts) - misses, misses)
        if it.expected is not None:
            self._counters.predicted(it.index, it.expected, experts)
        if it.index == min(self._at) and self._course.up:
            self._counters.tokens += tokens

    def statistics(self) -> dict[str, Any]:
        """Counters since `reset_statistics`, see `statistics.Counters.report`. {} if they are off."""
        with self._lock:
            return {} if self._counters is None else self._counters.report()

    def reset_statistics(self) -> None:
        """Count from zero; switches counting on."""
        with self._lock:
            self.link.timed = True
            self._counters = Counters(self.link.name, list(self.homes))

    def __deepcopy__(self, memo: dict[int, Any]) -> Residency:
        return self  # a copied model computes with the same frozen experts

    def close(self) -> None:
        """End the link's threads. Nothing may be lent any more. Twice is fine."""
        self.link.close()


def _runs(places: Sequence[tuple[int, int]]) -> Iterator[tuple[int, int, int]]:
    """(first expert, first position, count) of neighbours that stay neighbours."""
    start = 0
    for i in range(1, len(places) + 1):
        if i < len(places):
            (e, position), (before, place) = places[i], places[i - 1]
            if e == before + 1 and position == place + 1:
                continue
        yield *places[start], i - start
        start = i
