"""Memory that was freed goes back to the system."""

import ctypes
import sys

import pytest
import torch

from moesmith.jobs._memory import anonymous_memory, give_back


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc has malloc_trim"
)
def test_freed_memory_goes_back():
    small = [torch.ones(16_000) for _ in range(4_000)]  # 64 kB each: below what the C library maps by itself
    kept = small[::64]  # pins that keep the heap from shrinking at its end
    held = anonymous_memory()
    del small
    before = anonymous_memory()
    give_back()
    assert anonymous_memory() < held - 150e6
    assert anonymous_memory() <= before
    assert len(kept) == 63
