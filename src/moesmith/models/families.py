"""What architectures call things: one default rule and a table of exceptions.

Transformers' decorated experts agree on shapes and on the call; names around them differ. `Family()` is the
default and fits most model types; `FAMILIES` lists the others, by the model type of the config that the
experts were built from (`gemma4_text`, not `gemma4`). Nothing else in the package knows an architecture by
name. Read from transformers 5.23; `tests/models/test_families.py` holds every row against the real class.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Names inside one decoder layer. The MoE block is the module that holds `experts`."""

    router: tuple[str, ...] = ("gate", "router")
    """the router, an attribute of the MoE block: the first that exists"""
    per_expert: tuple[str, ...] = ("weight", "bias", "e_score_correction_bias")
    """router tensors with one row per expert, below the router; later rows belong to no expert"""
    block_per_expert: tuple[str, ...] = ()
    """the same, on the MoE block itself"""
    expert_ids: tuple[str, ...] = ()
    """router tensors whose values are expert ids"""
    shared_experts: tuple[str, ...] = ("shared_experts", "shared_expert")
    """experts that see every token, an attribute of the MoE block or of the decoder layer"""
    attention: tuple[str, ...] = ("self_attn", "linear_attn")
    """what mixes tokens, an attribute of the decoder layer"""
    dense_mlp: tuple[str, ...] = ("mlp",)
    """an MLP without experts, an attribute of the decoder layer"""
    no_adapter: tuple[str, ...] = ("indexer",)
    """parts of the attention or the MoE block that adapters never go on: their output is a choice of
    positions, which has no gradient, or a fused kernel reads their weight past the adapter, or text never
    reaches them"""
    lost_adapters: tuple[str, ...] = ()
    """placements whose adapters PEFT 0.21 saves but does not find again: on loading it renames their tensors
    with the patterns meant for the original checkpoint, which also match names that are already right"""


_GEMMA = Family(per_expert=("proj.weight", "per_expert_scale"))
_ERNIE = ("weight", "moe_statics.e_score_correction_bias")
_SHARED_MLP = ("shared_mlp",)
_ALL = ("experts", "attention", "router", "shared_experts", "dense_mlp")

FAMILIES: dict[str, Family] = {
    "afmoe": Family(per_expert=("gate.weight",), block_per_expert=("expert_bias",)),
    "deepseek_ocr2_text": Family(lost_adapters=_ALL),
    "deepseek_v4": Family(expert_ids=("tid2eid",)),
    "diffusion_gemma_text": _GEMMA,
    "ernie4_5_moe": Family(per_expert=_ERNIE),
    # Text tokens never reach the experts that are kept for image tokens.
    "ernie4_5_vl_moe_text": Family(per_expert=_ERNIE, no_adapter=("vision_moe",)),
    "gemma4_text": _GEMMA,
    "granitemoe_swa": Family(shared_experts=_SHARED_MLP),
    # The fused Mamba-2 kernel takes out_proj.weight as an argument (nemotron_h too).
    "granitemoehybrid": Family(
        shared_experts=_SHARED_MLP, attention=("self_attn", "mamba"), no_adapter=("out_proj",)
    ),
    "granitemoeshared": Family(shared_experts=_SHARED_MLP),
    "hunyuan_v1_moe": Family(per_expert=("wg.weight",), shared_experts=_SHARED_MLP),
    "hy_v3": Family(block_per_expert=("e_score_correction_bias",)),
    # Mamba multiplies by dt_proj.weight itself.
    "jamba": Family(
        attention=("self_attn", "mamba"), dense_mlp=("feed_forward",), no_adapter=("dt_proj",)
    ),
    "laguna": Family(lost_adapters=("shared_experts",)),
    "lfm2_moe": Family(
        block_per_expert=("expert_bias",), attention=("self_attn", "conv"), dense_mlp=("feed_forward",)
    ),
    "minimax_m2": Family(block_per_expert=("e_score_correction_bias",)),
    "mistral_large4_text": Family(lost_adapters=("experts", "router", "shared_experts")),
    # Every layer is one `mixer`: attention, Mamba, MLP or MoE block. An MLP is the one with a down_proj.
    "nemotron_h": Family(attention=("mixer",), dense_mlp=("mixer",), no_adapter=("out_proj",)),
    "unlimited_ocr_text": Family(lost_adapters=_ALL),
    "zaya": Family(per_expert=("router_mlp.out_proj.weight", "balancing_biases")),
}  # fmt: skip


def family(model_type: str | None) -> Family:
    """Names for a model type, the default ones if it is no exception."""
    return FAMILIES.get(model_type or "", Family())
