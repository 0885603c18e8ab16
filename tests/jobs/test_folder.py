"""An output folder is whole or not there, and nobody else's work is touched."""

from __future__ import annotations

import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from moesmith.errors import UserError
from moesmith.jobs._folder import INCOMPLETE, check_place, check_space, finish_folder, start_folder
from moesmith.models.rewrite import plan_tensors


def folder(path: Path, *files: str) -> Path:
    path.mkdir(parents=True)
    for name in files:
        (path / name).write_text(name)
    return path


def test_a_free_place(tmp_path: Path):
    check_place(tmp_path / "out", tmp_path / "in", overwrite=False)
    check_place(folder(tmp_path / "empty"), None, overwrite=False)


def test_what_is_there_is_replaced_only_when_asked_and_ours(tmp_path: Path):
    theirs = folder(tmp_path / "theirs", "thesis.tex")
    ours = folder(tmp_path / "ours", "moesmith.json")
    profile = folder(tmp_path / "profile", "profile.json")
    for out in (theirs, ours, profile):
        with pytest.raises(UserError, match="exists\nchoose another --out, or --overwrite"):
            check_place(out, None, overwrite=False)
    check_place(ours, None, overwrite=True)
    check_place(profile, None, overwrite=True, record="profile.json")
    for out, record in ((theirs, "moesmith.json"), (ours, "profile.json")):
        with pytest.raises(UserError, match=f"has no {record}: .* leaves it alone"):
            check_place(out, None, overwrite=True, record=record)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(UserError, match="leaves it alone"):
        check_place(file, None, overwrite=True)


def test_the_model_is_never_the_output_nor_inside_it(tmp_path: Path):
    out = folder(tmp_path / "out", "moesmith.json")
    with pytest.raises(UserError, match="is the model itself"):
        check_place(out, tmp_path / "x" / ".." / "out", overwrite=True)
    with pytest.raises(UserError, match="holds the model that is read"):
        check_place(out, folder(out / "model"), overwrite=True)


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1_000_000))
    check_space(tmp_path / "not" / "there", 900_000, "a small model")
    with pytest.raises(UserError, match="1.0 MB free, the pruned model takes 2.0 MB"):
        check_space(tmp_path / "not" / "there", 2_000_000, "the pruned model")


def test_start_and_finish(tmp_path: Path):
    out = folder(tmp_path / "out", "moesmith.json", "old")
    temporary = start_folder(out)
    assert (temporary / INCOMPLETE).exists() and temporary.parent == tmp_path
    folder(temporary / "inner", "words").joinpath("words").chmod(0o600)
    (temporary / "new").write_text("new")
    finish_folder(temporary, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert {str(path.relative_to(out)) for path in out.rglob("*")} == {"new", "inner", "inner/words"}
    assert (out / "inner" / "words").stat().st_mode & 0o777 == 0o644


def test_what_a_killed_run_left_is_removed_and_nothing_else(tmp_path: Path):
    out = tmp_path / "out"
    (start_folder(out) / "half.safetensors").write_text("half")
    assert [path.name for path in start_folder(out).iterdir()] == [INCOMPLETE]
    folder(tmp_path / "other.tmp", "work")
    with pytest.raises(UserError, match="other.tmp is in the way"):
        start_folder(tmp_path / "other")
    assert (tmp_path / "other.tmp" / "work").exists()


def test_links_and_mount_points(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What is written lies on the disk of the folder that a link leads to; the link stays one."""
    big = folder(tmp_path / "big" / "there", "moesmith.json", "old")
    link = tmp_path / "link"
    link.symlink_to(big)
    check_place(link, None, overwrite=True)
    asked = []
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(path) or usage)
    check_space(link, 1, "it")
    temporary = start_folder(link)
    assert temporary.parent == tmp_path / "big" == asked[0]
    (temporary / "new").write_text("new")
    finish_folder(temporary, link)
    assert link.is_symlink() and [path.name for path in link.iterdir()] == ["new"]
    assert [path.name for path in (tmp_path / "big").iterdir()] == ["there"]

    with pytest.raises(
        UserError, match=r"is where a disk is mounted.*\ngive a folder below it: --out /proc/out"
    ):
        check_place(Path("/proc"), None, overwrite=False)
    for here in (folder(tmp_path / "here"), folder(tmp_path / "here" / "below")):
        monkeypatch.chdir(here)
        with pytest.raises(UserError, match="is the folder you are in"):
            check_place(Path("."), None, overwrite=False)
    with pytest.raises(UserError, match="is the folder you are in, or holds it"):
        check_place(tmp_path / "here", None, overwrite=True)


def test_an_empty_folder_is_filled(tmp_path: Path):
    out = folder(tmp_path / "out")
    finish_folder(start_folder(out), out)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] and not list(out.iterdir())


class Killed(BaseException):
    pass


STEPS = {"rmtree": (shutil, "rmtree"), "first rename": (Path, "rename"), "second rename": (Path, "rename")}


@pytest.mark.parametrize("step", STEPS)
def test_a_run_killed_at_the_very_end_loses_no_output(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = folder(tmp_path / "out", "moesmith.json", "old")
    folder(out / "inner", "x")
    temporary = start_folder(out)
    (temporary / "new").write_text("new")
    holder, name = STEPS[step]
    real, calls = getattr(holder, name), []

    def killed(*args: object, **kwargs: object) -> object:
        calls.append(args)
        if step != "second rename" or len(calls) == 2:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(holder, name, killed)
        finish_folder(temporary, out)
    if step == "rmtree":  # the new one is there; what is left of the old one goes with the next run
        assert (out / "new").exists() and (tmp_path / "out.old").exists()
        finish_folder(start_folder(out), out)
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        return
    hint = f"mv {temporary} {out}" if step == "second rename" else f"rm -r {temporary}"
    for call in (lambda: start_folder(out), lambda: check_place(out, None, overwrite=True)):
        with pytest.raises(UserError, match=f"is a finished output.*\n{hint}"):
            call()
    assert (temporary / "new").exists()
    kept = out if step == "first rename" else tmp_path / "out.old"
    assert (kept / "inner" / "x").exists()


def test_the_marker_of_what_is_removed_goes_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def killed(path: Path) -> None:
        raise Killed

    out = folder(tmp_path / "out", "moesmith.json", "old")
    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        finish_folder(start_folder(out), out)
    assert [path.name for path in (tmp_path / "out.old").iterdir()] == [INCOMPLETE]


def test_an_old_folder_that_is_not_ours_is_said_before_the_work(tmp_path: Path):
    folder(tmp_path / "out", "moesmith.json")
    folder(tmp_path / "out.old", "thesis.tex")
    with pytest.raises(UserError, match="out.old is in the way"):
        check_place(tmp_path / "out", None, overwrite=True)
    with pytest.raises(UserError, match="out.old is in the way"):
        start_folder(tmp_path / "out")
    assert (tmp_path / "out.old" / "thesis.tex").exists()


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
sys.argv[0] = "moesmith"  # as the command line does: the package registers nothing on import
from moesmith.jobs._folder import finish_folder, start_folder
from moesmith.models.rewrite import rewrite_checkpoint

source, out = Path(sys.argv[1]), Path(sys.argv[2])
plan = pickle.load(sys.stdin.buffer)
written = 0
def on_bytes(count):
    global written
    written += count
    if written > 100_000 and sys.argv[3] == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
temporary = start_folder(out)
rewrite_checkpoint(source, temporary, {}, on_bytes, shard_bytes=50_000, plan=plan)
finish_folder(temporary, out)
assert not {"torch", "transformers"} & set(sys.modules)
"""


def test_a_rewrite_killed_midway_leaves_no_folder_under_the_final_name(checkpoint, tmp_path: Path):
    """And a copy that was planned needs no torch."""
    source, out = checkpoint("olmoe"), tmp_path / "out"
    plan = plan_tensors(source, {f"model.layers.{i}.mlp": [0, 2, 3] for i in range(3)})
    command = [sys.executable, "-c", KILLED, str(source), str(out)]
    killed = subprocess.run([*command, "kill"], input=pickle.dumps(plan), capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert not out.exists() and (tmp_path / "out.tmp" / INCOMPLETE).exists()
    assert list((tmp_path / "out.tmp").glob("*.safetensors"))
    done = subprocess.run([*command, "finish"], input=pickle.dumps(plan), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert json.loads((out / "config.json").read_text())["num_experts"] == 3
    assert len(list(out.glob("*.safetensors"))) > 3
