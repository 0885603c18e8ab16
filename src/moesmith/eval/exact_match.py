"""Ask a model questions that have one right answer, and count how many it answers exactly.

Greedy decoding, batched with left padding. Every question, answer and score is kept: read them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moesmith.errors import UserError

from .greedy import continuations
from .interval import wilson

Score = Callable[[dict[str, Any], str], float]


@dataclass
class Answered:
    """One question and what became of it."""

    question: str
    gold: str
    answer: str
    score: float
    """by the task's verifier; 1 is right"""
    mentions: bool
    """the gold answer stands somewhere in the answer as a word of its own"""
    cut: bool
    """the answer was still going at max_new_tokens"""

    @property
    def exact(self) -> bool:
        """Whether the verifier takes the whole answer as right."""
        return self.score >= 1


@dataclass
class ExactMatch:
    """Counts over all questions, and the questions."""

    records: list[Answered]
    seconds: float

    @property
    def n(self) -> int:
        """Questions asked."""
        return len(self.records)

    @property
    def correct(self) -> int:
        """Answers that are exactly right."""
        return sum(record.exact for record in self.records)

    @property
    def mentioned(self) -> int:
        """Answers that contain the right one, exact ones included: right in substance, not in form."""
        return sum(record.mentions or record.exact for record in self.records)

    @property
    def rate(self) -> float:
        """Share of exact answers."""
        return self.correct / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the rate."""
        return wilson(self.correct, self.n)

    def facts(self) -> dict[str, Any]:
        """Everything for a file."""
        return {
            "n": self.n,
            "correct": self.correct,
            "rate": self.rate,
            "interval_95": self.interval,
            "mentioned": self.mentioned,
            "seconds": self.seconds,
            "records": [asdict(record) for record in self.records],
        }

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> ExactMatch:
        """Back from `facts`."""
        return cls([Answered(**record) for record in facts["records"]], facts["seconds"])


@torch.inference_mode()
def evaluate_exact_match(
    model: Any,
    tokenizer: Any,
    rows: Sequence[dict[str, Any]],
    score: Score,
    batch_size: int = 32,
    max_new_tokens: int = 32,
    on_batch: Callable[[int], None] | None = None,
) -> ExactMatch:
    """Answer every row's last user turn and score it against the assistant turn that follows.

    Args:
        model: anything with `generate`, with or without an adapter.
        rows: chat rows: `messages` ending in an assistant turn, which is the gold answer.
        score: (row, answer) -> 0..1, see `moesmith.data.tasks.verifier`.
        on_batch: called with the number of rows done after each batch.

    Raises:
        UserError: no rows, a row that does not end in an assistant turn, or no chat template.
    """
    prompts = [_prompt(tokenizer, row, number) for number, row in enumerate(rows)]
    if not prompts:
        raise UserError("no rows to evaluate on")
    was_training = model.training
    model.eval()
    # Longest first, so that padding is small and running out of memory happens at once.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    answers: dict[int, tuple[str, bool]] = {}
    started = time.perf_counter()
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        generated = generate(model, tokenizer, [prompts[i] for i in batch], max_new_tokens)
        answers |= dict(zip(batch, generated, strict=True))
        if on_batch:
            on_batch(len(answers))
    seconds = time.perf_counter() - started
    model.train(was_training)
    records = []
    for i, row in enumerate(rows):
        answer, cut = answers[i]
        gold = row["messages"][-1]["content"]
        question = row["messages"][-2]["content"]
        found = re.search(rf"(?<![\w.-]){re.escape(gold)}(?![\w]|\.\d)", answer) is not None
        records.append(Answered(question, gold, answer, score(row, answer), found, cut))
    return ExactMatch(records, seconds)


def generate(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> list[tuple[str, bool]]:
    """Greedy continuations of token ids as text without special tokens, and whether each was cut."""
    said = continuations(model, tokenizer, prompts, max_new_tokens)
    return [(tokenizer.decode(ids, skip_special_tokens=True).strip(), not ended) for ids, ended in said]


def chat_prompt(tokenizer: Any, messages: Sequence[dict[str, Any]]) -> list[int]:
    """Token ids of a conversation with the opening of the next answer.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError("the model has no chat template", "its questions cannot be asked without one")
    encoded = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _prompt(tokenizer: Any, row: dict[str, Any], number: int) -> list[int]:
    messages = row["messages"]
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise UserError(f"row {number}: wanted messages that end in the gold answer, an assistant turn")
    return chat_prompt(tokenizer, messages[:-1])
