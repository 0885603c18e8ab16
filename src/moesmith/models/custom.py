"""Model classes of our own: known to transformers' Auto classes by name, their code saved beside the weights.

A folder of such a model loads without moesmith too, by `trust_remote_code=True`: config.json names the
classes (`auto_map`) and the folder holds the files they are in. `save_pretrained` writes both by itself;
`write_code` does it for folders that are written in other ways. moesmith never runs code that comes with a
model: it uses its own.
"""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from moesmith.config import write_atomically
from moesmith.models.headers import read_json

HERE = Path(__file__).parent


class _Custom(NamedTuple):
    room: str
    """folder and last part of the file names: gemma_moe/configuration_gemma_moe.py, modeling_gemma_moe.py"""
    config: str
    model: str


CUSTOM = {
    "gemma2_moe": _Custom("gemma_moe", "Gemma2MoeConfig", "Gemma2MoeForCausalLM"),
    "gemma3_moe_text": _Custom("gemma_moe", "Gemma3MoeTextConfig", "Gemma3MoeForCausalLM"),
}


def register_classes() -> None:
    """Make AutoConfig and AutoModelForCausalLM know these classes; a second call changes nothing."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    for model_type, custom in CUSTOM.items():
        if model_type not in CONFIG_MAPPING:
            package = f"{__package__}.{custom.room}"
            config = getattr(import_module(f"{package}.configuration_{custom.room}"), custom.config)
            model = getattr(import_module(f"{package}.modeling_{custom.room}"), custom.model)
            AutoConfig.register(model_type, config)
            AutoModelForCausalLM.register(config, model)


def unregister_classes() -> None:
    """Make the Auto classes forget them. Live models stay as they are."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    for model_type in CUSTOM:
        config = CONFIG_MAPPING._extra_content.pop(model_type, None)
        MODEL_FOR_CAUSAL_LM_MAPPING._extra_content.pop(config, None)


def write_code(folder: Path) -> list[str]:
    """Put the code of the class that config.json names beside the weights, and its names into config.json.

    Returns the names of the copied files; [] for a class of transformers, which needs none.
    """
    path = folder / "config.json"
    config = read_json(path)
    custom = CUSTOM.get(config.get("model_type", ""))
    if custom is None:
        return []
    configuration, modeling = f"configuration_{custom.room}", f"modeling_{custom.room}"
    config["auto_map"] = {
        "AutoConfig": f"{configuration}.{custom.config}",
        "AutoModelForCausalLM": f"{modeling}.{custom.model}",
    }
    write_atomically(path, json.dumps(config, indent=2) + "\n")
    files = [f"{configuration}.py", f"{modeling}.py"]
    for file in files:
        shutil.copyfile(HERE / custom.room / file, folder / file)
    return files
