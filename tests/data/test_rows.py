"""Every kind of source gives the same rows; what is not there says what could be meant."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from chats import sums, write_jsonl
from moesmith.data.rows import read_rows
from moesmith.errors import UserError

ROWS = sums(5)


def values(path, **options):
    return [row.value for row in read_rows(str(path), **options)]


def test_all_sources_give_the_same_rows(tmp_path):
    jsonl = write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.json").write_text(json.dumps({"data": ROWS}))
    write_jsonl(tmp_path / "d.json", ROWS)  # JSONL under the wrong name
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "e.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "f")
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "g")
    folder = tmp_path / "h"
    folder.mkdir()
    write_jsonl(folder / "train-0.jsonl", ROWS[:3])
    write_jsonl(folder / "train-1.jsonl", ROWS[3:])
    write_jsonl(folder / "test.jsonl", ROWS[:1])
    for path in (
        jsonl,
        *(tmp_path / name for name in ("b.json", "c.json", "d.json", "e.parquet", "f", "g", "h")),
    ):
        assert values(path) == ROWS, path
    assert values(folder, split="test") == ROWS[:1]


def test_lines_that_are_not_rows_keep_their_line_numbers(tmp_path):
    path = write_jsonl(
        tmp_path / "a.jsonl", [ROWS[0], "", "{broken", "[1]", "{}", '{"messages": []}', ROWS[1]]
    )
    found = [(row.number, row.problem) for row in read_rows(str(path))]
    assert found == [(1, None), (3, "not JSON"), (4, "not an object"), (5, "empty"), (6, "empty"), (7, None)]


def test_a_missing_file_names_its_neighbour(tmp_path):
    write_jsonl(tmp_path / "chat.jsonl", ROWS)
    with pytest.raises(UserError) as error:
        values(tmp_path / "chat.jsnl")
    assert "no such file" in error.value.message and "data.path" in error.value.message
    assert "did you mean chat.jsonl" in error.value.hint


@pytest.mark.parametrize("name", ["a.txt", "a.parquet", "a.json"])
def test_files_that_cannot_be_read(tmp_path, name):
    (tmp_path / name).write_text("hello")
    with pytest.raises(UserError, match="unknown file type|is not a Parquet file|is not JSON"):
        values(tmp_path / name)


def test_folders_without_rows(tmp_path):
    with pytest.raises(UserError, match="holds no data file"):
        values(tmp_path)
    write_jsonl(tmp_path / "x.jsonl", ROWS)
    write_jsonl(tmp_path / "y.jsonl", ROWS)
    with pytest.raises(UserError, match="named after the split 'train'"):
        values(tmp_path)


def test_a_hub_name_without_a_hub(monkeypatch):
    with pytest.raises(UserError, match="hub"):
        values("someone/some-dataset")
