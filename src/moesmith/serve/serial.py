"""One answer after the other with `generate`, for classes that continuous batching cannot hold.

Layers with a recurrent state (linear attention, state-space models) have no paged cache. Their requests wait
in a line; the one whose turn it is has the model until its end.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from .batching import Event, Job
from .sampling import choose
from .schema import STOPS


class _Choose(LogitsProcessor):
    """Leaves the one token that the request's settings choose."""

    def __init__(self, job: Job):
        self.job = job

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        token = choose(scores[0].float(), self.job.how, self.job.ids)
        self.job.tokens.append(token)
        only = torch.full_like(scores, -torch.inf)
        only[0, token.id] = 0.0
        return only


class _Tell(StoppingCriteria):
    """Tells of every token, and ends an answer that nobody wants any longer."""

    def __init__(self, job: Job, unwanted: Callable[[], bool]):
        self.job, self.unwanted = job, unwanted

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        unwanted = self.unwanted()
        new = tuple(self.job.tokens[self.job.told :])
        self.job.told += len(new)
        ended = bool(new) and new[-1].id in self.job.how.stop_ids
        if new and not unwanted:
            self.job.tell(Event(new))
        return torch.tensor([unwanted or ended], device=input_ids.device)


class Serial:
    """Requests of one name in a line.

    Args:
        alone: a context manager that takes the model for itself with this name's adapter on.
    """

    def __init__(self, model: Any, alone: Callable[[], AbstractContextManager[Any]], slots: int):
        self.model, self.alone = model, alone
        self.jobs: dict[str, Job] = {}
        self._line: queue.Queue[Job | None] = queue.Queue()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="moesmith-serial", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the loop runs."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, job: Job) -> bool:
        """Take a request; False if the loop has ended."""
        if not self.alive:
            return False
        self.jobs[job.id] = job
        self._line.put(job)
        return True

    def cancel(self, request: str) -> None:
        """Forget a request: nothing more is told about it."""
        self.jobs.pop(request, None)

    def cache_bytes(self) -> int:
        """No cache outlives its answer."""
        return 0

    def stop(self, timeout: float) -> bool:
        """End the loop; requests that are still there are told of an error. Whether it has ended."""
        self._stopping = True
        self._line.put(None)
        self.abandon()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def abandon(self) -> None:
        """Tell every request that its answer ends here."""
        for request in list(self.jobs):
            job = self.jobs.pop(request, None)
            if job is not None:
                job.tell(Event(finish="error", error=STOPS))

    def _run(self) -> None:
        while (job := self._line.get()) is not None:
            if job.id not in self.jobs:
                continue
            try:
                self._answer(job)
            except Exception as error:  # whatever a model raises ends this answer, not the server
                end = Event(finish="error", error=f"{type(error).__name__}: {error}")
            else:
                stopped = bool(job.tokens) and job.tokens[-1].id in job.how.stop_ids
                end = Event(finish="stop" if stopped else "length")
            if self.jobs.pop(job.id, None) is not None:
                job.tell(end)

    def _answer(self, job: Job) -> None:
        with self.alone() as model:
            ids = torch.tensor([job.prompt], device=model.get_input_embeddings().weight.device)
            model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=job.how.max_new_tokens,
                min_new_tokens=None,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=None,
                pad_token_id=0,
                logits_processor=LogitsProcessorList([_Choose(job)]),
                stopping_criteria=StoppingCriteriaList([_Tell(job, lambda: job.id not in self.jobs)]),
            )
