"""How long a step or a token takes: compute, bytes moved, and what of them hides behind each other.

An estimate from a handful of rates (`machine.py`): good for ranking, not for a promise. Three things are
guesses: how often a cache of recent experts is hit, how much of the products' rate a whole model reaches, and
that a staged layer arrives while the one before it is computed whenever there are two slots.
"""

# K experts per token, E experts of a layer, T tokens

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from .footprint import Choice, Work, trained_parameters
from .machine import Machine
from .shape import PLAIN, Experts, Shape

REACHED = 0.6
"""of the products' rate: norms, attention, routing and Python beside them (guess)"""
MAPPED_READS = 0.5
"""of the disk's sequential rate: an expert is read in pages, not in one go (guess)"""


MAPPED_COST = 1.3
"""decoding on a CPU with mapped experts that are in memory, against resident ones: looking ahead, and asking
the system for what is there anyway. Measured 1.3 to 1.7 on a small model"""


@dataclass(frozen=True)
class Times:
    """Expected seconds: of an optimizer step (train, dpo), or of a token of every stream (decode, serve)."""

    seconds: float
    tokens_per_second: float
    bound: str
    """what takes most of it: compute, memory, link, disk"""
    parts: Mapping[str, float] = field(default_factory=dict)
    """seconds by what is busy; those that overlap do not add up"""
    moved: int = 0
    """bytes of experts brought to the device in that time"""


def times(shape: Shape, work: Work, choice: Choice, machine: Machine, spare: int | None = None) -> Times:
    """Expected time of one optimizer step, or of one decoded token.

    Args:
        spare: on a CPU with experts on disk, bytes of RAM that are left for the page cache; None: none.
    """
    if work.kind in ("train", "dpo"):
        return _step(shape, work, choice, machine, spare or 0)
    return _token(shape, work, choice, machine, spare or 0)


# ---------------------------------------------------------------- a training step


def _step(shape: Shape, work: Work, choice: Choice, machine: Machine, spare: int) -> Times:
    rows = choice.batch_size * choice.grad_accum * (2 if work.kind == "dpo" else 1)
    tokens = rows * work.seq
    # forward, gradient of the inputs, and once more what was not kept; no gradient of frozen weights
    passes = 3 if choice.checkpointing else 2
    dense = sum(r * c for r, c in shape.linears) + shape.head
    experts = sum(_active(layer) for layer in shape.experts)
    adapters = trained_parameters(shape, work) * _share_active(shape, work)
    attention = shape.layers * work.seq * shape.hidden  # half of the positions, keys and values
    rate = machine.rows if choice.scheme not in PLAIN else machine.gemm
    # Rows per expert decide how far the packed kernels get: 64 is what `rows` was measured at.
    compute = 2 * tokens * passes * ((dense + attention) / machine.gemm + (experts + 2 * adapters) / rate)
    compute /= REACHED
    forwards = 1 if choice.layer_major else choice.grad_accum
    unpack = 0.0
    if machine.on_gpu and choice.scheme not in PLAIN:  # codes to 16 bits through memory, for every slice
        unpack = choice.grad_accum * passes * 4.5 * shape.expert_parameters / machine.memory
    moved, busy = _staged(shape, work, choice, machine, forwards, spare)
    own = compute + unpack
    parts = {"compute": compute, "memory": unpack, **busy}
    hidden = choice.slots >= 2 or not machine.on_gpu
    seconds = max(own, *busy.values(), 0.0) if hidden else own + sum(busy.values())
    bound = max(parts, key=lambda name: parts[name])
    return Times(seconds, tokens / seconds, bound, {k: v for k, v in parts.items() if v}, moved)


def _staged(
    shape: Shape, work: Work, choice: Choice, machine: Machine, forwards: int, spare: int
) -> tuple[int, dict[str, float]]:
    """Bytes that whole layers bring to the device in a step, and seconds by what brings them."""
    layers = shape.expert_bytes(choice.scheme, choice.double_quant, choice.blocksize)
    times_ = forwards * (2 if choice.checkpointing else 1)
    moved = {"ram": 0.0, "disk": 0.0}
    for experts, nbytes, home in zip(shape.experts, layers, choice.homes_of(len(layers)), strict=True):
        if home != "device":
            moved[home] += nbytes * (1 - min(choice.kept, experts.num_experts) / experts.num_experts)
    busy = {}
    if machine.on_gpu:
        total = (moved["ram"] + moved["disk"]) * times_
        busy["link"] = total / machine.link
        if moved["disk"]:
            busy["disk"] = max(0.0, moved["disk"] - spare) * times_ / machine.disk
        return int(total), busy
    missed = max(0.0, moved["disk"] - spare)  # a CPU computes with what is mapped; only what is not cached
    if missed:
        busy["disk"] = missed * times_ / machine.disk
    return int(missed * times_), busy


# ---------------------------------------------------------------- a token


def _token(shape: Shape, work: Work, choice: Choice, machine: Machine, spare: int) -> Times:
    streams = work.streams if work.kind == "serve" else 1
    # bitsandbytes' packed linears save time on a GPU only: its CPU code is no faster than 16 bits.
    linears = shape.linear_bytes(choice.linears if machine.on_gpu else None, choice.double_quant)
    dense = linears + 2 * (shape.head + shape.routers)
    layers = shape.expert_bytes(choice.scheme, choice.double_quant, choice.blocksize)
    total = sum(layers) or 1
    read = missed_ram = missed_disk = 0.0
    for experts, nbytes, home in zip(shape.experts, layers, choice.homes_of(len(layers)), strict=True):
        unit = nbytes / experts.num_experts
        wanted = distinct(experts, streams)
        read += wanted * unit
        if home == "device":
            continue
        if not machine.on_gpu:
            held = experts.num_experts * min(1.0, spare / total)
        else:
            held = min(experts.num_experts, choice.kept + choice.cache)
        missed = wanted * unit * (1 - hit_rate(held, experts.num_experts))
        if home == "ram":
            missed_ram += missed
        else:
            missed_disk += missed
    kernel = machine.memory if choice.scheme in PLAIN else machine.packed
    adapters = 4 * trained_parameters(shape, work) * _share_active(shape, work) if work.lora_targets else 0
    cache_read = shape.cache_bytes(min(work.context, work.seq), streams)
    parts = {"memory": read / kernel + (dense + adapters + cache_read) / machine.memory}
    if machine.on_gpu:
        parts["link"] = (missed_ram + missed_disk) / machine.link
    if missed_disk:
        parts["disk"] = missed_disk / (machine.disk * MAPPED_READS)
    if not machine.on_gpu and choice.offloaded:
        parts["memory"] *= MAPPED_COST
    seconds = sum(parts.values())  # the next layer's experts are only known when this layer is done
    bound = max(parts, key=lambda name: parts[name])
    moved = int(missed_ram + missed_disk)
    return Times(seconds, streams / seconds, bound, {k: v for k, v in parts.items() if v}, moved)


def distinct(experts: Experts, streams: int) -> float:
    """How many experts of a layer `streams` tokens reach, each K of E at random."""
    if not experts.num_experts:
        return 0.0
    return experts.num_experts * (1 - (1 - experts.top_k / experts.num_experts) ** streams)


def hit_rate(held: float, num_experts: int) -> float:
    """How often a routed expert is among the `held` recently used ones of a layer.

    A guess: the square root of their share. Routing repeats itself from token to token, so it is more than
    the share itself; `moesmith chat --transfers` measures it.
    """
    return min(1.0, held / num_experts) ** 0.5 if num_experts else 1.0


def _active(experts: Experts) -> float:
    """Parameters that a token meets."""
    return experts.parameters * experts.top_k / experts.num_experts if experts.num_experts else 0.0


@cache
def _share_active(shape: Shape, work: Work) -> float:
    """Of the adapter, the share that a token meets."""
    try:
        counts = shape.lora_parameters(work.lora_r, work.lora_targets)
    except KeyError:
        return 1.0
    total = sum(counts.values())
    if not total:
        return 0.0
    every = max((layer.num_experts for layer in shape.experts), default=1)
    top_k = max((layer.top_k for layer in shape.experts), default=1)
    return (total - counts.get("experts", 0) * (1 - top_k / every)) / total
