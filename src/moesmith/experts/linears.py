"""Which `nn.Linear` stay in 16 bits when `linears=` hands the others to bitsandbytes, and for what reason."""

from __future__ import annotations

import inspect
import re

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import get_keys_to_not_convert

ROUTER = "decides routing"
HEAD = "head or tied to the embeddings"
KEPT_BY_MODEL = "the model wants it in fp32"
READ = "its module reads the weight itself"
CONVERTED = "the checkpoint stores it joined or split"
MISNAMED = "bitsandbytes would misread its name"


def kept_linears(model: nn.Module) -> dict[str, str]:
    """Name -> reason of every `nn.Linear` that must not be quantised. Works on the meta device."""
    heads = get_keys_to_not_convert(model)
    in_fp32 = list(model._keep_in_fp32_modules or [])
    converted = _converted(model)
    sources: dict[type, str] = {}  # reading one parses its whole file
    kept = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        parent, _, leaf = name.rpartition(".")
        holder = type(model.get_submodule(parent))
        if holder not in sources:
            sources[holder] = _source(holder)
        if _routes(name, module):
            kept[name] = ROUTER
        elif leaf.endswith("_head") or any(name == head or name.startswith(head + ".") for head in heads):
            kept[name] = HEAD
        elif any(part in in_fp32 for part in name.split(".")):
            kept[name] = KEPT_BY_MODEL
        elif "weight" in leaf:
            kept[name] = MISNAMED
        elif re.search(rf"self\.{leaf}\.weight\b", sources[holder]):
            kept[name] = READ
        elif converted is not None and converted.search(name + ".weight"):
            kept[name] = CONVERTED
    return kept


def _routes(name: str, module: nn.Linear) -> bool:
    """Inside a router, or a gate in front of a shared expert."""
    parts = name.split(".")
    in_router = any(part in ("router", "gate") or part.endswith("_router") for part in parts)
    return in_router or module.out_features == 1 or parts[-1].endswith("expert_gate")


def _converted(model: nn.Module) -> re.Pattern | None:
    """Matches weights that a converter of the checkpoint makes out of others."""
    targets = {
        target.strip(".")
        for conversion in get_model_conversion_mapping(model, add_legacy=False)
        if isinstance(conversion, WeightConverter)
        for target in conversion.target_patterns
    }
    return re.compile(rf"(^|\.)({'|'.join(map(re.escape, sorted(targets)))})(\.|$)") if targets else None


def _source(cls: type) -> str:
    try:
        return inspect.getsource(cls)
    except (OSError, TypeError):  # a class made at run time
        return ""
