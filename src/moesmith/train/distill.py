"""Train an adapter to give the next-token distribution that a larger model, the teacher, gives.

The teacher reads the training text once. Of every position the K likeliest tokens are kept with their
log-probabilities; all others count as one more outcome. The loss is the forward KL(teacher || student) over
these K+1 outcomes at temperature 1, a lower bound of the KL over the vocabulary that is close where the K
tokens hold most of the mass. So the two models are never in memory together, and any number of epochs costs
the teacher nothing. Router distillation after pruning: arXiv 2603.02217.
"""

# N positions whose next token is learned, K tokens kept of each, V vocabulary

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moesmith.data.masks import Example
from moesmith.errors import UserError

from .sft import Session
from .trainer import Trainer

KEPT = 64
ROWS_PER_FILE = 32
SMALLEST = 1e-7  # probability that the rest of the vocabulary has at least, for its logarithm


class Teacher:
    """What the teacher says about every row, on disk, in files of a few rows that are whole or not there."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._rows: dict[int, tuple[Tensor, Tensor]] = {}

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def missing(self, examples: Sequence[Example]) -> bool:
        """Whether some of these rows are not on disk yet."""
        return any(not self._file(number).exists() for number in range(_files(examples)))

    @torch.no_grad()
    def record(
        self,
        model: Any,
        examples: Sequence[Example],
        kept: int = KEPT,
        on_row: Callable[[int], None] | None = None,
    ) -> None:
        """Run the teacher over the rows that are not on disk yet.

        Args:
            kept: tokens to keep of every position.
            on_row: called with the number of rows done.

        Raises:
            UserError: logits that are not finite.
        """
        from safetensors.torch import save_file

        self.folder.mkdir(parents=True, exist_ok=True)
        model.eval()
        for number in range(_files(examples)):
            mine = examples[number * ROWS_PER_FILE : (number + 1) * ROWS_PER_FILE]
            if not self._file(number).exists():
                tensors = {}
                for example in mine:
                    ids = torch.as_tensor(example.input_ids, dtype=torch.long, device=model.device)[None]
                    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
                    if not bool(logits.isfinite().all()):
                        raise UserError(f"the teacher's logits are not finite in row {example.row}")
                    values, tokens = logits.log_softmax(-1).topk(min(kept, logits.shape[-1]))
                    tensors[f"{example.row}.tokens"] = tokens.int().cpu()
                    tensors[f"{example.row}.logprobs"] = values.cpu()
                temporary = self._file(number).with_suffix(".tmp")
                save_file(tensors, temporary)
                temporary.replace(self._file(number))
            if on_row:
                on_row(min((number + 1) * ROWS_PER_FILE, len(examples)))

    def load(self, examples: Sequence[Example]) -> None:
        """Read what was recorded about these rows into memory: 8 K bytes per token.

        Raises:
            UserError: a row is not there, or has another length: the files are of other text.
        """
        from safetensors.torch import load_file

        found: dict[str, Tensor] = {}
        for number in range(_files(examples)):
            found.update(load_file(self._file(number)))
        for example in examples:
            tokens, logprobs = (found.get(f"{example.row}.{name}") for name in ("tokens", "logprobs"))
            if tokens is None or logprobs is None or len(tokens) != len(example) - 1:
                raise UserError(
                    f"{self.folder}: what the teacher said about row {example.row} is of another text",
                    "--overwrite starts anew",
                )
            self._rows[example.row] = tokens, logprobs

    def lookup(self, rows: Sequence[int], learned: Tensor, width: int) -> tuple[Tensor, Tensor]:
        """Tokens (N, K) int64 and their log-probabilities (N, K) fp32 at the learned positions of a batch.

        Args:
            rows: the row in each line of the batch.
            learned: (N,) indices into the batch's flattened positions.
            width: positions per line.
        """
        lines, positions = learned // width, learned % width
        tokens, logprobs = [], []
        for line, row in enumerate(rows):
            at = positions[lines == line].cpu()
            tokens.append(self._rows[row][0][at])
            logprobs.append(self._rows[row][1][at])
        return torch.cat(tokens).long(), torch.cat(logprobs)


def divergence(logits: Tensor, tokens: Tensor, logprobs: Tensor) -> Tensor:
    """KL(teacher || student) of every position over the teacher's K tokens and "any other", (N,) fp32 nats.

    Args:
        logits: (N, V) of the student.
        tokens, logprobs: (N, K) of the teacher.
    """
    log_q = logits.float().log_softmax(-1).gather(-1, tokens)
    p, q = logprobs.exp(), log_q.exp()
    rest_p, rest_q = ((1 - x.sum(-1)).clamp(SMALLEST, 1) for x in (p, q))
    return (p * (logprobs - log_q)).sum(-1) + rest_p * (rest_p.log() - rest_q.log())


class DistillTrainer(Trainer):
    """The trainer with the teacher's distribution in the place of the text's tokens."""

    teacher: Teacher

    def check_loss(self, batch: dict[str, Any]) -> float:
        """Nothing to check: the logits are the model's own."""
        return 0.0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
        **_: Any,
    ) -> Any:
        total, positions = self._summed_loss(model, inputs)
        loss = (total / (positions if num_items_in_batch is None else num_items_in_batch)).float()
        return (loss, {}) if return_outputs else loss

    def _summed_loss(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, int]:
        tokens, logprobs = self.teacher.lookup(
            inputs["rows"], inputs["learned"], inputs["input_ids"].shape[1]
        )
        with self._scoring(inputs) as taken:
            names = ("input_ids", "attention_mask")
            logits = model(**{name: taken[name] for name in names}, use_cache=False).logits
        each = divergence(logits[0], tokens.to(logits.device), logprobs.to(logits.device))
        return each.double().sum(), len(each)


class DistillSession(Session):
    """A training run whose loss, in training and held out, is the divergence from a teacher."""

    trainer_class = DistillTrainer

    def __init__(self, *args: Any, teacher: Teacher, **kwargs: Any):
        self.teacher = teacher
        super().__init__(*args, **kwargs)

    def prepare(self, trainer: Trainer) -> None:
        assert isinstance(trainer, DistillTrainer)
        trainer.teacher = self.teacher


def _files(examples: Sequence[Example]) -> int:
    return -(-len(examples) // ROWS_PER_FILE)
