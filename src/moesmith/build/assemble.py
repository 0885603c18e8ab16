"""The tensors of a Mixture-of-Experts model put together from dense ones on disk, and its folder written.

First a plan: every tensor of the target class is given the byte ranges, or the makers, of its parts, and the
whole is held against the class itself. Then it is written from first to last byte. What is no FFN comes from
the base, byte for byte in the same dtype. One made part is in memory at a time, never a stack of experts.
"""

# H hidden size, E experts, I expert width, S width of the shared expert

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from moesmith.errors import UserError
from moesmith.models.checkpoint import PAPERS, side_files
from moesmith.models.custom import write_code
from moesmith.models.headers import read_headers
from moesmith.models.ranges import SHARD_BYTES, Made, NewTensor, Piece, full_disk, write_checkpoint
from moesmith.models.rewrite import live_names

from .native import KINDS, Kind, Layout, layout_of, meta_model, model_class
from .sources import DTYPE_NAMES, FLOATS, Source, rounded

if TYPE_CHECKING:
    from .modes import Experts

_LAYER = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class SharedSource:
    """The FFNs of a dense model as the expert that every token goes through.

    A layer writes weight * shared + (1 - weight) * routed. The class adds the two and may multiply the
    shared one by a sigmoid, which stays at 1/2 here; the rest is folded into both down_proj.
    """

    source: Source
    weight: float = 0.5


def assemble(
    base: Source,
    config: PreTrainedConfig,
    experts: Experts,
    routers: Sequence[Tensor],
    shared: SharedSource | None = None,
) -> list[NewTensor]:
    """All tensors of a model of `config` (see `native.target_config`), in the order of its layers.

    Args:
        config: its dtype is what experts and routers are written in.
        routers: of each layer, (E, H) fp32.

    Raises:
        UserError: the weight of the shared expert is out of range, or a tensor of the base has no place in
            the class, or the reverse.
    """
    layout = layout_of(config.model_type)
    if shared is not None and not 0 < shared.weight < 1:
        raise UserError(f"shared_expert: weight={shared.weight}, wanted a share between 0 and 1")
    assert len(routers) == base.num_layers, f"{len(routers)} routers for {base.num_layers} layers"
    assert getattr(config, layout.num_experts) == experts.num_experts
    assert getattr(config, layout.width) == experts.width
    plan = _Plan(base, config, experts, layout, shared)
    for name in base.tensors:
        if not _LAYER.match(name) and not name.startswith(("model.norm.", "lm_head.")):
            plan.other(name)
    for layer in range(base.num_layers):
        ffn = {base.ffn(layer, kind) for kind in KINDS}
        for name in base.tensors:
            if name.startswith(f"model.layers.{layer}.") and name not in ffn:
                plan.other(name)
        plan.router(layer, routers[layer])
        plan.experts_of(layer)
        plan.shared_of(layer)
    for name in base.tensors:
        if name.startswith(("model.norm.", "lm_head.")):
            plan.other(name)
    _check_places(base, config, plan.tensors)
    return plan.tensors


def write_model(
    base: Source,
    out: Path,
    config: PreTrainedConfig,
    tensors: list[NewTensor],
    on_bytes: Callable[[int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> list[str]:
    """Write the model folder: weights, config, and the base's tokenizer, template, generation settings and
    licence; for a class of ours its code. Names of the files in it, weights first.

    Args:
        out: an existing folder without weights.
        on_bytes: called with the bytes written since the last call; they add up to the tensors' bytes.

    Raises:
        UserError: the disk is full or too full; a source file is cut short.
    """
    beside = _beside(base.folder)
    needed = sum(tensor.nbytes for tensor in tensors) + sum(file.stat().st_size for file in beside)
    free = shutil.disk_usage(out).free
    if free < needed:
        raise UserError(
            f"the disk of {out} has {free:,} bytes free, the new model takes {needed:,}",
            "free some space, or give --out on another disk",
        )
    files = write_checkpoint(base.folder, out, tensors, on_bytes, shard_bytes)
    with full_disk(out):
        config.architectures = [model_class(config).__name__]
        config.save_pretrained(out)
        for file in beside:
            shutil.copyfile(file, out / file.name)
        code = write_code(out)
    found = {name: (header.dtype, header.shape) for name, header in read_headers(out).items()}
    if found != {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}:
        raise RuntimeError(f"{out} does not hold what was planned")
    return [*files, "config.json", *(file.name for file in beside), *code]


def tensor_bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """The bytes of a tensor in `dtype`; no copy if it is stored so."""
    return tensor.to(dtype).contiguous().reshape(-1).view(torch.uint8).numpy().data


class _Plan:
    """Collects the new tensors."""

    def __init__(
        self,
        base: Source,
        config: PreTrainedConfig,
        experts: Experts,
        layout: Layout,
        shared: SharedSource | None,
    ):
        self.base = base
        self.experts = experts
        self.layout = layout
        self.shared = shared
        self.shared_width = layout.shared_width(config)
        self.dtype: torch.dtype = config.dtype or base.dtype
        self.tensors: list[NewTensor] = []

    def add(self, name: str | None, shape: tuple[int, ...], *parts: Piece | Made) -> None:
        assert name is not None
        self.tensors.append(NewTensor(name, DTYPE_NAMES[self.dtype], shape, parts))

    def nbytes(self, *shape: int) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def other(self, name: str) -> None:
        """A tensor of the base that is no FFN matrix. What the base keeps in another precision than its
        FFNs keeps it."""
        header = self.base.tensors[name]
        if FLOATS.get(header.dtype) != self.base.dtype or self.base.dtype == self.dtype:
            part = (self.base.piece(name),)
            self.tensors.append(NewTensor(name, header.dtype, header.shape, part))
        else:
            self.add(name, header.shape, self._converted(self.base, name, 1.0))

    def router(self, layer: int, weight: Tensor) -> None:
        shape = (self.experts.num_experts, self.base.hidden_size)
        assert tuple(weight.shape) == shape, f"router of layer {layer}: {list(weight.shape)}, wanted {shape}"
        name, bias = self.layout.router(layer), self.layout.extra(layer)

        def make() -> memoryview:
            return tensor_bytes(rounded(weight.detach().cpu(), self.dtype, "routers", name), self.dtype)

        self.add(name, shape, Made(self.nbytes(*shape), make))
        if bias is not None:
            count = 4 * self.experts.num_experts
            self.tensors.append(NewTensor(bias, "F32", (1, self.experts.num_experts), (_zeros(count),)))

    def experts_of(self, layer: int) -> None:
        count, width, hidden = self.experts.num_experts, self.experts.width, self.base.hidden_size
        if self.layout.stack(layer, "down") is None:
            for expert in range(count):
                for kind in KINDS:
                    shape = (hidden, width) if kind == "down" else (width, hidden)
                    self.add(self.layout.matrix(layer, expert, kind), shape, self._part(layer, expert, kind))
            return
        gate_up = [self._part(layer, e, kind) for e in range(count) for kind in KINDS[:2]]
        self.add(self.layout.stack(layer, "gate_up"), (count, 2 * width, hidden), *gate_up)
        down = [self._part(layer, e, "down") for e in range(count)]
        self.add(self.layout.stack(layer, "down"), (count, hidden, width), *down)

    def shared_of(self, layer: int) -> None:
        width, hidden = self.shared_width, self.base.hidden_size
        if not width:
            assert self.shared is None
            return
        gate = self.layout.shared_gate(layer)
        for kind in KINDS:
            shape = (hidden, width) if kind == "down" else (width, hidden)
            part: Piece | Made = _zeros(self.nbytes(*shape))
            if self.shared is not None:
                factor = self.shared.weight / (0.5 if gate else 1.0) if kind == "down" else 1.0
                part = self._whole(self.shared.source, self.shared.source.ffn(layer, kind), factor)
            self.add(self.layout.shared(layer, kind), shape, part)
        if gate is not None:
            self.add(gate, (1, hidden), _zeros(self.nbytes(1, hidden)))

    def _part(self, layer: int, expert: int, kind: Kind) -> Piece | Made:
        """A matrix of an expert, its down_proj times the share that the shared expert leaves."""
        part = self.experts.part(layer, expert, kind)
        if self.shared is None or kind != "down":
            return part
        return Made(part.nbytes, partial(_scaled, part, self.dtype, 1 - self.shared.weight))

    def _whole(self, source: Source, name: str, factor: float) -> Piece | Made:
        if factor == 1.0 and FLOATS[source.tensors[name].dtype] == self.dtype:
            return source.piece(name)
        return self._converted(source, name, factor)

    def _converted(self, source: Source, name: str, factor: float) -> Made:
        def make() -> memoryview:
            tensor = source.read(name)
            tensor = tensor if factor == 1.0 else tensor.float() * factor
            return tensor_bytes(rounded(tensor, self.dtype, source.name, name), self.dtype)

        return Made(self.nbytes(*source.tensors[name].shape), make)


def _zeros(nbytes: int) -> Made:
    return Made(nbytes, partial(bytes, nbytes))


def _scaled(part: Piece | Made, dtype: torch.dtype, factor: float) -> memoryview:
    """Bytes of a matrix in `dtype` times `factor`, computed in fp32 and rounded once."""
    data = part.make() if isinstance(part, Made) else _read(part)
    values = torch.from_numpy(np.frombuffer(data, np.uint8).copy()).view(dtype)
    return tensor_bytes(values.float() * factor, dtype)


def _read(piece: Piece) -> bytes:
    with open(piece.file, "rb") as file:
        chunks = []
        for row in range(piece.rows):
            for offset, length in piece.runs:
                file.seek(piece.start + row * piece.stride + offset)
                chunks.append(file.read(length))
    return b"".join(chunks)


def _check_places(base: Source, config: PreTrainedConfig, tensors: list[NewTensor]) -> None:
    """Hold the plan against the class: every tensor it loads is there once, in its shape."""
    model = meta_model(config)
    wanted = model.state_dict()
    planned = {tensor.name: tensor for tensor in tensors}
    assert len(planned) == len(tensors), "a name twice"
    filled: set[str] = set()
    odd: list[str] = []
    for name, live in live_names(model, planned).items():
        filled.update(live.targets)
        whole = live.known and not live.operations
        if not live.known or (whole and planned[name].shape != tuple(wanted[live.name].shape)):
            odd.append(name)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    odd += sorted(wanted.keys() - filled - tied.keys())
    if odd:
        shape = list(planned[odd[0]].shape) if odd[0] in planned else "absent"
        has = list(wanted[odd[0]].shape) if odd[0] in wanted else "no such tensor"
        raise UserError(
            f"{base.name} ({base.config.model_type}) does not fit into {type(model).__name__}: {len(odd)} "
            f"tensors differ, first {odd[0]} ({shape}; the class has {has})"
        )


def _beside(folder: Path) -> list[Path]:
    """Files of the base that are true of the result: a model card is not, nor is an image processor."""
    papers = {path for pattern in PAPERS for path in folder.glob(pattern) if path.is_file()}
    files = {*side_files(folder), *papers}
    return sorted(
        file for file in files if file.name != "README.md" and not file.name.endswith("processor_config.json")
    )
