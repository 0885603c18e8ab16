"""What each way out of moesmith costs: `moesmith export` of one adapter in every form, parity read back.

Runs the command itself, form by form, and prints the comparison that each leaves in parity.json, with its
seconds and bytes. Needs an adapter that names its base; the GGUF forms need llama.cpp (see docs/export.md).

    python benchmarks/export_parity.py --adapter run1/best [--forms merged peft vllm gguf gguf-lora]
        [--quant q8_0,q4_k_m] [--threads 2] [--folder DIR]
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, emit, say, table, thread_env

FORMS: dict[str, list[str]] = {
    "merged float32": ["merged", "--dtype", "float32"],
    "merged": ["merged"],
    "peft": ["lora", "--for", "peft"],
    "vllm": ["lora", "--for", "vllm"],
    "gguf-lora": ["lora", "--for", "gguf"],
    "gguf": ["gguf"],
}


def export(form: str, adapter: Path, folder: Path, quant: str, threads: int) -> dict[str, Any]:
    """One run of the command; its record, the seconds, and what it said where it refused."""
    out = folder / form.replace(" ", "-")
    words = [*FORMS[form], "--adapter", str(adapter), "--out", str(out)]
    if form == "gguf":
        words += ["--quant", quant, "--imatrix", "auto"]
    if form.startswith("gguf"):
        words += ["--threads", str(threads)]
    started = time.perf_counter()
    command = [sys.executable, "-m", "moesmith", "export", *words]
    done = subprocess.run(command, text=True, capture_output=True, env=thread_env(threads))
    seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
    parity = json.loads((out / "parity.json").read_text())["parity"]
    nbytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return {"parity": parity, "seconds": seconds, "bytes": nbytes}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--adapter", type=Path, required=True)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--quant", default="q8_0,q4_k_m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where to put the exports (default: the temporary folder)")
    args = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory(prefix="moesmith-", dir=args.folder) as folder:
        for form in args.forms:
            made = export(form, args.adapter, Path(folder), args.quant, args.threads)
            for one in made["parity"]:
                found = one["parity"]
                setting = {"form": form, "route": one["route"], "against": one["against"]}
                figures = {name: found[name] for name in ("mean", "max", "kl", "agreement", "tokens")}
                emit("export_parity", setting, figures | {"seconds": made["seconds"], "bytes": made["bytes"]})
                shown = [found[name] for name in ("mean", "max", "kl", "agreement")]
                lines.append([form, one["route"], *shown, made["seconds"], made["bytes"] / 1e6])
    say()
    table(["form", "route", "mean", "largest", "KL", "same token", "seconds", "MB"], lines)


if __name__ == "__main__":
    main()
