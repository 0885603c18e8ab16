"""Several processes observe what one observes."""

import rank_runs
import runs
from processes import together


def test_counts_are_equal_and_sums_are_rounded_alike():
    """Nine documents: one process has five of them. A document's own numbers are the same bits."""
    documents = runs.examples(9)
    alone = rank_runs.observe(documents)
    first, second = together(rank_runs.observe, documents)
    assert alone.keys() == first.keys() == second.keys()
    for name, tensor in alone.items():
        assert first[name].equal(second[name])
        kind = name.rpartition("::")[2]
        if kind in ("max_norm", "max_abs", "per_document", "coactivation"):
            assert first[name].equal(tensor), name
        else:
            assert ((first[name] - tensor).abs() <= 1e-12 * tensor.abs()).all(), name
    counts = [name for name in alone if name.endswith("::sums")]
    assert counts and all(first[name][..., 0].equal(alone[name][..., 0]) for name in counts)
