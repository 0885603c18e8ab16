"""Tiny dense models saved to disk, one for every dense type that fits a MoE class, and their MoE of copies.

Norms and biases are disturbed, positions and windows are unusual, so that a forgotten one shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from moesmith.build.assemble import SharedSource, assemble, tensor_bytes, write_model
from moesmith.build.native import Kind, target_config
from moesmith.build.sources import Source
from moesmith.models.ranges import Made, Piece

VOCAB, HIDDEN, WIDTH, LAYERS = 97, 48, 80, 3
TOKENS = torch.randint(0, VOCAB, (2, 24), generator=torch.Generator().manual_seed(1))

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
    "initializer_range": 0.2, "rms_norm_eps": 1e-3, "bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
LINEAR = {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 3.0}}

# name -> (dense model_type, what differs from SHAPE, targets that it fits)
DENSE: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "llama": ("llama", {"head_dim": 16, **LINEAR}, ("mixtral", "qwen2_moe")),
    "llama tied": ("llama", {"tie_word_embeddings": True}, ("mixtral", "qwen2_moe")),
    "mistral": ("mistral", {"sliding_window": 8}, ("mixtral", "qwen2_moe")),
    "mistral full": ("mistral", {"sliding_window": None, "head_dim": 16}, ("mixtral", "qwen2_moe")),
    "ministral": ("ministral", {"head_dim": 12, "sliding_window": 8, "layer_types": MIXED}, ("qwen2_moe",)),
    "ministral sliding": (
        "ministral",
        {"head_dim": 12, "sliding_window": 8, "layer_types": MIXED[:1] * 3},
        ("mixtral", "qwen2_moe"),
    ),
    "ministral window unused": (
        "ministral",
        {"head_dim": 12, "sliding_window": 8, "layer_types": ["full_attention"] * 3},
        ("mixtral", "qwen2_moe"),
    ),
    "qwen2": ("qwen2", {}, ("qwen2_moe",)),
    "qwen2 sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1,
         "tie_word_embeddings": True, **LINEAR},
        ("qwen2_moe",),
    ),
    "seed_oss": ("seed_oss", {"head_dim": 16}, ("qwen2_moe",)),
    "qwen3": ("qwen3", {"head_dim": 16, "tie_word_embeddings": True, **LINEAR}, ("qwen3_moe",)),
    "qwen3 window unused": (
        "qwen3",
        {"head_dim": 12, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 28,
         "attention_bias": True},
        ("qwen3_moe",),
    ),
    "qwen3_5": (
        "qwen3_5_text",
        {"head_dim": 16, "layer_types": ["linear_attention", "full_attention", "linear_attention"],
         "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
         "linear_num_value_heads": 4, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0,
         "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
        ("qwen3_5_moe_text",),
    ),
    "olmo2": ("olmo2", {**LINEAR}, ("flex_olmo",)),
    "granite": (
        "granite",
        {"embedding_multiplier": 3.0, "logits_scaling": 2.0, "residual_multiplier": 0.7,
         "attention_multiplier": 0.3, "tie_word_embeddings": True},
        ("granitemoe",),
    ),
    "ernie4_5": ("ernie4_5", {"head_dim": 12, "tie_word_embeddings": False}, ("ernie4_5_moe",)),
    "cohere2": (
        "cohere2",
        {"sliding_window": 8, "layer_types": MIXED, "logit_scale": 0.3, "layer_norm_eps": 1e-3},
        ("cohere2_moe",),
    ),
    "gemma2": (
        "gemma2",
        {"head_dim": 16, "sliding_window": 8, "layer_types": MIXED, "query_pre_attn_scalar": 24,
         "attn_logit_softcapping": 3.0, "final_logit_softcapping": 5.0},
        ("gemma2_moe",),
    ),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 16, "sliding_window": 8, "layer_types": MIXED, "query_pre_attn_scalar": 24,
         "rope_parameters": {"full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 2.0},
         "sliding_attention": {"rope_type": "default", "rope_theta": 300.0}}},
        ("gemma3_moe_text",),
    ),
}  # fmt: skip
PAIRS = [(name, target) for name, (_, _, fitting) in DENSE.items() for target in fitting]


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """The dense model in fp32."""
    model_type, changes, _ = DENSE[name]
    config = CONFIG_MAPPING[model_type](**{**SHAPE, **changes})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.empty_like(parameter).uniform_(-0.3, 0.3))
    return model


def save(name: str, folder: Path, seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Path:
    build(name, seed).to(dtype).save_pretrained(folder, **kwargs)
    return folder


class Copies:
    """Expert e is source e, copied; what is stored in another dtype is converted when its turn comes."""

    def __init__(self, sources: Sequence[Source], dtype: torch.dtype):
        self.sources = sources
        self.dtype = dtype
        self.num_experts = len(sources)
        self.width = sources[0].ffn_width

    def part(self, layer: int, expert: int, kind: Kind) -> Piece | Made:
        source = self.sources[expert]
        name = source.ffn(layer, kind)
        if source.dtype == self.dtype:
            return source.piece(name)
        nbytes = source.tensors[name].numel * self.dtype.itemsize
        return Made(nbytes, lambda: tensor_bytes(source.read(name), self.dtype))

    def facts(self) -> dict[str, Any]:
        return {}


def routers(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, HIDDEN, generator=generator) for _ in range(LAYERS)]


def build_moe(
    base: Source,
    sources: Sequence[Source],
    target: str,
    out: Path,
    top_k: int = 2,
    shared: SharedSource | None = None,
    dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> list[str]:
    """A MoE whose experts are the sources, in `out`."""
    width = shared.source.ffn_width if shared else None
    config = target_config(base.config, target, len(sources), top_k, base.ffn_width, width)
    config.dtype = dtype or config.dtype
    tensors = assemble(base, config, Copies(sources, config.dtype), routers(len(sources)), shared)
    out.mkdir()
    return write_model(base, out, config, tensors, **kwargs)
