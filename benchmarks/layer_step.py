"""Training step of one OLMoE layer on the CPU: forward + backward through 4-bit experts with LoRA.

E=64 experts, H=2048, I=1024, top-8, r=8, 512 tokens (64 rows per expert), NF4, fp32 adapters. Compared in
turns with the reference loop of experts4bit-qlora 0.58.1 (own environment; same packed bytes, adapters and
inputs) and with this machine's own torch.mm rate at the same rows per expert, one matrix per expert. Outputs
and gradients of the two are compared before anything is timed.

    python benchmarks/layer_step.py [--small] [--rounds 7] [--threads 1 2] [--dtypes bf16 fp32]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from common import RIVAL, Worker, arguments, emit, in_turns, rival_python, say, summary, table
from layer_worker import pack_layer

FULL = {"E": 64, "H": 2048, "I": 1024, "K": 8, "r": 8}
SMALL = {"E": 8, "H": 256, "I": 128, "K": 2, "r": 4}
# Largest relative difference, ||ours - rival|| / ||rival||: rounding, not a different computation.
TOLERANCE = {"fp32": 1e-4, "bf16": 3e-2}


def differences(folder: Path, ours: Worker, rival: Worker, gradients: bool = True) -> dict[str, float]:
    """Relative difference of the last output and of every gradient; raises above the dtype's tolerance."""
    sides = []
    for name, worker in (("ours", ours), ("rival", rival)):
        dtype = worker(op="save", path=str(folder / name), gradients=gradients)["dtype"]
        sides.append(torch.load(folder / name, weights_only=True))
    a, b = sides
    assert a.keys() == b.keys(), (a.keys(), b.keys())
    apart = {key: ((a[key] - b[key]).norm() / b[key].norm()).item() for key in sorted(a)}
    for key, difference in apart.items():
        if not difference <= TOLERANCE[dtype]:
            raise AssertionError(f"{dtype}: {key} differs by {difference:.2e} from the rival's")
    return apart


def measure(
    ours: Worker, rival: Worker, sizes: dict[str, int], tokens: int, dtype: str, rounds: int
) -> dict[str, Any]:
    """Figures of both sides and of plain GEMMs, timed in turns."""
    rows = tokens * sizes["K"]
    gemm = {"rows": rows // sizes["E"], "matrices": sizes["E"], "dtype": dtype, "size": sizes["H"]}
    times = in_turns(
        {
            "ours": lambda: ours(op="step"),
            "rival": lambda: rival(op="step"),
            "gemm": lambda: ours(op="gemm", **gemm),
            "gemm_512": lambda: ours(op="gemm", **gemm | {"rows": 512}),
        },
        rounds,
    )
    figures = {
        f"{side}_{key}_s": value
        for side in ("ours", "rival")
        for part in ("forward", "backward", "step")
        for key, value in summary(times[side], part).items()
    }
    # Forward and the gradient of the input; the adapters' own products are not counted.
    flops = 2 * 2 * rows * 3 * sizes["H"] * sizes["I"]
    rate = max(r["flops_per_second"] for r in times["gemm"])
    return figures | {
        "times_faster": figures["rival_step_s"] / figures["ours_step_s"],
        "times_faster_median": figures["rival_step_median_s"] / figures["ours_step_median_s"],
        "flops_per_second": flops / figures["ours_step_s"],
        "gemm_flops_per_second": rate,
        "gemm_512_rows_flops_per_second": max(r["flops_per_second"] for r in times["gemm_512"]),
        "share_of_gemm_rate": flops / figures["ours_step_s"] / rate,
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny layer, to see that the script runs")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    args = parser.parse_args()
    sizes = SMALL if args.small else FULL

    python, lines = rival_python(), []
    with tempfile.TemporaryDirectory() as folder:
        packed = str(Path(folder) / "layer.pt")
        pack_layer(packed, sizes["E"], sizes["H"], sizes["I"])
        for threads in args.threads:
            with (
                Worker("layer_worker.py", "ours", threads=threads) as ours,
                Worker("layer_worker.py", "rival", python=python, threads=threads) as rival,
            ):
                for worker in (ours, rival):
                    worker(op="setup", packed=packed, threads=threads, **sizes)
                for dtype in args.dtypes:
                    for worker in (ours, rival):
                        worker(op="inputs", tokens=args.tokens, dtype=dtype)
                        worker(op="step")
                    apart = differences(Path(folder), ours, rival)
                    worst = max(apart, key=lambda key: apart[key])
                    figures = measure(ours, rival, sizes, args.tokens, dtype, args.rounds)
                    figures |= {"largest_difference": apart[worst], "largest_difference_in": worst}
                    setting = sizes | {"tokens": args.tokens, "threads": threads}
                    emit(
                        "layer_step", setting | {"dtype": dtype, "rival": RIVAL}, figures, rounds=args.rounds
                    )
                    timed = [f"{s}_{p}_s" for s in ("ours", "rival") for p in ("forward", "backward")]
                    lines.append(
                        (dtype, threads, *(figures[key] for key in timed), figures["times_faster"])
                        + (
                            figures["gemm_flops_per_second"] / 1e9,
                            figures["share_of_gemm_rate"],
                            apart[worst],
                        )
                    )
    say("seconds, best of the rounds")
    table(
        (
            "dtype",
            "threads",
            "fwd",
            "bwd",
            "rival fwd",
            "rival bwd",
            "x faster",
            "GEMM GFLOP/s",
            "share",
            "diff",
        ),
        lines,
    )


if __name__ == "__main__":
    main()
