"""Write a checkpoint that has fewer experts, by copying byte ranges of the old one.

First a plan: every tensor on disk is named as transformers names it in memory, which says what layer it is
part of and along which dimension its experts lie. Then the copy, which reads nothing but the kept bytes and
needs no torch. Stacks are cut, tensors with an expert's number in their name are dropped or renumbered,
whatever belongs to no expert is copied as it is. What cannot be told apart is refused by name, before a byte
is written.
"""

# E experts of a layer, n kept ones

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moesmith.errors import UserError
from moesmith.models.checkpoint import RECORD, read_config
from moesmith.models.custom import write_code
from moesmith.models.hash_tables import cut_expert_ids
from moesmith.models.headers import DTYPE_BITS, TensorHeader, read_headers
from moesmith.models.ranges import SHARD_BYTES, NewTensor, Piece, full_disk, header_bytes, write_checkpoint

if TYPE_CHECKING:
    from torch import nn

    from moesmith.models.layers import MoELayer
    from moesmith.models.surgery import Keep

# Files that hold weights in some format: never copied beside the new ones.
WEIGHTS = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx",
    ".onnx_data", ".tflite",
)  # fmt: skip
REBUILT = ("config.json", RECORD)  # and written anew beside the weights
# What moesmith wrote about a model or its text: not true of another model, and a profile holds text.
RECORDS = (
    RECORD, "adapter_config.json", "checksums.json", "compare.json", "expert_drop_metadata.json", "heal.json",
    "ngrams.npy", "profile.json", "unfinished.json", "verify.json",
)  # fmt: skip
REPORTS = ("report.html", "report.json", "report.png")

COPIED, CUT, RENUMBERED, DROPPED, REMAPPED = "copied", "cut", "renumbered", "dropped", "remapped"
_NUMBERED = re.compile(r"^(.*\bexperts)\.(\d+)\.(.+)$")  # model.layers.3.mlp.experts.17.w1.weight


@dataclass(frozen=True)
class Head:
    """Experts on disk that the model does not load: a multi-token-prediction layer, with a router of its own.

    Nothing was measured about them. They are cut to the model's count, because there is one count in the
    config: the kept ones have the largest router rows (L2 norm), equally many in each group.
    """

    name: str
    kept: list[int]


@dataclass
class TensorPlan:
    """What the new checkpoint is made of."""

    tensors: list[NewTensor]
    config: dict[str, Any]
    """config.json of the result"""
    counts: dict[str, int]
    """how many tensors of the source are copied, cut, renumbered, dropped, remapped"""
    heads: list[Head]
    left: list[str]
    """experts outside the model that are copied whole: their number is not the model's"""
    source_bytes: int

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, what `on_bytes` will add up to."""
        return sum(tensor.nbytes for tensor in self.tensors)


@dataclass
class Rewritten:
    """What was written."""

    files: list[str]
    """weight files"""
    side_files: list[str]
    nbytes: int
    source_bytes: int
    counts: dict[str, int]
    heads: list[Head] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def rewrite_checkpoint(
    source: Path,
    out: Path,
    keep: Keep,
    on_bytes: Callable[[int], None] | None = None,
    shard_bytes: int = SHARD_BYTES,
    plan: TensorPlan | None = None,
) -> Rewritten:
    """Write `source` with only the kept experts to `out`, an existing folder without weights.

    Files that hold no weights are copied; config.json says the new count. What is written is read back.

    Args:
        keep: MoELayer.name -> kept expert ids; a layer without an entry stays whole.
        on_bytes: called with the bytes copied since the last call; they add up to `plan.nbytes`.
        plan: of `plan_tensors(source, keep)`, if it was made already.

    Raises:
        UserError: see `plan_tensors`; the disk is full or too full, a source file is cut short.
    """
    if any(out.glob("*.safetensors")) or out.resolve() == source.resolve():
        raise UserError(f"{out} holds weights already", "give a new folder")
    plan = plan or plan_tensors(source, keep)
    beside = list(_side_files(source, out))
    free, needed = shutil.disk_usage(out).free, plan.nbytes + sum(file.stat().st_size for file in beside)
    if free < needed:
        raise UserError(
            f"the disk of {out} has {free:,} bytes free, the new checkpoint takes {needed:,}",
            "free some space, or give --out on another disk",
        )
    files = write_checkpoint(source, out, plan.tensors, on_bytes, shard_bytes)
    with full_disk(out):
        (out / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
        side_files = [str(file.relative_to(source)) for file in beside]
        for file, name in zip(beside, side_files, strict=True):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, out / name)
        side_files = sorted({*side_files, *write_code(out)})
    _check_written(out, plan)
    return Rewritten(files, side_files, plan.nbytes, plan.source_bytes, plan.counts, plan.heads, plan.left)


def result_bytes(source: Path, keep_count: int) -> int:
    """Bytes of the weight files if every text layer kept `keep_count` experts; which ones does not matter.

    Raises:
        UserError: see `plan_tensors`.
    """
    from moesmith.models.anatomy import meta_model
    from moesmith.models.layers import moe_layers

    model = meta_model(read_config(source))
    keep = {}
    for layer in _share_text_config(model, moe_layers(model)):
        size, kept = layer.num_experts // layer.n_group, keep_count // layer.n_group
        if keep_count % layer.n_group:
            raise UserError(
                f"{keep_count} experts cannot be spread over {layer.n_group} groups",
                "keep equally many in each",
            )
        keep[layer.name] = [group * size + i for group in range(layer.n_group) for i in range(kept)]
    plan = plan_tensors(source, keep)
    return plan.nbytes + len(header_bytes(plan.tensors))


def plan_tensors(source: Path, keep: Keep) -> TensorPlan:
    """Decide for every tensor of a checkpoint what becomes of it. Reads headers, routers of heads, id tables.

    Raises:
        UserError: a broken checkpoint; a choice of experts that cannot run (see `surgery.check_keep`); a
            tensor whose shape does not say where its experts are; a config that cannot say the new count.
    """
    from moesmith.models.anatomy import meta_model
    from moesmith.models.layers import moe_layers
    from moesmith.models.surgery import check_keep, resized_config

    config = read_config(source)
    headers = read_headers(source)
    model = meta_model(config)
    layers = moe_layers(model)
    check_keep(layers, keep)
    cut = [layer for layer in layers if len(keep.get(layer.name, ())) not in (0, layer.num_experts)]
    cut_text = _share_text_config(model, cut)
    new_config = resized_config(config, len(keep[cut_text[0].name])) if cut_text else config

    blocks = [_Block.of_layer(model, layer, keep[layer.name]) for layer in cut]
    planner = _Planner(source, model, headers, blocks)
    if cut_text:
        planner.find_heads([block for block in blocks if block.name in {layer.name for layer in cut_text}])
    plan = planner.plan(new_config)
    _check_shapes(model, meta_model(new_config), layers, keep, planner)
    if planner.counts[RENUMBERED] or planner.counts[DROPPED]:
        _check_quantization(new_config)
    return plan


def _share_text_config(model: nn.Module, layers: list[MoELayer]) -> list[MoELayer]:
    """Those whose experts the text config counts: one number for all of them, in config.json."""
    text = model.config.get_text_config().model_type
    return [layer for layer in layers if layer.model_type == text]


# ---------------------------------------------------------------- names on disk and in memory


@dataclass(frozen=True)
class _Live:
    """What transformers' loader makes of a tensor on disk."""

    name: str
    """its name in memory; the name it would have, for one that the model does not load"""
    known: bool
    """whether the model has it"""
    targets: tuple[str, ...]
    """all names it becomes part of: more than one where a converter splits what is on disk"""
    operations: tuple[Any, ...] = ()


def live_names(model: nn.Module, names: Iterable[str]) -> dict[str, _Live]:
    """Tensor names of a checkpoint -> their names in memory, by transformers' own conversion mapping."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state = model.state_dict()
    prefix = model.base_model_prefix
    found = {}
    for name in sorted(names, key=dot_natural_key):  # some renamings look at what came before, in this order
        live, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if live not in state and name in state:
            live, pattern = rename_source_key(name, [], [], prefix, state)
        converter = by_pattern.get(pattern)
        if converter is None:
            found[name] = _Live(live, live in state, (live,))
        else:
            first = converter.target_patterns[0]
            targets = tuple(live.replace(first, target, 1) for target in converter.target_patterns)
            found[name] = _Live(live, live in state, targets, tuple(converter.operations))
    return found


@dataclass
class _Block:
    """One MoE block that is cut: the model's, or a head's that is built like the model's."""

    name: str
    experts: str
    """name of the experts module inside the block"""
    num_experts: int
    kept: list[int]
    shapes: dict[str, tuple[int, tuple[int, ...]]]
    """name inside the block of a tensor with a slice per expert -> (dimension of the experts, its shape)"""
    ids: set[str]
    """names inside the block of tables of expert ids"""
    n_group: int = 1

    @classmethod
    def of_layer(cls, model: nn.Module, layer: MoELayer, kept: list[int]) -> _Block:
        from moesmith.models.layers import expert_id_tensors, per_expert_tensors

        tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
        inside = len(layer.name) + 1
        return cls(
            layer.name,
            layer.experts[inside:],
            layer.num_experts,
            kept,
            {
                name[inside:]: (dim, tuple(tensors[name].shape))
                for name, dim in per_expert_tensors(model, layer).items()
            },
            {name[inside:] for name in expert_id_tensors(model, layer)},
            layer.n_group,
        )

    def router_matrix(self) -> str:
        """Name inside the block of the tensor with one row of weights per expert."""
        return next(
            name
            for name, (_, shape) in self.shapes.items()
            if len(shape) == 2 and min(shape) > 1 and not name.startswith(self.experts + ".")
        )


class _Planner:
    """Goes through the tensors of a checkpoint and cuts those that belong to a block."""

    def __init__(
        self, source: Path, model: nn.Module, headers: dict[str, TensorHeader], blocks: list[_Block]
    ):
        self.source = source
        self.model = model
        self.headers = headers
        self.blocks = {block.name: block for block in blocks}
        self.live = live_names(model, headers)
        self.heads: list[Head] = []
        self.left: list[str] = []
        self.counts: Counter[str] = Counter()
        self.new_shapes: dict[str, tuple[int, ...]] = {}
        """name on disk -> new shape, of tensors that keep their name"""
        self.numbered: dict[str, list[_Block]] = {}
        """`...experts` on disk -> the blocks that the numbers below it count through"""
        prefix = model.base_model_prefix
        for name, live in self.live.items():
            # A scale is not in the model, so the loader had no reason to complete its name.
            for candidate in (live.name, f"{prefix}.{live.name}", live.name.removeprefix(f"{prefix}.")):
                if not live.known and self._owner(candidate) is not None:
                    self.live[name] = _Live(candidate, False, (candidate,), live.operations)
                    break

    def _owner(self, live: str) -> _Block | None:
        """The block that a name in memory lies in."""
        while live:
            live = live.rpartition(".")[0]
            if live in self.blocks:
                return self.blocks[live]
        return None

    # ---- heads

    def find_heads(self, like: list[_Block]) -> None:
        """Blocks beyond the model that look like its own (`like`): cut them too."""
        template = like[0]
        shapes = {name: shape for block in like for name, shape in block.shapes.items()}
        ids = {name for block in like for name in block.ids}
        inside = re.compile(rf"^(.+)\.{re.escape(template.experts)}\.")
        members: dict[str, list[str]] = {}
        for name, live in self.live.items():
            match = inside.match(live.name)
            if match and not live.known and self._owner(live.name) is None:
                members.setdefault(match.group(1), []).append(name)
        for block, names in members.items():
            numbers = {int(m.group(2)) for name in names if (m := _NUMBERED.match(name))}
            stacks = {
                self.headers[name].shape[:1]
                for name in names
                if not _NUMBERED.match(name) and self.headers[name].numel > 1
            }
            if numbers != set(range(template.num_experts)) and stacks != {(template.num_experts,)}:
                self.left.append(block)
                continue
            head = replace(template, name=block, kept=[], shapes=shapes, ids=ids)
            head.kept = self._largest_router_rows(head, len(template.kept))
            self.blocks[block] = head
            self.heads.append(Head(block, head.kept))

    def _largest_router_rows(self, head: _Block, count: int) -> list[int]:
        wanted = f"{head.name}.{head.router_matrix()}"
        name = next((name for name, live in self.live.items() if live.name == wanted), None)
        if name is None:
            raise UserError(
                f"{self.source}: {head.name} has experts but no router ({wanted} is missing)",
                "it cannot be cut to the model's number of experts; remove its tensors from the checkpoint",
            )
        header = self.headers[name]
        dim = self._dim_on_disk(name, head, head.router_matrix())
        rows = np.moveaxis(self._read(header), dim, 0)[: head.num_experts]
        norms = np.linalg.norm(rows.astype(np.float64), axis=1)
        if not np.isfinite(norms).all():
            raise UserError(f"{self.source}: {name} has values that are not finite", "fetch the model again")
        size = head.num_experts // head.n_group
        groups = norms.reshape(head.n_group, size)
        best = np.argsort(-groups, axis=1, kind="stable")[:, : count // head.n_group]
        return sorted((best + np.arange(head.n_group)[:, None] * size).ravel().tolist())

    def _read(self, header: TensorHeader) -> np.ndarray:
        """One small tensor, bf16 as float32."""
        kinds = {"F16": "f2", "F32": "f4", "F64": "f8", "BF16": "u2", "I64": "i8", "I32": "i4", "I16": "i2",
                 "U8": "u1", "I8": "i1"}  # fmt: skip
        if header.dtype not in kinds:
            raise UserError(f"{self.source}: {header.name} is stored as {header.dtype}, wanted plain numbers")
        with open(self.source / header.file, "rb") as file:
            file.seek(header.start)
            values = np.frombuffer(file.read(header.nbytes), "<" + kinds[header.dtype])
        if header.dtype == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        return values.reshape(header.shape)

    # ---- one tensor after the other

    def plan(self, config: dict[str, Any]) -> TensorPlan:
        """The new tensors, in the order their bytes lie on disk."""
        self._find_numbered()
        for header in self.headers.values():
            if header.dtype not in DTYPE_BITS:
                raise UserError(
                    f"{self.source}: {header.name} is stored as {header.dtype}, which moesmith does not know",
                    "prune the 16-bit version of the model",
                )
        ordered = sorted(self.headers.values(), key=lambda header: (header.file, header.start))
        tensors = [new for header in ordered if (new := self._tensor(header)) is not None]
        counts = {kind: self.counts[kind] for kind in (COPIED, CUT, RENUMBERED, DROPPED, REMAPPED)}
        source_bytes = sum(header.nbytes for header in ordered)
        return TensorPlan(tensors, config, counts, self.heads, self.left, source_bytes)

    def _find_numbered(self) -> None:
        """Which blocks the numbers in names count through, and that none is missing."""
        numbers: dict[tuple[str, str], set[int]] = {}
        for name, live in self.live.items():
            match = _NUMBERED.match(name)
            owners = [self._owner(target) for target in live.targets]
            if match is None or owners[0] is None or not self._in_experts(owners[0], live.targets[0]):
                continue
            if any(owner is None for owner in owners):
                raise UserError(f"{self.source}: {name} is shared with a layer that is not cut")
            stem, number, leaf = match.groups()
            numbers.setdefault((stem, leaf), set()).add(int(number))
            blocks = [owner for owner in owners if owner is not None]
            if len(blocks) >= len(self.numbered.get(stem, [])):
                self.numbered[stem] = blocks
        for (stem, leaf), found in numbers.items():
            wanted = sum(block.num_experts for block in self.numbered[stem])
            if found != set(range(wanted)):
                raise UserError(
                    f"{self.source} has {stem}.*.{leaf} for {len(found)} experts, the config says {wanted}",
                    "config and weights come from different models, or tensors are missing",
                )

    @staticmethod
    def _in_experts(block: _Block, live: str) -> bool:
        return live.startswith(f"{block.name}.{block.experts}.")

    def _tensor(self, header: TensorHeader) -> NewTensor | None:
        """What becomes of one tensor; None when it is dropped."""
        live = self.live[header.name]
        block = self._owner(live.name)
        if block is None:
            return self._copy(header, header.name, COPIED)
        match = _NUMBERED.match(header.name)
        if match and match.group(1) in self.numbered and self._in_experts(block, live.name):
            return self._numbered(header, *match.groups())
        inside = live.name[len(block.name) + 1 :]
        if inside in block.ids:
            return self._remap(header, block)
        if inside in block.shapes:
            return self._cut_known(header, live, block, inside)
        if self._in_experts(block, live.name):
            return self._cut_unknown(header, block)
        if live.known or header.numel == 1:
            return self._copy(header, header.name, COPIED)
        # Elsewhere a number that equals E is chance: code books and scales of a packed shared expert.
        in_router = inside.partition(".")[0] == block.router_matrix().partition(".")[0]
        if header.shape == (block.num_experts,) and (in_router or "." not in inside):
            return self._cut(header, 0, [block])  # a bias of the router under a name of its own
        if in_router:
            raise UserError(
                f"{self.source}: {header.name} {list(header.shape)} seems to be part of a router, and does "
                "not say which part is whose",
                "if the checkpoint is quantised, prune the 16-bit version of the model",
            )
        return self._copy(header, header.name, COPIED)

    def _copy(self, header: TensorHeader, name: str, kind: str) -> NewTensor:
        self.counts[kind] += 1
        if name == header.name:
            self.new_shapes[name] = header.shape
        piece = Piece(header.file, header.start, ((0, header.nbytes),))
        return NewTensor(name, header.dtype, header.shape, (piece,))

    def _numbered(self, header: TensorHeader, stem: str, number: str, leaf: str) -> NewTensor | None:
        """A tensor of one expert, its number in its name."""
        blocks, index, first = self.numbered[stem], int(number), 0
        for block in blocks:
            if index < block.num_experts:
                break
            index -= block.num_experts
            first += len(block.kept)
        if index not in block.kept:
            self.counts[DROPPED] += 1
            return None
        return self._copy(header, f"{stem}.{first + block.kept.index(index)}.{leaf}", RENUMBERED)

    def _remap(self, header: TensorHeader, block: _Block) -> NewTensor:
        table = self._read(header)
        if table.ndim != 2 or not np.issubdtype(table.dtype, np.integer):
            raise UserError(f"{self.source}: {header.name} is no table of expert ids")
        self.counts[REMAPPED] += 1
        self.new_shapes[header.name] = header.shape
        data = cut_expert_ids(table, block.kept, block.num_experts).tobytes()
        return NewTensor(header.name, header.dtype, header.shape, (data,))

    def _cut_known(self, header: TensorHeader, live: _Live, block: _Block, inside: str) -> NewTensor:
        """A tensor that the model has, perhaps turned or cut by a converter on its way to memory."""
        dim = self._dim_on_disk(header.name, block, inside)
        owners = [self._owner(target) for target in live.targets]
        split = any(type(op).__name__ == "Chunk" and op.dim == 0 for op in live.operations)
        if len(owners) > 1 and (None in owners or dim == 0 or not split):
            raise UserError(f"{self.source}: {header.name} is split in a way that moesmith does not know")
        return self._cut(header, dim, [owner for owner in owners if owner is not None])

    def _dim_on_disk(self, name: str, block: _Block, inside: str) -> int:
        """The dimension the experts lie along on disk."""
        dim, shape = block.shapes[inside]
        stored = self.headers[name].shape
        size = shape[dim]  # a router may have rows of no expert after its experts'
        for op in self.live[name].operations:
            if type(op).__name__ == "Transpose":
                turned = {
                    op.dim0 % len(stored): op.dim1 % len(stored),
                    op.dim1 % len(stored): op.dim0 % len(stored),
                }
                if not op.check_dims or (dim in turned and stored[dim] != size):
                    dim = turned.get(dim, dim)
        if dim >= len(stored) or stored[dim] != size:
            raise UserError(
                f"{self.source}: {name} {list(stored)} should have {size} experts along dimension {dim}",
                "config and weights come from different models, or this layout is new to moesmith",
            )
        return dim

    def _cut_unknown(self, header: TensorHeader, block: _Block) -> NewTensor:
        """A tensor among the experts that only a quantised model has: scales, zero points, packed blocks."""
        if self.live[header.name].known or header.numel == 1:
            return self._copy(header, header.name, COPIED)
        if not header.shape or header.shape[0] != block.num_experts:
            raise UserError(
                f"{self.source}: {header.name} {list(header.shape)} should have {block.num_experts} experts "
                "along its first dimension",
                "this layout is unknown; prune the 16-bit version of the model",
            )
        return self._cut(header, 0, [block])

    def _cut(self, header: TensorHeader, dim: int, blocks: list[_Block]) -> NewTensor:
        """Slices along `dim`; several blocks share the tensor evenly along its first dimension."""
        shape = header.shape
        bits = math.prod(shape[dim + 1 :]) * DTYPE_BITS[header.dtype]
        outer = math.prod(shape[:dim])
        if bits % 8 or outer % len(blocks):
            raise UserError(
                f"{self.source}: {header.name} {header.dtype} {list(shape)} cannot be cut by bytes"
            )
        rest = range(blocks[0].num_experts, shape[dim])  # rows of no expert
        stride, rows = shape[dim] * bits // 8, outer // len(blocks)
        parts = tuple(
            Piece(
                header.file,
                header.start + i * rows * stride,
                _runs([*block.kept, *rest], bits // 8),
                rows,
                stride,
            )
            for i, block in enumerate(blocks)
        )
        new_shape = (*shape[:dim], len(blocks[0].kept) + len(rest), *shape[dim + 1 :])
        self.counts[CUT] += 1
        self.new_shapes[header.name] = new_shape
        return NewTensor(header.name, header.dtype, new_shape, parts)


def _runs(ids: list[int], width: int) -> tuple[tuple[int, int], ...]:
    """Ascending ids -> (offset, length) in bytes, neighbours together."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and runs[-1][0] + runs[-1][1] == i * width:
            runs[-1][1] += width
        else:
            runs.append([i * width, width])
    return tuple((offset, length) for offset, length in runs)


# ---------------------------------------------------------------- checks


def _check_shapes(
    model: nn.Module, new_model: nn.Module, layers: list[MoELayer], keep: Keep, planner: _Planner
) -> None:
    """Hold the plan against the model of the new config: what fitted before has to fit after.

    Raises:
        UserError: a tensor would not fit, is missing, or the config gives a layer another count.
    """
    from moesmith.models.layers import moe_layers

    wanted = {layer.name: len(keep.get(layer.name, range(layer.num_experts))) for layer in layers}
    got = {layer.name: layer.num_experts for layer in moe_layers(new_model)}
    for name, count in wanted.items():
        if got.get(name) != count:
            raise UserError(
                f"{name} would keep {count} experts, but the config can only say {got.get(name)}",
                "layers that share a config keep equally many",
            )
    old, new = model.state_dict(), new_model.state_dict()
    present: set[str] = set()
    for name, header in planner.headers.items():
        live = planner.live[name]
        present.update(live.targets)
        fitted = live.known and not live.operations and tuple(old[live.name].shape) == header.shape
        planned = planner.new_shapes.get(name)
        if fitted and (live.name not in new or planned != tuple(new[live.name].shape)):
            has = list(new[live.name].shape) if live.name in new else "nothing"
            raise UserError(
                f"{name} would be {list(planned or ())}, but the model with fewer experts has {has} there",
                "this family stores something per expert that moesmith does not know: please report it",
            )
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    stored = present | {name.rpartition("_")[0] for name in present - old.keys()}  # gate_up_proj_blocks
    for block in planner.blocks.values():
        for inside, (_, shape) in block.shapes.items():
            name = f"{block.name}.{inside}"
            if name in old and len(shape) > 1 and name not in tied and name not in stored:
                raise UserError(
                    f"{planner.source} has no {name}", "the checkpoint is incomplete: fetch it again"
                )


def _check_quantization(config: dict[str, Any]) -> None:
    """Numbers of experts inside quantisation settings would have to change too."""
    text = json.dumps(
        [config.get("quantization_config"), (config.get("text_config") or {}).get("quantization_config")]
    )
    match = re.search(r"[\w.]*experts\.\d+[\w.]*", text)
    if match:
        raise UserError(
            f"quantization_config names single experts ({match.group()}), whose numbers change",
            "prune the 16-bit version of the model",
        )


def _check_written(out: Path, plan: TensorPlan) -> None:
    """Read the headers back. Raises RuntimeError if they are not what was planned."""
    found = {name: (header.dtype, header.shape) for name, header in read_headers(out).items()}
    wanted = {tensor.name: (tensor.dtype, tensor.shape) for tensor in plan.tensors}
    if len(wanted) != len(plan.tensors) or found != wanted:
        wrong = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        raise RuntimeError(f"{out} does not hold what was planned: {wrong[:4] or 'a name twice'}")


def _side_files(source: Path, out: Path) -> Iterator[Path]:
    """Files that hold no weights and no record of ours, folders included; not what `out` has already.

    A folder inside that is itself a model, an adapter, a profile or a report is none of this model's.
    """
    for folder, folders, files in os.walk(source):
        inside = Path(folder).relative_to(source)
        top = inside == Path()
        if not top and any(name.endswith(WEIGHTS) or name in RECORDS for name in files):
            folders.clear()
            continue
        folders[:] = sorted(
            name
            for name in folders
            if not name.startswith(".") and not out.resolve().is_relative_to(Path(folder, name).resolve())
        )
        for name in sorted(files):
            ours = name.endswith(WEIGHTS) or (top and name in (*REBUILT, *RECORDS, *REPORTS))
            if not (ours or name.startswith(".") or (out / inside / name).exists()):
                yield Path(folder, name)
