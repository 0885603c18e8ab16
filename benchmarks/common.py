"""What every benchmark shares: the record it prints, timing in turns, and helpers in processes of their own.

A benchmark prints one JSON line per measurement to stdout (commit, date, machine, versions, command,
setting, figures) and a table for people to stderr. Things to compare are timed in turns, A B A B, in one
run, so that a noisy minute hits both; figures give the minimum and the median of the rounds.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")
RIVAL = "experts4bit-qlora==0.58.1"


def arguments(description: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring."""
    raw = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=raw)


def machine() -> dict[str, Any]:
    """Processor, cores, vector instructions that matter here, memory in GB, and the GPU if torch sees one."""
    model, flags = platform.processor(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                model = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    import torch

    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "isa": [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags],
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions(*more: str) -> dict[str, str]:
    """Version of Python and of each package that is installed."""
    found = {"python": platform.python_version()}
    for name in (*PACKAGES, *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Hash of the checkout, with + when files differ from it; None outside git or before the first commit."""

    def git(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *words], cwd=HERE, capture_output=True, text=True)

    head = git("rev-parse", "--short=12", "HEAD")
    if head.returncode:
        return None
    return head.stdout.strip() + ("+" if git("status", "--porcelain").stdout.strip() else "")


def emit(bench: str, setting: Mapping[str, Any], figures: Mapping[str, Any], **more: Any) -> None:
    """Print one measurement as a JSON line."""
    record = {
        "bench": bench,
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        "command": shlex.join(["python", os.path.relpath(sys.argv[0]), *sys.argv[1:]]),
        "setting": dict(setting),
        "figures": {
            key: float(f"{value:.6g}") if isinstance(value, float) else value
            for key, value in figures.items()
        },
        **more,
    }
    print(json.dumps(record), flush=True)


def say(line: str = "") -> None:
    """A line for people."""
    print(line, file=sys.stderr, flush=True)


def number(value: float) -> str:
    """Three significant digits, no exponent above one: 0.0213, 3.41, 2,094."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """A plain table on stderr; floats get three significant digits."""
    cells = [[number(c) if isinstance(c, float) else str(c) for c in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    for row in cells:
        say("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def in_turns(
    sides: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1
) -> dict[str, list[dict[str, float]]]:
    """Call every side once per round, in order; a side returns figures by name, or is timed here."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for index in range(warmup + rounds):
        for name, call in sides.items():
            start = time.perf_counter()
            figures = call()
            seconds = time.perf_counter() - start
            if index >= warmup:
                results[name].append(figures if isinstance(figures, dict) else {"seconds": seconds})
    return results


def summary(rounds: Sequence[Mapping[str, float]], key: str) -> dict[str, float]:
    """{key: minimum, key_median: median} over the rounds."""
    values = [figures[key] for figures in rounds]
    return {key: min(values), f"{key}_median": statistics.median(values)}


def thread_env(threads: int) -> dict[str, str]:
    """The environment that holds a process to this many compute threads."""
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    return {**os.environ, **counts, "OMP_WAIT_POLICY": "passive"}


class Worker:
    """A script in a process of its own that answers JSON lines: `worker(op="step", ...)` -> dict.

    The script reads requests with `serve`. Memory, threads and libraries are that process's alone.
    """

    def __init__(self, script: str, *args: str, python: str = sys.executable, threads: int = 1):
        self.process = subprocess.Popen(
            [python, str(HERE / script), *args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=thread_env(threads),
        )

    def __call__(self, **request: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{shlex.join(map(str, self.process.args))} ended with {self.process.wait()}")
        return json.loads(answer)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(timeout=60)


def serve(operations: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer `Worker` requests until stdin closes. Anything else that prints goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answers.write(json.dumps(operations[request.pop("op")](**request)) + "\n")
        answers.flush()


def rival_python(requirement: str = RIVAL) -> str:
    """Path of a Python with `requirement` and this environment's torch and bitsandbytes; made when missing.

    Lives under $MOESMITH_BENCH_CACHE, ~/.cache/moesmith-bench by default. Delete the folder to make it anew.
    """
    cache = Path(os.environ.get("MOESMITH_BENCH_CACHE", Path.home() / ".cache" / "moesmith-bench"))
    torch_version = importlib.metadata.version("torch").split("+")[0]
    home = cache / f"{requirement.replace('==', '-')}-torch-{torch_version}"
    python, stamp = home / "bin" / "python", home / ".stamp"
    if not stamp.exists():
        say(f"making {home} for {requirement}")
        venv.create(home, with_pip=True)
        for words in (
            [f"torch=={torch_version}"],
            [f"bitsandbytes=={importlib.metadata.version('bitsandbytes')}", f"torch=={torch_version}"],
            ["--no-deps", requirement],
        ):
            subprocess.run([python, "-m", "pip", "install", "-q", *words], check=True, stdout=sys.stderr)
        stamp.touch()
    return str(python)
