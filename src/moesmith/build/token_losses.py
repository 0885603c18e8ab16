"""Loss of a dense model on every token of given texts, one decoder layer at a time.

The model streams as in `capture`: one decoder layer in memory, then the output head, hidden states on disk.
Logits are made by the model's own code, a few tokens at a time: a vocabulary of 262,144 and a text of any
length fit.
"""

# T tokens of all texts one after another, N tokens of a slice, H hidden size, V vocabulary

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from moesmith.errors import UserError

from .capture import Text, batches, fresh_spool, open_dense, steps, whereabouts

LOGITS = 2**24
"""logits that are made at a time: 64 MB in fp32, and a few such copies"""


def token_losses(
    folder: Path,
    texts: Sequence[Text],
    dtype: torch.dtype | str = "auto",
    on_text: Callable[[int, int], None] | None = None,
    device: torch.device | str = "auto",
    state: Path | None = None,
) -> Tensor:
    """Nats of the next token, at every token of the texts.

    Args:
        on_text: called with (texts done, all to do), each counted once per layer.
        state: a folder for the hidden states; None for a temporary one.

    Returns:
        (T,) fp32 in the order of the texts, on the CPU; NaN at the last token of a text.

    Raises:
        UserError: as `capture.open_dense`; no output head; the loss is NaN or infinite; the disk is full.
    """
    model = open_dense(folder, dtype, device)
    given = batches(texts)
    document, position = whereabouts(texts)
    losses = torch.full((len(document),), torch.nan)
    slice_size = max(1, LOGITS // model.model.config.get_text_config().vocab_size)
    total, done = steps(given, model), 0

    @contextmanager
    def around_chunk(number: int) -> Iterator[None]:
        nonlocal done
        yield
        done += len(given[number].texts)
        if on_text is not None:
            on_text(done, total)

    with ExitStack() as stack:
        if state is None:
            state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moesmith-")))
        spool = stack.enter_context(fresh_spool(state))
        head: list[Callable[[Tensor], Tensor]] = []

        def on_output(number: int, hidden: Tensor) -> None:
            if not head:  # not before the last layer: a head that has to be cast takes memory
                head.append(stack.enter_context(model.head()))
            batch = given[number]
            follows = F.pad(batch.mask[:, 1:], (0, 1)).bool()  # (B, S) where a next token is
            targets = batch.ids.roll(-1, 1)[follows]
            nats = next_token_losses(head[0], hidden[follows.to(hidden.device)], targets, slice_size)
            losses[batch.rows[follows[batch.mask.bool()]]] = nats

        model.run([batch.inputs for batch in given], spool, around_chunk=around_chunk, on_output=on_output)

    lengths = torch.tensor([len(text.ids) for text in texts])
    odd = document[~losses.isfinite() & (position + 1 < lengths[document])]
    if len(odd):
        raise UserError(
            f"{folder}: the loss on text {texts[int(odd[0])].id} is NaN or infinite",
            "the weights are damaged, or their numbers too large for this dtype: try float32",
        )
    return losses


@torch.no_grad()
def next_token_losses(
    head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor, slice_size: int
) -> Tensor:
    """Nats of `targets` (N,) after the last hidden states (N, H), a slice at a time: (N,) fp32 on the CPU."""
    found = [torch.empty(0)]
    for states, wanted in zip(hidden.split(slice_size), targets.split(slice_size), strict=True):
        logits = head(states[None])[0].float()  # (slice, V)
        found.append(F.cross_entropy(logits, wanted.to(logits.device), reduction="none").cpu())
    return torch.cat(found)
