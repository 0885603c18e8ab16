"""Intervals hold the truth about as often as they say."""

import numpy as np
import pytest

from moesmith.eval.bootstrap import draws, quantile, quantile_intervals, ratio_interval


def synthetic(seed: int, documents: int = 40):
    """Documents of different lengths whose tokens share a document effect; the true mean is 1."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(5, 60, documents)
    effect = rng.normal(1, 0.5, documents)
    values = [effect[i] + rng.normal(0, 0.3, n) for i, n in enumerate(tokens)]
    return tokens, values


def test_interval_contains_the_truth_in_about_95_of_100():
    hits, by_token = 0, 0
    for seed in range(200):
        tokens, values = synthetic(seed)
        low, high = ratio_interval([v.sum() for v in values], tokens, rounds=400)
        hits += low <= 1 <= high
        flat = np.concatenate(values)
        half = 1.96 * flat.std() / np.sqrt(len(flat))
        by_token += abs(flat.mean() - 1) <= half
    assert 0.88 <= hits / 200 <= 0.99
    assert by_token / 200 < 0.6, "drawing tokens instead of documents would have been far too sure"


def test_interval_of_a_quantile():
    hits = 0
    for seed in range(60):
        tokens, values = synthetic(seed)
        flat = np.concatenate(values)
        [(low, high)] = quantile_intervals(flat, np.repeat(np.arange(40), tokens), [0.5], rounds=200)
        hits += low <= 1 <= high
        assert low <= quantile(flat, 0.5) <= high
    assert hits / 60 >= 0.85


def test_quantiles_against_the_drawn_values_spelled_out():
    rng = np.random.default_rng(5)
    values, owner = rng.normal(size=50), np.sort(rng.integers(0, 7, 50))
    [found] = quantile_intervals(values, owner, [0.9], rounds=30)
    counts = np.concatenate(list(draws(7, 30)))
    slow = [quantile(np.repeat(values, count[owner]), 0.9) for count in counts]
    assert found == pytest.approx(tuple(np.quantile(slow, [0.025, 0.975])))


def test_draws_depend_on_the_seed_and_the_number_of_documents_alone():
    a, b = (np.concatenate(list(draws(9, 50, seed))) for seed in (1, 1))
    assert (a == b).all() and a.shape == (50, 9) and (a.sum(1) == 9).all()
    assert (a != np.concatenate(list(draws(9, 50, 2)))).any()


def test_paired_by_the_same_draws():
    """A candidate that is better by the same amount everywhere has an interval of width zero."""
    tokens = np.array([10, 20, 30, 40])
    low, high = ratio_interval(0.25 * tokens, tokens)
    assert low == pytest.approx(0.25) and high == pytest.approx(0.25)
    assert ratio_interval(0.25 * tokens, tokens, np.exp) == pytest.approx((np.exp(0.25),) * 2)


def test_blocks_change_nothing(monkeypatch):
    tokens, values = synthetic(0)
    sums = [v.sum() for v in values]
    whole = ratio_interval(sums, tokens)
    monkeypatch.setattr("moesmith.eval.bootstrap._BLOCK", 3 * 40)
    assert ratio_interval(sums, tokens) == whole


def test_one_document_says_nothing_about_others():
    assert ratio_interval([3.0], [2]) is None
    assert quantile_intervals([1.0, 2.0], [0, 0], [0.5, 0.99]) == [None, None]
