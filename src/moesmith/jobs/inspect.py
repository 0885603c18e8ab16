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
    from moesmith.models.layers import MoELayer

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

    from moesmith.models.checkpoint import model_class

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        known = CONFIG_MAPPING[config["model_type"]].from_dict(config)
        with torch.device("meta"):
            return model_class(config)._from_config(known, dtype=torch.bfloat16)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"transformers {transformers.__version__} cannot build this {config['model_type']} config: "
            + str(error).split("\n")[0][:200],
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
    from moesmith.models.layers import moe_layers, submodule

    config = model.config.get_text_config()
    anatomy = Anatomy(config.model_type, getattr(config, "num_hidden_layers", 0))
    layers = moe_layers(model)
    top_k = {layer.experts: layer.top_k for layer in layers}
    anatomy.moe_layers = len({_block(layer.name) for layer in layers})
    anatomy.num_experts = sorted({layer.num_experts for layer in layers})
    anatomy.top_k = sorted({layer.top_k for layer in layers})
    anatomy.beside = _beside(model, layers)

    taken: set[int] = set()
    for name, module in named_experts(model):
        _add_experts(anatomy, name, module, top_k[name], blocksize, taken)
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
    _add(anatomy, "norms", model.parameters(), taken)
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


def _beside(model: nn.Module, layers: list[MoELayer]) -> list[str]:
    """What every token runs through beside the routed experts, in a layer that has them."""
    from moesmith.models.layers import adapter_targets

    found = []
    with_experts = {_block(layer.name) for layer in layers}
    for placement, words in (("shared_experts", "shared expert"), ("dense_mlp", "dense MLP")):
        with contextlib.suppress(UserError):  # the model has none
            modules, parameters = adapter_targets(model, [placement])
            if any(_block(name) in with_experts for name in modules + parameters):
                found.append(words)
    return found


def _undecorated(model: nn.Module) -> str | None:
    """The class of experts that transformers does not dispatch, so that moesmith cannot reach them, if there is one."""
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
    from torch import nn

    linears = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    return [p for module in _foreign_experts(model) for p in module.parameters() if id(p) not in linears]


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

WIDTH = 17  # of the labels


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
    towers = f", {console.count(anatomy.towers)} of them in vision or audio towers" if anatomy.towers else ""
    text = f"{console.count(anatomy.total)} total{towers}{active} (embeddings counted)"
    console.row("parameters", text, WIDTH)
    _show_bytes(facts["bytes"], anatomy)
    _show_packing(anatomy)
    _show_disk(facts["disk"], anatomy)
    _show_next(facts)


def _show_bytes(schemes: dict[str, Any], anatomy: Anatomy) -> None:
    """Experts packed, linears left alone; the last line with linears packed too."""

    def line(label: str, key: str, skip_first: bool = False) -> list[str]:
        cells = [console.size(schemes[title][key]) for title in titles]
        return [label, *([""] + cells[1:] if skip_first else cells)]

    if anatomy.experts:
        titles = [title for title, *_ in COLUMNS]
        rows = [line("experts", "experts"), line("linears", "linears"), line("the rest", "rest"), line("total", "total")]
        rows.append(line("  linears too", "total_with_linears_packed", skip_first=True))
    else:
        titles = ["16-bit", "nf4", "int8"]
        rows = [line("linears", "linears_packed"), line("the rest", "rest"), line("total", "total_with_linears_packed")]
    console.say()
    console.table(["", *titles], rows, label_width=WIDTH - 2)
    console.say()


def _show_packing(anatomy: Anatomy) -> None:
    if anatomy.matrices:
        sizes = ", ".join(str(block) for block in sorted(anatomy.blocksizes, reverse=True))
        console.row("packed", f"{anatomy.matrices:,} expert matrices, one scale per {sizes} weights", WIDTH)
    left = []
    if anatomy.routers:
        left.append(f"{anatomy.moe_layers} routers ({', '.join(anatomy.routers)})")
    kinds = {"embeddings": "embeddings", "head": "head", "gates": "gates and projections", "norms": "norms"}
    left += [label for kind, label in kinds.items() if anatomy.rest.get(kind)]
    if anatomy.experts:
        left.append(f"{anatomy.linear_modules} linears unless --linears nf4 or int8 asks for them")
        console.row("left in 16 bits", ", ".join(left), WIDTH)
    for stack in anatomy.unpackable[:3]:
        console.row("", f"{stack}: the last dimension is no multiple of 16", WIDTH)
    if len(anatomy.unpackable) > 3:
        console.row("", f"and {len(anatomy.unpackable) - 3} more such stacks", WIDTH)
    if anatomy.outside:
        text = f"all experts: transformers does not dispatch {anatomy.outside}, so moesmith cannot reach them"
        console.row("left in 16 bits", text, WIDTH)
    elif not anatomy.experts:
        text = "nothing, there are no experts; for the linears use transformers' BitsAndBytesConfig"
        console.row("packed", text, WIDTH)


def _show_disk(disk: dict[str, Any], anatomy: Anatomy) -> None:
    if disk["weights"]:
        parts = [console.size(disk["bytes"]), f"{disk['files']} file{'s' if disk['files'] > 1 else ''}"]
        if disk["scheme"]:
            packed = disk["scheme"] + (" + double quant" if disk["double_quant"] else "")
            packed += f", linears {disk['linears']}" if disk["linears"] else ""
            parts.append(f"packed by moesmith ({packed})")
        else:
            parts.append(" and ".join(list(disk["dtypes"])[:2]))
            if disk["quantization"]:
                parts.append(f"already quantised with {disk['quantization']}")
            elif disk["experts"]:
                parts.append({"fused": "experts fused", "per expert": "one tensor per expert"}[disk["experts"]])
        console.row("on disk", " · ".join(parts), WIDTH)
    template = "none: chat sends the bare prompt, sft wants prompt and completion columns"
    if disk["chat_template"]:
        marks = "with" if disk["marks_assistant_tokens"] else "no"
        template = f"yes, {marks} {{% generation %}} marks"
    console.row("chat template", template, WIDTH)
    if not disk["tokenizer"]:
        console.row("tokenizer", "none in this folder", WIDTH)
    if disk["quantization"] and not disk["scheme"] and anatomy.experts:
        console.warn(f"moesmith packs 16-bit weights; look for a version not quantised with {disk['quantization']}")


def _show_next(facts: dict[str, Any]) -> None:
    model, disk = facts["model"], facts["disk"]
    if disk["scheme"]:
        console.next_command(f"moesmith chat {model}", f"moesmith sft run.yaml --model {model}")
    elif facts["pack"]["expert_matrices"] and disk["weights"] and not disk["quantization"]:
        console.next_command(f"moesmith quantize {model} --out packed/")


def _range(values: list[int]) -> str:
    return "-".join(str(v) for v in ([values[0], values[-1]] if len(values) > 1 else values))
