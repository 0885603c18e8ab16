"""Text that every machine has, for calibrating and judging a language model where no dataset is at hand.

Four kinds: a public-domain story (Jules Verne, shipped with reasoning-gym), the Python language reference and
the source of some modules (both with Python itself), and solved exercises in the model's chat template.
Nothing is downloaded. The text for judging comes from other chapters, topics, modules and exercises.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .tasks import Task, draw, rows

KINDS = ("prose", "reference", "code", "tasks")

STORY, STORY_START, STORY_END = "in_the_year_2889.txt", "Little though they seem", "*** END OF"
MODULES = ("statistics", "textwrap", "fractions", "heapq"), ("calendar", "shlex", "csv", "bisect")
EXERCISES = (
    "gcd", "lcm", "leg_counting", "letter_counting", "number_filtering", "simple_equations", "spell_backward",
    "time_intervals", "word_sorting",
)  # fmt: skip


def texts(tokenizer: Any, held_out: bool) -> dict[str, str]:
    """Kind -> text. With `held_out`, from sources that the other half does not share."""
    half = int(held_out)
    return {
        "prose": _story(half),
        "reference": _reference(half),
        "code": "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in MODULES[half]),
        "tasks": _exercises(tokenizer, half),
    }


def sequences(tokenizer: Any, texts: dict[str, str], per_kind: int, length: int) -> Tensor:
    """Token ids (per_kind * kinds, length), the kinds in turn, so that any run of rows holds all of them.

    Each text is cut at its start, without special tokens between documents.

    Raises:
        ValueError: a text is too short for this tokenizer.
    """
    columns = []
    for kind, text in texts.items():
        ids: Sequence[int] = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) < per_kind * length:
            raise ValueError(f"{kind}: {len(ids)} tokens, wanted {per_kind} x {length}")
        columns.append(torch.tensor(ids[: per_kind * length]).view(per_kind, length))
    return torch.stack(columns, dim=1).flatten(0, 1)


def _story(half: int) -> str:
    from reasoning_gym.data import read_data_file

    text = read_data_file(STORY)
    text = text[text.index(STORY_START) : text.index(STORY_END)]
    middle = text.index("\n\n", len(text) // 2)
    return text[middle:] if half else text[:middle]


def _reference(half: int) -> str:
    """Every other topic of Python's own help, longest first, the start of each."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    names = sorted(topics, key=lambda name: (-len(topics[name]), name))
    return "\n\n".join(topics[name][:3000] for name in names[half:40:2])


def _exercises(tokenizer: Any, half: int) -> str:
    per_task = 12
    drawn = [rows(draw(Task(name), per_task, seed=777 + 5000 * half)) for name in EXERCISES]
    mixed = [row["messages"] for group in zip(*drawn, strict=True) for row in group]
    if tokenizer.chat_template is None:
        return "\n\n".join("\n".join(message["content"] for message in messages) for messages in mixed)
    return "".join(tokenizer.apply_chat_template(messages, tokenize=False) for messages in mixed)
