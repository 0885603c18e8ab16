"""transformers' continuous batching under one name: the model with one adapter, or without.

Every name has a manager of its own (a loop in a thread, and a paged cache) over the same weights. The
manager is handed a `Voice` in place of the model: its forward takes the model for itself and puts the name's
adapter on first. The manager's logits processors are replaced by `Chooser`, which gives every request its own
settings; transformers' own are built only for options that differ from a default, share one random stream,
and have no greedy request beside a sampled one.

Needs synchronous batches (no double buffering, no graph): a choice is made on the host, row by row.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation.configuration_utils import ContinuousBatchingConfig
from transformers.generation.continuous_batching.cb_logits_processors import (
    ContinuousBatchingLogitsProcessorList,
)
from transformers.generation.continuous_batching.continuous_api import ContinuousBatchingManager, OutputRouter
from transformers.generation.continuous_batching.requests import RequestStatus

from .memory import PAGE, pages
from .sampling import Sampling, Token, choose
from .schema import STOPS

BATCH_TOKENS = 512  # a longer prompt is read in parts of this, so that others' answers go on in between


@dataclass(frozen=True)
class Event:
    """Something that happened to a request: tokens came, or it ended. `finish` is None while it goes on."""

    tokens: tuple[Token, ...] = ()
    finish: str | None = None
    """stop, length or error"""
    error: str | None = None


@dataclass
class Job:
    """A request on its way."""

    id: str
    prompt: list[int]
    how: Sampling
    tell: Callable[[Event], None]
    """called in the loop's thread; must be quick and must not raise"""
    tokens: list[Token] = field(default_factory=list)
    told: int = 0
    started: float = field(default_factory=time.perf_counter)

    @property
    def ids(self) -> list[int]:
        """The answer's token ids."""
        return [token.id for token in self.tokens]


class Chooser(ContinuousBatchingLogitsProcessorList):
    """Leaves one token per row: the one that its request's settings choose."""

    def __init__(self, jobs: dict[str, Job]):
        super().__init__(LogitsProcessorList())
        self.do_processing = True
        self.jobs = jobs
        self._rows: list[str] = []

    def prepare_tensor_args(self, requests_in_batch: list[Any], arg_storage: Tensor) -> Tensor:
        self._rows = [one.state.request_id for one in requests_in_batch if one.has_new_token]
        return arg_storage

    def __call__(self, input_ids: Tensor, scores: Tensor, logits_processor_args: Tensor) -> Tensor:
        # A prompt that is not read to its end yet has a row too, after all others, and gets no token.
        chosen = [0] * len(scores)
        for index, request in enumerate(self._rows):
            job = self.jobs.get(request)
            if job is None:  # cancelled while this batch was on its way
                continue
            token = choose(scores[index], job.how, job.ids)
            job.tokens.append(token)
            chosen[index] = token.id
        only = torch.full_like(scores, -torch.inf)
        return only.scatter_(1, torch.tensor(chosen, device=scores.device)[:, None], 0.0)


class Voice:
    """The shared model as one name's manager sees it."""

    def __init__(self, model: Any, turn: Callable[[], AbstractContextManager[Any]]):
        self._model, self._turn = model, turn

    def __call__(self, **batch: Any) -> Any:
        with self._turn():
            return self._model(**batch)

    def eval(self) -> Voice:
        return self

    def __getattr__(self, key: str) -> Any:
        return getattr(self._model, key)


class Router(OutputRouter):
    """Takes a manager's outputs to `take`, in the loop's thread; nothing piles up when nobody listens."""

    def __init__(self, take: Callable[[Any], None]):
        super().__init__()
        self._take = take

    def deliver(self, output: Any) -> None:
        self._take(output)

    def deliver_batch(self, outputs: list[Any]) -> None:
        for output in outputs:
            self._take(output)


class Batched:
    """Requests of one name, batched continuously.

    Args:
        model: the shared model, without PEFT's wrapper.
        turn: a context manager that takes the model and puts this name's adapter on.
        context: the longest prompt and answer together, in tokens.
        slots: how many answers are written at once.
    """

    def __init__(self, model: Any, turn: Callable[[], AbstractContextManager[Any]], context: int, slots: int):
        self.jobs: dict[str, Job] = {}
        self._lock = threading.Lock()
        config = ContinuousBatchingConfig(
            page_size=PAGE,
            # By default the cache takes nearly all the memory there is.
            num_blocks=pages(context, slots),
            max_batch_tokens=max(BATCH_TOKENS, slots),
            max_requests_per_batch=slots,
            use_async_batching=False,
            use_cuda_graph=False,
        )
        settings = GenerationConfig(do_sample=False, eos_token_id=-1, max_new_tokens=16)
        self.manager = ContinuousBatchingManager(Voice(model, turn), settings, config)  # type: ignore[arg-type]
        self.manager.logit_processor = Chooser(self.jobs)
        self.manager.output_router = Router(self._take)
        self.manager.start()

    @property
    def alive(self) -> bool:
        """Whether the loop runs. An exception in a forward ends it."""
        return self.manager.is_running() and self.manager.background_thread_status.fatal_error is None

    def submit(self, job: Job) -> bool:
        """Take a request; False if the loop has ended."""
        with self._lock:
            self.jobs[job.id] = job
        taken = self.manager.add_request(
            job.prompt,
            request_id=job.id,
            max_new_tokens=job.how.max_new_tokens,
            streaming=True,
            eos_token_id=sorted(job.how.stop_ids) or -1,
        )
        if taken is None:
            self._pop(job.id)
        return taken is not None

    def cancel(self, request: str) -> None:
        """Forget a request: nothing more is told about it."""
        if self._pop(request) is not None:
            self.manager.cancel_request(request)

    def cache_bytes(self) -> int:
        """Bytes of the paged cache."""
        processor = self.manager.batch_processor
        return int(processor.cache.cache_tensor.nbytes) if processor is not None else 0

    def stop(self, timeout: float) -> bool:
        """End the loop; requests that are still there are told of an error. Whether it has ended."""
        if self.manager.is_running():
            self.manager.stop(block=True, timeout=timeout, hard_stop=True)
        self.abandon()
        return not self.manager.is_running()

    def abandon(self) -> None:
        """Tell every request that its answer ends here."""
        for request in list(self.jobs):
            job = self._pop(request)
            if job is not None:
                job.tell(Event(finish="error", error=STOPS))

    def _pop(self, request: str) -> Job | None:
        with self._lock:
            return self.jobs.pop(request, None)

    def _take(self, output: Any) -> None:
        job = self.jobs.get(output.request_id)
        if job is None:
            return
        new = tuple(job.tokens[job.told : len(output.generated_tokens)])
        job.told += len(new)
        if not output.is_finished():
            if new:
                job.tell(Event(new))
            return
        self._pop(job.id)
        if output.status == RequestStatus.FAILED:
            job.tell(Event(new, "error", output.error or "the answer failed"))
        else:
            stopped = bool(job.tokens) and job.tokens[-1].id in job.how.stop_ids
            job.tell(Event(new, "stop" if stopped else "length"))
