"""Does a text share passages with the text a decision was made on? By hashes of 13 words in a row.

What is judged on text that it was chosen on looks better than it is. A profile keeps the hashes of its
calibration text (`ngrams.npy`), so the check needs neither that text nor the model.

Thirteen words are long enough that independent texts do not share them by chance. What several rows share is
no leak but a form: the chat template and the system message (they are not part of `Document.content`), a
licence header, the fixed words of a task. So n-grams of three different rows of a domain are left out (of
more than 300 rows: of 1 % of them); a copied row is still known by what only it says. A generated answer is
left out too: the prompt decides it, and answers of one model share phrases.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from moesmith.config import no_such_file
from moesmith.errors import UserError

from .corpora import Document, Source

NGRAMS = "ngrams.npy"
N = 13  # words in a row
SHARE = 0.05  # of a document's n-grams: above it, the document is called leaked
MANY = 64  # n-grams: a copied passage of 76 words is a leak, however long the text around it
FORM_ROWS = 3  # an n-gram of so many different rows of a domain is a form ...
FORM_SHARE = 0.01  # ... and of so large a share of them, where there are more than 300
CAP = 4_000_000  # n-gram hashes kept, 32 MB: all of about 4 M words
SAMPLED_MATCHES = 3  # a sample must share so many: one match among ten sampled n-grams says little

# Hashes of n-grams are below this bit, those of whole texts above it, so one sorted array holds both.
WHOLE = np.uint64(1) << np.uint64(63)

# Scripts written without spaces: each character is a word. Thai, Lao, Tibetan, Burmese, Khmer; kana, Chinese.
_NO_SPACES = (
    "\u0e00-\u0e7f\u0e80-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff"
    "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+")


@dataclass
class Overlap:
    """What one document shares with a calibration text."""

    document: Document
    ngrams: int
    """its different n-grams (of a sampled array: those that could be found there)"""
    shared: int
    identical: bool
    """its words are those of a whole calibration text, and 13 at least: everyone says hello"""
    sampled: bool = False

    @property
    def leaks(self) -> bool:
        """Whether it is too much to be chance."""
        least = SAMPLED_MATCHES if self.sampled else 1
        enough = self.shared >= MANY or self.shared > SHARE * self.ngrams
        return self.identical or (self.shared >= least and enough)


def words(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation."""
    return _WORD.findall(text.lower())


def hash_ngrams(text: str) -> tuple[np.ndarray, int]:
    """Hashes of every 13 words in a row (sorted, unique, uint64), and the hash of the whole text.

    A text of fewer than 13 words has no n-gram.
    """
    found = words(text)
    cache = {word: hashlib.blake2b(word.encode(), digest_size=8).digest() for word in set(found)}
    values = np.frombuffer(b"".join(cache[word] for word in found), dtype=np.uint64)
    digest = hashlib.blake2b(values.tobytes() or text.encode(), digest_size=8).digest()
    whole = int.from_bytes(digest, "little") | int(WHOLE)
    count = len(values) - N + 1
    if count < 1:
        return np.zeros(0, dtype=np.uint64), whole
    total = np.zeros(count, dtype=np.uint64)
    for i in range(N):  # a polynomial over the words, modulo 2^64; the multiplier is odd, so none is lost
        total = total * np.uint64(0x9E3779B97F4A7C15) + values[i : i + count]
    return np.unique(_mix(total) & ~WHOLE), whole


def _mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's last steps: every bit of the result depends on every bit of the value."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def collect(documents: Iterable[Document | Source]) -> np.ndarray:
    """Sorted unique hashes of the calibration text: n-grams, then whole texts. (n,) uint64.

    Whole rows are better than the documents they were cut into: no n-gram is lost at a cut.

    Of more than `CAP` n-grams the `CAP` smallest hashes are kept: a sample that depends on the words alone,
    and that says how far it reaches, so that a check compares with the same part of the other text.
    """
    wholes: set[int] = set()
    by_domain: dict[str, list[np.ndarray]] = {}
    texts: dict[str, set[str]] = {}
    for document in documents:
        text = text_of(document)
        seen = texts.setdefault(document.domain, set())
        if text in seen:  # later pieces of a chat carry the whole chat's words
            continue
        seen.add(text)
        ngrams, whole = hash_ngrams(text)
        if len(ngrams):
            wholes.add(whole)
        by_domain.setdefault(document.domain, []).append(ngrams)
    kept = [_without_form(rows) for rows in by_domain.values()]
    ngrams = np.unique(np.concatenate(kept)) if kept else np.zeros(0, dtype=np.uint64)
    return np.concatenate([ngrams[:CAP], np.array(sorted(wholes), dtype=np.uint64)])


def _without_form(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Unique hashes of the rows, all different, without those that several of them share."""
    unique, counts = np.unique(np.concatenate(rows), return_counts=True)
    return unique[counts < max(FORM_ROWS, FORM_SHARE * len(rows))]


def overlaps(ngrams: np.ndarray, documents: Iterable[Document]) -> list[Overlap]:
    """What each document shares with a calibration text. `ngrams` is what `collect` returned."""
    border = int(np.searchsorted(ngrams, WHOLE))
    known, wholes = ngrams[:border], ngrams[border:]
    sampled = len(known) == CAP
    found = []
    for document in documents:
        own, whole = hash_ngrams(text_of(document))
        identical = len(own) > 0 and bool(np.isin(np.uint64(whole), wholes))
        if sampled:
            own = own[own <= known[-1]]
        shared = int(np.isin(own, known, assume_unique=True).sum())
        found.append(Overlap(document, len(own), shared, identical, sampled))
    return found


def disjoint(ngrams: np.ndarray, documents: Sequence[Document]) -> tuple[list[Document], list[Overlap]]:
    """(the documents that share nothing to speak of with the calibration text, what the others share)."""
    found = overlaps(ngrams, documents)
    return [o.document for o in found if not o.leaks], [o for o in found if o.leaks]


def check_disjoint(ngrams: np.ndarray, documents: Sequence[Document]) -> dict[str, int]:
    """Raise UserError when text to judge by shares passages with the calibration text.

    Returns:
        counts: documents compared, their n-grams, and how many are shared though no document leaks.
    """
    found = overlaps(ngrams, documents)
    leaked = [overlap for overlap in found if overlap.leaks]
    if leaked:
        worst = max(leaked, key=lambda o: (o.identical, o.shared / max(o.ngrams, 1)))
        what = (
            "is a calibration text, word for word"
            if worst.identical
            else f"shares {worst.shared:,} of its {worst.ngrams:,} runs of {N} words with calibration text"
        )
        others = len(leaked) - 1
        more = f"; so do {others} more of {len(found):,} documents" if others else ""
        raise UserError(
            f"held-out text leaks: {worst.document.domain}, document {worst.document.id} {what}{more}",
            "judge on text that was not profiled, or profile again without it",
        )
    return {
        "documents": len(found),
        "ngrams": sum(overlap.ngrams for overlap in found),
        "shared": sum(overlap.shared for overlap in found),
    }


def text_of(document: Document | Source) -> str:
    """The words of a document that are compared."""
    return document.content if document.content is not None else document.text or ""


def write(path: Path, ngrams: np.ndarray) -> None:
    """Save the hashes, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.save(file, ngrams, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def read(profile: str | Path) -> np.ndarray:
    """The hashes of a profile folder, or of a file of them. Raises UserError if there are none."""
    path = Path(profile)
    path = path / NGRAMS if path.is_dir() else path
    if not path.is_file():
        raise no_such_file(path, "profile")
    try:
        ngrams = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError):
        ngrams = np.zeros(0)
    if ngrams.dtype != np.uint64 or ngrams.ndim != 1:
        raise UserError(f"{path} holds no n-gram hashes", "profile again")
    return ngrams
