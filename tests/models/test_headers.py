"""Safetensors headers, whole and broken."""

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from moesmith.errors import UserError
from moesmith.models.headers import INDEX, read_header, read_headers


def sharded(folder: Path, shards: dict[str, dict], weight_map: dict | None = None) -> Path:
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    found = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map or found}))
    return folder


def problem(call, *args) -> UserError:
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in caught.value.message
    return caught.value


TWO = {"a.safetensors": {"x": torch.zeros(4)}, "b.safetensors": {"y": torch.zeros(2, 2), "z": torch.zeros(1)}}


def test_offsets_point_at_the_bytes(tmp_path):
    tensors = {
        "codes": torch.arange(24, dtype=torch.uint8).view(2, 3, 4),
        "half": torch.randn(5, dtype=torch.bfloat16),
        "scalar": torch.tensor(3.0),
        "empty": torch.zeros(0, 3),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt"})
    headers = read_header(path)
    raw = path.read_bytes()
    assert headers.keys() == tensors.keys()
    for name, tensor in tensors.items():
        header = headers[name]
        assert header.shape == tuple(tensor.shape) and header.nbytes == tensor.nbytes
        assert (
            raw[header.start : header.end] == tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        )
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == headers.keys()


def test_shards(tmp_path):
    headers = read_headers(sharded(tmp_path, TWO))
    assert {name: header.file for name, header in headers.items()} == {
        "x": "a.safetensors", "y": "b.safetensors", "z": "b.safetensors"}  # fmt: skip


def test_a_missing_shard(tmp_path):
    sharded(tmp_path, TWO)
    (tmp_path / "b.safetensors").unlink()
    assert (
        problem(read_headers, tmp_path).message == f"{tmp_path}: 1 of 2 shards missing, first b.safetensors"
    )


def test_a_tensor_that_its_shard_does_not_hold(tmp_path):
    sharded(tmp_path, TWO, {"x": "a.safetensors", "y": "b.safetensors", "lost": "b.safetensors"})
    error = problem(read_headers, tmp_path)
    assert "lists lost in b.safetensors" in error.message and "fetch both again" in error.hint


def test_an_index_that_points_out_of_the_folder(tmp_path):
    sharded(tmp_path, TWO, {"x": "../a.safetensors"})
    assert "not a file of this folder" in problem(read_headers, tmp_path).message


def test_an_index_without_a_map(tmp_path):
    (tmp_path / INDEX).write_text("{}")
    assert "no weight_map" in problem(read_headers, tmp_path).message


def test_shards_without_their_index(tmp_path):
    sharded(tmp_path, TWO)
    (tmp_path / INDEX).unlink()
    assert "2 safetensors files but no" in problem(read_headers, tmp_path).message


@pytest.mark.parametrize("keep", [0, 4, 8, 20, -1], ids=lambda n: f"keep {n}")
def test_a_file_cut_short(tmp_path, keep):
    path = tmp_path / "model.safetensors"
    save_file({"w": torch.ones(16)}, path)
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    error = problem(read_headers, tmp_path)
    assert "model.safetensors" in error.message and error.hint == "fetch the file again"
    if keep in (20, -1):
        assert "cut short" in error.message


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b"\xff" * 40, "damaged header"),
        (b"[1, 2]" + b" " * 20, "damaged header"),
        (b'{"w": {"dtype": "F32"}}', "damaged header"),
        (b'{"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 4]}}', "damaged header: w F32 [4]"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}', "damaged header"),
        (b'{"w": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}', "cut short"),
    ],
)
def test_a_damaged_header(tmp_path, header, words):
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 16)
    assert words in problem(read_header, path).message


def test_what_is_not_a_safetensors_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")
    assert problem(read_header, path).hint == "git lfs pull"
    path.write_bytes(b"PK\x03\x04" + b"\xee" * 100)
    assert "not a safetensors file" in problem(read_header, path).message
