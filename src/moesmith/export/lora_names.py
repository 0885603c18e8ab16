"""Updates of in-memory parameters as updates of the tensors that the original checkpoint has.

transformers fuses, renames and splits a checkpoint's tensors while it loads them. Its own conversion mapping
is asked, run backwards with row numbers in the place of weights, which row of which parameter each tensor on
disk is made of. B's rows follow the numbers; A is shared by all rows of one expert. Of a model nothing but
its config is read.
"""

# E experts, r rank, I in features, O out features

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from moesmith.errors import UserError
from moesmith.models.layers import submodule
from moesmith.models.lora_factors import Factors, side_by_side

MERGE = "merge the adapter instead: moesmith export merged MODEL --adapter ADAPTER --out DIR"


def is_transposed(holder: nn.Module, parameter: Tensor) -> bool:
    """Whether a stack is kept as (E, I, O)."""
    return parameter.ndim == 3 and bool(getattr(holder, "is_transposed", False))


@dataclass(frozen=True)
class OnDisk:
    """The update of one tensor of the checkpoint."""

    name: str
    """without `.weight`"""
    parameter: str
    """the in-memory parameter it is (part of)"""
    part: Factors
    """E = 1 for a matrix"""
    stack: bool
    """the checkpoint keeps one tensor of several experts"""
    transposed: bool
    """the checkpoint keeps it as (.., I, O)"""


def experts_on_disk(model: PreTrainedModel, experts: Mapping[str, object]) -> dict[str, str]:
    """Experts module in memory -> its name in the checkpoint, where stacks keep their leaf names."""
    state = {
        name: tensor for name, tensor in model.state_dict().items() if name.rpartition(".")[0] in experts
    }
    found = {}
    for name in experts:
        # The path above the experts is what other names need; an expert's own may be split by the mapping.
        probe = {key: value for key, value in state.items() if key.rpartition(".")[0] == name}
        disk = next(iter(revert_weight_conversion(model, dict(probe))))
        found[name] = disk[: disk.index(".experts") + len(".experts")]
    return found


def on_disk(model: PreTrainedModel, updates: Mapping[str, Factors]) -> Iterator[OnDisk]:
    """The updates of in-memory parameters as updates of the checkpoint's tensors.

    Every parameter of the layers in question goes backwards through the conversion mapping as a column of row
    numbers, (E, O, 1), and once more with its shape alone. The numbers tell where each row of a tensor on
    disk comes from; the shapes tell whether rows are all that happened to it.

    Raises:
        UserError: a tensor on disk that is not made of whole rows.
    """
    touched = {_decoder_layer(name) for name in updates}
    shapes: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    places: list[_Rows] = []
    start = 0
    for name, parameter in model.state_dict().items():
        if _decoder_layer(name) not in touched or parameter.ndim < 2:
            continue
        shapes[name] = parameter
        part = updates.get(name)
        if part is None:
            rows[name] = torch.full((*parameter.shape[:-1], 1), -1)
            continue
        E, _, O = part.shape  # noqa: E741
        numbers = torch.arange(start, start + E * O).view(E, O, 1)
        if is_transposed(submodule(model, name.rpartition(".")[0]), parameter):
            numbers = numbers.transpose(1, 2)
        rows[name] = numbers if parameter.ndim == 3 else numbers[0]
        places.append(_Rows(name, start, part, part.b_EOR.reshape(E * O, -1)))
        start += E * O
    disk_rows = revert_weight_conversion(model, dict(rows))
    disk_shapes = revert_weight_conversion(model, dict(shapes))
    for name, numbers in disk_rows.items():
        if bool((numbers >= 0).any()):
            yield _gathered(name, numbers, tuple(disk_shapes[name].shape), places)


@dataclass(frozen=True)
class _Rows:
    """The rows of one parameter among all that were numbered."""

    name: str
    start: int
    part: Factors
    b_rows: Tensor
    """B as (E*O, r)"""


def _gathered(name: str, numbers: Tensor, shape: tuple[int, ...], places: Sequence[_Rows]) -> OnDisk:
    """One tensor on disk from the row numbers in it; -1 is a row without an update."""
    odd = UserError(f"the checkpoint keeps {name} in a way that no pair of factors can follow", MERGE)
    numbers_E = numbers if numbers.ndim == 3 else numbers[None]
    if 1 not in numbers_E.shape[1:]:
        raise odd
    column = numbers_E.shape[2] == 1
    n_EO = numbers_E.reshape(numbers_E.shape[0], -1)
    starts = torch.tensor([place.start for place in places])
    place_EO = torch.searchsorted(starts, n_EO.contiguous(), right=True) - 1
    parts = []
    for index in place_EO.unique().tolist():
        if index < 0:
            continue
        place = places[index]
        _, inner, outer = place.part.shape
        mine = place_EO == index
        row = torch.where(mine, n_EO - place.start, 0)
        # All rows of one slice come from one expert: only then have they one A.
        of_expert = torch.where(mine, row // outer, -1)
        expert_E = of_expert.amax(1)
        if bool((mine & (of_expert != expert_E[:, None])).any()) or bool((expert_E < 0).any()):
            raise odd
        if shape[-2:] != ((n_EO.shape[1], inner) if column else (inner, n_EO.shape[1])):
            raise odd
        parts.append(Factors(place.part.a_ERI[expert_E], place.b_rows[row] * mine[..., None]))
    first = places[int(place_EO.max())].name
    return OnDisk(name.removesuffix(".weight"), first, side_by_side(parts), len(shape) == 3, not column)


def _decoder_layer(name: str) -> str:
    """model.layers.3.mlp.gate.weight -> model.layers.3"""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    return ".".join(parts[: numbers[0] + 1]) if numbers else ""
