"""What a model is made of: every parameter sorted by what packing does with it, from its config alone.

The model is built on torch's meta device, where it has shapes and takes no memory. Sizes come from the same
placeholders that the quantizer puts there.
"""

from __future__ import annotations

import contextlib
import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from moesmith.errors import UserError
from moesmith.experts.linears import HEAD, ROUTER, kept_linears
from moesmith.experts.storage import named_experts, packed_placeholder, weight_names
from moesmith.models.checkpoint import model_class
from moesmith.models.custom import register_classes
from moesmith.models.layers import MoELayer, adapter_targets, moe_layers, submodule
from moesmith.ops.blockwise import pick_blocksize

# Columns of the table: (title, experts scheme, double quant, what `linears=` can do beside it)
COLUMNS = (
    ("16-bit", "bf16", False, None),
    ("nf4", "nf4", False, "nf4"),
    ("nf4 + double quant", "nf4", True, "nf4"),
    ("int8", "int8", False, "int8"),
    ("fp8", "fp8", False, "int8"),
)


def meta_model(config: dict[str, Any]) -> nn.Module:
    """The model a config describes, in bf16 on the meta device: every shape, no memory."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        # Only a file goes through all of transformers' own reading (infinities, keys that are numbers).
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, "config.json").write_text(json.dumps(config))
            known = _config_class(config).from_pretrained(folder)
        with torch.device("meta"):
            return model_class(config)._from_config(known, dtype=torch.bfloat16)
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, StrictDataclassError) as error:
        raise UserError(
            f"transformers {transformers.__version__} cannot build this {config.get('model_type')} config: "
            + " ".join(str(error).split())[:200],
            "config.json may come from another version; compare its transformers_version",
        ) from error
    finally:
        logging.set_verbosity(verbosity)


def _config_class(config: dict[str, Any]) -> Any:
    """AutoConfig, or the class's own config where AutoConfig has no name for it (a model inside another)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    register_classes()
    return (
        transformers.AutoConfig
        if config.get("model_type") in CONFIG_MAPPING
        else model_class(config).config_class
    )


@dataclass
class Anatomy:
    """What a model is made of. Counts are parameters, each once however often it is tied."""

    model_type: str
    layers: int
    moe_layers: int = 0
    num_experts: list[int] = field(default_factory=list)
    top_k: list[int] = field(default_factory=list)
    beside: list[str] = field(default_factory=list)
    """what runs on every token beside the routed experts"""
    outside: str | None = None
    """why experts that exist cannot be packed"""
    experts: int = 0
    active_experts: float = 0.0
    matrices: int = 0
    """expert matrices that would be packed (gate and up counted apart)"""
    blocksizes: Counter = field(default_factory=Counter)
    unpackable: list[str] = field(default_factory=list)
    linears: int = 0
    linear_modules: int = 0
    rest: Counter = field(default_factory=Counter)
    """kind -> parameters of what no setting packs"""
    routers: list[str] = field(default_factory=list)
    """parameter names of one router, as its layer calls them"""
    towers: int = 0
    """parameters of vision and audio towers, included in `linears` and `rest`"""
    expert_bytes: dict[str, int] = field(default_factory=dict)
    linear_bytes: dict[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.experts + self.linears + sum(self.rest.values())

    @property
    def active(self) -> int:
        """Parameters a text token meets: everything but the towers and the experts it is not routed to."""
        return round(self.total - self.experts - self.towers + self.active_experts)

    def facts(self) -> dict[str, Any]:
        """The same for a program."""
        rest = 2 * sum(self.rest.values())
        schemes = {
            title: {
                "experts": self.expert_bytes[title],
                "linears": 2 * self.linears,
                "rest": rest,
                "total": self.expert_bytes[title] + 2 * self.linears + rest,
                "linears_packed": self.linear_bytes[title],
                "total_with_linears_packed": self.expert_bytes[title] + self.linear_bytes[title] + rest,
            }
            for title, *_ in COLUMNS
        }
        return {
            "model_type": self.model_type,
            "layers": self.layers,
            "moe_layers": self.moe_layers,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "beside_experts": self.beside,
            "parameters": {
                "total": self.total,
                "active": self.active,
                "experts": self.experts,
                "linears": self.linears,
                **dict(self.rest),
                "towers": self.towers,
            },
            "bytes": schemes,
            "pack": {"expert_matrices": self.matrices, "blocksizes": dict(self.blocksizes)},
            "left_in_16_bits": {
                "outside_the_interface": self.outside,
                "unpackable": self.unpackable,
                "routers": self.routers,
                "kinds": sorted(kind for kind, size in self.rest.items() if size),
            },
        }


def dissect(model: nn.Module, blocksize: int = 64) -> Anatomy:
    """Sort every parameter of a model on the meta device by what packing would do with it."""
    config = model.config.get_text_config()
    anatomy = Anatomy(config.model_type, getattr(config, "num_hidden_layers", 0))
    layers = moe_layers(model)
    # ernie keeps experts for image tokens beside those for text: a text token never meets them
    top_k = {
        la.experts: 0 if set(la.name.split(".")) & set(la.family.no_adapter) else la.top_k for la in layers
    }
    anatomy.num_experts = sorted({layer.num_experts for layer in layers})
    anatomy.top_k = sorted({layer.top_k for layer in layers})
    anatomy.beside = _beside(model, layers)

    taken: set[int] = set()
    with_experts = set()
    for name, module in named_experts(model):
        if any(
            id(parameter) not in taken for parameter in module.parameters()
        ):  # not tied to another layer's
            with_experts.add(_block(name))
            _add_experts(anatomy, name, module, top_k[name], blocksize, taken)
    anatomy.moe_layers = len(with_experts)
    if not layers:
        anatomy.outside = _undecorated(model)
        if anatomy.outside:
            _add(anatomy, "experts", _out_of_reach(model), taken)

    for layer in layers:
        router = submodule(model, layer.router)
        _add(anatomy, "routers", router.parameters(), taken)
        names = [f"{layer.router.rpartition('.')[2]}.{name}" for name, _ in router.named_parameters()]
        anatomy.routers += [name.removesuffix(".weight") for name in names]
    anatomy.routers = list(dict.fromkeys(anatomy.routers))

    towers = {id(p) for tower in _towers(model, config) for p in tower.parameters()}
    anatomy.towers = sum({id(p): p.numel() for p in model.parameters() if id(p) in towers}.values())
    kept = kept_linears(model)
    head = model.get_output_embeddings()
    if head is not None and not any(p is head.weight for p in _embeddings(model)):
        _add(anatomy, "head", [head.weight], taken)
    _add(anatomy, "embeddings", _embeddings(model), taken)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and id(module.weight) not in taken:
            if kept.get(name) == ROUTER:
                _add(anatomy, "gates", [module.weight], taken)
            elif kept.get(name) == HEAD:
                _add(anatomy, "tied and last linears", [module.weight], taken)
            elif name in kept:
                _add(anatomy, "linears that cannot be packed", [module.weight], taken)
            else:
                taken.add(id(module.weight))
                anatomy.linears += module.weight.numel()
                anatomy.linear_modules += 1
                for title, _, double_quant, scheme in COLUMNS:
                    size = _linear_bytes(module.weight, scheme, double_quant)
                    anatomy.linear_bytes[title] = anatomy.linear_bytes.get(title, 0) + size
    _add(anatomy, "norms", (p for p in model.parameters() if p.ndim == 1), taken)
    _add(anatomy, "other tensors", model.parameters(), taken)
    for title, *_ in COLUMNS:
        anatomy.expert_bytes.setdefault(title, 0)
        anatomy.linear_bytes.setdefault(title, 0)
    return anatomy


def _add(anatomy: Anatomy, kind: str, parameters: Any, taken: set[int]) -> None:
    for parameter in parameters:
        if id(parameter) not in taken:
            taken.add(id(parameter))
            anatomy.rest[kind] += parameter.numel()


def _add_experts(
    anatomy: Anatomy, name: str, module: nn.Module, top_k: int, blocksize: int, taken: set[int]
) -> None:
    """Count one experts module's stacks; its biases and norms follow their experts but stay in 16 bits."""
    weights = weight_names(module)
    for key, parameter in module.named_parameters():
        taken.add(id(parameter))
        size = parameter.numel()
        anatomy.experts += size
        num_experts = parameter.shape[0] if key in weights or key.endswith("_bias") else None
        anatomy.active_experts += size * top_k / num_experts if num_experts else size
        block = pick_blocksize(parameter.shape[-1], blocksize) if key in weights else None
        if block is not None:
            anatomy.matrices += parameter.shape[0] * (2 if key == "gate_up_proj" else 1)
            anatomy.blocksizes[block] += 1
        elif key in weights:
            anatomy.unpackable.append(f"{name}.{key} {list(parameter.shape)}")
        for title, scheme, double_quant, _ in COLUMNS:
            stored = 2 * size
            if block is not None and scheme != "bf16":
                packed = packed_placeholder(parameter.shape, scheme, block, double_quant)
                parts = (packed.codes, packed.absmax, packed.scale, packed.offset)
                stored = sum(part.nbytes for part in parts if part is not None)
            anatomy.expert_bytes[title] = anatomy.expert_bytes.get(title, 0) + stored


def _linear_bytes(weight: torch.Tensor, scheme: str | None, double_quant: bool) -> int:
    """Bytes bitsandbytes stores for an nn.Linear: nf4 in blocks of 64, int8 with a scale per row."""
    n = weight.numel()
    if scheme is None:
        return 2 * n
    if scheme == "int8":
        return n + 4 * weight.shape[0]
    blocks = -(-n // 64)
    return -(-n // 2) + (blocks + 4 * -(-blocks // 256) if double_quant else 4 * blocks)


def _embeddings(model: nn.Module) -> list[torch.Tensor]:
    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]


def _towers(model: nn.Module, text_config: Any) -> list[nn.Module]:
    """Vision and audio towers: models inside the model with a config of their own and no routed experts."""
    own = {model.config.model_type, text_config.model_type}
    inner = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config.model_type not in own]
    return [tower for tower in inner if not any(named_experts(tower)) and tower is not model]


def _block(name: str) -> str:
    """`model.layers.3.mlp.experts` -> `model.layers.3`: two experts modules in one layer count once."""
    match = re.match(r"(.*?\.\d+)(\.|$)", name)
    return match.group(1) if match else name


def _beside(model: nn.Module, layers: list[MoELayer]) -> list[str]:
    """What every token runs through beside the routed experts, in a layer that has them."""
    found = []
    with_experts = {_block(layer.name) for layer in layers}
    for placement, words in (("shared_experts", "shared expert"), ("dense_mlp", "dense MLP")):
        with contextlib.suppress(UserError):  # the model has none
            modules, parameters = adapter_targets(model, [placement])
            if any(_block(name) in with_experts for name in modules + parameters):
                found.append(words)
    return found


def _undecorated(model: nn.Module) -> str | None:
    """The class of experts that transformers does not dispatch and moesmith cannot reach, if there is one."""
    return next((type(module).__name__ for module in _foreign_experts(model)), None)


def _foreign_experts(model: nn.Module) -> list[nn.Module]:
    found = []
    for name, module in model.named_modules():
        named = name.rpartition(".")[2] == "experts" or type(module).__name__.endswith("Experts")
        if named and any(True for _ in module.parameters()):
            found.append(module)
    return found


def _out_of_reach(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of experts outside the interface that are not an nn.Linear's either."""
    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    return [p for module in _foreign_experts(model) for p in module.parameters() if id(p) not in linears]
