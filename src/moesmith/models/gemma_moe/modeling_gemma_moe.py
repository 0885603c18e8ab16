"""Gemma 2 and Gemma 3 text models with a Mixture of Experts in place of every MLP.

Attention, norms, embeddings, masks, caches and softcaps are transformers' own dense classes. New are the
router, the experts and the load-balancing loss. The router reads what the dense MLP read: the output of
`pre_feedforward_layernorm`.

This file is saved beside the weights (`auto_map`): it needs torch and transformers and nothing else.
"""

# T tokens of a batch, H hidden, I width of an expert, E experts, K experts per token

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.generation import GenerationMixin
from transformers.integrations import use_experts_implementation
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, slice_logits_to_keep
from transformers.models.gemma2.modeling_gemma2 import (
    Gemma2Attention,
    Gemma2DecoderLayer,
    Gemma2ForCausalLM,
    Gemma2Model,
    Gemma2PreTrainedModel,
    Gemma2RMSNorm,
    Gemma2RotaryEmbedding,
    Gemma2TextScaledWordEmbedding,
)
from transformers.models.gemma3.modeling_gemma3 import (
    Gemma3Attention,
    Gemma3DecoderLayer,
    Gemma3ForCausalLM,
    Gemma3PreTrainedModel,
    Gemma3RMSNorm,
    Gemma3RotaryEmbedding,
    Gemma3TextModel,
    Gemma3TextScaledWordEmbedding,
)
from transformers.utils import can_return_tuple
from transformers.utils.output_capturing import OutputRecorder

from .configuration_gemma_moe import Gemma2MoeConfig, Gemma3MoeTextConfig

# ---------------------------------------------------------------- router and experts


class GemmaMoeRouter(nn.Module):
    """Softmax over all experts in fp32, the K largest, divided by their sum."""

    def __init__(self, config):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.num_experts = config.num_experts
        self.weight = nn.Parameter(torch.empty(config.num_experts, config.hidden_size))

    def forward(self, hidden_states):
        """(T, H) -> logits (T, E), weights (T, K) fp32, expert ids (T, K)."""
        router_logits = F.linear(hidden_states, self.weight)
        probabilities = F.softmax(router_logits, dim=-1, dtype=torch.float32)
        top_k_weights, top_k_index = torch.topk(probabilities, self.top_k, dim=-1)
        top_k_weights = top_k_weights / top_k_weights.sum(dim=-1, keepdim=True)
        return router_logits, top_k_weights, top_k_index


@use_experts_implementation
class GemmaMoeExperts(nn.Module):
    """Every expert's gated MLP in two stacks; gate_up_proj has rows [gate; up]."""

    def __init__(self, config):
        super().__init__()
        self.num_experts = config.num_experts
        self.hidden_dim = config.hidden_size
        self.intermediate_dim = config.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(
            torch.empty(self.num_experts, 2 * self.intermediate_dim, self.hidden_dim)
        )
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, self.hidden_dim, self.intermediate_dim))
        self.act_fn = ACT2FN[config.hidden_activation]

    def forward(self, hidden_states, top_k_index, top_k_weights):
        """(T, H), ids (T, K), weights (T, K) -> (T, H). The plain loop; faster ones are dispatched to."""
        summed = torch.zeros_like(hidden_states)
        for expert in torch.unique(top_k_index).tolist():
            if expert == self.num_experts:  # how expert parallelism marks an expert of another rank
                continue
            token, position = torch.where(top_k_index == expert)
            gate, up = F.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            output = F.linear(self.act_fn(gate) * up, self.down_proj[expert])
            output = output * top_k_weights[token, position, None]
            summed.index_add_(0, token, output.to(summed.dtype))
        return summed


class GemmaMoeSparseBlock(nn.Module):
    """Takes the place of the dense MLP."""

    def __init__(self, config):
        super().__init__()
        self.gate = GemmaMoeRouter(config)
        self.experts = GemmaMoeExperts(config)

    def forward(self, hidden_states):
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        _, top_k_weights, top_k_index = self.gate(flat)
        return self.experts(flat, top_k_index, top_k_weights).reshape(hidden_states.shape)


def load_balancing_loss(router_logits, top_k, attention_mask=None):
    """E * sum_e (share of tokens that chose e) * (mean probability of e), averaged over the layers.

    The loss of the Switch Transformer (arXiv 2101.03961, equations 4 to 6) for top-k. K where every layer is
    balanced, E where K = 1 and every token of every layer goes to one expert. Each layer is taken alone:
    layers that collapse onto different experts look balanced when their tokens are pooled.

    Args:
        router_logits: (T, E) of each layer.
        attention_mask: (batch, positions), 0 at padding. After a cache it is longer than this batch's tokens;
            the last ones count. None, or a mask of another form: all tokens count.
    """
    num_tokens, num_experts = router_logits[0].shape
    counted = torch.ones(num_tokens, device=router_logits[0].device)
    if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:
        new_positions = num_tokens // attention_mask.shape[0]
        counted = attention_mask[:, -new_positions:].reshape(-1).to(counted)
    losses = []
    for logits in router_logits:
        weight = (counted / counted.sum().clamp_min(1)).to(logits.device)
        probabilities = F.softmax(logits, dim=-1, dtype=torch.float32)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(top_k).indices, 1.0)
        losses.append(num_experts * ((weight @ chosen) * (weight @ probabilities)).sum())
    return torch.stack([loss.to(losses[0].device) for loss in losses]).mean()


class _MoeCausalLM(GenerationMixin):
    """The language model's forward, with the router's logits and the load-balancing loss."""

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        output_router_logits=None,
        logits_to_keep=0,
        **kwargs,
    ):
        """As the dense class; `output_router_logits` adds `router_logits` and `aux_loss`.

        With labels and router logits, the loss contains `router_aux_loss_coef` times `aux_loss`.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_router_logits=output_router_logits,
            **kwargs,
        )
        logits = self.lm_head(slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep))
        softcap = self.config.final_logit_softcapping
        if softcap is not None:
            logits = torch.tanh(logits / softcap) * softcap

        loss = aux_loss = router_logits = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.vocab_size, **kwargs)
        if output_router_logits:
            router_logits = outputs.router_logits
            aux_loss = load_balancing_loss(router_logits, self.config.num_experts_per_tok, attention_mask)
            if loss is not None:
                loss = loss + self.config.router_aux_loss_coef * aux_loss.to(loss.device)
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=router_logits,
        )


class _MoePreTrainedModel(PreTrainedModel):
    """What the classes of both families add to the dense ones."""

    @classmethod
    def _can_set_experts_implementation(cls):
        # The stock method keeps its answer on the class: once the dense parent was asked, this one would
        # inherit its no, and run the plain loop for ever.
        return True

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, GemmaMoeExperts):
            init.normal_(module.gate_up_proj, mean=0.0, std=std)
            init.normal_(module.down_proj, mean=0.0, std=std)
        elif isinstance(module, GemmaMoeRouter):
            init.normal_(module.weight, mean=0.0, std=std)


# ---------------------------------------------------------------- Gemma 2


class Gemma2MoeDecoderLayer(Gemma2DecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.mlp = GemmaMoeSparseBlock(config)


class Gemma2MoePreTrainedModel(_MoePreTrainedModel, Gemma2PreTrainedModel):
    config: Gemma2MoeConfig
    config_class = Gemma2MoeConfig
    _no_split_modules = ["Gemma2MoeDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(GemmaMoeRouter, index=0),
        "hidden_states": Gemma2MoeDecoderLayer,
        "attentions": Gemma2Attention,
    }


class Gemma2MoeModel(Gemma2MoePreTrainedModel, Gemma2Model):
    def __init__(self, config):
        # Past Gemma2Model's own: it would make every dense MLP only for it to be thrown away.
        super(Gemma2Model, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = Gemma2TextScaledWordEmbedding(
            config.vocab_size, config.hidden_size, self.padding_idx, embed_scale=config.hidden_size**0.5
        )
        self.layers = nn.ModuleList(
            [Gemma2MoeDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = Gemma2RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Gemma2RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class Gemma2MoeForCausalLM(_MoeCausalLM, Gemma2MoePreTrainedModel, Gemma2ForCausalLM):
    def __init__(self, config):
        super(Gemma2ForCausalLM, self).__init__(config)
        self.model = Gemma2MoeModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# ---------------------------------------------------------------- Gemma 3, text


class Gemma3MoeDecoderLayer(Gemma3DecoderLayer):
    def __init__(self, config, layer_idx):
        super().__init__(config, layer_idx)
        self.mlp = GemmaMoeSparseBlock(config)


class Gemma3MoePreTrainedModel(_MoePreTrainedModel, Gemma3PreTrainedModel):
    config: Gemma3MoeTextConfig
    config_class = Gemma3MoeTextConfig
    input_modalities = ("text",)
    _no_split_modules = ["Gemma3MoeDecoderLayer"]
    _can_record_outputs = {
        "router_logits": OutputRecorder(GemmaMoeRouter, index=0),
        "hidden_states": Gemma3MoeDecoderLayer,
        "attentions": Gemma3Attention,
    }


class Gemma3MoeTextModel(Gemma3MoePreTrainedModel, Gemma3TextModel):
    config: Gemma3MoeTextConfig

    def __init__(self, config):
        super(Gemma3TextModel, self).__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = Gemma3TextScaledWordEmbedding(
            config.vocab_size, config.hidden_size, self.padding_idx, embed_scale=config.hidden_size**0.5
        )
        self.layers = nn.ModuleList(
            [Gemma3MoeDecoderLayer(config, layer_idx) for layer_idx in range(config.num_hidden_layers)]
        )
        self.norm = Gemma3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Gemma3RotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()


class Gemma3MoeForCausalLM(_MoeCausalLM, Gemma3MoePreTrainedModel, Gemma3ForCausalLM):
    config: Gemma3MoeTextConfig

    def __init__(self, config):
        super(Gemma3ForCausalLM, self).__init__(config)
        self.model = Gemma3MoeTextModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


# `save_pretrained` copies this file and names the class in config.json.
Gemma2MoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")
Gemma3MoeForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "Gemma2MoeForCausalLM",
    "Gemma2MoeModel",
    "Gemma2MoePreTrainedModel",
    "Gemma3MoeForCausalLM",
    "Gemma3MoePreTrainedModel",
    "Gemma3MoeTextModel",
]
