"""Turn the JSON lines of a benchmark run into the rows of docs/benchmarks.md.

python benchmarks/tables.py bench-out/*.jsonl
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import number

MB = 1e6
Record = dict[str, Any]


def layer_step(s: Record, f: Record) -> list[Any]:
    timed = [f[f"{side}_{part}_s"] for side in ("ours", "rival") for part in ("forward", "backward")]
    share = f"{f['share_of_gemm_rate']:.0%}"
    return [s["dtype"], s["threads"], *timed, f["times_faster"], f["gemm_flops_per_second"] / 1e9, share]


def decode(s: Record, f: Record) -> list[Any]:
    times = [f["ours_seconds"] * 1e3, f["rival_seconds"] * 1e3, f["times_faster"]]
    floor = [f["read_bytes_per_second"] / 1e9, f["floor_seconds"] * 1e3, f"{f['share_of_floor']:.0%}"]
    return [s["dtype"], s["threads"], *times, *floor]


def quantize(s: Record, f: Record) -> list[Any]:
    sides = [(f[f"{k}_seconds"], f[f"{k}_weights_per_second"] / 1e6) for k in ("ours", "bitsandbytes")]
    return [s["threads"], *sides[0], *sides[1], f["times_faster"]]


def load_memory(s: Record, f: Record) -> list[Any]:
    names = ("disk", "model", "layer_stack", "peak_anonymous", "limit")
    return [s["family"], *(f[f"{name}_bytes"] / MB for name in names), f["seconds"]]


def reload(s: Record, f: Record) -> list[Any]:
    return [s["family"], f["seconds"], f["peak_anonymous_bytes"] / MB]


def gpu_layer(s: Record, f: Record) -> list[Any]:
    times = [f[f"{name}_seconds_median"] * 1e3 for name in ("forward", "dense_forward", "step")]
    return [s["layer"], s["tokens"], *times, (f["step_peak_bytes"] or 0) / MB]


ROWS: dict[str, Callable[[Record, Record], list[Any]]] = {
    row.__name__: row for row in (layer_step, decode, quantize, load_memory, reload, gpu_layer)
}


def main() -> None:
    shown = ""
    for path in sys.argv[1:]:
        for line in Path(path).read_text().splitlines():
            record = json.loads(line)
            if record["bench"] != shown:
                shown = record["bench"]
                machine, versions = record["machine"], record["versions"]
                print(f"\n{shown}: {record['command']}, commit {record['commit']}, {record['date']}")
                print(f"{machine}\n{versions}\n")
            cells = ROWS[record["bench"]](record["setting"], record["figures"])
            print("| " + " | ".join(number(c) if isinstance(c, float) else str(c) for c in cells) + " |")


if __name__ == "__main__":
    main()
