"""Checkable tasks from reasoning-gym as chat rows: questions with one right answer and a program that
knows it.

Training and held-out questions never share a problem: where the generator says which expression a question
asks for, "What is 3 + 4?" and "Solve 3 + 4." count as the same one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from moesmith.errors import UserError

# The generator of each part starts here, far apart: reasoning-gym draws item i from seed + i.
SEED_STEP = 10_000_000


@dataclass(frozen=True)
class Task:
    """A reasoning-gym dataset with its options."""

    dataset: str
    """name in reasoning-gym, for example basic_arithmetic"""
    options: dict[str, Any] = field(default_factory=dict)
    """of its generator: how many terms, digits..."""


@dataclass(frozen=True)
class Question:
    """One problem, as the generator gives it."""

    question: str
    answer: str
    metadata: dict[str, Any]

    @property
    def problem(self) -> str:
        """Equal for questions that ask for the same thing in other words."""
        return str(self.metadata.get("expression", self.question))


def draw(task: Task, count: int, seed: int, exclude: Collection[str] = ()) -> list[Question]:
    """`count` questions about different problems, none of them in `exclude` (see `Question.problem`).

    Raises:
        UserError: reasoning-gym is missing or does not know the task, or the task has too few problems.
    """
    taken = set(exclude)
    found: list[Question] = []
    limit = 20 * count + 1000
    for question in _generate(task, limit, seed):
        if question.problem in taken:
            continue
        taken.add(question.problem)
        found.append(question)
        if len(found) == count:
            return found
    raise UserError(
        f"{task.dataset}: {limit:,} draws gave {len(found):,} different problems, wanted {count:,}",
        "ask for fewer, or give the task more room (more terms or digits)",
    )


def split(task: Task, train: int, held_out: int, seed: int = 0) -> tuple[list[Question], list[Question]]:
    """Questions to train on and questions to judge by, without a problem in common."""
    judge = draw(task, held_out, SEED_STEP * (2 * seed + 1))
    exclude = {question.problem for question in judge}
    return draw(task, train, SEED_STEP * (2 * seed + 2), exclude), judge


def rows(questions: list[Question], turns: int = 1) -> list[dict[str, Any]]:
    """Chat rows with `turns` questions and answers each; the last row takes what is left.

    Several turns share the system message, so more of what is computed is learned from.
    """
    return [_row(questions[start : start + turns]) for start in range(0, len(questions), turns)]


def _row(questions: list[Question]) -> dict[str, Any]:
    messages = []
    for question in questions:
        messages.append({"role": "user", "content": question.question})
        messages.append({"role": "assistant", "content": question.answer})
    # As text: metadata of two questions need not have the same fields, and columns must.
    metadata = [json.dumps(question.metadata, sort_keys=True) for question in questions]
    return {"messages": messages, "metadata": metadata}


def verifier(task: Task) -> Callable[[dict[str, Any], str], float]:
    """A function (row of one turn, answer) -> score by reasoning-gym's own check; 1 is right."""
    dataset = _dataset(task, 1, 0)

    def score(row: dict[str, Any], answer: str) -> float:
        question, gold = (message["content"] for message in row["messages"][-2:])
        entry = {"question": question, "answer": gold, "metadata": json.loads(row["metadata"][-1])}
        return float(dataset.score_answer(answer, entry))

    return score


def _generate(task: Task, count: int, seed: int) -> Iterator[Question]:
    dataset = _dataset(task, count, seed)
    for i in range(count):
        item = dataset[i]
        yield Question(item["question"], str(item["answer"]), item["metadata"])


def _dataset(task: Task, size: int, seed: int) -> Any:
    try:
        import reasoning_gym
    except ImportError:
        raise UserError("tasks come from reasoning-gym", "pip install reasoning-gym==0.1.25") from None
    try:
        return reasoning_gym.create_dataset(task.dataset, size=size, seed=seed, **task.options)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"task {task.dataset} {task.options}: {error}") from None
