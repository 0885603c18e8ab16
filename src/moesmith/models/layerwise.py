"""Run a model one decoder layer at a time: one layer in memory, the hidden states of all chunks on disk.

For layer l the whole model is called on each chunk: the layers before l give back what they gave when they
were in memory, l computes, and the call ends where l + 1 would begin. So masks, position embeddings and what
an architecture does between its layers come from the model's own code, and no architecture is named here.

What a layer gave is kept on disk as long as a later layer's arguments depend on it. That is found by trying:
change what was kept, call the model, and see whether the next layer is called with something else.
"""

# B rows of a chunk, S positions, H hidden size, V vocabulary

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_outputs import MoeModelOutputWithPast

from moesmith.errors import UserError

from .layers import submodule
from .partial import NOT_ONE_AT_A_TIME, PartialModel
from .spool import Spool, map_tensors, tensors_in

Chunk = Mapping[str, Tensor]
"""Keyword arguments of one forward: input_ids (B, S) and attention_mask (B, S), or what the model wants."""


class Layerwise(PartialModel):
    """A model that runs one decoder layer at a time.

    streamed = Layerwise.open(folder)
    streamed.run(chunks, out / "spool", around_layer=..., around_chunk=..., on_layer=...)
    """

    @torch.no_grad()
    def run(
        self,
        chunks: Sequence[Chunk],
        spool: Path,
        around_layer: Callable[[int, nn.Module], AbstractContextManager] | None = None,
        around_chunk: Callable[[int], AbstractContextManager] | None = None,
        on_layer: Callable[[int], None] | None = None,
        on_output: Callable[[int, Tensor], None] | None = None,
    ) -> None:
        """Run every chunk through every layer, layer by layer.

        Args:
            chunks: what the model is called with, in order.
            spool: folder for what goes from layer to layer. A run that was stopped goes on from there, at the
                layer it was in; it must get the same chunks.
            around_layer: context entered with a layer's number and the layer, while the chunks go through it.
            around_chunk: context entered with a chunk's number, for its forward.
            on_layer: called with a layer's number when all chunks went through, before the layer counts as
                done: results written here are complete when the run goes on behind them.
            on_output: called with a chunk's number and the model's last hidden state (B, S, H). Not for a
                model whose last norm reads more layers than its last layer does.

        Raises:
            UserError: the spool belongs to another run, the disk is full, or an architecture whose layers
                depend on each other in a way that is not seen from outside.
        """
        kept = Spool(spool, self._identity(chunks))
        longest = max(range(len(chunks)), key=lambda number: _positions(chunks[number]))
        for index in range(kept.done, len(self.layers)):
            self._forget_unused(kept, index, longest, chunks[longest])
            with ExitStack() as stack:
                layer = stack.enter_context(self.layer(index))
                stack.enter_context(around_layer(index, layer) if around_layer else nullcontext())
                last = index + 1 == len(self.layers)
                writer = None if last else stack.enter_context(kept.write(index))
                for number, chunk in enumerate(chunks):
                    with around_chunk(number) if around_chunk else nullcontext():
                        given, output = self._call(kept, index, number, chunk)
                    if writer is not None:
                        writer.add(given)
                    if output is not None and on_output is not None:
                        on_output(number, output)
            if on_layer is not None:
                on_layer(index)
            kept.commit(index)

    @contextmanager
    def head(self) -> Iterator[Callable[[Tensor], Tensor]]:
        """What makes logits (B, S, V) of last hidden states (B, S, H), as `run` gives them to `on_output`.

        It is the model's own code, with its scaling or capping; the head's matrix is in memory inside.

        Raises:
            UserError: the model has no head, or the checkpoint none for it.
        """
        if not self.head_name:
            raise UserError(f"{type(self.model).__name__} has no output head", "give a causal language model")
        decoder = submodule(self.model, self.stack.rpartition(".")[0])

        @torch.no_grad()
        def logits(hidden: Tensor) -> Tensor:
            gave = _LastHiddenState(last_hidden_state=hidden)
            ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)  # only their number
            with _replaced(decoder, lambda *_, **__: gave):
                return self.model(input_ids=ids, use_cache=False).logits

        with self._part(self.head_name):
            yield logits

    def layers_done(self, chunks: Sequence[Chunk], spool: Path) -> int:
        """Layers that a stopped run of the same chunks has completed."""
        return Spool(spool, self._identity(chunks)).done

    def _identity(self, chunks: Sequence[Chunk]) -> str:
        """A hash of what the spool's content depends on."""
        digest = hashlib.sha256(f"{self.identity()} {len(chunks)}".encode())
        for chunk in chunks:
            for name in sorted(chunk):
                tensor = chunk[name].detach().cpu().contiguous()
                digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
                digest.update(tensor.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    def _forget_unused(self, kept: Spool, index: int, number: int, chunk: Chunk) -> None:
        """Drop from the spool what the arguments of layer `index` no longer depend on, tried on one chunk."""
        before = range(index)
        if not index:
            return
        gone = [layer for layer in before if not kept.holds(layer)]
        seen = self._arguments(kept, index, number, chunk)
        if gone and _differ(seen, self._arguments(kept, index, number, chunk, gone)):
            raise UserError(
                f"{type(self.model).__name__}: layer {index} depends on a layer before the last one in a "
                "way that did not show there, so its layers cannot be run one at a time",
                NOT_ONE_AT_A_TIME,
            )
        unused = [
            layer
            for layer in before
            if kept.holds(layer) and not _differ(seen, self._arguments(kept, index, number, chunk, [layer]))
        ]
        if index - 1 in unused:
            raise UserError(
                f"{type(self.model).__name__}: layer {index} does not get what layer {index - 1} gives, so "
                "its layers cannot be run one at a time",
                NOT_ONE_AT_A_TIME,
            )
        for layer in unused:
            kept.drop(layer)

    def _arguments(
        self, kept: Spool, index: int, number: int, chunk: Chunk, changed: Sequence[int] = ()
    ) -> list[Tensor]:
        """All tensors that layer `index` is called with, when the layers in `changed` give something else."""
        reached: list[Tensor] = []

        def stop(*args: Any, **kwargs: Any) -> None:
            reached.extend(tensors_in((args, kwargs)))
            raise _Stop

        with self._stand_ins(kept, index, number, changed), _replaced(self.layers[index], stop):
            self._until_stopped(chunk)
        return reached

    def _call(self, kept: Spool, index: int, number: int, chunk: Chunk) -> tuple[Any, Tensor | None]:
        """Chunk `number` through layer `index`: what the layer gave; the model's output if it is the last."""
        given: list[Any] = []
        output: list[Any] = []

        def before(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if any(isinstance(value, Cache) for value in (*args, *kwargs.values())):
                raise UserError(
                    f"{type(self.model).__name__} keeps a cache even when told not to: its layers cannot be "
                    "run one at a time",
                    NOT_ONE_AT_A_TIME,
                )
            given[:] = [{key: dict(holder) for key, holder in _holders(args, kwargs)}]

        def after(_module: nn.Module, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
            was = given.pop()
            put = {key: _news(was[key], holder) for key, holder in _holders(args, kwargs)}
            given.append({"result": result, "put": {key: news for key, news in put.items() if news}})

        def stop(*_: Any, **__: Any) -> None:
            raise _Stop

        def finish(_module: nn.Module, _args: tuple, result: Any) -> None:
            output.append(result)
            raise _Stop

        layers = self.layers
        with ExitStack() as stack:
            stack.enter_context(self._stand_ins(kept, index, number))
            for hook in (
                layers[index].register_forward_pre_hook(before, with_kwargs=True),
                layers[index].register_forward_hook(after, with_kwargs=True),
            ):
                stack.callback(hook.remove)
            if index + 1 < len(layers):
                stack.enter_context(_replaced(layers[index + 1], stop))
            else:
                owner = submodule(self.model, self.stack.rpartition(".")[0])
                stack.callback(owner.register_forward_hook(finish).remove)
            self._until_stopped(chunk)
        if not given or "result" not in given[0]:
            raise UserError(f"{type(self.model).__name__} did not call {self.decoder_layers[index]}")
        last = output[0] if output else None
        hidden = last if last is None or isinstance(last, Tensor) else last[0]
        return given[0], hidden

    def _until_stopped(self, chunk: Chunk) -> None:
        inputs = {name: tensor.to(self.device) for name, tensor in chunk.items()}
        try:
            self.model(**inputs, use_cache=False)
        except _Stop:
            return
        except RuntimeError as error:  # added to in place, where a stand-in is one number seen many times
            if "single memory location" not in str(error):
                raise
            raise UserError(
                f"{type(self.model).__name__} changes what its layers gave: they cannot be run one at a time",
                NOT_ONE_AT_A_TIME,
            ) from None
        raise UserError(f"{type(self.model).__name__} does not call its decoder layers one after the other")

    @contextmanager
    def _stand_ins(self, kept: Spool, index: int, number: int, changed: Sequence[int] = ()) -> Iterator[None]:
        """The layers before `index` give back what they gave on chunk `number`; those in `changed` do not."""
        with ExitStack() as stack:
            for layer in range(index):
                gave = kept.read(layer, number, self.device)
                if layer in changed:
                    gave = map_tensors(gave, _changed)
                stack.enter_context(_replaced(self.layers[layer], _giving(gave)))
            yield


# ---------------------------------------------------------------- standing in for a layer


class _LastHiddenState(MoeModelOutputWithPast):
    """What a decoder gives, of which only the hidden states are known: all else a head asks for is None."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)
        return None


class _Stop(Exception):  # noqa: N818 - not an error: the call has got as far as it was wanted
    """Ends a forward."""


def _giving(gave: dict[str, Any]) -> Callable[..., Any]:
    """A forward that gives back what a layer gave: its result, and what it put into its arguments."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        holders = dict(_holders(args, kwargs))
        for key, news in gave["put"].items():
            holders[key].update(news)
        return gave["result"]

    return forward


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """The module with another forward. It stays the same object: its attributes steer the model's loop."""
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        del vars(module)["forward"]


def _holders(args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Mappings among a layer's arguments, which layers use to leave something for later ones."""
    for key, value in [*((str(index), value) for index, value in enumerate(args)), *kwargs.items()]:
        if hasattr(value, "keys") and hasattr(value, "update"):
            yield key, value


def _news(before: dict[str, Any], holder: Any) -> dict[str, Any]:
    """Entries that are new or another object than before."""
    return {key: value for key, value in dict(holder).items() if before.get(key) is not value}


def _changed(tensor: Tensor) -> Tensor:
    """Another tensor of the same shape and dtype, different in nearly every element; integers stay small."""
    if tensor.is_floating_point() or tensor.is_complex():
        return torch.where(tensor.isfinite(), tensor * -1.5 + 1.25, torch.zeros_like(tensor))
    if tensor.dtype == torch.bool:
        return ~tensor
    return torch.where(tensor == 0, torch.ones_like(tensor), torch.zeros_like(tensor))


def _differ(a: list[Tensor], b: list[Tensor]) -> bool:
    """Whether any tensor is another one; NaN is NaN."""
    if [x.shape for x in a] != [x.shape for x in b]:
        return True
    return any(bool(((x != y) & ((x == x) | (y == y))).any()) for x, y in zip(a, b, strict=True))


def _positions(chunk: Chunk) -> int:
    """S of a chunk."""
    return next(iter(chunk.values())).shape[1]
