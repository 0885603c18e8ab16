"""The folder of a training run: what is in it, who may write into it, and what a killed run left whole.

config.yaml       every option of the run
data.json         row counts and a digest of every token and label
log.jsonl         every logged value, one object per step or evaluation
nonfinite.jsonl   the rows of every skipped step
checkpoints/      what --resume continues from
best/  last/      adapters: lowest held-out loss, newest
result.json       written when the run is over
transfers.json    bytes moved and waits of experts off the device, where they were counted
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from moesmith import ranks
from moesmith.config import JobConfig, save, write_atomically
from moesmith.errors import UserError

CHECKPOINT = "checkpoint-{step}"

# A resumed run may differ from the one it continues in these: none of them changes what is learned from which
# row.
MAY_CHANGE = (
    "resume", "overwrite", "dry_run", "preview", "out", "train.eval_steps", "train.save_steps",
    "train.keep_checkpoints", "train.early_stop", "train.max_nonfinite", "train.loggers",
    "train.gradient_checkpointing", "train.expert_parallel", "dpo.reference", "dpo.reference_cache", "fit",
    "vram", "ram", "experts.home", "experts.kept", "experts.slots", "experts.profile", "experts.statistics",
    "experts.verify",
)  # fmt: skip


class RunFolder:
    """Paths and records of one run. Of several processes rank 0 alone writes; on others nothing is done."""

    def __init__(self, path: str | Path):
        self.path = Path(path).expanduser()
        self.config = self.path / "config.yaml"
        self.data = self.path / "data.json"
        self.log = self.path / "log.jsonl"
        self.nonfinite = self.path / "nonfinite.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.best = self.path / "best"
        self.last = self.path / "last"
        self.result = self.path / "result.json"
        self.transfers = self.path / "transfers.json"

    @property
    def owned(self) -> Sequence[Path]:
        """Everything a run writes."""
        files = (self.config, self.data, self.log, self.nonfinite, self.result, self.transfers)
        return (*files, self.checkpoints, self.best, self.last, self.path / "tensorboard")

    def check(self, cfg: JobConfig, resume: bool, overwrite: bool) -> None:
        """Refuse a folder that is not this run's to write into. Writes nothing.

        Raises:
            UserError: the folder holds something and neither flag was given; a resumed run has other options.
        """
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        if self.path.is_file():
            raise UserError(f"out={self.path} is a file, wanted a folder")
        holds = sorted(entry.name for entry in self.path.iterdir()) if self.path.is_dir() else []
        if resume and self.config.exists():
            self._check_same(cfg)
        elif resume and holds:
            raise UserError(
                f"out={self.path} holds no run to resume (no config.yaml)", f"it holds {', '.join(holds[:5])}"
            )
        elif holds and not overwrite:
            what = "holds a run already" if self.config.exists() else f"is not empty: {', '.join(holds[:5])}"
            raise UserError(
                f"out={self.path} {what}",
                "--resume continues it, --overwrite starts anew; or choose another --out",
            )

    def begin(self, cfg: JobConfig, resume: bool) -> None:
        """Make the folder ready: remove an earlier run's files unless it is resumed, and save the options."""
        if not ranks.is_main():
            return
        self.path.mkdir(parents=True, exist_ok=True)
        if not resume:
            for path in self.owned:
                remove(path)
        for path in (self.checkpoints, self.path):
            for leftover in path.glob(".*.tmp") if path.is_dir() else ():
                remove(leftover)
        self.result.unlink(missing_ok=True)
        names = {"resume", "overwrite", "dry_run", "preview"} & set(type(cfg).model_fields)
        flags: dict[str, Any] = dict.fromkeys(names, False)
        save(cfg.model_copy(update=flags), self.config)

    def _check_same(self, cfg: JobConfig) -> None:
        before = _flat(yaml.safe_load(self.config.read_text(encoding="utf-8")))
        now = _flat(cfg.model_dump(mode="json"))
        changed = [key for key in now if key in before and before[key] != now[key] and key not in MAY_CHANGE]
        if changed:
            lines = [f"{key}: was {before[key]}, is {now[key]}" for key in changed]
            advice = "give the options it was started with, or start anew with --overwrite"
            raise UserError(f"cannot resume {self.path}: {lines[0]}", "\n".join([*lines[1:], advice]))

    # --- data ---

    def check_data(self, fingerprint: str) -> None:
        """Refuse to resume with other rows than the run was started with.

        Raises:
            UserError: they are not the same.
        """
        if not self.data.exists():
            return
        before = json.loads(self.data.read_text(encoding="utf-8"))
        if before["fingerprint"] != fingerprint:
            raise UserError(
                f"cannot resume {self.path}: its rows or their chat template have changed since it started",
                f"it trained on {before['train']:,} rows and held {before['held_out']:,} out; "
                "--overwrite starts anew",
            )

    def record_data(self, facts: dict[str, Any]) -> None:
        """Save what is known of the rows: fingerprint, train, held_out, counts."""
        if not ranks.is_main():
            return
        write_atomically(self.data, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")

    # --- checkpoints ---

    def checkpoint_steps(self) -> list[int]:
        """Steps of the whole checkpoints, ascending. One that was being written has another name."""
        if not self.checkpoints.is_dir():
            return []
        found = (re.fullmatch(r"checkpoint-(\d+)", entry.name) for entry in self.checkpoints.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def newest_checkpoint(self) -> Path | None:
        """The checkpoint to resume from."""
        steps = self.checkpoint_steps()
        return self.checkpoints / CHECKPOINT.format(step=steps[-1]) if steps else None

    def keep_newest(self, n: int) -> None:
        """Remove all but the `n` newest checkpoints."""
        if not ranks.is_main():
            return
        for step in self.checkpoint_steps()[:-n]:
            remove(self.checkpoints / CHECKPOINT.format(step=step))

    # --- records ---

    def append(self, path: Path, record: dict[str, Any]) -> None:
        """One more line in log.jsonl or nonfinite.jsonl."""
        if not ranks.is_main():
            return
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def forget_after(self, step: int) -> None:
        """Remove records of steps after the checkpoint a run resumes from: they are taken again."""
        if not ranks.is_main():
            return
        for path in (self.log, self.nonfinite):
            if not path.exists():
                continue
            kept = []
            for line in path.read_text(encoding="utf-8").splitlines():
                if not line.endswith("}"):  # the line a killed run was writing
                    continue
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            write_atomically(path, "".join(kept))

    def history(self) -> list[dict[str, Any]]:
        """Every logged value of all sessions of the run, one dict per step or evaluation."""
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        return [json.loads(line) for line in lines]

    def write_result(self, facts: dict[str, Any]) -> None:
        """The last thing a finished run writes."""
        if not ranks.is_main():
            return
        write_atomically(self.result, json.dumps(facts, indent=2) + "\n")


def replace_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Write a folder under another name, then put it in place of `path`, which is never half written."""
    temporary, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old.tmp")
    for leftover in (temporary, old):
        remove(leftover)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    write(temporary)
    if path.exists():
        os.replace(path, old)
    os.replace(temporary, path)
    remove(old)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
