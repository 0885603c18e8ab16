"""Decoding with experts on disk, the experts of OLMoE-1B-7B, on a CPU: against memory, and against a rival.

Makes a random 16-bit checkpoint of the full shape, packs it by layers for us, and bakes it for
experts4bit-qlora 0.58.1 with the rival's own tool (which takes the quantiser as an argument: ours, whose
bytes are bitsandbytes'). Then each side, in a process of its own, computes the experts of all 16 layers for
one token after the other; hidden states and routes are the same random ones, and the outputs are compared.
Attention, norms and head, which are transformers' own code on every side, are left out.

cold: before each token nothing of the experts is in memory. warm: everything is. skewed: routes of a Zipf
law, memory as the tokens before left it (the rival's pool holds an eighth of the experts). The rival's disk
path is called with device="cpu" and unpinned memory; where it does not run, its error is what is recorded (on
2026-11-22: its kernel refuses tensors on a CPU), and what is left to compare with is our own model in memory.

    python benchmarks/disk_decode.py [--packed DIR] [--small] [--tokens 24] [--folder DIR] [--threads 1]

Needs 22 GB of disk for the full shape, and the network once, for the rival. --packed: a packed OLMoE shape
that is there already (`true_shape.py --keep`); then without the rival, and with no disk.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import RIVAL, arguments, emit, rival_python, say, table
from true_shape import RandomCheckpoint, forget, watched

KERNELS = "grouped-nf4-gemm==0.51.0"
MADV_DONTNEED = 4


def rival_paths() -> list[str]:
    """Folders with the rival's package and with the kernels it wants for this; fetched when missing."""
    home = Path(rival_python()).parent.parent
    kernels = home / "kernels"
    if not kernels.exists():
        pip = [
            home / "bin" / "python",
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--target",
            kernels,
            KERNELS,
        ]
        subprocess.run(pip, check=True, stdout=sys.stderr)
    return [str(next(home.glob("lib/python*/site-packages/experts4bit_qlora")).parent), str(kernels)]


def see_rival() -> None:
    """Put the rival on the path, behind this environment's own packages."""
    sys.path += os.environ["MOESMITH_RIVAL"].split(os.pathsep)


def prepare(args: argparse.Namespace) -> dict[str, Any]:
    """The same weights as our packed folder and as the rival's arena."""
    import torch

    from moesmith import ExpertsConfig
    from moesmith.models.pack import LayerPacker
    from moesmith.ops.blockwise import quantize

    checkpoint = RandomCheckpoint(args.path / "16bit", "olmoe", args.small)
    for part in checkpoint.files:
        checkpoint.fill(part)
    (args.path / "packed").mkdir()
    start = time.perf_counter()
    for _ in LayerPacker.start(args.path / "16bit", ExpertsConfig("nf4"), torch.bfloat16).write(
        args.path / "packed"
    ):
        pass
    ours = time.perf_counter() - start

    def pack(weight: Any) -> tuple[Any, Any]:
        codes, absmax = quantize(weight, "nf4", 64)
        return codes, absmax

    problem = None
    start = time.perf_counter()
    see_rival()
    try:
        from nvme_bake_nf4 import bake_nf4

        bake_nf4(str(args.path / "16bit"), str(args.path / "arena"), quantize_fn=pack)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    return {"pack_seconds": ours, "bake_seconds": time.perf_counter() - start, "bake_problem": problem}


def routes(args: argparse.Namespace, how: str, layers: int, experts: int, hidden: int) -> Any:
    """Hidden states (tokens, 1, hidden), experts (tokens, layers, 1, K) and weights of the same shape."""
    import torch

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(args.tokens, 1, hidden, generator=generator).bfloat16()
    odds = torch.ones(experts) if how != "skewed" else 1 / torch.arange(1, experts + 1)
    picks = torch.stack(
        [torch.multinomial(odds, 8, generator=generator) for _ in range(args.tokens * layers)]
    ).view(args.tokens, layers, 1, 8)
    weights = torch.rand(args.tokens, layers, 1, 8, generator=generator)
    return x, picks, weights / weights.sum(-1, keepdim=True)


def run(
    args: argparse.Namespace, modules: list[Any], empty: Any, experts: int, hidden: int
) -> dict[str, Any]:
    """Seconds of every token, and the outputs' sum over layers in a file."""
    import torch

    x, picks, weights = routes(args, args.how, len(modules), experts, hidden)
    if args.how == "warm":  # every expert once
        with torch.no_grad():
            for first in range(0, experts, 8):
                for module in modules:
                    module(x[0], torch.arange(first, first + 8)[None], weights[0, 0])
    seconds, outputs = [], []
    with torch.no_grad():
        for token in range(args.tokens):
            if args.how == "cold":
                empty()
            start = time.perf_counter()
            outputs.append(
                [module(x[token], picks[token, i], weights[token, i]) for i, module in enumerate(modules)]
            )
            seconds.append(time.perf_counter() - start)
    found = torch.stack([torch.stack([layer.float() for layer in token]) for token in outputs])
    torch.save(found, args.path / f"{args.role}-{args.how}.pt")
    seconds = sorted(seconds[1:])
    return {"median_token_seconds": seconds[len(seconds) // 2], "min_token_seconds": seconds[0]}


def ours(args: argparse.Namespace) -> dict[str, Any]:
    """The experts where they are mapped; --role memory: copied to memory first."""
    from transformers import AutoModelForCausalLM

    import moesmith  # noqa: F401
    from moesmith.experts.residency.attach import attach
    from moesmith.experts.residency.policy import Policy

    folder = args.path / "packed"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    modules = [layer.mlp.experts for layer in model.model.layers]
    stored = [parameter for module in modules for parameter in module.parameters()]
    if args.role == "memory":
        for parameter in stored:
            parameter.data = parameter.data.clone()
    else:
        attach(model, Policy(homes="disk"))
    libc = ctypes.CDLL(None, use_errno=True)

    def empty() -> None:
        for parameter in stored:
            start = -(-parameter.data_ptr() // 4096) * 4096
            end = (parameter.data_ptr() + parameter.nbytes) // 4096 * 4096
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_DONTNEED)
        forget(folder)

    if args.how == "skewed":
        empty()
    return run(args, modules, empty, model.config.num_experts, model.config.hidden_size)


def rival(args: argparse.Namespace) -> dict[str, Any]:
    """The rival's experts, cold ones from its arena."""
    see_rival()
    import torch
    from torch import nn

    try:
        from experts4bit_qlora.engines.nvme_experts import build_meta_experts, enable_nvme_residency
        from nvme_arena import load_index

        arena = str(args.path / "arena")
        index = load_index(arena)
        layers, experts = index["n_layers"], index["n_experts_per_layer"]
        rows = {"cold": 8, "warm": layers * experts, "skewed": layers * experts // 8}[args.how]
        model = nn.ModuleList(build_meta_experts(index, experts) for _ in range(layers))
        done = enable_nvme_residency(model, arena, [[]] * layers, hot_rows=rows, device="cpu", pinned=False)
        if done != layers:
            raise RuntimeError(f"enable_nvme_residency took {done} of {layers} layers")

        def empty() -> None:  # 8 rows of the pool are those of the last layer; the page cache is emptied
            for file in args.path.glob("arena*"):
                handle = os.open(file, os.O_RDONLY)
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(handle)

        empty()
        hidden = RandomCheckpoint.fields("olmoe", args.small)["hidden_size"]
        figures = run(args, list(model), empty, experts, hidden)
        stats = getattr(model[0]._e4b_cold_tier, "stats", dict)()
        return figures | {"stats": {k: v for k, v in stats.items() if isinstance(v, int | float)}}
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"[:600], "cuda": torch.cuda.is_available()}


ROLES = {"prepare": prepare, "ours": ours, "memory": ours, "rival": rival}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="a narrow model, to see that the script runs")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--packed", type=Path, help="a packed OLMoE shape; without the rival then")
    parser.add_argument("--folder", type=Path, help="where the models go (default: the temporary folder)")
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--how", default="cold", help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        out = os.fdopen(os.dup(1), "w")  # the rival prints to stdout
        os.dup2(2, 1)
        out.write(json.dumps(ROLES[args.role](args)) + "\n")
        return out.close()

    if args.packed is None:
        os.environ["MOESMITH_RIVAL"] = os.pathsep.join(rival_paths())
    path = Path(tempfile.mkdtemp(prefix="moesmith-disk-", dir=args.folder))

    def role(name: str, how: str = "cold") -> dict[str, Any]:
        words = ["--role", name, "--how", how, "--path", str(path), "--tokens", str(args.tokens)]
        command = [sys.executable, __file__, *words, *(["--small"] if args.small else [])]
        return watched(command, args.threads)

    rows = []
    setting = {"shape": "olmoe", "small": args.small, "threads": args.threads, "tokens": args.tokens}
    try:
        if args.packed is None:
            emit("disk_decode", setting | {"what": "prepare"}, role("prepare"))
            shutil.rmtree(path / "16bit")
        else:
            (path / "packed").symlink_to(args.packed.resolve())
        import torch

        for how in ("cold", "warm", "skewed"):
            sides = [
                "ours",
                *(["rival"] if args.packed is None else []),
                *(["memory"] if how == "warm" else []),
            ]
            found = {side: role(side, how) for side in sides}
            truth = torch.load(path / f"ours-{how}.pt")
            for side, figures in found.items():
                if "problem" not in figures and side != "ours":
                    other = torch.load(path / f"{side}-{how}.pt")
                    figures["largest_difference"] = (other - truth).abs().max().item()
                    figures["largest_output"] = truth.abs().max().item()
                figures["load_average"] = os.getloadavg()[0]
                emit(
                    "disk_decode",
                    setting | {"cache": how, "side": RIVAL if side == "rival" else side},
                    figures,
                )
                seconds = figures.get("median_token_seconds", float("nan"))
                rows.append(
                    (how, side, seconds, figures["peak_anonymous_bytes"] / 1e9, figures.get("problem", ""))
                )
    finally:
        shutil.rmtree(path)
    say("seconds of a token through the experts of all layers; peak = anonymous memory of the process")
    table(("cache", "side", "s per token", "peak GB", ""), rows)


if __name__ == "__main__":
    main()
