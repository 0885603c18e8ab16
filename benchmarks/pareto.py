"""Divergence against experts kept, by criterion, at random, merged, and after healing: the whole journey.

Runs the commands a user would: `compare` on what the profile held out, then for each count `prune` by the
criterion that did best and `heal`, judged on the same text. Prints one JSON line per count and a table in
Markdown on stderr. The compare report stays in OUT/compare.

    python benchmarks/pareto.py MODEL PROFILE --out DIR [--cut 1/8,1/4] [--scores reap,man]
        [--heal "--tokens 20000 --stages router"]
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import arguments, emit, say


def moesmith(*words: str) -> dict[str, Any]:
    """Run a command of moesmith; what it says as JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "moesmith", *words, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("model")
    parser.add_argument("profile")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--cut", default="1/16,1/8,1/4,1/2")
    parser.add_argument("--scores", default="contribution,reap,easyep,frequency")
    parser.add_argument("--heal", default="", help="more options of moesmith heal, in one string")
    args = parser.parse_args()
    compared = moesmith(
        "compare", args.model, "--profile", args.profile, "--out", str(args.out / "compare"),
        "--cut", args.cut, "--scores", args.scores,
    )  # fmt: skip
    by_keep: dict[int, dict[str, list[float]]] = {}
    for plan in compared["evidence"]:
        name = f"merge {plan['series']}" if plan["kind"] == "merge" else plan["series"]
        by_keep.setdefault(plan["keep"], {}).setdefault(name, []).append(plan["kl"])
    names = args.scores.split(",")
    lines = []
    for keep in sorted(by_keep, reverse=True):
        kl = by_keep[keep]
        best = min(names, key=lambda name: kl[name][0])
        pruned, healed = args.out / f"keep{keep}", args.out / f"healed{keep}"
        for folder in (pruned, healed):
            shutil.rmtree(folder, ignore_errors=True)
        moesmith(
            "prune", args.model, "--profile", args.profile, "--keep", str(keep), "--score", best,
            "--out", str(pruned), "--evidence", "none",
        )  # fmt: skip
        record = moesmith(
            "heal", str(pruned), "--teacher", args.model, "--profile", args.profile, "--out", str(healed),
            *args.heal.split(),
        )  # fmt: skip
        random = sorted(kl["random"])
        figures = {
            **{name: values[0] for name, values in kl.items() if name != "random"},
            "random_median": random[len(random) // 2],
            "random_best": random[0],
            "best": best,
            "pruned_kl": record["before"]["kl"]["mean"],
            "healed_kl": record["after"]["kl"]["mean"],
            "healed_ppl_ratio": record["after"]["ppl"]["overall"]["ratio"],
            "pruned_ppl_ratio": record["before"]["ppl"]["overall"]["ratio"],
            "accepted": record["accepted"],
        }
        emit("pareto", {"model": Path(args.model).name, "keep": keep}, figures)
        merged = min((v[0], name) for name, v in kl.items() if name.startswith("merge "))
        cells = [f"{kl[name][0]:.4f}" for name in names]
        cells += [f"{figures['random_median']:.3f} ({random[0]:.3f})", f"{merged[0]:.4f} ({merged[1]})"]
        cells += [f"{figures['healed_kl']:.4f} ({'+'.join(record['accepted']) or 'reverted'})"]
        lines.append(f"| {keep} | " + " | ".join(cells) + " |")
    say("| kept | " + " | ".join(names) + " | random median (best) | best merge | best pruned, healed |")
    say("|---" * (len(names) + 4) + "|")
    for line in lines:
        say(line)


if __name__ == "__main__":
    main()
