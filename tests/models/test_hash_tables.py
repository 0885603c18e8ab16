"""Dropped experts in tables of expert ids: the documented rule, spelled out row by row."""

from __future__ import annotations

import numpy as np

from moesmith.models.hash_tables import cut_expert_ids


def by_the_rule(table: np.ndarray, kept: list[int]) -> list[list[int]]:
    """The docstring as a loop, in the new numbering."""
    rows = []
    for token, row in enumerate(table.tolist()):
        left = [expert if expert in kept else None for expert in row]
        for place, expert in enumerate(row):
            if left[place] is None:
                successor = (token + expert) % len(kept)
                while kept[successor] in left:
                    successor = (successor + 1) % len(kept)
                left[place] = kept[successor]
        rows.append([kept.index(expert) for expert in left])
    return rows


def random_table(vocabulary: int, top_k: int, num_experts: int) -> np.ndarray:
    generator = np.random.default_rng(0)
    rows = [generator.permutation(num_experts)[:top_k] for _ in range(vocabulary)]
    return np.array(rows, dtype=np.int32)


def test_every_dropped_expert_has_the_successor_of_the_rule():
    for kept in ([0, 3, 4, 7, 9], [2, 3, 5], list(range(10))):
        table = random_table(200, 3, 10)
        cut = cut_expert_ids(table, kept, 10)
        assert cut.tolist() == by_the_rule(table, kept)
        assert cut.dtype == table.dtype and cut.shape == table.shape


def test_no_token_gets_an_expert_twice_even_when_as_few_as_top_k_are_left():
    cut = cut_expert_ids(random_table(500, 4, 32), [1, 8, 9, 31], 32)
    assert (np.sort(cut, axis=1) == np.arange(4)).all()


def test_the_tokens_of_dropped_experts_are_spread_over_all_kept_ones():
    """A successor in id order would give one expert all that its dropped neighbours had."""
    kept = [*range(8), *range(24, 32)]
    cut = cut_expert_ids(random_table(4000, 2, 32), kept, 32)
    load = np.bincount(cut.ravel(), minlength=16) / cut.size
    assert load.min() > 0.8 / 16 and load.max() < 1.2 / 16
