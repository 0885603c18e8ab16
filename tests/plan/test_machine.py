"""Sizes as people write them; rates that are remembered for one machine."""

import json

import pytest

from moesmith.errors import UserError
from moesmith.plan import machine
from moesmith.plan.machine import Machine, assumed, known, parse_size


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "moesmith" / "machine.json"


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("12GB", 12 * 10**9), ("8 GiB", 8 * 2**30), ("1.5gb", 15 * 10**8), ("500", 500), ("24G", 24 * 10**9)],
)
def test_a_size(text, nbytes):
    assert parse_size(text) == nbytes


@pytest.mark.parametrize("text", ["twelve", "12 apples", "-3GB", ""])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="is not a size"):
        parse_size(text)


def test_until_someone_measures_the_rates_are_defaults_and_say_so():
    assert known(False) == assumed(False) and not known(False).measured


def test_what_was_measured_is_remembered_for_this_machine_alone(cache, monkeypatch):
    found = Machine("here", False, 1e9, 2e9, 2e9, 3e8, 4e11, 5e9, 6e10, True)
    machine._remember(False, found)
    assert known(False) == found and not known(True).measured
    monkeypatch.setattr(machine.platform, "node", lambda: "elsewhere")
    assert known(False) == assumed(False)


def test_a_broken_file_is_as_good_as_none(cache):
    cache.parent.mkdir()
    for text in ("", "{", json.dumps({machine._key(False): {"name": "old"}}), "[]"):
        cache.write_text(text)
        assert known(False) == assumed(False)


def test_a_gpu_that_is_not_there_is_not_measured(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="no GPU to measure"):
        machine.measure(True)


@pytest.mark.slow
def test_this_machine_is_measured_and_every_rate_is_a_rate(tmp_path):
    found = machine.measure(False, tmp_path)
    rates = [
        getattr(found, name) for name in ("memory", "ram_copy", "link", "disk", "gemm", "packed", "rows")
    ]
    assert found.measured and min(rates) > 1e6
    assert known(False) == found


@pytest.mark.parametrize("text", ["0", "0GB", "0.1"])
def test_nothing_is_no_budget(text):
    with pytest.raises(UserError, match="no memory at all"):
        parse_size(text)
