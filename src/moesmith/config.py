"""One options class per command: it is the YAML file, the flags, and the record saved beside the output.

A command declares `class Config(JobConfig)`; the docstring under each field is that flag's `--help` line, and
a field whose type is another JobConfig is a section (`train.lr` in YAML is `train: {lr: ...}`, as a flag
`--train.lr`). Flags win over the YAML file, the file wins over the defaults, and a key nobody declared is an
error.
"""

from __future__ import annotations

import difflib
import os
import re
import tempfile
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

import pydantic
import yaml
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from moesmith.errors import UserError

C = TypeVar("C", bound="JobConfig")


class JobConfig(pydantic.BaseModel):
    """Options of a command, or of one section of them. Unknown keys are refused; assignments are checked."""

    model_config = pydantic.ConfigDict(
        extra="forbid", use_attribute_docstrings=True, validate_assignment=True, protected_namespaces=()
    )


@dataclass(frozen=True)
class Key:
    """One leaf option: `name` is dotted (`train.lr`), `default` is what the help prints ("" if required)."""

    name: str
    annotation: Any
    default: str
    required: bool
    help: str


# ---------------------------------------------------------------- what keys there are


def keys(cls: type[JobConfig], prefix: str = "") -> Iterator[Key]:
    """Every leaf option of `cls`, sections flattened, in the order of declaration."""
    for name, field in cls.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            yield from keys(section, f"{prefix}{name}.")
        else:
            yield Key(
                f"{prefix}{name}",
                field.annotation,
                _default(field),
                field.is_required(),
                _one_line(field.description),
            )


def flag(name: str) -> str:
    """How a key is typed: train.max_length is --train.max-length; `for_`, a word of Python, is --for."""
    return "--" + name.removesuffix("_").replace("_", "-")


def sections(cls: type[JobConfig], prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, one-line help) of every section of `cls`."""
    for name, field in cls.model_fields.items():
        section = _section(field.annotation)
        if section is not None:
            inherited = section.__doc__ == JobConfig.__doc__
            yield f"{prefix}{name}", _one_line(field.description or (None if inherited else section.__doc__))
            yield from sections(section, f"{prefix}{name}.")


def choices(annotation: Any) -> tuple[str, ...]:
    """The words an option accepts, when it is (or contains) a Literal: for help lines and messages."""
    parts = _parts(annotation)
    words = [str(c) for part in parts if isinstance(part, _Words) for c in part.words]
    return tuple((["true", "false"] if words and bool in parts else []) + words)


@dataclass(frozen=True)
class _Words:
    words: tuple[Any, ...]


def _parts(annotation: Any) -> list[Any]:
    """Union members of an annotation, flat: `str | None` -> [str, NoneType]; a Literal -> [_Words(...)]."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _parts(typing.get_args(annotation)[0])
    if origin is Union or origin is types.UnionType:
        return [part for member in typing.get_args(annotation) for part in _parts(member)]
    if origin is Literal:
        return [_Words(typing.get_args(annotation))]
    return [annotation]


def _section(annotation: Any) -> type[JobConfig] | None:
    for part in _parts(annotation):
        if isinstance(part, type) and issubclass(part, JobConfig):
            return part
    return None


def _is_list(annotation: Any) -> bool:
    return any((typing.get_origin(part) or part) in (list, tuple, set) for part in _parts(annotation))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return ""
    value = (
        field.get_default(call_default_factory=True) if field.default is PydanticUndefined else field.default
    )
    if value is None:
        return "not given" if "none" in choices(field.annotation) else "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple, set)):
        return ",".join(str(v) for v in value) or "none"
    return str(value)


def _one_line(text: str | None) -> str:
    """The first paragraph, on one line."""
    return " ".join((text or "").strip().split("\n\n")[0].split())


# ---------------------------------------------------------------- reading flags and files


def parse(cls: type[C], argv: Sequence[str], positional: Sequence[str] = ("model",)) -> C:
    """Arguments -> a checked instance.

    Args:
        argv: what follows the command's name.
        positional: field names taken in order from the arguments that are not flags. The name "config" stands
            for a YAML file merged under the flags; it may be left out.

    `--a.b value`, `--a.b=value`, `--flag` and `--no-flag` for booleans. Dashes and underscores are the same.
    Lists are `a,b` or `[a, b]`, and a repeated list flag adds to it; anything else repeated: the last one
    counts.

    Raises:
        UserError: an unknown key, a missing or ill-typed value, an unreadable file.
    """
    known = {key.name: key for key in keys(cls)}
    free: list[str] = []
    given: dict[str, Any] = {}
    tokens = list(argv)
    while tokens:
        token = tokens.pop(0)
        if token == "--":
            free += tokens
            break
        if token == "-" or not token.startswith("-") or _is_number(token):
            free.append(token)
        elif not token.startswith("--"):
            raise UserError(f"unknown flag {token}", "flags are spelled out: --key value; --help lists them")
        else:
            _take_flag(token, tokens, known, cls, given)

    values: dict[str, Any] = {}
    names = list(positional)
    if len(free) > len(names):
        wanted = " ".join(name.upper() for name in names) or "none"
        raise UserError(f"unexpected argument {free[len(names)]!r}", f"arguments without a flag: {wanted}")
    for name, value in zip(names, free, strict=False):
        if name == "config":
            values = load_yaml(value)
        elif name in given:
            raise UserError(f"{name} was given twice: {value!r} and --{name} {given[name]!r}")
        else:
            given[name] = _read(value, known[name].annotation) if name in known else value
    for dotted, value in given.items():
        _put(values, dotted, value)
    return validate(cls, values, positional)


def _take_flag(
    token: str, rest: list[str], known: dict[str, Key], cls: type[JobConfig], given: dict[str, Any]
) -> None:
    """Consume one `--flag` (and its value from `rest`) into `given`."""
    typed, equals, inline = token[2:].partition("=")
    name = typed.replace("-", "_")
    name = name if name in known or f"{name}_" not in known else f"{name}_"  # see `flag`
    key = known.get(name) or _inside_dict(cls, name)
    if key is None:
        head, _, leaf = name.rpartition(".")
        positive = f"{head}.{leaf[3:]}".lstrip(".") if leaf.startswith("no_") else ""
        if not equals and positive in known and bool in _parts(known[positive].annotation):
            given[positive] = False
            return
        raise UserError(f"unknown key --{typed}", _did_you_mean(name, known))
    parts = _parts(key.annotation)
    if equals:
        value = inline
    elif bool in parts and not _has_value(rest, parts):
        given[name] = True
        return
    elif not _has_value(rest):
        raise UserError(f"--{typed} needs a value", key.help or None)
    else:
        value = rest.pop(0)
    read = _read(value, key.annotation)
    if _is_list(key.annotation) and isinstance(given.get(name), list) and isinstance(read, list):
        read = given[name] + read
    given[name] = read


def _has_value(rest: list[str], parts: Sequence[Any] = (str,)) -> bool:
    """Whether the next argument is this flag's value. A flag that may stand alone takes only what fits it."""
    if not rest:
        return False
    if bool in parts and str not in parts and Path not in parts:
        words = ("true", "false", *(str(w) for part in parts if isinstance(part, _Words) for w in part.words))
        is_number = bool({int, float} & {p for p in parts if isinstance(p, type)})
        return rest[0].lower() in words or (is_number and re.fullmatch(_NUMBER, rest[0]) is not None)
    return not rest[0].startswith("-") or rest[0] == "-" or _is_number(rest[0]) or " " in rest[0]


_NUMBER = r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?"


def _is_number(token: str) -> bool:
    return re.fullmatch(_NUMBER, token) is not None


def _inside_dict(cls: type[JobConfig], name: str) -> Key | None:
    """A key inside a free-form mapping field: `--peft.kwargs.x 1` where `peft.kwargs` is a dict."""
    for key in keys(cls):
        is_dict = any((typing.get_origin(p) or p) is dict for p in _parts(key.annotation))
        if is_dict and name.startswith(key.name + "."):
            return Key(name, Any, "", False, key.help)
    return None


def _read(text: str, annotation: Any) -> Any:
    """A flag's text as the value its type asks for; pydantic does the final check."""
    parts = _parts(annotation)
    nothing = type(None) in parts
    if nothing and text.lower() in ("none", "null") and text not in choices(annotation):
        return None
    if _is_list(annotation) and not text.startswith(("[", "{")):
        return [item.strip() for item in text.split(",") if item.strip()]
    if all(p in (str, Path, type(None)) or isinstance(p, _Words) for p in parts):
        return text  # words stay words: "no", "1e3" and "12:30" mean other things in YAML
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        return text


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *path, leaf = dotted.split(".")
    for step in path:
        inner = values.get(step)
        if not isinstance(inner, dict):
            inner = values[step] = {}
        values = inner
    values[leaf] = value


class _Loader(yaml.SafeLoader):
    """YAML with two traps closed: a key given twice is an error, and 1e-4 is a number."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value:
            key = key_node.value
            if isinstance(key, str) and key != "<<":
                if key in seen:
                    raise yaml.constructor.ConstructorError(
                        None, None, f"key {key!r} is given twice", key_node.start_mark
                    )
                seen.add(key)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def load_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file holding one mapping. Raises UserError naming the file and the line."""
    path = Path(path)
    if not path.is_file():
        raise no_such_file(path)
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text file ({error.reason} at byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "not valid YAML"
        if problem.startswith("but "):  # the other half of a sentence
            problem = f"{getattr(error, 'context', None) or 'not valid YAML'}, {problem}"
        raise UserError(f"{where}: {problem}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected `key: value` lines at the top, found a {type(values).__name__}")
    return values


def validate(
    cls: type[C], values: dict[str, Any], positional: Sequence[str] = (), as_flags: bool = True
) -> C:
    """A mapping -> a checked instance. Raises UserError with the first problem, the others in its hint.

    Args:
        as_flags: messages write keys as flags; False for a file whose keys are no flags.
    """
    try:
        return cls.model_validate(values)
    except pydantic.ValidationError as error:
        found = error.errors()
    if not as_flags:  # a key that is misspelled is also missing: the first says more
        found.sort(key=lambda problem: problem["type"] != "extra_forbidden")
    problems = [
        _explain(problem, cls, positional)
        if as_flags and not _in_list(problem)
        else _explain_in_file(problem, cls)
        for problem in found
    ]
    problems = list(dict.fromkeys(problems))  # every member of a union complains
    message, hint = problems[0]
    more = [f"also: {m}" for m, _ in problems[1:6]]
    raise UserError(message, "\n".join([*([hint] if hint else []), *more]) or None)


def _explain(problem: Any, cls: type[JobConfig], positional: Sequence[str]) -> tuple[str, str | None]:
    """One pydantic problem as (message, hint), in the user's words."""
    known = {key.name: key for key in keys(cls)}
    loc = [str(step) for step in problem["loc"]]
    # pydantic appends the union member it tried (`str`, `list[int]`): keep the longest declared prefix
    name = next((n for n in (".".join(loc[:i]) for i in range(len(loc), 0, -1)) if n in known), ".".join(loc))
    key = known.get(name)
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return (f"{name}: {cause.message}" if name else cause.message), cause.hint
    if problem["type"] == "missing":
        inside = [k for k in known.values() if k.required and k.name.startswith(name + ".")]
        if key is None and inside:  # a section that was left out whole
            name, key = inside[0].name, inside[0]
        label = name.upper() if name in positional else flag(name)
        return f"missing {label}", (key.help or None) if key else None
    if problem["type"] == "extra_forbidden":
        return f"unknown key {name}", _did_you_mean(name, known)
    words = choices(key.annotation) if key else ()
    if words and problem["type"] in ("literal_error", "bool_type", "bool_parsing", "none_required"):
        shown = name.removesuffix("_")
        return f"{shown}={_show(problem['input'])}: choose from {', '.join(words)}", None
    text = problem["msg"]
    text = text.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if problem["type"] in ("value_error", "assertion_error") and not name:
        return text, None
    return f"{name}={_show(problem['input'])}: {text[:1].lower()}{text[1:]}", None


def _in_list(problem: Any) -> bool:
    """Whether a problem lies in one of a list of sections, which no flag reaches."""
    steps = problem["loc"]
    return any(isinstance(step, int) for step in steps[:-1])


def _explain_in_file(problem: Any, cls: type[JobConfig]) -> tuple[str, str | None]:
    """One pydantic problem as (message, hint), with the place as it is in the file: experts[0].name."""
    section: type[JobConfig] | None = cls
    annotation: Any = None
    about: str | None = None
    name, leaf = "", ""
    for step in problem["loc"]:
        if isinstance(step, int):
            name += f"[{step}]"
            annotation = _element(annotation)
        elif section is None:
            continue  # the union member that pydantic tried
        else:
            leaf = str(step)
            name += f".{leaf}" if name else leaf
            known = dict(section.model_fields)
            annotation = known[leaf].annotation if leaf in known else None
            about = known[leaf].description if leaf in known else None
            if leaf not in known:
                break
        section = _section(annotation)
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return (f"{name}: {cause.message}" if name else cause.message), cause.hint
    if problem["type"] == "missing":
        return f"missing {name}", _one_line(about) or None
    if problem["type"] == "extra_forbidden" and section is not None:
        return f"unknown key {name}", _nearest(leaf, section)
    words = choices(annotation)
    if words and problem["type"] == "literal_error":
        return f"{name}={_show(problem['input'])}: choose from {', '.join(words)}", None
    if problem["type"] in WANTED:
        return f"{name}={_show(problem['input'])}: {WANTED[problem['type']]}", _one_line(about) or None
    text = problem["msg"].removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return f"{name}={_show(problem['input'])}: {text[:1].lower()}{text[1:]}", None


# What pydantic says in the words of Python, in those of a YAML file.
WANTED = {
    "string_type": "wanted text (a number in quotes)",
    "list_type": "wanted a list",
    "model_type": "wanted `key: value` lines",
    "model_attributes_type": "wanted `key: value` lines",
    "int_type": "wanted a whole number",
    "invalid_key": "keys are words",
}


def _element(annotation: Any) -> Any:
    """What a list holds: `list[Expert] | None` -> Expert."""
    return next((typing.get_args(p)[0] for p in _parts(annotation) if typing.get_args(p)), None)


def _nearest(key: str, section: type[JobConfig]) -> str:
    """The key of a section that is spelled most like `key`, or all of them."""
    near = difflib.get_close_matches(key, list(section.model_fields), n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else f"keys there: {', '.join(section.model_fields)}"


def _show(value: Any) -> str:
    text = str(value) if isinstance(value, (str, int, float)) else repr(value)
    text = "null" if value is None else text
    return text if len(text) <= 80 else text[:77] + "..."


def _did_you_mean(name: str, known: dict[str, Key]) -> str:
    """The nearest key: the same leaf in some section first, then the nearest spelling."""
    leaf = name.rpartition(".")[2]
    by_leaf = [known_name for known_name in known if known_name.rpartition(".")[2] == leaf]
    near = by_leaf or difflib.get_close_matches(name, list(known), n=1)
    if not near:
        leaves = {known_name.rpartition(".")[2]: known_name for known_name in known}
        near = [leaves[match] for match in difflib.get_close_matches(leaf, list(leaves), n=1)]
    if not near:
        return "--help lists the keys"
    return "did you mean " + " or ".join(map(flag, near[:3])) + "?"


def no_such_file(path: str | Path, key: str | None = None) -> UserError:
    """The error for a path that is not there, with the nearest name in the same folder as the hint."""
    path = Path(path)
    folder = path.parent
    if path.exists():
        there = "a folder, wanted a file" if path.is_dir() else "no folder and no regular file"
        there = "a file, wanted a folder" if path.is_file() else there
        return UserError(f"{key}: {path} is {there}" if key else f"{path} is {there}")
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    near = difflib.get_close_matches(path.name, names, n=1)
    hint = f"did you mean {near[0]}? (same folder)" if near else None
    if not hint and not folder.is_dir():
        hint = f"the folder {folder} does not exist either"
    return UserError(f"{key}: no such file: {path}" if key else f"no such file: {path}", hint)


# ---------------------------------------------------------------- writing


def save(cfg: JobConfig, path: str | Path) -> None:
    """Write every option as YAML, whole or not at all. `parse(cls, [path], ("config",))` reads it back."""
    text = yaml.safe_dump(cfg.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)
    write_atomically(path, text)


def write_atomically(path: str | Path, text: str) -> None:
    """Replace a text file in one step, so a killed run leaves the old one or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files only their owner can read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
