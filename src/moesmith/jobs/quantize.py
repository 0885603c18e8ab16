"""Pack a model's experts and save it as a checkpoint that reloads by memory map.

The weights stream from disk and are packed one by one, so memory stays near the packed size. The new folder
appears whole or not at all: it is written beside its place, reloaded, compared bit by bit, and only then
renamed.
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict
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

POSITIONAL = ("model",)
JSON = True
EXAMPLE = "moesmith quantize Qwen/Qwen3-30B-A3B --out qwen3-nf4 --double-quant"
OUT_OF_MEMORY = (
    "packing needs the packed size plus one layer; free memory, or choose fewer bits: --scheme nf4"
)

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
    import torch

    from moesmith.experts.report import count
    from moesmith.jobs._memory import PeakMemory
    from moesmith.models.checkpoint import (
        Checkpoint,
        check_architecture,
        fingerprint,
        model_class,
        resolve,
        side_files,
    )

    source = resolve(cfg.model)
    checkpoint = Checkpoint.open(source)
    check_architecture(checkpoint.config)
    refuse_quantised(checkpoint.quantization, cfg.model)
    check_place(cfg.out, source, cfg.overwrite)
    check_space(cfg.out, estimate(checkpoint.config, cfg), "the packed model")
    load = model_class(checkpoint.config).from_pretrained
    if not console.stderr().is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()

    started = time.perf_counter()
    device_map = {"": 0 if cfg.device == "cuda" else "cpu"}
    with PeakMemory() as peak:
        model = load(
            source,
            quantization_config=experts_config(cfg),
            dtype=getattr(torch, cfg.dtype),
            device_map=device_map,
        )
    packed_at = time.perf_counter()
    counts = count(model)
    say_counts(counts, checkpoint.nbytes)

    temporary = start_folder(cfg.out)
    save(model.eval(), temporary, side_files(source))
    saved_at = time.perf_counter()
    reloaded = load(temporary, device_map=device_map)
    proof = prove(model, reloaded, source)
    proved_at = time.perf_counter()
    console.row(
        "proof", f"reloaded: {proof['tensors']} tensors and the logits of {proof['tokens']} tokens bit-equal"
    )

    seconds = {
        "load_and_pack": packed_at - started,
        "save": saved_at - packed_at,
        "proof": proved_at - saved_at,
    }
    record = {
        "command": "quantize",
        "config": cfg.model_dump(mode="json"),
        "versions": {
            name: metadata.version(name) for name in ("torch", "transformers", "bitsandbytes", "safetensors")
        },
        "moesmith": _own_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": {"path": str(source), "bytes": checkpoint.nbytes},
        "fingerprint": fingerprint(reloaded),
        "counts": asdict(counts),
        "proof": proof,
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "peak_bytes": peak.nbytes,
    }
    write_atomically(temporary / "moesmith.json", json.dumps(record, indent=2) + "\n")
    finish_folder(temporary, cfg.out)

    where = "on the card" if peak.device else "of RAM (anonymous)"
    before = f", {console.size(peak.start)} of it before loading" if not peak.device else ""
    console.row("memory", f"peak {console.size(peak.nbytes)} {where}{before}")
    console.row(
        "time",
        " · ".join(f"{name.replace('_', ' ')} {console.duration(value)}" for name, value in seconds.items()),
    )
    files = sorted(cfg.out.glob("*.safetensors"))
    written = sum(file.stat().st_size for file in files)
    console.row(
        "written",
        f"{cfg.out} ({console.size(written)}, {len(files)} weight file{'s' if len(files) > 1 else ''})",
    )
    console.next_command(f"moesmith chat {cfg.out}", f"moesmith sft run.yaml --model {cfg.out}")
    console.emit({"out": str(cfg.out), "bytes": written, **record})


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
    for file in beside:
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
