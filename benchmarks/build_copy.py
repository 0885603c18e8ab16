"""Putting a MoE together from dense models: bytes per second against `cp`, and peak memory.

Makes four random bf16 checkpoints of llama type, each with files and values of its own: 2 layers with the
widths of Mistral-7B (1.4 GB each). They become a Mixtral of 4 experts with random routers. In turns:

    copy    init: copy through build.assemble in a fresh process; all but the routers are byte ranges
    cp      coreutils' cp of the same number of bytes (the written files)

Both are timed until their files are fsynced; the plan of `copy` is made within its time, Python's start and
imports are not. The page cache holds the sources (warm), or is told to drop them before every round (cold).
Then the modes that compute their experts, on checkpoints with the widths of TinyLlama-1.1B (2 layers,
0.42 GB each): the first source is the base itself, so `lora` has nothing to make for it.

`peak` is the anonymous memory (RssAnon, sampled) above what the process has after its imports; beside it
stand the bytes of one layer's FFNs of all four experts, which the easy way would hold. Everything made is
removed at the end (about 13 GB of disk at a time).

    python benchmarks/build_copy.py [--rounds 5] [--cache warm cold] [--inits lora:16 drop:0.5] [--small]
        [--threads 2] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from common import arguments, emit, in_turns, say, table, thread_env
from load_memory import AnonymousMemory
from prune_copy import cp, peak_bytes, set_cache, synced

MB, GB = 1e6, 1e9
EXPERTS, TOP_K, LAYERS = 4, 2, 2
MISTRAL = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINYLLAMA = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
}
SMALL = {"hidden_size": 256, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDTHS = {"mistral": MISTRAL, "tinyllama": TINYLLAMA, "small": SMALL}


def make(path: Path, widths: str) -> dict[str, Any]:
    """Write the dense checkpoints, one file each, one model in memory at a time."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = WIDTHS[widths]
    config = LlamaConfig(**fields, num_hidden_layers=LAYERS, vocab_size=1000 if widths == "small" else 32000)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlamaForCausalLM(config).state_dict().items()}
    size = 0
    for number in range(EXPERTS):
        folder = path / f"source-{number}"
        folder.mkdir()
        config.save_pretrained(folder)
        generator = torch.Generator().manual_seed(number)
        noise = (torch.randn(1 << 23, generator=generator) * 0.02).bfloat16()
        tensors = {}
        for position, (name, shape) in enumerate(shapes.items()):
            flat = torch.ones(shape, dtype=torch.bfloat16).view(-1)
            if len(shape) > 1:  # other values in every matrix, without drawing them all
                for begin in range(0, len(flat), len(noise)):
                    piece = flat[begin : begin + len(noise)]
                    piece.copy_(noise.roll(7919 * (position + 1) + begin // 7)[: len(piece)])
            tensors[name] = flat.view(shape)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        size += sum(tensor.nbytes for tensor in tensors.values())
        synced(folder)
    matrix = 2 * fields["hidden_size"] * fields["intermediate_size"]
    return {"source_bytes": size, "matrix_bytes": matrix, "layer_bytes": EXPERTS * 3 * matrix}


def build(path: Path, init: str) -> dict[str, Any]:
    """Build the MoE in this fresh process."""
    import torch

    from moesmith.build.assemble import assemble, write_model
    from moesmith.build.modes import ExpertSource, make_experts
    from moesmith.build.native import target_config
    from moesmith.build.sources import open_source
    from moesmith.models.ranges import Piece

    torch.zeros(1024, 1024) @ torch.zeros(1024, 1024)  # the libraries' own start-up memory is not the build's
    with AnonymousMemory() as memory:
        start = time.perf_counter()
        sources = [open_source(path / f"source-{number}") for number in range(EXPERTS)]
        base = sources[0]
        experts = make_experts(init, [ExpertSource(source, base) for source in sources], base.dtype, seed=0)
        config = target_config(base.config, "mixtral", EXPERTS, TOP_K, experts.width)
        generator = torch.Generator().manual_seed(0)
        routers = [torch.randn(EXPERTS, base.hidden_size, generator=generator) for _ in range(LAYERS)]
        tensors = assemble(base, config, experts, routers)
        planned = time.perf_counter()
        write_model(base, path / "out", config, tensors)
        written = time.perf_counter()
        synced(path / "out")
        done = time.perf_counter()
    parts = [part for tensor in tensors for part in tensor.parts]
    size = sum(tensor.nbytes for tensor in tensors)
    copied = sum(part.nbytes for part in parts if isinstance(part, Piece))
    return {
        "seconds": done - start,
        "plan_seconds": planned - start,
        "copy_seconds": written - planned,
        "bytes": size,
        "bytes_copied": copied,
        "bytes_made": size - copied,
        "peak_anonymous_bytes": memory.peak,
        "peak_bytes": peak_bytes(),
    }


def in_process(role: str, path: Path, threads: int, *words: str) -> dict[str, Any]:
    """Run one role of this script in a fresh process and read its figures."""
    command = [sys.executable, __file__, "--role", role, "--path", str(path), *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=thread_env(threads))
    return json.loads(done.stdout.splitlines()[-1])


def fresh_out(path: Path) -> None:
    shutil.rmtree(path / "out", ignore_errors=True)
    (path / "out").mkdir()


def middle(rounds: list[dict[str, float]]) -> dict[str, float]:
    """The median of every figure; of memory the largest."""
    return {
        key: (max if key.startswith("peak") else statistics.median)([figures[key] for figures in rounds])
        for key in rounds[0]
    }


def against_cp(path: Path, widths: str, args: argparse.Namespace) -> list[tuple]:
    """init: copy and cp in turns; a line of the table for each side and cache."""
    made = in_process("make", path, args.threads, "--widths", widths)
    fresh_out(path)
    in_process("build", path, args.threads, "--init", "copy")
    (path / "sample").mkdir()
    for file in (path / "out").glob("*.safetensors"):
        file.rename(path / "sample" / file.name)
    lines = []
    for cache in args.cache:

        def side(name: str, cache: str = cache) -> dict[str, Any]:
            fresh_out(path)
            for folder in [path / "sample"] if name == "cp" else sorted(path.glob("source-*")):
                set_cache(folder, cache == "warm")
            return cp(path) if name == "cp" else in_process("build", path, args.threads, "--init", name)

        results = in_turns({name: partial(side, name) for name in ("cp", "copy")}, args.rounds)
        rate = {name: statistics.median(r["bytes"] / r["seconds"] for r in results[name]) for name in results}
        cached = {
            name: statistics.median(r["bytes"] / r["copy_seconds"] for r in results[name]) for name in results
        }
        for name, rounds in results.items():
            setting = {"widths": widths, "cache": cache, "side": name, "rounds": args.rounds}
            setting |= {"experts": EXPERTS, "layers": LAYERS, "sources": "distinct files", **made}
            figures = middle(rounds)
            figures |= {"bytes_per_second": rate[name], "against_cp": rate[name] / rate["cp"]}
            figures |= {"copy_against_cp": cached[name] / cached["cp"]}
            emit("build_copy", setting, figures)
            lines.append(
                (f"{widths} {cache}", name, figures["bytes"] / GB, figures.get("bytes_made", 0) / GB)
                + (figures["seconds"], rate[name] / MB, f"{rate[name] / rate['cp']:.2f}")
                + (f"{cached[name] / cached['cp']:.2f}", figures.get("peak_anonymous_bytes", 0) / MB)
                + (made["layer_bytes"] / MB,)
            )
    return lines


def making(path: Path, widths: str, args: argparse.Namespace) -> list[tuple]:
    """The modes that compute experts, in turns, warm."""
    made = in_process("make", path, args.threads, "--widths", widths)

    def side(init: str) -> dict[str, Any]:
        fresh_out(path)
        for folder in sorted(path.glob("source-*")):
            set_cache(folder, warm=True)
        return in_process("build", path, args.threads, "--init", init)

    results = in_turns({init: partial(side, init) for init in args.inits}, args.rounds, warmup=0)
    lines = []
    for init, rounds in results.items():
        setting = {"widths": widths, "cache": "warm", "side": init, "rounds": args.rounds}
        setting |= {"experts": EXPERTS, "layers": LAYERS, "threads": args.threads}
        setting |= {"sources": "distinct files", **made}
        figures = middle(rounds)
        figures["made_per_second"] = figures["bytes_made"] / figures["copy_seconds"]
        emit("build_copy", setting, figures)
        lines.append(
            (f"{widths} warm", init, figures["bytes"] / GB, figures["bytes_made"] / GB, figures["seconds"])
            + (figures["made_per_second"] / MB, "", "", figures["peak_anonymous_bytes"] / MB)
            + (made["layer_bytes"] / MB,)
        )
    return lines


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cache", nargs="+", default=["warm", "cold"], choices=["warm", "cold"])
    parser.add_argument("--inits", nargs="*", default=["lora:16", "drop:0.5"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--small", action="store_true", help="narrow models, to see that the script runs")
    parser.add_argument("--folder", help="where to put the checkpoints (default: the temporary folder)")
    parser.add_argument("--role", choices=["make", "build"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--widths", choices=WIDTHS, help=argparse.SUPPRESS)
    parser.add_argument("--init", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        return print(
            json.dumps(make(args.path, args.widths) if args.role == "make" else build(args.path, args.init))
        )

    lines = []
    for measure, widths in ((against_cp, "mistral"), (making, "tinyllama")):
        if measure is making and not args.inits:
            continue
        path = Path(tempfile.mkdtemp(prefix="moesmith-build-", dir=args.folder))
        try:
            lines += measure(path, "small" if args.small else widths, args)
        finally:
            shutil.rmtree(path)
    say("until fsynced; MB/s of the written bytes, for made modes of the bytes made; peak: anonymous memory")
    header = ("checkpoints", "side", "GB", "GB made", "s", "MB/s", "of cp", "of cp, cached", "peak MB")
    table((*header, "layer x experts MB"), lines)


if __name__ == "__main__":
    main()
