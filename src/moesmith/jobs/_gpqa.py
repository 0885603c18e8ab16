"""Ask a model GPQA's questions, in memory or behind a server, and read its answers with care.

Each question is one user turn in the words of the harness's zero-shot chain-of-thought task, answered
greedily with up to 8,192 tokens of reasoning and 16,384 in all. answers.jsonl has every answer with its
reasoning, why it ended, what it took, the letter that was read and the rule that read it. A run that was
stopped goes on.
"""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moesmith
from moesmith import console
from moesmith.config import no_such_file, write_atomically
from moesmith.errors import UserError
from moesmith.jobs._gpqa_words import LABEL, report_facts, say, say_limits, say_paired, say_questions
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
    from moesmith.eval.gpqa import GpqaEval, Question
    from moesmith.eval.reasoning import Reply
    from moesmith.eval.served import Server
    from moesmith.jobs._eval import Unfinished
    from moesmith.jobs.eval import Config


@dataclass
class Asked:
    """Whom is asked, and how."""

    name: str
    questions: list[Question]
    max_new_tokens: int
    budget: int | None
    """tokens of reasoning; None: no limit of its own"""
    about: dict[str, Any]
    """the model or the server, for the record"""
    identity: dict[str, Any]
    server: Server | None = None
    source: str | None = None
    base: dict[str, Any] | None = None
    tokenizer: Any = None
    prompts: list[list[int]] = field(default_factory=list)


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused: files that are not there, a place that is taken."""
    from moesmith.jobs._eval import check_run
    from moesmith.jobs._folder import check_place
    from moesmith.models.checkpoint import local_folder

    assert cfg.gpqa is not None  # Config saw to it
    if not cfg.gpqa.expanduser().is_file():
        raise no_such_file(cfg.gpqa, "gpqa")
    check_server(cfg)
    if cfg.server is None:
        local_folder(source_of(cfg)[0])
    check_place(cfg.out, None, cfg.overwrite, "eval.json")
    if cfg.against is not None:
        check_run(cfg.against, kind="gpqa")


def run(cfg: Config) -> None:
    from moesmith.eval.gpqa import GpqaEval, judge, paired, read_questions, same_questions
    from moesmith.eval.reasoning import Reply
    from moesmith.jobs._eval import ANSWERS, Unfinished, read_lines
    from moesmith.jobs._folder import check_place

    assert cfg.gpqa is not None
    check_place(cfg.out, None, cfg.overwrite, "eval.json")
    questions, counts = read_questions(cfg.gpqa.expanduser(), cfg.seed)
    say_questions(cfg, questions, counts)
    if cfg.limit is not None and cfg.limit < len(questions):
        console.row("", f"{cfg.limit:,} of them are asked (--limit)", width=LABEL)
        questions = [questions[i * len(questions) // cfg.limit] for i in range(cfg.limit)]
    earlier = read_run(cfg.against) if cfg.against is not None else None
    if earlier is not None:
        same_questions(earlier[0].records, questions)
    asked = at_server(cfg, questions) if cfg.server is not None else in_memory(cfg, questions)
    if earlier is not None:
        warn_differences(cfg, asked, earlier[1])
    unfinished = Unfinished(cfg.out)
    done: dict[int, Reply] = {}
    if unfinished.start(asked.identity, cfg.overwrite) and (unfinished.folder / ANSWERS).is_file():
        rows = read_lines(unfinished.folder / ANSWERS)
        done = {row["place"]: Reply(**row["answer"]) for row in rows}
    if done:
        console.note(f"going on with an interrupted run: {len(done):,} answers are there")

    started = time.perf_counter()
    replies = answer(cfg, asked, done, unfinished)
    seconds = time.perf_counter() - started
    evaluation = GpqaEval([judge(one, replies[i]) for i, one in enumerate(questions)], seconds)
    scores = evaluation.facts()
    say(scores, evaluation, asked.budget)
    compared = None
    if earlier is not None:
        compared = {"a": earlier[1]["name"], "b": asked.name, **paired(earlier[0], evaluation)}
        say_paired(compared, earlier[0], evaluation)
    facts = {
        "command": "eval",
        "kind": "gpqa",
        "name": asked.name,
        **asked.about,
        "questions": {"path": str(cfg.gpqa), "asked": asked.identity["questions"], "rows": counts.facts()},
        "gpqa": {**scores, "max_new_tokens": asked.max_new_tokens, "reasoning_tokens": asked.budget},
        "paired": compared,
        "config": cfg.model_dump(mode="json"),
        "how": how(cfg, asked),
    }
    write(cfg, facts, evaluation, earlier)
    unfinished.remove()
    files = ("answers.jsonl", "eval.json", "report.html")
    console.row("written", ", ".join(f"{cfg.out}/{name}" for name in files))
    console.next_command(following(cfg))
    console.emit({"out": str(cfg.out), "report": str(cfg.out / "report.html"), **facts})


# ---------------------------------------------------------------- whom is asked


def limits(cfg: Config) -> tuple[int, int | None]:
    """Tokens of an answer, and of its reasoning: the protocol's where nothing else was asked for."""
    from moesmith.eval.gpqa import MAX_NEW_TOKENS, REASONING_TOKENS

    longest = cfg.max_new_tokens if cfg.max_new_tokens is not None else MAX_NEW_TOKENS
    budget = cfg.reasoning_tokens if cfg.reasoning_tokens is not None else REASONING_TOKENS
    return longest, budget if budget < longest else None


def at_server(cfg: Config, questions: Sequence[Question]) -> Asked:
    """The server, found and described.

    Raises:
        UserError: it is not there, or takes no budget and one was asked for.
    """
    from moesmith.eval.served import Server

    assert cfg.server is not None
    longest, budget = limits(cfg)
    server = Server.find(cfg.server, cfg.server_model)
    server.say = console.warn
    name = server.about.get("file") or Path(server.model).name or server.model
    context = f" · {server.context:,} tokens of context" if server.context else ""
    console.row(
        "server",
        f"{server.name} at {server.url} · {name}{context} · {cfg.concurrency} at a time",
        width=LABEL,
    )
    if not server.takes_budget and cfg.reasoning_tokens is not None:
        raise UserError(
            f"--reasoning-tokens {cfg.reasoning_tokens}: {server.name} takes no budget with a request",
            "leave it out, and limit reasoning where the server is started",
        )
    if not server.takes_budget and budget is not None:
        console.warn(
            f"{server.name} takes no budget for reasoning with a request: only its own settings and "
            f"{longest:,} tokens in all end it"
        )
        budget = None
    if server.context is not None and server.context <= longest:
        console.warn(
            f"the server sees {server.context:,} tokens: longer answers are cut there, not at {longest:,}; "
            "start it with a larger context for figures that can be compared"
        )
    say_limits(longest, budget)
    identity = {
        "server": {"model": server.model, "kind": server.kind, **server.about},
        **what_is_asked(cfg, questions, longest, budget),
    }
    about = {"model": None, "adapter": None, "server": server.facts()}
    return Asked(name, list(questions), longest, budget, about, identity, server=server)


def in_memory(cfg: Config, questions: Sequence[Question]) -> Asked:
    """The model's folder, tokenizer and prompts; no weight is read yet.

    Raises:
        UserError: the model sees too little for these questions, or for the answers asked for.
    """
    from moesmith.eval.reasoning import form_of, prompt_ids
    from moesmith.models.checkpoint import resolve
    from moesmith.models.identity import model_hash

    longest, budget = limits(cfg)
    source, base = source_of(cfg)
    folder = resolve(source)
    tokenizer, room = read_tokenizer(folder, cfg)
    form = form_of(tokenizer)
    if form is None and cfg.reasoning_tokens:
        raise UserError(
            f"--reasoning-tokens {cfg.reasoning_tokens}: {folder.name} marks no reasoning to be ended",
            "leave it out; --max-new-tokens limits the whole answer",
        )
    think = budget is None or budget > 0
    prompts = [prompt_ids(tokenizer, one.prompt, think) for one in questions]
    widest = max(map(len, prompts))
    if tokenizer.chat_template is None:
        console.warn("the model has no chat template: it continues the bare text of each question")
    if room is not None and widest + longest > room:
        left = room - widest
        if cfg.max_new_tokens is not None or left < 16:
            raise UserError(
                f"{folder.name} sees {room:,} tokens: {widest:,} of the longest question and {longest:,} of "
                "the answer are too many",
                f"--max-new-tokens {left}" if left >= 16 else "these questions are too long for it",
            )
        console.warn(f"{folder.name} sees {room:,} tokens: answers are cut at {left:,}, not at {longest:,}")
        longest, budget = left, budget if budget is not None and budget < left else None
    say_limits(longest, budget if form is not None else None, form is not None)
    identity = {
        "model": model_hash(folder),
        "adapter": None if cfg.adapter is None else adapter_digest(cfg.adapter),
        "prompts": digest_of(prompts),
        **{name: getattr(cfg, name) for name in ("batch_size", "batch_tokens", "scheme", "dtype")},
        **what_is_asked(cfg, questions, longest, budget),
    }
    about = {
        "model": {"given": source, "folder": str(folder), "hash": identity["model"]},
        "adapter": cfg.adapter and {"folder": str(cfg.adapter.resolve()), "digest": identity["adapter"]},
        "server": None,
    }
    name = name_of(cfg, source)
    return Asked(
        name, list(questions), longest, budget if form is not None else None, about, identity,
        source=source, base=base, tokenizer=tokenizer, prompts=prompts,
    )  # fmt: skip


def what_is_asked(
    cfg: Config, questions: Sequence[Question], longest: int, budget: int | None
) -> dict[str, Any]:
    """What every answer depends on, as JSON values."""
    return {
        "questions": digest_of([[one.id, one.prompt, one.gold] for one in questions]),
        "seed": cfg.seed,
        "max_new_tokens": longest,
        "reasoning_tokens": budget,
        "version": moesmith.__version__,
    }


def digest_of(value: Any) -> str:
    """A hash of JSON values."""
    from moesmith.eval.gpqa import digest

    return digest(json.dumps(value))[:32]


# ---------------------------------------------------------------- the answers


def answer(cfg: Config, asked: Asked, done: Mapping[int, Reply], unfinished: Unfinished) -> dict[int, Reply]:
    """Every question's reply, each kept on disk as it comes."""
    total, replies = len(asked.questions), dict(done)
    if len(replies) == total:
        return replies
    started, tokens = time.perf_counter(), 0
    with console.bar("answering", total=total) as bar:

        def keep(new: Mapping[int, Reply]) -> None:
            nonlocal tokens
            unfinished.add(new)  # type: ignore[arg-type]  # any dataclass will do
            replies.update(new)
            tokens += sum(one.tokens or 0 for one in new.values())
            rate = tokens / (time.perf_counter() - started)
            cut = sum(one.finish == "length" for one in replies.values())
            bar.update(len(replies), f"{len(replies):,} answers, {cut:,} cut · {rate:.0f} tok/s")

        if asked.server is not None:
            from moesmith.eval.served import ask_all

            texts = [(i, one.prompt) for i, one in enumerate(asked.questions) if i not in replies]
            for place, reply in ask_all(
                asked.server, texts, max_tokens=asked.max_new_tokens, budget=asked.budget, seed=cfg.seed,
                concurrency=cfg.concurrency,
            ):  # fmt: skip
                keep({place: reply})
            return replies
        from moesmith.eval.reasoning import answer_batches

        assert asked.source is not None
        model = load(asked.source, asked.base, cfg)
        for batch in answer_batches(
            model, asked.tokenizer, asked.questions, asked.prompts, max_new_tokens=asked.max_new_tokens,
            budget=asked.budget, batch_size=cfg.batch_size, batch_tokens=cfg.batch_tokens, done=done,
        ):  # fmt: skip
            keep({i: reply for i, reply in batch.items() if done.get(i) is not reply})
    return replies


# ---------------------------------------------------------------- an earlier run


def read_run(folder: Path) -> tuple[GpqaEval, dict[str, Any]]:
    """The answers and the record of an earlier run, read again by the rules of this version."""
    from moesmith.eval.gpqa import Question, from_rows, judge
    from moesmith.eval.reasoning import Reply
    from moesmith.jobs._eval import ANSWERS, RECORD, check_run, read_lines

    check_run(folder, kind="gpqa")
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    try:
        run = from_rows(read_lines(folder / ANSWERS), record["gpqa"]["seconds"])
    except TypeError as error:
        raise UserError(
            f"against: {folder / ANSWERS} holds other columns than this version writes: {error}",
            "evaluate that model again",
        ) from None
    names = Reply.__dataclass_fields__
    run.records = [
        judge(
            Question(one.id, one.row, one.question, one.choices, one.gold, one.domain),
            Reply(**{name: getattr(one, name) for name in names}),
        )
        for one in run.records
    ]
    return run, record


def warn_differences(cfg: Config, asked: Asked, record: Mapping[str, Any]) -> None:
    """Say what was asked in another way then: answers may differ by that."""
    then = record["gpqa"]
    now = {"max_new_tokens": asked.max_new_tokens, "reasoning_tokens": asked.budget}
    for name, value in now.items():
        if then.get(name) != value:
            console.warn(
                f"{cfg.against} had {name.replace('_', ' ')} {then.get(name)}, this run has {value}: answers "
                "may differ by that"
            )
    if bool(record.get("server")) != bool(asked.server):
        console.warn(
            f"{cfg.against} was {'served' if record.get('server') else 'in memory'}, this run is not"
        )


# ---------------------------------------------------------------- the folder


def write(
    cfg: Config, facts: dict[str, Any], evaluation: GpqaEval, earlier: tuple[GpqaEval, dict[str, Any]] | None
) -> None:
    """answers.jsonl, eval.json and the report, whole or not there."""
    from moesmith.jobs._eval import ANSWERS, RECORD, lines
    from moesmith.jobs._folder import finish_folder, start_folder
    from moesmith.report import write_report

    temporary = start_folder(cfg.out)
    write_atomically(temporary / ANSWERS, lines(asdict(record) for record in evaluation.records))
    write_atomically(temporary / RECORD, json.dumps(facts, indent=1) + "\n")
    write_report(temporary, report_facts(facts, evaluation, earlier))
    finish_folder(temporary, cfg.out)


def how(cfg: Config, asked: Asked) -> dict[str, Any]:
    """How it was measured, for the record."""
    served = asked.server.facts() if asked.server is not None else None
    names = () if served else ("torch", "transformers", "peft")
    budget = "" if asked.budget is None else f", {asked.budget:,} of them for the reasoning"
    return {
        "command": command(cfg),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"moesmith": moesmith.__version__, **{name: metadata.version(name) for name in names}},
        "machine": f"{served['kind'] or 'server'} {served.get('build') or ''}".strip()
        if served
        else machine(cfg),
        "model_hash": asked.identity.get("model"),
        "adapter_hash": asked.identity.get("adapter"),
        "questions_hash": asked.identity["questions"],
        "prompt": "zero-shot chain of thought, as lm-eval's gpqa cot_zeroshot tasks",
        "decoding": f"greedy, at most {asked.max_new_tokens:,} tokens{budget}",
        "choices": f"in an order that seed {cfg.seed} and each question give",
        "intervals": "95 %: Wilson of shares, paired bootstrap of the difference",
    }


def following(cfg: Config) -> str:
    """What to run next."""
    shown = shlex.quote(str(cfg.out))
    words = ["moesmith", "eval", "MODEL", "--gpqa", str(cfg.gpqa), "--against"]
    return f"{shlex.join(words)} {shown} --out OTHER"
