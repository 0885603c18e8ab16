"""A model and the adapters on it as one 16-bit checkpoint that needs neither PEFT nor moesmith.

The source is a 16-bit checkpoint or one that moesmith packed; the result has the names and shapes of the
architecture's own checkpoints (`layout`). First a plan from headers and config alone. Then the copy, tensor
by tensor: what no adapter touches and is stored as it will be goes over as bytes; a touched or packed tensor
is base + update in float32, rounded once. In memory are one stack of experts in the new dtype and one
expert's matrix in 32 bits; of a 16-bit checkpoint that stores its experts apart, one stack's update in 32
bits. Whether the folder appears under its final name is the job's to decide.
"""

# E experts

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import build_glob_alternation

from moesmith.errors import UserError
from moesmith.models.anatomy import meta_model
from moesmith.models.checkpoint import (
    PAPERS,
    Checkpoint,
    has_tokenizer,
    read_chat_template,
    side_files,
)
from moesmith.models.custom import write_code
from moesmith.models.headers import read_headers
from moesmith.models.ranges import (
    SHARD_BYTES,
    Made,
    NewTensor,
    Piece,
    full_disk,
    header_bytes,
    split_shards,
    write_checkpoint,
)

from .deltas import Deltas
from .layout import Group, Layout
from .weights import Weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_NAMES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_FLOATS = {"BF16", "F16", "F32", "F64"}


@dataclass
class Merged:
    """What was written, and what the adapters changed. Tensors are counted as they are in memory: a stack of
    experts is one."""

    tensors: int = 0
    """on disk"""
    bytes: int = 0
    """of all tensors"""
    shards: int = 0
    targeted: dict[str, int] = field(default_factory=dict)
    """placement (experts, attention, router...) -> tensors that an adapter is on"""
    changed: dict[str, int] = field(default_factory=dict)
    """placement -> tensors of which at least one value is another than without the adapters"""
    unchanged: list[str] = field(default_factory=list)
    """tensors whose update is not zero, but too small for the dtype: every value rounded back"""
    zero: list[str] = field(default_factory=list)
    """tensors whose update is exactly zero"""
    left: list[str] = field(default_factory=list)
    """tensors of the source that transformers' class does not load, and that are not in the result"""
    layer_bytes: int = 0
    """of the largest decoder layer, in 32 bits"""


def merge_checkpoint(
    source: Path,
    adapters: Sequence[Path],
    out: Path,
    *,
    dtype: str = "bfloat16",
    shard_bytes: int = SHARD_BYTES,
    on_bytes: Callable[[int], None] | None = None,
) -> Merged:
    """Write source + adapters to `out`, an existing folder without weights.

    Beside the weights: config without quantisation, generation settings, tokenizer and chat template (an
    adapter's where it brings them, the last one's of several), licence, code of a class of ours.

    Args:
        source: a folder, in plain floats or packed by moesmith.
        adapters: folders; several are added, none converts the model alone.
        dtype: bfloat16, float16 or float32. What the model keeps in float32 stays so.
        on_bytes: called with the bytes written since the last call; they add up to `merged_bytes`, headers
            excluded.

    Raises:
        UserError: a broken or foreign source; an adapter that does not fit (see `Deltas.read`); a result
            that is not finite; a full disk.
    """
    if any(out.glob("*.safetensors")) or out.resolve() == source.resolve():
        raise UserError(f"{out} holds weights already", "give a new folder")
    plan = _Plan(source, adapters, dtype)
    with plan.weights:
        tensors = plan.tensors()
        shards = write_checkpoint(source, out, tensors, on_bytes, shard_bytes)
    with full_disk(out):
        _write_beside(source, adapters, out, plan.config)
    found = {name: (header.dtype, header.shape) for name, header in read_headers(out).items()}
    if found != {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}:
        raise RuntimeError(f"{out} does not hold what was planned")
    return plan.merged(tensors, len(shards))


def merged_bytes(source: Path, dtype: str = "bfloat16") -> int:
    """Bytes of the weight files that `merge_checkpoint` would write, from headers and config alone.

    Raises:
        UserError: a broken or foreign source.
    """
    plan = _Plan(source, [], dtype)
    with plan.weights:
        tensors = plan.tensors()
    return sum(
        len(header_bytes(shard)) + sum(tensor.nbytes for tensor in shard)
        for shard in split_shards(tensors, SHARD_BYTES)
    )


# ---------------------------------------------------------------- the plan


class _Plan:
    """What every tensor of the result is made of."""

    def __init__(self, source: Path, adapters: Sequence[Path], dtype: str):
        if dtype not in DTYPES:
            raise UserError(f"dtype={dtype}, wanted {', '.join(DTYPES)}")
        self.source = source
        self.dtype = DTYPES[dtype]
        checkpoint = Checkpoint.open(source)
        quantization = checkpoint.quantization
        if quantization and not checkpoint.is_packed:
            raise UserError(
                f"{source} is quantised by {quantization.get('quant_method', 'something else')}, "
                "wanted plain floats or a model packed by moesmith",
                "start from the original 16-bit checkpoint",
            )
        self.config = _plain_config(checkpoint.config, dtype)
        self.model: Any = meta_model(self.config)
        self.weights = Weights(source, checkpoint.tensors, (quantization or {}).get("scheme"))
        self.layout = Layout(self.model, checkpoint.tensors, self._saved(checkpoint))
        self.stored: dict[str, str] = {}
        """name in memory -> on disk, of what the loader only renames and of packed stacks"""
        for disk, live in sorted(self.layout.in_memory.items()):
            self.stored.setdefault(live, disk)
        for target, kept in self.model.all_tied_weights_keys.items():
            if target in self.stored:
                self.stored.setdefault(kept, self.stored[target])
        self.weights.scales = {
            self.stored[stack]: scales for stack, scales in self.layout.scales.items() if stack in self.stored
        }
        self.deltas = Deltas.read(adapters, self.model)
        self.changed: set[str] = set()
        self._keep_fp32 = _pattern(self.model._get_dtype_plan(self.dtype))
        self._state: dict[str, Tensor] = self.model.state_dict()
        self._ready: dict[str, Tensor] = {}
        """tensors on disk of the group that was made last, until they are written"""

    def _saved(self, checkpoint: Checkpoint) -> list[str]:
        """Names in memory of what is written: tied weights once, unless the checkpoint has them untied."""
        tied = self.model.all_tied_weights_keys
        names = Layout(self.model, checkpoint.tensors).in_memory if tied else {}
        disk = {live: name for name, live in names.items()}
        for target, kept in list(tied.items()):
            if target in disk and kept in disk and not self._same(disk[target], disk[kept]):
                del tied[target]  # as from_pretrained does
        ignored = set(self.model._keys_to_ignore_on_save or ())
        return [name for name in self.model.state_dict() if name not in tied and name not in ignored]

    def _same(self, a: str, b: str) -> bool:
        return torch.equal(self.weights.tensor(a), self.weights.tensor(b))

    def tensors(self) -> list[NewTensor]:
        """The tensors of the result, in the order of the model's layers."""
        optional = _pattern(self.model._keys_to_ignore_on_load_missing or ())
        planned = []
        for group in self.layout.groups:
            dtype = self._dtype_of(group.live[0])
            touched = any(name in self.deltas.places for name in group.live)
            for disk, shape in group.disk.items():
                stored = self._stored_as(group, disk)
                if stored is None and not all(name in self.stored for name in group.live):
                    if optional and all(optional.search(name) for name in group.live):
                        continue
                    raise UserError(
                        f"{self.source}: the checkpoint has no {disk}", "fetch it again, or convert it anew"
                    )
                if stored is not None and not touched:
                    part = self._as_stored(group, stored, shape, dtype)
                else:
                    part = Made(_nbytes(shape, dtype), partial(self._made, group, disk, dtype))
                planned.append(NewTensor(disk, _NAMES[dtype], shape, (part,)))
        return planned

    def _dtype_of(self, name: str) -> torch.dtype:
        """The dtype that a model loaded in `self.dtype` holds a tensor in."""
        own = self._state[name].dtype
        if not own.is_floating_point:
            return own
        if self._keep_fp32 and self._keep_fp32.search(name):
            return torch.float32
        return self.dtype if own == torch.bfloat16 else own  # the meta model is in bf16

    def _stored_as(self, group: Group, disk: str) -> str | None:
        """Name in the source of a tensor of the result that is stored there as it is, in plain numbers."""
        if group.converter is None:
            name = self.stored.get(group.live[0])
            return name if name is not None and self.weights.is_plain(name) else None
        if any(name in self.layout.scales for name in group.live):
            return None
        prefix = f"{self.model.base_model_prefix}."
        names = (disk, disk.removeprefix(prefix), prefix + disk)
        return next((name for name in names if name in self.weights.headers), None)

    def _as_stored(self, group: Group, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Piece | Made:
        header = self.weights.headers[name]
        if group.turns and header.shape != shape and (*header.shape[:-2], *header.shape[:-3:-1]) == shape:
            return Made(_nbytes(shape, dtype), lambda: _bytes(self.weights.tensor(name).mT.to(dtype)))
        self._same_shape(name, header.shape, shape)
        if header.dtype == _NAMES[dtype]:
            return Piece(header.file, header.start, ((0, header.nbytes),))
        return Made(_nbytes(shape, dtype), lambda: _bytes(self.weights.tensor(name).to(dtype)))

    def _same_shape(self, name: str, found: tuple[int, ...], wanted: tuple[int, ...]) -> None:
        if found != wanted:
            raise UserError(
                f"{self.source}: {name} is {list(found)}, config.json wants {list(wanted)}",
                "config.json and the weights are of different models",
            )

    # ---- numbers

    def _made(self, group: Group, disk: str, dtype: torch.dtype) -> memoryview:
        """The bytes of one tensor of the result; the others of its group wait for their turn."""
        if disk not in self._ready:
            self._ready.clear()
            if all(name in self.stored for name in group.live):
                merged = {name: self._merged(name, dtype) for name in group.live}
                self._ready = self.layout.to_disk(group, merged)
            else:
                updates = {name: self._update(name) for name in group.live}
                self._ready = self.layout.to_disk(group, updates)
                del updates
        tensor = self._ready.pop(disk)
        if not all(name in self.stored for name in group.live):
            tensor = self._add_apart(group, disk, tensor, dtype)
        return _bytes(tensor)

    def _merged(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor as it is in memory: base + update, slice by slice."""
        shape = tuple(self._state[name].shape)
        merged = torch.empty(shape, dtype=dtype)
        slices = merged if merged.ndim == 3 else merged[None]
        if merged.ndim == 3:
            self._same_shape(self.stored[name], self.weights.headers[self.stored[name]].shape[:1], shape[:1])
        for index, base in enumerate(self.weights.slices(self.stored[name])):
            self._same_shape(self.stored[name], tuple(base.shape), tuple(slices[index].shape))
            if name in self.deltas.places:
                base = base.float()
                slices[index] = base + self.deltas.of_slice(name, index)
                self._check(name, slices[index], base.to(dtype))
            else:
                slices[index] = base
        return merged

    def _update(self, name: str) -> Tensor:
        shape = tuple(self._state[name].shape)
        return self.deltas.of(name).view(shape) if name in self.deltas.places else torch.zeros(shape)

    def _add_apart(self, group: Group, disk: str, update: Tensor, dtype: torch.dtype) -> Tensor:
        """A matrix that the source stores apart, with its share of the update of the stack it belongs to."""
        stored = self._stored_as(group, disk)
        assert stored is not None
        base = self.weights.tensor(stored).float()
        if group.turns and base.shape != update.shape:
            base = base.mT
        self._same_shape(stored, tuple(base.shape), tuple(update.shape))
        merged = (base + update).to(dtype)
        for name in group.live:
            if name in self.deltas.places:
                self._check(name, merged, base.to(dtype))
        return merged

    def _check(self, name: str, merged: Tensor, base: Tensor) -> None:
        """Note whether a tensor changed; raise UserError for one that is not finite."""
        if not _is_finite(merged):
            whose = "with the adapter added" if _is_finite(base) else "of the model itself"
            raise UserError(
                f"{name}: values {whose} are not finite in {str(merged.dtype).removeprefix('torch.')}",
                "the weights are damaged, or too large for this dtype: try dtype=bfloat16 or float32",
            )
        if name not in self.changed and not torch.equal(merged, base):
            self.changed.add(name)

    def merged(self, tensors: Sequence[NewTensor], shards: int) -> Merged:
        """The account of what was written."""
        places = self.deltas.placement
        zero = [name for name in places if self.deltas.is_zero(name)]
        layers: Counter[str] = Counter()
        for name, tensor in self._state.items():
            layers[_layer(name)] += 4 * tensor.numel()
        layers.pop("", None)
        return Merged(
            tensors=len(tensors),
            bytes=sum(tensor.nbytes for tensor in tensors),
            shards=shards,
            targeted=dict(Counter(places.values())),
            changed=dict(Counter(places[name] for name in places if name in self.changed)),
            unchanged=[name for name in places if name not in self.changed and name not in zero],
            zero=zero,
            left=self._left(tensors),
            layer_bytes=max(layers.values(), default=0),
        )

    def _left(self, tensors: Iterable[NewTensor]) -> list[str]:
        """Stored tensors that belong to nothing in the model; scales and states of quantised ones do."""
        known = {tensor.name for tensor in tensors} | set(self.layout.in_memory) | self.weights.scale_names()
        prefix = f"{self.model.base_model_prefix}."
        return [
            name
            for name in self.weights.headers
            if not {name, prefix + name, name.removeprefix(prefix)} & known
        ]


# ---------------------------------------------------------------- beside the weights


def _plain_config(config: Mapping[str, Any], dtype: str, top: bool = True) -> dict[str, Any]:
    """config.json without quantisation, in the new dtype, at every depth."""
    plain = {
        key: _plain_config(value, dtype, top=False) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("quantization_config", "torch_dtype")
    }
    if top or "dtype" in config or "torch_dtype" in config:
        plain["dtype"] = dtype
    return plain


def _write_beside(source: Path, adapters: Sequence[Path], out: Path, config: Mapping[str, Any]) -> None:
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    files = [path for path in side_files(source)]
    files += [path for pattern in PAPERS for path in source.glob(pattern) if path.name != "README.md"]
    chosen = {path.name: path for path in files if path.is_file()}
    for adapter in adapters:
        folder = Path(adapter).expanduser()
        brings_tokenizer = has_tokenizer(folder)
        brings_template = read_chat_template(folder) is not None
        for name in list(chosen):
            if (brings_template and _is_template(name)) or (brings_tokenizer and _is_tokenizer(name)):
                del chosen[name]
        for path in side_files(folder):
            if (brings_template and _is_template(path.name)) or (
                brings_tokenizer and _is_tokenizer(path.name)
            ):
                chosen[path.name] = path
    for name, path in sorted(chosen.items()):
        shutil.copyfile(path, out / name)
    write_code(out)


def _is_template(name: str) -> bool:
    return name.startswith("chat_template")


def _is_tokenizer(name: str) -> bool:
    return not (
        _is_template(name) or name == "generation_config.json" or name.endswith("processor_config.json")
    )


# ---------------------------------------------------------------- small things


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _is_finite(tensor: Tensor) -> bool:
    """No NaN, no infinity; twenty times as fast in bf16 as `isfinite` of every element."""
    return all(bool(value.isfinite()) for value in tensor.aminmax())


def _nbytes(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


def _pattern(globs: Iterable[str]) -> Any:
    """One pattern for what transformers gives as several, None for none."""
    found = list(globs)
    return build_glob_alternation(found)[0] if found else None  # type: ignore[arg-type]


def _layer(name: str) -> str:
    """model.layers.3.mlp.gate.weight -> model.layers.3; "" for a tensor outside numbered layers."""
    parts = name.split(".")
    numbered = next((index for index, part in enumerate(parts) if part.isdigit()), None)
    return "" if numbered is None else ".".join(parts[: numbered + 1])
