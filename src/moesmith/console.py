"""What the terminal shows: results on stdout, progress and warnings on stderr, plain text when piped.

With `--json` the result lines are silent and `emit(facts)` prints the same facts for a program. Of several
processes of one run only one prints; what the others are asked to say is not heard, except errors.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

_json = False
_silent = False


@functools.lru_cache(maxsize=8)
def _console(stream: TextIO) -> Console:
    # A pipe has no width: lines are never wrapped there.
    width = None if stream.isatty() else 10_000
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def stdout() -> Console:
    """The console for results."""
    return _console(sys.stdout)


def stderr() -> Console:
    """The console for progress, warnings and errors."""
    return _console(sys.stderr)


def set_json(on: bool) -> None:
    """Turn `--json` on or off for this process."""
    global _json
    _json = on


def set_silent(on: bool) -> None:
    """Say nothing but errors from now on: another process of the same run says it."""
    global _silent
    _silent = on


def is_json() -> bool:
    """Whether results go out as JSON."""
    return _json


def emit(facts: dict[str, Any]) -> None:
    """Print `facts` as one JSON object if `--json` was given; otherwise do nothing."""
    if _json and not _silent:
        sys.stdout.write(json.dumps(facts, indent=2, default=str) + "\n")
        sys.stdout.flush()


def say(text: str | Text = "", style: str | None = None) -> None:
    """One line of the result."""
    if not (_json or _silent):
        stdout().print(text, style=style, soft_wrap=True)


def row(label: str, text: str | Text, width: int = 9) -> None:
    """A labelled line of the result: `data     6,119 rows`. Continuation lines have an empty label.

    On a terminal a long text is folded under itself, not under the label.
    """
    if _json or _silent:
        return
    if len(label) >= width:
        label += " "
    grid = Table.grid(padding=0)
    grid.add_column(width=max(width, len(label)), no_wrap=True, style="bold")
    grid.add_column(overflow="fold")
    grid.add_row(label, text)
    _print_table(grid)


def table(
    header: Sequence[str], rows: Iterable[Sequence[str | Text]], label_width: int | None = None
) -> None:
    """Columns: the first left-aligned, the others right-aligned. `label_width` pads the first column."""
    if _json or _silent:
        return
    narrow = stdout().is_terminal
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for index, name in enumerate(header):
        if index == 0:
            grid.add_column(name, style="bold", min_width=label_width, no_wrap=True)
        else:
            grid.add_column(
                name, justify="right", overflow="fold"
            )  # a long title may break, a figure may not
    for cells in rows:
        grid.add_row(*(c.replace(" ", "\u00a0") if isinstance(c, str) and narrow else c for c in cells))
    _print_table(grid)


def _print_table(grid: Table) -> None:
    """Print without the blanks rich pads lines with: they make diffs and copies ugly."""
    console = stdout()
    with console.capture() as captured:
        console.print(grid)
    if console.is_terminal:
        console.file.write(captured.get())
    else:
        console.file.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


def note(text: str | Text) -> None:
    """A line about what is going on, on stderr."""
    if _silent:
        return
    stderr().print(text, style="dim", soft_wrap=True)


def warn(text: str) -> None:
    """Something the user should know about though the run goes on, on stderr."""
    if _silent:
        return
    stderr().print(Text.assemble(("warning: ", "yellow"), text), soft_wrap=True)


def error(message: str, hint: str | None = None) -> None:
    """`error: message`, and the hint indented under it, on stderr."""
    stderr().print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    for line in (hint or "").splitlines():
        stderr().print(f"       {line}", soft_wrap=True)


def next_command(*commands: str) -> None:
    """The last line of a command: what to run next."""
    say(Text.assemble(("next: ", "dim"), ("   ·   ".join(commands), "cyan")))


class Bar:
    """A running bar: `advance(n)` moves it, `text` is what stands beside it (loss, rate...)."""

    def __init__(self, label: str, total: float | None, progress: Progress | None):
        self.label, self.total, self.done, self.text = label, total, 0.0, ""
        self._progress = progress
        self._task = progress.add_task(label, total=total, text="") if progress else None
        self._last_line = time.monotonic()

    def advance(self, n: float = 1, text: str | None = None) -> None:
        """Move by `n` of `total`; `text` replaces what stands beside the bar."""
        self.update(self.done + n, text)

    def update(self, done: float, text: str | None = None) -> None:
        """Set the position to `done` of `total`."""
        self.done = done
        self.text = self.text if text is None else text
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, text=self.text)
        elif time.monotonic() - self._last_line > 30:  # a log file gets a line now and then, not a bar
            self._last_line = time.monotonic()
            share = f" {100 * done / self.total:.0f} %" if self.total else f" {done:.0f}"
            note(f"{self.label}{share}{' · ' + self.text if self.text else ''}")


@contextlib.contextmanager
def bar(label: str, total: float | None = None) -> Iterator[Bar]:
    """A progress bar on stderr that goes away when done; a line every 30 s when stderr is not a terminal."""
    console = stderr()
    if _silent or not console.is_terminal:
        yield Bar(label, total, None)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[text]}", style="dim"),
        TimeRemainingColumn(compact=True),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        yield Bar(label, total, progress)


# ---------------------------------------------------------------- figures as people write them


def size(nbytes: float) -> str:
    """Bytes in decimal units, as checkpoints and disks are sold: 12_850_000_000 -> '12.9 GB'."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if nbytes >= scale * 0.9995:
            value = nbytes / scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}"
    return f"{nbytes:.0f} B"


def count(n: float) -> str:
    """A number of parameters or tokens, three digits: 25_800_000_000 -> '25.8 B', 999 -> '999'."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if n >= scale * 0.9995:
            value = n / scale
            return f"{value:.{0 if value >= 99.95 else 1 if value >= 9.995 else 2}f} {unit}"
    return f"{n:,.0f}"


def duration(seconds: float) -> str:
    """'0.4 s', '41 s', '3:05', '1:52:10'."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    hours, rest = divmod(round(seconds), 3600)
    minutes, secs = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{secs:02d}" if hours else f"{minutes}:{secs:02d}"
