"""Where an adapter pays: experts, attention, both, the router. The same run with each placement.

One run file of `moesmith sft`, trained once per placement and learning rate: same rows in the same order,
same steps, same rank, same seed. A placement is judged at the learning rate that suits it best. The held-out
loss is the mean over all held-out tokens; router means that the router's weight matrix gets an adapter too.

    python benchmarks/lora_placement.py RUN.yaml [--lrs 1e-3 2e-3] [--steps 60] [--threads 1]
        [--placements experts attention experts+attention router experts+attention+router]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from common import arguments, emit, say, table, thread_env

PLACEMENTS = ("experts", "attention", "experts+attention", "router", "experts+attention+router")


def train(run: dict[str, Any], placement: str, lr: float, steps: int, threads: int) -> dict[str, Any]:
    """One run of `moesmith sft` in a process and a folder of its own: what --json says."""
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **run,
            "out": f"{folder}/run",
            "lora": {**run.get("lora", {}), "targets": placement.split("+")},
            "train": {**run.get("train", {}), "lr": lr, "max_steps": steps, "eval_steps": steps},
        }
        file = Path(folder) / "run.yaml"
        file.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "moesmith", "sft", str(file), "--json"]
        ended = subprocess.run(command, stdout=subprocess.PIPE, env=thread_env(threads), text=True)
        if ended.returncode:
            raise SystemExit(f"{placement}, lr {lr}: moesmith sft ended with {ended.returncode}")
        return json.loads(ended.stdout)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("run", type=Path, help="a run file of moesmith sft; its lora.targets are replaced")
    parser.add_argument("--placements", nargs="+", default=PLACEMENTS)
    parser.add_argument("--lrs", type=float, nargs="+", help="learning rates to try; none: the run's own")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    run = yaml.safe_load(args.run.read_text())
    rates = args.lrs or [float(run["train"]["lr"])]
    rows = []
    for placement in args.placements:
        tried = []
        for lr in rates:
            facts = train(run, placement, lr, args.steps, args.threads)
            result, trained = facts["result"], facts["plan"]["adapters"]["trainable"]
            figures = {
                "parameters": sum(trained.values()),
                "loss_before": result["first_eval_loss"],
                "loss_after": result["last_eval_loss"],
                "tokens_per_second": result["tokens"] / result["seconds"],
                "peak_bytes": result["peak_bytes"],
            }
            emit(
                "lora_placement",
                {"placement": placement, "lr": lr, "steps": args.steps, "rank": run["lora"]["r"]},
                figures,
            )
            tried.append((figures["loss_after"], lr, figures))
        loss, lr, best = min(tried, key=lambda each: each[0])
        rows.append(
            [
                placement, f"{best['parameters']:,}", best["loss_before"], loss, f"{lr:g}",
                best["tokens_per_second"], best["peak_bytes"] / 1e9,
            ]
        )  # fmt: skip
    say()
    table(("placement", "parameters", "loss before", "after", "lr", "tokens/s", "peak GB"), rows)


if __name__ == "__main__":
    main()
