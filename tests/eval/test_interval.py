import pytest

from moesmith.eval.interval import wilson


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    [  # published values of the Wilson interval at 95 %
        (0, 10, 0.0, 0.2775),
        (10, 10, 0.7225, 1.0),
        (5, 10, 0.2366, 0.7634),
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_published_values(hits, n, low, high):
    assert wilson(hits, n) == pytest.approx((low, high), abs=6e-5)


def test_narrower_with_more_items():
    assert wilson(50, 100)[0] > wilson(5, 10)[0]


@pytest.mark.parametrize(("hits", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_impossible_counts(hits, n):
    with pytest.raises(ValueError, match="wanted 0 <= hits <= n"):
        wilson(hits, n)
