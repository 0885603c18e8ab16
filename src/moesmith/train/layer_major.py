"""Layer-major steps: the rows of a whole optimizer step go through each decoder layer in turn.

Gradient accumulation sends one micro-batch after the other through all layers, so experts that are staged
from RAM or disk come once per micro-batch. Here the step is one forward pass over batch_size x grad_accum
rows, in which every decoder layer runs in slices of batch_size rows, each with its own checkpoint: a layer's
experts come once in the forward and once in the backward, and at any time only one slice of one layer has its
activations. What it costs is the hidden states between the layers for all rows of the step, and padding: all
rows of a step are as long as its longest.

What a layer is called with is cut by shape: the dimension as long as the batch, the first or the second one.
A tensor whose first dimension is 1 is shared by all rows. Mappings that layers use to leave something for
later layers (shared keys and values) are kept once per slice.
"""

# B rows of a step, b rows of a slice

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moesmith.errors import UserError
from moesmith.models.layers import moe_layers, submodule

from .settings import TrainSettings

# Arguments of a layer that belong to the whole call, whatever their shape.
WHOLE = ("cache_position", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
CACHES = ("past_key_values", "past_key_value", "layer_past", "cache_params")


def rows_and_passes(settings: TrainSettings) -> tuple[int, int]:
    """(rows of a forward pass, forward passes of a step), as the trainer is to be told."""
    if settings.layer_major:
        return settings.batch_size * settings.grad_accum, 1
    return settings.batch_size, settings.grad_accum


def check(settings: TrainSettings, packing: bool) -> None:
    """Refuse what cannot be cut into rows.

    Raises:
        UserError: packed sequences lie end to end in one row; no checkpointing.
    """
    if not settings.layer_major:
        return
    if packing:
        raise UserError(
            "train.layer_major with data.packing: packed sequences are one row, which cannot be cut",
            "leave one of them out",
        )
    if not settings.gradient_checkpointing:
        raise UserError(
            "train.layer_major without gradient checkpointing keeps the activations of the whole step",
            "train.gradient_checkpointing=true",
        )


@dataclass
class _Shared:
    """What the layers of one stack have in common while they run in slices."""

    rows: int
    last: nn.Module
    """the stack's last layer, after which nobody asks for the copies any more"""
    copies: dict[int, tuple[Any, list[Any]]] = field(default_factory=dict)
    """id of a mapping that layers leave something in -> the mapping itself, its copies by slice"""

    def own(self, holder: Any, index: int) -> Any:
        """The slice's own copy of a mapping; empty mappings start empty."""
        kept = self.copies.setdefault(id(holder), (holder, []))[1]
        while len(kept) <= index:
            kept.append(copy.copy(holder))
        return kept[index]


class _InSlices:
    """Mixed into a decoder layer's class: a call with more rows than a slice has becomes several calls."""

    _layer_major: _Shared

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        shared = self._layer_major
        rows = _batch(args, kwargs)
        if rows is None or rows <= shared.rows:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        try:
            given = []
            for index, start in enumerate(range(0, rows, shared.rows)):
                part = slice(start, min(start + shared.rows, rows))
                cut = [_cut(value, part, rows, shared, index) for value in args]
                named = {
                    key: value if key in WHOLE else _cut(value, part, rows, shared, index)
                    for key, value in kwargs.items()
                }
                given.append(super().__call__(*cut, **named))  # type: ignore[misc]
            return _joined(given)
        finally:
            if self is shared.last:
                shared.copies.clear()


@contextmanager
def in_slices(model: nn.Module, rows: int) -> Iterator[None]:
    """Within, every decoder layer of `model` runs at most `rows` rows at a time; `attach` and `detach`."""
    attach(model, rows)
    try:
        yield
    finally:
        detach(model)


def attach(model: nn.Module, rows: int) -> None:
    """Let the decoder layers run in slices of `rows` rows; they stay the same objects.

    Raises:
        UserError: a model without decoder layers that can be found.
    """
    detach(model)
    stacks = _decoder_stacks(model)
    if not stacks:
        raise UserError("train.layer_major: no decoder layers were found in this model", "leave it out")
    for layers in stacks:
        shared = _Shared(rows, layers[-1])
        for layer in layers:
            before = type(layer)
            # the class keeps its name: libraries find decoder layers by it
            layer.__class__ = type(before.__name__, (_InSlices, before), {"_layer_major_before": before})
            vars(layer)["_layer_major"] = shared


def detach(model: nn.Module) -> None:
    """Give the decoder layers their own class back. Nothing if they have it."""
    for module in model.modules():
        before = getattr(type(module), "_layer_major_before", None)
        if before is not None:
            module.__class__ = before
            vars(module).pop("_layer_major", None)


# ---------------------------------------------------------------- layers and their arguments


def _decoder_stacks(model: nn.Module) -> list[list[nn.Module]]:
    """The lists of layers that the MoE layers are in, dense layers between them included."""
    names: dict[str, None] = {}
    for layer in moe_layers(model):
        parts = layer.name.split(".")
        while parts and not parts[-1].isdigit():
            parts.pop()
        if parts:
            names[".".join(parts[:-1])] = None
    return [list(submodule(model, name).children()) for name in names]


def _batch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """B of a call: the first dimension of its hidden states. None with a cache, whose rows stay together."""
    if any(kwargs.get(name) is not None for name in CACHES):
        return None
    hidden = kwargs.get("hidden_states", args[0] if args else None)
    while isinstance(hidden, (tuple, list)) and hidden:
        hidden = hidden[0]
    return hidden.shape[0] if isinstance(hidden, Tensor) and hidden.ndim > 1 else None


def _cut(value: Any, part: slice, rows: int, shared: _Shared, index: int) -> Any:
    """One slice's share of an argument."""
    if isinstance(value, Tensor):
        if value.ndim == 0 or value.shape[0] == 1:
            return value
        if value.shape[0] == rows:
            return value[part]
        # several kinds of positions side by side, or residual streams: (kinds, B, ...)
        return value[:, part] if value.ndim > 1 and value.shape[1] == rows else value
    if isinstance(value, (tuple, list)):
        items = [_cut(item, part, rows, shared, index) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if hasattr(value, "keys") and hasattr(value, "update"):
        if any(isinstance(inner, Tensor) for inner in value.values()):
            return {key: _cut(inner, part, rows, shared, index) for key, inner in value.items()}
        return shared.own(value, index)
    return value


def _joined(given: list[Any]) -> Any:
    """What the slices gave, as one: tensors along their rows."""
    first = given[0]
    if isinstance(first, Tensor):
        return torch.cat(given)
    if isinstance(first, (tuple, list)):
        items = [_joined(list(items)) for items in zip(*given, strict=True)]
        return type(first)(*items) if hasattr(first, "_fields") else type(first)(items)
    return first
