"""Policy: which experts lie where, in one object; and Course: which layer's experts are wanted next.

A layer here is a MoE layer, counted 0, 1, ... in the order of the forward pass. The policy says nothing about
how bytes move (`link`) or when (`pool`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...errors import UserError

HOMES = ("device", "ram", "disk")


@dataclass(frozen=True)
class Policy:
    """Where the experts of a model lie. The default: all of them on the device.

    Raises UserError for a home that does not exist or a negative count.
    """

    homes: tuple[str, ...] | str = "device"
    """device, ram (pinned when the device is a GPU) or disk (the packed checkpoint, memory-mapped): one word
    for all MoE layers, or one per layer."""
    kept: int = 0
    """Experts of each layer that never leave the device: the first of `hot`, else the first."""
    cache: int = 0
    """Experts of each layer, recently routed ones, that stay on the device while decoding (least recently
    used goes)."""
    slots: int = 2
    """Staging slots on the device, each as large as a layer without its kept experts. Two let one layer
    arrive while another is computed with."""
    hot: Mapping[int, Sequence[int]] | None = None
    """Layer -> its experts, hottest first; layers not named keep their first experts."""
    prefetch: bool = True
    """Fetch the next layer's experts ahead of their use."""
    cold_on_cpu: bool = False
    """Without gradients, compute with experts that are not on the device where they lie, on the CPU."""

    def __post_init__(self) -> None:
        words = (self.homes,) if isinstance(self.homes, str) else self.homes
        for word in words:
            if word not in HOMES:
                raise UserError(f"home {word!r} of the experts is not one of {', '.join(HOMES)}")
        for name in ("kept", "cache", "slots"):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)} experts: wanted 0 or more")

    def home(self, layer: int) -> str:
        """Home of one layer's experts."""
        return self.homes if isinstance(self.homes, str) else self.homes[layer]

    def kept_experts(self, layer: int, num_experts: int) -> list[int]:
        """The experts of a layer that never leave the device, hottest first: min(kept, num_experts) of them.

        Raises UserError if `hot` names an expert the layer does not have, or one twice.
        """
        named = [int(e) for e in (self.hot or {}).get(layer, ())]
        if len(set(named)) < len(named) or any(not 0 <= e < num_experts for e in named):
            raise UserError(
                f"the hot experts of layer {layer} are {named}: "
                f"wanted different ones of 0 to {num_experts - 1}"
            )
        others = [e for e in range(num_experts) if e not in set(named)] if len(named) < self.kept else []
        return (named + others)[: self.kept]

    def check(self, layers: int) -> None:
        """UserError if the policy does not fit a model of so many MoE layers."""
        if not isinstance(self.homes, str) and len(self.homes) != layers:
            raise UserError(
                f"{len(self.homes)} homes for {layers} MoE layers: wanted one word, or one per layer"
            )
        wrong = sorted(layer for layer in self.hot or {} if not 0 <= layer < layers)
        if wrong:
            raise UserError(f"hot experts of layers {wrong}: the model has MoE layers 0 to {layers - 1}")


class Course:
    """Follows which layer is computed, up in a forward and down in a backward recompute, and says what comes
    next.

    Training bounces: 0 1 2 2 1 0 0 1 2 ... (the layer on top is recomputed at once). Without training a pass
    goes up and ends.
    """

    def __init__(self, layers: Sequence[int]):
        """`layers`: the ones to follow, ascending."""
        self.layers = list(layers)
        self.place = {layer: i for i, layer in enumerate(self.layers)}
        self.at = -1
        self.up = True
        self.training = False

    def reach(self, layer: int, training: bool) -> None:
        """A layer's turn has come."""
        here = self.place[layer]
        if training and here == self.at - 1:
            self.up = False
        elif not training or here != self.at or here == 0:
            self.up = True
        self.at, self.training = here, training

    def upcoming(self) -> Iterator[int]:
        """The layer it is at, then those after it in the order they will be wanted, each once."""
        order = self.layers
        if self.at < 0:
            yield from order
        elif self.up:
            yield from order[self.at :]
            if self.training:
                yield from reversed(order[: self.at])
        else:
            yield from reversed(order[: self.at + 1])
            yield from order[self.at + 1 :]
