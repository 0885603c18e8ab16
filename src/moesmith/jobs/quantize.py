"""Pack a model's experts and save it as a checkpoint that reloads by memory map.

The weights stream from disk and are packed one by one, so memory stays near the packed size; a model whose
packed form does not fit is packed and written layer by layer. The new folder appears whole or not at all: it
is written beside its place, reloaded, compared bit by bit, and only then renamed.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesmith import console
from moesmith.config import JobConfig, write_atomically
from moesmith.errors import UserError
from moesmith.jobs._folder import check_place, check_space, finish_folder, start_folder

if TYPE_CHECKING:
    from torch import nn

    from moesmith.experts.report import Counts
    from moesmith.jobs._memory import PeakMemory
    from moesmith.models.checkpoint import Checkpoint

POSITIONAL = ("model",)
JSON = True
EXAMPLE = "moesmith quantize Qwen/Qwen3-30B-A3B --out qwen3-nf4 --double-quant"
OUT_OF_MEMORY = (
    "packing needs the packed size plus one layer; --stream needs one layer only; or free some memory"
)
MEMORY_SHARE = 0.85  # of what is free, that packing in memory may take

PROOF_TEXT = (
    "The capital of Lithuania is Vilnius. 12 + 30 = 42, and a mixture of experts picks a few of many."
)


class Config(JobConfig):
    model: str
    """Model folder or hub name, in 16 or 32 bits."""
    out: Path
    """Folder to create."""
    scheme: Literal["nf4", "fp4", "int8", "fp8", "bf16", "fp16"] = "nf4"
    """How the experts are stored: nf4, fp4, int8 or fp8 in blocks; bf16 and fp16 keep them whole."""
    double_quant: bool = False
    """Store the block scales in 8 bits too: 4.13 instead of 4.5 bits per weight."""
    linears: Literal["nf4", "int8"] | None = None
    """The linears (attention, shared experts, dense MLP): nf4 or int8 by bitsandbytes; none leaves them."""
    blocksize: int = 64
    """Weights per scale; halved, down to 16, for a stack whose last dimension it does not divide."""
    unpackable: Literal["error", "keep"] = "error"
    """A stack that no block size divides: error refuses the model, keep leaves that stack in 16 bits."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Dtype of everything that is not packed."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to pack; cuda is faster and needs the packed model to fit the card."""
    stream: bool | None = None
    """Pack and write one decoder layer at a time; by default when the packed model does not fit in RAM."""
    overwrite: bool = False
    """Replace an earlier output of this command."""


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused: no such folder, a broken download, a place that is taken."""
    from moesmith.models.checkpoint import Checkpoint, local_folder

    folder = local_folder(cfg.model)
    if folder is not None:
        refuse_quantised(Checkpoint.open(folder).quantization, cfg.model)
        check_place(cfg.out, folder, cfg.overwrite)


def run(cfg: Config) -> None:
    from moesmith.models.checkpoint import Checkpoint, check_architecture, fingerprint, resolve

    source = resolve(cfg.model)
    checkpoint = Checkpoint.open(source)
    check_architecture(checkpoint.config)
    refuse_quantised(checkpoint.quantization, cfg.model)
    check_place(cfg.out, source, cfg.overwrite)
    needed = estimate(checkpoint.config, cfg)
    check_space(cfg.out, needed, "the packed model")
    if not console.stderr().is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()

    stream = wants_stream(cfg, needed)
    pack = layer_by_layer if stream else in_memory
    packed = pack(cfg, source, checkpoint)
    record = {
        "command": "quantize",
        "config": cfg.model_dump(mode="json"),
        "versions": {
            name: metadata.version(name) for name in ("torch", "transformers", "bitsandbytes", "safetensors")
        },
        "moesmith": _own_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": {"path": str(source), "bytes": checkpoint.nbytes},
        "fingerprint": fingerprint(packed.reloaded),
        "counts": asdict(packed.counts),
        "proof": packed.proof,
        "streamed": stream,
        "seconds": {name: round(value, 2) for name, value in packed.seconds.items()},
        "peak_bytes": packed.peak.nbytes,
    }
    write_atomically(packed.temporary / "moesmith.json", json.dumps(record, indent=2) + "\n")
    finish_folder(packed.temporary, cfg.out)

    peak = packed.peak
    where = "on the card" if peak.device else "of RAM (anonymous)"
    before = f", {console.size(peak.start)} of it before loading" if not peak.device else ""
    console.row("memory", f"peak {console.size(peak.nbytes)} {where}{before}")
    console.row(
        "time",
        " · ".join(f"{key.replace('_', ' ')} {console.duration(s)}" for key, s in packed.seconds.items()),
    )
    files = sorted(cfg.out.glob("*.safetensors"))
    written = sum(file.stat().st_size for file in files)
    console.row(
        "written",
        f"{cfg.out} ({console.size(written)}, {len(files)} weight file{'s' if len(files) > 1 else ''})",
    )
    console.next_command(f"moesmith chat {cfg.out}", f"moesmith sft run.yaml --model {cfg.out}")
    console.emit({"out": str(cfg.out), "bytes": written, **record})


# ---------------------------------------------------------------- two roads to the same tensors


@dataclass
class Packed:
    """A packed checkpoint that waits for its record and its name."""

    temporary: Path
    reloaded: nn.Module
    counts: Counts
    proof: dict[str, int]
    seconds: dict[str, float]
    peak: PeakMemory


def wants_stream(cfg: Config, needed: int) -> bool:
    """Whether to pack layer by layer: as asked, or because the packed model would not fit the memory."""
    from moesmith.jobs._pair import free_memory

    free = free_memory(cfg.device)
    if cfg.stream is None and needed > MEMORY_SHARE * free:
        has = f"{console.size(free)} free" + (" on the card" if cfg.device == "cuda" else "")
        console.row("stream", f"layer by layer: the packed model takes {console.size(needed)}, {has}")
        return True
    return bool(cfg.stream)


def in_memory(cfg: Config, source: Path, checkpoint: Checkpoint) -> Packed:
    """Load and pack the model, save it, read it back and compare."""
    import torch

    from moesmith.experts.report import count
    from moesmith.jobs._memory import PeakMemory
    from moesmith.models.checkpoint import model_class, side_files

    load = model_class(checkpoint.config).from_pretrained
    device_map = {"": 0 if cfg.device == "cuda" else "cpu"}
    clock = Clock()
    with PeakMemory() as peak:
        model = load(
            source,
            quantization_config=experts_config(cfg),
            dtype=getattr(torch, cfg.dtype),
            device_map=device_map,
        )
    clock.done("load_and_pack")
    counts = count(model)
    say_counts(counts, checkpoint.nbytes)

    temporary = start_folder(cfg.out)
    save(model.eval(), temporary, side_files(source))
    clock.done("save")
    write_sums(temporary)
    clock.done("checksums")
    reloaded = load(temporary, device_map=device_map)
    proof = prove(model, reloaded, source)
    clock.done("proof")
    console.row(
        "proof", f"reloaded: {proof['tensors']} tensors and the logits of {proof['tokens']} tokens bit-equal"
    )
    return Packed(temporary, reloaded, counts, proof, clock.seconds, peak)


def layer_by_layer(cfg: Config, source: Path, checkpoint: Checkpoint) -> Packed:
    """Pack and write one decoder layer at a time, read back by memory map and compare sums of all tensors."""
    import torch

    from moesmith.experts.report import count
    from moesmith.jobs._memory import PeakMemory
    from moesmith.models.checkpoint import model_class, side_files
    from moesmith.models.pack import LayerPacker

    config, dtype = experts_config(cfg), getattr(torch, cfg.dtype)
    clock = Clock()
    with PeakMemory() as peak:
        try:
            packer = LayerPacker.start(source, config, dtype, "cuda:0" if cfg.device == "cuda" else "cpu")
        except UserError as error:
            raise UserError(error.message, "--no-stream packs it in memory") from None
        temporary = start_folder(cfg.out)
        with console.bar("packing", total=len(packer.parts)) as bar:
            for part in packer.write(temporary):
                bar.advance(text=part)
    copy_beside(side_files(source), temporary)
    clock.done("pack_and_save")
    on_disk = write_sums(temporary)
    clock.done("checksums")
    reloaded = model_class(checkpoint.config).from_pretrained(temporary)
    counts = count(reloaded)
    say_counts(counts, checkpoint.nbytes)
    proof = prove_streamed(packer.sums, on_disk, reloaded, source)
    clock.done("proof")
    console.row(
        "proof",
        f"read back: {proof['tensors']} tensors bit-equal to what was packed, "
        f"the logits of {proof['tokens']} tokens finite",
    )
    return Packed(temporary, reloaded, counts, proof, clock.seconds, peak)


class Clock:
    """Seconds of each stage of the work, in order."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def done(self, stage: str) -> None:
        """The stage that ends now took the time since the last one."""
        now = time.perf_counter()
        self.seconds[stage], self._last = now - self._last, now


def write_sums(folder: Path) -> dict[str, str]:
    """Write checksums.json; gives tensor on disk -> SHA-256."""
    from moesmith.models.checksums import write_checksums

    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    with console.bar("checksums", total=total) as bar:
        return write_checksums(folder, bar.advance)


def experts_config(cfg: Config) -> Any:
    """The ExpertsConfig these options ask for."""
    from moesmith.experts.quantizer import ExpertsConfig

    try:
        return ExpertsConfig(cfg.scheme, cfg.linears, cfg.double_quant, cfg.blocksize, cfg.unpackable)
    except ValueError as error:
        raise UserError(str(error)) from None


# ---------------------------------------------------------------- before anything is loaded


def refuse_quantised(quantization: dict[str, Any] | None, model: str) -> None:
    """Raise UserError for a checkpoint whose weights are quantised already."""
    if quantization is None:
        return
    method = quantization.get("quant_method", "an unnamed method")
    if method == "moesmith":
        raise UserError(f"{model} is packed already ({quantization.get('scheme')})", f"moesmith chat {model}")
    raise UserError(
        f"{model} is quantised with {method}", "packing starts from the 16-bit version of the model"
    )


def estimate(config: dict[str, Any], cfg: Config) -> int:
    """Bytes the packed checkpoint will take, from the config alone; an upper bound by a few percent."""
    from moesmith.models.anatomy import dissect, meta_model

    anatomy = dissect(meta_model(config), cfg.blocksize)
    title = {"nf4": "nf4", "fp4": "nf4", "int8": "int8", "fp8": "fp8"}.get(cfg.scheme, "16-bit")
    width = 4 if cfg.dtype == "float32" else 2
    linears = (
        anatomy.linear_bytes["nf4" if cfg.linears == "nf4" else "int8"]
        if cfg.linears
        else width * anatomy.linears
    )
    return anatomy.expert_bytes[title] + linears + width * sum(anatomy.rest.values())


# ---------------------------------------------------------------- the folder


def save(model: Any, folder: Path, beside: list[Path]) -> None:
    """Write the packed model and the files that belong beside it. Raises UserError if the disk refuses."""
    from safetensors import SafetensorError

    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise UserError(f"writing {folder} failed: {error}", "the unfinished folder can be deleted") from None
    copy_beside(beside, folder)


def copy_beside(files: list[Path], folder: Path) -> None:
    """Copy tokenizer, template and the like, unless the folder has its own."""
    for file in files:
        if not (folder / file.name).exists():
            shutil.copyfile(file, folder / file.name)


# ---------------------------------------------------------------- the proof and the words


def prove(model: nn.Module, reloaded: nn.Module, source: Path) -> dict[str, int]:
    """Compare the model in memory with the one read back: every stored tensor and the logits, bit by bit.

    Raises:
        RuntimeError: they differ; names the first tensor.
    """
    import torch

    mine, theirs = model.state_dict(), reloaded.state_dict()
    if mine.keys() != theirs.keys():
        raise RuntimeError(f"reloaded model has other tensors: {sorted(mine.keys() ^ theirs.keys())[:4]}")
    with console.bar("comparing", total=len(mine)) as bar:
        for name, tensor in mine.items():
            if not _bit_equal(tensor, theirs[name]):
                raise RuntimeError(f"{name} was saved and read back with other bits")
            bar.advance()
    ids = proof_ids(source, model)
    logits = []
    for one in (model, reloaded):
        torch.manual_seed(0)  # an architecture may draw (diffusion_gemma draws its canvas)
        with torch.no_grad():
            logits.append(one.eval()(input_ids=ids.to(one.device)).logits)
    if not _bit_equal(*logits):
        worst = (logits[0].float() - logits[1].float()).abs().max().item()
        raise RuntimeError(f"the reloaded model gives other logits (largest difference {worst:.3g})")
    return {"tensors": len(mine), "tokens": ids.shape[1]}


def prove_streamed(
    packed: dict[str, str], on_disk: dict[str, str], reloaded: nn.Module, source: Path
) -> dict[str, int]:
    """Compare the sums of all packed tensors with what lies on disk and is loaded from there.

    Args:
        packed: tensor, as the model names it -> sum of its bytes when it was packed.
        on_disk: tensor, as the file names it -> sum of its bytes there.

    Raises:
        RuntimeError: they differ, or the reloaded model's logits are not finite; names the first tensor.
    """
    import torch

    from moesmith.models.checksums import digest

    tied = getattr(reloaded, "all_tied_weights_keys", None) or {}
    stored = {name: t for name, t in reloaded.state_dict().items() if isinstance(t, torch.Tensor)}
    others = {n for n in stored.keys() ^ packed.keys() if n not in tied and n not in tied.values()}
    if others:
        raise RuntimeError(f"reloaded model has other tensors: {sorted(others)[:4]}")
    for name, tensor in stored.items():
        if name not in packed or on_disk.get(name) == packed[name]:
            continue  # the same tensor under another name, or mapped from bytes that are known to be right
        if digest(tensor) != packed[name]:
            raise RuntimeError(f"{name} was saved and read back with other bits")
    ids = proof_ids(source, reloaded)
    torch.manual_seed(0)  # an architecture may draw
    with torch.no_grad():
        logits = reloaded.eval()(input_ids=ids.to(reloaded.device)).logits
    if not torch.isfinite(logits).all():
        raise RuntimeError("the reloaded model gives logits that are not finite")
    return {"tensors": len(stored), "tokens": ids.shape[1]}


def proof_ids(source: Path, model: Any) -> Any:
    """A fixed prompt, (1, tokens): a sentence, or plain ids where the model comes without a tokenizer."""
    import torch

    from moesmith.models.checkpoint import has_tokenizer

    if has_tokenizer(source):
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(source)(PROOF_TEXT, return_tensors="pt")["input_ids"]
    vocabulary = model.config.get_text_config().vocab_size
    return torch.arange(3, 35)[None] % min(vocabulary, 1000)


def _bit_equal(a: Any, b: Any) -> bool:
    """Same dtype, shape and bits; a NaN equals itself."""
    import torch

    if not isinstance(a, torch.Tensor):
        return a == b
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if not a.is_floating_point():
        return torch.equal(a, b)
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def say_counts(counts: Counts, bytes_before: int) -> None:
    """What was packed, what was not, and the sizes."""
    matrices = ", ".join(f"{n:,} expert matrices in {scheme}" for scheme, n in counts.matrices.items())
    console.row("model", f"{matrices} · {len(counts.not_packed)} stacks left in 16 bits that were asked for")
    for name in counts.not_packed[:4]:
        console.row("", f"left: {name}")
    after = counts.expert_bytes + counts.other_bytes
    console.row(
        "size",
        f"{console.size(bytes_before)} → {console.size(after)} "
        f"(experts {console.size(counts.expert_bytes_16bit)} → {console.size(counts.expert_bytes)}, "
        f"the rest {console.size(counts.other_bytes)})",
    )


def _own_version() -> str:
    import moesmith

    return moesmith.__version__
