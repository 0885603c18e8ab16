"""Which documents are pieces of one row of text: `domain/7`, `domain/7.2`, `domain/7.3` (`corpora.cut`).

Pieces of one row resemble each other like the tokens of one document: intervals and halves take rows whole.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_PIECE = re.compile(r"(/\d+)\.\d+$")


def row_of(document_id: str) -> str:
    """The row that a document is a piece of: `code/7.3` -> `code/7`; any other name stays as it is."""
    return _PIECE.sub(r"\1", document_id)


def row_numbers(ids: Iterable[str]) -> list[int]:
    """Per document the number of its row, 0, 1, ... in order of appearance; one without a name is its own."""
    seen: dict[object, int] = {}
    return [seen.setdefault(row_of(name) if name else (place,), len(seen)) for place, name in enumerate(ids)]
