"""Run a dense decoder one layer at a time over calibration tokens.

Yields every layer together with what its FFN reads, so that a procedure can look at (or replace) one layer
while only that layer's activations are in memory. Cost: one forward pass over the tokens without the head,
plus one chunk. Peak: the hidden states of all calibration tokens, twice.

Shapes: N chunks, B rows, S positions, T = N*B*S tokens, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moesmith.errors import UserError


@dataclass
class StreamedLayer:
    """One decoder layer and its FFN input over all calibration tokens."""

    index: int
    name: str
    """Module path, for example `model.layers.7`."""
    module: nn.Module
    ffn_input: Tensor
    """(T, H), in the dtype of the model."""


class _ReachedFirstLayer(Exception):
    """Ends a forward pass once the first layer's input is known."""


def decoder_layers(model: nn.Module, ffn: str = "mlp") -> tuple[str, nn.ModuleList]:
    """The stack of decoder layers and its module path: the one `ModuleList` whose members all own an FFN
    named `ffn`.

    Raises UserError if the model has none or several.
    """
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(hasattr(layer, ffn) for layer in module)
    ]
    if len(found) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(found)} stacks of layers with an FFN named `{ffn}`, wanted 1",
            "only plain decoder-only models can be taken apart layer by layer",
        )
    return found[0]


@torch.no_grad()
def stream_layers(model: nn.Module, chunks: list[Tensor], ffn: str = "mlp") -> Iterator[StreamedLayer]:
    """Yield each decoder layer with its FFN input over `chunks`.

    `chunks`: token ids, each (B, S), all of one shape and without padding (so masks and positions are
    shared). A layer changed between two steps of the iteration is not run again: later layers see the
    dense outputs.
    """
    shapes = {tuple(chunk.shape) for chunk in chunks}
    if len(shapes) != 1:
        raise ValueError(f"chunks must share one shape (B, S), got {sorted(shapes)}")
    path, layers = decoder_layers(model, ffn)
    arguments = _layer_arguments(model, layers, chunks[0])
    hidden = [_first_input(model, layers[0], chunk) for chunk in chunks]

    for index, layer in enumerate(layers):
        args, kwargs = arguments[index]
        inputs: list[Tensor] = []
        hook = getattr(layer, ffn).register_forward_pre_hook(
            lambda _m, a, into=inputs: into.append(a[0].detach())
        )
        try:
            for i, states in enumerate(hidden):
                output = layer(states, *args, **kwargs)
                hidden[i] = output[0] if isinstance(output, tuple) else output
        finally:
            hook.remove()
        yield StreamedLayer(index, f"{path}.{index}", layer, torch.cat([x.flatten(0, -2) for x in inputs]))


def _layer_arguments(
    model: nn.Module, layers: nn.ModuleList, chunk: Tensor
) -> list[tuple[tuple, dict[str, Any]]]:
    """What the model passes to each layer besides the hidden states (mask, positions), seen in one real
    forward.
    """
    seen: list[tuple[tuple, dict[str, Any]]] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append((args[1:], kwargs)), with_kwargs=True
        )
        for layer in layers
    ]
    try:
        model.base_model(input_ids=chunk, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _first_input(model: nn.Module, layer: nn.Module, chunk: Tensor) -> Tensor:
    """Input of the first layer: embeddings, with whatever scaling the model applies."""
    caught: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple) -> None:
        caught.append(args[0])
        raise _ReachedFirstLayer

    hook = layer.register_forward_pre_hook(stop)
    try:
        model.base_model(input_ids=chunk, use_cache=False)
    except _ReachedFirstLayer:
        pass
    finally:
        hook.remove()
    return caught[0]
