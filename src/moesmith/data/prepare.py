"""From a dataset to counted examples: read, convert, mask, cut, hold some out.

Every row is either kept or counted under the reason it was dropped for.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from moesmith.config import no_such_file
from moesmith.errors import UserError

from .chat import UnmarkableTurn, cannot_mark
from .columns import COLUMNS, RowError, TrainOn, conversation
from .masks import Example, fit, tokenize
from .rows import Row, read_rows
from .settings import DataConfig


@dataclass
class Counts:
    """Where the rows of one dataset went: read = kept + dropped."""

    read: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)
    """reason -> the first row dropped for it, and what was wrong"""
    truncated: int = 0
    duplicates: int = 0
    """kept rows that teach exactly what an earlier one does"""
    tokens: int = 0
    learned: int = 0
    longest: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """kept rows by the columns they came from"""

    def facts(self) -> dict[str, object]:
        """The same for a program."""
        return {**vars(self), "dropped": dict(self.dropped), "kinds": dict(self.kinds)}

    def drop(self, reason: str, row: int, detail: str) -> None:
        """Count a dropped row."""
        self.dropped[reason] += 1
        self.first.setdefault(reason, f"row {row}{': ' + detail if detail else ''}")


@dataclass
class Prepared:
    """Examples to train on, examples held out, and the counts of both sources."""

    train: list[Example]
    held_out: list[Example]
    counts: Counts
    eval_counts: Counts | None = None
    """counts of eval_path or eval_split; None when the held-out rows were taken from the training rows"""


def fingerprint(*parts: Iterable[Example]) -> str:
    """A digest of every token and label in order: a resumed run must see the same rows."""
    digest = hashlib.sha256()
    for part in parts:
        for example in part:
            digest.update(hashlib.sha256(example.identity).digest())
        digest.update(b"end")
    return digest.hexdigest()[:32]


def prepare(tokenizer: PreTrainedTokenizerBase, cfg: DataConfig, seed: int = 0) -> Prepared:
    """Read the dataset of `cfg` and make it ready. `seed` chooses the rows that are held out.

    Raises:
        UserError: no such data, no row kept, or a chat template that cannot mark the learned turns.
    """
    use_template(tokenizer, cfg)
    rows = read_rows(cfg.path, cfg.split, cfg.subset)
    examples, counts = to_examples(rows, tokenizer, cfg)
    if cfg.eval_path is None and cfg.eval_split is None:
        train, held_out = hold_out(examples, cfg.eval_fraction, seed)
        return Prepared(train, held_out, counts)
    source = cfg.eval_path or cfg.path
    rows = read_rows(source, cfg.eval_split or cfg.split, cfg.subset, key="data.eval_path")
    held_out, eval_counts = to_examples(rows, tokenizer, cfg, what=source)
    return Prepared(examples, not_in(held_out, examples, eval_counts), counts, eval_counts)


def use_template(tokenizer: PreTrainedTokenizerBase, cfg: DataConfig) -> None:
    """Give the tokenizer the chat template of `cfg`, so that it is saved with the adapter.

    Raises:
        UserError: the file is not there, or the rows need a template and there is none.
    """
    if cfg.chat_template is not None:
        path = Path(cfg.chat_template).expanduser()
        if not path.is_file():
            raise no_such_file(path, "data.chat_template")
        tokenizer.chat_template = path.read_text(encoding="utf-8")
    if tokenizer.chat_template is None and cfg.format != "text" and cfg.apply_template:
        raise UserError(
            "the model has no chat template",
            "data.chat_template: a Jinja file; or prompt and completion rows with data.apply_template=false",
        )


def to_examples(
    rows: Iterable[Row], tokenizer: PreTrainedTokenizerBase, cfg: DataConfig, what: str | None = None
) -> tuple[list[Example], Counts]:
    """Examples of the rows that can be learned from, and the counts of all of them.

    Raises:
        UserError: no row is kept, or the chat template cannot mark the learned turns.
    """
    counts, examples = Counts(), []
    seen: set[bytes] = set()
    columns: list[str] = []
    for row in rows:
        if cfg.max_rows is not None and counts.read == cfg.max_rows:
            break
        counts.read += 1
        columns = columns or list(row.value)
        try:
            example, cut, kind = _example(row, tokenizer, cfg)
        except RowError as error:
            counts.drop(error.reason, row.number, error.detail)
            continue
        except UnmarkableTurn as error:
            raise cannot_mark(error, row.number, cfg.train_on) from None
        examples.append(example)
        key = hashlib.blake2b(example.identity, digest_size=16).digest()
        counts.duplicates += key in seen
        seen.add(key)
        counts.truncated += cut
        counts.kinds[kind] += 1
        counts.tokens += len(example)
        counts.learned += example.learned
        counts.longest = max(counts.longest, len(example))
    counts.kept = len(examples)
    if not examples:
        raise _nothing_kept(counts, what or cfg.path, columns)
    return examples, counts


def _example(row: Row, tokenizer: PreTrainedTokenizerBase, cfg: DataConfig) -> tuple[Example, bool, str]:
    if row.problem:
        raise RowError(row.problem, row.detail)
    talk = conversation(row.value, cfg.format, cfg.train_on, cfg.apply_template)
    talk.template_kwargs = {**cfg.template_kwargs, **talk.template_kwargs}
    example, cut = fit(tokenize(tokenizer, talk, row.number), cfg.max_length, cfg.too_long)
    return example, cut, talk.kind


def _nothing_kept(counts: Counts, source: str, columns: list[str]) -> UserError:
    if not counts.read:
        return UserError(f"{source} has no rows")
    reasons = [f"{n:,} {reason} ({counts.first[reason]})" for reason, n in counts.dropped.most_common()]
    hint = None
    if "columns missing" in counts.dropped:
        hint = f"columns there: {', '.join(columns[:10])}; known: {COLUMNS}"
        if "text" in columns:
            hint += "\ndata.format=text learns every token of the text column"
    elif "too long" in counts.dropped:
        hint = "raise data.max_length, or cut with data.too_long=truncate"
    return UserError(
        f"{source}: none of {counts.read:,} rows can be learned from: {'; '.join(reasons)}", hint
    )


def hold_out(examples: list[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """Split off a share of the examples, at least one. Examples with the same prompt stay on the same side.

    Returns:
        train, held out, both in the order of the input.
    """
    if not fraction:
        return examples, []
    prompts: dict[bytes, list[int]] = {}
    for i, example in enumerate(examples):
        prompts.setdefault(hashlib.blake2b(example.prompt, digest_size=16).digest(), []).append(i)
    groups = list(prompts.values())
    wanted = max(1, round(fraction * len(examples)))
    if len(groups) < 2:
        raise UserError(
            f"data.eval_fraction={fraction}: every row has the same prompt, so none can be held out",
            "data.eval_fraction=0 trains without a held-out split; data.eval_path names one",
        )
    random.Random(seed).shuffle(groups)
    chosen: set[int] = set()
    for group in groups:
        # A prompt with many rows may be more than was asked for: take the next one.
        if len(chosen) + len(group) <= wanted or (not chosen and group is groups[-1]):
            chosen.update(group)
        if len(chosen) >= wanted:
            break
    if not chosen:
        smallest: list[int] = min(groups, key=len)
        chosen.update(smallest)
    train = [e for i, e in enumerate(examples) if i not in chosen]
    return train, [e for i, e in enumerate(examples) if i in chosen]


def not_in(held_out: list[Example], train: list[Example], counts: Counts) -> list[Example]:
    """Held-out examples that are not also trained on; the others are counted.

    Raises:
        UserError: all of them are.
    """
    trained = {hashlib.blake2b(example.identity, digest_size=16).digest() for example in train}
    kept = []
    for example in held_out:
        if hashlib.blake2b(example.identity, digest_size=16).digest() in trained:
            counts.drop("also trained on", example.row, "")
            counts.tokens -= len(example)
            counts.learned -= example.learned
        else:
            kept.append(example)
    counts.kept = len(kept)
    if not kept:
        raise UserError("every held-out row is also a training row", "data.eval_path must name other rows")
    return kept


def describe(prepared: Prepared, train_on: TrainOn) -> Iterator[str]:
    """The counts as lines for the terminal."""
    counts = prepared.counts
    yield _sum(counts)
    what = {"messages": LEARNED[train_on], "text": "every token"}
    learned = " and ".join(
        dict.fromkeys(what.get(kind, "completions") for kind, _ in counts.kinds.most_common())
    )
    line = f"{_short(counts.tokens)} tokens, {_short(counts.learned)} trained ({learned})"
    if prepared.held_out and prepared.eval_counts is None:
        share = 100 * len(prepared.held_out) / counts.kept
        line += f" · {_rows(len(prepared.held_out))} held out ({share:.{0 if share >= 1 else 1}f} %)"
    yield line
    if counts.truncated:
        yield f"{_rows(counts.truncated)} cut to {counts.longest:,} tokens (their end)"
    if counts.duplicates:
        yield f"{_rows(counts.duplicates)} exact copies of an earlier one, kept"
    if prepared.eval_counts is not None:
        yield f"held out: {_sum(prepared.eval_counts)}"


def _sum(counts: Counts) -> str:
    line = f"{_rows(counts.read)} → {counts.kept:,} kept"
    if counts.dropped:
        parts = []
        for reason, n in counts.dropped.most_common():
            where = f" (first: {counts.first[reason].split(':')[0]})" if reason in SHOW_FIRST else ""
            parts.append(f"{n:,} {reason}{where}")
        line += " · dropped: " + ", ".join(parts)
    return line


LEARNED = {"last_assistant": "last assistant turn", "all_assistant": "all assistant turns"}

# Reasons that point at something to repair, so the first row is named.
SHOW_FIRST = ("not JSON", "not an object", "bad roles", "template failed", "not text", "columns missing")


def _rows(n: int) -> str:
    return f"{n:,} row{'' if n == 1 else 's'}"


def _short(n: int) -> str:
    return f"{n / 1e6:.2f} M" if n >= 1e6 else f"{n / 1e3:.0f} k" if n >= 10_000 else f"{n:,}"
