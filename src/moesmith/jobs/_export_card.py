"""The model card of an export: what the records say, as Markdown."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moesmith.jobs._export import Source


def card_text(folder: Path, source: Source, record: dict[str, Any] | None) -> str:
    """README.md of what was exported to `folder`; with `record` None, of the source itself."""
    from moesmith.export.card import collect, model_card

    adapter = source.adapters[0] if source.adapters else None
    return model_card(collect(source.folder, adapter, record))
