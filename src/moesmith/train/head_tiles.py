"""Smaller tiles for TRL's fused output head on a CPU.

TRL computes log-probabilities in tiles of 4,096 tokens by 32,768 words. Without Triton a tile lies in seven
float32 copies: with 1,024 learned tokens 1.5 GB, more than anything else in a run. Tiles of 256 by 8,192 give
the same log-probabilities (the vocabulary is summed in other groups) in a sixteenth of it. TRL has no option
for them, only two module constants, which are put back.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils

from moesmith.plan.footprint import CPU_TILE


@contextmanager
def small_tiles() -> Iterator[None]:
    """Within, where there is no GPU: the fused head takes `CPU_TILE`, in forward and backward."""
    if torch.cuda.is_available():
        yield
        return
    before = chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE
    chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE = CPU_TILE
    try:
        yield
    finally:
        chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE = before
