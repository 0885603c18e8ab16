"""Say what a checkpoint is, what it needs in each scheme, and what packing would leave out.

Works from config.json and the safetensors headers alone: the model is built without memory (torch's meta device) and
no weight is read. Takes a folder, a folder with only a config.json, or a hub name.
"""

from __future__ import annotations

import contextlib
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.config import JobConfig
from moesmith.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from moesmith.models.checkpoint import Checkpoint

POSITIONAL = ("model",)
JSON = True
EXAMPLE = "moesmith inspect Qwen/Qwen3-30B-A3B"

# Columns of the table: (title, experts scheme, double quant, what `linears=` can do beside it)
COLUMNS = (
    ("16-bit", "bf16", False, None),
    ("nf4", "nf4", False, "nf4"),
    ("nf4 + double quant", "nf4", True, "nf4"),
    ("int8", "int8", False, "int8"),
    ("fp8", "fp8", False, "int8"),
)


class Config(JobConfig):
    model: str
    """Model folder, a folder holding only config.json, or a hub name."""
    blocksize: int = 64
    """Weights per block scale, as `quantize` would use it."""


def run(cfg: Config) -> None:
    from moesmith.models.checkpoint import Checkpoint, check_architecture

    checkpoint = Checkpoint.open(cfg.model, weights=False)
    check_architecture(checkpoint.config)
    anatomy = dissect(meta_model(checkpoint.config), cfg.blocksize)
    facts = {"model": cfg.model, **anatomy.facts(), "disk": disk_facts(checkpoint)}
    console.emit(facts)
    show(facts, anatomy)
    check_disk(checkpoint, anatomy)


# ---------------------------------------------------------------- the model, without its weights


def meta_model(config: dict[str, Any]) -> nn.Module:
    """The model a config describes, in bf16 on the meta device: every shape, no memory."""
    import torch
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.utils import logging

    known = CONFIG_MAPPING[config["model_type"]].from_dict(config)
    names = [name for name in config.get("architectures") or [] if hasattr(transformers, name)]
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with torch.device("meta"):
            if names:
                return getattr(transformers, names[0])._from_config(known, dtype=torch.bfloat16)
            return transformers.AutoModelForCausalLM.from_config(known, dtype=torch.bfloat16)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"transformers {transformers.__version__} cannot build this {config['model_type']} config: {error}",
            "config.json may come from another version; compare its transformers_version",
        ) from error
    finally:
        logging.set_verbosity(verbosity)


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
                "kinds": sorted(self.rest),
            },
        }


def dissect(model: nn.Module, blocksize: int = 64) -> Anatomy:
    """Sort every parameter of a model on the meta device by what packing would do with it."""
    from torch import nn

    from moesmith.experts.storage import named_experts
    from moesmith.models.layers import moe_layers

    config = model.config.get_text_config()
    anatomy = Anatomy(config.model_type, getattr(config, "num_hidden_layers", 0))
    layers = moe_layers(model)
    anatomy.moe_layers = len({_block(layer.name) for layer in layers})
    anatomy.num_experts = sorted({layer.num_experts for layer in layers})
    anatomy.top_k = sorted({layer.top_k for layer in layers})
    anatomy.beside = _beside(model, layers)

    taken: set[int] = set()
    top_k = {id(layer.experts): layer.top_k for layer in layers}
    for name, module in named_experts(model):
        _add_experts(anatomy, name, module, top_k.get(id(module)), blocksize, taken)
    if not layers:
        anatomy.outside = _undecorated(model)

    for layer in layers:
        _add(anatomy, "routers", layer.router.parameters() if layer.router is not None else (), taken)
    if layers and layers[0].router is not None:
        prefix = next(name for name, module in model.named_modules() if module is layers[0].router)
        label = prefix.rpartition(".")[2]
        names = [label + "." + name for name, _ in layers[0].router.named_parameters()]
        anatomy.routers = [name.removesuffix(".weight") for name in names]

    towers = {id(p) for tower in _towers(model, config) for p in tower.parameters()}
    anatomy.towers = sum({id(p): p.numel() for p in model.parameters() if id(p) in towers}.values())
    skipped = _linears_never_packed(model)
    head = model.get_output_embeddings()
    if head is not None and not any(p is head.weight for p in _embeddings(model)):
        _add(anatomy, "head", [head.weight], taken)
    _add(anatomy, "embeddings", _embeddings(model), taken)
    for name, module in model.named_modules():
        if type(module) is nn.Linear and id(module.weight) not in taken:
            if any(name == s or name.startswith(s + ".") for s in skipped):
                _add(anatomy, "gates", [module.weight], taken)
            else:
                taken.add(id(module.weight))
                anatomy.linears += module.weight.numel()
                anatomy.linear_modules += 1
                for title, _, double_quant, scheme in COLUMNS:
                    size = _linear_bytes(module.weight, scheme, double_quant)
                    anatomy.linear_bytes[title] = anatomy.linear_bytes.get(title, 0) + size
    _add(anatomy, "norms and others", model.parameters(), taken)
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
    anatomy: Anatomy, name: str, module: nn.Module, top_k: int | None, blocksize: int, taken: set[int]
) -> None:
    """Count one experts module's stacks; its biases and norms follow their experts but stay in 16 bits."""
    from moesmith.experts.storage import packed_placeholder, weight_names
    from moesmith.ops.blockwise import pick_blocksize

    weights = weight_names(module)
    for key, parameter in module.named_parameters():
        if id(parameter) in taken:  # experts tied to another layer's
            continue
        taken.add(id(parameter))
        size = parameter.numel()
        anatomy.experts += size
        num_experts = parameter.shape[0] if key in weights or key.endswith("_bias") else None
        anatomy.active_experts += size * top_k / num_experts if top_k and num_experts else size
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


def _linear_bytes(weight: nn.Parameter, scheme: str | None, double_quant: bool) -> int:
    """What bitsandbytes stores for an nn.Linear: nf4 in blocks of 64 of the flat weight, int8 with a scale per row."""
    n = weight.numel()
    if scheme is None:
        return 2 * n
    if scheme == "int8":
        return n + 4 * weight.shape[0]
    blocks = -(-n // 64)
    return -(-n // 2) + (blocks + 4 * -(-blocks // 256) if double_quant else 4 * blocks)


def _embeddings(model: nn.Module) -> list[nn.Parameter]:
    from torch import nn

    return [module.weight for module in model.modules() if isinstance(module, nn.Embedding)]


def _linears_never_packed(model: nn.Module) -> list[str]:
    """Linears that `linears=` leaves alone: heads, tied weights, routers, gates, what the model keeps in fp32."""
    from transformers.quantizers.base import get_keys_to_not_convert

    from moesmith.experts.quantizer import router_linears

    return get_keys_to_not_convert(model) + router_linears(model) + list(model._keep_in_fp32_modules or [])


def _towers(model: nn.Module, text_config: Any) -> list[nn.Module]:
    """Vision and audio towers: models inside the model with a config of their own and no routed experts."""
    from transformers import PreTrainedModel

    from moesmith.experts.storage import named_experts

    own = {model.config.model_type, text_config.model_type}
    inner = [m for m in model.modules() if isinstance(m, PreTrainedModel) and m.config.model_type not in own]
    return [tower for tower in inner if not any(named_experts(tower)) and tower is not model]


def _block(name: str) -> str:
    """`model.layers.3.mlp.experts` -> `model.layers.3`: two experts modules in one layer count once."""
    match = re.match(r"(.*?\.\d+)(\.|$)", name)
    return match.group(1) if match else name


def _beside(model: nn.Module, layers: list[Any]) -> list[str]:
    """What stands next to the routed experts: a shared expert in the same block, a dense MLP in the same layer."""
    found: Counter = Counter()
    modules = dict(model.named_modules())
    for block in {_block(layer.name) for layer in layers}:
        names = {name[len(block) + 1 :] for name in modules if name.startswith(block + ".")}
        leaves = {name.rpartition(".")[2] for name in names}
        experts = [layer for layer in layers if _block(layer.name) == block]
        if leaves & {"shared_expert", "shared_experts", "shared_mlp"}:
            found["shared expert"] += 1
        # a feed-forward of the layer that does not contain the experts
        mlp = next((n for n in ("mlp", "feed_forward", "dense_mlp") if n in names), None)
        inside = any(module is layer.experts for layer in experts for module in modules[f"{block}.{mlp}"].modules()) if mlp else True
        if not inside:
            found["dense MLP"] += 1
    return sorted(found)


def _undecorated(model: nn.Module) -> str | None:
    """The class of experts that transformers does not dispatch, so that moesmith cannot reach them; None if there are none."""
    for name, module in model.named_modules():
        leaf = name.rpartition(".")[2]
        named = leaf == "experts" or type(module).__name__.endswith(("Experts", "ExpertMLP"))
        if named and sum(p.numel() for p in module.parameters()):
            return type(module).__name__ if type(module).__module__.startswith("transformers") else leaf
    return None


# ---------------------------------------------------------------- the files


def disk_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """How the weights lie on disk, and what comes with them."""
    names = checkpoint.tensors
    per_expert = sum(1 for name in names if re.search(r"\bexperts\.\d+\.", name))
    fused = sum(1 for name, t in names.items() if "experts" in name and len(t.shape) == 3 and "absmax" not in name)
    dtypes: Counter = Counter()
    for tensor in names.values():
        dtypes[tensor.dtype] += tensor.nbytes
    quantization = checkpoint.quantization or {}
    return {
        "weights": bool(names),
        "bytes": checkpoint.nbytes,
        "files": len(checkpoint.files),
        "dtypes": dict(dtypes.most_common()),
        "experts": "per expert" if per_expert else "fused" if fused else None,
        "quantization": quantization.get("quant_method") or quantization.get("quant_algo"),
        "scheme": quantization.get("scheme") if checkpoint.is_packed else None,
        "double_quant": quantization.get("double_quant", False) if checkpoint.is_packed else None,
        "linears": quantization.get("linears") if checkpoint.is_packed else None,
        "tokenizer": checkpoint.has_tokenizer,
        "chat_template": checkpoint.chat_template is not None,
        "marks_assistant_tokens": checkpoint.marks_assistant,
    }


def check_disk(checkpoint: Checkpoint, anatomy: Anatomy) -> None:
    """Warn when the files hold fewer weights than the config describes."""
    if checkpoint.tensors and not checkpoint.quantization:
        stored = sum(tensor.numel for tensor in checkpoint.tensors.values())
        if stored < 0.98 * anatomy.total:
            console.warn(
                f"config.json describes {anatomy.total:,} parameters, the files hold {stored:,}: "
                "weights are missing or belong to another config"
            )


# ---------------------------------------------------------------- the words


def show(facts: dict[str, Any], anatomy: Anatomy) -> None:
    """The page a person reads."""
    head = [anatomy.model_type, f"{anatomy.layers} layers"]
    if anatomy.moe_layers:
        head[-1] += f", {anatomy.moe_layers} with experts"
        head.append(f"{_range(anatomy.num_experts)} experts, top-{_range(anatomy.top_k)}")
        head += [f"{what} beside them" for what in anatomy.beside]
    elif anatomy.outside:
        head.append("experts that cannot be packed")
    else:
        head.append("dense, no experts")
    console.say(" · ".join(head), style="bold")
    if not facts["disk"]["weights"]:
        console.say("no weights in this folder: every figure follows from config.json")

    active = f", {console.count(anatomy.active)} active per token" if anatomy.experts else ""
    towers = f"; {console.count(anatomy.towers)} of the total in vision or audio towers" if anatomy.towers else ""
    text = f"{console.count(anatomy.total)} total{active} (embeddings counted{towers})"
    console.row("parameters", text, width=13)
    console.say()
    _show_bytes(facts["bytes"], anatomy)
    console.say()
    _show_packing(anatomy)
    _show_disk(facts["disk"], anatomy)
    _show_next(facts)


def _show_bytes(schemes: dict[str, Any], anatomy: Anatomy) -> None:
    titles = [title for title, *_ in COLUMNS] if anatomy.experts else ["16-bit", "nf4", "int8"]
    rows = []
    if anatomy.experts:
        rows.append(["experts", *(console.size(schemes[t]["experts"]) for t in titles)])
    key = "linears" if anatomy.experts else "linears_packed"
    rows.append(["linears", *(console.size(schemes[t][key]) for t in titles)])
    rows.append(["the rest", *(console.size(schemes[t]["rest"]) for t in titles)])
    key = "total" if anatomy.experts else "total_with_linears_packed"
    rows.append(["total", *(console.size(schemes[t][key]) for t in titles)])
    if anatomy.experts:
        packed = [console.size(schemes[t]["total_with_linears_packed"]) for t in titles]
        rows.append(["linears packed too", "", *packed[1:]])
    console.table(["", *titles], rows, label_width=11)


def _show_packing(anatomy: Anatomy) -> None:
    if anatomy.matrices:
        sizes = ", ".join(str(block) for block in sorted(anatomy.blocksizes, reverse=True))
        text = f"{anatomy.matrices:,} expert matrices, a scale per {sizes} weights"
        console.row("packed", text, width=13)
    left = []
    if anatomy.routers:
        left.append(f"{anatomy.moe_layers} routers ({', '.join(anatomy.routers)})")
    kinds = {"embeddings": "embeddings", "head": "head", "gates": "gates", "norms and others": "norms"}
    left += [label for kind, label in kinds.items() if anatomy.rest.get(kind)]
    if anatomy.experts:
        left.append(f"{anatomy.linear_modules} linears unless --linears asks for them")
    if anatomy.experts:
        console.row("16 bits", ", ".join(left), width=13)
    for stack in anatomy.unpackable[:3]:
        console.row("", f"{stack}: its last dimension is no multiple of 16", width=13)
    if len(anatomy.unpackable) > 3:
        console.row("", f"and {len(anatomy.unpackable) - 3} more such stacks", width=13)
    if anatomy.outside:
        text = f"all experts: {anatomy.outside} is not a class that transformers dispatches, so moesmith cannot reach it"
        console.row("16 bits", text, width=13)
    if not anatomy.experts and not anatomy.outside:
        console.row("packed", "nothing: there are no experts. For its linears use BitsAndBytesConfig", width=13)


def _show_disk(disk: dict[str, Any], anatomy: Anatomy) -> None:
    parts = []
    if disk["weights"]:
        parts.append(console.size(disk["bytes"]))
        if disk["scheme"]:
            packed = disk["scheme"] + (" + double quant" if disk["double_quant"] else "")
            packed += f", linears {disk['linears']}" if disk["linears"] else ""
            parts.append(f"packed by moesmith ({packed})")
        elif disk["quantization"]:
            parts.append(f"already quantised with {disk['quantization']}")
        elif disk["experts"]:
            parts.append(f"experts {disk['experts']}" if disk["experts"] == "fused" else "one tensor per expert")
        if not disk["scheme"]:
            parts.append(" and ".join(list(disk["dtypes"])[:2]))
        parts.append(f"{disk['files']} file{'s' if disk['files'] > 1 else ''}")
        console.row("on disk", " · ".join(parts), width=13)
    template = "yes" if disk["chat_template"] else "no"
    if disk["chat_template"]:
        template += ", marks assistant tokens" if disk["marks_assistant_tokens"] else ", does not mark assistant tokens"
    tokenizer = "" if disk["tokenizer"] else " · no tokenizer in this folder"
    console.row("chat template", template + tokenizer, width=14)
    if disk["quantization"] and not disk["scheme"] and anatomy.experts:
        with contextlib.suppress(KeyError):
            console.warn(f"moesmith packs 16-bit weights; look for a version not quantised with {disk['quantization']}")


def _show_next(facts: dict[str, Any]) -> None:
    model, disk = facts["model"], facts["disk"]
    if disk["scheme"]:
        console.next_command(f"moesmith chat {model}", f"moesmith sft run.yaml --model {model}")
    elif facts["pack"]["expert_matrices"] and disk["weights"] and not disk["quantization"]:
        console.next_command(f"moesmith quantize {model} --out packed/")


def _range(values: list[int]) -> str:
    return "-".join(str(v) for v in ([values[0], values[-1]] if len(values) > 1 else values))
