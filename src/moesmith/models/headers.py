"""The headers of safetensors files: every tensor's dtype, shape and place, without reading a weight.

A file starts with 8 bytes of length and that many bytes of JSON. Shards are tied together by an index. What
is wrong with a download (a shard missing, cut short, not a safetensors file) is said in one line.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesmith.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
HEADER_LIMIT = 100_000_000  # bytes; the format's own limit

# Bits per element of the safetensors dtypes.
DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "BOOL": 8, "U8": 8, "I8": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16, "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class TensorHeader:
    """One stored tensor. `start` and `end` are byte offsets in `file`; in its data, if read from the hub."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return self.end - self.start

    @property
    def numel(self) -> int:
        """Elements as stored: a packed tensor counts its bytes, not the weights in them."""
        return math.prod(self.shape)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError naming the file and line."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error})", "the file is damaged or incomplete: fetch it again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}")
    return value


CONVERT = (
    'convert it once: python -c "from transformers import AutoModelForCausalLM as M; '
    "M.from_pretrained('{model}').save_pretrained('converted')\""
)
CONVERT_GGUF = (
    "GGUF weights are already quantised: use the original checkpoint, or unpack with "
    "from_pretrained(folder, gguf_file='{file}') and save its state_dict"
)


def read_headers(folder: Path, required: bool = True) -> dict[str, TensorHeader]:
    """Every tensor's header, single file or sharded.

    Raises:
        UserError: no safetensors (unless `required` is False and there are no other weights), a shard of the
            index missing, cut short or not a safetensors file, a tensor that its shard does not hold.
    """
    if (folder / SINGLE).is_file():
        return read_header(folder / SINGLE)
    if (folder / INDEX).is_file():
        return _read_sharded(folder)
    loose = sorted(path.name for path in folder.glob("*.safetensors") if not path.name.startswith("adapter"))
    if loose:
        raise UserError(
            f"{folder} has {len(loose)} safetensors files but no {INDEX}",
            f"fetch {INDEX} too; found {loose[0]}",
        )
    gguf = sorted(folder.glob("*.gguf"))
    if gguf:
        raise UserError(
            f"{folder} holds GGUF weights, not safetensors", CONVERT_GGUF.format(file=gguf[0].name)
        )
    pickled = [
        path for pattern in ("pytorch_model*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))
    ]
    if pickled:
        raise UserError(f"{folder} holds {pickled[0].name}, not safetensors", CONVERT.format(model=folder))
    if required:
        raise UserError(f"{folder}: no weights (no {SINGLE} and no {INDEX})")
    return {}


def _read_sharded(folder: Path) -> dict[str, TensorHeader]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{folder / INDEX}: no weight_map")
    files = sorted(set(weight_map.values()))
    unsafe = [file for file in files if Path(file).name != file]
    if unsafe:
        raise UserError(f"{folder / INDEX} names {unsafe[0]!r}, which is not a file of this folder")
    missing = [file for file in files if not (folder / file).is_file()]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(files)} shards missing, first {missing[0]}",
            "fetch the model again",
        )
    tensors = {name: header for file in files for name, header in read_header(folder / file).items()}
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise UserError(
            f"{folder}: {INDEX} lists {absent[0]} in {weight_map[absent[0]]}, which does not hold it"
            + (f" ({len(absent)} such tensors)" if len(absent) > 1 else ""),
            "index and shards come from different saves: fetch both again",
        )
    return {name: tensors[name] for name in weight_map}


def read_header(path: Path) -> dict[str, TensorHeader]:
    """The header of one safetensors file, checked against its size. Raises UserError if they disagree."""
    size = path.stat().st_size
    again = "fetch the file again"
    with open(path, "rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(HEADER_LIMIT, size - 8):
            if prefix[:7] == b"version":  # the pointer file of git-lfs
                raise UserError(f"{path} is a git-lfs pointer, not the weights", "git lfs pull")
            what = "cut short" if 2 <= length <= HEADER_LIMIT else "not a safetensors file"
            raise UserError(f"{path} is {what} ({size:,} bytes)", again)
        raw = file.read(length)
    try:
        entries = json.loads(raw)
        entries.pop("__metadata__", None)
        tensors = {
            name: TensorHeader(
                name,
                entry["dtype"],
                tuple(int(n) for n in entry["shape"]),
                path.name,
                8 + length + int(entry["data_offsets"][0]),
                8 + length + int(entry["data_offsets"][1]),
            )
            for name, entry in entries.items()
        }
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise UserError(f"{path} has a damaged header", again) from None
    for tensor in tensors.values():
        bits = DTYPE_BITS.get(tensor.dtype)
        wanted = None if bits is None else -(-tensor.numel * bits // 8)
        if tensor.start < 8 + length or (wanted is not None and tensor.nbytes != wanted):
            raise UserError(
                f"{path} has a damaged header: {tensor.name} {tensor.dtype} {list(tensor.shape)}", again
            )
    end = max((tensor.end for tensor in tensors.values()), default=0)
    if end > size:
        raise UserError(f"{path} is cut short: {size:,} of {end:,} bytes", again)
    return tensors
