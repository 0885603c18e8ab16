"""The report: facts in, one self-contained page (and a picture, and the facts as JSON) out.

Knows no model and no tensor. `page.py` puts the page together from `sections.py` (pictures and what they
say), `build.py` (the same of a built model), `tools.py`, `pairs.py` and `loop.py` (of tool calls, preference
pairs and rounds), `transfers.py` (of experts that are fetched) and `tables.py`; `charts.py` and its like
draw; `poster.py` makes the PNG; `values.py` writes numbers; `markup.py` escapes. docs/report.md names every
fact.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from .values import clean

__all__ = ["write_report"]


def write_report(folder: Path, facts: dict[str, Any]) -> Path:
    """Write report.json, report.html and report.png into `folder` (made if missing); return the page's path.

    Every section of `facts` is optional. Each file is written under a temporary name and renamed, the JSON
    first: a kill leaves whole files only.
    """
    from . import page, poster  # matplotlib takes a second; who only names the function does not wait

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = clean(facts)
    text = json.dumps(facts, indent=1, ensure_ascii=False, allow_nan=False)
    _write(folder / "report.json", (text + "\n").encode())
    _write(folder / "report.html", page.page(facts).encode())
    _write(folder / "report.png", poster.png(facts))
    return folder / "report.html"


def _write(path: Path, content: bytes) -> None:
    """`content` under `path`, whole or not at all."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's files are for the owner alone
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
