"""Tiny random dense models of the families that experts are made of, and texts for them.

Hidden 48, FFN width 80, 4 layers, windows of 8 where a family has them. Norms, scales and biases are
disturbed, so that a forgotten one shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, PreTrainedModel

from moesmith.build.capture import Text
from moesmith.models.checkpoint import model_class, read_config

VOCAB, WINDOW = 97, 8
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 4,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "initializer_range": 0.2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GEMMA = {**SHAPE, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
ALTERNATING = {"layer_types": ["sliding_attention", "full_attention"] * 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SHAPE,
    "mistral": {**SHAPE, "sliding_window": WINDOW},
    "qwen2": SHAPE,
    "qwen3": {**SHAPE, "tie_word_embeddings": True},
    "olmo2": SHAPE,
    "gemma2": {**GEMMA, **ALTERNATING, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "gemma3_text": {**GEMMA, **ALTERNATING},
    "gemma3": {  # with an image tower
        "text_config": {**GEMMA, **ALTERNATING},
        "vision_config": {
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14,
        },
        "mm_tokens_per_image": 4, "image_token_index": 95, "boi_token_index": 94, "eoi_token_index": 93,
    },
}  # fmt: skip
ARCHITECTURES = {"gemma3_text": "Gemma3ForCausalLM", "gemma3": "Gemma3ForConditionalGeneration"}


def save(family: str, folder: Path, seed: int = 0, **fields: Any) -> Path:
    """Write a family's model, fp32; `fields` change its config."""
    architecture = ARCHITECTURES.get(family, f"{family.capitalize()}ForCausalLM")
    config = CONFIG_MAPPING[family](**FAMILIES[family] | fields, architectures=[architecture])
    torch.manual_seed(seed)
    model = model_class(config.to_dict())(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.save_pretrained(folder)
    return folder


def load(folder: Path, **more: Any) -> PreTrainedModel:
    """The whole model in memory."""
    return model_class(read_config(folder)).from_pretrained(folder, **more).eval()


def texts(lengths: tuple[int, ...] = (5, 40, 1, 23, 0, 9, 40)) -> list[Text]:
    """Random texts, most of them longer than the window."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 90, (length,), generator=generator).tolist() for length in lengths]
    return [Text(ids, n % 2, n % 3 > 0, f"t{n}", "ab"[n % 2]) for n, ids in enumerate(ids)]
