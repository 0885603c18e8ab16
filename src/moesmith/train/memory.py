"""What training takes in memory: a plan before it starts, and when it runs out, what differed and what to do.

The plan is `moesmith.plan`'s footprint of the model as it is loaded, so `moesmith plan` says the same. Beside
it stands what was measured once the model and its adapter were there: weights by part, and what the process
held.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from peft import PeftModel
from torch import nn

from moesmith import ram
from moesmith.console import size
from moesmith.experts.residency.attach import residency_of
from moesmith.experts.storage import named_experts
from moesmith.models.checkpoint import Checkpoint
from moesmith.plan.footprint import Choice, Work, footprint
from moesmith.plan.shape import Shape

from .adapters import count_adapters
from .settings import TrainSettings

WEIGHTS = ("experts", "dense", "embeddings", "adapters")
"""Parts that are there as soon as the model is loaded, so that they can be counted one by one."""


@dataclass
class MemoryPlan:
    """Bytes by what they are for, as planned, and what was there when the plan was made."""

    device: dict[str, int]
    """of the GPU, else of the RAM: part -> bytes, in the order of `plan.footprint.PARTS`"""
    ram: dict[str, int] = field(default_factory=dict)
    """with a GPU: of the RAM"""
    mapped: dict[str, int] = field(default_factory=dict)
    """of `device`: memory-mapped from the packed files; the system may drop it and read it again"""
    loaded: dict[str, int] = field(default_factory=dict)
    """of WEIGHTS: bytes on the device after loading, counted"""
    used: int = 0
    """bytes in use after loading, measured; mapped files left out"""

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(self.device.values())

    @property
    def own(self) -> int:
        """Without what is mapped: what `used` and `peak` below measure."""
        return self.peak - sum(self.mapped.values())

    def of(self, *parts: str) -> int:
        """Some parts of the device together."""
        return sum(self.device.get(part, 0) for part in parts)

    def __str__(self) -> str:
        said = " · ".join(f"{name} {size(n)}" for name, n in self.device.items() if n)
        mapped = sum(self.mapped.values())
        return said + (f" (of these, mapped from the packed files: {size(mapped)})" if mapped else "")


def plan(model: nn.Module, settings: TrainSettings, tokens: int, learned: int) -> MemoryPlan:
    """Memory of one training step.

    Args:
        model: with its adapter on, and its experts where they will stay.
        tokens: T of the largest forward pass, padding included; of batch_size rows.
        learned: how many of them are learned.
    """
    bare: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    stored = _packed_on_disk(bare)
    shape = Shape.of(_config(bare), _quantization(bare) if stored else None)
    rows = settings.batch_size
    work = Work(
        "train",
        seq=-(-tokens // rows),
        batch=rows * settings.grad_accum,
        learned=-(-learned // rows),
        **_adapter(model),
        adapter_dtype=settings.adapter_dtype,
        dtype=settings.dtype,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
    )
    on_gpu = torch.cuda.is_available()
    now = used()
    loaded = weights_on_device(model, on_gpu)
    choice = choice_of(bare, settings)
    planned = footprint(shape, work, choice, on_gpu)
    device = dict(planned.device)
    if _quantization(bare) is None:  # held as it is, in whatever dtype that may be
        device |= {part: loaded[part] for part in ("experts", "dense", "embeddings")}
    frozen = [p for name, p in model.named_parameters() if ".lora_" in name and not p.requires_grad]
    if frozen:  # an adapter under the one that is trained
        device["adapters"] = device.get("adapters", 0) + sum(p.nbytes for p in frozen)
    return MemoryPlan(device, dict(planned.ram), dict(planned.mapped), loaded, now)


def _adapter(model: nn.Module) -> dict[str, Any]:
    """Rank and places of the adapter that is trained, as far as the model knows them."""
    if not isinstance(model, PeftModel):
        return {}
    places = tuple(place for place in count_adapters(model).trainable if place != "other")
    return {"lora_r": model.peft_config[model.active_adapter].r, "lora_targets": places}


def choice_of(model: Any, settings: TrainSettings) -> Choice:
    """How a loaded model is held and trained, in the planner's words."""
    stored = _quantization(model) or {}
    residency = residency_of(model)
    policy = residency.policy if residency is not None else None
    return Choice(
        scheme=stored.get("scheme", "bf16"),
        double_quant=bool(stored.get("double_quant", False)),
        linears=stored.get("linears"),
        blocksize=stored.get("blocksize", 64),
        homes="device" if policy is None else policy.homes,
        kept=0 if policy is None else policy.kept,
        slots=2 if policy is None else policy.slots,
        checkpointing=settings.gradient_checkpointing,
        optim=settings.optim,
        batch_size=settings.batch_size,
        grad_accum=settings.grad_accum,
        layer_major=settings.layer_major,
    )


def _config(model: Any) -> dict[str, Any]:
    """config.json of a loaded model."""
    return {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}


def _quantization(model: Any) -> dict[str, Any] | None:
    """How it is packed, None if it is not."""
    found = getattr(model.config, "quantization_config", None)
    if found is None or isinstance(found, dict):
        return found
    return dict(vars(found))


def _packed_on_disk(model: Any) -> bool:
    """Whether it was loaded from packed files, which then are memory-mapped."""
    folder = Path(getattr(model, "name_or_path", "") or "")
    return (folder / "config.json").is_file() and Checkpoint.open(folder).is_packed


def weights_on_device(model: nn.Module, on_gpu: bool) -> dict[str, int]:
    """Bytes of the tensors that are there, by part; with a GPU only those on it."""
    of_experts = {
        id(tensor)
        for _, module in named_experts(model)
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False))
    }
    tables: list[Any] = [m for m in model.modules() if isinstance(m, nn.Embedding)]
    bare: Any = model.get_base_model() if hasattr(model, "get_base_model") else model
    tables.append(bare.get_output_embeddings())
    of_tables = {id(p) for table in tables if table is not None for p in table.parameters(recurse=False)}
    found = dict.fromkeys(WEIGHTS, 0)
    for name, parameter in model.named_parameters():
        if on_gpu and not parameter.is_cuda:
            continue
        part = "adapters" if ".lora_" in name else "dense"
        part = "experts" if id(parameter) in of_experts else part
        found["embeddings" if id(parameter) in of_tables else part] += parameter.nbytes
    return found


def limit() -> int | None:
    """Bytes there are on the device that trains: the GPU's memory, or the machine's or container's RAM."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    return ram.total()


def used() -> int:
    """Bytes in use now: allocated on the GPU, or the process's own RAM without the files it has mapped."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    info = psutil.Process().memory_info()
    return info.rss - getattr(info, "shared", 0)


def almost_full() -> bool:
    """Whether the system is about to kill this process for its RAM. A GPU raises an error of its own."""
    if torch.cuda.is_available():
        return False
    total = ram.total()
    return used() > 0.97 * total or ram.available() < 0.02 * total


def peak(seen: int = 0) -> int:
    """Highest use: the GPU's own count, or the largest of `seen` and now."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else max(seen, used())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out; torch raises a RuntimeError for RAM."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "can't allocate memory" in str(error)


def advice(planned: MemoryPlan, settings: TrainSettings, packing: bool, linears_packed: bool) -> list[str]:
    """What to change, the setting that gives back most first."""
    ways: list[tuple[int, str]] = []
    activations = planned.of("activations")
    per_row = activations + planned.of("logits")
    if settings.batch_size > 1:
        more = "" if settings.layer_major else "; raise train.grad_accum to keep the step"
        ways.append(
            (
                per_row - per_row // settings.batch_size,
                f"train.batch_size=1 (now {settings.batch_size}{more})",
            )
        )
    if not settings.gradient_checkpointing:
        ways.append((activations * 3 // 4, "train.gradient_checkpointing=true"))
    if settings.layer_major:
        ways.append((activations // 2, "train.layer_major=false: fewer rows at once"))
    half = "data.max_length, half of what it is" + (" (rows are packed to it)" if packing else "")
    ways.append((per_row // 2, half))
    if not linears_packed:
        ways.append((planned.of("dense") * 2 // 3, "quant.linears=nf4: the dense matrices in 4 bits too"))
    trained = planned.of("adapters", "gradients+optimizer")
    ways.append((trained // 2, "lora.r, half of what it is, or fewer lora.targets"))
    if torch.cuda.is_available():
        if "8bit" not in settings.optim:
            ways.append((trained // 3, "train.optim=paged_adamw_8bit"))
        if not planned.of("staging"):
            ways.append((planned.of("experts") * 3 // 4, "experts.home=ram: experts staged layer by layer"))
    ways.append((planned.of("experts") // 12, "quant.double_quant=true"))
    return [
        f"{text}: about {size(saved)} less" for saved, text in sorted(ways, reverse=True) if saved > 1_000_000
    ][:4]


def compared(planned: MemoryPlan, peak: int) -> list[str]:
    """Planned against measured, part by part, and which differed most.

    What can be counted after loading is; everything that comes later (gradients, optimizer, activations,
    logits, staging, the process) is one figure: the measured peak without what was counted.
    """
    rows = [
        (part, planned.of(part) - planned.mapped.get(part, 0), planned.loaded.get(part, 0))
        for part in WEIGHTS
        if not planned.mapped.get(part)  # mapped files are in neither figure
    ]
    later = [part for part in planned.device if part not in WEIGHTS]
    rest = planned.own - sum(n for _, n, _ in rows)
    rows.append((" + ".join(later), rest, max(0, peak - sum(n for _, _, n in rows))))
    rows = [(part, was, now) for part, was, now in rows if was or now]
    lines = [f"{part}: planned {size(was)}, measured {size(now)}" for part, was, now in rows]
    most = max(rows, key=lambda row: row[2] - row[1])
    if most[2] > 1.02 * most[1]:
        lines.append(f"what differed most: {most[0]}, {size(most[2] - most[1])} more than planned")
    return lines


def report(
    error: str, planned: MemoryPlan, settings: TrainSettings, packing: bool, linears_packed: bool
) -> tuple[str, str]:
    """(message, hint) for a run that ran out of memory."""
    total = limit()
    of = f" of {size(total)}" if total else ""
    kind = "GPU memory" if torch.cuda.is_available() else "memory"
    ways = advice(planned, settings, packing, linears_packed)
    lines = [
        f"planned: peak {size(planned.own)}, {size(peak())} measured",
        *compared(planned, peak()),
        *([f"change first: {ways[0]}"] if ways else []),
        *(f"then: {w}" for w in ways[1:]),
    ]
    return f"out of {kind} ({error}), {size(used())}{of} in use", "\n".join(lines)


def first_line(error: BaseException) -> str:
    """The first sentence of what torch says."""
    return str(error).split(". ")[0].split("\n")[0][:120] or type(error).__name__
