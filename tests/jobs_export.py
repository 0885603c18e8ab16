"""A random adapter on a model folder, for the tests of exporting."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path


def adapter_on(
    base: Path, folder: Path, scale: float = 0.1, placements: Sequence[str] = ("experts", "attention")
) -> Path:
    """An adapter whose B is not zero, with the record that training leaves beside it."""
    import torch
    from peft import LoraConfig, get_peft_model

    from moesmith.models.checkpoint import base_record, model_class, read_config
    from moesmith.models.layers import adapter_targets

    model = model_class(read_config(base)).from_pretrained(base, dtype=torch.bfloat16)
    record = base_record(model, base)
    modules, parameters = adapter_targets(model, placements)
    torch.manual_seed(1)
    made = get_peft_model(
        model, LoraConfig(r=3, lora_alpha=5, target_modules=modules, target_parameters=parameters)
    )
    for name, tensor in made.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=scale)
    made.save_pretrained(folder)
    (folder / "moesmith.json").write_text(json.dumps({"base": record}))
    return folder
