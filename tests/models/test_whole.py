"""A file of tensors is whole or not there, and a disk that refuses is said in one line."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open

from moesmith.errors import UserError
from moesmith.models.whole import save_whole


def test_what_is_written_is_there(tmp_path: Path):
    path = tmp_path / "sums.safetensors"
    save_whole({"a": torch.arange(6.0).reshape(2, 3).T}, path, {"batches": "3"})
    with safe_open(path, "pt") as file:
        assert file.get_tensor("a").tolist() == [[0, 3], [1, 4], [2, 5]]
        assert file.metadata() == {"batches": "3"}
    assert path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "error", [SafetensorError("I/O error: No space left on device"), OSError(errno.EDQUOT, "Quota exceeded")]
)
def test_a_disk_that_refuses(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "sums.safetensors"
    save_whole({"a": torch.ones(1)}, path)
    before = path.read_bytes()

    def half(tensors: Any, to: Path, metadata: Any = None) -> None:
        Path(to).write_bytes(b"half")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", half)
    with pytest.raises(UserError, match=r"sums.safetensors failed: I/O error|: disk quota exceeded"):
        save_whole({"a": torch.zeros(9)}, path)
    assert path.read_bytes() == before and [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_the_bytes_are_on_the_disk_before_the_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path, steps = tmp_path / "sums.safetensors", []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (steps.append("sync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("replace"), replace(a, b)))
    save_whole({"a": torch.ones(1)}, path)
    assert steps == ["sync", "replace"]
