"""One writer per output folder."""

import signal
import subprocess
import sys

import pytest

from moesmith import cli
from moesmith.errors import UserError
from moesmith.jobs._lock import only_writer

HOLD = """
import sys, time
from pathlib import Path
from moesmith.jobs._lock import only_writer
with only_writer(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def holder(out):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_writer_is_refused_and_told_who_the_first_is(tmp_path):
    first = holder(tmp_path / "out")
    try:
        with pytest.raises(UserError, match=f"written by process {first.pid}"), only_writer(tmp_path / "out"):
            pass
        (tmp_path / "link").symlink_to(tmp_path / "out")
        with pytest.raises(UserError, match="written by"), only_writer(tmp_path / "link"):
            pass
        with only_writer(tmp_path / "other"):
            pass
    finally:
        first.kill()
        first.wait()


def test_a_home_folder_is_one_folder_however_it_is_written_and_the_holder_is_named_alone(tmp_path):
    """`~` is the home folder; what an earlier, longer number left in the lock is not part of the name."""
    out = tmp_path / "home" / "out"
    with only_writer("~/out"):
        pass
    [lock] = (tmp_path / "home" / ".cache" / "moesmith" / "locks").iterdir()
    lock.write_text("987654321987\n")
    first = holder(out)
    try:
        with pytest.raises(UserError) as refused, only_writer("~/out"):
            pass
        assert refused.value.message == f"~/out is being written by process {first.pid}"
    finally:
        first.kill()
        first.wait()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM])
def test_a_dead_writer_holds_nothing(tmp_path, end):
    first = holder(tmp_path / "out")
    first.send_signal(end)
    first.wait()
    with only_writer(tmp_path / "out"):
        pass


def test_the_output_holds_nothing_of_it_and_no_home_is_no_obstacle(tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    with only_writer(tmp_path / "out"):
        assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with only_writer(str(tmp_path / "out")), only_writer(None):
        pass


def test_commands_hold_it(tmp_path, checkpoint, capsys):
    first = holder(tmp_path / "out")
    try:
        assert cli.main(["quantize", str(checkpoint("olmoe")), "--out", str(tmp_path / "out")]) == 2
    finally:
        first.kill()
        first.wait()
    assert f"is being written by process {first.pid}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
