"""Multiple choice by reasoning, as GPQA is asked: questions, prompts, answers read, figures.

The protocol is the harness's `gpqa_*_cot_zeroshot` (Rein et al. 2023, lm-evaluation-harness 0.4): one user
turn with four choices that ends in "Let's think step by step: ", greedy, and a letter read from the answer.
The choices are put in an order that depends on the seed and on the question alone, so the same question is
the same prompt in any file, in any order, on any machine. GPQA itself is gated and must not be put where
models are trained; nothing of it is here.
"""

from __future__ import annotations

import csv
import hashlib
import json
import string
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesmith.errors import UserError

from .bootstrap import quantile
from .choice_audit import audit, lm_eval, same_to_lm_eval
from .choices import flexible, strict
from .interval import wilson
from .paired import paired as paired_answers
from .reasoning import Reply

MAX_NEW_TOKENS = 16_384  # the protocol's longest answer, reasoning included
REASONING_TOKENS = 8_192  # and its budget for the reasoning
LONG = 20_000  # characters from which on an answer is called long
QUESTION, CORRECT = "Question", "Correct Answer"
INCORRECT = tuple(f"Incorrect Answer {number}" for number in (1, 2, 3))
COLUMNS = (QUESTION, CORRECT, *INCORRECT)
IDS, DOMAINS = ("Record ID", "id"), ("High-level domain", "domain", "category")
NONE = "none"


@dataclass(frozen=True)
class Question:
    """One question with its choices in the order they are shown in."""

    id: str
    row: int
    question: str
    choices: list[str]
    gold: str
    """the letter of the right one"""
    domain: str = ""

    @property
    def prompt(self) -> str:
        """The protocol's user turn."""
        lines = "\n".join(
            f"({letter}) {choice}"
            for letter, choice in zip(string.ascii_uppercase, self.choices, strict=False)
        )
        return (
            f"What is the correct answer to this question:{self.question}\nChoices:\n{lines}\n"
            "Let's think step by step: "
        )


@dataclass
class Answer:
    """One question and what became of it."""

    id: str
    row: int
    domain: str
    question: str
    choices: list[str]
    gold: str
    reasoning: str
    answer: str
    finish: str
    prompt_tokens: int | None
    tokens: int | None
    """reasoning and answer together"""
    reasoning_tokens: int | None
    budget_hit: bool | None
    seconds: float
    attempts: int
    strict: str | None
    strict_rule: str
    flexible: str | None
    flexible_rule: str
    excerpt: str
    """where `flexible` was read"""
    look: list[str]
    """why a person should look at it; keys of `choice_audit.KINDS`"""
    harness_strict: str
    harness_flexible: str

    @property
    def right(self) -> bool:
        """Whether the answer, read flexibly, is the right one."""
        return self.flexible == self.gold

    @property
    def cut(self) -> str:
        """`reasoning` or `answer`: where the limit cut it; empty where it ended by itself."""
        if self.finish != "length":
            return ""
        return "answer" if self.answer else "reasoning"

    @property
    def characters(self) -> int:
        """Of reasoning and answer."""
        return len(self.reasoning) + len(self.answer)

    # What `paired` compares runs by.
    @property
    def prompt(self) -> list[str]:
        """The question as it was shown."""
        return [self.question, *self.choices]

    @property
    def expected(self) -> str:
        """The right letter."""
        return self.gold


# ---------------------------------------------------------------- questions


@dataclass
class Counts:
    """Rows of a file, and what became of them."""

    read: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    firsts: dict[str, int] = field(default_factory=dict)
    """the first row of each kind that was dropped"""

    def drop(self, why: str, row: int) -> None:
        """One more row that is no question."""
        self.dropped[why] = self.dropped.get(why, 0) + 1
        self.firsts.setdefault(why, row)

    @property
    def kept(self) -> int:
        """Questions."""
        return self.read - sum(self.dropped.values())

    def facts(self) -> dict[str, Any]:
        """For a file."""
        return {"read": self.read, "kept": self.kept, "dropped": self.dropped}


def read_questions(path: Path, seed: int = 0) -> tuple[list[Question], Counts]:
    """Questions of a JSONL, JSON or CSV file with GPQA's columns; the choices in the order of `seed`.

    Columns: `Question`, `Correct Answer`, `Incorrect Answer 1` to `3`; `Record ID` (or `id`) and `High-level
    domain` (or `domain`) are taken where they are there. Rows with an empty cell, whose right answer is also
    a wrong one, or that were there before are dropped and counted.

    Raises:
        UserError: no such columns, no question left, one id twice.
    """
    counts, found = Counts(), dict[str, Question]()
    known: set[str] = set()
    for row, cells in _rows(path):
        counts.read += 1
        if cells is None:
            counts.drop("not a JSON object", row)
            continue
        missing = [name for name in COLUMNS if name not in cells]
        if missing:
            there = ", ".join(map(str, cells)) or "none"
            raise UserError(
                f"gpqa: row {row} of {path} has no column {missing[0]!r}; it has {there}",
                f"wanted GPQA's columns: {', '.join(COLUMNS)}",
            )
        question, *texts = (
            "" if cells[name] is None else str(cells[name]) for name in COLUMNS
        )  # 0 is a text
        right, *wrong = map(clean, texts)
        key = digest(question, *sorted([right, *wrong]))
        if not question.strip() or not all((right, *wrong)):
            counts.drop("an empty cell", row)
        elif right in wrong:
            counts.drop("the right answer is also a wrong one", row)
        elif key in known:
            counts.drop("asked before", row)
        else:
            known.add(key)
            id = next((str(cells[name]) for name in IDS if cells.get(name)), key[:12])
            if id in found:
                raise UserError(f"gpqa: id {id} is twice in {path}: rows {found[id].row} and {row}")
            choices = order([right, *wrong], question, seed)
            gold = string.ascii_uppercase[choices.index(right)]
            domain = next((str(cells[name]) for name in DOMAINS if cells.get(name)), "")
            found[id] = Question(id, row, question, choices, gold, domain)
    if not found:
        said = ", ".join(f"{count:,} {why}" for why, count in counts.dropped.items()) or "it has no rows"
        raise UserError(f"gpqa: {path} has no question: {said}")
    return list(found.values()), counts


def clean(choice: str) -> str:
    """A choice as the harness's task shows it: trimmed, `[title]` marks and double blanks taken out."""
    return choice.strip().replace(" [title]", ". ").replace("  ", " ")


def order(choices: Sequence[str], question: str, seed: int) -> list[str]:
    """Choices in an order that depends on the seed, the question and the choices, and on nothing else.

    Sorted by a hash, so neither the order they come in nor Python's random numbers play a part.
    """
    return sorted(choices, key=lambda choice: digest(str(seed), question, choice))


def digest(*parts: str) -> str:
    """A hash of several texts."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(row from 1, its cells) of a file; None for what is no object."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"gpqa: {path} is no text in UTF-8", "wanted .jsonl, .json or .csv") from None
    if path.suffix.lower() in (".csv", ".tsv"):
        tab = path.suffix.lower() == ".tsv"
        with path.open(encoding="utf-8-sig", newline="") as file:
            csv.field_size_limit(10_000_000)
            for row, cells in enumerate(csv.DictReader(file, delimiter="\t" if tab else ","), 1):
                yield row, {name: cell for name, cell in cells.items() if name is not None}
        return
    if path.suffix.lower() == ".json":
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"gpqa: {path} is not JSON: {error}") from None
        for row, value in enumerate(rows if isinstance(rows, list) else [rows], 1):
            yield row, value if isinstance(value, dict) else None
        return
    for row, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                value = json.loads(line)
            except json.JSONDecodeError:
                value = None
            yield row, value if isinstance(value, dict) else None


# ---------------------------------------------------------------- judging


def judge(question: Question, reply: Reply) -> Answer:
    """One reply, read in every way."""
    tight, free = strict(reply.answer, question.choices), flexible(reply.answer, question.choices)
    theirs = lm_eval(reply.answer, question.choices)
    return Answer(
        id=question.id,
        row=question.row,
        domain=question.domain,
        question=question.question,
        choices=question.choices,
        gold=question.gold,
        **asdict(reply),
        strict=tight.letter,
        strict_rule=tight.rule,
        flexible=free.letter,
        flexible_rule=free.rule,
        excerpt=free.excerpt(reply.answer),
        look=audit(reply.answer, question.choices),
        harness_strict=theirs[0],
        harness_flexible=theirs[1],
    )


@dataclass
class GpqaEval:
    """All answers, in the order of the questions, and what they add up to."""

    records: list[Answer]
    seconds: float

    @property
    def n(self) -> int:
        """Questions asked."""
        return len(self.records)

    @property
    def right(self) -> int:
        """Right answers, read flexibly."""
        return sum(record.right for record in self.records)

    def facts(self) -> dict[str, Any]:
        """Every figure for a file.

        `strict` and `flexible` are scores with Wilson intervals; `harness` the same two as lm-eval's filters
        read them. `right` + `wrong` + `invalid` = `n`; wrong answers add up in both ways to count them.

        Raises:
            AssertionError: the sums do not hold.
        """
        wrong = [one for one in self.records if one.flexible is not None and not one.right]
        invalid = [one for one in self.records if one.flexible is None]
        expected = [one.finish for one in self.records if one.finish in ("stop", "length")]
        letters = string.ascii_uppercase[: max(len(one.choices) for one in self.records)]
        by_predicted = {letter: sum(one.flexible == letter for one in wrong) for letter in letters}
        by_gold = {letter: sum(one.gold == letter for one in wrong) for letter in letters}
        assert self.right + len(wrong) + len(invalid) == self.n, "right + wrong + invalid is not n"
        assert sum(by_predicted.values()) == sum(by_gold.values()) == len(wrong), (
            "wrong answers do not add up"
        )

        def theirs(name: str) -> int:
            return sum(same_to_lm_eval(getattr(one, f"harness_{name}"), one.gold) for one in self.records)

        return {
            "n": self.n,
            "choices": len(letters),
            "flexible": share(self.right, self.n),
            "strict": share(sum(one.strict == one.gold for one in self.records), self.n),
            "harness": {
                name: share(theirs(name), self.n) for name in ("strict", "flexible")
            },
            "right": self.right,
            "wrong": len(wrong),
            "invalid": len(invalid),
            "invalid_by_rule": dict(Counter(one.flexible_rule for one in invalid).most_common()),
            "rules": dict(Counter(one.flexible_rule for one in self.records if one.flexible).most_common()),
            "wrong_by_predicted": by_predicted,
            "wrong_by_gold": by_gold,
            "table": self.table(letters),
            "by_domain": self.by_domain(),
            "lengths": self.lengths(),
            "cut": {
                "reasoning": sum(one.cut == "reasoning" for one in self.records),
                "answer": sum(one.cut == "answer" for one in self.records),
                "budget": sum(bool(one.budget_hit) for one in self.records),
                "budget_unknown": sum(one.budget_hit is None for one in self.records),
                "other": dict(Counter(one.finish for one in self.records) - Counter(expected)),
            },
            "reasoned": sum(bool(one.reasoning) for one in self.records),
            "audit": dict(Counter(kind for one in self.records for kind in one.look).most_common()),
            "retried": sum(one.attempts > 1 for one in self.records),
            "seconds": self.seconds,
        }  # fmt: skip

    def table(self, letters: str) -> dict[str, Any]:
        """Gold (rows) against the letter read (columns, the last one: none)."""
        pairs = Counter((one.gold, one.flexible or NONE) for one in self.records)
        columns = [*letters, NONE]
        return {
            "gold": list(letters),
            "read": columns,
            "counts": [[pairs[row, column] for column in columns] for row in letters],
        }

    def by_domain(self) -> list[dict[str, Any]]:
        """name, n, right, rate, interval of each domain, in the order they appear."""
        names = [name for name in dict.fromkeys(one.domain for one in self.records) if name]
        groups = {name: [one for one in self.records if one.domain == name] for name in names}
        return [
            {"name": name, **share(sum(one.right for one in group), len(group))}
            for name, group in groups.items()
        ]

    def lengths(self) -> dict[str, Any]:
        """median, mean, p95, max and how many are long, of tokens, reasoning tokens and characters."""
        found = {
            "tokens": spread([one.tokens for one in self.records]),
            "reasoning_tokens": spread([one.reasoning_tokens for one in self.records]),
            "characters": spread([one.characters for one in self.records]),
        }
        return {**found, "long": {key: one["long"] for key, one in found.items()}}


def share(right: int, n: int) -> dict[str, Any]:
    """n, right, rate and its 95 % Wilson interval."""
    return {"n": n, "right": right, "rate": right / n, "interval": wilson(right, n)}


def spread(values: Iterable[int | None]) -> dict[str, Any]:
    """How long things are; those that nobody counted are left out and said (`unknown`)."""
    values = list(values)
    there = sorted(value for value in values if value is not None)
    found: dict[str, Any] = {
        "n": len(there),
        "unknown": len(values) - len(there),
        "long": sum(v > LONG for v in there),
    }
    if not there:
        return {**found, "median": None, "mean": None, "p95": None, "max": None}
    middle = len(there) // 2
    median = there[middle] if len(there) % 2 else (there[middle - 1] + there[middle]) / 2
    return {
        **found,
        "median": median,
        "mean": sum(there) / len(there),
        "p95": quantile(there, 0.95),
        "max": there[-1],
    }


# ---------------------------------------------------------------- two runs


def paired(a: GpqaEval, b: GpqaEval) -> dict[str, Any]:
    """How b's answers differ from a's, question by question; keys as `eval.paired.paired`.

    Raises:
        UserError: other questions, or other orders of their choices.
    """
    same_questions(a.records, b.records)
    return paired_answers(a, b)  # type: ignore[arg-type]  # it reads id, prompt, expected and right


def same_questions(a: Sequence[Answer], b: Sequence[Answer | Question]) -> None:
    """Raise UserError unless both hold the same questions with their choices in the same order."""
    first, second = ({one.id: one for one in some} for some in (a, b))
    if first.keys() != second.keys():
        only = [sorted(first.keys() - second.keys()), sorted(second.keys() - first.keys())]
        raise UserError(
            f"against: other questions: {len(only[0]):,} only there, {len(only[1]):,} only here (such as "
            f"{(only[0] or only[1])[0]})",
            "compare runs with the same --gpqa file and --limit",
        )
    for id, one in first.items():
        other = second[id]
        if one.question != other.question or sorted(one.choices) != sorted(other.choices):
            raise UserError(
                f"against: question {id} is another one there", "the file has changed: run both again"
            )
        if one.choices != other.choices:
            raise UserError(
                "against: the choices were in another order there", "compare runs with the same --seed"
            )


def from_rows(rows: Iterable[Mapping[str, Any]], seconds: float) -> GpqaEval:
    """Back from a file's rows."""
    return GpqaEval([Answer(**row) for row in rows], seconds)
