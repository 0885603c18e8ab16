"""The model behind the server: one set of weights, a name for it and one for every adapter on it.

Everybody who runs the model takes a turn first, in the order of asking, and finds the adapter of the name
on: the loops that write answers (`batching.py`; `serial.py` for classes that cannot be batched), and whoever
uses `exclusive`. The last answers are kept in memory, for a look at their routing.
"""

from __future__ import annotations

import gc
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moesmith.errors import UserError

from . import memory
from .sampling import Sampling, Token
from .schema import STOPS

if TYPE_CHECKING:
    from .batching import Batched, Event
    from .calls import Speaker
    from .serial import Serial

KEPT = 64
CHUNK = 256  # tokens of a scoring forward: their logits are the largest thing in it


@dataclass(frozen=True)
class Served:
    """A name that clients ask for."""

    name: str
    adapter: str | None
    """PEFT's name of the adapter; None is the base"""
    tokenizer: Any
    """the adapter's own, if it brings one"""


@dataclass(frozen=True)
class Kept:
    """An answer that was given."""

    name: str
    prompt: list[int]
    answer: list[int]
    pieces: list[str]
    """the text of every token of the answer"""

    def __iter__(self) -> Iterator[Any]:
        return iter((self.name, self.prompt, self.answer, self.pieces))


class Turns:
    """A lock that is given in the order of asking. A thread may take it again while it has it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._last = self._now = self._depth = 0
        self._owner: int | None = None

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._owner == me:
            self._depth += 1
            return
        with self._changed:
            ticket = self._last
            self._last += 1
            self._changed.wait_for(lambda: self._now == ticket)
            self._owner, self._depth = me, 1

    def __exit__(self, *error: object) -> None:
        with self._changed:
            self._depth -= 1
            if self._depth == 0:
                self._owner = None
                self._now += 1
                self._changed.notify_all()


class Engine:
    """Answers of one model under several names.

    Args:
        model: a causal LM in eval mode; or PEFT's wrapper around one, with every adapter of `served` loaded.
        served: the names, the base's first.
        context: the longest prompt and answer together, in tokens.
        slots: answers of one name that are written at once.
        serial: one answer at a time, without continuous batching; None finds out whether that is needed.

    Raises:
        UserError: `context` or `slots` are out of range, there is no memory for them, or two names are the
            same.
    """

    def __init__(
        self,
        model: Any,
        served: list[Served],
        *,
        context: int = 4096,
        slots: int = 8,
        serial: bool | None = None,
    ):
        from .calls import Speaker

        if slots < 1:
            raise UserError(f"slots={slots} must be at least 1")
        if context < 2:
            raise UserError(f"context={context} must be at least 2 tokens")
        names = [one.name for one in served]
        if len(set(names)) < len(names):
            raise UserError(f"two models have one name: {', '.join(names)}", "give each adapter its own name")
        self._peft = model if hasattr(model, "peft_config") else None
        self.model = (self._peft.base_model.model if self._peft is not None else model).eval()
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        self.served = {one.name: one for one in served}
        self.speakers: dict[str, Speaker] = {
            one.name: Speaker.of(one.tokenizer, self.model.generation_config) for one in served
        }
        self.vocabulary = int(self.model.get_input_embeddings().weight.shape[0])
        self.context, self.slots = context, slots
        self.started = time.time()
        self.stopping = False
        self.transfers: Any = None
        """what counts the experts that are fetched for answers; whoever loaded the model sets it"""
        self.why_serial: str | None = "asked for" if serial else None
        self._turns = Turns()
        self._active: str | None | object = _UNKNOWN
        self._attention = self.model.config._attn_implementation
        self._voices: dict[str, Batched | Serial] = {}
        self._voices_lock = threading.Lock()
        self._where: dict[str, Batched | Serial] = {}
        self._kept: OrderedDict[str, Kept] = OrderedDict()
        self.free = memory.free(self.model.get_input_embeddings().weight.device)
        """bytes that could be taken before there was a cache"""
        if not serial:
            self._check_memory()
        if serial is None:
            self.why_serial = self._cannot_batch()

    # ------------------------------------------------------------ answers

    def submit(self, name: str, prompt: list[int], how: Sampling, tell: Callable[[Event], None]) -> str:
        """Begin an answer; `tell` is called in another thread with every token and with the end.

        Args:
            prompt: token ids; with how.max_new_tokens they fit into the context.

        Raises:
            RuntimeError: the engine is stopping.
        """
        from .batching import Job

        request = uuid.uuid4().hex

        def told(event: Event) -> None:
            if event.finish is not None:
                self._where.pop(request, None)
            tell(event)

        for _ in range(2):  # a loop that has died is replaced once
            voice = self._voice(name)
            self._where[request] = voice
            if voice.submit(Job(request, prompt, how, told)):
                return request
            self._where.pop(request, None)
        raise RuntimeError("the model takes no requests")

    def cancel(self, request: str) -> None:
        """Stop an answer; nothing more is told about it. Does nothing if it has ended."""
        voice = self._where.pop(request, None)
        if voice is not None:
            voice.cancel(request)

    def active(self) -> int:
        """Answers that have not ended."""
        return len(self._where)

    def cache_bytes(self) -> int:
        """Bytes of one name's paged cache; 0 if there is none."""
        with self._voices_lock:
            return max((voice.cache_bytes() for voice in self._voices.values()), default=0)

    def stop(self, timeout: float = 30.0) -> bool:
        """End every loop; answers that are being written end with an error.

        Returns:
            whether all have ended: a forward that is under way is waited for, up to `timeout` seconds.
        """
        self.stopping = True
        return self._end_loops(timeout)

    def abandon(self) -> None:
        """Take nothing more, and end every answer with an error: the server cannot wait any longer."""
        self.stopping = True
        with self._voices_lock:
            for voice in self._voices.values():
                voice.abandon()

    def _end_loops(self, timeout: float) -> bool:
        # Every manager that ends collects garbage twice, 0.3 s each with these libraries loaded.
        gc.freeze()
        try:
            with self._voices_lock:
                ended = [voice.stop(timeout) for voice in self._voices.values()]
                self._voices.clear()
                return all(ended)
        finally:
            gc.unfreeze()

    def _voice(self, name: str) -> Batched | Serial:
        with self._voices_lock:
            if self.stopping:
                raise RuntimeError(STOPS)
            voice = self._voices.get(name)
            if voice is None or not voice.alive:
                if voice is not None:
                    voice.stop(1.0)
                voice = self._voices[name] = self._new_voice(name)
            return voice

    def _new_voice(self, name: str) -> Batched | Serial:
        if self.why_serial is not None:
            from .serial import Serial

            return Serial(self.model, lambda: self.exclusive(name), self.slots)
        from .batching import Batched

        return Batched(self.model, lambda: self._turn(name), self.context, self.slots)

    # ------------------------------------------------------------ the model itself

    @contextmanager
    def _turn(self, name: str) -> Iterator[None]:
        with self._turns:
            self._activate(self.served[name].adapter)
            yield

    def _activate(self, adapter: str | None) -> None:
        if self._peft is None or adapter == self._active:
            return
        tuner = self._peft.base_model
        if adapter is None:
            tuner.disable_adapter_layers()
        else:
            tuner.enable_adapter_layers()
            tuner.set_adapter(adapter, inference_mode=True)
        self._active = adapter

    @contextmanager
    def exclusive(self, name: str) -> Iterator[Any]:
        """The model for the caller alone, with the adapter of `name` on and without gradients."""
        import torch

        with self._turn(name), torch.no_grad():
            batched = self.model.config._attn_implementation
            if batched != self._attention:  # the loops' attention reads a paged cache only
                self.model.set_attn_implementation(self._attention)
            try:
                yield self.model
            finally:
                if batched != self._attention:
                    self.model.set_attn_implementation(batched)

    def score(self, name: str, ids: list[int], top: int) -> list[Token]:
        """Every token of `ids` with its log-probability after those before it; the first has none.

        One forward in parts, so that the logits of a long text do not have to fit into memory.
        """
        import torch
        from transformers import DynamicCache

        from .sampling import report

        found = [Token(ids[0])]
        device = self.model.get_input_embeddings().weight.device
        with self.exclusive(name) as model:
            short = len(ids) <= CHUNK
            cache = None if short else DynamicCache(config=model.config.get_text_config())
            for start in range(0, len(ids), CHUNK):
                part = torch.tensor([ids[start : start + CHUNK]], device=device)
                # Some classes make positions of the mask, and other ones without it.
                seen = torch.ones((1, start + part.shape[1]), dtype=torch.long, device=device)
                out = model(input_ids=part, attention_mask=seen, past_key_values=cache, use_cache=not short)
                following = ids[start + 1 : start + 1 + CHUNK]
                for row, token in zip(out.logits[0].float(), following, strict=False):
                    found.append(report(row, token, top))
        return found

    # ------------------------------------------------------------ kept answers

    def keep(self, key: str, name: str, prompt: list[int], answer: list[int]) -> None:
        """Remember an answer under an id that clients know."""
        pieces = self.speakers[name].pieces(answer)
        self._kept[key] = Kept(name, prompt, answer, pieces)
        while len(self._kept) > KEPT:
            self._kept.popitem(last=False)

    def kept(self, key: str) -> Kept:
        """One of the last answers: (name, prompt ids, answer ids, the answer's tokens as text).

        Raises:
            KeyError: there is none, or no longer.
        """
        return self._kept[key]

    def kept_count(self) -> int:
        """Answers that are remembered."""
        return len(self._kept)

    def held(self) -> int:
        """Requests that the loops know of: none when nothing is being written."""
        with self._voices_lock:
            return sum(len(voice.jobs) for voice in self._voices.values())

    # ------------------------------------------------------------ can it be batched?

    def _cannot_batch(self) -> str | None:
        """Why continuous batching does not work for this model; None if it does.

        A class may refuse (linear attention), or take part and compute something else: a few tokens are
        written and scored again by a plain forward.
        """
        import queue

        name = next(iter(self.served))
        limit = min(48, self.context - 8)
        prompt = [(7 * i + 3) % min(self.vocabulary, 1000) for i in range(max(limit, 1))]
        events: queue.Queue[Event] = queue.Queue()
        tokens: list[Token] = []
        try:
            self.submit(
                name, prompt, Sampling(min(8, self.context - len(prompt)), top_logprobs=0), events.put
            )
            while True:
                event = events.get(timeout=600)
                tokens += event.tokens
                if event.finish == "error":
                    return self._give_up(event.error or "it failed")
                if event.finish is not None:
                    break
        except (ValueError, TypeError, AttributeError, KeyError, NotImplementedError, RuntimeError) as error:
            # Whatever the library trips over is about this class.
            return self._give_up(f"{type(error).__name__}: {error}")
        again = self.score(name, prompt + [token.id for token in tokens], 0)[len(prompt) :]
        apart = [abs((a.logprob or 0) - (b.logprob or 0)) for a, b in zip(tokens, again, strict=True)]
        if sum(apart) / len(apart) > 0.5:
            return self._give_up(f"log-probabilities differ by {max(apart):.2g}")
        return None

    def _check_memory(self) -> None:
        wanted = memory.cache_bytes(self.model, self.context, self.slots)
        if wanted is None or wanted <= self.free:
            return
        share = 0.9 * self.free / wanted
        fits = memory.context_of(int(share * memory.pages(self.context, self.slots)), self.slots)
        raise UserError(
            f"no memory for {self.slots:,} answers of {self.context:,} tokens: their cache takes "
            f"{wanted / 1e9:,.1f} GB for each name, {self.free / 1e9:,.1f} GB are free",
            f"--context {fits} would fit; or lower --slots" if fits > 0 else "lower --slots and --context",
        )

    def _give_up(self, why: str) -> str:
        self._end_loops(30.0)
        self._where.clear()
        if "out of memory" in why or "can't allocate memory" in why:
            said = " ".join(why.split())[:200]
            raise UserError(
                f"no memory for {self.slots} answers of {self.context:,} tokens: {said}",
                "lower --slots or --context: both size the cache",
            )
        if self.model.config._attn_implementation != self._attention:
            self.model.set_attn_implementation(self._attention)
        return " ".join(why.split())[:200]


_UNKNOWN = object()
