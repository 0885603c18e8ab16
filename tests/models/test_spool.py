"""What is read from the spool is what was written, and nothing half-written is ever read."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moesmith.errors import UserError
from moesmith.models.spool import Spool, Writer, map_tensors, tensors_in


def given(seed: int) -> dict[str, object]:
    torch.manual_seed(seed)
    return {
        "result": (torch.randn(2, 3, 4).bfloat16(), None, torch.randint(9, (2, 3), dtype=torch.int32)),
        "put": {"kv": {"full": [torch.randn(2, 5), torch.zeros(2, 0, 5)]}, "n": 3, "b": torch.ones(2).bool()},
    }


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "me")
    with spool.write(0) as writer:
        writer.add(given(0))
        writer.add({"result": torch.arange(7.0)[::2]})  # not contiguous, another form
        writer.add(given(1))
    spool.commit(0)
    again = Spool(tmp_path, "me")
    assert again.done == 1 and again.holds(0)
    for number, seed in ((0, 0), (2, 1)):
        found, wanted = again.read(0, number), given(seed)
        assert isinstance(found["result"], tuple) and found["result"][1] is None and found["put"]["n"] == 3
        assert isinstance(found["put"]["kv"]["full"], list)
        for a, b in zip(tensors_in(found), tensors_in(wanted), strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    assert torch.equal(again.read(0, 1)["result"], torch.tensor([0.0, 2.0, 4.0, 6.0]))


def test_dropped_tensors_keep_their_shapes(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "me")
    with spool.write(4) as writer:
        writer.add(given(0))
    spool.drop(4)
    found = spool.read(4, 0)
    assert found["result"][0].shape == (2, 3, 4) and found["result"][0].dtype == torch.bfloat16
    assert not any(bool(tensor.any()) for tensor in tensors_in(found))
    assert found["result"][0].untyped_storage().nbytes() == 2  # one zero, seen many times


def test_another_run(tmp_path: Path) -> None:
    Spool(tmp_path, "me").commit(0)
    with pytest.raises(UserError, match="other text"):
        Spool(tmp_path, "you")


def test_an_interrupted_layer_leaves_nothing(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "me")
    with pytest.raises(RuntimeError), spool.write(0) as writer:
        writer.add(given(0))
        raise RuntimeError
    assert not spool.holds(0) and Spool(tmp_path, "me").done == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_said(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(number, "No space left on device")

    monkeypatch.setattr(Writer, "add", full)
    spool = Spool(tmp_path, "me")
    with pytest.raises(UserError, match="disk is full"), spool.write(0) as writer:
        writer.add(given(0))
    assert list(tmp_path.glob("layer-*")) == []


def test_named_tuples_are_mapped() -> None:
    pair = NamedTuple("Pair", [("a", Tensor), ("b", int)])(torch.ones(2), 3)
    found = map_tensors({"x": pair}, lambda tensor: tensor * 2)["x"]
    assert type(found) is type(pair) and found.a.tolist() == [2, 2] and found.b == 3


def test_a_damaged_file_is_said(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "me")
    with spool.write(0) as writer:
        writer.add(given(0))
    with open(tmp_path / "layer-0000.bin", "r+b") as file:
        file.truncate(20)
    with pytest.raises(UserError, match="cut short"):
        spool.read(0, 0)


def test_what_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    spool = Spool(tmp_path, "me")
    with pytest.raises(UserError, match="gives a Path"), spool.write(0) as writer:
        writer.add((torch.ones(1), type("Path", (), {})()))


def test_map_tensors_looks_into_mappings() -> None:
    def one_more(tensor: Tensor) -> Tensor:
        return tensor + 1

    found = map_tensors({"a": [torch.zeros(1)], "b": (torch.zeros(1), "word")}, one_more)
    assert found["a"][0] == 1 and found["b"][0] == 1 and found["b"][1] == "word"
