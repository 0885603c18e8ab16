"""The command line: what it lists, how it fails, and with which exit status."""

import json
import subprocess
import sys
import types

import pytest

from moesmith import cli, console
from moesmith.config import JobConfig
from moesmith.errors import UserError


class Config(JobConfig):
    model: str = "m"
    """Model folder."""


@pytest.fixture
def job(monkeypatch):
    """A command "inspect" whose run() the test supplies."""

    def make(run, **attributes):
        module = types.ModuleType("moesmith.jobs.inspect")
        module.__doc__ = "Look at it."
        vars(module).update(Config=Config, POSITIONAL=("model",), run=run, **attributes)
        monkeypatch.setattr(cli, "load", lambda name: module)
        monkeypatch.setitem(sys.modules, "moesmith.jobs.inspect", module)

    return make


def fail(error):
    def run(cfg):
        raise error

    return run


def test_help_lists_every_command_without_importing_torch():
    code = (
        "import sys; sys.argv = ['moesmith', '--help']; from moesmith import cli; cli.main(); "
        "heavy = {'torch', 'transformers', 'pydantic', 'rich'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in cli.commands():
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"  {name} "))
        assert len(line.split()) > 2, f"{name} has no help line"


@pytest.mark.parametrize("name", cli.commands())
def test_every_command_explains_every_key(name, capsys):
    from moesmith import config

    assert cli.main([name, "--help"]) == 0
    text = capsys.readouterr().out
    job = cli.load(name)
    for key in config.keys(job.Config):
        assert key.help, f"{name}: {key.name} has no docstring"
        shown = key.name.upper() if key.name in job.POSITIONAL else config.flag(key.name)
        assert shown in text
    assert text.splitlines()[-1].startswith("example: moesmith")


def test_help_of_a_command_does_not_import_torch():
    code = (
        "import sys; sys.argv = ['moesmith', 'x']; from moesmith import cli; "
        "[cli.main([name, '--help']) for name in ('inspect', 'quantize', 'chat')]; "
        "assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_wrong_path_is_refused_before_torch_is_imported():
    code = (
        "import sys; sys.argv = ['moesmith', 'x']; from moesmith import cli; "
        "codes = [cli.main([*argv]) for argv in (['inspect', './no'], ['chat', './no'], "
        "['chat', '--adapter', 'no'], ['quantize', './no', '--out', 'x'])]; "
        "assert codes == [2] * 4, codes; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("no such file") == 4


def test_unknown_command(capsys):
    assert cli.main(["inspct", "x"]) == 2
    assert (
        capsys.readouterr().err
        == "error: unknown command 'inspct'\n       did you mean `moesmith inspect`?\n"
    )


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    lines = dict(
        line.split() for line in capsys.readouterr().out.replace("not installed", "none").splitlines()
    )
    assert set(lines) == {"moesmith", "torch", "transformers", "peft", "trl"}


def test_user_errors_are_two_lines_and_status_2(job, capsys):
    job(fail(UserError("model: [x] is wrong", "do this\nor that")))
    assert cli.main(["inspect"]) == 2
    assert capsys.readouterr().err == "error: model: [x] is wrong\n       do this\n       or that\n"


def test_other_errors_travel(job):
    job(fail(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        cli.main(["inspect"])
    job(fail(RuntimeError("another")))
    with pytest.raises(RuntimeError, match="another"):
        cli.main(["inspect"])


def test_interrupt_is_130(job, capsys):
    job(fail(KeyboardInterrupt()))
    assert cli.main(["inspect"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def test_files_and_disks_are_one_line(job, capsys):
    job(fail(FileNotFoundError(2, "No such file or directory", "x.json")))
    assert cli.main(["inspect"]) == 2
    assert capsys.readouterr().err == "error: no such file or directory: x.json\n"
    job(fail(OSError(28, "No space left on device")))
    assert cli.main(["inspect"]) == 2
    assert "no space left" in capsys.readouterr().err
    job(fail(OSError("unnamed")))
    with pytest.raises(OSError, match="unnamed"):
        cli.main(["inspect"])


def test_out_of_memory_says_what_to_change(job, capsys):
    import torch

    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory.\n Tried to allocate 2 GiB"),
        RuntimeError(
            "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
        ),
    ):
        job(fail(error))
        assert cli.main(["inspect"]) == 2
        message, hint = capsys.readouterr().err.splitlines()
        assert message.startswith("error: out of memory") and "batch" in hint
    job(fail(MemoryError()), OUT_OF_MEMORY="halve --max-length")
    cli.main(["inspect"])
    assert capsys.readouterr().err.splitlines()[1].strip() == "halve --max-length"


def test_json_silences_the_lines_and_prints_the_facts(job, capsys):
    def run(cfg):
        console.say("a line")
        console.row("data", "6 rows")
        console.table(["", "a"], [["x", "1"]])
        console.emit({"model": cfg.model, "rows": 6})

    job(run, JSON=True)
    assert cli.main(["inspect", "folder", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "folder", "rows": 6}
    assert cli.main(["inspect", "folder"]) == 0
    assert capsys.readouterr().out == "a line\ndata     6 rows\n   a\nx  1\n"
    job(run)
    assert cli.main(["inspect", "--json"]) == 2


def test_a_pipe_gets_whole_lines(capsys):
    console.say("x" * 500 + " [not markup] :smile:")
    console.row("label", "y " * 300)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["x" * 500 + " [not markup] :smile:", "label    " + ("y " * 300).rstrip()]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (45_675_970_560, "45.7 GB"),
        (999_960_000, "1.0 GB"),
        (642_000_000, "642 MB"),
    ],
)
def test_sizes(value, text):
    assert console.size(value) == text


def test_counts_and_durations():
    assert [console.count(n) for n in (999, 6_919_161_856, 135e6)] == ["999", "6.92 B", "135 M"]
    assert [console.duration(s) for s in (0.42, 41, 185, 6730)] == ["0.4 s", "41 s", "3:05", "1:52:10"]
