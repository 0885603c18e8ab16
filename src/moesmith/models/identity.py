"""Is this the model that a profile was made of? Two hashes, read from disk without loading a weight.

`model_hash` tells one checkpoint from another. `router_hash` is shared by a checkpoint and its packed or cast
copies: they store other bytes for the experts but the same routers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from .checkpoint import read_config
from .headers import DTYPE_BITS, TensorHeader, read_headers

PIECES, PIECE_BYTES = 8, 64
_ROUTERS = {"gate", "router", "wg"}  # what checkpoints call a router, or its matrix


def model_hash(folder: Path) -> str:
    """A hash of config.json and of every tensor's name, dtype, shape and a few samples of its bytes.

    Raises:
        UserError: the folder holds no readable safetensors checkpoint.
    """
    config = read_config(folder)
    text = {"transformers_version", "_name_or_path"}
    essentials = {key: value for key, value in config.items() if key not in text}
    digest = hashlib.sha256(json.dumps(essentials, sort_keys=True).encode())
    for name, header in sorted(read_headers(folder).items()):
        digest.update(f"{name} {header.dtype} {list(header.shape)}".encode())
        for piece in _pieces(folder, header):
            digest.update(piece)
    return digest.hexdigest()[:32]


def router_hash(folder: Path, num_experts: Iterable[int]) -> str:
    """A hash of the routers' matrices, whatever dtype they are stored in and whatever their layer is called.

    Heads for multi-token prediction have routers too, but transformers does not load them, so copies it made
    are without: they are left out.

    Args:
        num_experts: the model's expert counts.

    Returns:
        "" where no router has exactly so many rows (routers with rows beyond the experts').
    """
    counts = set(num_experts)
    config = read_config(folder)
    layers = (config.get("text_config") or config).get("num_hidden_layers") or math.inf
    digests = []
    for name, header in read_headers(folder).items():
        if len(header.shape) != 2 or header.shape[0] not in counts or header.dtype not in _AS_BF16:
            continue
        if _is_router(name, layers):
            whole = b"".join(_pieces(folder, header, pieces=PIECES, width=DTYPE_BITS[header.dtype] // 8))
            digests.append(hashlib.sha256(f"{list(header.shape)}".encode() + _AS_BF16[header.dtype](whole)))
    if not digests:
        return ""
    joined = b"".join(sorted(digest.digest() for digest in digests))
    return hashlib.sha256(joined).hexdigest()[:32]


def _is_router(name: str, layers: float) -> bool:
    """By its name on disk: something called gate or router, in a layer that the model runs."""
    parts = name.split(".")
    number = next((int(part) for part in parts if part.isdigit()), 0)
    return bool(_ROUTERS & set(parts)) and "mtp" not in parts and number < layers


def _pieces(folder: Path, header: TensorHeader, pieces: int = PIECES, width: int = 1) -> list[bytes]:
    """Some stretches of the tensor's bytes, evenly spread, both ends included; all of a small tensor.

    `width` is the bytes of an element: the same elements are read whatever their width.
    """
    elements, take = header.nbytes // width, PIECE_BYTES
    with open(folder / header.file, "rb") as file:
        if elements <= pieces * take:
            file.seek(header.start)
            return [file.read(header.nbytes)]
        found = []
        for i in range(pieces):
            file.seek(header.start + (elements - take) * i // (pieces - 1) * width)
            found.append(file.read(take * width))
        return found


def _bf16_of_fp32(raw: bytes) -> bytes:
    """Round to nearest even, as torch casts."""
    bits = np.frombuffer(raw, dtype="<u4").astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


def _bf16_of_fp16(raw: bytes) -> bytes:
    return _bf16_of_fp32(np.frombuffer(raw, dtype="<f2").astype("<f4").tobytes())


_AS_BF16: dict[str, Any] = {"BF16": bytes, "F32": _bf16_of_fp32, "F16": _bf16_of_fp16}
