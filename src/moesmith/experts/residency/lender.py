"""Lender: what one experts module asks for its experts.

Stands between the experts function, which knows rows and offsets, and a residency, which knows layers and
bytes. It adds what is decided per call: which experts are left to the CPU, and what the next layer will
likely want.
"""

# E experts, T tokens

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch

from ...ops.grouped import Again
from ...ops.stack import PackedStack

if TYPE_CHECKING:
    from .mapped import Mapped
    from .policy import Policy
    from .pool import Residency
    from .predict import Prediction


@dataclass(eq=False)
class Lender:
    """One layer of a residency."""

    residency: Residency | Mapped
    layer: int
    """Its position there."""
    policy: Policy
    prediction: Prediction | None = None
    """Of the layer after this one."""

    @property
    def device(self) -> torch.device:
        """What computes."""
        return getattr(self.residency, "device", None) or torch.device("cpu")

    def __deepcopy__(self, memo: dict) -> Lender:
        return self  # a copied model computes with the same frozen experts

    @contextmanager
    def lend(self, experts: list[int], rows: int, tokens: int) -> Iterator[Loan]:
        """These experts, ascending ids, are on the device inside the block."""
        training = torch.is_grad_enabled()
        if torch._C._current_graph_task_id() != -1:  # inside backward: the forward computed again
            tokens = 0
        with self.residency.lend(self.layer, experts, rows, training, tokens) as stacks:
            if self.prediction is not None:
                likely = self.prediction.take()
                if likely:
                    self.residency.expect(self.prediction.layer, likely)
            yield Loan(self, experts, stacks)

    def left_on_cpu(self, wanted: list[int], num_experts: int) -> list[int]:
        """Those of the experts with rows that are to be computed where they lie (`Policy.cold_on_cpu`).

        Only without gradients and for the few experts of decoding: more of them are faster brought over. Not
        under autocast, which the CPU would have to follow.
        """
        few = 2 * len(wanted) < num_experts
        if not self.policy.cold_on_cpu or not few or torch.is_grad_enabled():
            return []
        if torch.is_autocast_enabled(self.device.type):
            return []
        there = set(self.residency.there(self.layer, wanted))
        return [e for e in wanted if e not in there]

    def home(self, name: str) -> PackedStack:
        """The whole stack where it lies."""
        return self.residency.at_home(self.layer)[name]

    def remember(self, experts: list[int]) -> None:
        """Experts that were computed on the CPU: next time they may be on the device, if there is a cache."""
        if self.policy.cache:
            self.residency.expect(self.layer, experts)


@dataclass(eq=False)
class Loan:
    """The experts of one call."""

    lender: Lender
    experts: list[int]
    stacks: Mapping[str, PackedStack]

    def again(self, name: str) -> Again:
        """What lends one of the stacks once more, in backward."""
        return partial(_again, self.lender, self.experts, name)


@contextmanager
def _again(lender: Lender, experts: list[int], name: str) -> Iterator[PackedStack]:
    with lender.residency.again(lender.layer, experts) as stacks:
        yield stacks[name]


def with_rows(offsets: list[int]) -> list[int]:
    """Experts that have rows, ascending."""
    return [e for e in range(len(offsets) - 1) if offsets[e] < offsets[e + 1]]
