"""One token through one OLMoE layer on the CPU: the step that bounds decoding speed.

E=64, H=2048, I=1024, top-8, NF4, LoRA r=8 running. Compared in turns with the decode loop of
experts4bit-qlora 0.58.1 and with the bandwidth floor: the packed bytes of 8 experts over the read rate of the
same run. Successive calls route to different experts, so that all 64 are read in turn and none stays in
cache.

    python benchmarks/decode.py [--small] [--rounds 9] [--threads 1 2] [--dtypes bf16 fp32]
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import RIVAL, Worker, arguments, emit, in_turns, rival_python, say, summary, table
from layer_step import FULL, SMALL, differences
from layer_worker import pack_layer


def measure(ours: Worker, rival: Worker, token_bytes: int, calls: int, rounds: int) -> dict[str, Any]:
    """Figures of both sides and of plain reads, timed in turns; `token_bytes` is what one token must read."""
    times = in_turns(
        {
            "ours": lambda: ours(op="decode", calls=calls),
            "rival": lambda: rival(op="decode", calls=calls),
            "read": lambda: ours(op="read_rate", buffer_bytes=token_bytes, buffers=40),
        },
        rounds,
    )
    figures = {
        f"{side}_{key}": value
        for side in ("ours", "rival")
        for key, value in summary(times[side], "seconds").items()
    }
    rate = max(r["bytes_per_second"] for r in times["read"])
    return figures | {
        "times_faster": figures["rival_seconds"] / figures["ours_seconds"],
        "times_faster_median": figures["rival_seconds_median"] / figures["ours_seconds_median"],
        "packed_bytes_per_token": token_bytes,
        "read_bytes_per_second": rate,
        "floor_seconds": token_bytes / rate,
        "share_of_floor": token_bytes / rate / figures["ours_seconds"],
    }


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="a tiny layer, to see that the script runs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=16, help="tokens per visit")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp32"])
    args = parser.parse_args()
    sizes = SMALL if args.small else FULL

    python, lines = rival_python(), []
    with tempfile.TemporaryDirectory() as folder:
        packed = str(Path(folder) / "layer.pt")
        token_bytes = pack_layer(packed, sizes["E"], sizes["H"], sizes["I"]) * sizes["K"] // sizes["E"]
        for threads in args.threads:
            with (
                Worker("layer_worker.py", "ours", threads=threads) as ours,
                Worker("layer_worker.py", "rival", python=python, threads=threads) as rival,
            ):
                for worker in (ours, rival):
                    worker(op="setup", packed=packed, threads=threads, **sizes)
                for dtype in args.dtypes:
                    for worker in (ours, rival):
                        worker(op="inputs", tokens=1, dtype=dtype)
                        worker(op="decode", calls=1)
                    apart = differences(Path(folder), ours, rival, gradients=False)["out"]
                    figures = measure(ours, rival, token_bytes, args.calls, args.rounds)
                    setting = sizes | {"tokens": 1, "dtype": dtype, "threads": threads, "rival": RIVAL}
                    emit(
                        "decode",
                        setting,
                        figures | {"difference": apart},
                        rounds=args.rounds,
                        calls=args.calls,
                    )
                    milliseconds = [
                        figures[key] * 1e3 for key in ("ours_seconds", "rival_seconds", "floor_seconds")
                    ]
                    lines.append(
                        (dtype, threads, *milliseconds, figures["read_bytes_per_second"] / 1e9)
                        + (figures["times_faster"], figures["share_of_floor"], apart)
                    )
    say("milliseconds per token, best of the rounds")
    table(("dtype", "threads", "ours", "rival", "floor", "read GB/s", "x faster", "of floor", "diff"), lines)


if __name__ == "__main__":
    main()
