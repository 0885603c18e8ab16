"""Memory and time of merging an adapter into a full-width MoE, ours and PEFT's, at two depths.

Makes a random bf16 checkpoint with the true widths and expert counts of OLMoE-1B-7B (or --families), packs it
to nf4, and puts a random adapter on experts and attention. Fresh processes then merge it with
`merge_checkpoint` (from the packed and from the 16-bit folder), and with stock PEFT: load in bf16,
`merge_and_unload`, `save_pretrained`. Figures are above the memory that the process has after its imports.
Ours should not grow with the number of layers. The checkpoints are removed at the end.

    python benchmarks/merge_memory.py [--small] [--families olmoe] [--layers 2 4] [--rank 16] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import arguments, emit, say, table, thread_env
from load_memory import FAMILIES, AnonymousMemory, make

ROLES = ("packed", "dense", "peft")


def prepare(path: Path, family: str, layers: int, small: bool, rank: int) -> dict[str, Any]:
    """dense/, packed/ and adapter/ below `path`."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from moesmith import ExpertsConfig
    from moesmith.models.layers import adapter_targets

    (path / "dense").mkdir()
    made = make(path / "dense", family, layers, small)
    model = AutoModelForCausalLM.from_pretrained(
        path / "dense", quantization_config=ExpertsConfig("nf4"), dtype=torch.bfloat16
    )
    model.save_pretrained(path / "packed")
    modules, parameters = adapter_targets(model, ("experts", "attention"))
    config = LoraConfig(r=rank, lora_alpha=rank, target_modules=modules, target_parameters=parameters)
    adapted = get_peft_model(model, config)
    for name, tensor in adapted.named_parameters():
        if "lora_B" in name:
            tensor.data.normal_(std=0.02)
    adapted.save_pretrained(path / "adapter")
    return made


def merge(path: Path, role: str) -> dict[str, Any]:
    """One merge in this fresh process, measured."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from moesmith.export.merge import merge_checkpoint

    torch.zeros(1024, 1024) @ torch.zeros(1024, 1024)  # the libraries' own start-up memory is not the merge's
    out = path / f"out-{role}"
    out.mkdir()
    with AnonymousMemory() as memory:
        if role == "peft":
            model = AutoModelForCausalLM.from_pretrained(path / "dense", dtype=torch.bfloat16)
            PeftModel.from_pretrained(model, path / "adapter").merge_and_unload().save_pretrained(out)
        else:
            merge_checkpoint(path / role, [path / "adapter"], out)
    written = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    shutil.rmtree(out)
    return {
        "seconds": memory.seconds,
        "peak_anonymous_bytes": memory.peak,
        "written_bytes": written,
        "seconds_per_gb": memory.seconds / written * 1e9,
    }


def in_process(role: str, words: list[str], threads: int) -> dict[str, Any]:
    """One role of this script in a fresh process."""
    command = [sys.executable, __file__, "--role", role, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=thread_env(threads))
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="narrow models, to see that the script runs")
    parser.add_argument("--families", nargs="+", default=["olmoe"], choices=list(FAMILIES))
    parser.add_argument("--layers", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", help="where to put the checkpoints (default: the temporary folder)")
    parser.add_argument("--role", choices=["make", *ROLES], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role == "make":
        made = prepare(args.path, args.families[0], args.layers[0], args.small, args.rank)
        return print(json.dumps(made))
    if args.role:
        return print(json.dumps(merge(args.path, args.role)))

    lines = []
    for family in args.families:
        for layers in args.layers:
            path = Path(tempfile.mkdtemp(prefix=f"moesmith-{family}-", dir=args.folder))
            words = ["--path", str(path), "--families", family, "--layers", str(layers)]
            words += ["--rank", str(args.rank), *(["--small"] if args.small else [])]
            try:
                made = in_process("make", words, args.threads)
                for role in ROLES:
                    found = in_process(role, words, args.threads)
                    setting = {"family": family, "layers": layers, "rank": args.rank, "from": role, **made}
                    emit("merge_memory", setting, found)
                    peak, size = found["peak_anonymous_bytes"] / 1e6, found["written_bytes"] / 1e6
                    lines.append([family, layers, role, size, peak, found["seconds"]])
            finally:
                shutil.rmtree(path)
    say()
    table(["family", "layers", "from", "MB written", "peak MB", "seconds"], lines)


if __name__ == "__main__":
    main()
