"""What every FFN of a dense model reads on given texts, one decoder layer at a time.

    facts = capture(folder, texts, visit, state)    # visit gets a LayerInputs for every layer, in order

One streamed pass: a decoder layer's weights are in memory with that layer's inputs of all texts, the hidden
states are on disk. So the source may be larger than memory. Texts run in right-padded batches of similar
length; padding is never among the tokens. The inputs are those of the same batches (`batches`) through the
whole model, bit for bit.
"""

# T tokens of all texts one after another, H hidden size, B rows of a batch, S positions

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesmith.errors import UserError
from moesmith.models.layerwise import Layerwise
from moesmith.models.partial import DENSE_FFN

BATCH_TOKENS = 4096
"""positions of a batch, padding included; a longer text is a batch of its own"""


@dataclass
class Text:
    """Token ids that routers are fitted or judged on."""

    ids: list[int]
    label: int
    """the expert whose domain it is, -1 for none"""
    fit: bool
    """False: held out"""
    id: str
    domain: str


@dataclass
class LayerInputs:
    """What one layer's FFN reads; all tensors are where that layer is computed."""

    layer: int
    inputs: Tensor
    """(T, H), in the dtype of the model"""
    document: Tensor
    """(T,) int64, index into the texts"""
    position: Tensor
    """(T,) int64, from the start of its text"""
    ffn: nn.Module
    """the FFN itself, whose weights are in memory during the call"""


@dataclass
class Batch:
    """Texts of similar length, right-padded."""

    ids: Tensor
    """(B, S) int64, 0 on padding"""
    mask: Tensor
    """(B, S) int64, 1 on tokens"""
    rows: Tensor
    """(tokens of the batch,) int64: which of the T each is, in the order of `mask`"""
    texts: list[int]
    """(B,) index into the texts"""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What the model is called with."""
        return {"input_ids": self.ids, "attention_mask": self.mask}


def batches(texts: Sequence[Text]) -> list[Batch]:
    """The texts by length, longest first, in batches of at most `BATCH_TOKENS` positions.

    Raises:
        UserError: no text has a token.
    """
    starts = [0]
    for text in texts:
        starts.append(starts[-1] + len(text.ids))
    order = sorted((n for n, text in enumerate(texts) if text.ids), key=lambda n: (-len(texts[n].ids), n))
    if not order:
        raise UserError(f"none of the {len(texts)} texts has a token", "give texts to run through the model")
    found = []
    while order:
        longest = len(texts[order[0]].ids)
        count = max(1, BATCH_TOKENS // longest)
        taken, order = order[:count], order[count:]
        ids = torch.zeros(len(taken), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, n in enumerate(taken):
            length = len(texts[n].ids)
            ids[row, :length] = torch.tensor(texts[n].ids)
            mask[row, :length] = 1
        rows = torch.cat([torch.arange(starts[n], starts[n + 1]) for n in taken])
        found.append(Batch(ids, mask, rows, taken))
    return found


def open_dense(
    folder: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "auto"
) -> Layerwise:
    """A dense model without its decoder layers.

    Args:
        dtype: also by name (bfloat16); "auto" for the checkpoint's own.
        device: "auto" for the GPU if there is one.

    Raises:
        UserError: an unreadable checkpoint, or a model whose layers have no gated FFN or cannot be run one
            at a time.
    """
    if isinstance(dtype, str) and dtype != "auto":
        dtype = getattr(torch, dtype)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model = Layerwise.open(folder, dtype, "cuda:0" if str(device) == "cuda" else device)
    for name, layer in zip(model.decoder_layers, model.layers, strict=True):
        if not hasattr(getattr(layer, DENSE_FFN, None), "gate_proj"):
            raise UserError(
                f"{name} of {type(model.model).__name__} has no dense FFN `{DENSE_FFN}`",
                "experts are made of dense models; this one is a MoE",
            )
    return model


def capture(
    folder: Path,
    texts: Sequence[Text],
    visit: Callable[[LayerInputs], None],
    state: Path,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "auto",
    on_step: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Run the texts through the model and show `visit` what every FFN reads, layer by layer.

    Args:
        visit: called once per layer, in order; what it is given is dropped afterwards.
        state: a folder for the hidden states. A run that was stopped starts over: what `visit` added up is
            not kept here.
        on_step: called with (texts done, all to do), each counted once per layer.

    Returns:
        facts: layers, tokens, seconds, bytes of the largest layer on disk.

    Raises:
        UserError: as `open_dense`; an FFN reads NaN or infinity; the disk is full.
    """
    start = time.perf_counter()
    model = open_dense(folder, dtype, device)
    given = batches(texts)
    places = [batch.rows.to(model.device) for batch in given]
    masks = [batch.mask.bool().to(model.device) for batch in given]
    document, position = (tensor.to(model.device) for tensor in whereabouts(texts))
    names, total, done = model.decoder_layers, steps(given, model), 0
    inputs: list[Tensor] = []  # of the layer in memory
    current = 0  # the batch that is running

    @contextmanager
    def around_layer(index: int, layer: nn.Module) -> Iterator[None]:
        ffn = layer.get_submodule(DENSE_FFN)

        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found = args[0][masks[current]]
            if not bool(found.isfinite().all()):
                at = int(document[places[current]][~found.isfinite().all(-1)][0])
                raise UserError(
                    f"the FFN of {names[index]} reads NaN or infinity in text {texts[at].id}",
                    "the weights are damaged, or their numbers too large for this dtype: try float32",
                )
            if not inputs:
                inputs.append(found.new_empty(len(document), found.shape[-1]))
            inputs[0][places[current]] = found

        hook = ffn.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            hook.remove()
        visit(LayerInputs(index, inputs.pop(), document, position, ffn))

    @contextmanager
    def around_chunk(number: int) -> Iterator[None]:
        nonlocal current, done
        current = number
        yield
        done += len(given[number].texts)
        if on_step is not None:
            on_step(done, total)

    with fresh_spool(state) as spool:
        model.run([batch.inputs for batch in given], spool, around_layer, around_chunk)
    return {
        "layers": len(names),
        "tokens": len(document),
        "seconds": time.perf_counter() - start,
        "largest_layer_bytes": max(model.layer_bytes(index) for index in range(len(names))),
    }


@contextmanager
def fresh_spool(state: Path) -> Iterator[Path]:
    """A folder in `state` for hidden states: empty at first, gone afterwards."""
    spool = state / "hidden"
    shutil.rmtree(spool, ignore_errors=True)
    try:
        yield spool
    finally:
        shutil.rmtree(spool, ignore_errors=True)


def steps(given: Sequence[Batch], model: Layerwise) -> int:
    """Texts to run through layers, each counted once per layer."""
    return sum(len(batch.texts) for batch in given) * len(model.layers)


def whereabouts(texts: Sequence[Text]) -> tuple[Tensor, Tensor]:
    """Of every token: which text it is in, and where there; (T,) int64 each."""
    lengths = [len(text.ids) for text in texts]
    document = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(lengths))
    return document, torch.cat([torch.arange(length) for length in lengths])
