"""A long journey in phases that survives being killed: finished phases are kept, the next run goes on.

`results.json` in the folder says which phases are done, with which options, what they found and what they
took. A phase whose options changed, or whose files are gone, is done again, and so is everything after it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from moesmith.config import write_atomically
from moesmith.errors import UserError
from moesmith.jobs._memory import PeakMemory, give_back
from moesmith.train.folder import remove

RESULTS = "results.json"


@dataclass
class Phase:
    """One finished phase."""

    options: dict[str, Any]
    facts: dict[str, Any]
    seconds: float
    cpu_seconds: float
    """of all threads: on a machine that others use too, nearer to what the phase costs than `seconds`"""
    peak_bytes: int
    """anonymous memory of the process, or device memory"""
    kept: bool = field(default=False, compare=False)
    """done by an earlier run"""


class Journey:
    """The folder of a journey and what is finished in it.

    Raises:
        UserError: the folder holds something else.
    """

    def __init__(self, out: Path, fresh: bool = False, owned: Sequence[str] = ()):
        self.out = out
        self.file = out / RESULTS
        self.phases: dict[str, Phase] = {}
        self._before: dict[str, Phase] = {}
        if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not self.file.is_file())):
            raise UserError(f"out={out} exists and holds something else", "choose another --out")
        if self.file.is_file() and not fresh:
            stored = json.loads(self.file.read_text(encoding="utf-8"))
            self._before = {name: Phase(**phase) for name, phase in stored["phases"].items()}
        for name in owned if fresh else ():
            remove(out / name)
        out.mkdir(parents=True, exist_ok=True)
        self.write({})

    def phase(
        self,
        name: str,
        options: dict[str, Any],
        outputs: Sequence[Path],
        work: Callable[[], dict[str, Any]],
    ) -> Phase:
        """Do `work` unless it is done: the same options, and every output is there.

        Args:
            options: what the result depends on, beside the phases before. Plain JSON values.
            work: writes `outputs`, each whole or not at all, and returns facts for `results.json`.
        """
        options = json.loads(json.dumps(options))
        before = self._before.pop(name, None)
        if before and before.options == options and all(path.exists() for path in outputs):
            before.kept = True
            self.phases[name] = before
            return before
        self._before = {}  # what came after was made from what is about to change
        self.write({})
        started, cpu = time.perf_counter(), time.process_time()
        give_back()
        with PeakMemory() as peak:
            facts = work()
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        self.phases[name] = Phase(options, facts, round(seconds, 2), round(cpu_seconds, 2), peak.nbytes)
        self.write({})
        return self.phases[name]

    def write(self, more: dict[str, Any]) -> None:
        """Save what is finished so far, and `more` beside it."""
        done = self.phases | self._before
        phases = {
            name: {k: v for k, v in asdict(phase).items() if k != "kept"} for name, phase in done.items()
        }
        write_atomically(self.file, json.dumps({"phases": phases, **more}, indent=2) + "\n")
