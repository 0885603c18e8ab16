"""Let a model answer requests that want tool calls, and judge every answer: which calls, which arguments.

Greedy decoding, batched with left padding. A request goes through the model's own tool format, and the answer
is read back through the same. `failures.py` says what is wrong with an answer; every request, call and answer
is kept: read them.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from moesmith.data.columns import Message, RowError
from moesmith.data.requests import Request
from moesmith.data.tool_format import ToolFormat
from moesmith.data.tool_text import Parsed
from moesmith.errors import UserError

from .failures import FAILURES, RIGHT, classify, matches, problems, wrong_arguments
from .generating import batches, ending, watched
from .greedy import continuations
from .interval import wilson
from .paired import paired
from .prefix import read_beginning

__all__ = [
    "FAILURES", "ToolAnswer", "ToolEval", "answer_batches", "confused", "confusion", "evaluate_tool_calls",
    "paired", "prompts_of",
]  # fmt: skip

NONE, INVENTED, MALFORMED = "(none)", "(invented)", "(malformed)"
BATCH_TOKENS = 16_384  # of prompts and answers in one batch, padding included
MATCHES = ("name_match", "arguments_match", "order_match", "json_valid")


@dataclass
class ToolAnswer:
    """One request and what became of it."""

    id: str
    category: str
    request: str
    """the last user message"""
    expected: list[dict[str, Any]]
    """the calls wanted: name, arguments (argument -> acceptable values), optional (may be left out)"""
    called: list[dict[str, Any]]
    """the calls made: name, arguments"""
    malformed: list[str]
    """calls that were begun and cannot be read, as they came"""
    answer: str
    """as it came, special tokens included"""
    tokens: int
    cut: bool
    """still going at the limit"""
    verdict: str
    """`right`, or a key of `FAILURES`"""
    name_match: bool
    arguments_match: bool
    order_match: bool
    json_valid: bool
    """every call that was begun can be read and is what its tool's schema says"""
    gold: Message | None
    """the right answer as a message; None where only "no call" is known of it"""
    row: int
    prompt: list[Message] = field(default_factory=list)
    any_order: bool = False
    invented: list[str] = field(default_factory=list)
    """names that were called and not offered"""
    wrong: list[str] = field(default_factory=list)
    """tool.argument of arguments that differ"""
    problems: list[str] = field(default_factory=list)
    """what the schemas say against the calls"""

    @property
    def right(self) -> bool:
        """Whether nothing is wrong."""
        return self.verdict == RIGHT


@dataclass
class ToolEval:
    """All answers, in the order of the requests, and what they add up to."""

    records: list[ToolAnswer]
    seconds: float

    @property
    def n(self) -> int:
        """Requests asked."""
        return len(self.records)

    @property
    def right(self) -> int:
        """Answers that are right."""
        return sum(record.right for record in self.records)

    @property
    def rate(self) -> float:
        """Share of right answers."""
        return self.right / self.n

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the rate."""
        return wilson(self.right, self.n)

    def by_category(self) -> list[dict[str, Any]]:
        """name, n, right, rate, interval of each category, in the order they appear."""
        names = list(dict.fromkeys(record.category for record in self.records))
        groups = {name: [record for record in self.records if record.category == name] for name in names}
        return [
            {"name": name, "n": len(group), **_share("right", sum(r.right for r in group), len(group))}
            for name, group in groups.items()
        ]

    def failures(self) -> list[dict[str, Any]]:
        """name, count, rate (of all requests), interval and doc of each failure seen, most frequent first."""
        counts = Counter(record.verdict for record in self.records if not record.right)
        order = sorted(counts, key=lambda name: (-counts[name], list(FAILURES).index(name)))
        return [
            {"name": name, **_share("count", counts[name], self.n), "doc": FAILURES[name]} for name in order
        ]

    def matched(self) -> dict[str, dict[str, Any]]:
        """n, count, rate, interval of name, arguments and order matches, and of valid JSON.

        JSON is counted among the answers that begin a call, the others among the requests that want one.
        """
        found = {}
        for what in MATCHES:
            among = [record for record in self.records if record.expected]
            if what == "json_valid":
                among = [record for record in self.records if record.called or record.malformed]
            hits = sum(getattr(record, what) for record in among)
            found[what] = {"n": len(among), **_share("count", hits, len(among))}
        return found

    def facts(self, records: bool = True) -> dict[str, Any]:
        """Everything for a file; without `records`, the figures alone."""
        facts = {
            "n": self.n,
            "right": self.right,
            "rate": self.rate,
            "interval": self.interval,
            "by_category": self.by_category(),
            "failures": self.failures(),
            "matches": self.matched(),
            "confusion": confusion(self.records),
            "confused": confused(self.records),
            "tokens": sum(record.tokens for record in self.records),
            "cut": sum(record.cut for record in self.records),
            "seconds": self.seconds,
        }
        return {**facts, "records": [asdict(record) for record in self.records]} if records else facts

    @classmethod
    def from_facts(cls, facts: dict[str, Any]) -> ToolEval:
        """Back from `facts`."""
        return cls([ToolAnswer(**record) for record in facts["records"]], facts["seconds"])


def _share(name: str, hits: int, n: int) -> dict[str, Any]:
    """A count with its share of n and the 95 % Wilson interval; nothing of nothing has neither."""
    return {name: hits, "rate": hits / n if n else None, "interval": wilson(hits, n) if n else None}


# ---------------------------------------------------------------- which tool instead of which


def confusion(records: Sequence[ToolAnswer]) -> dict[str, Any]:
    """The first call made against the first call expected.

    Returns:
        expected: the rows' names; called: the columns' names; counts: rows of columns, all answers in all.
        `(none)` is no call, `(invented)` a tool that was not offered, `(malformed)` a call that cannot be
        read where none can.
    """
    pairs = Counter((_first_expected(record), _first_called(record)) for record in records)
    names = sorted({name for pair in pairs for name in pair} - {NONE, INVENTED, MALFORMED})
    expected, called = [*names, NONE], [*names, NONE, INVENTED, MALFORMED]
    return {
        "expected": expected,
        "called": called,
        "counts": [[pairs[row, column] for column in called] for row in expected],
    }


def confused(records: Sequence[ToolAnswer]) -> list[dict[str, Any]]:
    """expected, called, count of first calls that are not the expected one, most frequent first."""
    pairs = Counter((_first_expected(record), _first_called(record)) for record in records)
    wrong = [(pair, count) for pair, count in pairs.items() if pair[0] != pair[1]]
    return [
        {"expected": expected, "called": called, "count": count}
        for (expected, called), count in sorted(wrong, key=lambda item: (-item[1], item[0]))
    ]


def _first_expected(record: ToolAnswer) -> str:
    """Its name. Where any order will do: the one that was called, if it is among them."""
    names = [call["name"] for call in record.expected]
    if record.any_order and _first_called(record) in names:
        return _first_called(record)
    return names[0] if names else NONE


def _first_called(record: ToolAnswer) -> str:
    if record.called:
        name = str(record.called[0]["name"])
        return INVENTED if name in record.invented else name
    return MALFORMED if record.malformed else NONE


# ---------------------------------------------------------------- asking


def evaluate_tool_calls(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    batch_tokens: int = BATCH_TOKENS,
    on_batch: Callable[[int], None] | None = None,
) -> ToolEval:
    """Answer every request greedily and judge it.

    Args:
        model: anything with `generate`, with or without an adapter.
        batch_size: answers at a time, at most.
        batch_tokens: tokens of a batch with its answers and padding, at most; a longer request goes alone.
        on_batch: called with the number of requests done after each batch.

    Raises:
        UserError: no requests, no chat template, a request that the template refuses or that does not fit
            into the model, or logits that are not finite.
    """
    prompts, refused = prompts_of(tokenizer, requests, max_new_tokens, _room(model))
    if refused:
        request, why = refused[0]
        more = f" ({len(refused):,} requests in all)" if len(refused) > 1 else ""
        raise UserError(f"request {request.id} (row {request.row}) cannot be asked: {why}{more}")
    started = time.perf_counter()
    answers: dict[int, ToolAnswer] = {}
    for batch in answer_batches(
        model, tokenizer, requests, prompts,
        batch_size=batch_size, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens,
    ):  # fmt: skip
        answers |= batch
        if on_batch:
            on_batch(len(answers))
    return ToolEval([answers[i] for i in range(len(requests))], time.perf_counter() - started)


def prompts_of(
    tokenizer: Any, requests: Sequence[Request], max_new_tokens: int, room: int | None = None
) -> tuple[list[list[int]], list[tuple[Request, str]]]:
    """Token ids of every request, [] for one that cannot be asked; those, and why.

    Args:
        room: tokens the model can see at once, prompt and answer together.

    Raises:
        UserError: no requests, or no chat template.
    """
    if not requests:
        raise UserError("no requests to evaluate on")
    if tokenizer.chat_template is None:
        raise UserError("the model has no chat template", "requests with tools cannot be asked without one")
    form = ToolFormat.of(tokenizer)
    prompts, refused = [], []
    for request in requests:
        try:
            ids = form.prompt_ids(tokenizer, request.prompt, request.tools)
        except (RowError, UserError) as error:
            refused.append((request, getattr(error, "message", str(error))))
            ids = []
        if room is not None and len(ids) + max_new_tokens > room:
            asked = f"{len(ids):,} tokens and {max_new_tokens} for the answer"
            refused.append((request, f"too long for the model: {asked}, it sees {room:,}"))
            ids = []
        prompts.append(ids)
    return prompts, refused


def answer_batches(
    model: Any,
    tokenizer: Any,
    requests: Sequence[Request],
    prompts: Sequence[Sequence[int]],
    *,
    batch_size: int = 16,
    max_new_tokens: int = 128,
    batch_tokens: int = BATCH_TOKENS,
    done: Mapping[int, ToolAnswer] | None = None,
) -> Iterator[dict[int, ToolAnswer]]:
    """index -> judged answer, batch after batch; requests of similar length together, longest first.

    Args:
        prompts: token ids per request.
        done: answers there are already; a batch that has all of its own is not asked again, any other is
            asked whole: rounding may depend on the batch.

    Raises:
        UserError: logits that are not finite.
    """
    form, done = ToolFormat.of(tokenizer), done or {}
    was_training = model.training
    model.eval()
    try:
        with ending(model, tokenizer), watched(model) as watch:
            reader = None
            for batch in batches([len(ids) + max_new_tokens for ids in prompts], batch_size, batch_tokens):
                if all(i in done for i in batch):
                    yield {i: done[i] for i in batch}
                    continue
                reader = read_beginning(model, prompts) if reader is None else reader
                watch.start(len(batch))
                said = continuations(reader, tokenizer, [prompts[i] for i in batch], max_new_tokens)
                watch.check([requests[i] for i in batch])
                yield {
                    i: judge(form, tokenizer, requests[i], ids, cut=not ended)
                    for i, (ids, ended) in zip(batch, said, strict=True)
                }
    finally:
        model.train(was_training)


def judge(form: ToolFormat, tokenizer: Any, request: Request, ids: Sequence[int], cut: bool) -> ToolAnswer:
    """One answer, given as token ids without the one that ended it, against its request."""
    text = tokenizer.decode(ids, skip_special_tokens=False)
    parsed = form.parse(text, request.tools)
    for token in tokenizer.all_special_tokens:  # a stray one is no words
        parsed.text = parsed.text.replace(token, " ")
    return judge_parsed(request, parsed, text, len(ids), cut)


def judge_parsed(request: Request, parsed: Parsed, answer: str, tokens: int, cut: bool) -> ToolAnswer:
    """An answer that is taken apart already; `answer` is how it came, of `tokens` tokens."""
    expected, order = request.expected, request.any_order
    found = matches(expected, parsed, request.tools, order)
    return ToolAnswer(
        id=request.id,
        category=request.category,
        request=request.text,
        expected=[one.facts() for one in expected],
        called=[asdict(call) for call in parsed.calls],
        malformed=parsed.malformed,
        answer=answer,
        tokens=tokens,
        cut=cut,
        verdict=classify(expected, parsed, cut, request.tools, answer, order),
        name_match=found.names,
        arguments_match=found.arguments,
        order_match=found.order,
        json_valid=found.json_valid,
        gold=request.gold,
        row=request.row,
        prompt=request.prompt,
        any_order=order,
        invented=[call.name for call in parsed.calls if call.name not in request.tools],
        wrong=wrong_arguments(expected, parsed.calls, order),
        problems=problems(parsed.calls, request.tools),
    )


def _room(model: Any) -> int | None:
    """Tokens the model can see at once; None where it does not say."""
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(config, "max_position_embeddings", None)
