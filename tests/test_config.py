"""Flags, YAML and defaults meet in one checked object; what is wrong is said in the user's words."""

from pathlib import Path
from typing import Literal

import pytest

from moesmith import config
from moesmith.config import JobConfig, parse
from moesmith.errors import UserError


class Train(JobConfig):
    """How it learns."""

    lr: float = 1e-4
    """Peak learning rate."""
    packing: bool | Literal["bfd"] = False
    """Several rows in one sequence."""
    kwargs: dict[str, int | float | str] = {}
    """Passed on as they are."""


class Example(JobConfig):
    model: str
    """Model folder."""
    out: Path | None = None
    """Where to write."""
    scheme: Literal["nf4", "int8"] = "nf4"
    """Storage."""
    linears: Literal["nf4", "int8"] | None = None
    """Same, for
    linears.

    A second paragraph is not for the help line.
    """
    tags: list[str] = []
    """Words."""
    steps: list[int] = [1, 2]
    """Numbers."""
    text: str = ""
    """Any text."""
    bias: bool = True
    """On or off."""
    train: Train = Train()
    """Training."""


def read(*argv: str, positional=("model",)) -> Example:
    return parse(Example, argv, positional)


def problem(*argv: str, positional=("model",)) -> UserError:
    with pytest.raises(UserError) as caught:
        read(*argv, positional=positional)
    return caught.value


def test_defaults_positional_and_sections():
    cfg = read("m", "--train.lr", "3e-5", "--out=x/y", "--train.kwargs.seed", "7")
    assert (cfg.model, cfg.train.lr, cfg.out, cfg.scheme) == ("m", 3e-5, Path("x/y"), "nf4")
    assert cfg.train.kwargs == {"seed": 7}
    assert read("--model", "m").model == "m"


@pytest.mark.parametrize(
    ("argv", "bias", "packing"),
    [
        ([], True, False),
        (["--no-bias"], False, False),
        (["--bias", "false", "--train.packing"], False, True),
        (["--bias", "--train.packing", "bfd"], True, "bfd"),
        (["--bias=no", "--no-train.packing"], None, None),
        (["--train.no-packing"], True, False),
    ],
)
def test_booleans(argv, bias, packing):
    if bias is None:
        with pytest.raises(UserError, match="unknown key --no-train.packing"):
            read("m", *argv)
    else:
        cfg = read("m", *argv)
        assert (cfg.bias, cfg.train.packing) == (bias, packing)


def test_a_boolean_flag_does_not_eat_the_positional():
    cfg = read("--bias", "m", "--no-bias")
    assert (cfg.model, cfg.bias) == ("m", False)


def test_a_flag_with_an_optional_number_takes_only_a_number():
    class Preview(JobConfig):
        preview: bool | int = False

    def preview(*argv: str):
        return parse(Preview, argv, ("config",)).preview

    assert preview("--preview") is True and preview("--preview", "3") == 3
    with pytest.raises(UserError, match="no such file: run.yaml"):
        preview("--preview", "run.yaml")


def test_a_section_left_out_names_the_key_it_needs():
    class Data(JobConfig):
        path: str
        """Rows to learn from."""

    class Needs(JobConfig):
        data: Data

    with pytest.raises(UserError) as caught:
        parse(Needs, [], ())
    assert (caught.value.message, caught.value.hint) == ("missing --data.path", "Rows to learn from.")


def test_words_stay_words():
    for text in ("no", "1e3", "12:30", "[a", "null and void", "- x"):
        assert read("m", "--text", text).text == text
    assert read("m", "--text=--dashes").text == "--dashes"
    assert read("m", "--linears", "none", "--out", "null").linears is None

    class OwnNone(JobConfig):
        scheme: Literal["nf4", "none"] | None = None

    assert parse(OwnNone, ["--scheme", "none"], ()).scheme == "none"


def test_lists():
    cfg = read("m", "--tags", "a,b", "--tags", "c", "--steps", "[3, 4]")
    assert (cfg.tags, cfg.steps) == (["a", "b", "c"], [3, 4])
    assert read("m", "--steps", "5,6").steps == [5, 6]


def test_negative_numbers_are_values():
    assert read("m", "--train.lr", "-1e-3").train.lr == -1e-3
    assert "needs a value" in problem("m", "--out", "--bias").message


def test_unknown_key_finds_the_right_section():
    assert problem("m", "--lr", "1").hint == "did you mean --train.lr?"
    assert problem("m", "--schme", "nf4").hint == "did you mean --scheme?"
    assert problem("m", "--train.lrr", "1").hint == "did you mean --train.lr?"
    assert problem("m", "-x").message == "unknown flag -x"


def test_values_are_checked_and_named():
    error = problem("m", "--scheme", "fp3", "--train.lr", "fast")
    assert error.message == "scheme=fp3: choose from nf4, int8"
    assert "train.lr=fast" in error.hint
    assert problem().message == "missing MODEL"
    assert problem("a", "b").message == "unexpected argument 'b'"
    assert "given twice" in problem("a", "--model", "b").message


def test_flags_win_over_the_file_and_the_file_over_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model: m\ntrain:\n  lr: 1e-6\n  packing: bfd\nscheme: int8\n")
    cfg = read(str(file), "--train.lr", "2", positional=("config",))
    assert (cfg.train.lr, cfg.train.packing, cfg.scheme, cfg.bias) == (2.0, "bfd", "int8", True)
    assert read("--model", "m", positional=("config",)).model == "m"


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("model: m\ntrain: {lrr: 1}\n", "unknown key train.lrr", "did you mean --train.lr?"),
        ("model: m\nmodel: n\n", "key 'model' is given twice", None),
        ("model: [m\n", "run.yaml:2", None),
        ("- model\n", "found a list", None),
        ("model: \xff", "not a text file", None),
    ],
)
def test_a_broken_file_says_where(tmp_path, text, message, hint):
    file = tmp_path / "run.yaml"
    file.write_bytes(text.encode("latin-1"))
    error = problem(str(file), positional=("config",))
    assert message in error.message
    assert hint is None or error.hint == hint


def test_a_missing_file_names_its_neighbour(tmp_path):
    (tmp_path / "chat.jsonl").touch()
    error = config.no_such_file(tmp_path / "chat.jsnl", "data.path")
    assert error.message == f"data.path: no such file: {tmp_path}/chat.jsnl"
    assert error.hint == "did you mean chat.jsonl? (same folder)"
    assert "does not exist either" in problem(str(tmp_path / "no/run.yaml"), positional=("config",)).hint


def test_saved_options_read_back_equal(tmp_path):
    cfg = read("m", "--out", "x", "--train.lr", "1e-7", "--tags", "ä,yes", "--text", "no: 'yes'\nline")
    file = tmp_path / "sub" / "run.yaml"
    config.save(cfg, file)
    assert read(str(file), positional=("config",)) == cfg
    assert [p.name for p in file.parent.iterdir()] == ["run.yaml"]


def test_help_lines_come_from_the_docstrings_under_the_fields():
    lines = {key.name: key for key in config.keys(Example)}
    assert lines["linears"].help == "Same, for linears."
    assert lines["train.lr"].help == "Peak learning rate." and lines["train.lr"].default == "0.0001"
    assert lines["model"].required and not lines["out"].required
    assert config.choices(lines["linears"].annotation) == ("nf4", "int8")
    assert dict(config.sections(Example)) == {"train": "Training."}


def test_an_error_raised_in_a_check_keeps_its_hint():
    from pydantic import field_validator

    class Checked(JobConfig):
        size: int = 1

        @field_validator("size")
        @classmethod
        def even(cls, value: int) -> int:
            if value % 2:
                raise UserError("must be even", "try 2")
            return value

    with pytest.raises(UserError) as caught:
        parse(Checked, ["--size", "3"], ())
    assert (caught.value.message, caught.value.hint) == ("size: must be even", "try 2")


class Part(JobConfig):
    """One of several."""

    path: str
    """A path."""
    weight: float = 1.0
    """A number."""
    words: list[str] = []
    """Words."""
    kind: Literal["a", "b"] = "a"
    """One of two."""


class Whole(JobConfig):
    name: str
    """A name."""
    parts: list[Part] | None = None
    """Several."""


@pytest.mark.parametrize(
    ("part", "message", "hint"),
    [
        ({"path": "x", "wieght": 2}, "unknown key parts[1].wieght", "did you mean weight?"),
        ({"path": "x", "zzz": 2}, "unknown key parts[1].zzz", "keys there: path, weight, words, kind"),
        ({"weight": 1}, "missing parts[1].path", "A path."),
        ({"path": "x", "kind": "c"}, "parts[1].kind=c: choose from a, b", None),
        ({"path": "x", "words": [1]}, "parts[1].words[0]=1: wanted text (a number in quotes)", "Words."),
        ({"path": "x", "words": None}, "parts[1].words=null: wanted a list", "Words."),
    ],
)
def test_a_key_inside_a_list_of_sections_is_named_with_its_place(part, message, hint):
    for as_flags in (True, False):
        with pytest.raises(UserError) as caught:
            config.validate(Whole, {"name": "n", "parts": [{"path": "fine"}, part]}, as_flags=as_flags)
        assert (caught.value.message, caught.value.hint) == (message, hint)


def test_a_path_of_the_wrong_kind_is_not_said_to_be_missing(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path} is a folder, wanted a file"):
        config.load_yaml(tmp_path)
    file = tmp_path / "there"
    file.touch()
    assert config.no_such_file(file, "adapter").message == f"adapter: {file} is a file, wanted a folder"
    file.write_text("a: 1\n---\nb: 2\n")
    with pytest.raises(UserError, match="single document in the stream, but found another"):
        config.load_yaml(file)


def test_a_file_whose_keys_are_no_flags_is_answered_without_dashes():
    with pytest.raises(UserError) as caught:
        config.validate(Whole, {"nam": "n"}, as_flags=False)
    assert (caught.value.message, caught.value.hint) == (
        "unknown key nam",
        "did you mean name?\nalso: missing name",
    )
    with pytest.raises(UserError) as caught:
        config.validate(Whole, {"name": "n", "parts": [{"path": "fine"}, "path"]}, as_flags=False)
    assert caught.value.message == "parts[1]=path: wanted `key: value` lines"


class Keyword(JobConfig):
    for_: Literal["peft", "vllm"] = "peft"
    """For whom."""


def test_a_key_that_is_a_word_of_python_is_typed_without_its_underscore():
    assert parse(Keyword, ["--for", "vllm"]).for_ == "vllm"
    with pytest.raises(UserError, match="^for=gguf: choose from peft, vllm"):
        parse(Keyword, ["--for", "gguf"])
    with pytest.raises(UserError) as wrong:
        parse(Keyword, ["--four", "vllm"])
    assert "--for?" in (wrong.value.hint or "")
