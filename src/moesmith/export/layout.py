"""What a model's own checkpoints call and how they shape the tensors that transformers holds in memory.

Transformers joins what checkpoints store apart (one matrix per expert) and renames, by a table of conversions
for each architecture. `Layout` runs that table backwards for a few tensors at a time, where
`save_pretrained` needs the whole model at once. The result is what a stock `save_pretrained` writes, and what
vLLM and llama.cpp read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    dot_natural_key,
    rename_source_key,
)

from moesmith.experts.storage import SCALE_SUFFIXES, named_experts, weight_names


@dataclass
class Group:
    """Tensors that are converted together: in memory some, on disk others."""

    live: tuple[str, ...]
    """names in memory"""
    disk: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """name on disk -> shape"""
    converter: WeightConverter | None = None
    """what makes the ones of the others; None for a tensor that is only renamed"""
    turns: bool = False
    """whether it is read either way round, as its shape tells; written it is as in memory"""
    _patterns: dict[str, str] = field(default_factory=dict)
    _first: str = ""
    _finals: dict[str, str] = field(default_factory=dict)
    """name that the converter gives -> name on disk"""


class Layout:
    """Names and shapes on disk of a model's tensors."""

    def __init__(self, model: nn.Module, stored: Iterable[str], saved: Iterable[str] | None = None):
        """Work out the layout.

        Args:
            model: the unpacked model, on the meta device.
            stored: names of the tensors in the checkpoint the model comes from. Of several layouts that
                transformers reads, the one found there is written; stacks that moesmith packed, which are
                stored as they are in memory, go back to the architecture's.
            saved: names in memory of what is to be written; default all of `state_dict`.
        """
        self.model: Any = model
        state = model.state_dict()
        stored = list(stored)
        mapping = get_model_conversion_mapping(self.model)
        self.in_memory = self._read_names(mapping, stored, state)
        """name on disk -> in memory, for tensors that the loader only renames, or that moesmith packed"""
        chosen = [entry for entry in mapping if entry.was_used() or entry in self._packing]
        reversed_ = [entry.reverse_transform() for entry in chosen[::-1]]
        self._renamings = [entry for entry in reversed_ if isinstance(entry, WeightRenaming)]
        self.groups = self._group(
            [entry for entry in reversed_ if isinstance(entry, WeightConverter)],
            {name: state[name] for name in (state if saved is None else saved)},
        )

    def _read_names(
        self, mapping: list[Any], stored: list[str], state: Mapping[str, Tensor]
    ) -> dict[str, str]:
        """Where tensors on disk belong; marks the conversions of `mapping` that reading them takes."""
        renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
        converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
        stacks = [f"{name}.{w}" for name, module in named_experts(self.model) for w in weight_names(module)]
        scales = {stack + suffix: (stack, i) for stack in stacks for i, suffix in enumerate(SCALE_SUFFIXES)}
        known = {**state, **dict.fromkeys(scales, torch.empty(0))}
        ordered = sorted(stored, key=dot_natural_key)  # some renamings look at what came before

        def live_name(name: str, converters: list[WeightConverter]) -> tuple[str, str | None]:
            prefix = self.model.base_model_prefix
            live, pattern = rename_source_key(name, renamings, converters, prefix, known)
            if live not in known and name in known:
                live, pattern = rename_source_key(name, [], [], prefix, known)
            return live, pattern

        self.scales: dict[str, list[str | None]] = {}
        """in-memory name of a packed stack -> names on disk of its absmax, scale and offset"""
        for name in ordered:
            live, _ = live_name(name, [])
            if live in scales:
                stack, place = scales[live]
                self.scales.setdefault(stack, [None, None, None])[place] = name
        self._packing = [entry for entry in converters if self._makes_packed(entry)]
        # The quantizer leaves these converters out: what they would make is stored as it is in memory.
        reading = [entry for entry in converters if entry not in self._packing]
        found = {}
        for name in ordered:
            live, pattern = live_name(name, reading)
            if live in state and pattern is None:
                found[name] = live
        return found

    def _makes_packed(self, converter: WeightConverter) -> bool:
        """Whether a conversion ends in stacks that are stored packed: the quantizer leaves it out."""
        targets = "|".join(re.escape(target.lstrip(".")) for target in converter.target_patterns)
        ends = re.compile(rf"(^|\.)({targets})$")
        return any(ends.search(stack) for stack in self.scales)

    def _group(self, converters: list[WeightConverter], state: Mapping[str, Tensor]) -> list[Group]:
        """As `revert_weight_conversion` of transformers 5.23 does it, in two steps: here the names."""
        for entry in converters:
            entry.operations = [
                _Views(op.dim, op.num_shards_attribute) if type(op) is Chunk else op
                for op in entry.operations
            ]
        by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
        members: dict[str, list[tuple[str, str]]] = {}
        order = sorted(state, key=dot_natural_key)
        plain = {}
        for name in order:
            renamed, pattern = apply_converters(name, converters)
            if pattern is None:
                # All renamings in this order, before those of what converters give: some of them look at
                # what came before.
                plain[name] = apply_renamings(name, self._renamings)
            else:
                members.setdefault(renamed, []).append((name, pattern))
        groups = [Group((name,), {final: tuple(state[name].shape)}) for name, final in plain.items()]
        for first, parts in members.items():
            group = Group(
                tuple(name for name, _ in parts),
                converter=by_pattern[parts[0][1]],
                turns=any(getattr(op, "check_dims", False) for op in by_pattern[parts[0][1]].operations),
                _patterns=dict(parts),
                _first=first,
            )
            for made, tensor in self._convert(group, {name: state[name] for name, _ in parts}).items():
                group._finals[made] = apply_renamings(made, self._renamings)
                group.disk[group._finals[made]] = tuple(tensor.shape)
            groups.append(group)
        position = {name: index for index, name in enumerate(order)}
        return sorted(groups, key=lambda group: min(position[name] for name in group.live))

    def to_disk(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors of a group in memory -> the group's tensors on disk; views of them where it can be.

        Every conversion moves elements and changes none, so it may be given weights or updates of weights.
        """
        if group.converter is None:
            return dict(zip(group.disk, tensors.values(), strict=True))
        made = self._convert(group, tensors)
        return {group._finals[name]: tensor for name, tensor in made.items()}

    def _convert(self, group: Group, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        converter = deepcopy(group.converter)
        assert converter is not None
        for name in group.live:
            converter.add_tensor(group._first, name, group._patterns[name], tensors[name])  # type: ignore[arg-type]
        made = converter.convert(group._first, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


class _Views(Chunk):
    """`Chunk` without its copies: gates and ups stay in the stack they came in."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **more: Any
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        tensor = value[0] if isinstance(value, list) else value
        targets = self.get_target_patterns(target_patterns, **more)
        return dict(zip(targets, tensor.chunk(len(targets), dim=self.dim), strict=True))
