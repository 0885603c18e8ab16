"""Ask a model requests that want tool calls.

Every request is answered greedily through the model's own tool format and judged against the calls its row
ends in: the right tools, with the right arguments, in the right order. answers.jsonl has every answer.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moesmith
from moesmith import console
from moesmith.config import write_atomically
from moesmith.errors import UserError
from moesmith.jobs.eval import (
    adapter_digest,
    check_server,
    command,
    load,
    machine,
    name_of,
    read_tokenizer,
    source_of,
)

if TYPE_CHECKING:
    from moesmith.data.prepare import Counts
    from moesmith.data.requests import Request
    from moesmith.eval.served import Server
    from moesmith.eval.tool_calls import ToolAnswer, ToolEval
    from moesmith.jobs._eval import Unfinished
    from moesmith.jobs.eval import Config


@dataclass
class Asked:
    """Whom is asked what, and what was left out."""

    requests: list[Request]
    counts: Counts
    name: str
    about: dict[str, Any]
    """model, adapter, server: for the record"""
    identity: dict[str, Any]
    """everything the answers depend on, as JSON values"""
    prompts: list[list[int]] = field(default_factory=list)
    """token ids of every request; a server makes its own"""
    left_out: dict[str, int] = field(default_factory=dict)
    """requests that this model cannot be asked, by reason"""
    load: Callable[[], Any] | None = None
    """the model, ready to answer"""
    tokenizer: Any = None
    server: Server | None = None


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused: files that are not there, a place that is taken."""
    from moesmith.config import no_such_file
    from moesmith.jobs._eval import RECORD, check_run
    from moesmith.jobs._folder import check_place
    from moesmith.models.checkpoint import local_folder

    for path, key in ((cfg.requests, "requests"), (cfg.tools, "tools")):
        if path is not None and not path.expanduser().is_file():
            raise no_such_file(path, key)
    check_server(cfg)
    if cfg.server is None:
        local_folder(source_of(cfg)[0])
    check_place(cfg.out, None, cfg.overwrite, RECORD)
    if cfg.against is not None:
        check_run(cfg.against)


def run(cfg: Config) -> None:
    from moesmith.eval.tool_calls import ToolEval, paired
    from moesmith.jobs._eval import Unfinished, read_run, say, say_paired
    from moesmith.jobs._folder import check_place

    check_place(cfg.out, None, cfg.overwrite, "eval.json")
    asked = at_server(cfg) if cfg.server is not None else in_memory(cfg)
    earlier = read_run(cfg.against) if cfg.against is not None else None
    if earlier is not None:
        check_against(cfg, earlier, asked.requests)
    unfinished = Unfinished(cfg.out)
    done = unfinished.open(asked.identity, cfg.overwrite)
    if done:
        console.note(f"going on with an interrupted run: {len(done):,} answers are there")
    answers, seconds = answer(asked, done, unfinished, cfg)
    evaluation = ToolEval([answers[i] for i in range(len(asked.requests))], seconds)
    say(evaluation)
    compared = None
    if earlier is not None:
        compared = {"a": earlier[1]["name"], "b": asked.name, **paired(earlier[0], evaluation)}
        say_paired(earlier[1]["name"], earlier[0], evaluation, compared)

    facts = {
        "command": "eval",
        "name": asked.name,
        **asked.about,
        "requests": {
            "path": str(cfg.requests), "asked": asked.identity["requests"], "rows": asked.counts.facts(),
            "left_out": asked.left_out,
        },
        "tools": tools_of(asked.requests),
        "tool_calls": evaluation.facts(records=False),
        "paired": compared,
        "config": cfg.model_dump(mode="json"),
        "how": how(cfg, asked),
    }  # fmt: skip
    write(cfg, facts, evaluation, earlier)
    unfinished.remove()
    console.row(
        "written", ", ".join(f"{cfg.out}/{name}" for name in ("answers.jsonl", "eval.json", "report.html"))
    )
    console.next_command(following(cfg, evaluation))
    console.emit({"out": str(cfg.out), "report": str(cfg.out / "report.html"), **facts})


# ---------------------------------------------------------------- what is asked


def read(cfg: Config) -> tuple[list[Request], Counts]:
    """The requests, with all counts said."""
    from moesmith.data.requests import describe_requests, read_requests
    from moesmith.data.tools import read_tools

    assert cfg.requests is not None  # Config saw to it
    tools = read_tools(cfg.tools) if cfg.tools is not None else None
    requests, counts = read_requests(cfg.requests, tools)
    for i, line in enumerate(describe_requests(requests, counts)):
        console.row("" if i else "requests", line, width=10)
    if cfg.limit is not None and cfg.limit < len(requests):
        console.row("", f"{cfg.limit:,} of them are asked (--limit)", width=10)
        requests = [requests[i * len(requests) // cfg.limit] for i in range(cfg.limit)]
    return requests, counts


def in_memory(cfg: Config) -> Asked:
    """A model of ours: its requests as token ids. No weight is read yet.

    Raises:
        UserError: no request that can be asked.
    """
    from moesmith.data.tool_format import ToolFormat
    from moesmith.eval.tool_calls import prompts_of
    from moesmith.jobs._folder import check_place
    from moesmith.models.checkpoint import resolve
    from moesmith.models.identity import model_hash

    assert cfg.max_new_tokens is not None
    source, base = source_of(cfg)
    folder = resolve(source)
    check_place(cfg.out, folder, cfg.overwrite, "eval.json")
    tokenizer, room = read_tokenizer(folder, cfg)
    requests, counts = read(cfg)
    prompts, refused = prompts_of(tokenizer, requests, cfg.max_new_tokens, room)
    left_out: dict[str, int] = {}
    for _, why in refused:
        left_out[why.split(":")[0]] = left_out.get(why.split(":")[0], 0) + 1
    if len(refused) == len(requests):
        request, why = refused[0]
        raise UserError(f"none of {len(requests):,} requests can be asked: {request.id}, {why}")
    for why, count in left_out.items():
        first = next(request for request, reason in refused if reason.startswith(why))
        console.warn(f"{count:,} requests are left out: {why} (first: {first.id})")
    longest = max(map(len, prompts))
    kind = ToolFormat.of(tokenizer).kind
    console.row("format", f"{FORMATS[kind]} · prompts of up to {longest:,} tokens", width=10)
    kept = [i for i, ids in enumerate(prompts) if ids]
    requests, prompts = [requests[i] for i in kept], [prompts[i] for i in kept]
    model, adapter = model_hash(folder), None if cfg.adapter is None else adapter_digest(cfg.adapter)
    options = ("batch_size", "batch_tokens", "scheme", "dtype")
    identity = {
        "model": model,
        "adapter": adapter,
        **what_is_asked(cfg, requests, prompts),
        **{name: getattr(cfg, name) for name in options},
    }
    about = {
        "model": {"given": source, "folder": str(folder), "hash": model},
        "adapter": cfg.adapter and {"folder": str(cfg.adapter.resolve()), "digest": adapter},
    }
    return Asked(
        requests, counts, name_of(cfg, source), about, identity, prompts, left_out,
        load=lambda: load(source, base, cfg), tokenizer=tokenizer,
    )  # fmt: skip


def at_server(cfg: Config) -> Asked:
    """A model behind a server, which makes its prompts and reads its calls itself.

    Raises:
        UserError: the server is not there.
    """
    from moesmith.eval.served import Server
    from moesmith.eval.served_calls import as_openai

    assert cfg.server is not None
    server = Server.find(cfg.server, cfg.server_model)
    server.say = console.warn
    name = server.about.get("file") or Path(server.model).name or server.model
    words = f"{server.name} at {server.url} · {name} · {cfg.concurrency} at a time"
    console.row("server", words, width=10)
    requests, counts = read(cfg)
    identity = {
        "server": {"model": server.model, "kind": server.kind, **server.about},
        **what_is_asked(cfg, requests, [as_openai(request.prompt) for request in requests]),
    }
    about = {"model": None, "adapter": None, "server": server.facts()}
    return Asked(requests, counts, name, about, identity, server=server)


FORMATS = {
    "schema": "the chat template's own tool calls",
    "derived": "the chat template's own tool calls, read back as it writes them",
    "plain": "the chat template has no tool calls: they are JSON between <tool_call> tags",
}


def tools_of(requests: Sequence[Request]) -> list[dict[str, Any]]:
    """Every tool that is offered, once; of two that share a name, the first."""
    found: dict[str, dict[str, Any]] = {}
    seen: set[int] = set()
    for request in requests:
        if id(request.tools) not in seen:
            seen.add(id(request.tools))
            for tool in request.tools:
                found.setdefault(tool.name, tool.openai())
    return list(found.values())


def what_is_asked(cfg: Config, requests: Sequence[Request], prompts: Sequence[Any]) -> dict[str, Any]:
    """What the answers depend on beside the model, as JSON values; `prompts` as the model gets them."""
    digest = hashlib.sha256()
    for request, prompt in zip(requests, prompts, strict=True):
        expected = [one.facts() for one in request.expected]
        said = [request.id, request.category, prompt, request.gold, expected, request.any_order]
        digest.update(json.dumps([*said, request.tools.openai()], default=str).encode() + b"\n")
    return {
        "requests": digest.hexdigest()[:32],
        "max_new_tokens": cfg.max_new_tokens,
        "version": moesmith.__version__,
    }


def check_against(cfg: Config, earlier: tuple[ToolEval, dict[str, Any]], requests: Sequence[Request]) -> None:
    """Raise UserError when the earlier run answered other requests; say when it was asked in another way."""
    from moesmith.eval.paired import same_ids

    same_ids({record.id for record in earlier[0].records}, {request.id for request in requests})
    for name in ("max_new_tokens", "batch_size", "batch_tokens", "dtype"):
        then, now = earlier[1]["config"].get(name), getattr(cfg, name)
        if then != now:
            flag = "--" + name.replace("_", "-")
            console.warn(f"{cfg.against} had {flag} {then}, this run has {now}: answers may differ by that")


# ---------------------------------------------------------------- the answers


def answer(
    asked: Asked, done: dict[int, ToolAnswer], unfinished: Unfinished, cfg: Config
) -> tuple[dict[int, ToolAnswer], float]:
    """Every request's judged answer, each batch kept on disk as it comes; and the seconds this took."""
    if len(done) == len(asked.requests):
        return done, 0.0
    answers: dict[int, ToolAnswer] = dict(done) if asked.server is not None else {}
    batches = from_server(asked, done, cfg) if asked.server is not None else from_model(asked, done, cfg)
    started, tokens = time.perf_counter(), 0
    with console.bar("answering", total=len(asked.requests)) as bar:
        for batch in batches:
            new = {i: record for i, record in batch.items() if done.get(i) is not record}
            if new:
                unfinished.add(new)
            answers |= batch
            tokens += sum(record.tokens for record in new.values())
            right = sum(record.right for record in answers.values())
            rate = tokens / (time.perf_counter() - started)
            bar.update(len(answers), f"{len(answers):,} answers, {right:,} right · {rate:.0f} tok/s")
    seconds = time.perf_counter() - started
    cut = sum(record.cut for record in answers.values())
    total = sum(record.tokens for record in answers.values())
    console.row(
        "answers",
        f"{len(answers):,} of {total:,} tokens, {cut:,} cut at {cfg.max_new_tokens} · "
        f"{console.duration(seconds)}, {tokens / seconds:.0f} tok/s",
        width=10,
    )
    return answers, seconds


def from_model(asked: Asked, done: dict[int, ToolAnswer], cfg: Config) -> Iterator[Mapping[int, ToolAnswer]]:
    """Batches of answers of a model in memory, those that are there already among them."""
    from moesmith.eval.tool_calls import answer_batches

    assert asked.load is not None and cfg.max_new_tokens is not None
    yield from answer_batches(
        asked.load(), asked.tokenizer, asked.requests, asked.prompts, batch_size=cfg.batch_size,
        max_new_tokens=cfg.max_new_tokens, batch_tokens=cfg.batch_tokens, done=done,
    )  # fmt: skip


def from_server(asked: Asked, done: dict[int, ToolAnswer], cfg: Config) -> Iterator[Mapping[int, ToolAnswer]]:
    """Answers of a server as they come, without those that are there already."""
    from moesmith.eval.served_calls import ask_requests, unread

    assert asked.server is not None and cfg.max_new_tokens is not None
    left = [(i, request) for i, request in enumerate(asked.requests) if i not in done]
    said = []
    for place, record in ask_requests(
        asked.server, left, max_tokens=cfg.max_new_tokens, concurrency=cfg.concurrency
    ):
        said.append(record)
        yield {place: record}
    if count := unread(said):
        console.warn(
            f"{count:,} answers hold a call in their text that the server did not read: start it with its "
            "tool parser (llama-server --jinja, vllm --enable-auto-tool-choice --tool-call-parser NAME)"
        )


# ---------------------------------------------------------------- the folder


def write(
    cfg: Config, facts: dict[str, Any], evaluation: ToolEval, earlier: tuple[ToolEval, dict[str, Any]] | None
) -> None:
    """answers.jsonl, eval.json and the report, whole or not there."""
    from dataclasses import asdict

    from moesmith.jobs._eval import ANSWERS, RECORD, lines
    from moesmith.jobs._folder import finish_folder, start_folder
    from moesmith.report import write_report

    temporary = start_folder(cfg.out)
    write_atomically(temporary / ANSWERS, lines(asdict(record) for record in evaluation.records))
    write_atomically(temporary / RECORD, json.dumps(facts, indent=1) + "\n")
    write_report(temporary, report_facts(facts, evaluation, earlier))
    finish_folder(temporary, cfg.out)


def report_facts(
    facts: dict[str, Any], evaluation: ToolEval, earlier: tuple[ToolEval, dict[str, Any]] | None
) -> dict[str, Any]:
    """The facts of the page."""
    from moesmith.jobs._eval import advice, percent, report_run, shown_ids

    scores = facts["tool_calls"]
    low, high = scores["interval"]
    sentence = (
        f"{facts['name']} answers {scores['right']:,} of {scores['n']:,} requests right: "
        f"{percent(scores['rate'])} (95 %: {percent(low)} to {percent(high)})."
    )
    points = advice(evaluation.records, scores)
    ids = shown_ids(evaluation.records, earlier[0].records if earlier is not None else ())
    runs = [report_run(facts["name"], scores, evaluation.records, ids)]
    compared = facts["paired"]
    if earlier is not None and compared is not None:
        before = earlier[0].facts(records=False)
        runs.insert(0, report_run(compared["a"], before, earlier[0].records, ids))
        change = f"{100 * compared['difference']:+.1f} points against {compared['a']}"
        split = f"{compared['only_b']:,} right only now, {compared['only_a']:,} only then"
        points.insert(0, f"{change}: {split} (McNemar p = {compared['p']:.2g}).")
    return {
        "title": f"Tool calls of {facts['name']}",
        "subtitle": f"{scores['n']:,} requests of {facts['requests']['path']}",
        "verdict": {"level": "info", "word": "Measured", "sentence": sentence, "points": points},
        "tool_calls": {"runs": runs, "paired": [compared] if compared else []},
        "how": facts["how"],
    }


def how(cfg: Config, asked: Asked) -> dict[str, Any]:
    """How it was measured, for the record."""
    server = asked.server
    return {
        "command": command(cfg),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "moesmith": moesmith.__version__,
            **{name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        },
        "machine": machine(cfg) if server is None else f"{server.name} at {server.url}",
        "model_hash": asked.identity.get("model"),
        "adapter_hash": asked.identity.get("adapter"),
        "requests_hash": asked.identity["requests"],
        "decoding": f"greedy, at most {cfg.max_new_tokens} tokens",
        "intervals": "95 %: Wilson of shares, paired bootstrap of the difference",
    }


def following(cfg: Config, evaluation: ToolEval) -> str:
    """What to run next."""
    if evaluation.right < evaluation.n:
        return f"moesmith pairs analyse {shlex.quote(str(cfg.out))}"
    words = ["moesmith", "chat", *([cfg.model] if cfg.model else [])]
    words += ["--server", cfg.server] if cfg.server else []
    return shlex.join([*words, *(["--adapter", str(cfg.adapter)] if cfg.adapter else [])])
