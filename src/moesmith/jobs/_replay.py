"""Phase 2 of a profile: every document goes through the model once, observed.

The batches and their order follow from the documents alone, so the sums are the same bits on every run, also
on one that was stopped in between.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.errors import UserError
from moesmith.jobs._answers import groups, padded

if TYPE_CHECKING:
    from torch import Tensor

    from moesmith.prune.observe import Collector

COMMIT_SECONDS = 30.0  # how often the sums are saved: a kill loses no more than that ...
COMMIT_SHARE = 0.05  # ... unless they are so large that saving them would take more of the time than this


@dataclass
class Batch:
    """One forward pass, padded on the right. B documents, S positions."""

    ids: Tensor
    """int64 (B, S)"""
    mask: Tensor
    """int64 (B, S), 1 on real tokens"""
    index: Tensor
    """int64 (B, S): the document of each token, -1 on padding"""

    @property
    def tokens(self) -> int:
        """Real tokens."""
        return int(self.mask.sum())


def replay_batches(rows: Sequence[Sequence[int]], tokens: int) -> list[Batch]:
    """Documents of similar length together, at most `tokens` with padding, the longest first.

    The order is fixed by the lengths alone: the same documents give the same sums, bit for bit.
    """
    import torch

    batches = []
    for group in groups([len(row) for row in rows], tokens):
        ids, mask = padded([rows[i] for i in group], pad=0, left=False)
        index = torch.where(mask.bool(), torch.tensor(group)[:, None], -1)
        batches.append(Batch(ids, mask, index))
    return batches


def replay(
    model: Any, collector: Collector, batches: list[Batch], state: Path, about: dict[str, str]
) -> None:
    """Run every batch through the model, observed. Goes on from `state` if that belongs to this very run.

    Raises:
        UserError: a layer gave NaN or infinity.
    """
    import torch

    from moesmith.jobs._memory import anonymous_memory

    done = take_up(collector, state, about)
    if done:
        console.note(f"replay goes on after batch {done} of {len(batches)}")
    started = saved = time.perf_counter()
    seen, pause = 0, COMMIT_SECONDS
    with (
        console.bar("observing", total=sum(batch.tokens for batch in batches)) as bar,
        collector.attach(model),
        torch.no_grad(),
    ):
        bar.update(sum(batch.tokens for batch in batches[:done]))
        for number, batch in enumerate(batches[done:], done + 1):
            with collector.batch(batch.index):
                forward(model, batch)
            seen += batch.tokens
            now = time.perf_counter()
            memory = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else anonymous_memory()
            bar.advance(batch.tokens, f"{seen / (now - started):,.0f} tok/s · {console.size(memory)}")
            if now - saved > pause and number < len(batches):
                try:
                    commit(collector, state, {**about, "batches": str(number)})
                except UserError as error:  # the sums are still in memory: no reason to lose them
                    console.warn(f"{error.message}; going on, but a run that is stopped now starts over")
                    pause = math.inf
                saved = time.perf_counter()
                pause = max(pause, (saved - now) / COMMIT_SHARE)


def forward(model: Any, batch: Batch) -> None:
    """One pass without a cache, and without logits where the model can leave them out."""
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    model(
        input_ids=batch.ids.to(model.device),
        attention_mask=batch.mask.to(model.device),
        use_cache=False,
        **few,
    )


def commit(collector: Collector, state: Path, about: dict[str, str]) -> None:
    """Save the sums so far, whole or not at all. Raises UserError if the disk refuses."""
    from moesmith.models.whole import save_whole

    save_whole(collector.state_dict(), state, about)


def take_up(collector: Collector, state: Path, about: dict[str, str]) -> int:
    """Load the sums of an interrupted run and say how many batches they hold; 0 if they are of another."""
    from safetensors import safe_open

    if not state.is_file():
        return 0
    with safe_open(state, framework="pt") as file:
        found = dict(file.metadata() or {})
        batches = int(found.pop("batches", 0))
        if found != about:  # the corpus has changed since, or answers were drawn anew
            return 0
        collector.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    return batches
