"""Memory and time of loading a full-width MoE checkpoint into packed experts, and of loading it again packed.

Makes a random bf16 checkpoint of OLMoE-1B-7B, Qwen3-30B-A3B and Gemma-4-26B-A4B in turn, with their true
hidden sizes, expert counts, vocabularies and names on disk, and 2 layers each. A fresh process loads it
with ExpertsConfig("nf4") on the CPU while a thread samples anonymous memory (RssAnon: what cannot be
dropped and read again from the file), then saves it packed; another fresh process loads that. Figures are
above the memory that the process has after its imports. The checkpoints are removed at the end (up to 6 GB
of disk at a time).

    python benchmarks/load_memory.py [--small] [--families olmoe qwen3 gemma4] [--scheme nf4] [--folder DIR]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from common import arguments, emit, say, table, thread_env

MB = 1e6
ALLOWANCE = 300 * MB
OLMOE = {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 64, "vocab_size": 50304}
QWEN3 = {
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
}
GEMMA4 = {
    "hidden_size": 2816,
    "intermediate_size": 2112,
    "moe_intermediate_size": 704,
    "num_experts": 128,
    "top_k_experts": 8,
    "enable_moe_block": True,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_global_key_value_heads": 2,
    "head_dim": 256,
    "global_head_dim": 512,
    "hidden_size_per_layer_input": 0,
    "vocab_size": 262144,
}
FAMILIES = {
    "olmoe": ("OlmoeConfig", OLMOE),
    "qwen3": ("Qwen3MoeConfig", QWEN3),
    "gemma4": ("Gemma4TextConfig", GEMMA4),
}
SMALL = {"hidden_size": 256, "num_experts": 8, "vocab_size": 1024}


def make(folder: Path, family: str, layers: int, small: bool) -> dict[str, Any]:
    """Write a random checkpoint, one shard per layer, without ever holding the model."""
    import torch
    import transformers
    from safetensors.torch import save_file

    config_name, fields = FAMILIES[family]
    fields = fields | {"num_hidden_layers": layers} | (SMALL if small else {})
    config = getattr(transformers, config_name)(**fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)

    noise = (torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    per_expert = family != "gemma4"  # Gemma-4 is published with its experts fused
    tied = set(model._tied_weights_keys or ()) if config.tie_word_embeddings else set()
    shards: dict[str, dict[str, Any]] = {}
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        parts = name.split(".")
        shard = f"layer{parts[2]}" if "layers" in parts else parts[-2]
        shards.setdefault(shard, {})[name] = tensor.shape

    def fill(shape: Any, start: int) -> Any:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        flat = torch.empty(shape, dtype=torch.bfloat16).view(-1)
        for begin in range(0, len(flat), len(noise)):
            piece = flat[begin : begin + len(noise)]
            piece.copy_(noise.roll(start + begin // 7)[: len(piece)])
        return flat.view(shape)

    index: dict[str, str] = {}
    total = 0
    for number, shapes in enumerate(shards.values(), start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for position, (name, shape) in enumerate(shapes.items()):
            tensor = fill(shape, 7919 * (position + 1) * number)
            if per_expert and ".experts." in name:
                head, _, leaf = name.rpartition(".")
                names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
                for expert, matrix in enumerate(tensor):
                    for part, rows in zip(names, matrix.chunk(len(names)), strict=True):
                        tensors[f"{head}.{expert}.{part}.weight"] = rows.clone()
            else:
                tensors[name] = tensor
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    record = {"metadata": {"total_size": total}, "weight_map": index}
    (folder / "model.safetensors.index.json").write_text(json.dumps(record))
    inner = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
    return {
        "disk_bytes": total,
        "layer_stack_bytes": 2 * 3 * config.num_experts * config.hidden_size * inner,
        "hidden_size": config.hidden_size,
        "num_experts": config.num_experts,
    }


class AnonymousMemory:
    """Peak of this process's anonymous memory inside a `with`, bytes above what it was at the start."""

    @staticmethod
    def now() -> int:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
        raise OSError("/proc/self/status has no RssAnon: this benchmark needs Linux")

    def __enter__(self) -> AnonymousMemory:
        self.base = self.peak = self.now()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.start = time.perf_counter()
        self.thread.start()
        return self

    def sample(self) -> None:
        while not self.done.wait(0.001):
            self.peak = max(self.peak, self.now())

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self.start
        self.done.set()
        self.thread.join()
        after = self.now()
        self.peak = max(self.peak, after) - self.base
        self.after = after - self.base


def load(folder: Path, scheme: str | None, save: Path | None) -> dict[str, Any]:
    """from_pretrained in this fresh process, measured; without `scheme` the checkpoint is packed already."""
    import torch
    from transformers import AutoModelForCausalLM

    from moesmith import ExpertsConfig

    torch.zeros(1024, 1024) @ torch.zeros(1024, 1024)  # the libraries' own start-up memory is not the load's
    more = {"quantization_config": ExpertsConfig(scheme)} if scheme else {}
    with AnonymousMemory() as memory:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.bfloat16, output_loading_info=True, **more
        )
    problems = {key: sorted(info[key])[:5] for key in ("missing_keys", "unexpected_keys") if info[key]}
    if problems:
        raise AssertionError(f"{folder}: {problems}")
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    figures = {
        "seconds": memory.seconds,
        "peak_anonymous_bytes": memory.peak,
        "after_anonymous_bytes": memory.after,
        "model_bytes": sum(t.nbytes for t in tensors.values()),
    }
    if save:
        model.save_pretrained(save)
        figures["saved_bytes"] = sum(file.stat().st_size for file in save.glob("*.safetensors"))
    return figures


def in_process(role: str, *words: str, threads: int) -> dict[str, Any]:
    """Run one role of this script in a fresh process and read its figures."""
    command = [sys.executable, __file__, "--role", role, *words]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=thread_env(threads))
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="narrow models, to see that the script runs")
    parser.add_argument("--families", nargs="+", default=list(FAMILIES), choices=list(FAMILIES))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--scheme", default="nf4")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--folder", help="where to put the checkpoints (default: the system's temporary folder)"
    )
    parser.add_argument("--role", choices=["make", "load", "reload"], help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        dense, packed = args.path / "dense", args.path / "packed"
        if args.role == "make":
            figures = make(dense, args.families[0], args.layers, args.small)
        elif args.role == "load":
            figures = load(dense, args.scheme, packed)
        else:
            figures = load(packed, None, None)
        return print(json.dumps(figures))

    lines = []
    for family in args.families:
        path = Path(tempfile.mkdtemp(prefix=f"moesmith-{family}-", dir=args.folder))
        try:
            words = ["--path", str(path), "--families", family, "--scheme", args.scheme]
            words += ["--layers", str(args.layers), *(["--small"] if args.small else [])]
            (path / "dense").mkdir()
            made = in_process("make", *words, threads=args.threads)
            first = in_process("load", *words, threads=args.threads)
            shutil.rmtree(path / "dense")
            again = in_process("reload", *words, threads=args.threads)
        finally:
            shutil.rmtree(path)
        limit = first["model_bytes"] + made["layer_stack_bytes"] + ALLOWANCE
        setting = {"family": family, "layers": args.layers, "scheme": args.scheme, "threads": args.threads}
        setting |= {key: made[key] for key in ("hidden_size", "num_experts")}
        sizes = {key: made[key] for key in ("disk_bytes", "layer_stack_bytes")}
        emit(
            "load_memory",
            setting,
            sizes | first | {"limit_bytes": limit, "within": first["peak_anonymous_bytes"] <= limit},
        )
        emit("reload", setting, again | {"saved_bytes": first["saved_bytes"]})
        lines.append(
            (family, made["disk_bytes"] / MB, first["model_bytes"] / MB, made["layer_stack_bytes"] / MB)
            + (first["peak_anonymous_bytes"] / MB, limit / MB, first["seconds"])
            + (again["seconds"], again["peak_anonymous_bytes"] / MB)
        )
    say("MB (1e6 bytes) and seconds; peak = anonymous memory above the start")
    table(
        ("family", "16-bit", "packed", "1 stack", "peak", "limit", "load s", "reload s", "reload peak"),
        lines,
    )


if __name__ == "__main__":
    main()
