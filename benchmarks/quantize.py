"""Packing one OLMoE layer to NF4 on the CPU: 403 M bf16 weights, ours against bitsandbytes, same bytes out.

moesmith packs a whole stack per call; bitsandbytes has no stacked form, so it is called once per expert
matrix, as its users do. --experts N times N of the 64 experts; nothing is scaled, rates are per weight.

    python benchmarks/quantize.py [--small] [--rounds 3] [--threads 1 2] [--experts 64]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch

from common import Worker, arguments, emit, in_turns, say, serve, summary, table

BLOCKSIZE = 64


class Packer:
    """One process held to its thread count; bitsandbytes' own library reads it only at start."""

    def setup(self, experts: int, hidden: int, inner: int, threads: int) -> dict[str, Any]:
        torch.set_num_threads(threads)
        generator = torch.Generator().manual_seed(0)
        shapes = ((experts, 2 * inner, hidden), (experts, hidden, inner))
        self.stacks = [
            torch.empty(s, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator) for s in shapes
        ]
        return {"weights": sum(stack.numel() for stack in self.stacks)}

    def ours(self) -> dict[str, Any]:
        from moesmith.ops.blockwise import quantize

        start = time.perf_counter()
        self.packed = [quantize(stack, "nf4", BLOCKSIZE) for stack in self.stacks]
        return {"seconds": time.perf_counter() - start}

    def bitsandbytes(self) -> dict[str, Any]:
        from bitsandbytes.functional import quantize_4bit

        start = time.perf_counter()
        self.reference = [
            [quantize_4bit(matrix, blocksize=BLOCKSIZE, quant_type="nf4") for matrix in stack]
            for stack in self.stacks
        ]
        return {"seconds": time.perf_counter() - start}

    def compare(self) -> dict[str, Any]:
        """Raise unless every code and every absmax is the same."""
        for (codes, absmax), matrices in zip(self.packed, self.reference, strict=True):
            for expert, (want, state) in enumerate(matrices):
                assert torch.equal(codes[expert].flatten(), want.flatten()), (
                    f"codes of expert {expert} differ"
                )
                assert torch.equal(absmax[expert].flatten(), state.absmax.flatten()), (
                    f"absmax of {expert} differs"
                )
        return {"bytes_equal": True}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="two small experts, to see that the script runs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        packer = Packer()
        return serve({name: getattr(packer, name) for name in ("setup", "ours", "bitsandbytes", "compare")})

    sizes = {"experts": args.experts, "hidden": 2048, "inner": 1024}
    if args.small:
        sizes = {"experts": 2, "hidden": 256, "inner": 128}
    lines = []
    for threads in args.threads:
        with Worker("quantize.py", "--worker", threads=threads) as worker:
            weights = worker(op="setup", threads=threads, **sizes)["weights"]
            times = in_turns(
                {side: lambda side=side: worker(op=side) for side in ("ours", "bitsandbytes")}, args.rounds
            )
            figures: dict[str, Any] = worker(op="compare")
        best = {}
        for side in ("ours", "bitsandbytes"):
            best[side] = min(r["seconds"] for r in times[side])
            figures |= {f"{side}_{k}": v for k, v in summary(times[side], "seconds").items()}
            figures[f"{side}_weights_per_second"] = weights / best[side]
        figures["times_faster"] = best["bitsandbytes"] / best["ours"]
        setting = {**sizes, "scheme": "nf4", "blocksize": BLOCKSIZE, "dtype": "bf16", "threads": threads}
        emit("quantize", {**setting, "weights": weights}, figures, rounds=args.rounds)
        rates = [weights / best[side] / 1e6 for side in ("ours", "bitsandbytes")]
        lines.append((threads, best["ours"], best["bitsandbytes"], *rates, figures["times_faster"]))
    say(f"{weights / 1e6:.0f} M weights; bytes equal")
    table(("threads", "ours s", "bnb s", "ours M/s", "bnb M/s", "x faster"), lines)


if __name__ == "__main__":
    main()
