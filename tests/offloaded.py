"""Tiny packed models and what is compared when their experts lie elsewhere.

`Harsh` is a residency that lends experts at places that are different every time, and filled with garbage
after every use: what passes with it keeps nothing it was only lent.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import tiny
from moesmith import ExpertsConfig
from moesmith.experts.residency.policy import Policy
from moesmith.models.layers import adapter_targets
from moesmith.ops import PackedStack
from scattered import elsewhere

POLICIES = {
    "one slot": Policy("ram", slots=1, prefetch=False),
    "one slot, asked to look ahead": Policy("ram", slots=1),
    "two slots": Policy("ram"),
    "five slots": Policy("ram", slots=5),
    "some kept": Policy("ram", kept=3, slots=2),
    "the hot ones kept": Policy("ram", kept=2, hot={0: [7, 5], 1: [1, 6]}),
    "a cache": Policy("ram", cache=2),
    "kept and a cache": Policy("ram", kept=2, cache=3, slots=1),
    "all kept": Policy("ram", kept=8),
    "mapped": Policy("disk"),
}


class Harsh:
    """Experts that are lent are copied to other places each time, which hold garbage before and after."""

    def __init__(self, homes: Mapping[str, Mapping[str, PackedStack]], policy: Policy, link: Any = None):
        self.homes = list(homes.values())
        self.policy, self.calls, self.held = policy, 0, 0
        self.last: dict[int, list[int]] = {}
        self.expected: list[tuple[int, list[int]]] = []

    def there(self, layer: int, experts: Sequence[int]) -> list[int]:
        return [e for e in experts if e % 2]

    def at_home(self, layer: int) -> Mapping[str, PackedStack]:
        return self.homes[layer]

    def wants_prediction(self, layer: int) -> bool:
        return True

    def expect(self, layer: int, experts: Sequence[int]) -> None:
        self.expected.append((layer, list(experts)))

    def close(self) -> None:
        assert not self.held

    @contextmanager
    def lend(
        self, layer: int, experts: list[int], rows: int, training: bool, tokens: int
    ) -> Iterator[dict[str, PackedStack]]:
        once_more = torch._C._current_graph_task_id() != -1  # in backward, whose tokens are counted already
        assert experts == sorted(set(experts)) and rows >= len(experts)
        assert tokens == 0 if once_more else tokens >= (rows > 0)
        self.last[layer] = experts
        with self._lent(layer, experts) as stacks:
            yield stacks

    @contextmanager
    def again(self, layer: int, experts: list[int]) -> Iterator[dict[str, PackedStack]]:
        assert set(experts) <= set(self.last[layer]), "lent for the forward that goes back now"
        with self._lent(layer, experts) as stacks:
            yield stacks

    @contextmanager
    def _lent(self, layer: int, experts: list[int]) -> Iterator[dict[str, PackedStack]]:
        self.calls += 1
        self.held += 1
        count = self.homes[layer]["down_proj"].shape[0]
        places = torch.randperm(count + 3, generator=torch.Generator().manual_seed(self.calls)).tolist()
        where = [places[e] if e in experts else -1 for e in range(count)]
        stacks = {name: elsewhere(home, where, count + 3) for name, home in self.homes[layer].items()}
        try:
            yield stacks
        finally:
            self.held -= 1
            for one in stacks.values():
                one.codes.fill_(255 if one.codes.dtype == torch.uint8 else torch.nan)


def load(family: str, folder: Path, config: ExpertsConfig | None = None, dtype: torch.dtype = torch.float32):
    """Packed, with every tensor where tensors start: a mapped one may start elsewhere, where some CPU kernels
    sum in another order."""
    model = tiny.model_class(family).from_pretrained(
        folder, quantization_config=config or ExpertsConfig("nf4"), dtype=dtype
    )
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module) -> list[Tensor]:
    """Logits of many tokens, of few, and of one at a time with a cache."""
    many = {key: value.to(model.device) for key, value in tiny.inputs(model).items()}
    results = [model(**many).logits]
    if "input_ids" not in many or len(many) > 2:
        return results
    ids = many["input_ids"][:1, :12]
    results.append(model(input_ids=ids[:, :2]).logits)
    if model.config.model_type == "qwen3_omni_moe_thinker":  # counts positions in its own prefill only
        return results
    cache = None
    for position in range(6):
        out = model(
            input_ids=ids[:, position : position + 1],
            attention_mask=torch.ones_like(ids[:, : position + 1]),
            past_key_values=cache,
            use_cache=True,
        )
        cache = getattr(out, "past_key_values", None)
        results.append(out.logits)
    results.append(model(**many).logits)
    return results


def adapted(model: nn.Module) -> nn.Module:
    """Adapters on experts and attention; B is not zero."""
    modules, parameters = adapter_targets(model, ("experts", "attention"))
    torch.manual_seed(1)
    model = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=modules, target_parameters=parameters)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    return model


def trained(model: nn.Module, steps: int, reentrant: bool = False) -> tuple[list[float], dict[str, Tensor]]:
    """Losses and adapter weights; gradient checkpointing, and every second batch has other rows."""
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(learned.values(), lr=1e-2)
    batch = tiny.inputs(model.get_base_model(), batch=2, length=16)
    batch = {key: value.to(model.device) for key, value in batch.items()}
    losses = []
    for step in range(steps):
        part = {key: value[step % 2 :] for key, value in batch.items()}
        loss = model(**part, labels=part["input_ids"]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses, {name: p.detach().clone() for name, p in learned.items()}


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert torch.equal(one, other)


def same_training(got: nn.Module, want: nn.Module, steps: int, reentrant: bool = False) -> None:
    losses, weights = trained(got, steps, reentrant)
    wanted, expected = trained(want, steps, reentrant)
    assert losses == wanted and wanted[-1] != wanted[0]
    assert weights.keys() == expected.keys()
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []
