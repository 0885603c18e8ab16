"""The house: imports go down only, and no procedure imports another."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import moesmith

PACKAGE = Path(moesmith.__file__).parent

# A file imports from its own room and from lower floors. Rooms on the same floor do not know each other.
FLOORS = {
    "errors": 0,
    "config": 1, "console": 1, "ops": 1, "ram": 1, "ranks": 1,
    "experts": 2,
    "models": 3, "data": 3,
    "plan": 4,
    "build": 5, "train": 5, "prune": 5, "eval": 5, "export": 5, "report": 5, "pairs": 5, "serve": 5,
    "__init__": 5,  # the public names, for users and for jobs; `__version__` is for everyone
    "jobs": 6,
    "cli": 7, "__main__": 8,
}  # fmt: skip

FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


def room(module: str) -> str:
    """moesmith.ops.stack -> ops; the package itself -> __init__."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def own_imports(file: str, source: str) -> Iterator[tuple[int, str]]:
    """(line, module) for every import of our own package in a file, wherever in the file it stands."""
    path = Path(file)
    package = ["moesmith", *path.parent.parts]  # the package that a leading dot means
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "moesmith":
                    yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *(node.module.split(".") if node.module else [])])
            if base.split(".")[0] != "moesmith":
                continue
            for alias in node.names:
                if alias.name != "__version__":
                    is_module = base == "moesmith" and alias.name in FLOORS
                    yield node.lineno, f"{base}.{alias.name}" if is_module else base


def violations(file: str, source: str) -> list[str]:
    """Imports of `file` that go up or sideways, as file:line."""
    mine = Path(file).parts[0].removesuffix(".py")
    wrong = []
    for line, module in own_imports(file, source):
        theirs = room(module)
        if theirs != mine and FLOORS[theirs] >= FLOORS[mine]:
            wrong.append(
                f"{file}:{line} imports {module}: from floor {FLOORS[mine]} to floor {FLOORS[theirs]}"
            )
    return wrong


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down_only(file: str):
    assert violations(file, (PACKAGE / file).read_text(encoding="utf-8")) == []


def test_every_room_has_a_floor():
    """A new folder or file at the top of the package has to be given its floor above."""
    assert {Path(file).parts[0].removesuffix(".py") for file in FILES} <= FLOORS.keys()


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("ops/stack.py", "from ..experts.storage import stack"),
        ("ops/cpu/build.py", "from ...experts import storage"),
        ("models/layers.py", "from ..data import chat"),
        ("train/sft.py", "import moesmith.eval.loss"),
        ("experts/lora.py", "def f():\n    from ..models.layers import moe_layers"),
        ("errors.py", "from .console import emit"),
        ("jobs/sft.py", "from .. import cli"),
        ("eval/loss.py", "from moesmith import ExpertsConfig"),
        ("ops/stack.py", "from ..config import JobConfig"),
    ],
)
def test_an_import_that_goes_up_or_sideways_is_found(file: str, source: str):
    assert len(violations(file, source)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("experts/lora.py", "from ..ops.grouped import Lora\nfrom .storage import stack\nimport peft"),
        ("jobs/sft.py", "from ..train.sft import run\nfrom .. import errors\nimport moesmith"),
        ("train/sft.py", "from moesmith import __version__\nfrom ..errors import UserError"),
        ("ops/cpu/__init__.py", "from ..codebook import BITS\nfrom . import build"),
    ],
)
def test_an_import_that_goes_down_or_stays_in_the_room_is_not(file: str, source: str):
    assert violations(file, source) == []
