"""Examples as batches: padded rows, or packed rows end to end; the learned positions are picked out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from torch import Tensor

from moesmith.data.masks import IGNORED, Example
from moesmith.data.packing import concatenate


def to_dataset(sequences: Sequence[Sequence[Example]]) -> datasets.Dataset:
    """One dataset row per sequence; a sequence is one example, or several that are packed together."""
    return datasets.Dataset.from_dict(
        {
            "input_ids": [[e.input_ids for e in sequence] for sequence in sequences],
            "labels": [[e.labels for e in sequence] for sequence in sequences],
            "rows": [[e.row for e in sequence] for sequence in sequences],
        }
    )


class Collator:
    """Dataset rows -> what the trainer wants.

    input_ids, labels (B, T), and attention_mask (B, T) or, for packed rows, position_ids (1, T);
    learned (N,) indices into the B*T positions whose next token is learned; shift_labels (1, N) those tokens;
    rows: numbers of the rows in the batch.
    """

    def __init__(self, pad_token_id: int, packed: bool):
        self.pad_token_id = pad_token_id
        self.packed = packed

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, Any]:
        examples = [
            Example(row, np.asarray(ids, dtype=np.int32), np.asarray(labels, dtype=np.int32))
            for item in items
            for row, ids, labels in zip(item["rows"], item["input_ids"], item["labels"], strict=True)
        ]
        batch = concatenate(examples) if self.packed else self._pad(examples)
        following = torch.nn.functional.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:].reshape(-1)
        learned = (following != IGNORED).nonzero().squeeze(1)
        rows = [example.row for example in examples]
        return {**batch, "learned": learned, "shift_labels": following[learned][None], "rows": rows}

    def _pad(self, examples: list[Example]) -> dict[str, Tensor]:
        shape = (len(examples), max(len(example) for example in examples))
        input_ids = torch.full(shape, self.pad_token_id)
        labels = torch.full(shape, IGNORED)
        attention_mask = torch.zeros(shape, dtype=torch.long)
        for i, example in enumerate(examples):
            input_ids[i, : len(example)] = torch.as_tensor(example.input_ids, dtype=torch.long)
            labels[i, : len(example)] = torch.as_tensor(example.labels, dtype=torch.long)
            attention_mask[i, : len(example)] = 1
        return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
