"""Memory and time of a profile that streams decoder layers from disk, against the same profile in memory.

Makes a random bf16 checkpoint of OLMoE-1B-7B or Gemma-4-26B-A4B with their true widths, expert counts and
names on disk, and 4 layers. A fresh process replays random tokens through it layer by layer with the
collector watching, another one through the model that `from_pretrained` gives, both while a thread samples
anonymous memory (RssAnon: what cannot be dropped and read again from a file), above what the process has
after its imports. The two sets of statistics are compared bit by bit. The goal is a peak of at most the
largest layer and 1 GB. The checkpoint is removed at the end (up to 9 GB of disk).

    python benchmarks/profile_stream.py [--small] [--families olmoe gemma4] [--layers 4] [--tokens 2048]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import arguments, emit, say, table, thread_env
from load_memory import AnonymousMemory, make

MB = 1e6
ALLOWANCE = 1000 * MB
DOCUMENTS, LENGTH = 4, 128  # of one batch


@dataclass
class Batch:
    ids: Any
    mask: Any
    index: Any


def text(tokens: int, vocabulary: int) -> tuple[list[Any], list[Batch]]:
    """Random documents of two domains, and the batches they are replayed in."""
    import torch

    from moesmith.prune.stats import Document

    generator = torch.Generator().manual_seed(0)
    documents: list[Any] = []
    batches = []
    for _ in range(tokens // (DOCUMENTS * LENGTH)):
        ids = torch.randint(3, vocabulary, (DOCUMENTS, LENGTH), generator=generator)
        first = len(documents)
        documents += [Document(f"d/{first + i}", "ab"[i % 2], LENGTH, "") for i in range(DOCUMENTS)]
        index = torch.arange(first, first + DOCUMENTS)[:, None].expand(-1, LENGTH)
        batches.append(Batch(ids, torch.ones_like(ids), index))
    return documents, batches


def profile(folder: Path, tokens: int, state: Path | None) -> dict[str, Any]:
    """The statistics in this fresh process, measured: streamed with `state` as its folder, else in memory."""
    import torch

    from moesmith.jobs._streamed import open_streamed, replay_streamed, text_layers
    from moesmith.models import layers
    from moesmith.models.checkpoint import model_class, read_config
    from moesmith.prune.observe import Collector

    config = read_config(folder)
    documents, batches = text(tokens, config["vocab_size"])
    real = model_class(config)
    torch.zeros(1024, 1024) @ torch.zeros(1024, 1024)  # the libraries' own start-up memory is not the work's
    figures: dict[str, Any] = {}
    with AnonymousMemory() as memory, torch.no_grad():
        if state is not None:
            streamed = open_streamed(folder, device="cpu")
            figures["resident_bytes"] = AnonymousMemory.now() - memory.base
            collector = Collector(text_layers(streamed), documents)
            start = time.perf_counter()
            facts = replay_streamed(streamed, collector, batches, state)
            figures["layer_bytes"] = facts["largest_layer_bytes"]
        else:
            model = real.from_pretrained(folder, dtype=torch.bfloat16).eval()
            collector = Collector(layers.text_layers(model), documents)
            start = time.perf_counter()
            with collector.attach(model):
                for batch in batches:
                    with collector.batch(batch.index):
                        model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False)
        figures["replay_seconds"] = time.perf_counter() - start
    digest = hashlib.sha256()
    for name, tensor in sorted(collector.state_dict().items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return figures | {
        "seconds": memory.seconds,
        "peak_anonymous_bytes": memory.peak,
        "statistics": digest.hexdigest()[:16],
    }


def in_process(role: str, *words: str, threads: int) -> dict[str, Any]:
    """Run one role of this script in a fresh process and read its figures."""
    command = [sys.executable, __file__, "--role", role, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=thread_env(threads))
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="narrow models, to see that the script runs")
    parser.add_argument("--families", nargs="+", default=["olmoe", "gemma4"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", help="where to put the checkpoint (default: the temporary folder)")
    parser.add_argument("--role", choices=["make", "stream", "memory"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        model = args.path / "model"
        if args.role == "make":
            figures = make(model, args.families[0], args.layers, args.small)
        else:
            figures = profile(model, args.tokens, args.path / "state" if args.role == "stream" else None)
        return print(json.dumps(figures))

    lines = []
    for family in args.families:
        path = Path(tempfile.mkdtemp(prefix=f"moesmith-{family}-", dir=args.folder))
        try:
            words = ["--path", str(path), "--families", family, "--tokens", str(args.tokens)]
            words += ["--layers", str(args.layers), *(["--small"] if args.small else [])]
            (path / "model").mkdir()
            made = in_process("make", *words, threads=args.threads)
            stream = in_process("stream", *words, threads=args.threads)
            memory = in_process("memory", *words, threads=args.threads)
        finally:
            shutil.rmtree(path)
        limit = stream["layer_bytes"] + ALLOWANCE
        equal = stream.pop("statistics") == memory.pop("statistics")
        setting = {"family": family, "layers": args.layers, "tokens": args.tokens, "threads": args.threads}
        setting |= {key: made[key] for key in ("hidden_size", "num_experts")}
        figures = {
            "disk_bytes": made["disk_bytes"],
            **stream,
            "limit_bytes": limit,
            "within": stream["peak_anonymous_bytes"] <= limit,
            "equal": equal,
            **{f"in_memory_{key}": value for key, value in memory.items()},
        }
        emit("profile_stream", setting, figures)
        lines.append(
            (family, made["disk_bytes"] / MB, stream["layer_bytes"] / MB, limit / MB)
            + (stream["peak_anonymous_bytes"] / MB, memory["peak_anonymous_bytes"] / MB)
            + (stream["replay_seconds"], memory["replay_seconds"], str(equal))
        )
    say("MB (1e6 bytes) and seconds; peak = anonymous memory above the start")
    header = ("family", "on disk", "one layer", "limit", "peak", "in memory", "replay s", "in memory s")
    table((*header, "bits equal"), lines)


if __name__ == "__main__":
    main()
