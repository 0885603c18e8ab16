"""What training takes in memory: an estimate before it starts, and when it runs out, what to change first.

Weights, adapter, gradients and optimizer state are counted, not estimated. Activations are estimated from the
shapes of one decoder layer.
"""

# T tokens in a forward pass, H model dim, F expert hidden dim, K experts per token, V vocabulary

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from moesmith.console import size
from moesmith.experts.report import count
from moesmith.models.layers import moe_layers, submodule

from .settings import TrainSettings

# TRL's fused head works in tiles of this many tokens by this much of the vocabulary.
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768

# How many copies of a token's hidden vector one decoder layer holds while its backward runs, with everything
# recomputed once: residuals, norms, q/k/v/o and their gradients. Measured on OLMoE and Mixtral shapes, CPU.
LAYER_COPIES = 24
# The same for routed rows in the experts: gate, up, their product, the rows themselves, and gradients.
ROW_COPIES = 4

# RAM that torch's CPU kernels take as they meet new shapes (oneDNN keeps the last 1,024), and late imports.
# With it the plan came to 0.97-1.25 of the measured peak: OLMoE of width 1024, 512 and 2048 tokens, with and
# without gradient checkpointing, 2-core CPU.
CPU_WARM_UP = 500_000_000


@dataclass
class MemoryPlan:
    """Bytes by what they are for."""

    experts: int = 0
    dense: int = 0
    adapters: int = 0
    """adapter, its gradients and its optimizer state"""
    activations: int = 0
    logits: int = 0
    process: int = 0
    """on a CPU: Python, torch and the data, which share the RAM with the model"""

    @property
    def peak(self) -> int:
        """All of it."""
        return sum(n for _, n in self.parts())

    def parts(self) -> list[tuple[str, int]]:
        """(name, bytes), in the order of the fields."""
        return [(name, getattr(self, name)) for name in self.__dataclass_fields__]

    def __str__(self) -> str:
        return " · ".join(f"{name} {size(n)}" for name, n in self.parts() if n)


def plan(model: nn.Module, settings: TrainSettings, tokens: int, learned: int) -> MemoryPlan:
    """Memory of one training step.

    Args:
        model: with its adapter on.
        tokens: T of the largest forward pass, padding included.
        learned: how many of them are learned.
    """
    counts = count(model)
    text: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    trained = [p for p in model.parameters() if p.requires_grad]
    adapter_bytes = 4 if settings.adapter_dtype == "float32" else 2
    state = {"8bit": 2, "adafactor": 1, "sgd": 0}
    state_bytes = next((n for word, n in state.items() if word in settings.optim), 2 * adapter_bytes)
    adapters = sum(p.numel() for p in trained) * (2 * adapter_bytes + state_bytes)
    held = sum(p.nbytes for p in trained)

    width = 2 if settings.dtype == "bfloat16" else 4
    layers = text.num_hidden_layers
    one_layer = LAYER_COPIES * tokens * text.hidden_size * width + _rows(model, tokens) * width
    kept = 1 if settings.gradient_checkpointing else LAYER_COPIES / 2
    between = layers * tokens * text.hidden_size * width * kept
    if not settings.gradient_checkpointing:
        between += layers * _rows(model, tokens) * width / 2
    tile = min(learned, TILE_TOKENS) * min(text.vocab_size, TILE_VOCABULARY)
    on_gpu = torch.cuda.is_available()
    # Without Triton the tile's exponentials are float32 tensors of their own, several at a time.
    logits = tile * (width if on_gpu else width + 5 * 4) + 4 * learned * text.hidden_size * 2
    process = 0 if on_gpu else max(0, used() - counts.expert_bytes - counts.other_bytes) + CPU_WARM_UP
    return MemoryPlan(
        experts=counts.expert_bytes,
        dense=counts.other_bytes - held,
        adapters=adapters,
        activations=int(one_layer + between),
        logits=logits,
        process=process,
    )


def _rows(model: nn.Module, tokens: int) -> int:
    """Elements that the routed rows of the widest MoE layer take: rows x (in + out of both projections)."""
    widest = 0
    for layer in moe_layers(model):
        experts: Any = submodule(model, layer.experts)
        across = sum(getattr(experts, name).shape[1] for name in ("gate_up_proj", "up_proj", "down_proj")
                     if isinstance(getattr(experts, name, None), torch.Tensor))  # fmt: skip
        widest = max(widest, tokens * layer.top_k * across)
    return ROW_COPIES * widest


def limit() -> int | None:
    """Bytes there are on the device that trains: the GPU's memory, or the machine's or container's RAM."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory
    limits = [psutil.virtual_memory().total]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        file = Path(path)
        if file.is_file() and (text := file.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


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
    ram = psutil.virtual_memory()
    return used() > 0.97 * (limit() or ram.total) or ram.available < 0.02 * ram.total


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
    per_row = planned.activations + planned.logits
    if settings.batch_size > 1:
        saved = per_row - per_row // settings.batch_size
        ways.append(
            (
                saved,
                f"train.batch_size=1 (now {settings.batch_size}; raise train.grad_accum to keep the step)",
            )
        )
    if not settings.gradient_checkpointing:
        ways.append((planned.activations * 3 // 4, "train.gradient_checkpointing=true"))
    ways.append(
        (
            per_row // 2,
            "data.max_length, half of what it is" + (" (rows are packed to it)" if packing else ""),
        )
    )
    if not linears_packed:
        ways.append((planned.dense * 2 // 3, "quant.linears=nf4: the dense matrices in 4 bits too"))
    ways.append((planned.adapters // 2, "lora.r, half of what it is, or fewer lora.targets"))
    if "8bit" not in settings.optim and torch.cuda.is_available():
        ways.append((planned.adapters // 3, "train.optim=paged_adamw_8bit"))
    ways.append((planned.experts // 12, "quant.double_quant=true"))
    return [
        f"{text}: about {size(saved)} less" for saved, text in sorted(ways, reverse=True) if saved > 1_000_000
    ][:4]


def report(
    error: str, planned: MemoryPlan, settings: TrainSettings, packing: bool, linears_packed: bool
) -> tuple[str, str]:
    """(message, hint) for a run that ran out of memory."""
    total = limit()
    of = f" of {size(total)}" if total else ""
    kind = "GPU memory" if torch.cuda.is_available() else "memory"
    ways = advice(planned, settings, packing, linears_packed)
    lines = [
        f"what takes it: {planned}",
        *([f"change first: {ways[0]}"] if ways else []),
        *(f"then: {w}" for w in ways[1:]),
    ]
    return f"out of {kind} ({error}), {size(used())}{of} in use", "\n".join(lines)


def first_line(error: BaseException) -> str:
    """The first sentence of what torch says."""
    return str(error).split(". ")[0].split("\n")[0][:120] or type(error).__name__
