"""Read training rows from a JSONL, JSON or Parquet file, a folder of them, a saved dataset, or a hub name.

A row that cannot be read is yielded with its problem instead of being skipped, so that whoever counts can
count it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moesmith.config import no_such_file
from moesmith.errors import UserError

SUFFIXES = (".jsonl", ".ndjson", ".json", ".parquet")
KINDS = "a .jsonl, .json or .parquet file, a folder of them, a saved dataset, or a hub name (org/name)"


@dataclass
class Row:
    """One row as it was found: `number` counts from 1 (the line number in a JSONL file)."""

    number: int
    value: dict[str, Any]
    problem: str | None = None
    detail: str = ""


def read_rows(
    path: str, split: str = "train", subset: str | None = None, key: str = "data.path"
) -> Iterator[Row]:
    """Rows of a dataset, in order.

    Args:
        path: a file, a folder, or a hub name; a name that exists on disk is taken from disk.
        split: which split of a folder, a saved dataset or a hub dataset.
        subset: the hub dataset's configuration name.
        key: the option the path came from, for messages.

    Raises:
        UserError: nothing there, or nothing in it that can be read.
    """
    found = Path(path).expanduser()
    if found.is_file():
        yield from _read_file(found)
    elif found.is_dir():
        yield from _read_folder(found, split, key)
    elif found.suffix in SUFFIXES or path.count("/") != 1 or path.startswith((".", "~", "/")):
        error = no_such_file(found, key)
        raise UserError(error.message, error.hint or f"{key} takes {KINDS}")
    else:
        yield from _read_hub(path, split, subset, key)


def _read_file(path: Path) -> Iterator[Row]:
    if path.suffix in (".jsonl", ".ndjson"):
        yield from _read_jsonl(path)
    elif path.suffix == ".json":
        yield from _read_json(path)
    elif path.suffix == ".parquet":
        yield from _read_parquet(path)
    else:
        raise UserError(f"{path}: unknown file type {path.suffix or '(no suffix)'}", f"give {KINDS}")


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                yield Row(number, {}, "not JSON", str(error))
                continue
            yield _row(number, value)


def _read_json(path: Path) -> Iterator[Row]:
    """A list of rows, or JSONL under the wrong name."""
    try:
        values = json.loads(path.read_bytes())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        with path.open("rb") as file:
            first = file.readline()
        with contextlib.suppress(json.JSONDecodeError, UnicodeDecodeError):
            if isinstance(json.loads(first), dict):
                yield from _read_jsonl(path)
                return
        raise UserError(f"{path} is not JSON: {error}", "one row per line is JSONL: name it .jsonl") from None
    if isinstance(values, dict):
        lists = [k for k, v in values.items() if isinstance(v, list)]
        if len(lists) != 1:
            raise UserError(
                f"{path}: expected a list of rows, found an object with {', '.join(list(values)[:5])}"
            )
        values = values[lists[0]]
    for number, value in enumerate(values, 1):
        yield _row(number, value)


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"{path} is not a Parquet file: {error}") from None
    number = 0
    for batch in file.iter_batches(batch_size=256):
        for value in batch.to_pylist():
            number += 1
            yield _row(number, value)


def _read_folder(path: Path, split: str, key: str) -> Iterator[Row]:
    if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
        import datasets

        saved = datasets.load_from_disk(str(path))
        if isinstance(saved, datasets.DatasetDict):
            if split not in saved:
                raise UserError(f"{path} has no split {split!r}", f"splits there: {', '.join(saved)}")
            saved = saved[split]
        yield from _read_dataset(saved)
        return
    files = sorted(f for f in path.rglob("*") if f.suffix in SUFFIXES and not f.name.startswith("."))
    if not files:
        raise UserError(f"{key}: {path} holds no data file", f"give {KINDS}")
    # The hub's convention: the split's name is part of the file's name or of its folder's.
    named = [f for f in files if split in str(f.relative_to(path)).lower()]
    if not named and len(files) > 1:
        names = ", ".join(str(f.relative_to(path)) for f in files[:6])
        raise UserError(f"{path}: no file is named after the split {split!r}", f"files there: {names}")
    number = 0
    for file in named or files:
        for row in _read_file(file):
            number += 1
            row.number = number
            yield row


def _read_hub(name: str, split: str, subset: str | None, key: str) -> Iterator[Row]:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        rows = datasets.load_dataset(name, subset, split=split)
    except (ConnectionError, OfflineModeIsEnabled, HfHubHTTPError) as error:
        raise UserError(
            f"{key}: {name} is no local path and the hub cannot be reached ({type(error).__name__})",
            f"{key} takes {KINDS}",
        ) from None
    except (datasets.exceptions.DatasetNotFoundError, ValueError) as error:
        raise UserError(
            f"{key}: {name}: {' '.join(str(error).split())[:200]}", f"{key} takes {KINDS}"
        ) from None
    yield from _read_dataset(rows)


def _read_dataset(rows: Any) -> Iterator[Row]:
    for number, value in enumerate(rows, 1):
        yield _row(number, value)


def _row(number: int, value: Any) -> Row:
    if not isinstance(value, dict):
        return Row(number, {}, "not an object", f"a {type(value).__name__}")
    if not any(v not in (None, "", [], {}) for v in value.values()):
        return Row(number, {}, "empty")
    return Row(number, value)
