"""What a policy allows, and the order in which layers are wanted."""

from __future__ import annotations

import itertools

import pytest

from moesmith.errors import UserError
from moesmith.experts.residency.policy import Course, Policy


def test_one_word_or_one_home_per_layer():
    assert [Policy("ram").home(i) for i in (0, 7)] == ["ram", "ram"]
    mixed = Policy(("device", "disk"))
    assert [mixed.home(i) for i in (0, 1)] == ["device", "disk"]
    mixed.check(2)
    with pytest.raises(UserError, match="2 homes for 3 MoE layers"):
        mixed.check(3)


@pytest.mark.parametrize("wrong", [{"homes": "gpu"}, {"homes": ("ram", "dsik")}, {"kept": -1}, {"slots": -2}])
def test_nonsense_is_refused(wrong):
    with pytest.raises(UserError):
        Policy(**wrong)


def test_the_hottest_are_kept_and_then_the_first():
    policy = Policy(kept=3, hot={1: [6, 2, 5, 0], 2: [7]})
    assert policy.kept_experts(0, 8) == [0, 1, 2]
    assert policy.kept_experts(1, 8) == [6, 2, 5]
    assert policy.kept_experts(2, 8) == [7, 0, 1]
    assert Policy(kept=9).kept_experts(0, 4) == [0, 1, 2, 3]
    assert Policy(hot={0: [1]}).kept_experts(0, 4) == []


@pytest.mark.parametrize("hot", [[8], [-1], [3, 3]])
def test_hot_experts_the_layer_does_not_have(hot):
    with pytest.raises(UserError, match="hot experts of layer 4"):
        Policy(kept=1, hot={4: hot}).kept_experts(4, 8)
    with pytest.raises(UserError, match=r"hot experts of layers \[4\]"):
        Policy(kept=1, hot={4: hot}).check(3)


def walk(layers, visits, training=True):
    """What is wanted next, after each visit."""
    course = Course(layers)
    for layer in visits:
        course.reach(layer, training)
        yield list(course.upcoming())


def test_training_goes_up_and_comes_down():
    assert list(walk([0, 1, 2], [0, 1, 2, 2, 1, 0, 0, 1])) == [
        [0, 1, 2],
        [1, 2, 0],
        [2, 1, 0],
        [2, 1, 0],
        [1, 0, 2],
        [0, 1, 2],
        [0, 1, 2],
        [1, 2, 0],
    ]


def test_without_training_it_only_goes_up():
    assert list(walk([0, 1, 2], [0, 1, 2, 0, 1], training=False)) == [
        [0, 1, 2],
        [1, 2],
        [2],
        [0, 1, 2],
        [1, 2],
    ]


def test_layers_that_never_move_are_not_on_the_course():
    assert list(walk([1, 4, 5], [1, 4, 5, 5, 4])) == [[1, 4, 5], [4, 5, 1], [5, 4, 1], [5, 4, 1], [4, 1, 5]]


def test_every_prediction_of_two_steps_in_training_is_right():
    visits = [0, 1, 2, 3, 3, 2, 1, 0] * 2
    for (now, wanted), after in itertools.pairwise(zip(visits, walk(range(4), visits), strict=True)):
        following = after[0]
        assert following == now or wanted[1] == following
