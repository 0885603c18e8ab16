"""Experts out of dense FFNs: what `init:` of a build recipe means.

    copy              every expert is its source's FFN
    split             one FFN cut into disjoint groups of its neurons (`split.py` finds them)
    drop:P            a share P of each expert's neurons drawn anew
    noise:S           noise of S standard deviations on every matrix
    virtual-group:G   every source's FFN cut into G experts that are picked together
    lora:R            the base's FFN + the best rank-R approximation of what the source changed

A matrix is made when its place in the output file is reached, and not kept: source, adapter, mode, noise,
factor of down_proj, in fp32 and rounded once. Where nothing has to be made, it is a range of the source's
bytes. Random numbers depend on seed, layer, expert and matrix only, so the order of making does not matter.

Shapes: F FFN width, H hidden size, E experts, I expert width, N sources, G experts per source.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from moesmith.errors import UserError
from moesmith.models.ranges import Made, Piece

from .adapter import read_adapter
from .native import Kind
from .sources import FLOATS, Source, rounded

OVERSAMPLE = 16  # columns of the random sketch beyond the rank
ROWS = 1024  # that random numbers and squares are held for at a time
ITERATIONS = 4  # of subspace iteration: what fine-tuning changes has a flat spectrum


@dataclass(frozen=True)
class ExpertSource:
    """Where one entry of a recipe's experts comes from."""

    source: Source
    base: Source
    """the model that gives everything else"""
    adapter: Path | None = None
    """a PEFT LoRA folder"""
    residual_scale: float = 1.0
    """multiplies down_proj"""
    noise_scale: float = 0.0
    """noise on every matrix, in standard deviations of that matrix"""


class Experts(Protocol):
    """The experts of a MoE, one matrix at a time."""

    num_experts: int
    width: int

    def part(self, layer: int, expert: int, kind: Kind) -> Piece | Made:
        """One whole matrix: gate and up (I, H), down (H, I)."""
        ...

    def facts(self) -> dict[str, Any]:
        """What was done; complete once everything is written."""
        ...


@dataclass(frozen=True)
class Mode:
    """One way of making experts, and the number that it takes."""

    form: str
    meaning: str
    number: type[int] | type[float] | None = None
    least: float = 0
    most: float = math.inf


MODES = {
    "copy": Mode("copy", "every expert is its source's FFN"),
    "split": Mode("split", "one FFN cut into num_experts experts"),
    "drop": Mode("drop:P", "P from 0 to 1: the share of neurons drawn anew", float, 0, 1),
    "noise": Mode("noise:S", "S from 0: noise in standard deviations of each matrix", float),
    "virtual-group": Mode("virtual-group:G", "G from 2: the experts each FFN is cut into", int, 2),
    "lora": Mode("lora:R", "R from 0: the rank that is kept of what a source changed", int),
}


def parse_init(text: str) -> tuple[str, float | int | None]:
    """ "drop:0.5" -> ("drop", 0.5); a mode without a number has None.

    Raises:
        UserError: no such mode, or a number that it does not take.
    """
    name, colon, given = str(text).partition(":")
    mode = MODES.get(name)
    modes = "; ".join(f"{known.form} ({known.meaning})" for known in MODES.values())
    if mode is None:
        raise UserError(f"init={text}: no such mode", f"choose from: {modes}")
    if mode.number is None:
        if colon:
            raise UserError(f"init={text}: {name} takes no number", f"choose from: {modes}")
        return name, None
    try:
        number = mode.number(given)
    except ValueError:
        number = math.nan
    if not (mode.least <= number <= mode.most and math.isfinite(number)):
        raise UserError(f"init={text}: wanted {mode.form}, {mode.meaning}", f"choose from: {modes}")
    return name, number


def make_experts(
    init: str,
    experts: Sequence[ExpertSource],
    dtype: torch.dtype,
    seed: int,
    split: Sequence[Tensor] | None = None,
    fold: float = 1.0,
) -> Experts:
    """Experts of `dtype` out of the FFNs of `experts`; nothing is computed yet.

    Args:
        split: for init "split", of each layer the neurons of every expert, (E, I) int64.
        fold: for init "split", multiplied into down_proj: the top-k of a router whose weights add up to 1.

    Raises:
        UserError: `init` or an adapter is not what it should be, or the FFN width does not divide.
    """
    name, number = parse_init(init)
    if name == "split":
        assert split is not None and len(experts) == 1, "split: one FFN and its neurons"
        return SplitExperts(init, experts, dtype, seed, split, fold)
    assert split is None and fold == 1.0, "only init: split takes these"
    if name == "virtual-group":
        return GroupExperts(init, experts, dtype, seed, int(number or 0))
    if name == "drop":
        return DropExperts(init, experts, dtype, seed, float(number or 0))
    if name == "lora":
        return LowRankExperts(init, experts, dtype, seed, int(number or 0))
    return WholeExperts(init, experts, dtype, seed, noise=float(number or 0))


def repeat_rows(router: Tensor, group: int) -> Tensor:
    """Router rows for virtual groups: (N, H), G -> (N*G, H), G equal rows for each source.

    Equal rows give equal logits, so a top-k of a multiple of G takes whole groups. Except where the logits
    of two sources are the same number at the boundary: there a top-k may take some experts of each. Of random
    rows in bf16 that is 1 to 7 tokens in 1,000 per layer (4 to 16 sources), in fp32 below 1 in 100,000.
    """
    return router.repeat_interleave(group, dim=0)


class WholeExperts:
    """Every source's FFN is one expert; copied as it is unless there is something to change."""

    def __init__(
        self,
        init: str,
        experts: Sequence[ExpertSource],
        dtype: torch.dtype,
        seed: int,
        noise: float = 0.0,
        fold: float = 1.0,
    ):
        self.init, self.dtype, self.seed = init, dtype, seed
        self.entries = list(experts)
        self.adapters = [read_adapter(e.adapter, e.source) if e.adapter else None for e in experts]
        # Both kinds of noise are independent, so their variances add.
        self.noise = [math.hypot(noise, entry.noise_scale) for entry in experts]
        self.factor = [entry.residual_scale * fold for entry in experts]
        self.num_experts = len(self.entries)
        self.width = self.entries[0].source.ffn_width
        self._copied: set[tuple[int, int, Kind]] = set()
        self._made: set[tuple[int, int, Kind]] = set()

    def part(self, layer: int, expert: int, kind: Kind) -> Piece | Made:
        """One whole matrix: gate and up (I, H), down (H, I)."""
        source = self._origin(layer, expert, kind)
        if source is not None:
            self._copied.add((layer, expert, kind))
            return source.piece(source.ffn(layer, kind))
        nbytes = self.width * self.entries[0].source.hidden_size * self.dtype.itemsize
        return Made(nbytes, lambda: self._bytes(layer, expert, kind))

    def matrix(self, layer: int, expert: int, kind: Kind) -> Tensor:
        """What `part` stands for, as a tensor; it may be a view of the source's file."""
        return self._entry_matrix(layer, expert, kind)

    def facts(self) -> dict[str, Any]:
        """What was done; complete once everything is written."""
        adapters = [
            {"expert": number, "folder": str(adapter.folder), "trained_on": adapter.trained_on}
            | {"merged": len(adapter.deltas), "left_out": adapter.left_out}
            for number, adapter in enumerate(self.adapters)
            if adapter
        ]
        return {
            "init": self.init,
            "matrices_copied": len(self._copied),
            "matrices_made": len(self._made),
            "adapters": adapters,
        }

    def _changes(self, layer: int, entry: int, kind: Kind) -> bool:
        """Whether the mode changes this matrix."""
        return False

    def _change(self, layer: int, entry: int, kind: Kind, weight: Tensor) -> Tensor:
        """The mode's change to a whole fp32 matrix of a source, which may be overwritten."""
        return weight

    def _origin(self, layer: int, entry: int, kind: Kind) -> Source | None:
        """The model that has this matrix byte for byte; None if it has to be made."""
        adapter, source = self.adapters[entry], self.entries[entry].source
        stored = FLOATS[source.tensors[source.ffn(layer, kind)].dtype]
        changed = (
            stored != self.dtype
            or self._changes(layer, entry, kind)
            or self.noise[entry]
            or (kind == "down" and self.factor[entry] != 1)
            or (adapter and (layer, kind) in adapter.deltas)
        )
        return None if changed else source

    def _entry_matrix(self, layer: int, entry: int, kind: Kind) -> Tensor:
        """A source's whole matrix with everything done to it, in the dtype of the output."""
        origin = self._origin(layer, entry, kind)
        if origin is not None:
            return origin.read(origin.ffn(layer, kind))
        source, adapter = self.entries[entry].source, self.adapters[entry]
        # A copy: what `read` gives may lie in the file itself.
        weight = source.read(source.ffn(layer, kind)).to(torch.float32, copy=True)
        if adapter:
            adapter.merge(layer, kind, weight)
        if self._changes(layer, entry, kind):
            weight = self._change(layer, entry, kind, weight)
        if self.noise[entry]:
            size = self.noise[entry] * float(weight.std(correction=0))
            random = generator(self.seed, layer, entry, kind)
            for rows in weight.split(ROWS):
                rows.add_(torch.randn(rows.shape, generator=random), alpha=size)
        if kind == "down" and self.factor[entry] != 1:
            weight.mul_(self.factor[entry])
        return rounded(weight, self.dtype, source.name, source.ffn(layer, kind))

    def _bytes(self, layer: int, expert: int, kind: Kind) -> memoryview:
        self._made.add((layer, expert, kind))
        flat = self.matrix(layer, expert, kind).contiguous().view(-1)
        return flat.view(torch.uint8).numpy().data


class DropExperts(WholeExperts):
    """Drop-Upcycling (arXiv 2502.19261): some neurons of each expert are drawn anew.

    The same neurons in gate, up and down, others in every expert; values from a normal distribution with
    mean and standard deviation of what they replace, for each matrix.
    """

    def __init__(
        self, init: str, experts: Sequence[ExpertSource], dtype: torch.dtype, seed: int, share: float
    ):
        super().__init__(init, experts, dtype, seed)
        self.redrawn = round(share * self.width)

    def neurons(self, layer: int, expert: int) -> Tensor:
        """Which neurons of an expert are drawn anew, sorted."""
        order = torch.randperm(self.width, generator=generator(self.seed, layer, expert, "neurons"))
        return order[: self.redrawn].sort().values

    def facts(self) -> dict[str, Any]:
        """As above, with the number of neurons that were drawn anew."""
        share = self.redrawn / self.width
        return super().facts() | {"neurons": self.width, "redrawn": self.redrawn, "redrawn_share": share}

    def _changes(self, layer: int, entry: int, kind: Kind) -> bool:
        return self.redrawn > 0

    def _change(self, layer: int, entry: int, kind: Kind, weight: Tensor) -> Tensor:
        across = 1 if kind == "down" else 0
        neurons = self.neurons(layer, entry)
        old = weight.index_select(across, neurons)
        draw = torch.randn(old.shape, generator=generator(self.seed, layer, entry, f"drop {kind}"))
        return weight.index_copy_(across, neurons, draw * old.std(correction=0) + old.mean())


class LowRankExperts(WholeExperts):
    """The base's FFN plus a low-rank part of the difference, as extracting a LoRA and merging it would."""

    def __init__(self, init: str, experts: Sequence[ExpertSource], dtype: torch.dtype, seed: int, rank: int):
        super().__init__(init, experts, dtype, seed)
        self.rank = rank
        self.energy: dict[tuple[int, int, Kind], tuple[float, float]] = {}
        """layer, expert, kind -> squared norm of the difference: kept, all"""

    def facts(self) -> dict[str, Any]:
        """As above, with the share of the difference's squared norm that its rank-R part holds.

        A matrix that equals the base's has no difference and is in no share.
        """
        kept: dict[int, dict[str, float]] = {}
        for layer, kind in sorted({(layer, kind) for layer, _, kind in self.energy}):
            pairs = [pair for key, pair in self.energy.items() if (key[0], key[2]) == (layer, kind)]
            kept.setdefault(layer, {})[kind] = math.fsum(p[0] for p in pairs) / math.fsum(p[1] for p in pairs)
        worst = min(
            self.energy, key=lambda key: (self.energy[key][0] / self.energy[key][1], key), default=None
        )
        return super().facts() | {
            "rank": self.rank,
            "kept": [{"layer": layer, **shares} for layer, shares in kept.items()],
            "smallest": worst
            and {"layer": worst[0], "expert": worst[1], "kind": worst[2]}
            | {"share": self.energy[worst][0] / self.energy[worst][1]},
        }

    def _differs(self, layer: int, entry: int, kind: Kind) -> bool:
        adapter, expert = self.adapters[entry], self.entries[entry]
        merged = adapter is not None and (layer, kind) in adapter.deltas
        return merged or expert.source.folder != expert.base.folder

    def _changes(self, layer: int, entry: int, kind: Kind) -> bool:
        return self._differs(layer, entry, kind)

    def _change(self, layer: int, entry: int, kind: Kind, weight: Tensor) -> Tensor:
        base = self.entries[entry].base
        start = base.read(base.ffn(layer, kind)).float()
        delta = weight.sub_(start)
        if not all(map(math.isfinite, delta.aminmax())):
            name = self.entries[entry].source.name
            raise UserError(
                f"{name}: {kind}_proj of layer {layer} holds NaN or infinity, or that of {base.name} does",
                "the weights are damaged: fetch them again",
            )
        total = _energy(delta)
        if not total:
            return delta.add_(start)
        left, right = low_rank(delta, self.rank, generator(self.seed, layer, entry, f"lora {kind}"))
        # The columns of `left` are orthonormal: the squared norm of the product is that of `right`.
        self.energy[layer, entry, kind] = (_energy(right), total)
        return torch.addmm(start, left, right, out=delta)


class SlicedExperts(WholeExperts):
    """Experts that are neurons picked out of a source's FFN.

    The matrix read last is kept for each kind, since the experts of one FFN follow each other: at most one
    FFN, and only views of the file where nothing has to be made.
    """

    def __init__(
        self,
        init: str,
        experts: Sequence[ExpertSource],
        dtype: torch.dtype,
        seed: int,
        per_entry: int,
        width: int,
        fold: float,
    ):
        super().__init__(init, experts, dtype, seed, fold=fold)
        self.per_entry, self.width = per_entry, width
        self.num_experts = per_entry * len(self.entries)
        self._kept: dict[Kind, tuple[tuple[int, int], Tensor]] = {}

    def members(self, layer: int) -> Tensor:
        """The neurons of the experts of one FFN, (experts per FFN, I)."""
        raise NotImplementedError

    def part(self, layer: int, expert: int, kind: Kind) -> Piece | Made:
        """One whole matrix: gate and up (I, H), down (H, I)."""
        nbytes = self.width * self.entries[0].source.hidden_size * self.dtype.itemsize
        return Made(nbytes, lambda: self._bytes(layer, expert, kind))

    def matrix(self, layer: int, expert: int, kind: Kind) -> Tensor:
        """What `part` stands for, as a tensor."""
        entry, number = divmod(expert, self.per_entry)
        if kind not in self._kept or self._kept[kind][0] != (layer, entry):
            self._kept.pop(kind, None)  # before the next is made
            self._kept[kind] = (layer, entry), self._entry_matrix(layer, entry, kind)
        across = 1 if kind == "down" else 0
        return self._kept[kind][1].index_select(across, self.members(layer)[number])


class SplitExperts(SlicedExperts):
    """One FFN cut into the given groups of neurons; down_proj is multiplied by `fold`."""

    def __init__(
        self,
        init: str,
        experts: Sequence[ExpertSource],
        dtype: torch.dtype,
        seed: int,
        split: Sequence[Tensor],
        fold: float,
    ):
        count, width = split[0].shape
        assert count * width == experts[0].source.ffn_width and len(split) == experts[0].source.num_layers
        super().__init__(init, experts, dtype, seed, count, width, fold)
        self.split = list(split)

    def members(self, layer: int) -> Tensor:
        """(E, I)."""
        return self.split[layer]


class GroupExperts(SlicedExperts):
    """Virtual groups (arXiv 2410.07524): G experts hold the neurons of one FFN and are picked together.

    The weights of a group's G experts are equal and add up to the weight of their source, so G is
    multiplied into down_proj. The cut is random, the same for every source of a layer.
    """

    def __init__(self, init: str, experts: Sequence[ExpertSource], dtype: torch.dtype, seed: int, group: int):
        ffn_width = experts[0].source.ffn_width
        width, rest = divmod(ffn_width, group)
        if rest:
            fits = ", ".join(str(n) for n in range(2, min(ffn_width, 64) + 1) if ffn_width % n == 0)
            raise UserError(f"init={init}: {group} does not divide the FFN width {ffn_width}", f"{fits} do")
        super().__init__(init, experts, dtype, seed, group, width, fold=group)

    def members(self, layer: int) -> Tensor:
        """(G, I)."""
        order = torch.randperm(self.width * self.per_entry, generator=generator(self.seed, layer, 0, "group"))
        return order.view(self.per_entry, self.width).sort(dim=1).values

    def facts(self) -> dict[str, Any]:
        """As above, with the number of experts that belong together."""
        return super().facts() | {"group": self.per_entry, "sources": len(self.entries)}


def low_rank(delta: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Factors (m, R), (R, n) of the best rank-R approximation of `delta` (m, n); the first is orthonormal.

    Randomised subspace iteration (Halko 2011); exact when R reaches the rank of `delta`. `torch.svd_lowrank`
    does the same but draws from the global generator.
    """
    size = min(rank + OVERSAMPLE, *delta.shape)
    basis = torch.linalg.qr(delta @ torch.randn(delta.shape[1], size, generator=generator)).Q
    for _ in range(ITERATIONS):
        basis = torch.linalg.qr(delta @ torch.linalg.qr(delta.T @ basis).Q).Q
    u, _, _ = torch.linalg.svd(basis.T @ delta, full_matrices=False)
    left = basis @ u[:, :rank]
    return left, left.T @ delta


def _energy(matrix: Tensor) -> float:
    """Squared norm, added up in fp64."""
    return math.fsum(float(rows.square().sum(dtype=torch.float64)) for rows in matrix.split(ROWS))


def generator(seed: int, layer: int, expert: int, what: str) -> torch.Generator:
    """Random numbers for one purpose, whatever else is drawn before."""
    digest = hashlib.sha256(f"{seed}/{layer}/{expert}/{what}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:4], "big"))
