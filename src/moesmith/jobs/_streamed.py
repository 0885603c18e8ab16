"""`moesmith profile --stream`: the replay of a model larger than memory, one decoder layer at a time.

    streamed = open_streamed(folder, dtype, device)  # refuses what cannot be streamed, before any work
    collector = Collector(text_layers(streamed), documents)
    replay_streamed(streamed, collector, batches, state)
    profile = collector.finish(meta)

The sums are bit for bit those of the same batches through the whole model in memory. A killed run goes on at
the layer it was in: what a layer has added up is written when all batches went through it, and thrown away
otherwise.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from moesmith import console
from moesmith.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from moesmith.models.layers import MoELayer
    from moesmith.models.layerwise import Layerwise
    from moesmith.prune.observe import Collector

ANSWERS = "--stream cannot let the model answer prompts: every token would read the whole model from disk"
ANSWERS_HINT = (
    "use text that is there (--corpus DOMAIN=FILE), or the answers of a packed copy that fits in memory:\n"
    "moesmith quantize MODEL --out PACKED; moesmith profile PACKED --out P; then --prompts P/generated.jsonl"
)


class Batch(Protocol):
    """What one forward is given, right-padded. B rows, S positions."""

    ids: Tensor
    """(B, S) int64"""
    mask: Tensor
    """(B, S) 1 on tokens, 0 on padding"""
    index: Tensor
    """(B, S) int64, the document of each token, -1 on padding"""


def refuse_answers(wanting: int) -> None:
    """Raise UserError if any document still wants an answer from the model."""
    if wanting:
        raise UserError(f"{ANSWERS} ({wanting:,} prompts)", ANSWERS_HINT)


def open_streamed(
    folder: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "auto"
) -> Layerwise:
    """The model without its decoder layers.

    Args:
        dtype: also by name (bfloat16); "auto" for the checkpoint's own.
        device: "auto" for the GPU if there is one.

    Raises:
        UserError: an unreadable checkpoint, or a model whose layers cannot be run one at a time.
    """
    import torch

    from moesmith.models.layerwise import Layerwise

    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Layerwise.open(folder, dtype, "cuda:0" if str(device) == "cuda" else device)


def text_layers(streamed: Layerwise) -> list[MoELayer]:
    """The MoE layers that text goes through, in order."""
    from moesmith.models import layers

    return layers.text_layers(streamed.model)


def replay_streamed(
    streamed: Layerwise, collector: Collector, batches: Sequence[Batch], state: Path
) -> dict[str, Any]:
    """Run all batches through the model layer by layer while the collector watches.

    Args:
        collector: watches `text_layers(streamed)`.
        batches: in a fixed order; the same ones when a stopped run goes on.
        state: a folder for hidden states and finished layers. The caller removes it when the profile is
            written; until then a stopped run goes on from it.

    Returns:
        facts: layers, those done before, seconds, tokens of the batches, bytes of the largest layer.

    Raises:
        UserError: a layer gives NaN or infinity, the disk is full, the checkpoint is damaged, or `state`
            belongs to another run.
    """
    from safetensors.torch import load_file

    from moesmith.models.whole import save_whole

    names = streamed.decoder_layers
    spool = state / "spool"
    done = streamed.layers_done([_inputs(batch) for batch in batches], spool)
    for layer in collector.layers:
        if _number(layer.experts, names) < done:
            collector.load_layer_state(layer.experts, load_file(_path(state, layer.experts)))
    tokens = sum(int((batch.index >= 0).sum()) for batch in batches)
    start, steps = time.perf_counter(), 0

    with console.bar("replay", len(batches) * (len(names) - done)) as bar:

        @contextmanager
        def around_layer(number: int, _layer: nn.Module) -> Iterator[None]:
            with collector.attach(streamed.model):
                yield

        @contextmanager
        def around_chunk(number: int) -> Iterator[None]:
            nonlocal steps
            with collector.batch(batches[number].index):
                yield
            steps += 1
            bar.update(steps, f"layer {done + (steps - 1) // len(batches) + 1} of {len(names)}")

        def on_layer(number: int) -> None:
            for layer in collector.layers:
                if _number(layer.experts, names) == number:
                    save_whole(collector.layer_state(layer.experts), _path(state, layer.experts))

        streamed.run([_inputs(batch) for batch in batches], spool, around_layer, around_chunk, on_layer)
    return {
        "layers": len(names),
        "layers_before": done,
        "seconds": time.perf_counter() - start,
        "tokens": tokens,
        "largest_layer_bytes": max(streamed.layer_bytes(number) for number in range(len(names))),
    }


def _inputs(batch: Batch) -> dict[str, Tensor]:
    return {"input_ids": batch.ids, "attention_mask": batch.mask}


def _number(module: str, layers: Sequence[str]) -> int:
    """Which decoder layer a module is in."""
    return next(number for number, name in enumerate(layers) if module.startswith(f"{name}."))


def _path(state: Path, experts: str) -> Path:
    return state / f"{experts}.safetensors"
