"""Examples as batches: padded rows, packed rows end to end, or pairs; which positions are learned."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from moesmith.data.masks import IGNORED, Example
from moesmith.data.packing import concatenate


def to_dataset(sequences: Sequence[Sequence[Example]], **columns: Sequence[Any]) -> datasets.Dataset:
    """One dataset row per sequence; a sequence is one example, several packed together, or a pair's two.

    Args:
        columns: what else each row has.
    """
    return datasets.Dataset.from_dict(
        {
            "input_ids": [[e.input_ids for e in sequence] for sequence in sequences],
            "labels": [[e.labels for e in sequence] for sequence in sequences],
            "rows": [[e.row for e in sequence] for sequence in sequences],
            **columns,
        }
    )


class Collator:
    """Dataset rows -> what the trainer wants.

    input_ids, labels (B, T), and attention_mask (B, T) or, for packed rows, position_ids (1, T);
    learned (N,) indices into the B*T positions whose next token is learned; shift_labels (1, N) those tokens;
    rows: numbers of the rows in the batch. A spare batch (see `Share`) says so, has none and learns nothing.
    """

    def __init__(self, pad_token_id: int, packed: bool):
        self.pad_token_id = pad_token_id
        self.packed = packed

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [example for item in items for example in _examples(item)]
        batch: dict[str, Any] = concatenate(examples) if self.packed else pad(examples, self.pad_token_id)
        following = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:].reshape(-1)
        learned = (following != IGNORED).nonzero().squeeze(1)
        rows = [example.row for example in examples]
        batch |= {"learned": learned, "shift_labels": following[learned][None], "rows": rows}
        if _is_spare(items):
            batch |= {"spare": True, "rows": [], "shift_labels": batch["shift_labels"].fill_(IGNORED)}
        return batch


class PairCollator:
    """Dataset rows, each a chosen and a rejected example -> what TRL's preference losses want.

    B pairs: input_ids, attention_mask, completion_mask (2B, T), all chosen before all rejected; rows: numbers
    of the pairs; ref_chosen_logps, ref_rejected_logps (B,) fp32 where the pairs' reference is known.

    Args:
        references: a pair's digest -> summed log-probabilities of its completions; may be filled later. As
            long as it is empty, batches come without.
    """

    def __init__(self, pad_token_id: int, references: Mapping[str, tuple[float, float]]):
        self.pad_token_id = pad_token_id
        self.references = references

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        pairs = [_examples(item) for item in items]
        batch = pad([pair[i] for i in (0, 1) for pair in pairs], self.pad_token_id)
        batch["completion_mask"] = (batch.pop("labels") != IGNORED).long()
        if self.references:
            known = torch.tensor([self.references[item["pair"]] for item in items], dtype=torch.float32)
            batch["ref_chosen_logps"], batch["ref_rejected_logps"] = known.unbind(1)
        spare = {"spare": True} if _is_spare(items) else {}
        return {**batch, **spare, "rows": [] if spare else [pair[0].row for pair in pairs]}


class Share:
    """One process's part of the batches that a single one would read, as a batch sampler.

    Of every `window` batches (those of one optimizer step) it takes every `shares`-th, from `share` on. Where
    another process has one more, a spare batch comes last: the window's first row, its index i as ~i.

    Args:
        batches: a batch sampler, the same and in the same order in every process.
    """

    def __init__(self, batches: Any, window: int, shares: int, share: int):
        self.batches, self.window, self.shares, self.share = batches, window, shares, share
        self.batch_size, self.drop_last = batches.batch_size, batches.drop_last

    def __iter__(self) -> Iterator[list[int]]:
        batches = iter(self.batches)
        while window := list(itertools.islice(batches, self.window)):
            mine = window[self.share :: self.shares]
            yield from mine
            if len(mine) < math.ceil(len(window) / self.shares):
                yield [~window[0][0]]

    def __len__(self) -> int:
        whole, rest = divmod(len(self.batches), self.window)
        return whole * math.ceil(self.window / self.shares) + math.ceil(rest / self.shares)

    def set_epoch(self, epoch: int) -> None:
        """The order of the rows follows from the seed and the epoch."""
        if hasattr(self.batches.sampler, "set_epoch"):
            self.batches.sampler.set_epoch(epoch)


class WithSpares(torch.utils.data.Dataset):
    """A dataset in which row ~i is row i, marked as spare."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index] if index >= 0 else {**self.rows[~index], "spare": True}

    def __len__(self) -> int:
        return len(self.rows)


def _is_spare(items: Iterable[dict[str, Any]]) -> bool:
    return any("spare" in item for item in items)


def pad(examples: Sequence[Example], pad_token_id: int) -> dict[str, Tensor]:
    """input_ids, labels, attention_mask (B, T), padded on the right."""
    shape = (len(examples), max(len(example) for example in examples))
    input_ids = torch.full(shape, pad_token_id)
    labels = torch.full(shape, IGNORED)
    attention_mask = torch.zeros(shape, dtype=torch.long)
    for i, example in enumerate(examples):
        input_ids[i, : len(example)] = torch.as_tensor(example.input_ids, dtype=torch.long)
        labels[i, : len(example)] = torch.as_tensor(example.labels, dtype=torch.long)
        attention_mask[i, : len(example)] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}


def _examples(item: dict[str, Any]) -> list[Example]:
    return [
        Example(row, np.asarray(ids, dtype=np.int32), np.asarray(labels, dtype=np.int32))
        for row, ids, labels in zip(item["rows"], item["input_ids"], item["labels"], strict=True)
    ]
