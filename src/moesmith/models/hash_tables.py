"""Expert ids after some experts are gone, in tables that send each token id to fixed experts. No torch.

Such a router (`deepseek_v4`'s first layers) does not choose: a table gives every id of the vocabulary its K
experts, and the router's scores only weigh them. A dropped expert therefore needs a successor, per token id.
"""

# V vocabulary, K experts per token

from __future__ import annotations

import numpy as np


def cut_expert_ids(table: np.ndarray, kept: list[int], num_experts: int) -> np.ndarray:
    """Expert ids (V, K) in the old numbering -> (V, K) of the same dtype in the new one.

    Kept experts keep their place in every row. For dropped expert `d` of token id `t` comes the kept expert
    at position `(t + d) % len(kept)`, or the next one, cyclically, that the row does not have yet. Tokens of
    a dropped expert are so spread over all kept ones, as the table spread them before; how much a successor
    counts is still the router's to say. No row gets an expert twice that had K different ones.

    Args:
        kept: ascending, in the old numbering; at least K.
    """
    position = np.full(num_experts, -1, dtype=np.int64)
    position[kept] = np.arange(len(kept))
    new = position[table]
    for column in range(table.shape[1]):
        rows = np.nonzero(new[:, column] < 0)[0]
        successor = (rows + table[rows, column]) % len(kept)
        for _ in range(table.shape[1]):  # a row has at most K - 1 others
            taken = (new[rows] == successor[:, None]).any(axis=1)
            successor = np.where(taken, (successor + 1) % len(kept), successor)
        new[rows, column] = successor
    return new.astype(table.dtype)
