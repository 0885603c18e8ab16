"""What a model is made of, as far as memory and time depend on it: counts from its config alone.

Everything is read off the model on torch's meta device (`models/anatomy.py`), so it needs no weights and no
table of architectures. What the counts take in bytes under a choice is in `footprint.py`.
"""

# E experts, N rows and D columns of one expert's matrix, K experts per token, H hidden size, r LoRA rank

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from moesmith.errors import UserError
from moesmith.experts.linears import kept_linears
from moesmith.experts.storage import packed_placeholder, weight_names
from moesmith.models.anatomy import meta_model
from moesmith.models.layers import PLACEMENTS, adapter_targets, moe_layers, submodule
from moesmith.ops.blockwise import pick_blocksize

if TYPE_CHECKING:
    from moesmith.models.checkpoint import Checkpoint

PLAIN = ("bf16", "fp16")  # schemes that keep a weight whole


@dataclass(frozen=True)
class Experts:
    """The experts of one MoE layer."""

    name: str
    """of the experts module"""
    num_experts: int
    top_k: int
    """experts that a text token is sent to; 0 for experts kept for other tokens"""
    stacks: Mapping[str, tuple[int, int, int]]
    """weight name -> (E, N, D) as the model stores it"""
    other: int = 0
    """parameters beside the stacks (biases), which are never packed"""

    @property
    def parameters(self) -> int:
        """All of them."""
        return self.other + sum(prod(shape) for shape in self.stacks.values())

    @property
    def wide(self) -> int:
        """Elements of one routed row: what goes in and comes out of every projection."""
        return sum(n + d for _, n, d in self.stacks.values())

    def nbytes(self, scheme: str, double_quant: bool = False, blocksize: int = 64, width: int = 2) -> int:
        """Bytes as stored; `width` bytes for each parameter that no scheme packs."""
        stacks = self.stacks.values()
        return self.other * width + sum(_stored(s, scheme, double_quant, blocksize, width) for s in stacks)


@dataclass(frozen=True)
class Cache:
    """What generation keeps of a token in one layer."""

    elements: int
    """per token: keys and values"""
    window: int | None = None
    """tokens it looks back, None for all"""
    fixed: int = 0
    """elements of a state that does not grow (linear attention, state-space layers)"""


@dataclass(frozen=True, eq=False)  # compared and hashed as an object: it is a key of caches
class Shape:
    """Counts of a model. Parameters are counted once however often they are tied."""

    model_type: str
    hidden: int
    layers: int
    vocabulary: int
    experts: tuple[Experts, ...]
    linears: tuple[tuple[int, int], ...]
    """(rows, columns) of every linear that `linears=` packs"""
    embeddings: int
    """input embeddings, and the head if it is not tied to them"""
    head: int
    """parameters that the output head reads"""
    routers: int
    rest: int
    """norms, gates and whatever else stays in 16 bits"""
    lora: Mapping[str, tuple[tuple[int, int, int], ...]]
    """placement -> (matrices, in, out) of every place an adapter can go, matrices sharing one input"""
    kv: tuple[Cache, ...]
    """one per decoder layer"""
    quantization: Mapping[str, Any] | None = None
    """how it is packed on disk: scheme, double_quant, linears, blocksize; None when it is not"""
    disk_bytes: int = 0
    """its files, 0 when there are none"""
    config: Mapping[str, Any] = field(default_factory=dict, repr=False)
    kinds: tuple[int, ...] = field(default=(), repr=False)
    """one number per decoder layer, the same for layers that are made alike; empty: not known"""

    @classmethod
    def of(
        cls, config: dict[str, Any], quantization: Mapping[str, Any] | None = None, disk_bytes: int = 0
    ) -> Shape:
        """The shape of what config.json describes.

        Args:
            quantization: how it is packed on disk (`Checkpoint.quantization` of one that `is_packed`).
            disk_bytes: the size of its files.

        Raises:
            UserError: transformers cannot build this config.
        """
        return _count(meta_model(config), config, quantization, disk_bytes)

    @classmethod
    def of_checkpoint(cls, checkpoint: Checkpoint) -> Shape:
        """The shape of a checkpoint, from its config and headers alone."""
        packed = checkpoint.quantization if checkpoint.is_packed else None
        return cls.of(checkpoint.config, packed, checkpoint.nbytes)

    @property
    def packed_on_disk(self) -> bool:
        """Whether loading it is a memory map."""
        return self.quantization is not None

    @property
    def expert_parameters(self) -> int:
        """Of all layers."""
        return sum(layer.parameters for layer in self.experts)

    @property
    def parameters(self) -> int:
        """All of them."""
        linears = sum(rows * columns for rows, columns in self.linears)
        return self.expert_parameters + linears + self.embeddings + self.routers + self.rest

    def expert_bytes(
        self, scheme: str, double_quant: bool = False, blocksize: int = 64, width: int = 2
    ) -> list[int]:
        """Bytes of the experts of every MoE layer, in the order of the layers."""
        return [layer.nbytes(scheme, double_quant, blocksize, width) for layer in self.experts]

    def linear_bytes(self, scheme: str | None, double_quant: bool = False, width: int = 2) -> int:
        """Bytes of the packable linears: nf4 in blocks of 64, int8 with a scale per row, None as they are."""
        if scheme is None:
            return width * sum(rows * columns for rows, columns in self.linears)
        if scheme == "int8":
            return sum(rows * columns + 4 * rows for rows, columns in self.linears)
        total = 0
        for rows, columns in self.linears:
            blocks = -(-rows * columns // 64)
            total += -(-rows * columns // 2)
            total += blocks + 4 * -(-blocks // 256) if double_quant else 4 * blocks
        return total

    def lora_parameters(self, r: int, targets: Iterable[str]) -> dict[str, int]:
        """Placement -> trainable parameters of a LoRA adapter of rank r, as PEFT makes it.

        Raises:
            UserError: a placement that this model does not have.
        """
        found = {}
        for target in targets:
            if not self.lora.get(target):
                present = ", ".join(name for name in PLACEMENTS if self.lora.get(name))
                raise UserError(
                    f"{self.model_type} has no {target} for an adapter to go on", f"it has {present}"
                )
            found[target] = sum(n * r * (inputs + outputs) for n, inputs, outputs in self.lora[target])
        return found

    def cache_bytes(self, context: int, streams: int = 1, width: int = 2) -> int:
        """Bytes of keys, values and states of `streams` conversations of `context` tokens."""
        elements = sum(
            layer.elements * min(context, layer.window or context) + layer.fixed for layer in self.kv
        )
        return elements * streams * width


@cache
def _stored(shape: tuple[int, int, int], scheme: str, double_quant: bool, blocksize: int, width: int) -> int:
    """Bytes of one stack: packed as `storage.packed_placeholder` says, or whole where no block size fits."""
    block = None if scheme in PLAIN else pick_blocksize(shape[-1], blocksize)
    if block is None:
        return prod(shape) * (2 if scheme in PLAIN else width)
    packed = packed_placeholder(torch.Size(shape), scheme, block, double_quant)
    parts = (packed.codes, packed.absmax, packed.scale, packed.offset)
    return sum(part.nbytes for part in parts if part is not None)


# ---------------------------------------------------------------- counting


def _count(
    model: nn.Module, config: dict[str, Any], quantization: Mapping[str, Any] | None, disk_bytes: int
) -> Shape:
    text: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    layers = moe_layers(model)
    taken: set[int] = set()
    experts = []
    for layer in layers:
        module = submodule(model, layer.experts)
        mine = {name: p for name, p in module.named_parameters() if id(p) not in taken}
        if not mine:  # tied to another layer's
            continue
        taken |= {id(p) for p in mine.values()}
        stacks = {name: tuple(mine[name].shape) for name in weight_names(module) if name in mine}
        unreached = set(layer.name.split(".")) & set(layer.family.no_adapter)
        experts.append(
            Experts(
                name=layer.experts,
                num_experts=layer.num_experts,
                top_k=0 if unreached else layer.top_k,
                stacks=stacks,  # type: ignore[arg-type]
                other=sum(p.numel() for name, p in mine.items() if name not in stacks),
            )
        )
    routers = _take((p for la in layers for p in submodule(model, la.router).parameters()), taken)
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    tables = [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]
    if head is not None:
        tables.append(head.weight)
    embeddings = _take(tables, taken)
    kept = kept_linears(model)
    linears = []
    for name, module in model.named_modules():
        if type(module) is nn.Linear and name not in kept and id(module.weight) not in taken:
            taken.add(id(module.weight))
            linears.append((module.out_features, module.in_features))
    rest = _take(model.parameters(), taken)
    return Shape(
        model_type=text.model_type,
        hidden=int(text.hidden_size),
        layers=int(getattr(text, "num_hidden_layers", len(layers))),
        vocabulary=int(text.vocab_size),
        experts=tuple(experts),
        linears=tuple(linears),
        embeddings=embeddings,
        head=0 if head is None else head.weight.numel(),
        routers=routers,
        rest=rest,
        lora=_lora_places(model),
        kv=_cache(text),
        quantization=quantization,
        disk_bytes=disk_bytes,
        config=config,
        kinds=layer_kinds(model),
    )


def layer_kinds(model: nn.Module) -> tuple[int, ...]:
    """One number per decoder layer, the same for layers that are made alike; empty where that is not known.

    Alike: the same modules, sizes and plain attributes, and the same entries in the config's lists. The
    numbers mean something within a process only.
    """
    text: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    moe = moe_layers(model)
    depth = getattr(text, "num_hidden_layers", None)
    if not moe or not depth or getattr(text, "num_kv_shared_layers", None):  # counted from the end
        return ()
    parts = moe[0].name.split(".")
    while parts and not parts[-1].isdigit():
        parts.pop()
    layers = list(submodule(model, ".".join(parts[:-1])).children()) if parts else []
    if len(layers) != depth:
        return ()
    lists = [v for _, v in sorted(text.to_dict().items()) if isinstance(v, list) and len(v) == depth > 1]
    return tuple(
        hash((_structure(layer), *(repr(entries[i]) for entries in lists))) for i, layer in enumerate(layers)
    )


def _structure(layer: nn.Module) -> str:
    """What a layer is made of; its own number left out."""
    said = []
    for name, module in layer.named_modules():
        plain = {
            key: value for key, value in vars(module).items()
            if key != "layer_idx" and isinstance(value, (int, float, str, bool, type(None)))
        }  # fmt: skip
        sizes = {key: tuple(p.shape) for key, p in module.named_parameters(recurse=False)}
        said.append(repr((name, type(module).__name__, sorted(plain.items()), sorted(sizes.items()))))
    return "\n".join(said)


def _take(parameters: Iterable[Any], taken: set[int]) -> int:
    """Count the parameters that nobody has counted yet."""
    total = 0
    for parameter in parameters:
        if id(parameter) not in taken:
            taken.add(id(parameter))
            total += parameter.numel()
    return total


def _lora_places(model: nn.Module) -> dict[str, tuple[tuple[int, int, int], ...]]:
    """Placement -> (matrices, in, out) of every target, as `adapter_targets` finds them."""
    places = {}
    for placement in PLACEMENTS:
        try:
            modules, parameters = adapter_targets(model, [placement])
        except UserError:
            continue
        found: Counter[tuple[int, int, int]] = Counter()
        for name in modules:
            linear: Any = submodule(model, name)
            found[1, linear.in_features, linear.out_features] += 1
        for name in parameters:
            holder, _, last = name.rpartition(".")
            shape = getattr(submodule(model, holder), last).shape
            # PEFT gives a stack r ranks per expert: A (r E, in), B (out, r E).
            found[shape[0] if len(shape) == 3 else 1, shape[-1], shape[-2]] += 1
        places[placement] = tuple((key[0], key[1], key[2]) for key, n in found.items() for _ in range(n))
    return places


def _cache(text: Any) -> tuple[Cache, ...]:
    """Keys and values per layer, from the text config."""
    layers = int(getattr(text, "num_hidden_layers", 0))
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"] * layers)
    own = list(text.per_layer_config) if getattr(text, "is_heterogeneous", False) else [text] * layers
    found = []
    for kind, config in zip(kinds, own, strict=False):
        heads = int(getattr(config, "num_attention_heads", 1))
        kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        dim = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
        row = 2 * kv_heads * dim
        if getattr(
            config, "kv_lora_rank", None
        ):  # latent attention keeps the latent vector and one rotary key
            row = int(config.kv_lora_rank) + int(config.qk_rope_head_dim)
        window = getattr(config, "sliding_window", None) if "sliding" in kind or "chunked" in kind else None
        if any(word in kind for word in ("linear", "mamba", "conv")):  # a state of one matrix per head
            found.append(Cache(0, None, row * dim))
        else:
            found.append(Cache(row, window))
    return tuple(found)
