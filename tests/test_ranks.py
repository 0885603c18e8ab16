"""Ranks in a single process, and what follows from numbers alone; tests/distributed has several."""

import os
import signal
import socket

import pytest

from moesmith import cli, ranks


class Store(dict):
    """The launcher's store, in this process."""

    def set(self, key, value):
        self[key] = value

    def get(self, key):
        return self[key].encode()

    def check(self, keys):
        return all(key in self for key in keys)

    def compare_set(self, key, expected, value):
        if self.setdefault(key, value if not expected else expected) == expected:
            self[key] = value
        return self[key].encode()


@pytest.fixture
def second_of_three(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")


def test_without_a_launcher_there_is_one_rank_and_nothing_is_waited_for(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")  # some schedulers set it for every program
    assert (ranks.rank(), ranks.world(), ranks.is_main()) == (0, 1, True)
    ranks.join()
    ranks.barrier()
    assert ranks.gather("mine") == ["mine"]
    assert ranks.share([1, 2, 3]) == [1, 2, 3]
    assert not ranks.lost(RuntimeError("Connection closed by peer"))
    ranks.leave()


def test_shares_are_every_third_and_go_together_again(second_of_three, monkeypatch):
    assert (ranks.rank(), ranks.world(), ranks.is_main()) == (1, 3, False)
    for n in range(8):
        parts = []
        for rank in range(3):
            monkeypatch.setenv("RANK", str(rank))
            parts.append(ranks.share(range(n)))
        assert ranks.in_order(parts) == list(range(n))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_a_broken_connection_is_told_from_other_errors(second_of_three):
    assert ranks.lost(RuntimeError("[gloo/transport/tcp/pair.cc:561] Connection closed by peer [::1]:2"))
    assert not ranks.lost(RuntimeError("DefaultCPUAllocator: can't allocate memory"))
    assert not ranks.lost(ValueError("Connection closed by peer"))


def test_a_command_for_one_process_says_so(second_of_three, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setattr(ranks, "tell", lambda reason: True)
    assert cli.main(["inspect", "some-model"]) == 2
    assert "inspect runs in one process, and this is 1 of 3" in capsys.readouterr().err


@pytest.fixture
def store(second_of_three, monkeypatch):
    made = Store()
    monkeypatch.setattr(ranks, "_store", lambda: made)
    monkeypatch.setattr(ranks, "PATIENCE", 0.3)
    return made


def test_a_rank_that_is_busy_is_not_taken_for_the_killed_one(store):
    """Rank 0 runs and has not noticed yet; rank 2's process is no more. One that asks is there too."""
    store.set(ranks._key("process", 0), f"{socket.gethostname()} {os.getpid()}")
    store.set(ranks._key("process", 2), f"{socket.gethostname()} {2**22 + 1}")
    assert ranks.why() == ([2], None)
    store.set(ranks._key("asks", 2), "")
    store.set(ranks._key("process", 0), f"another-machine {os.getpid()}")
    assert ranks.why() == ([0], None)


def test_the_first_reason_is_kept_and_said_once(store, monkeypatch):
    assert ranks.tell("the disk is full")
    monkeypatch.setenv("RANK", "2")
    assert not ranks.tell("the disk is full")
    assert ranks.tell("something else")
    assert ranks.why() == ([1], "the disk is full")


def test_a_run_that_the_launcher_starts_anew_has_no_reason_from_before(store, monkeypatch):
    ranks.tell("the disk is full")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert ranks.why()[1] is None
    assert ranks.tell("the disk is full")


def test_a_process_that_the_launcher_stops_says_which_one_died(store, monkeypatch, capsys):
    """Before and after training, where nothing else listens."""
    store.set(ranks._key("asks", 0), "")

    def stopped(argv):
        ranks.listen()
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("SIGTERM was not heard")

    monkeypatch.setattr(cli, "_main", stopped)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert cli.main(["profile"]) == 143
        assert "rank 2 of this run ended without a word" in capsys.readouterr().err
        store.pop(ranks._key("ended"))
        store.set(ranks._key("asks", 2), "")
        assert ranks.ended().message == "the run was told to stop"
    finally:
        signal.signal(signal.SIGTERM, before)
