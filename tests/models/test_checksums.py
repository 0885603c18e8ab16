"""checksums.json: written beside weights, and what it says about a byte that changed."""

import json

import pytest
import torch
from safetensors.torch import save_file

from moesmith.errors import UserError
from moesmith.models.checksums import CHECKSUMS, digest, has_checksums, verify, write_checksums
from moesmith.models.headers import INDEX, read_headers

NAMES = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(tmp_path):
    """Two shards, four tensors, and their sums."""
    torch.manual_seed(0)
    shards = [
        {"a.codes": torch.randint(0, 256, (300, 40), dtype=torch.uint8), "a.absmax": torch.rand(30)},
        {"b.weight": torch.rand(64, 64).bfloat16(), "b.scalar": torch.tensor(1.5)},
    ]
    for name, tensors in zip(NAMES, shards, strict=True):
        save_file(tensors, tmp_path / name)
    index = {name: file for file, tensors in zip(NAMES, shards, strict=True) for name in tensors}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    write_checksums(tmp_path)
    return tmp_path


def flip(path, position: int) -> None:
    """One bit of one byte."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


def test_a_whole_folder_verifies(folder):
    read = []
    found = verify(folder, read.append)
    sizes = [(folder / name).stat().st_size for name in NAMES]
    assert (found.files, found.tensors, found.nbytes) == (2, 4, sum(sizes))
    assert sum(read) == sum(sizes), "every byte is read once"


@pytest.mark.parametrize("name", ["a.codes", "a.absmax", "b.weight", "b.scalar"])
@pytest.mark.parametrize("place", ["first", "last"])
def test_one_changed_bit_names_file_and_tensor(folder, name, place):
    header = read_headers(folder)[name]
    flip(folder / header.file, header.start if place == "first" else header.end - 1)
    with pytest.raises(UserError, match=f"damaged: {name} in {header.file}$|{name} in {header.file}\n"):
        verify(folder)


def test_damage_in_several_tensors_is_counted(folder):
    for name in ("a.codes", "b.weight", "a.absmax", "b.scalar"):
        header = read_headers(folder)[name]
        flip(folder / header.file, header.start)
    with pytest.raises(UserError, match="and 1 more"):
        verify(folder)


def test_a_changed_header_is_seen(folder):
    path = folder / NAMES[1]
    path.write_bytes(path.read_bytes().replace(b'"b.weight":', b'"b.weighs":'))
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"]["b.weighs"] = index["weight_map"].pop("b.weight")
    (folder / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=f"b.weighs in {NAMES[1]}, b.weight in {NAMES[1]}"):
        verify(folder)


def test_another_dtype_in_the_header_is_seen(folder):
    path = folder / NAMES[1]
    path.write_bytes(path.read_bytes().replace(b'"BF16"', b' "F16"'))
    with pytest.raises(UserError, match=f"the header of {NAMES[1]}"):
        verify(folder)


def test_bytes_after_the_last_tensor_are_seen(folder):
    with open(folder / NAMES[0], "ab") as file:
        file.write(b"more")
    with pytest.raises(UserError, match=rf"{NAMES[0]} has [\d,]+ bytes, not"):
        verify(folder)


def test_a_shard_cut_short_or_missing_is_refused_before_reading(folder):
    path = folder / NAMES[0]
    data = path.read_bytes()
    path.write_bytes(data[:-100])
    with pytest.raises(UserError, match="is cut short"):
        verify(folder)
    path.unlink()
    with pytest.raises(UserError, match="shards missing"):
        verify(folder)


def test_a_shard_more_than_was_written_is_seen(folder):
    record = json.loads((folder / CHECKSUMS).read_text())
    del record["files"][NAMES[1]]
    (folder / CHECKSUMS).write_text(json.dumps(record))
    with pytest.raises(UserError, match=f"{NAMES[1]} has no checksums"):
        verify(folder)


@pytest.mark.parametrize("text", ["{}", '{"algorithm": "md5", "files": {"x": {}}}', "not json"])
def test_a_record_that_is_no_record(folder, text):
    (folder / CHECKSUMS).write_text(text)
    with pytest.raises(UserError, match=CHECKSUMS):
        verify(folder)


def test_without_a_record(folder):
    (folder / CHECKSUMS).unlink()
    assert not has_checksums(folder)
    with pytest.raises(UserError, match="moesmith quantize"):
        verify(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8, torch.int64, torch.bool])
def test_a_tensor_in_memory_has_the_sum_of_its_bytes_on_disk(tmp_path, dtype):
    tensors = {"t": torch.arange(24).reshape(4, 6).to(dtype), "scalar": torch.tensor(1).to(dtype)}
    save_file(tensors, tmp_path / "model.safetensors")
    sums = write_checksums(tmp_path)
    assert sums == {name: digest(tensor) for name, tensor in tensors.items()}
    turned = tensors["t"].t().contiguous().t()
    assert digest(turned) == sums["t"], "strides are no part of it"
