"""Tiny dense models of the architectures that can be split, and calibration tokens for them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

SHAPE = {
    "vocab_size": 97, "hidden_size": 48, "intermediate_size": 128, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
    "initializer_range": 0.2, "rms_norm_eps": 1e-3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}  # fmt: skip

CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "mistral": MistralConfig(**SHAPE, sliding_window=8),
    "qwen3": Qwen3Config(**SHAPE),
}


@pytest.fixture(params=CONFIGS)
def dense(request: pytest.FixtureRequest) -> PreTrainedModel:
    return build(CONFIGS[request.param])


@pytest.fixture
def llama() -> PreTrainedModel:
    return build(CONFIGS["llama"])


def build(config: PreTrainedConfig) -> PreTrainedModel:
    """Random weights, fp32; norms are disturbed so that a forgotten one shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


@pytest.fixture
def chunks() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 97, (4, 24), generator=generator) for _ in range(6)]
