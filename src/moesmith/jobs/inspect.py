"""Say what a checkpoint is, what it needs in each scheme, and what packing would leave out.

Works from config.json and the safetensors headers alone: the model is built without memory (torch's meta
device) and no weight is read, unless they are to be verified. Takes a folder, a folder with only a
config.json, or a hub name.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.config import JobConfig
from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.models.anatomy import Anatomy
    from moesmith.models.checkpoint import Checkpoint
    from moesmith.models.checksums import Verified

POSITIONAL = ("model",)
JSON = True
SEAMS = False
EXAMPLE = "moesmith inspect Qwen/Qwen3-30B-A3B"


class Config(JobConfig):
    model: str
    """Model folder, a folder holding only config.json, or a hub name."""
    blocksize: int = 64
    """Weights per block scale, as `quantize` would use it."""
    verify: bool = False
    """Read every weight and compare with the checksums that `quantize` wrote beside them."""


def check(cfg: Config) -> None:
    """Refuse a folder that is not there, or a broken download, before transformers is imported."""
    from moesmith.models.checkpoint import Checkpoint, local_folder

    if local_folder(cfg.model) is not None:
        Checkpoint.open(cfg.model, weights=False)


def run(cfg: Config) -> None:
    from moesmith.models.anatomy import dissect, meta_model
    from moesmith.models.checkpoint import Checkpoint, check_architecture

    checkpoint = Checkpoint.open(cfg.model, weights=False)
    check_architecture(checkpoint.config)
    checked = verified(checkpoint) if cfg.verify else None
    anatomy = dissect(meta_model(checkpoint.config), cfg.blocksize)
    facts = {"model": cfg.model, **anatomy.facts(), "disk": disk_facts(checkpoint)}
    if checked is not None:
        facts["verified"] = asdict(checked)
    console.emit(facts)
    show(facts, anatomy)
    check_disk(checkpoint, anatomy)


# ---------------------------------------------------------------- the files


def disk_facts(checkpoint: Checkpoint) -> dict[str, Any]:
    """How the weights lie on disk, and what comes with them."""
    names = checkpoint.tensors
    per_expert = sum(1 for name in names if re.search(r"\bexperts\.\d+\.", name))
    fused = sum(
        1 for name, t in names.items() if "experts" in name and len(t.shape) == 3 and "absmax" not in name
    )
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


def verified(checkpoint: Checkpoint) -> Verified:
    """Read the weights and compare with checksums.json. Raises UserError naming damaged files and tensors."""
    from moesmith.models.checksums import verify

    if checkpoint.folder is None:
        raise UserError("--verify reads files: give a folder on this machine", "moesmith quantize writes one")
    with console.bar("verifying", total=checkpoint.nbytes) as bar:
        return verify(checkpoint.folder, bar.advance)


# ---------------------------------------------------------------- the words

WIDTH = 17  # of the labels
REST = (
    "routers",
    "embeddings",
    "head",
    "gates",
    "tied and last linears",
    "linears that cannot be packed",
    "norms",
    "other tensors",
)


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
    _show_disk(facts, anatomy)
    _show_next(facts)


def _show_bytes(schemes: dict[str, Any], anatomy: Anatomy) -> None:
    """Experts packed, linears left alone; the last line with linears packed too."""

    def line(label: str, key: str, skip_first: bool = False) -> list[str]:
        cells = [console.size(schemes[title][key]) for title in titles]
        return [label, *([""] + cells[1:] if skip_first else cells)]

    if anatomy.experts:
        titles = list(schemes)
        rows = [
            line("experts", "experts"),
            line("linears", "linears"),
            line("the rest", "rest"),
            line("total", "total"),
        ]
        rows.append(line("  linears too", "total_with_linears_packed", skip_first=True))
    else:
        titles = ["16-bit", "nf4", "int8"]
        rows = [
            line("linears", "linears_packed"),
            line("the rest", "rest"),
            line("total", "total_with_linears_packed"),
        ]
        if anatomy.rest["experts"]:
            rows.insert(0, ["experts", *[console.size(2 * anatomy.rest["experts"])] * len(titles)])
            rows[2] = [
                "the rest",
                *[console.size(2 * (sum(anatomy.rest.values()) - anatomy.rest["experts"]))] * len(titles),
            ]
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
    left += [kind for kind in REST[1:] if anatomy.rest.get(kind)]
    if anatomy.experts:
        left.append(f"{anatomy.linear_modules} linears unless --linears nf4 or int8 asks for them")
        console.row("left in 16 bits", ", ".join(left), WIDTH)
    for stack in anatomy.unpackable[:3]:
        console.row("", f"{stack}: the last dimension is no multiple of 16", WIDTH)
    if len(anatomy.unpackable) > 3:
        console.row("", f"and {len(anatomy.unpackable) - 3} more such stacks", WIDTH)
    if anatomy.outside:
        text = f"all experts: transformers does not dispatch {anatomy.outside}, so moesmith cannot reach them"
        if not anatomy.rest["experts"]:
            text += "; they are linears, which transformers' BitsAndBytesConfig packs"
        console.row("left in 16 bits", text, WIDTH)
    elif not anatomy.experts:
        text = "nothing, there are no experts; for the linears use transformers' BitsAndBytesConfig"
        console.row("packed", text, WIDTH)


def _show_disk(facts: dict[str, Any], anatomy: Anatomy) -> None:
    disk = facts["disk"]
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
                parts.append(
                    {"fused": "experts fused", "per expert": "one tensor per expert"}[disk["experts"]]
                )
        console.row("on disk", " · ".join(parts), WIDTH)
    if checked := facts.get("verified"):
        console.row("verified", f"{checked['tensors']:,} tensors, every byte as it was written", WIDTH)
    template = "none: chat sends the bare prompt, sft wants prompt and completion columns"
    if disk["chat_template"]:
        marks = "with" if disk["marks_assistant_tokens"] else "no"
        template = f"yes, {marks} {{% generation %}} marks"
    console.row("chat template", template, WIDTH)
    if not disk["tokenizer"]:
        console.row("tokenizer", "none in this folder", WIDTH)
    if disk["quantization"] and not disk["scheme"] and anatomy.experts:
        console.warn(
            f"moesmith packs 16-bit weights; look for a version not quantised with {disk['quantization']}"
        )


def _show_next(facts: dict[str, Any]) -> None:
    model, disk = facts["model"], facts["disk"]
    if disk["scheme"]:
        console.next_command(f"moesmith chat {model}", f"moesmith sft run.yaml --model {model}")
    elif facts["pack"]["expert_matrices"] and disk["weights"] and not disk["quantization"]:
        console.next_command(f"moesmith quantize {model} --out packed/")


def _range(values: list[int]) -> str:
    return "-".join(str(v) for v in ([values[0], values[-1]] if len(values) > 1 else values))
