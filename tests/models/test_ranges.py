"""Safetensors files put together from ranges: the bytes are those of the tensors sliced in memory."""

from __future__ import annotations

import errno
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesmith.errors import UserError
from moesmith.models import ranges
from moesmith.models.headers import INDEX, SINGLE, TensorHeader, read_headers
from moesmith.models.ranges import Made, NewTensor, Piece, split_shards, write_checkpoint

GENERATOR = torch.Generator().manual_seed(0)


def source(folder: Path, **tensors: torch.Tensor) -> dict[str, TensorHeader]:
    folder.mkdir()
    save_file(tensors, folder / SINGLE)
    return read_headers(folder)


def whole(header: TensorHeader) -> NewTensor:
    return NewTensor(
        header.name,
        header.dtype,
        header.shape,
        (Piece(header.file, header.start, ((0, header.nbytes),)),),
    )


def rows(header: TensorHeader, ids: list[int]) -> NewTensor:
    width = header.nbytes // header.shape[0]
    piece = Piece(header.file, header.start, tuple((i * width, width) for i in ids))
    return NewTensor(header.name, header.dtype, (len(ids), *header.shape[1:]), (piece,))


def columns(header: TensorHeader, ids: list[int], element: int) -> NewTensor:
    runs = tuple((i * element, element) for i in ids)
    piece = Piece(header.file, header.start, runs, header.shape[0], header.shape[1] * element)
    return NewTensor(header.name, header.dtype, (header.shape[0], len(ids)), (piece,))


def unsupported(*args: int) -> int:
    raise OSError(errno.EXDEV, "other disk")


def nothing(*args: int) -> int:
    return 0


@pytest.mark.parametrize("broken", [[], ["_copy_file_range"], ["_copy_file_range", "_sendfile"]], ids=str)
@pytest.mark.parametrize("how", [unsupported, nothing])
def test_rows_long_and_short_by_every_way_of_copying(
    broken: list[str], how, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in broken:
        monkeypatch.setattr(ranges, name, how)
    monkeypatch.setattr(ranges, "KERNEL", 100_000)  # several calls
    long = torch.randn(9, 70, 700, generator=GENERATOR)  # 196,000 bytes a row
    short = torch.randn(9, 3, generator=GENERATOR).bfloat16()
    headers = source(tmp_path / "in", long=long, short=short, other=torch.arange(5))
    ids = [0, 2, 3, 7]
    (tmp_path / "out").mkdir()
    counted: list[int] = []
    tensors = [rows(headers["long"], ids), rows(headers["short"], ids), whole(headers["other"])]
    write_checkpoint(tmp_path / "in", tmp_path / "out", tensors, counted.append)
    found = load_file(tmp_path / "out" / SINGLE)
    assert torch.equal(found["long"], long[ids]) and torch.equal(found["short"], short[ids])
    assert torch.equal(found["other"], torch.arange(5))
    assert sum(counted) == sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("shape", [(5, 8), (4000, 300), (3, 700_000)], ids=str)
def test_columns(shape: tuple[int, int], tmp_path: Path):
    """Rows read together, rows longer than the buffer, and a last row that ends with the file."""
    table = torch.randn(shape, generator=GENERATOR).half()
    headers = source(tmp_path / "in", table=table)
    (tmp_path / "out").mkdir()
    for ids in ([0, 2, 5, 6], [1, 7]):
        new = columns(headers["table"], ids, 2)
        write_checkpoint(tmp_path / "in", tmp_path / "out", [new])
        assert torch.equal(load_file(tmp_path / "out" / SINGLE)["table"], table[:, ids])
        (tmp_path / "out" / SINGLE).unlink()


def test_bytes_made_here_stand_between_ranges(tmp_path: Path):
    headers = source(tmp_path / "in", a=torch.ones(4), b=torch.zeros(4))
    made = NewTensor("made", "F32", (1,), (b"\0\0\x80\x3f",))
    (tmp_path / "out").mkdir()
    write_checkpoint(tmp_path / "in", tmp_path / "out", [whole(headers["a"]), made, whole(headers["b"])])
    found = load_file(tmp_path / "out" / SINGLE)
    assert found["made"].tolist() == [1.0] and found["a"].sum() == 4 and found["b"].sum() == 0


def test_bytes_are_made_when_their_turn_comes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Longer than one write, between ranges of two models, in the order of the file."""
    monkeypatch.setattr(ranges, "KERNEL", 100_000)
    headers = source(tmp_path / "in", a=torch.ones(4), b=torch.zeros(40_000))
    other = source(tmp_path / "other", c=torch.arange(3.0))["c"]
    values = torch.randn(60_000, generator=GENERATOR)
    calls: list[str] = []

    def make(name: str, data: torch.Tensor) -> Made:
        return Made(data.nbytes, lambda: (calls.append(name), memoryview(data.numpy()))[1])

    long = NewTensor("long", "F32", (60_000,), (make("long", values),))
    far = Piece(str(tmp_path / "other" / SINGLE), other.start, ((0, other.nbytes),))
    mixed = NewTensor(
        "mixed", "F32", (7,), (whole(headers["a"]).parts[0], make("short", values[:1]), b"\0" * 8)
    )
    mixed = NewTensor("mixed", "F32", (10,), (*mixed.parts, far))
    (tmp_path / "out").mkdir()
    counted: list[int] = []
    tensors = [whole(headers["b"]), long, mixed]
    assert not calls
    write_checkpoint(tmp_path / "in", tmp_path / "out", tensors, counted.append)
    found = load_file(tmp_path / "out" / SINGLE)
    assert torch.equal(found["long"], values) and calls == ["long", "short"]
    assert found["mixed"].tolist() == [1, 1, 1, 1, values[0].item(), 0, 0, 0, 1, 2]
    assert sum(counted) == sum(tensor.nbytes for tensor in tensors)


def test_a_maker_that_breaks_its_promise(tmp_path: Path):
    (tmp_path / "out").mkdir()
    tensor = NewTensor("a", "F32", (2,), (Made(8, lambda: b"1234"),))
    with pytest.raises(AssertionError, match="4 bytes were made, 8 promised"):
        write_checkpoint(tmp_path, tmp_path / "out", [tensor])


def test_shards_hold_what_fits(tmp_path: Path):
    headers = source(tmp_path / "in", **{f"t{i}": torch.full((i + 1,), float(i)) for i in range(8)})
    tensors = [whole(header) for header in headers.values()]
    assert [[t.name for t in shard] for shard in split_shards(tensors, 40)] == [
        ["t0", "t1", "t2", "t3"], ["t4"], ["t5"], ["t6"], ["t7"]]  # fmt: skip
    assert split_shards(tensors, 1) == [[tensor] for tensor in tensors]
    (tmp_path / "out").mkdir()
    names = write_checkpoint(tmp_path / "in", tmp_path / "out", tensors, shard_bytes=40)
    assert names[0] == "model-00001-of-00005.safetensors" and len(names) == 5
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["metadata"] == {"total_size": 4 * 36} and index["weight_map"]["t7"] == names[4]
    assert read_headers(tmp_path / "out").keys() == headers.keys()


def test_a_range_past_the_end_of_its_file(tmp_path: Path):
    headers = source(tmp_path / "in", a=torch.ones(100_000))
    os.truncate(tmp_path / "in" / SINGLE, 200_000)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="cut short"):
        write_checkpoint(tmp_path / "in", tmp_path / "out", [whole(headers["a"])])


def test_a_disk_that_fills_up_while_writing(tmp_path: Path):
    """The kernel's own refusal, by way of a limit on the size of files."""
    headers = source(tmp_path / "in", a=torch.ones(100_000))
    (tmp_path / "out").mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="writing to .*out failed: file too large\n"):
            write_checkpoint(tmp_path / "in", tmp_path / "out", [whole(headers["a"])])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("way", ["_copy_file_range", "_write_all"])
def test_no_space_left(way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def full(*args: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    headers = source(tmp_path / "in", a=torch.ones(100_000))
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(ranges, way, full)
    with pytest.raises(UserError, match="no space left on device\nfree some space"):
        write_checkpoint(tmp_path / "in", tmp_path / "out", [whole(headers["a"])])


def test_other_errors_travel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def broken(*args: object) -> int:
        raise OSError(errno.EIO, "broken disk")

    headers = source(tmp_path / "in", a=torch.ones(100_000))
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(ranges, "_copy_file_range", broken)
    with pytest.raises(OSError, match="broken disk"):
        write_checkpoint(tmp_path / "in", tmp_path / "out", [whole(headers["a"])])
