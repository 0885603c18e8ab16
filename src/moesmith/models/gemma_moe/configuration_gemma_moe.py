"""Configs of the Gemma 2 and Gemma 3 text models with experts: the dense config and what the experts add.

This file is saved beside the weights (`auto_map`): it needs transformers (and what
transformers itself needs) and nothing else.
"""

from huggingface_hub.dataclasses import strict
from transformers.models.gemma2.configuration_gemma2 import Gemma2Config
from transformers.models.gemma3.configuration_gemma3 import Gemma3TextConfig


def _without_mlp(plan):
    """A tensor-parallel plan less the dense MLP, which is not there. The experts are not split."""
    return {name: style for name, style in plan.items() if ".mlp." not in name}


def _set_expert_width(config):
    if config.moe_intermediate_size is None:
        config.moe_intermediate_size = config.intermediate_size


def _check_experts(config):
    if not 1 <= config.num_experts_per_tok <= config.num_experts:
        raise ValueError(
            f"num_experts_per_tok={config.num_experts_per_tok} with num_experts={config.num_experts}: "
            "a token goes to at least 1 expert and at most all of them"
        )


@strict
class Gemma2MoeConfig(Gemma2Config):
    """`Gemma2Config` with experts.

    num_experts: experts of each layer; every layer has them.
    num_experts_per_tok: how many of them a token goes to. Their weights always sum to 1.
    moe_intermediate_size: width of one expert; `intermediate_size` if not given.
    router_aux_loss_coef: weight of the load-balancing loss, where `output_router_logits` asks for it.
    """

    model_type = "gemma2_moe"
    base_model_tp_plan = _without_mlp(Gemma2Config.base_model_tp_plan)

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        _set_expert_width(self)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        super().validate_architecture()
        _check_experts(self)


@strict
class Gemma3MoeTextConfig(Gemma3TextConfig):
    """`Gemma3TextConfig` with experts; the fields are those of `Gemma2MoeConfig`.

    The name says text: the multimodal Gemma 3 is another class, which holds a text model as a part.
    """

    model_type = "gemma3_moe_text"
    base_model_tp_plan = _without_mlp(Gemma3TextConfig.base_model_tp_plan)

    num_experts: int = 8
    num_experts_per_tok: int = 2
    moe_intermediate_size: int | None = None
    router_aux_loss_coef: float = 0.001
    output_router_logits: bool = False

    def __post_init__(self, **kwargs):
        _set_expert_width(self)
        super().__post_init__(**kwargs)

    def validate_architecture(self):
        super().validate_architecture()
        _check_experts(self)


# `save_pretrained` copies this file and names the class in config.json.
Gemma2MoeConfig.register_for_auto_class()
Gemma3MoeTextConfig.register_for_auto_class()

__all__ = ["Gemma2MoeConfig", "Gemma3MoeTextConfig"]
