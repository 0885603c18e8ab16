"""A link under a test's control, and small homes for it to serve.

It overwrites a target the moment a copy is started, and brings the bytes at the last moment, when someone
waits: whoever computes before arrival, or has its experts overwritten while in use, sees garbage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moesmith.errors import UserError
from moesmith.experts.residency.link import Copy
from moesmith.ops.stack import PackedStack


def homes(
    layers: int = 4, experts: int = 8, scheme: str = "nf4", double_quant: bool = False, seed: int = 0
) -> dict[str, dict[str, PackedStack]]:
    """Layers "layer 0", "layer 1", ... with gate_up_proj (E, 32, 64) and down_proj (E, 64, 32)."""
    generator = torch.Generator().manual_seed(seed)
    return {
        f"layer {i}": {
            "gate_up_proj": PackedStack.quantize(
                torch.randn(experts, 32, 64, generator=generator), scheme, 32, double_quant
            ),
            "down_proj": PackedStack.quantize(
                torch.randn(experts, 64, 32, generator=generator), scheme, 32, double_quant
            ),
        }
        for i in range(layers)
    }


def expert_bytes(stacks: dict[str, PackedStack]) -> int:
    """Packed bytes of one expert of a layer."""
    return sum(stack.nbytes // stack.shape[0] for stack in stacks.values())


@dataclass
class RecordedTicket:
    copies: list[Copy]
    after: int | None
    nbytes: int = 0
    arrived: bool = False
    failure: UserError | None = None

    def seconds(self) -> float:
        return self.nbytes / 1e9

    def lead(self) -> float:
        return 0.5


@dataclass
class RecordingLink:
    """Keeps `log`: ("start", layer, experts) and ("wait", layer, experts), in order."""

    name: str = "recorder"
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pins: bool = False
    timed: bool = False
    log: list[tuple[str, str, int]] = field(default_factory=list)
    moved: int = 0
    fail: str = ""
    """A copy whose `what` contains this fails."""
    marks: int = 0
    used: list[tuple[int, int, int]] = field(default_factory=list)
    """(first address, end, mark) of memory that the computation read, for `start` to check."""
    closed: int = 0
    pinned_bytes: int = 0
    queue: list[RecordedTicket] = field(default_factory=list)

    def pinned(self, tensor: Tensor) -> Tensor:
        self.pinned_bytes += tensor.numel() * tensor.element_size()
        return tensor.clone()

    def start(self, copies: Sequence[Copy], after: int | None = None) -> RecordedTicket:
        assert not self.closed
        ticket = RecordedTicket(list(copies), after, sum(copy.nbytes for copy in copies))
        self.moved += ticket.nbytes
        self._note("start", ticket)
        for copy in copies:
            first = copy.target.data_ptr()
            late = [mark for a, b, mark in self.used if a < first + copy.nbytes and first < b]
            assert not late or (after is not None and after >= max(late)), "overwritten before it was used"
            copy.target.view(torch.uint8).fill_(0xA5)
        self.queue.append(ticket)
        return ticket

    def _note(self, event: str, ticket: RecordedTicket) -> None:
        whats = [copy.what.split(", ") for copy in ticket.copies]
        layer = whats[0][0]
        count = sum(copy.target.shape[0] for copy, what in zip(ticket.copies, whats, strict=True))
        self.log.append((event, layer, count // len({(w[1], c.target.shape[1:]) for c, w in _pairs(ticket)})))

    def wait(self, ticket: RecordedTicket) -> None:
        self._note("wait", ticket)
        while not ticket.arrived:
            first = self.queue.pop(0)  # in order, whatever was waited for
            for copy in first.copies:
                if self.fail and self.fail in copy.what:
                    first.failure = UserError(f"{copy.what}: the disk is gone")
                    break
                copy.target.copy_(copy.source)
            first.arrived = True
        if ticket.failure is not None:
            raise ticket.failure

    def release(self) -> int:
        self.marks += 1
        return self.marks

    def close(self) -> None:
        self.closed += 1


def _pairs(ticket: RecordedTicket) -> list[tuple[Copy, list[str]]]:
    return [(copy, copy.what.split(", ")) for copy in ticket.copies]


def staged(link: RecordingLink) -> list[int]:
    """Numbers of the layers whose bytes were sent for, in order."""
    return [int(layer.split()[1]) for event, layer, _ in link.log if event == "start"]


def same(lent: dict[str, PackedStack], home: dict[str, PackedStack], experts: Sequence[int]) -> None:
    """These experts are lent with the bits they have at home."""
    for name, stack in lent.items():
        got, wanted = (s.some(list(experts), torch.float32) for s in (stack, home[name]))
        assert torch.equal(got, wanted), name
