"""Scores of benchmarks and two runs on the same items."""

import math

import numpy as np
import pytest

from moesmith.errors import UserError
from moesmith.eval.interval import wilson
from moesmith.eval.items import FORMS, Item, Score, compare, interval_of, pooled_interval, same_items
from moesmith.eval.paired import mcnemar


def item(task, place, key="k", asked="p", **metrics):
    return Item(task, place, f"{key}{place}", f"{asked}{place}", "prompt", "target", "answer", metrics)


def run(task, values, metric="acc", **more):
    return [item(task, i, **{metric: value}, **more) for i, value in enumerate(values)]


def score(task, metric="acc", form="mean", main=True):
    return Score(task, metric, 0.0, 0, form=form, main=main)


def test_a_share_has_wilsons_interval_and_a_mean_a_bootstrap():
    assert interval_of([1, 0, 1, 1], "mean") == wilson(3, 4)
    values = list(np.random.default_rng(0).normal(3, 1, 400))
    low, high = interval_of(values, "mean")
    assert low == pytest.approx(np.mean(values) - 1.96 * np.std(values) / 20, abs=0.02)
    assert high == pytest.approx(np.mean(values) + 1.96 * np.std(values) / 20, abs=0.02)
    assert interval_of([0.5], "mean") is None and interval_of([1], "mean") == wilson(1, 1)


@pytest.mark.parametrize(
    ("form", "function"),
    [
        ("weighted_perplexity", lambda v: math.exp(-sum(a for a, _ in v) / sum(b for _, b in v))),
        ("bits_per_byte", lambda v: -sum(a for a, _ in v) / sum(b for _, b in v) / math.log(2)),
    ],
)
def test_scores_of_pairs_are_resampled_as_their_own_function_would(form, function):
    rng = np.random.default_rng(1)
    values = [(-float(rng.uniform(5, 30)), int(rng.integers(3, 9))) for _ in range(60)]
    fast, slow = interval_of(values, form), interval_of(values, "unknown", function)
    parts = np.asarray(values).sum(0)
    assert FORMS[form](np.asarray(parts[0] / parts[1])) == pytest.approx(function(values))
    assert fast == pytest.approx(slow, rel=0.1) and fast[0] < function(values) < fast[1]


def test_a_group_is_resampled_within_its_tasks():
    """Tasks that differ widely make no interval wider: which tasks there are is not drawn."""
    easy, hard = [1.0] * 50, [0.0] * 50
    assert pooled_interval([easy, hard], by_size=True) == (0.5, 0.5)
    small, large = [1.0, 0.0] * 5, [1.0, 0.0] * 500
    by_size, by_task = (pooled_interval([small, large], flag) for flag in (True, False))
    assert by_size[1] - by_size[0] < 0.5 * (by_task[1] - by_task[0])
    assert pooled_interval([[1.0], large], by_size=True) is None
    one, two = (pooled_interval([[1.0, 0.0] * 50] * tasks, by_size=True) for tasks in (1, 2))
    assert two[1] - two[0] == pytest.approx((one[1] - one[0]) / math.sqrt(2), rel=0.15), "drawn apart"


def test_two_runs_are_compared_item_by_item():
    a = run("x", [1, 1, 0, 0, 1]) + run("y", [0, 0])
    b = run("x", [1, 0, 1, 1, 1])[::-1] + run("y", [1, 0])
    found = compare(a, b, [score("x"), score("y")])
    x, y = found["rows"]
    assert (x["both"], x["only_a"], x["only_b"], x["neither"]) == (2, 1, 2, 0)
    assert (x["a"], x["b"], x["n"]) == (0.6, 0.8, 5) and x["p"] == mcnemar(1, 2)
    assert x["difference"] == pytest.approx(0.2) and x["interval"][0] <= 0.2 <= x["interval"][1]
    assert found["all"]["n"] == 7 and found["all"]["only_b"] == x["only_b"] + y["only_b"] == 3
    assert found["asked_otherwise"] == 0


def test_a_run_against_itself_is_no_difference():
    a = run("x", [1, 0, 1, 0])
    (row,) = compare(a, a, [score("x")])["rows"]
    assert (row["difference"], row["interval"], row["p"]) == (0, (0, 0), 1)


def test_metrics_that_are_no_shares_have_a_difference_and_no_p():
    a = run("x", [(-10.0, 2), (-20.0, 4)], "ppl")
    b = run("x", [(-8.0, 2), (-16.0, 4)], "ppl")
    found = compare(a, b, [score("x", "ppl", "weighted_perplexity")])
    (row,) = found["rows"]
    assert row["a"] == pytest.approx(math.exp(5)) and row["b"] == pytest.approx(math.exp(4))
    assert "p" not in row and found["all"] is None
    assert compare(a, b, [score("x", "ppl", "f1")])["rows"] == []


def test_only_the_main_metric_counts_in_all():
    a = [item("x", i, acc=1, norm=0) for i in range(3)]
    b = [item("x", i, acc=1, norm=1) for i in range(3)]
    found = compare(a, b, [score("x"), score("x", "norm", main=False)])
    assert len(found["rows"]) == 2 and found["all"]["difference"] == 0


def test_other_prompts_are_counted_and_other_items_refused():
    a, b = run("x", [1, 0]), run("x", [1, 0], asked="with examples ")
    assert compare(a, b, [score("x")])["asked_otherwise"] == 2
    with pytest.raises(UserError, match="item 0 is another one"):
        compare(a, run("x", [1, 0], key="other"), [score("x")])
    with pytest.raises(UserError, match="1 items only in the earlier run, 0 only in this"):
        compare(a, run("x", [1]), [score("x")])
    with pytest.raises(UserError, match="has x, this one y"):
        same_items(a, run("y", [1]))


def test_tasks_that_only_one_run_has_are_left_out():
    found = compare(run("x", [1]) + run("z", [1]), run("y", [0]) + run("x", [0]), [score("x"), score("y")])
    assert [row["task"] for row in found["rows"]] == ["x"] and found["all"]["n"] == 1


def test_an_item_comes_back_from_its_line():
    one = Item("t", 3, "k", "a", "prompt", "B", "A", {"acc": 0.0}, ["A", "B"], [-1.0, -2.0])
    assert Item.from_dict(one.facts()) == one and "filtered" not in one.facts()


def test_items_without_a_value_are_left_out_of_a_mean_that_leaves_them_out():
    nan = float("nan")
    assert interval_of([nan, 0.25, 0.75, nan], "nanmean") == interval_of([0.25, 0.75], "mean")
    (row,) = compare(run("t", [nan, 0.0, 0.5]), run("t", [1.0, 0.5, 0.5]), [score("t", form="nanmean")])[
        "rows"
    ]
    assert (row["n"], row["a"], row["b"]) == (2, 0.25, 0.5) and row["interval"] is not None
