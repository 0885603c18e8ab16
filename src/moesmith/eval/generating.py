"""What every evaluation that generates answers needs around the model: batches, where an answer ends, and an
eye on the logits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moesmith.errors import UserError


def batches(lengths: Sequence[int], size: int, tokens: int) -> list[list[int]]:
    """Indices in batches of at most `size` rows and `tokens` tokens with padding, longest first.

    Longest first, so that running out of memory happens at once. A row longer than `tokens` goes alone.
    """
    found: list[list[int]] = []
    widest = 0
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if not found or len(found[-1]) == size or (len(found[-1]) + 1) * widest > tokens:
            found.append([])
            widest = lengths[i]
        found[-1].append(i)
    return found


@contextlib.contextmanager
def ending(model: Any, tokenizer: Any) -> Iterator[None]:
    """The token the template ends a turn with ends an answer too: tuned base models do not all list it."""
    settings = model.generation_config
    own = settings.eos_token_id
    ids = [*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id, _turn_end(tokenizer)]
    settings.eos_token_id = sorted({token for token in ids if token is not None}) or own
    try:
        yield
    finally:
        settings.eos_token_id = own


def _turn_end(tokenizer: Any) -> int | None:
    """The token right after an assistant turn ("<|im_end|>"), None where it is more than one or none."""
    import jinja2

    word = "ANSWER"
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": word}]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False)
    except jinja2.TemplateError:
        return None
    ids = tokenizer.encode(text.rpartition(word)[2].strip(), add_special_tokens=False)
    return ids[0] if len(ids) == 1 else None


class Watch:
    """Whether every logit that chose a token was finite, row by row."""

    def __init__(self) -> None:
        self.finite: torch.Tensor | None = None
        self.rows = 0

    def start(self, rows: int) -> None:
        self.finite, self.rows = None, rows

    def look(self, logits: torch.Tensor) -> None:
        """Note the last position of (B, T, V) logits; nothing is read back before `check`."""
        fine = (logits[:, -1].detach() < torch.inf).all(-1)  # false for NaN too; -inf only rules a token out
        self.finite = fine if self.finite is None else self.finite & fine

    def check(self, asked: Sequence[Any]) -> None:
        """Raise UserError naming the first of `asked` (id and row) whose logits were not finite."""
        if self.finite is None or len(self.finite) != self.rows or bool(self.finite.all()):
            return
        first = asked[int((~self.finite).nonzero()[0])]
        raise UserError(
            f"the model's logits are not finite at request {first.id} (row {first.row}): its answers mean "
            "nothing",
            "try --dtype float32 (float16 may overflow); otherwise the weights or the adapter are broken",
        )


@contextlib.contextmanager
def watched(model: Any) -> Iterator[Watch]:
    """`generate` takes a NaN for an answer and says nothing; a hook on the output layer sees it."""
    watch = Watch()
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if head is None:
        yield watch
        return
    handle = head.register_forward_hook(lambda module, inputs, logits: watch.look(logits))
    try:
        yield watch
    finally:
        handle.remove()
