"""What saved adapters add to each parameter of a model.

Reads adapter folders and the model's shapes, no weights of the model. Several adapters are their sum. The
update of a slice of experts is B @ A of that expert, in float32, in the orientation the model keeps the
parameter in: stacks of transposed experts (`gpt_oss`) hold in x out.
"""

# E experts, r rank, I in features, O out features

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from moesmith.errors import UserError
from moesmith.models.layers import PLACEMENTS, adapter_targets
from moesmith.models.lora_factors import (
    Factors,
    factors,
    module_of,
    parameters,
    places,
    read_adapter,
    side_by_side,
)

OTHER = "other"
"""the placement of what none of `models.layers.PLACEMENTS` names, an output head for example"""


@dataclass(frozen=True)
class Deltas:
    """The update of every parameter that the adapters are on."""

    places: dict[str, Factors]
    """in-memory parameter -> its factors, ranks of several adapters side by side"""
    placement: dict[str, str]
    """in-memory parameter -> experts, attention, router..."""
    transposed: frozenset[str]
    """parameters whose slices are stored (I, O)"""

    @classmethod
    def read(cls, adapters: Sequence[Path | str], model: nn.Module) -> Deltas:
        """Read adapters and find their places in `model`.

        Args:
            adapters: folders; none of them is no update.
            model: of the class the adapters were trained on, unpacked; on the meta device is enough.

        Raises:
            UserError: no adapter there; one that is more than B @ A; a place that the model does not have or
                has in another shape; weights that are not finite; a weight that is tied to another.
        """
        found: dict[str, list[Factors]] = {}
        for adapter in adapters:
            for name, part in _updates(adapter, model):
                found.setdefault(name, []).append(part)
        transposed = {name for name in found if _is_transposed(model, name)}
        placement = _placements(model) if found else {}
        return cls(
            {name: side_by_side(parts) for name, parts in found.items()},
            {name: placement.get(name, OTHER) for name in found},
            frozenset(transposed),
        )

    def is_zero(self, name: str) -> bool:
        """Whether the update of a parameter is exactly zero: its B or its A holds only zeros."""
        part = self.places[name]
        return not bool(((part.b_EOR != 0).any((1, 2)) & (part.a_ERI != 0).any((1, 2))).any())

    def of_slice(self, name: str, expert: int) -> Tensor:
        """The update of one expert's matrix, float32; of a linear, expert 0: the update of its weight."""
        part = self.places[name]
        delta = part.b_EOR[expert] @ part.a_ERI[expert]
        return delta.T if name in self.transposed else delta

    def of(self, name: str) -> Tensor:
        """The update of a whole parameter, float32, a linear's as (1, O, I). As large as the parameter."""
        part = self.places[name]
        delta = torch.bmm(part.b_EOR, part.a_ERI)
        return delta.mT if name in self.transposed else delta

    def add(self, name: str, weight: Tensor) -> Tensor:
        """weight + update in float32, in the shape of `weight`; a weight without an update is only cast."""
        added = weight.to(torch.float32, copy=True)
        if name in self.places:
            slices = added.view(self.places[name].shape[0], *added.shape[-2:])
            for expert, matrix in enumerate(slices):
                matrix += self.of_slice(name, expert)
        return added


def _updates(adapter: Path | str, model: nn.Module) -> Iterator[tuple[str, Factors]]:
    """(parameter, factors) of one adapter, checked against the model."""
    config, weights = read_adapter(adapter)
    if not places(weights):
        raise UserError(f"adapter={adapter} has no weights")
    modules = dict(model.named_modules())
    missing = [place for place in places(weights) if module_of(place) not in modules]
    if missing:
        raise UserError(
            f"adapter={adapter} does not fit the model, which has no {module_of(missing[0])} "
            f"({len(missing)} of {len(places(weights))} places)",
            "it was trained on another model, or on another class of this one",
        )

    def order(module: str) -> list[str]:
        return [name for name, _ in modules[module].named_parameters(recurse=False)]

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for place, name in parameters(config, weights, order).items():
        module, _, leaf = name.rpartition(".")
        weight = getattr(modules[module], leaf, None)
        if not isinstance(weight, nn.Parameter):
            raise UserError(f"adapter={adapter} does not fit the model, which has no {name}")
        if name in tied or name in tied.values():
            raise UserError(
                f"adapter={adapter} is on {name}, which is one tensor with another weight of the model "
                "(tied): the other would change with it",
                "leave this placement out of the adapter",
            )
        part = factors(place, config, weights, parameter=name)
        assert part is not None
        experts, inner, outer = part.shape
        matrix = (inner, outer) if _is_transposed(model, name) else (outer, inner)
        wanted = (experts, *matrix) if weight.ndim == 3 else matrix
        if tuple(weight.shape) != wanted or (weight.ndim != 3 and experts != 1):
            raise UserError(
                f"adapter={adapter} does not fit the model: on {name} it is for {list(wanted)}, "
                f"the model has {list(weight.shape)}",
                "it was trained on another model, or before experts were removed",
            )
        if not bool(part.a_ERI.isfinite().all() and part.b_EOR.isfinite().all()):
            raise UserError(
                f"adapter={adapter}: weights on {name} are not finite (NaN or infinite)",
                "its training went wrong: take an earlier checkpoint",
            )
        yield name, part


def _is_transposed(model: nn.Module, name: str) -> bool:
    """Whether a stack holds (E, I, O). PEFT too asks the module, and only for stacks."""
    module, _, leaf = name.rpartition(".")
    holder = model.get_submodule(module)
    return getattr(holder, leaf).ndim == 3 and bool(getattr(holder, "is_transposed", False))


def _placements(model: nn.Module) -> dict[str, str]:
    """Parameter -> the placement it belongs to."""
    owners: dict[str, str] = {}
    for placement in PLACEMENTS:
        try:
            modules, targets = adapter_targets(model, [placement])
        except UserError:  # the model has no such place, or PEFT could not load an adapter there
            continue
        for name in [*(f"{module}.weight" for module in modules), *targets]:
            owners.setdefault(name, placement)
    return owners
