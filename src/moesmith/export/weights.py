"""A checkpoint's tensors one at a time, packed ones as the numbers they stand for.

Stacks that moesmith packed and linears that bitsandbytes quantised are computed back expert by expert; what
is stored in floats is a view of the mapped file. Nothing is held but open files.
"""

# E experts

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from moesmith.errors import UserError
from moesmith.models.headers import TensorHeader
from moesmith.ops.stack import PackedStack

QUANT_STATE = ".quant_state.bitsandbytes__"
"""after a 4-bit weight's name: what bitsandbytes knows about it"""


class Weights:
    """The tensors of a folder; a context manager that closes its files."""

    def __init__(self, folder: Path, headers: dict[str, TensorHeader], scheme: str | None = None):
        """`scheme` is that of packed stacks, from the config; `scales` is filled when it is known."""
        self.folder = folder
        self.headers = headers
        self.scheme = scheme or ""
        self.scales: dict[str, list[str | None]] = {}
        """name of packed codes -> names of their absmax, scale and offset"""
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._states = {name.partition(QUANT_STATE)[0]: name for name in headers if QUANT_STATE in name}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._files.clear()

    def tensor(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        file = self.headers[name].file
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
        return self._files[file].get_tensor(name)

    def is_plain(self, name: str) -> bool:
        """Whether a tensor is stored as the numbers it is, in floats or integers."""
        return not (self._is_packed(name) or name in self._states or self._int8_scale(name))

    def scale_names(self) -> set[str]:
        """Tensors that say how others are quantised."""
        names = {name for scales in self.scales.values() for name in scales if name}
        for name in self.headers:
            weight, found, _ = name.partition(".weight.")
            stem, _, leaf = name.rpartition(".")
            four_bit = bool(found) and f"{weight}.weight" in self._states
            if four_bit or (leaf in ("SCB", "weight_format") and f"{stem}.SCB" in self.headers):
                names.add(name)
        return names

    def slices(self, name: str) -> Iterator[Tensor]:
        """The matrices of a stack one by one, anything else whole; in the dtype they are stored or, of what
        is quantised, in float32."""
        if self._is_packed(name):
            packed = PackedStack(*self._packed_parts(name), self.scheme)
            for expert in range(packed.shape[0]):
                yield packed.expert(expert, torch.float32)
        elif name in self._states:
            yield self._four_bit(name)
        elif scale := self._int8_scale(name):
            yield _bitsandbytes().int8_vectorwise_dequant(self.tensor(name), self.tensor(scale)).float()
        else:
            tensor = self.tensor(name)
            yield from tensor if tensor.ndim == 3 else [tensor]

    def _is_packed(self, name: str) -> bool:
        return name in self.scales

    def _packed_parts(self, name: str) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        absmax, scale, offset = (None if part is None else self.tensor(part) for part in self.scales[name])
        return self.tensor(name), absmax, scale, offset

    def _int8_scale(self, name: str) -> str | None:
        scale = f"{name.removesuffix('weight')}SCB"
        return scale if name.endswith(".weight") and scale in self.headers else None

    def _four_bit(self, name: str) -> Tensor:
        functional = _bitsandbytes()
        parts = {key: self.tensor(key) for key in self.headers if key.startswith(f"{name}.")}
        state = functional.QuantState.from_dict(parts, device=torch.device("cpu"))
        # What a forward multiplies with is rounded to the dtype the linear was in before.
        return functional.dequantize_4bit(self.tensor(name), state).float()


def _bitsandbytes() -> Any:
    try:
        from bitsandbytes import functional
    except ImportError:
        raise UserError(
            "the linears of this model are quantised by bitsandbytes, which is not installed",
            "pip install bitsandbytes",
        ) from None
    return functional
