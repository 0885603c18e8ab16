"""What goes from decoder layer to decoder layer, on disk: written by one layer, read by the next, resumable.

Two files per layer: `layer-0003.bin` with the tensors of all chunks one after another, and `layer-0003.json`
that says what they are. `state.json` counts the layers that are done; a layer counts when everything that
belongs to it has been written, so that a run killed at any moment goes on at the layer it was in. The files
are read and written in order and are not mapped.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from moesmith.config import write_atomically
from moesmith.errors import UserError
from moesmith.models.ranges import FULL

STATE = "state.json"


class Spool:
    """What layers gave, by layer and chunk."""

    def __init__(self, folder: Path, identity: str):
        """Open or go on with the spool in `folder`.

        Args:
            identity: tells one run from another.

        Raises:
            UserError: the folder holds the spool of another run.
        """
        self.folder = folder
        self.identity = identity
        self.done = 0
        """layers that are complete"""
        self._index: dict[int, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / STATE).is_file():
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            if state["identity"] != identity:
                raise UserError(
                    f"{folder} belongs to a run with another model, other text or other settings",
                    f"give the same ones to go on with it, or start anew: rm -r {folder}",
                )
            self.done = state["done"]

    def commit(self, layer: int) -> None:
        """Layer `layer` is complete."""
        self.done = layer + 1
        record = {"identity": self.identity, "done": self.done}
        with self._room():
            write_atomically(self.folder / STATE, json.dumps(record) + "\n")

    def holds(self, layer: int) -> bool:
        """Whether the tensors of that layer are still there."""
        return self._path(layer, "bin").is_file()

    def drop(self, layer: int) -> None:
        """Delete the tensors of a layer. Their shapes stay known."""
        self._path(layer, "bin").unlink(missing_ok=True)

    @contextmanager
    def write(self, layer: int) -> Iterator[Writer]:
        """To write what a layer gave, chunk by chunk; kept if nothing was raised.

        Raises:
            UserError: the disk is full.
        """
        temporary = self._path(layer, "bin.part")
        with self._room():
            try:
                with open(temporary, "wb") as file:
                    writer = Writer(file)
                    yield writer
                    file.flush()
                    os.fsync(file.fileno())
            except OSError:
                temporary.unlink(missing_ok=True)
                raise
            temporary.replace(self._path(layer, "bin"))
            index = {"forms": writer.forms, "chunks": writer.chunks}
            write_atomically(self._path(layer, "json"), json.dumps(index) + "\n")
        self._index[layer] = index

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Turns a full disk into a UserError."""
        try:
            yield
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise UserError(
                f"{self.folder}: the disk is full",
                "make room and start again: it goes on at this layer; or use less text",
            ) from None

    def read(self, layer: int, chunk: int, device: torch.device | str = "cpu") -> Any:
        """What the layer gave for a chunk; zeros that take no memory if it was dropped.

        Raises:
            UserError: the spool is damaged.
        """
        if layer not in self._index:
            self._index[layer] = json.loads(self._path(layer, "json").read_text(encoding="utf-8"))
        offset, number = self._index[layer]["chunks"][chunk]
        form = self._index[layer]["forms"][number]
        kinds = [(getattr(torch, dtype), shape) for dtype, shape in form["tensors"]]
        if not self.holds(layer):
            tensors = [torch.zeros((), dtype=d, device=device).expand(shape) for d, shape in kinds]
            return _build(form["form"], tensors)
        tensors = []
        with open(self._path(layer, "bin"), "rb") as file:
            file.seek(offset)
            for dtype, shape in kinds:
                tensor = torch.empty(shape, dtype=dtype)
                if tensor.numel():
                    view = tensor.reshape(-1).view(torch.uint8).numpy().data
                    if file.readinto(view) != tensor.nbytes:
                        raise UserError(
                            f"{self._path(layer, 'bin')} is cut short", f"start anew: rm -r {self.folder}"
                        )
                tensors.append(tensor.to(device))
        return _build(form["form"], tensors)

    def _path(self, layer: int, suffix: str) -> Path:
        return self.folder / f"layer-{layer:04d}.{suffix}"


class Writer:
    """Appends what one layer gives."""

    def __init__(self, file: BinaryIO):
        self.forms: list[dict[str, Any]] = []
        """{"form": nesting, "tensors": [[dtype, shape]]}, each once"""
        self.chunks: list[list[int]] = []
        """per chunk: offset in the file, number of its form"""
        self._file = file

    def add(self, value: Any) -> None:
        """Append a chunk's tensors, nested in tuples, lists and mappings."""
        tensors: list[Tensor] = []
        form = _describe(value, tensors)
        kinds = [[str(tensor.dtype).removeprefix("torch."), list(tensor.shape)] for tensor in tensors]
        record = {"form": form, "tensors": kinds}
        if record not in self.forms:
            self.forms.append(record)
        self.chunks.append([self._file.tell(), self.forms.index(record)])
        for tensor in tensors:
            if tensor.numel():
                flat = tensor.detach().cpu().contiguous().reshape(-1)
                self._file.write(flat.view(torch.uint8).numpy().data)


# ---------------------------------------------------------------- tensors nested in other things


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in tuples, lists and mappings, in order."""
    found: list[Tensor] = []
    map_tensors(value, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def map_tensors(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same nesting with another tensor for each."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        items = [map_tensors(item, function) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if _is_mapping(value):
        return {key: map_tensors(value[key], function) for key in value.keys()}  # noqa: SIM118
    return value


def _is_mapping(value: Any) -> bool:
    return hasattr(value, "keys") and hasattr(value, "__getitem__")


def _describe(value: Any, tensors: list[Tensor]) -> Any:
    """The nesting as JSON; the tensors are appended to `tensors`."""
    if isinstance(value, Tensor):
        tensors.append(value)
        return {"tensor": len(tensors) - 1}
    if isinstance(value, (tuple, list)):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_describe(item, tensors) for item in value]}
    if _is_mapping(value):
        return {"dict": {key: _describe(value[key], tensors) for key in value.keys()}}  # noqa: SIM118
    if value is None or isinstance(value, (bool, int, float, str)):
        return {"value": value}
    raise UserError(
        f"a decoder layer gives a {type(value).__name__}, which cannot be kept on disk",
        "profile it in memory, without --stream; for a build, choose another model",
    )


def _build(form: dict[str, Any], tensors: list[Tensor]) -> Any:
    ((kind, inner),) = form.items()
    if kind == "tensor":
        return tensors[inner]
    if kind == "tuple":
        return tuple(_build(item, tensors) for item in inner)
    if kind == "list":
        return [_build(item, tensors) for item in inner]
    if kind == "dict":
        return {key: _build(item, tensors) for key, item in inner.items()}
    return inner
