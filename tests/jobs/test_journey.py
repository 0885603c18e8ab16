"""Phases that are kept: what is done again, and what is not."""

import json

import pytest

from moesmith.errors import UserError
from moesmith.jobs._journey import Journey


class Trip:
    """Three phases that write a file each and count how often they worked."""

    def __init__(self, out):
        self.out = out
        self.worked: list[str] = []

    def go(self, options=None, fresh=False, fail=None):
        self.worked.clear()
        journey = Journey(self.out, fresh, owned=["a", "b", "c"])
        phases = []
        for name in "abc":
            if name == fail:
                break
            phases.append(
                journey.phase(name, (options or {}).get(name, {}), [self.out / name], self.work(name))
            )
        return phases

    def work(self, name):
        def write():
            self.worked.append(name)
            (self.out / name).write_text(name)
            return {"name": name}

        return write


@pytest.fixture
def trip(tmp_path):
    return Trip(tmp_path / "out")


def test_a_second_run_does_nothing_again(trip):
    first = trip.go()
    assert trip.worked == ["a", "b", "c"] and not any(phase.kept for phase in first)
    second = trip.go()
    assert trip.worked == [] and all(phase.kept for phase in second)
    assert first == second  # facts, seconds and memory come from the file


def test_a_run_that_stopped_goes_on(trip):
    trip.go(fail="c")
    assert trip.go() and trip.worked == ["c"]


def test_a_changed_option_redoes_that_phase_and_all_after_it(trip):
    trip.go()
    trip.go({"b": {"k": 2}})
    assert trip.worked == ["b", "c"]
    trip.go({"b": {"k": 2}})
    assert trip.worked == []


def test_a_missing_file_redoes_its_phase_and_all_after_it(trip):
    trip.go()
    (trip.out / "b").unlink()
    trip.go()
    assert trip.worked == ["b", "c"]


def test_what_was_made_from_changed_things_is_forgotten_even_when_the_run_is_killed(trip):
    trip.go()
    trip.go({"b": {"k": 2}}, fail="c")  # b is new, c was never reached
    trip.go({"b": {"k": 2}})
    assert trip.worked == ["c"]


def test_a_phase_that_fails_leaves_the_earlier_ones(trip):
    def broken():
        raise RuntimeError("no")

    journey = Journey(trip.out)
    journey.phase("a", {}, [trip.out / "a"], trip.work("a"))
    with pytest.raises(RuntimeError, match="no"):
        journey.phase("b", {}, [trip.out / "b"], broken)
    trip.go()
    assert trip.worked == ["b", "c"]


def test_fresh_removes_what_the_journey_owns_and_nothing_else(trip):
    trip.go()
    (trip.out / "mine.txt").write_text("keep")
    trip.go(fresh=True)
    assert trip.worked == ["a", "b", "c"]
    assert (trip.out / "mine.txt").read_text() == "keep"


def test_results_are_readable(trip):
    trip.go()
    phases = json.loads((trip.out / "results.json").read_text())["phases"]
    assert list(phases) == ["a", "b", "c"]
    assert phases["b"]["facts"] == {"name": "b"}
    assert phases["b"]["seconds"] >= 0 and phases["b"]["peak_bytes"] > 1e6


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds something else"):
        Journey(tmp_path, fresh=True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]
