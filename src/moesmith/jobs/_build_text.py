"""The text a build is fitted to and judged on: each expert's corpus, or its prompts; for a split, any text.

Labels are indices into the experts of the recipe, -1 for text of no expert's domain.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.build.capture import Text
    from moesmith.build.recipe import Expert, Recipe
    from moesmith.data.corpora import Counts, Document, Source
    from moesmith.data.rows import Row

LEAST_DOCUMENTS = 8  # of a domain to judge on, even where their tokens are more than was asked for
COPY = "copy of an earlier row"  # as the corpora count it
NAMES = 4  # of experts in one line
MIN_HELD_OUT = 8  # tokens of a document that is worth judging on


@dataclass
class Texts:
    """Documents, in the order in which every step sees them: those to fit on first."""

    documents: list[Document]
    fit: int
    """how many of them are fitted on"""
    labels: list[int]
    held_out: bool
    """whether there are others; if not, figures are on the fitted text"""
    counts: dict[str, Counts]
    negatives: list[list[list[int]]]
    """token ids of every expert's negative prompts"""
    origin: str
    notes: list[str] = field(default_factory=list)
    """what a reader of the figures should know"""

    def all(self) -> list[Text]:
        """Every document as the capture takes it."""
        from moesmith.build.capture import Text

        return [
            Text(ids=d.ids, label=label, fit=n < self.fit, id=d.id, domain=d.domain)
            for n, (d, label) in enumerate(zip(self.documents, self.labels, strict=True))
        ]

    def to_judge(self, tokens: int) -> list[tuple[int, Document]]:
        """(place, document) of the held-out text, or of all: of every domain its share of about `tokens`.

        At least LEAST_DOCUMENTS of each, where there are: fewer make no interval to speak of.
        """
        start = self.fit if self.held_out else 0
        domains: dict[str, list[tuple[int, Document]]] = {}
        for n, document in enumerate(self.documents[start:], start):
            if len(document.ids) > 1:
                domains.setdefault(document.domain, []).append((n, document))
        chosen: list[tuple[int, Document]] = []
        for mine in domains.values() if tokens else ():
            taken = 0
            for number, (n, document) in enumerate(mine):
                if number >= LEAST_DOCUMENTS and taken >= tokens / len(domains):
                    break
                chosen.append((n, document))
                taken += len(document.ids)
        return chosen


def check_there(recipe: Recipe) -> None:
    """Raise UserError for a corpus that is neither here nor a hub name, or that two experts share."""
    from moesmith.data import corpora

    owner: dict[Path, str] = {}
    for expert in recipe.experts:
        name = str(expert.name)
        for path in expert.corpus:
            corpora.check_there({name: path})
            place = Path(path).expanduser().resolve()  # a hub name becomes a path like any other
            if owner.get(place, name) != name:
                raise UserError(
                    f"{owner[place]} and {name} have the same corpus: {path}",
                    "text tells experts apart only where it is another for each",
                )
            owner[place] = name


def read_texts(recipe: Recipe, tokenizer: Any, max_length: int, tokens: int, held_out: float) -> Texts:
    """Render, tokenise, hold out, and leave out what is held out but shares passages with the rest.

    Raises:
        UserError: a corpus that is not there or has no usable row, too little text.
    """
    if recipe.init == "split" and not recipe.experts[0].corpus:
        return _any_text(tokenizer, max_length, tokens, held_out)
    return _texts_of(recipe, tokenizer, max_length, tokens, held_out)


def _texts_of(recipe: Recipe, tokenizer: Any, max_length: int, tokens: int, held_out: float) -> Texts:
    from moesmith.data.corpora import Reader, check_enough, hold_out

    reader = Reader(tokenizer, max_length)
    sources: list[Source] = []
    counts: dict[str, Counts] = {}
    for expert in recipe.experts:
        rows = list(_rows(expert, max_length)) if not expert.corpus else _rows(expert, max_length)
        if not expert.corpus and not rows:
            continue
        reader.tokens = tokens if expert.corpus else None  # every prompt is used
        found, counts[str(expert.name)] = reader.read(str(expert.name), rows)
        sources += found
    corpora = [str(expert.name) for expert in recipe.experts if expert.corpus]
    whole = len(corpora) == len(recipe.experts)
    notes = [
        f"{count.dropped[COPY]:,} of {count.read:,} rows of {name} are copies of earlier ones: experts with "
        "the same text cannot be told apart"
        for name, count in counts.items()
        if 2 * count.dropped[COPY] >= count.read
    ]
    if whole and held_out:
        hold_out(sources, held_out)
    elif counts:
        bare = [name for name in counts if name not in corpora]
        why = f"{some(bare)} ha{'s' if len(bare) == 1 else 've'} prompts only" if bare else "--held-out 0"
        notes.append(
            f"nothing is held out ({why}): every figure is on the text that the routers were fitted to"
        )
    used, unseen, alike = _two_sides(sources, tokenizer, max_length)
    if alike:
        notes.append(f"{alike:,} held-out documents share passages with the fitted ones and are left out")
    if whole and held_out:
        unjudged = [name for name in corpora if all(d.domain != name for d in unseen)]
        if unjudged:
            notes.append(f"no text of {some(unjudged)} is left to judge on: more rows are wanted")
    check_enough(used, corpora)
    label = {str(expert.name): n for n, expert in enumerate(recipe.experts)}
    if recipe.init == "split":
        label = dict.fromkeys(label, -1)
    documents = [*used, *unseen]
    origin = ", ".join(f"{e.name}: {' '.join(e.corpus) or 'its prompts'}" for e in recipe.experts)
    return Texts(
        documents,
        len(used),
        [label[document.domain] for document in documents],
        bool(unseen),
        counts,
        [[reader.plain_ids(prompt) for prompt in expert.negative_prompts] for expert in recipe.experts],
        origin,
        notes,
    )


def some(names: Sequence[str]) -> str:
    """All names, or the first of many and how many more there are."""
    more = len(names) - NAMES
    return ", ".join(names) if more < 2 else f"{', '.join(names[:NAMES])} and {more} others"


def _two_sides(
    sources: Sequence[Source], tokenizer: Any, max_length: int
) -> tuple[list[Document], list[Document], int]:
    """(to fit, held out, held-out documents that share passages with those to fit and are in neither)."""
    from moesmith.data import leaks
    from moesmith.data.corpora import cut

    sides: tuple[list[Document], list[Document]] = [], []
    for source in sources:
        sides[source.held_out].extend(cut(source, max_length, tokenizer))
    if not sides[1]:
        return *sides, 0
    ngrams = leaks.collect(source for source in sources if not source.held_out)
    apart, alike = leaks.disjoint(ngrams, sides[1])
    apart = [document for document in apart if len(document.ids) >= MIN_HELD_OUT]
    return sides[0], apart, len(alike)


def _rows(expert: Expert, max_length: int) -> Iterator[Row]:
    """The rows of an expert's corpora, numbered through; its prompts as plain text without one."""
    from moesmith.data.corpora import read_corpus
    from moesmith.data.rows import Row

    if not expert.corpus:
        yield from (Row(n, {"text": prompt}) for n, prompt in enumerate(expert.positive_prompts, 1))
        return
    rows = itertools.chain.from_iterable(read_corpus(path, max_length) for path in expert.corpus)
    for number, row in enumerate(rows, 1):
        yield row if len(expert.corpus) == 1 else Row(number, row.value, row.problem, row.detail)


def _any_text(tokenizer: Any, max_length: int, tokens: int, held_out: float) -> Texts:
    """Text that every machine has: one half to fit on, the other half, of other works, held out.

    Raises:
        UserError: reasoning-gym is not installed.
    """
    from moesmith.data.calibration import texts

    try:
        halves = [texts(tokenizer, held_out=half) for half in (False, True)]
    except ImportError:
        raise UserError(
            "no text to split by: without a corpus it comes from reasoning-gym, which is not installed",
            "one entry under experts with a corpus, or pip install reasoning-gym",
        ) from None
    shares = (1 - held_out, held_out)
    sides = [
        _pieces(half, tokenizer, max_length, round(share * tokens))
        for half, share in zip(halves, shares, strict=True)
    ]
    documents = [*sides[0], *sides[1]]
    notes = [] if sides[1] else ["nothing is held out (--held-out 0): every figure is on the fitted text"]
    return Texts(
        documents, len(sides[0]), [-1] * len(documents), bool(sides[1]), {}, [], "shipped text", notes
    )


def _pieces(by_kind: dict[str, str], tokenizer: Any, max_length: int, tokens: int) -> list[Document]:
    """Documents of whole paragraphs, kinds in turn, about `tokens` tokens."""
    from moesmith.data.corpora import CHARACTERS_PER_TOKEN, Document, opening_ids, paragraphs
    from moesmith.jobs._cut import in_turn

    found = []
    for kind, text in by_kind.items():
        for number, piece in enumerate(paragraphs(text, CHARACTERS_PER_TOKEN * max_length), 1):
            ids = tokenizer(piece, add_special_tokens=False).input_ids
            ids = [*opening_ids(tokenizer), *ids][:max_length]
            found.append(Document(f"{kind}/{number}", kind, piece, ids))
    return in_turn(found, tokens) if tokens else []


def say_texts(texts: Texts) -> None:
    """What was read, expert by expert, and what is held out."""
    from moesmith.data.corpora import describe

    lines = list(describe(texts.counts, console.count))
    fit, unseen = texts.documents[: texts.fit], texts.documents[texts.fit :]
    counted = [
        f"{len(side):,} document{'' if len(side) == 1 else 's'}, {sum(len(d.ids) for d in side):,} tokens"
        for side in (fit, unseen)
    ]
    if texts.documents:
        lines.append(f"to fit: {counted[0]}" + (f" · held out: {counted[1]}" if unseen else ""))
    for n, line in enumerate(lines):
        console.row("" if n else "text", line)
    for note in texts.notes:
        console.warn(note)
