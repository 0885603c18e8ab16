"""Which tensors are memory-mapped, from where, and whether they are in memory."""

from __future__ import annotations

import mmap
import os
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesmith.experts.residency import pages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc, mincore")


@pytest.fixture
def mapped(tmp_path):
    torch.manual_seed(0)
    save_file({"a": torch.randint(256, (3 << 20,), dtype=torch.uint8)}, tmp_path / "one.safetensors")
    return tmp_path / "one.safetensors", load_file(tmp_path / "one.safetensors")["a"]


def test_a_mapped_tensor_is_found_in_its_file(mapped):
    path, tensor = mapped
    files = pages.MappedFiles()
    part = tensor[12345:99999]
    name, offset = files.place(part)
    assert name == str(path)
    assert path.read_bytes()[offset : offset + len(part)] == bytes(part.tolist())
    into = bytearray(len(part))
    files.read(name, offset, memoryview(into))
    assert into == bytes(part.tolist())
    files.close()


def test_ordinary_memory_is_in_no_file():
    assert pages.MappedFiles().place(torch.zeros(1 << 20)) is None


def test_a_mapping_made_later_is_found_within_a_second(mapped, monkeypatch):
    path, tensor = mapped
    files = pages.MappedFiles()
    files._looked = pages.time.monotonic()
    assert files.place(tensor) is None  # looked a moment ago
    files._looked -= 2
    assert files.place(tensor) is not None
    files.close()


def drop(path):
    """Out of the page cache, if the file system lets it go."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def test_cold_and_warm(tmp_path):
    path = tmp_path / "bytes"
    path.write_bytes(os.urandom(3 << 20))
    drop(path)
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        view = torch.frombuffer(memory, dtype=torch.uint8)
        start, nbytes = view.data_ptr(), len(view)
        if pages.bytes_in_memory(start, nbytes) == nbytes:
            pytest.skip("this file system keeps files in memory")
        assert not pages.seems_in_memory(start, nbytes)
        pages.will_need(start, nbytes)
        view.sum()
        assert pages.bytes_in_memory(start, nbytes) == nbytes
        assert pages.seems_in_memory(start, nbytes)
        del view


def test_own_files_tell_the_truth(mapped):
    assert pages.tells_residency([str(mapped[0])])
    assert not pages.tells_residency(["/no/such/file"])
