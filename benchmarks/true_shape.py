"""Models of the published depth and width, packed, trained and decoded on a CPU, from memory and from disk.

OLMoE-1B-7B: a random 16-bit checkpoint is written (13.8 GB), packed by `moesmith quantize` in memory and with
--stream (the tensors are compared), and deleted; then a few steps of QLoRA and a few greedy tokens, once with
every weight in memory, once with all of them mapped from disk under a cap of 3 GB of anonymous memory;
losses, adapter and logits are compared bit by bit. Qwen3-30B-A3B and Gemma-4-26B-A4B: the 16-bit weights
never exist as a whole, not even on disk: a layer is written, packed, written packed and dropped; then the
model is planned and decoded from disk under the same cap, with a cold and a warm page cache.

Every measurement is a process of its own. Its anonymous memory (RssAnon: what cannot be dropped and read
again from a file) is watched from outside, every 10 ms; a process that takes more than its cap is killed.

    python benchmarks/true_shape.py [--only olmoe qwen3 gemma4] [--small] [--folder DIR] [--keep]

Disk at a time: OLMoE 23 GB (packed twice), Qwen3 21 GB, Gemma-4 20 GB. --small: the same in a minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from common import arguments, emit, say, table, thread_env

GB = 1e9
CAP = 3 * GB
PROMPT = 32
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": (
        "OlmoeConfig",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 16, "num_experts": 64,
         "num_experts_per_tok": 8, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304},
    ),
    "qwen3": (
        "Qwen3MoeConfig",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_experts": 128,
         "num_experts_per_tok": 8, "norm_topk_prob": True, "num_attention_heads": 32,
         "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {"hidden_size": 2816, "intermediate_size": 2112, "moe_intermediate_size": 704,
         "num_hidden_layers": 30, "num_experts": 128, "top_k_experts": 8, "enable_moe_block": True,
         "num_attention_heads": 16, "num_key_value_heads": 8, "num_global_key_value_heads": 2,
         "head_dim": 256, "global_head_dim": 512, "attention_k_eq_v": True, "sliding_window": 1024,
         "hidden_size_per_layer_input": 0, "final_logit_softcapping": 30.0, "vocab_size": 262144},
    ),
}  # fmt: skip
SMALL = {"hidden_size": 256, "num_experts": 16, "vocab_size": 1024, "num_hidden_layers": 6}
FUSED = ("gemma4",)  # published with the experts of a layer as one tensor

# ---------------------------------------------------------------- a random checkpoint, a file at a time


class RandomCheckpoint:
    """A random 16-bit checkpoint: one file per decoder layer, one for the rest, each filled when wanted.

    A file that is not filled has its header and its size, and takes no disk.
    """

    def __init__(self, folder: Path, name: str, small: bool, seed: int = 0):
        import torch
        import transformers

        self.config = getattr(transformers, SHAPES[name][0])(**self.fields(name, small))
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
        self.config.architectures, self.config.dtype = [type(model).__name__], torch.bfloat16
        folder.mkdir(parents=True)
        self.config.save_pretrained(folder)
        generator = torch.Generator().manual_seed(seed)
        noise = (torch.randn(1 << 24, generator=generator) * 0.02).bfloat16()
        self.noise = memoryview(noise.view(torch.uint8).numpy())
        self.ones = memoryview(torch.ones(1 << 16, dtype=torch.bfloat16).view(torch.uint8).numpy())
        tied = set(model._tied_weights_keys or ()) if self.config.tie_word_embeddings else set()
        parts: dict[str, dict[str, tuple[int, ...]]] = {}
        for full, tensor in model.state_dict().items():
            if full not in tied:
                words = full.split(".")
                part = ".".join(words[:3]) if "layers" in words else "lm_head" if "lm_head" in words else ""
                parts.setdefault(part, {}).update(self._on_disk(full, tuple(tensor.shape), name not in FUSED))
        self.nbytes, index = 0, {}
        self.files: dict[str, tuple[Path, int, list[tuple[str, tuple[int, ...], int]]]] = {}
        for number, (part, shapes) in enumerate(parts.items(), start=1):
            path = folder / f"model-{number:05d}-of-{len(parts):05d}.safetensors"
            header, place = {}, 0
            tensors = []
            for full, shape in shapes.items():
                size = 2 * _product(shape)
                header[full] = {"dtype": "BF16", "shape": shape, "data_offsets": [place, place + size]}
                tensors.append((full, shape, place))
                place += size
            raw = json.dumps(header | {"__metadata__": {"format": "pt"}}).encode()
            raw += b" " * (-len(raw) % 64)
            path.write_bytes(len(raw).to_bytes(8, "little") + raw)
            self.files[part] = (path, 8 + len(raw), tensors)
            self.drop(part)
            index |= dict.fromkeys(shapes, path.name)
            self.nbytes += place
        record = {"metadata": {"total_size": self.nbytes}, "weight_map": index}
        (folder / "model.safetensors.index.json").write_text(json.dumps(record))

    @staticmethod
    def fields(name: str, small: bool) -> dict[str, Any]:
        """What the config is made of."""
        return SHAPES[name][1] | (SMALL if small else {})

    @staticmethod
    def _on_disk(
        full: str, shape: tuple[int, ...], per_expert: bool
    ) -> Iterator[tuple[str, tuple[int, ...]]]:
        head, _, leaf = full.rpartition(".")
        if not per_expert or ".experts." not in full:
            yield full, shape
            return
        names = ("gate_proj", "up_proj") if leaf == "gate_up_proj" else (leaf,)
        for expert in range(shape[0]):
            for name in names:
                yield f"{head}.{expert}.{name}.weight", (shape[1] // len(names), shape[2])

    def fill(self, part: str) -> None:
        """Write the values of a file: vectors are ones, matrices are noise, each from another place of it."""
        path, start, tensors = self.files[part]
        with open(path, "r+b") as file:
            for full, shape, place in tensors:
                file.seek(start + place)
                left = 2 * _product(shape)
                source = self.ones if len(shape) == 1 else self.noise
                offset = 0 if len(shape) == 1 else 2 * (hash_of(full) % (len(source) // 4))
                while left:
                    piece = source[offset : offset + left]
                    file.write(piece)
                    left, offset = left - len(piece), 0

    def drop(self, part: str) -> None:
        """Give the disk of a file back; it keeps its header and its size."""
        path, start, tensors = self.files[part]
        _, shape, place = tensors[-1]
        os.truncate(path, start)
        os.truncate(path, start + place + 2 * _product(shape))


def hash_of(text: str) -> int:
    """The same number for a text in every process."""
    import zlib

    return zlib.crc32(text.encode()) * 7919


def _product(shape: tuple[int, ...]) -> int:
    import math

    return math.prod(shape)


# ---------------------------------------------------------------- a process, watched


class Watched:
    """Peak anonymous memory of a process, looked at from outside; over its cap it is killed."""

    def __init__(self, pid: int, cap: float | None):
        self.pid, self.cap, self.peak, self.killed = pid, cap, 0, False
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while (now := anonymous(self.pid)) is not None:
            self.peak = max(self.peak, now)
            if self.cap is not None and now > self.cap:
                self.killed = True
                os.kill(self.pid, 9)
                return
            time.sleep(0.01)


def anonymous(pid: int) -> int | None:
    """Anonymous bytes of a process, None when it has ended."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return None


def watched(command: list[str], threads: int, cap: float | None = None) -> dict[str, Any]:
    """Run a command that prints JSON; its figures, with its peak of anonymous memory and its seconds.

    Raises:
        RuntimeError: it failed, or took more memory than its cap.
    """
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=thread_env(threads))
    watch = Watched(process.pid, cap)
    out, _ = process.communicate()
    watch.thread.join()
    if watch.killed:
        raise RuntimeError(f"took {watch.peak / GB:.2f} GB, more than its cap: {command}")
    if process.returncode:
        raise RuntimeError(f"ended with {process.returncode}: {command}")
    text = out.strip()
    figures = json.loads(text if text.startswith("{\n") else text.splitlines()[-1]) if text else {}
    return figures | {"peak_anonymous_bytes": watch.peak, "process_seconds": time.perf_counter() - start}


def forget(folder: Path) -> None:
    """Drop the folder's weights from the page cache; what another process maps stays."""
    for file in folder.glob("*.safetensors"):
        handle = os.open(file, os.O_RDONLY)
        try:
            os.fsync(handle)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(handle)


# ---------------------------------------------------------------- the roles


def load(folder: Path, home: str) -> tuple[Any, Any]:
    """The packed model, and what lends its experts: mapped from disk, or with every weight in memory."""
    from transformers import AutoModelForCausalLM

    import moesmith  # noqa: F401  registers the quantizer
    from moesmith.experts.residency.attach import attach
    from moesmith.experts.residency.policy import Policy

    model = AutoModelForCausalLM.from_pretrained(folder)
    if home == "disk":
        return model, attach(model, Policy(homes="disk"))
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model, None


def random_ids(model: Any, length: int, seed: int = 0) -> Any:
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    return torch.randint(3, vocabulary, (1, length), generator=torch.Generator().manual_seed(seed))


def train(args: argparse.Namespace) -> dict[str, Any]:
    """A few steps of QLoRA on random rows; losses, seconds per step, a hash of the adapter."""
    import hashlib

    import torch

    from moesmith.train.adapters import attach as add_adapter
    from moesmith.train.adapters import trainable
    from moesmith.train.settings import LoraSettings

    start = time.perf_counter()
    model, lender = load(args.path, args.home)
    loaded = time.perf_counter() - start
    model = add_adapter(model, LoraSettings(r=args.lora_r, alpha=2 * args.lora_r), seed=0)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.config.use_cache = False
    weights = trainable(model)
    for parameter in weights.values():
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(weights.values(), lr=1e-4)
    model.train()
    losses, seconds = [], []
    if lender is not None:
        lender.reset_statistics()
    for step in range(args.steps):
        start = time.perf_counter()
        ids = random_ids(model, args.seq, seed=step)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        seconds.append(time.perf_counter() - start)
    digest = hashlib.sha256()
    for name, parameter in sorted(weights.items()):
        digest.update(name.encode() + parameter.detach().numpy().tobytes())
    return {
        "losses": losses, "seconds_per_step": seconds, "load_seconds": loaded,
        "trainable": sum(p.numel() for p in weights.values()), "adapter": digest.hexdigest()[:16],
        "statistics": _brief(lender),
    }  # fmt: skip


def decode(args: argparse.Namespace) -> dict[str, Any]:
    """Greedy tokens after a prompt of random ids: seconds of prompt and tokens, a hash of all logits."""
    import hashlib

    import torch

    start = time.perf_counter()
    model, lender = load(args.path, args.home)
    loaded = time.perf_counter() - start
    model.eval()
    digest = hashlib.sha256()
    ids, past, tokens, seconds = random_ids(model, PROMPT), None, [], []
    if lender is not None:
        lender.reset_statistics()
    with torch.no_grad():
        for _ in range(args.tokens + 1):
            start = time.perf_counter()
            out = model(input_ids=ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, logits = out.past_key_values, out.logits[:, -1].float()
            ids = logits.argmax(-1, keepdim=True)
            seconds.append(time.perf_counter() - start)
            tokens.append(int(ids))
            digest.update(logits.numpy().tobytes())
    after = sorted(seconds[1:])
    return {
        "tokens_per_second": args.tokens / sum(after), "median_token_seconds": after[len(after) // 2],
        "prompt_seconds": seconds[0], "load_seconds": loaded, "tokens": tokens,
        "logits": digest.hexdigest()[:16], "statistics": _brief(lender),
    }  # fmt: skip


def _brief(lender: Any) -> dict[str, Any] | None:
    """The lender's totals, without the rows of every layer."""
    if lender is None:
        return None
    return {key: value for key, value in lender.statistics().items() if key != "layers"}


def pack(args: argparse.Namespace) -> dict[str, Any]:
    """A model packed without its 16-bit weights ever being there: each layer is made before it is read."""
    import torch

    from moesmith import ExpertsConfig
    from moesmith.models.checksums import write_checksums
    from moesmith.models.pack import LayerPacker

    source, out = args.path / "16bit", args.path / "packed"
    checkpoint = RandomCheckpoint(source, args.only[0], args.small)
    out.mkdir()
    seconds = {"make": 0.0, "pack_and_write": 0.0}
    last = time.perf_counter()

    def split(stage: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[stage], last = seconds[stage] + now - last, now

    def make(part: str) -> None:
        split("pack_and_write")
        checkpoint.fill(part)
        split("make")

    make("")
    packer = LayerPacker.start(source, ExpertsConfig(args.scheme), torch.bfloat16)
    for part in packer.write(out, before=make):
        checkpoint.drop(part)
    split("pack_and_write")
    del packer
    shutil.rmtree(source)
    write_checksums(out)
    seconds["checksums"] = time.perf_counter() - last
    return {
        **{f"{stage}_seconds": value for stage, value in seconds.items()},
        "disk_bytes_16bit": checkpoint.nbytes,
        "packed_bytes": sum(file.stat().st_size for file in out.glob("*.safetensors")),
    }


def make_whole(args: argparse.Namespace) -> dict[str, Any]:
    start = time.perf_counter()
    checkpoint = RandomCheckpoint(args.path / "16bit", args.only[0], args.small)
    for part in checkpoint.files:
        checkpoint.fill(part)
    return {"disk_bytes_16bit": checkpoint.nbytes, "seconds": time.perf_counter() - start}


ROLES: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "make": make_whole, "pack": pack, "train": train, "decode": decode,
}  # fmt: skip


# ---------------------------------------------------------------- the runs


class Bench:
    """One shape in its folder: runs roles and commands in processes of their own and prints their figures."""

    def __init__(self, name: str, path: Path, args: argparse.Namespace):
        self.name, self.path, self.args = name, path, args
        self.rows: list[tuple[Any, ...]] = []
        self.setting = {"shape": name, "scheme": args.scheme, "threads": args.threads, "small": args.small}
        self.setting["layers"] = RandomCheckpoint.fields(name, args.small)["num_hidden_layers"]

    def role(self, role: str, folder: Path, home: str = "disk", cap: float | None = None) -> dict[str, Any]:
        args = self.args
        words = ["--role", role, "--path", str(folder), "--home", home, "--only", self.name]
        for key in ("scheme", "steps", "seq", "tokens", "lora_r"):
            words += [f"--{key.replace('_', '-')}", str(getattr(args, key))]
        words += ["--small"] if args.small else []
        return watched([sys.executable, __file__, *words], args.threads, cap)

    def moesmith(self, *words: str) -> dict[str, Any]:
        command = [sys.executable, "-m", "moesmith", *words, "--json"]
        return watched(command, self.args.threads)

    def record(self, what: str, figures: dict[str, Any], seconds: float, **setting: Any) -> dict[str, Any]:
        load = os.getloadavg()[0]
        emit("true_shape", self.setting | {"what": what} | setting, figures | {"load_average": load})
        self.rows.append((self.name, what, figures.get("peak_anonymous_bytes", 0) / GB, seconds))
        say(f"{self.name}: {what}: {seconds:.1f} s, peak {self.rows[-1][2]:.2f} GB anonymous")
        return figures

    def packed_from_disk(self) -> None:
        """The 16-bit files to the packed folder, by both roads of `moesmith quantize`."""
        packed, streamed, source = self.path / "packed", self.path / "streamed", self.path / "16bit"
        made = self.role("make", self.path)
        self.record("make", made, made["seconds"])
        for out, flag in ((streamed, "--stream"), (packed, "--no-stream")):
            forget(source)
            figures = self.moesmith(
                "quantize", str(source), "--out", str(out), "--scheme", self.args.scheme, flag
            )
            kept = ("bytes", "seconds", "peak_bytes", "peak_anonymous_bytes", "process_seconds")
            self.record(f"quantize {flag}", {k: figures[k] for k in kept}, figures["process_seconds"])
        same = _tensors(packed) == _tensors(streamed)
        if not same:
            raise AssertionError("the two roads of quantize gave different tensors")
        emit("true_shape", self.setting | {"what": "both roads"}, {"tensors_equal": same})
        shutil.rmtree(source)
        shutil.rmtree(streamed)
        figures = self.moesmith("inspect", str(packed), "--verify")
        kept = ("verified", "peak_anonymous_bytes", "process_seconds")
        self.record("inspect --verify", {k: figures[k] for k in kept}, figures["process_seconds"])

    def packed_by_layer(self) -> None:
        """The packed folder of a model that is never there in 16 bits."""
        figures = self.role("pack", self.path, cap=CAP)
        self.record("make and pack by layer", figures, figures["process_seconds"])

    def plan(self) -> None:
        """What `moesmith plan` says about this packed model."""
        words = ("plan", str(self.path / "packed"), "--for", "chat", "--device", "cpu")
        try:
            facts = self.moesmith(*words)
        except RuntimeError as error:
            say(f"plan: {error}")
            return
        peak = facts.pop("peak_anonymous_bytes")
        figures = {"plan": facts, "peak_anonymous_bytes": peak}
        self.record("plan", figures, facts.pop("process_seconds"))

    def compare(self, role: str, key: str) -> None:
        """A role with every weight in memory and with the experts on disk: the same bits."""
        packed, found = self.path / "packed", {}
        for home, cap in (("memory", None), ("disk", CAP)):
            figures = self.role(role, packed, home, cap)
            seconds = (
                min(figures["seconds_per_step"]) if role == "train" else 1 / figures["tokens_per_second"]
            )
            self.record(role, figures, seconds, home=home, cap_gb=cap and cap / GB)
            found[home] = figures[key]
        if found["memory"] != found["disk"]:
            raise AssertionError(f"{role}: {key} differ between memory and disk: {found}")
        emit("true_shape", self.setting | {"what": f"{role}: memory and disk"}, {f"{key}_equal": True})

    def decode_from_disk(self) -> None:
        packed = self.path / "packed"
        for cache in ("cold", "warm"):
            if cache == "cold":
                forget(packed)
            figures = self.role("decode", packed, "disk", CAP)
            self.record("decode", figures, 1 / figures["tokens_per_second"], home="disk", cache=cache)


def _tensors(folder: Path) -> dict[str, str]:
    """tensor -> SHA-256, from the folder's checksums."""
    files = json.loads((folder / "checksums.json").read_text())["files"].values()
    return {name: value for entry in files for name, value in entry["tensors"].items()}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--small", action="store_true", help="narrow models, to see that the script runs")
    parser.add_argument("--only", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument("--scheme", default="nf4")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--lora-r", type=int, default=4)
    parser.add_argument("--folder", type=Path, help="where the models go (default: the temporary folder)")
    parser.add_argument("--keep", action="store_true", help="leave the packed models in --folder/NAME/packed")
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    parser.add_argument("--path", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--home", default="disk", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        return print(json.dumps(ROLES[args.role](args)))

    rows = []
    for name in args.only:
        path = args.folder / name if args.folder else Path(tempfile.mkdtemp(prefix=f"moesmith-{name}-"))
        path.mkdir(parents=True, exist_ok=True)
        bench, keep = Bench(name, path, args), args.keep or (path / "packed").exists()
        try:
            if not (path / "packed").exists():
                bench.packed_from_disk() if name == "olmoe" else bench.packed_by_layer()
            bench.plan()
            if name == "olmoe":
                bench.compare("train", "adapter")
                bench.compare("decode", "logits")
            bench.decode_from_disk()
        finally:
            rows += bench.rows
            for folder in path.iterdir():
                if folder.name != "packed" or not keep:
                    shutil.rmtree(folder)
    table(("shape", "what", "peak GB", "s, or s per step or token"), rows)


if __name__ == "__main__":
    main()
