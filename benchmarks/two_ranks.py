"""Training throughput of two processes against one, on the same steps of the same rows.

Sides, each started anew in every round: one process with one thread, one process with all threads, two
processes that share the threads with the whole model each (DDP), and two over which the weights are split
(FSDP2). Every side takes the same optimizer steps of `--accum` passes of one row; evaluation, loading and
saving are not counted, and the losses have to agree. Bytes is what a process holds of the packed model.

On one machine two processes share cores and memory bandwidth with each other: the ratio to "one process, all
threads" says what is lost to them meeting, the ratio to "one thread" what a second machine would bring at
most. The model is a random OLMoE of 2 layers (width 1024, 16 experts of 512, top-4), experts in nf4.

    python benchmarks/two_ranks.py [--tokens 256] [--accum 4] [--steps 4] [--rounds 2] [--threads 2]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import HERE, arguments, emit, in_turns, say, table, thread_env
from dpo_step import load, make, pairs_of

ROOM = 2  # the first steps meet new shapes and are not counted


def worker(args: argparse.Namespace) -> None:
    """One rank of one side; rank 0 prints what it measured."""
    import time

    import torch
    from transformers import TrainerCallback

    import moesmith
    from moesmith import console, ranks
    from moesmith.train.settings import LoraSettings, RunSettings, TrainSettings
    from moesmith.train.sft import Session

    moesmith.register()
    ranks.join()
    console.set_silent(not ranks.is_main())
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.model)
    rows = [pair.chosen for pair in pairs_of(model, args.accum * (args.steps + ROOM), args.tokens, 64)]
    out = Path(args.out)
    train = TrainSettings(
        max_steps=args.steps + ROOM, batch_size=1, grad_accum=args.accum, save_steps=10**6, warmup=0,
        sharding="fsdp2" if args.worker == "fsdp2" else None,
    )  # fmt: skip

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(time.perf_counter() - self.started)

    class Timed(Session):
        def prepare(self, trainer: Any) -> None:
            self.clock = Clock()
            trainer.callback_handler.callbacks.insert(0, self.clock)

    session = Timed(
        model, tokenizer, rows, [], RunSettings(out=str(out), lora=LoraSettings(), train=train), quiet=True
    )
    result = session.train()
    held = sum(local(p).nbytes for p in model.parameters())
    seconds = session.clock.seconds[ROOM:]
    if ranks.is_main():
        print(
            json.dumps(
                {
                    "seconds": statistics.median(seconds),
                    "fastest_s": min(seconds),
                    "model_bytes": held,
                    "loss": [e["loss"] for e in result.history if "loss" in e][-1],
                }
            )
        )
    ranks.leave()


def local(parameter: Any) -> Any:
    """The part of a parameter that this process holds."""
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def run(args: argparse.Namespace, kind: str, processes: int, threads: int, out: Path) -> dict[str, float]:
    """A side once, in processes of its own."""
    words = [str(HERE / "two_ranks.py"), "--worker", kind, "--model", args.model, "--out", str(out / kind)]
    for name in ("tokens", "accum", "steps"):
        words += [f"--{name}", str(getattr(args, name))]
    words += ["--threads", str(threads)]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)] if processes > 1 else []
    subprocess.run(["rm", "-rf", str(out / kind)], check=True)
    done = subprocess.run(
        [sys.executable, *launcher, *words],
        stdout=subprocess.PIPE,
        text=True,
        env=thread_env(threads),
        check=True,
    )
    return json.loads([line for line in done.stdout.splitlines() if line.startswith("{")][-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--accum", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of all processes")
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    sides = {
        "one process, one thread": ("one", 1, 1),
        "one process, all threads": ("all", 1, args.threads),
        "two processes, DDP": ("ddp", 2, max(1, args.threads // 2)),
        "two processes, FSDP2": ("fsdp2", 2, max(1, args.threads // 2)),
    }
    with tempfile.TemporaryDirectory() as folder:
        args.model = args.model or f"{folder}/model"
        if not Path(args.model).exists():
            make(Path(args.model))
        calls = {name: lambda side=side: run(args, *side, Path(folder)) for name, side in sides.items()}
        found = in_turns(calls, args.rounds, warmup=0)
    tokens = args.tokens * args.accum
    figures: dict[str, Any] = {}
    lines = []
    fastest = {name: min(r["fastest_s"] for r in rounds) for name, rounds in found.items()}
    one, every = fastest["one process, one thread"], fastest["one process, all threads"]
    losses = [r["loss"] for rounds in found.values() for r in rounds]
    for name, rounds in found.items():
        key = sides[name][0]
        figures[f"{key}_s"] = fastest[name]
        figures[f"{key}_s_median"] = statistics.median(r["seconds"] for r in rounds)
        figures[f"{key}_tokens_per_s"] = tokens / fastest[name]
        figures[f"{key}_model_bytes"] = rounds[0]["model_bytes"]
        ratios = (one / fastest[name], every / fastest[name])
        lines.append([name, fastest[name], tokens / fastest[name], *ratios, rounds[0]["model_bytes"] / 1e6])
    figures |= {"ddp_over_one_thread": one / fastest["two processes, DDP"]}
    figures |= {"ddp_over_all_threads": every / fastest["two processes, DDP"]}
    figures |= {"largest_loss_difference": max(losses) - min(losses)}
    say(f"a step of {args.accum} x {args.tokens} tokens, the fastest of {args.rounds} x {args.steps}")
    table(["", "s", "tok/s", "x one thread", "x all threads", "MB of weights"], lines)
    emit(
        "two_ranks", {k: getattr(args, k) for k in ("tokens", "accum", "steps", "rounds", "threads")}, figures
    )


if __name__ == "__main__":
    main()
