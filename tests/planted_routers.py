"""Tiny MoE models whose router is known: the class of a token is written into its embedding."""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

import tiny
from moesmith.eval.routing import Labelled
from moesmith.models.layers import moe_layers, submodule

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe")
E = tiny.NUM_EXPERTS


def plain(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A tiny random model whose routing weights sum to 1."""
    model = tiny.build(family, dtype=dtype)
    for router in routers(model):
        if hasattr(router, "norm_topk_prob"):
            router.norm_topk_prob = True
    return model


def routers(model: PreTrainedModel) -> list:
    return [submodule(model, layer.router) for layer in moe_layers(model)]


def rows(model: PreTrainedModel) -> list[torch.Tensor]:
    return [router.weight.detach() for router in routers(model)]


@torch.no_grad()
def planted(family: str) -> PreTrainedModel:
    """Every router sends token id to expert id % E, with weight 1."""
    model = plain(family)
    embedding = model.get_input_embeddings().weight
    embedding[:, :E] = 0
    embedding[torch.arange(len(embedding)), torch.arange(len(embedding)) % E] = 100.0
    for router in routers(model):
        router.weight.zero_()
        router.weight[torch.arange(E), torch.arange(E)] = 10.0
    return model


def texts_of(labels=(3, 0, 7, 3, 1, 0, 5), lengths=(20, 5, 9, 2, 30, 17, 3)) -> list[Labelled]:
    """Texts whose tokens are all of their label's class."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for i, (label, length) in enumerate(zip(labels, lengths, strict=True)):
        ids = torch.randint(1, 15, (length,), generator=generator) * E + label
        found.append(Labelled(ids.tolist(), f"d{label}", f"d{label}/{i}", label))
    return found
