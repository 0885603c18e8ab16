"""The `moesmith` command: a command's name is a file in `jobs/`.

Each job has a docstring (its help), `Config` (its keys), `POSITIONAL` (the arguments without a flag) and
`run(cfg)`. It may also have `EXAMPLE` (a line for the help), `JSON = True` (it has facts for `--json`),
`OUT_OF_MEMORY` (what to change first), `SEAMS = False` (it loads no model), `RANKS = True` (`torchrun` may
start it in several processes) and `check(cfg)` (what can be refused before torch is imported). Listing the
commands imports none of them.
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import errno
import importlib
import importlib.metadata
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from moesmith import ranks
from moesmith.errors import UserError

JOBS = Path(__file__).parent / "jobs"
FIRST = (
    "demo",
    "inspect",
    "plan",
    "build",
    "quantize",
    "sft",
    "dpo",
    "pairs",
    "loop",
    "chat",
    "serve",
    "eval",
    "profile",
    "compare",
    "prune",
    "heal",
    "verify",
    "export",
)  # in the order one meets them; the others follow by name

OUT_OF_MEMORY = (
    "use a smaller batch or a shorter sequence, or fewer bits; `moesmith inspect MODEL` shows what fits"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0 done, 2 something the user can fix, 130 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _main(argv)
    except UserError as error:
        _error(error.message, error.hint)
        return 2
    except KeyboardInterrupt:
        _note("stopped")
        return 130
    except ranks.Terminated:
        _error(ranks.ended().message)
        return 143
    except BrokenPipeError:  # the reader of our pipe has left (`| head`): not an error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno == errno.ENOSPC:
            _error(f"no space left on the disk{f' writing {error.filename}' if error.filename else ''}")
        elif error.filename is not None and error.strerror:
            _error(f"{error.strerror.lower()}: {error.filename}")
        else:
            raise
        return 2
    except (MemoryError, RuntimeError) as error:
        if ranks.lost(error):
            _error(ranks.ended().message)
            return 1
        if not out_of_memory(error):
            ranks.tell(f"{type(error).__name__}: {error}")
            raise
        _error(f"out of memory: {' '.join(str(error).split())[:160]}", _out_of_memory_hint(argv))
        return 2
    except Exception as error:
        ranks.tell(f"{type(error).__name__}: {error}")
        raise


def _main(argv: list[str]) -> int:
    names = commands()
    if not argv or argv[0] in ("-h", "--help", "help"):
        if len(argv) > 1 and argv[1] in names:
            print(command_help(argv[1]))
        else:
            print(overview(names))
        return 0
    if argv[0] in ("-V", "--version"):
        print(versions())
        return 0
    as_json = "--json" in argv
    argv = [a for a in argv if a != "--json"]
    if not argv:
        raise UserError("--json goes with a command", "moesmith inspect MODEL --json")
    name, rest = argv[0], argv[1:]
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f"did you mean `moesmith {near[0]}`?" if near else f"commands: {', '.join(names)}"
        raise UserError(f"unknown command {name!r}", hint)
    if "--help" in rest or "-h" in rest:
        print(command_help(name))
        return 0

    job = load(name)
    if as_json and not getattr(job, "JSON", False):
        raise UserError(f"{name} has no --json output")
    if ranks.world() > 1 and not getattr(job, "RANKS", False):
        raise UserError(
            f"{name} runs in one process, and this is {ranks.rank() + 1} of {ranks.world()}",
            f"start it without torchrun: moesmith {' '.join(argv)}",
        )
    from moesmith import config, console
    from moesmith.jobs._lock import only_writer

    cfg = config.parse(job.Config, rest, positional=job.POSITIONAL)
    console.set_json(as_json)
    console.set_silent(not ranks.is_main())
    try:
        if hasattr(job, "check"):
            job.check(cfg)
        _prepare(getattr(job, "SEAMS", True))
        looks_only = getattr(cfg, "dry_run", False) or getattr(cfg, "preview", False)
        with only_writer(None if looks_only or not ranks.is_main() else getattr(cfg, "out", None)):
            ranks.listen()
            ranks.join()
            job.run(cfg)
            ranks.leave()
    finally:
        console.set_json(False)
        console.set_silent(False)
    return 0


def _prepare(seams: bool) -> None:
    """Quiet the libraries, and plug into them if the command loads a model."""
    # bitsandbytes announces at import that an optional package is absent, the others what they will rename.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for about in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=about)
    if seams:
        import moesmith

        moesmith.register()


def commands() -> list[str]:
    """Names of the commands there are: the files in `jobs/`."""
    found = {path.stem.replace("_", "-") for path in JOBS.glob("*.py") if not path.stem.startswith("_")}
    return [name for name in FIRST if name in found] + sorted(found - set(FIRST))


def load(name: str) -> ModuleType:
    """The job's module."""
    return importlib.import_module(f"moesmith.jobs.{name.replace('-', '_')}")


def overview(names: Sequence[str]) -> str:
    """The text of `moesmith --help`. Reads the first line of each job's docstring without importing it."""
    width = max((len(name) for name in names), default=0) + 2
    lines = [
        "moesmith: build Mixture-of-Experts models, load any in 4 bits, tune, judge, serve and export them",
        "",
    ]
    for name in names:
        tree = ast.parse((JOBS / f"{name.replace('-', '_')}.py").read_text(encoding="utf-8"))
        first_line = (ast.get_docstring(tree) or "").split("\n")[0]
        lines.append(f"  {name:<{width}}{first_line.rstrip('.')}")
    lines += ["", "moesmith COMMAND --help shows the keys of a command; --version what is installed"]
    return "\n".join(lines)


def command_help(name: str) -> str:
    """The text of `moesmith COMMAND --help`."""
    import shutil
    import textwrap

    from moesmith import config

    job = load(name)
    positional = tuple(job.POSITIONAL)
    all_keys = list(config.keys(job.Config))
    by_name = {key.name: key for key in all_keys}
    columns = max(60, min(shutil.get_terminal_size((110, 24)).columns, 130))

    usage = ["moesmith", name, *(_placeholder(p, by_name) for p in positional), "[--key value ...]"]
    lines = [" ".join(usage), "", *(job.__doc__ or "").strip().splitlines(), ""]

    def entry(left: str, text: str) -> list[str]:
        indent = 32
        wrapped = textwrap.wrap(text, columns - indent) or [""]
        if len(left) > indent - 4:
            return [f"  {left}", *(" " * indent + part for part in wrapped)]
        return [f"  {left:<{indent - 2}}{wrapped[0]}", *(" " * indent + part for part in wrapped[1:])]

    for p in positional:
        text = by_name[p].help if p in by_name else "a YAML file with the keys below; flags win over it"
        lines += entry(p.upper(), text)
    if positional:
        lines.append("")
    section_help = dict(config.sections(job.Config))
    shown = ""
    for key in sorted(all_keys, key=lambda k: "." in k.name):  # top-level keys first, then section by section
        if key.name in positional:
            continue
        section = key.name.rpartition(".")[0]
        if section != shown:
            shown = section
            title = f"{section}: {section_help[section]}" if section_help.get(section) else f"{section}:"
            lines += ["", *textwrap.wrap(title, columns)]
        lines += entry(config.flag(key.name), _key_text(key))
    if getattr(job, "JSON", False):
        lines += entry("--json", "the same facts for a program, on stdout")
    example = getattr(job, "EXAMPLE", None) or " ".join(["moesmith", name, *(p.upper() for p in positional)])
    lines += ["", f"example: {example}"]
    return "\n".join(lines)


def _placeholder(name: str, by_name: dict) -> str:
    required = name in by_name and by_name[name].required
    return name.upper() if required else f"[{name.upper()}]"


def _key_text(key) -> str:  # noqa: ANN001  (config.Key; config is imported late)
    from moesmith import config

    words = config.choices(key.annotation)
    facts = []
    if words and not all(word in key.help for word in words):
        facts.append(", ".join(words))
    facts.append("required" if key.required else f"default: {key.default}")
    return f"{key.help} [{'; '.join(facts)}]" if key.help else f"[{'; '.join(facts)}]"


def versions() -> str:
    """The text of `moesmith --version`."""
    lines = []
    for package in ("moesmith", "torch", "transformers", "peft", "trl"):
        version = "not installed"
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(package)
        lines.append(f"{package:<13}{version}")
    return "\n".join(lines)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that RAM or device memory ran out. torch raises a RuntimeError for RAM."""
    if isinstance(error, MemoryError):
        return True
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return "DefaultCPUAllocator: can't allocate memory" in str(error)


def _out_of_memory_hint(argv: list[str]) -> str:
    name = next((a for a in argv if not a.startswith("-")), "")
    job = sys.modules.get(f"moesmith.jobs.{name.replace('-', '_')}")
    return getattr(job, "OUT_OF_MEMORY", OUT_OF_MEMORY)


def _error(message: str, hint: str | None = None) -> None:
    from moesmith import console

    if ranks.tell(message):  # not if another process of this run has said it
        console.error(message if ranks.is_main() else f"rank {ranks.rank()}: {message}", hint)


def _note(text: str) -> None:
    from moesmith import console

    console.note(text)


if __name__ == "__main__":
    sys.exit(main())
