"""What a way of running a model takes in memory, by part: the one place for these formulas.

`moesmith plan`, `--fit auto`, the estimate before a training run and the report when memory ran out all read
it. Weights, adapters, gradients, optimizer state and cache are counted; activations follow from the shapes of
one decoder layer; the process itself is measured once per version.
"""

# T tokens in a forward pass, H hidden size, K experts per token, V vocabulary

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from moesmith.console import size
from moesmith.errors import UserError

from .rehearsal import Rehearsal, rehearse
from .shape import Shape

Kind = Literal["train", "dpo", "decode", "serve"]
Home = Literal["device", "ram", "disk"]


@dataclass(frozen=True)
class Work:
    """What is to be done. Of the fields, each kind reads those that concern it."""

    kind: Kind
    seq: int = 2048
    """train, dpo: tokens of the longest row, padding included; decode, serve: tokens of the prompt"""
    batch: int = 1
    """train, dpo: rows (pairs) of one optimizer step, over all its forward passes"""
    lora_r: int = 16
    lora_targets: tuple[str, ...] = ("experts", "attention")
    """empty: no adapter (decode, serve)"""
    adapter_dtype: str = "float32"
    dtype: str = "bfloat16"
    learned: int | None = None
    """train: learned tokens of one row; None: all of them"""
    context: int = 4096
    """decode, serve: tokens the cache has room for, per stream"""
    streams: int = 1
    """serve: answers written at once"""
    trained: int | None = None
    """parameters that are trained, where they are known; None: from lora_r and lora_targets"""


@dataclass(frozen=True)
class Choice:
    """One way to run it."""

    scheme: str = "nf4"
    double_quant: bool = False
    linears: str | None = None
    blocksize: int = 64
    homes: str | tuple[str, ...] = "device"
    """device, ram or disk; one word for all MoE layers or one per layer (`experts/residency/policy.py`)"""
    kept: int = 0
    """experts per layer that never leave the device"""
    cache: int = 0
    """recently routed experts per layer that stay on the device (decode, serve)"""
    slots: int = 2
    """layers of experts that there is room to stage (train, prefill)"""
    checkpointing: bool = True
    optim: str = "adamw_torch"
    chunked_loss: bool = True
    batch_size: int = 1
    """rows of one forward pass"""
    grad_accum: int = 1
    """forward passes of one optimizer step"""
    layer_major: bool = False
    """every layer is staged once per optimizer step, not once per forward pass"""

    def homes_of(self, layers: int) -> tuple[str, ...]:
        """One home per MoE layer."""
        return (self.homes,) * layers if isinstance(self.homes, str) else tuple(self.homes)

    @property
    def offloaded(self) -> bool:
        """Whether any expert lies somewhere else than on the device."""
        return self.homes != "device" and any(home != "device" for home in self.homes_of(1))


PARTS = (
    "experts", "dense", "embeddings", "adapters", "gradients+optimizer", "activations", "logits", "kv cache",
    "staging", "process",
)  # fmt: skip


@dataclass(frozen=True)
class Footprint:
    """Bytes at the peak, by part (`PARTS`). On a CPU the device is the RAM, and `ram` is empty."""

    device: Mapping[str, int]
    ram: Mapping[str, int] = field(default_factory=dict)
    """with a GPU: pinned homes and the process"""
    mapped: Mapping[str, int] = field(default_factory=dict)
    """of `device` (of `ram`, with a GPU): what is memory-mapped from the checkpoint, so that the system may
    drop it and read it again; not anonymous memory"""
    disk: int = 0
    """bytes that have to lie on disk packed"""

    @property
    def peak(self) -> int:
        """Of the device."""
        return sum(self.device.values())

    @property
    def anonymous(self) -> int:
        """Of the device, without what is mapped: what `jobs/_memory.PeakMemory` measures on a CPU."""
        return self.peak - sum(self.mapped.values())

    def parts(self) -> list[tuple[str, int]]:
        """(name, bytes) of what the device holds, in the order of `PARTS`, without empty parts."""
        return [(name, self.device[name]) for name in PARTS if self.device.get(name)]

    def facts(self) -> dict[str, Any]:
        """The same for a program."""
        return {
            "device": dict(self.device), "ram": dict(self.ram), "mapped": dict(self.mapped),
            "disk": self.disk, "peak": self.peak, "ram_peak": sum(self.ram.values()),
        }  # fmt: skip

    def __str__(self) -> str:
        return " · ".join(f"{name} {size(n)}" for name, n in self.parts())


def footprint(
    shape: Shape, work: Work, choice: Choice, on_gpu: bool, process: int | None = None
) -> Footprint:
    """Memory at the peak of a training step, or of writing an answer.

    Args:
        on_gpu: whether the device is a GPU; else it is the RAM, which the process shares.
        process: bytes of RAM that Python, its libraries and the data hold; None: as measured for this kind of
            work.

    Raises:
        UserError: a placement that the model does not have, or homes that are not one per MoE layer.
    """
    held = _weights(shape, work, choice, on_gpu)
    training = work.kind in ("train", "dpo")
    width = _width(work.dtype)
    trained, kept_adapter = adapter_bytes(shape, work)
    device, ram = held.device, held.ram
    device["adapters"] = kept_adapter
    if training:
        device["gradients+optimizer"], paged = optimizer_bytes(trained, work, choice)
        if on_gpu:
            ram["gradients+optimizer"] = paged
        else:
            device["gradients+optimizer"] += paged
    else:
        streams = work.streams if work.kind == "serve" else 1
        device["kv cache"] = shape.cache_bytes(work.context, streams, width)
    device["activations"], device["logits"] = _at_the_peak(shape, work, choice, on_gpu)
    if process is None:
        process = PROCESS["train" if training else "decode"]
    if on_gpu:
        device["process"] = CUDA_CONTEXT
        ram["process"] = process + CUDA_PROCESS
    else:
        device["process"] = process + held_back(shape, work, choice)
    return Footprint(
        {part: device[part] for part in PARTS if device.get(part)},
        {part: ram[part] for part in PARTS if ram.get(part)},
        {part: n for part, n in held.mapped.items() if n},
        held.disk,
    )


# ---------------------------------------------------------------- weights


BOUNCE = 3 * (8 << 20)
"""pinned buffers between disk and device (`experts/residency/link.py`)"""


@dataclass
class _Held:
    """Where the weights are."""

    device: dict[str, int] = field(default_factory=dict)
    ram: dict[str, int] = field(default_factory=dict)
    mapped: dict[str, int] = field(default_factory=dict)
    disk: int = 0


def _weights(shape: Shape, work: Work, choice: Choice, on_gpu: bool) -> _Held:
    width = _width(work.dtype)
    held = _Held()
    layers = shape.expert_bytes(choice.scheme, choice.double_quant, choice.blocksize, width)
    homes = choice.homes_of(len(layers))
    if len(homes) != len(layers):
        raise UserError(f"{len(homes)} homes for {len(layers)} MoE layers", "give one per layer, or one word")
    linears = shape.linear_bytes(choice.linears, choice.double_quant, width)
    held.device["dense"] = linears + width * (shape.routers + shape.rest)
    held.device["embeddings"] = width * shape.embeddings
    resident = staging = cached = waiting = on_disk = 0
    slots = min(choice.slots, sum(home != "device" for home in homes))
    for experts, nbytes, home in zip(shape.experts, layers, homes, strict=True):
        if home == "device":
            resident += nbytes
            continue
        unit = nbytes / experts.num_experts
        kept = min(choice.kept, experts.num_experts)
        resident += round(kept * unit)
        cached += round(min(choice.cache, experts.num_experts - kept) * unit)
        staging = max(staging, round((experts.num_experts - kept) * unit))
        if home == "ram":
            waiting += nbytes
        else:
            on_disk += nbytes
    from_disk = shape.packed_on_disk or on_disk > 0
    dense = sum(held.device.values())
    held.disk = sum(layers) + dense if from_disk else 0
    if on_gpu:
        held.device["experts"] = resident
        held.device["staging"] = slots * staging + cached
        held.ram["experts"] = waiting
        held.ram["staging"] = BOUNCE if on_disk else 0
        return held
    # On a CPU experts on disk are computed with where they are mapped: nothing is kept, cached or staged.
    held.device["experts"] = sum(layers) - on_disk
    held.device["staging"] = slots * staging + cached if waiting else 0
    if from_disk:
        held.mapped = {part: held.device[part] for part in ("experts", "dense", "embeddings")}
    return held


# ---------------------------------------------------------------- what training adds


def trained_parameters(shape: Shape, work: Work) -> int:
    """Parameters of the adapter."""
    if work.trained is not None:
        return work.trained
    return sum(shape.lora_parameters(work.lora_r, work.lora_targets).values())


def adapter_bytes(shape: Shape, work: Work) -> tuple[int, int]:
    """(parameters, bytes) of the adapter."""
    trained = trained_parameters(shape, work)
    return trained, trained * _width(work.adapter_dtype)


STATES = (("8bit", 2), ("adafactor", 1), ("sgd", 0), ("lion", 4))
"""word in an optimizer's name -> bytes of state per parameter; others keep two moments like AdamW"""


def optimizer_bytes(trained: int, work: Work, choice: Choice) -> tuple[int, int]:
    """(bytes that are on the device, bytes that a paged optimizer can push out to RAM)."""
    width = _width(work.adapter_dtype)
    state = next((n for word, n in STATES if word in choice.optim), 2 * width) * trained
    paged = choice.optim.startswith("paged")
    return trained * width + (0 if paged else state), state if paged else 0


# ---------------------------------------------------------------- what a forward and backward takes


def _at_the_peak(shape: Shape, work: Work, choice: Choice, on_gpu: bool) -> tuple[int, int]:
    """(activations, logits) when there is most of both.

    The output head runs between the forward and the backward pass: its tiles are gone when a layer's backward
    needs room. Whichever of the two takes more is the peak.
    """
    played = activations(shape, work, choice)
    head = logit_bytes(shape, work, choice, on_gpu)
    if played.between + head >= played.peak:
        return played.between, head
    return played.peak, 0


def activations(shape: Shape, work: Work, choice: Choice) -> Rehearsal:
    """What one forward pass leaves and the most that it or its backward holds, the output head left out."""
    training = work.kind in ("train", "dpo")
    played = rehearse(
        shape, work.seq, choice.checkpointing if training else None, work.lora_r,
        tuple(work.lora_targets) if training else (), work.adapter_dtype, work.dtype,
    )  # fmt: skip
    if played is None:
        played = _by_formula(shape, work, choice)
    if not training:
        return played
    played = played.times(_rows(work, choice))
    if choice.layer_major:  # the layers' inputs of all rows, and the work of one slice
        more = (choice.grad_accum - 1) * played.between
        played = Rehearsal(played.between + more, played.peak + more)
    return played


# How many copies of a token's hidden vector one decoder layer holds while its backward runs, with everything
# recomputed once: residuals, norms, q/k/v/o and their gradients. Measured on OLMoE and Mixtral shapes, CPU.
LAYER_COPIES = 24
# The same for routed rows in the experts: gate, up, their product, the rows themselves, and gradients.
ROW_COPIES = 4


def _by_formula(shape: Shape, work: Work, choice: Choice) -> Rehearsal:
    """One row of an architecture that cannot be rehearsed."""
    width = _width(work.dtype)
    routed = max((layer.top_k * layer.wide for layer in shape.experts), default=0) * work.seq * width
    one_layer = LAYER_COPIES * work.seq * shape.hidden * width
    if work.kind not in ("train", "dpo"):
        return Rehearsal(0, one_layer // 3 + routed)
    between = shape.layers * work.seq * shape.hidden * width
    if not choice.checkpointing:
        between = between * LAYER_COPIES // 2 + shape.layers * ROW_COPIES * routed // 2
    return Rehearsal(between, between + one_layer + ROW_COPIES * routed)


def _rows(work: Work, choice: Choice) -> int:
    """Sequences of one forward pass: a pair is two."""
    return choice.batch_size * (2 if work.kind == "dpo" else 1)


# TRL's fused head works in tiles of this many tokens by this much of the vocabulary: on a GPU its own, on a
# CPU what train/head_tiles.py sets.
GPU_TILE, CPU_TILE = (4096, 32768), (256, 8192)
TILE_BYTES = 31
"""of a tile's element without Triton: the tile, seven float32 copies of it in its backward, and a mask"""
TILE_SCRATCH = 12
"""more, of oneDNN's own for these products. Measured: 11 to 13 with 256 and 1,024 tokens, 2-core CPU"""


def logit_bytes(shape: Shape, work: Work, choice: Choice, on_gpu: bool) -> int:
    """What the output head takes: a tile of the vocabulary, or all of it without the chunked loss."""
    width = _width(work.dtype)
    if work.kind not in ("train", "dpo"):
        streams = work.streams if work.kind == "serve" else 1
        return streams * shape.vocabulary * (width + 4)
    rows = _rows(work, choice) * (choice.grad_accum if choice.layer_major else 1)
    learned = rows * (work.seq if work.learned is None else work.learned)
    if not choice.chunked_loss:
        return rows * work.seq * shape.vocabulary * (width + 2 * 4)
    tokens, vocabulary = GPU_TILE if on_gpu else CPU_TILE
    tile = min(learned, tokens) * min(shape.vocabulary, vocabulary)
    if on_gpu:
        tile_bytes = tile * width
    else:  # the backward multiplies by a float32 copy of the head's part
        tile_bytes = tile * (width - 2 + TILE_BYTES + TILE_SCRATCH)
        tile_bytes += min(shape.vocabulary, vocabulary) * shape.hidden * 4
    return tile_bytes + learned * shape.hidden * (4 + 2 * width)


# ---------------------------------------------------------------- the process

PROCESS = {"train": 405_000_000, "decode": 352_000_000}
"""anonymous memory of Python and its libraries once everything is imported and a packed model is mapped"""
WARM_UP = {"train": 120_000_000, "decode": 42_000_000}
"""RAM that torch's CPU kernels take as they meet new shapes, and late imports"""
FROM_THE_HEAP = 32 << 20
"""larger blocks are mapped one by one; below it, all that are smaller than the largest one freed so far
come from the C library's heap, which keeps what is freed in its middle"""
PINNED_BLOCKS = 1.8
"""such blocks that stay in the heap for every layer whose input is kept behind them. Measured: 0.8 to 3.8,
and as much between two runs of the same thing"""
CUDA_CONTEXT = 500_000_000
"""device memory of a CUDA context and its libraries' workspaces; not measured"""
CUDA_PROCESS = 1_000_000_000
"""RAM that CUDA adds to the process; not measured"""


def held_back(shape: Shape, work: Work, choice: Choice) -> int:
    """RAM that a CPU process has beside its imports and its tensors: kernels, and what the heap keeps."""
    if work.kind not in ("train", "dpo"):
        return WARM_UP["decode"]
    if not choice.checkpointing or choice.layer_major:  # layer-major keeps large blocks out of the heap
        return WARM_UP["train"]
    width = _width(work.dtype)
    rows = _rows(work, choice) * work.seq * max((layer.top_k for layer in shape.experts), default=1)
    columns = {
        shape.hidden,
        *(side for e in shape.experts for _, n, d in e.stacks.values() for side in (n, d)),
    }
    tokens = _rows(work, choice) * (work.seq if work.learned is None else work.learned)
    tile = min(tokens, CPU_TILE[0]) * min(shape.vocabulary, CPU_TILE[1]) * width
    blocks = [rows * wide * width for wide in columns]
    largest = max((n for n in [*blocks, tile] if n <= FROM_THE_HEAP), default=0)
    pinned = max((n for n in blocks if n < largest), default=0)
    return WARM_UP["train"] + int(PINNED_BLOCKS * pinned * shape.layers)


def _width(dtype: str) -> int:
    return 4 if dtype == "float32" else 2
