"""Tiny random models of every decorated experts class in the installed transformers, and of our own.

`FAMILIES` has one name per class decorated with `@use_experts_implementation`, found by reading the source,
so a class that a new transformers adds appears here by itself; and the model types of `models/custom.py`.
`build(family)` makes the model from config: one rule shrinks known field names of a default config, and
`OVERRIDES` holds what the rule gets wrong.

Every model has hidden 64, experts of width 128, 8 experts, top-2 and 3-4 layers. Every expert dimension is a
multiple of 64 and no expert matrix is square, so a swapped layout shows. Parameters that start at 0 or 1 are
disturbed and scaling factors of 1.0 become 1.5, so a forgotten one shows too.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from moesmith.models import custom

HIDDEN, EXPERT, NUM_EXPERTS, TOP_K, LAYERS, VOCAB = 64, 128, 8, 2, 3, 128

# Field name -> value, for whatever config class has the field.
SHRINK: dict[str, Any] = {
    "vocab_size": VOCAB, "unpadded_vocab_size": VOCAB, "vocab_size_per_layer_input": VOCAB,
    "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "initializer_range": 0.125,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 16,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "sliding_window": 8, "sliding_window_size": 8,
    # experts and router
    "moe_intermediate_size": EXPERT,
    "num_experts": NUM_EXPERTS, "num_local_experts": NUM_EXPERTS, "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": TOP_K, "moe_topk": TOP_K, "moe_k": TOP_K, "top_k_experts": TOP_K,
    "n_group": 2, "topk_group": 1,
    "routed_scaling_factor": 1.5, "moe_routed_scaling_factor": 1.5, "router_scaling_factor": 1.5,
    "route_scale": 1.5,
    "embedding_multiplier": 1.5, "logits_scaling": 1.5, "residual_multiplier": 0.7,
    "attention_multiplier": 0.3,
    # beside the experts
    "intermediate_size": 192, "dense_intermediate_size": 192, "prefix_dense_intermediate_size": 192,
    "first_k_dense_replace": 1, "num_dense_layers": 1, "moe_layer_start_index": 1,
    "num_shared_experts": 1, "n_shared_experts": 1, "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 64, "shared_experts_intermediate_size": 64,
    "shared_intermediate_size": 64, "moe_shared_expert_intermediate_size": 64,
    "num_mtp_layers": 0, "num_nextn_predict_layers": 0,
    # multi-head latent attention and its indexer
    "q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "index_head_dim": 16, "index_n_heads": 2, "index_topk": 8,
    # linear attention and state-space layers
    "linear_key_head_dim": 16, "linear_value_head_dim": 16, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_head_dim": 16, "linear_num_heads": 4,
    "mamba_n_heads": 4, "mamba_d_state": 8, "mamba_num_heads": 4, "mamba_head_dim": 32, "ssm_state_size": 8,
    "mamba_dt_rank": 4, "use_mamba_kernels": False,
    # special tokens live above the ids that `inputs` draws
    "image_token_id": 120, "image_token_index": 120, "video_token_id": 121, "video_token_index": 121,
    "audio_token_id": 122,
}  # fmt: skip

# The same for towers that are built but never run: as small as they go.
TOWER: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 1, "depth": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
    "num_heads": 2, "head_dim": 16, "intermediate_size": 64, "out_hidden_size": HIDDEN,
    "text_hidden_size": HIDDEN, "patch_size": 4, "image_size": 16, "num_position_embeddings": 16,
    "output_channels": 32,
    "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64, "d_model": 32,
    "vocab_size": VOCAB, "max_position_embeddings": 64,
}  # fmt: skip

# What the rule gets wrong: family -> {dotted config path: value}. `class` and `model_type` choose the model.
OVERRIDES: dict[str, dict[str, Any]] = {
    "axk1": {"num_key_value_heads": 4},
    "axk2": {"num_key_value_heads": 4},
    "bailing_hybrid": {"num_key_value_heads": 4,
                       "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "cohere2_moe": {"logit_scale": 1.5},
    "deepseek_ocr2": {"vision_config.sam_config.downsample_channels": [32, 32]},
    "deepseek_v2": {"num_key_value_heads": 4},
    "deepseek_v3": {"num_key_value_heads": 4},
    "deepseek_v32": {"num_key_value_heads": 4},
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"], "o_groups": 2, "o_lora_rank": 32,
                    "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
                    "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention",
                                    "heavily_compressed_attention"]},
    "diffusion_gemma": {"canvas_length": 16, "text_config.global_head_dim": 16,
                        "vision_config.position_embedding_size": 64},
    "dots3_note": {"model_type": "dots3_note_text", "num_key_value_heads": 4, "sliding_window": 8,
                   "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 32,
                   "swa_kv_lora_rank": 16, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8,
                   "swa_v_head_dim": 16},
    "ernie4_5_vl_moe": {"text_config.moe_intermediate_size": [EXPERT, 192],
                        "text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                        "mrope_section": [2, 2, 4]}},
    "flint": {"num_hidden_layers": 4, "mlp_only_layers": [0]},
    "gemma3_moe_text": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "gemma4": {"text_config.enable_moe_block": True, "audio_config": None, "text_config.global_head_dim": 16,
               "text_config.hidden_size_per_layer_input": 16, "vision_config.position_embedding_size": 64},
    "glm4_moe_lite": {"num_key_value_heads": 4},
    "glm4v_moe": {"text_config.rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                  "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]}},
    "glm_moe_dsa": {"num_key_value_heads": 4},
    "glm5_next": {"text_config.num_key_value_heads": 4, "text_config.qk_rope_head_dim": 0,
                  "text_config.index_kpool": 2,
                  "text_config.layer_types": ["linear_attention", "indexed_attention", "linear_attention"]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "inkling": {"model_type": "inkling_text", "logits_mup_width_multiplier": 1.5},
    "inkling2": {"vision_config.projection_hidden_dim": 32},
    "jamba": {"num_hidden_layers": 4, "attn_layer_period": 2, "attn_layer_offset": 0},
    "kimi_linear": {"num_key_value_heads": 4,
                    "layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "minimax_m3_vl": {"projector_hidden_size": 32},
    "mistral4": {"num_key_value_heads": 4},
    "mistral_large4": {"text_config.num_key_value_heads": 4},
    "muse_spark": {"text_config.output_multiplier": 1.5, "text_config.moe_hidden_size": 192,
                   "out_hidden_size": 32, "projector_hidden_size": 32,
                   "audio_config.num_hidden_layers": 4, "audio_config.hidden_sizes": [16, 16, 16, 32],
                   "audio_config.depths": [1, 1, 1, 1]},
    "nemotron_h": {"layer_types": ["linear_attention", "moe", "full_attention", "moe"], "n_groups": 2,
                   "moe_latent_size": 192},
    "qwen3_5_moe": {"class": "Qwen3_5MoeForConditionalGeneration",
                    "text_config.layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "qwen3_next": {"layer_types": ["linear_attention", "full_attention", "linear_attention"]},
    "qwen4_exp": {"class": "Qwen4ExpForConditionalGeneration", "text_config.hc_lowrank": 16,
                  "text_config.indexer_n_heads": 2, "text_config.indexer_kv_heads": 1,
                  "text_config.indexer_head_dim": 16, "text_config.indexer_budget": 8,
                  "text_config.indexer_compress_ratio": 2,
                  "text_config.layer_types": ["linear_attention", "indexed_attention", "linear_attention"]},
    "qwen3_omni_moe": {"model_type": "qwen3_omni_moe_thinker", "audio_config.downsample_hidden_size": 16,
                       "vision_start_token_id": 123},
    "qwen3_omni_moe_talker": {"class": "Qwen3OmniMoeTalkerForConditionalGeneration",
                              "text_config.shared_expert_intermediate_size": 64,
                              "text_config.norm_topk_prob": True, "spatial_merge_size": 2,
                              "thinker_hidden_size": 64, "num_code_groups": 4},
    "unlimited_ocr": {"vision_config.sam_config.downsample_channels": [32, 32]},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 32},
}  # fmt: skip

_AUTO = ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "TOKEN_CLASSIFICATION")


def _decorated(models: Path) -> dict[str, list[str]]:
    """Folder under `models` -> the decorated experts classes in it."""
    found: dict[str, list[str]] = {}
    for path in sorted(models.glob("*/modeling_*.py")):
        classes = re.findall(r"^@use_experts_implementation.*\nclass (\w+)", path.read_text(), re.MULTILINE)
        if classes:
            found.setdefault(path.parent.name, []).extend(classes)
    return found


DECORATED = _decorated(Path(transformers.__file__).parent / "models")
OWN = {name: _decorated(custom.HERE)[row.room] for name, row in custom.CUSTOM.items()}
FAMILIES = sorted([*DECORATED, "qwen3_omni_moe_talker", *OWN])


def _shrunk(config_class: type, overrides: dict[str, Any], tower: bool = False) -> dict[str, Any]:
    """Arguments for `config_class`: every known field shrunk, then the overrides, then the sub-configs."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    table = TOWER if tower else SHRINK
    kwargs = {name: value for name, value in table.items() if name in fields}
    if not tower:
        if "moe_intermediate_size" not in fields and "intermediate_size" in fields:
            kwargs["intermediate_size"] = EXPERT
        if "mlp_layer_types" in fields:
            kwargs["mlp_layer_types"] = ["dense"] + ["sparse"] * (LAYERS - 1)
    for name, spec in getattr(config_class, "sub_configs_defaults", {}).items():
        if name in overrides:
            continue
        mine = {key[len(name) + 1 :]: value for key, value in overrides.items() if key.startswith(name + ".")}
        sub_class = CONFIG_MAPPING[spec.model_type] if spec.model_type else spec.config_class
        sub_config = _shrunk(sub_class, mine, tower or name != "text_config")
        kwargs[name] = {"model_type": sub_class.model_type, **sub_config}
    kwargs.update({key: value for key, value in overrides.items() if "." not in key})
    return kwargs


def config(family: str) -> PreTrainedConfig:
    """The tiny config of a family."""
    overrides = {key: value for key, value in OVERRIDES.get(family, {}).items() if key != "class"}
    if family == "qwen3_omni_moe_talker":  # the one config class that has no name in CONFIG_MAPPING
        config_class = transformers.Qwen3OmniMoeTalkerConfig
    else:
        config_class = CONFIG_MAPPING[overrides.pop("model_type", family)]
    return config_class(**_shrunk(config_class, overrides))


def model_class(family: str) -> type[PreTrainedModel]:
    """The class that AutoModelForCausalLM gives for the family's config, else AutoModelForImageTextToText."""
    if family in OWN:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[family]]
    overrides = OVERRIDES.get(family, {})
    name = overrides.get("class")
    for task in _AUTO:
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        name = name or names.get(overrides.get("model_type", family))
    return getattr(transformers, name)


def is_experts(module: nn.Module) -> bool:
    """Whether the module's class carries the experts decorator."""
    return hasattr(module, "_is_expert_parallel")


@torch.no_grad()
def _disturb(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Random experts; noise on whatever starts as a constant; a token-id table that uses every expert."""

    def noise(tensor: Tensor, scale: float) -> Tensor:
        return torch.randn(tensor.shape, generator=generator) * scale

    for module in filter(is_experts, model.modules()):
        for parameter in module.parameters(recurse=False):  # one class never initialises its experts
            fan_in = parameter.shape[1] if module.is_transposed else parameter.shape[-1]
            parameter.copy_(noise(parameter, fan_in**-0.5 if parameter.ndim == 3 else 0.1))
    for name, tensor in model.state_dict().items():
        if name.endswith("tid2eid"):
            tokens = torch.arange(len(tensor))[:, None]
            tensor.copy_((tokens * 3 + torch.arange(tensor.shape[1])) % NUM_EXPERTS)
        elif tensor.is_floating_point() and bool((tensor == tensor.flatten()[:1]).all()):
            tensor.add_(noise(tensor, 0.03 if "bias" in name else 0.1))
        if name.endswith("balancing_biases"):
            tensor[-1] = -1.0  # what from_pretrained puts there
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} of {type(model).__name__} is not initialised; add it to OVERRIDES")


def build(family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model of the family, in eval mode on the CPU; the same for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(family)(config(family))
    _disturb(model, torch.Generator().manual_seed(seed))
    return model.to(dtype).eval()


def inputs(model: PreTrainedModel, batch: int = 2, length: int = 64) -> dict[str, Tensor]:
    """Keyword arguments for one forward: text only, the same for the same shape."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 120, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if isinstance(model.config, transformers.Qwen3OmniMoeTalkerConfig):  # takes the thinker's states
        hidden = torch.randn(batch, length, HIDDEN, generator=generator).to(model.dtype)
        return {"inputs_embeds": hidden, "attention_mask": mask}
    if model.config.model_type == "ernie4_5_vl_moe":  # its vision experts see only the tokens marked 1
        return {"input_ids": ids, "attention_mask": mask, "moe_mm_token_type_ids": (ids % 2).int()}
    if model.config.model_type == "diffusion_gemma":  # without a canvas it draws one at random
        return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": ids.flip(1)[:, :16]}
    return {"input_ids": ids, "attention_mask": mask}


def save(family: str, folder: Path) -> Path:
    """Save the family's tiny model (fp32, seed 0) as a checkpoint in `folder`."""
    build(family).save_pretrained(folder)
    return folder
