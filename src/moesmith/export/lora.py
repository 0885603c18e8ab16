"""An adapter as others want it: stock PEFT, per expert for vLLM, or what llama.cpp's converter reads.

moesmith trains and saves experts' adapters in PEFT's own format: one pair of factors for a whole stack. Stock
PEFT loads that; most servers do not, and some load it wrong without a word. The other two forms name every
update by the tensor of the original checkpoint that it belongs to (`lora_names`), one pair of factors for
each matrix of each expert: gate and up share A, B is split.

Leaves out adding the update to weights (`merge`) and running anybody's converter (`llama_cpp`).
"""

# E experts, r rank, I in features, O out features; e one expert, n rows

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from moesmith.config import write_atomically
from moesmith.errors import UserError
from moesmith.experts.storage import weight_names
from moesmith.models.anatomy import meta_model
from moesmith.models.checkpoint import read_config
from moesmith.models.layers import MoELayer, submodule, text_layers
from moesmith.models.lora_factors import (
    CONFIG,
    PREFIX,
    WEIGHTS,
    A,
    B,
    Factors,
    as_peft,
    padded,
    parameters,
    places,
    rank_and_alpha,
    read_adapter,
)

from .deltas import Deltas
from .lora_names import MERGE, experts_on_disk, is_transposed, on_disk

Form = Literal["peft", "vllm", "gguf"]

NEVER_COPIED = (".safetensors", ".bin", ".pt", ".pth", ".index.json")


@dataclass(frozen=True)
class LoraExported:
    """What was written."""

    tensors: int
    experts: int
    """expert matrices with an update of their own, gate and up counted apart; 0 for stock PEFT's stacks"""
    rank: int
    placements: dict[str, int]
    """placement word -> parameters of the model that the adapter updates"""
    bytes: int
    layout: str
    """how the experts' updates are written: "stacks", "per expert", or "none" without experts"""


# ---------------------------------------------------------------- what others want


@dataclass(frozen=True)
class _Experts:
    """How a runtime wants an architecture's expert updates, where that is not as on disk."""

    stacked: bool = False
    """one pair for all experts, as PEFT saves them: gate_up_proj under `base_layer`, down_proj outside"""
    names: tuple[str, str, str] | None = None
    """gate, up and down where the checkpoint has one stack: {above} is the decoder layer's name in the
    checkpoint, {layer} its number, {e} the expert's; without {e} a stack of all"""

    @property
    def per_expert(self) -> bool:
        return self.names is not None and "{e}" in self.names[0]


# By the model type of the text config, like models/families.py. vLLM wants one pair for each matrix of each
# expert unless the model's class says `is_3d_moe_weight` (vllm/model_executor/models/{gpt_oss,qwen3_vl_moe,
# qwen3_5}.py, read up to 0.33). Its Gemma-4 keeps the experts in a module `moe` of its own
# (models/gemma4.py; OpenPipe/ART#865 served such keys with 0.28). Read, not run.
VLLM: dict[str, _Experts] = {
    "gpt_oss": _Experts(stacked=True),
    "qwen3_vl_moe_text": _Experts(stacked=True),
    "qwen3_5_moe_text": _Experts(stacked=True),
    "gemma4_text": _Experts(
        names=(
            "{above}.moe.experts.{e}.gate_proj",
            "{above}.moe.experts.{e}.up_proj",
            "{above}.moe.experts.{e}.down_proj",
        )
    ),
}
# llama.cpp's converter renames, splits and transposes weights by their names on disk; its stand-in for a
# low-rank product can be split but not transposed as a stack. Where the checkpoint is transposed, the three
# stacks are given by other names that its tensor map knows and that the architecture's own code lets through
# (gguf-py/gguf/tensor_mapping.py; conversion/{gpt_oss,qwen3vl}.py; llama-cpp-python 0.3.36).
_OTHER_NAMES = _Experts(
    names=(
        "transformer.decoder_layer.{layer}.moe.linear",
        "transformer.decoder_layer.{layer}.moe.linear_v",
        "transformer.decoder_layer.{layer}.moe.linear_1",
    )
)
GGUF: dict[str, _Experts] = {"gpt_oss": _OTHER_NAMES, "qwen3_vl_moe_text": _OTHER_NAMES}
# Gate and up take turns in the rows of gate_up_proj; everywhere else they are its halves.
INTERLEAVED = ("gpt_oss", "openai_privacy_filter")


# ---------------------------------------------------------------- the three forms


def export_lora(
    adapter: Path, out: Path, *, form: Form, base: Path | None, base_name: str | None
) -> LoraExported:
    """Write `adapter` into the folder `out` in the given form.

    Args:
        adapter: a folder, or a hub name; a stacked adapter counts as the joined one it is saved as.
        out: an existing folder without weights.
        form: peft for stock PEFT, vllm for `--enable-lora`, gguf for llama.cpp's convert_lora_to_gguf.py.
        base: folder of the model it was trained on, packed or not: its config.json is all that is read. May
            be None for peft, which then checks nothing.
        base_name: what adapter_config.json will call the base (a hub name); None keeps what it says.

    Raises:
        UserError: no such adapter; one that does not fit the base, holds NaN, or is more than B @ A; an
            architecture for which the form is not known.
    """
    if any(out.glob("*.safetensors")):
        raise UserError(f"{out} holds weights already", "give a new folder")
    config, weights = read_adapter(adapter)
    if base is None:
        if form != "peft":
            raise UserError(f"the {form} form needs the model that the adapter belongs to", "give MODEL")
        names, placements = list(parameters(config, weights).values()), {}
    else:
        model = _meta(base)
        deltas = Deltas.read([adapter], model)
        names, placements = list(deltas.places), dict(Counter(deltas.placement.values()))
    if form == "peft":
        rank = max(rank_and_alpha(place, config)[0] for place in places(weights))
        written = Written(dict(weights), rank)
    else:
        written = _written(form, model, deltas.places)
        config = _plain_config(config, written)
    config.base_model_name_or_path = base_name or config.base_model_name_or_path
    config.inference_mode = True
    tensors = _as_trained(written.tensors, weights)
    save_file(tensors, out / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(str(out))
    _tidy_config(out)
    _copy_beside(Path(adapter).expanduser(), out)
    stacks = "stacks" if any(".experts." in name for name in names) else "none"
    return LoraExported(
        tensors=len(tensors),
        experts=written.matrices,
        rank=written.rank,
        placements=placements,
        bytes=(out / WEIGHTS).stat().st_size,
        layout="per expert" if written.matrices else stacks,
    )


@dataclass
class Written:
    """Tensors of an exported adapter under PEFT's names."""

    tensors: dict[str, Tensor]
    rank: int
    """the largest of any place; the only one, with alpha = rank, unless the form is peft"""
    matrices: int = 0
    """expert matrices with a pair of their own"""
    modules: list[str] = field(default_factory=list)
    """names of what was adapted, without the layer"""


def _meta(base: Path) -> PreTrainedModel:
    """The 16-bit model without weights."""
    config = {key: value for key, value in read_config(base).items() if key != "quantization_config"}
    model = meta_model(config)
    assert isinstance(model, PreTrainedModel)
    return model


# ---------------------------------------------------------------- by the checkpoint's names


def _written(form: Form, model: PreTrainedModel, updates: dict[str, Factors]) -> Written:
    """All updates for vLLM or for llama.cpp's converter, of one rank."""
    table = VLLM if form == "vllm" else GGUF
    layers = {layer.experts: layer for layer in text_layers(model)}
    whole = _completed(model, layers.values(), updates)
    special: dict[str, dict[str, Factors]] = {}
    plain: dict[str, Factors] = {}
    for name, part in whole.items():
        layer = layers.get(name.rpartition(".")[0])
        if layer is not None and layer.model_type in table:
            special.setdefault(layer.experts, {})[name.rpartition(".")[2]] = part
        else:
            plain[name] = part
    found = list(on_disk(model, plain))
    rank = max(part.rank for part in [*(d.part for d in found), *whole.values()])
    written = Written({}, rank)

    def put(name: str, part: Factors, stack: bool) -> None:
        even = padded(part, rank, part.shape)
        a, b = (even.a_ERI, even.b_EOR) if stack else (even.a_ERI[0], even.b_EOR[0])
        written.tensors[PREFIX + name + A] = a.contiguous().clone()
        written.tensors[PREFIX + name + B] = b.contiguous().clone()
        written.modules.append(name)

    for update in found:
        if update.stack and (form == "vllm" or update.transposed):
            raise UserError(
                f"how {'vLLM' if form == 'vllm' else 'the converter'} wants the update of {update.name}, "
                f"one stack in the checkpoints of {model.config.get_text_config().model_type}, is not known",
                MERGE,
            )
        if form == "gguf" and update.transposed:
            raise UserError(f"{update.name} is transposed in the checkpoint: not a LoRA for llama.cpp", MERGE)
        written.matrices += update.parameter.rpartition(".")[0] in layers and not update.stack
        put(update.name, update.part, update.stack)
    names = experts_on_disk(model, special)
    for experts_name, parts in special.items():
        layer, row = layers[experts_name], table[layers[experts_name].model_type]
        if row.stacked:
            for suffix, leaf in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
                a, b = as_peft(padded(parts[leaf], rank, parts[leaf].shape))
                written.tensors[f"{PREFIX}{names[experts_name]}{suffix}{A}"] = a
                written.tensors[f"{PREFIX}{names[experts_name]}{suffix}{B}"] = b
            written.modules.append(names[experts_name])
            continue
        above = names[experts_name].rpartition(".")[0].removesuffix(".mlp")
        for name, part in _named(row, layer, parts, above):
            put(name, part, stack=not row.per_expert)
            written.matrices += row.per_expert
    return written


def _named(
    row: _Experts, layer: MoELayer, parts: dict[str, Factors], above: str
) -> Iterator[tuple[str, Factors]]:
    """Gate, up and down of one layer under a row's own names."""
    assert row.names is not None
    gate, up = _gate_and_up(parts["gate_up_proj"], layer.model_type in INTERLEAVED)
    number = next(part for part in reversed(layer.name.split(".")) if part.isdigit())
    for name, part in zip(row.names, (gate, up, parts["down_proj"]), strict=True):
        if not row.per_expert:
            yield name.format(above=above, layer=number), part
            continue
        for e in range(part.shape[0]):
            one = Factors(part.a_ERI[e : e + 1], part.b_EOR[e : e + 1])
            yield name.format(above=above, layer=number, e=e), one


def _gate_and_up(part: Factors, interleaved: bool) -> tuple[Factors, Factors]:
    """The two halves of gate_up_proj's update: one A, B split by its rows."""
    half = part.b_EOR.shape[1] // 2
    if interleaved:
        gate, up = part.b_EOR[:, ::2], part.b_EOR[:, 1::2]
    else:
        gate, up = part.b_EOR[:, :half], part.b_EOR[:, half:]
    return Factors(part.a_ERI, gate), Factors(part.a_ERI, up)


def _completed(
    model: nn.Module, layers: Iterable[MoELayer], updates: dict[str, Factors]
) -> dict[str, Factors]:
    """Zeros for a stack whose layer has an update on another: servers want all of an expert, or nothing."""
    whole = dict(updates)
    for layer in layers:
        experts = submodule(model, layer.experts)
        names = [f"{layer.experts}.{leaf}" for leaf in weight_names(experts)]
        there = [updates[name] for name in names if name in updates]
        for name in names if there else ():
            if name not in whole:
                parameter = getattr(experts, name.rpartition(".")[2])
                E, x, y = parameter.shape
                shape = (E, x, y) if is_transposed(experts, parameter) else (E, y, x)
                whole[name] = padded(None, there[0].rank, shape)
    return whole


# ---------------------------------------------------------------- the folder


def _plain_config(trained: LoraConfig, written: Written) -> LoraConfig:
    """A config that says what the exported tensors are: one rank, scaling 1, modules by their last name."""
    leaves = dict.fromkeys(name.rpartition(".")[2] for name in written.modules)
    return LoraConfig(
        r=written.rank,
        lora_alpha=written.rank,
        target_modules=sorted(leaves),
        task_type=trained.task_type,
        base_model_name_or_path=trained.base_model_name_or_path,
    )


def _as_trained(tensors: dict[str, Tensor], trained: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All in the adapter's own dtype where that loses no bit (a scaling of 2 loses none), else in float32."""
    dtype = next(iter(trained.values())).dtype
    lossless = all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in tensors.values())
    one = dtype if lossless else torch.float32
    return {name: tensor.to(one).contiguous() for name, tensor in tensors.items()}


def _tidy_config(folder: Path) -> None:
    """Sets in adapter_config.json in one order, so that the same adapter gives the same file."""
    path = folder / CONFIG
    values = json.loads(path.read_text(encoding="utf-8"))
    for name in ("target_modules", "target_parameters"):
        if isinstance(values.get(name), list):
            values[name] = sorted(values[name])
    write_atomically(path, json.dumps(values, indent=2, sort_keys=True) + "\n")


def _copy_beside(adapter: Path, out: Path) -> None:
    """The tokenizer, the template and the record that lie beside the adapter."""
    if not adapter.is_dir():
        return
    for file in sorted(adapter.iterdir()):
        taken = file.name in (CONFIG, WEIGHTS, "README.md") or file.name.endswith(NEVER_COPIED)
        if file.is_file() and not taken and not file.name.startswith("."):
            shutil.copyfile(file, out / file.name)
