"""Writing a checkpoint with fewer experts: bytes per second against `cp`, and peak memory.

Makes a random bf16 checkpoint of 2 layers at full width: Gemma-4-26B-A4B (fused stacks, 128 experts, 4.8 GB)
or Qwen3-30B-A3B (a tensor per expert, 3.7 GB), and cuts 128 experts to 109, other ones in each layer. In
turns:

    copy    rewrite_checkpoint with a plan that is made already, in a fresh process; it never imports torch
    whole   planning too, in a fresh process; most of its memory is torch and transformers themselves
    cp      coreutils' cp of the same number of bytes (the written files)

Each is timed until its files are fsynced. The page cache holds the source (warm), or is told to drop it
before every round (cold), for all three alike. `peak_bytes` is VmHWM of the process: ru_maxrss would include
what its parent had before exec. Everything made is removed at the end (about 13 GB of disk at a time).

    python benchmarks/prune_copy.py [--families gemma4 qwen3] [--keep 109] [--rounds 5] [--cache warm cold]
        [--sides copy whole] [--small] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import load_memory
from common import arguments, emit, in_turns, say, table, thread_env

GB = 1e9
ROLES = ("make", "copy", "whole")


def peak_bytes() -> int:
    """Most memory this process ever held, shared libraries included (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: this benchmark needs Linux")


def synced(folder: Path) -> None:
    """Wait until the folder's files are on the disk."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def set_cache(folder: Path, warm: bool) -> None:
    """Have the folder's files in the page cache, or not."""
    for path in folder.glob("*.safetensors"):
        handle = os.open(path, os.O_RDONLY)
        if warm:
            while os.read(handle, 1 << 20):
                pass
        else:
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def choose(folder: Path, keep: int) -> dict[str, list[int]]:
    """MoE layer -> experts to keep, other ones in each."""
    from moesmith.models.anatomy import meta_model
    from moesmith.models.checkpoint import read_config
    from moesmith.models.layers import moe_layers

    draw = random.Random(0)
    layers = moe_layers(meta_model(read_config(folder)))
    return {layer.name: sorted(draw.sample(range(layer.num_experts), keep)) for layer in layers}


def rewrite(path: Path, whole: bool, keep: int) -> dict[str, Any]:
    """One of our sides, in this fresh process. Time without the start of Python."""
    sys.argv[0] = "moesmith"  # as for the command line, importing the package does not import torch
    start = time.perf_counter()
    from moesmith.models.rewrite import plan_tensors, rewrite_checkpoint

    if whole:
        kept = choose(path / "in", keep)
        imported, start = peak_bytes(), time.perf_counter()
        plan = plan_tensors(path / "in", kept)
        planned = time.perf_counter()
        figures = {"imports_peak_bytes": imported, "plan_seconds": planned - start}
    else:
        plan = pickle.loads((path / "plan.pickle").read_bytes())
        figures = {}
        start = time.perf_counter()
    done = rewrite_checkpoint(path / "in", path / "out", {}, plan=plan)
    copied = time.perf_counter()
    synced(path / "out")
    figures |= {
        "seconds": time.perf_counter() - start,
        "copy_seconds": copied - start - figures.get("plan_seconds", 0.0),
        "bytes": done.nbytes,
        "peak_bytes": peak_bytes(),
    }
    assert whole or "torch" not in sys.modules
    return figures


def cp(path: Path) -> dict[str, float]:
    """coreutils' cp of the files in `sample` to `out`."""
    start = time.perf_counter()
    files = [str(file) for file in (path / "sample").iterdir()]
    subprocess.run(["cp", *files, str(path / "out")], check=True)
    copied = time.perf_counter()
    synced(path / "out")
    size = sum(Path(file).stat().st_size for file in files)
    return {"seconds": time.perf_counter() - start, "copy_seconds": copied - start, "bytes": size}


def in_process(role: str, path: Path, family: str, keep: int, small: bool) -> dict[str, Any]:
    """Run one role of this script in a fresh process and read its figures."""
    words = ["--role", role, "--path", str(path), "--families", family, "--keep", str(keep)]
    command = [sys.executable, __file__, *words, *(["--small"] if small else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=thread_env(1))
    return json.loads(done.stdout.splitlines()[-1])


def measure(path: Path, family: str, args: argparse.Namespace, keep: int) -> list[tuple]:
    """Make a checkpoint, then the sides in turns; one line of the table for each side and cache."""
    rounds, small = args.rounds, args.small
    for name in ("in", "out", "sample"):
        (path / name).mkdir()
    made = in_process("make", path, family, keep, small)
    in_process("copy", path, family, keep, small)
    for file in (path / "out").glob("*.safetensors"):
        file.rename(path / "sample" / file.name)
    lines = []
    for cache in args.cache:

        def side(name: str, source: str, cache: str = cache) -> dict[str, float]:
            shutil.rmtree(path / "out")
            (path / "out").mkdir()
            set_cache(path / source, cache == "warm")
            return cp(path) if name == "cp" else in_process(name, path, family, keep, small)

        sources = {"cp": "sample", "copy": "in", "whole": "in"}
        calls = {name: partial(side, name, sources[name]) for name in ("cp", *args.sides)}
        results = in_turns(calls, rounds)
        setting = {"family": family, "cache": cache, "experts": made["num_experts"], "keep": keep}
        setting |= {"source_bytes": made["disk_bytes"], "rounds": rounds}
        reference = statistics.median(r["bytes"] / r["seconds"] for r in results["cp"])
        to_cache = statistics.median(r["bytes"] / r["copy_seconds"] for r in results["cp"])
        for name, measured in results.items():
            middle = {key: statistics.median(r[key] for r in measured) for key in measured[0]}
            rate = statistics.median(r["bytes"] / r["seconds"] for r in measured)
            cached = statistics.median(r["bytes"] / r["copy_seconds"] for r in measured)
            peak = max((r["peak_bytes"] for r in measured), default=0) if "peak_bytes" in middle else None
            figures = middle | {"bytes_per_second": rate, "against_cp": rate / reference}
            figures |= {"copy_against_cp": cached / to_cache}
            if peak is not None:
                figures["peak_bytes"] = peak
            emit("prune_copy", setting | {"side": name}, figures)
            lines.append(
                (f"{family} {cache}", name, middle["bytes"] / GB, middle["seconds"], rate / GB)
                + (rate / reference, cached / to_cache, (peak or 0) / 1e6)
            )
    return lines


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--families", nargs="+", default=["gemma4", "qwen3"], choices=["gemma4", "qwen3"])
    parser.add_argument("--keep", type=int, default=109)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", nargs="+", default=["warm", "cold"], choices=["warm", "cold"])
    parser.add_argument("--sides", nargs="+", default=["copy", "whole"], choices=["copy", "whole"])
    parser.add_argument("--small", action="store_true", help="a narrow model, to see that the script runs")
    parser.add_argument("--folder", help="where to put the checkpoints (default: the temporary folder)")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    keep = min(args.keep, 12) if args.small else args.keep
    load_memory.SMALL["num_experts"] = 16  # with 8, top-8 models could not lose one
    if args.role == "make":
        from moesmith.models.rewrite import plan_tensors

        source = args.path / "in"
        figures = load_memory.make(source, args.families[0], 2, args.small)
        (args.path / "plan.pickle").write_bytes(pickle.dumps(plan_tensors(source, choose(source, keep))))
        return print(json.dumps(figures))
    if args.role:
        return print(json.dumps(rewrite(args.path, args.role == "whole", keep)))

    lines = []
    for family in args.families:
        path = Path(tempfile.mkdtemp(prefix=f"moesmith-{family}-", dir=args.folder))
        try:
            lines += measure(path, family, args, keep)
        finally:
            shutil.rmtree(path)
    say("until fsynced: seconds, GB/s and the share of cp's; share of cp's up to the page cache; peak in MB")
    table(("checkpoint", "side", "GB", "s", "GB/s", "of cp", "of cp, cached", "peak MB"), lines)


if __name__ == "__main__":
    main()
