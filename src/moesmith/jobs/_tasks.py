"""Ask a model the benchmarks of lm-eval, in this process or through a server.

samples.jsonl has every item with its prompt, target, answer and metrics. Responses wait in
`<out>.unfinished` until all are there, a line each; the same command goes on where a killed one stopped.
"""

from __future__ import annotations

import hashlib
import json
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import moesmith
from moesmith import console
from moesmith.config import no_such_file, write_atomically
from moesmith.errors import UserError
from moesmith.jobs.eval import adapter_digest, command, load, machine, name_of, read_tokenizer, source_of

if TYPE_CHECKING:
    from moesmith.eval.harness import Asked, Tasks
    from moesmith.eval.items import Item
    from moesmith.jobs.eval import Config

SAMPLES, RECORD, RESPONSES = "samples.jsonl", "eval.json", "responses.jsonl"


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused."""
    from moesmith.eval.harness import check_installed
    from moesmith.jobs._eval import check_run
    from moesmith.jobs._folder import check_place
    from moesmith.models.checkpoint import local_folder

    check_installed()
    if cfg.task_path is not None and not cfg.task_path.expanduser().is_dir():
        raise no_such_file(cfg.task_path, "task_path")
    if cfg.server is not None and cfg.adapter is not None:
        raise UserError("--adapter goes with a model that is loaded here", "a server brings its own adapter")
    source = source_of(cfg)[0]
    if source:
        local_folder(source)
    check_place(cfg.out, None, cfg.overwrite, RECORD)
    if cfg.against is not None:
        check_run(cfg.against, kind="tasks", answers=SAMPLES)


def run(cfg: Config) -> None:
    from moesmith.eval.harness import Kept, ask, read_tasks
    from moesmith.eval.items import compare
    from moesmith.jobs._eval import Unfinished
    from moesmith.jobs._folder import check_place
    from moesmith.jobs._tasks_words import say_compared, say_scores, say_tasks
    from moesmith.models.checkpoint import resolve

    source, base = source_of(cfg)
    folder = resolve(source) if source else None
    check_place(cfg.out, folder, cfg.overwrite, RECORD)
    earlier = read_run(cfg.against) if cfg.against is not None else None
    tokenizer, room = read_tokenizer(folder, cfg) if folder is not None else (None, None)
    tasks = read_tasks(
        cfg.tasks or [], cfg.task_path and cfg.task_path.expanduser(), few_shot=cfg.few_shot,
        max_new_tokens=cfg.max_new_tokens, limit=cfg.limit, seed=cfg.seed,
    )  # fmt: skip
    asker = choose(cfg, tasks, tokenizer, room)
    say_tasks(tasks, asker)
    if earlier is not None:
        check_ids(earlier[0], tasks)

    identity = what_is_asked(cfg, folder, tasks, asker)
    unfinished = Unfinished(cfg.out)
    unfinished.start(identity, cfg.overwrite)
    lm = (
        asker.server_client(cfg, folder)
        if cfg.server
        else in_process(source, base, cfg, tokenizer, room, asker)
    )
    started = time.perf_counter()
    with console.bar("asking", total=1) as bar:
        kept = Kept(
            lm, unfinished.folder / RESPONSES,
            lambda done, total: bar.update(done / total, f"{done:,} of {total:,} responses"),
        )  # fmt: skip
        if kept.found:
            console.note(f"going on with an interrupted run: {kept.found:,} responses are there")
        try:
            asked = ask(kept, tasks, chat=asker.chat, seed=cfg.seed)
        finally:
            kept.close()
    seconds = time.perf_counter() - started
    del lm, kept.lm
    say_scores(asked, kept.cut, seconds)
    name = name_of(cfg, source) if cfg.server is None else asker.server_model
    compared = None
    if earlier is not None:
        compared = {"a": earlier[1]["name"], "b": name, **compare(earlier[0], asked.items, asked.scores)}
        say_compared(compared)

    facts = {
        "command": "eval",
        "kind": "tasks",
        "name": name,
        "model": source and {"given": source, "folder": str(folder), "hash": identity["model"]},
        "adapter": cfg.adapter and {"folder": str(cfg.adapter.resolve()), "digest": identity["adapter"]},
        "server": cfg.server and {"url": asker.url, "model": asker.server_model, "route": asker.route},
        "tasks": {
            "scores": [score.facts() for score in asked.scores],
            "groups": [score.facts() for score in asked.groups],
            "items": len(asked.items),
            "empty": sum(not item.answer.strip() for item in generated(asked.items, tasks)),
            "cut_prompts": kept.cut,
            "versions": tasks.versions(),
            "notes": tasks.notes,
            "warnings": asked.warnings,
            "seconds": seconds,
        },
        "paired": compared,
        "config": cfg.model_dump(mode="json"),
        "how": how(cfg, identity, asker),
    }
    write(cfg, facts, asked, earlier)
    unfinished.remove()
    console.row(
        "written", ", ".join(f"{cfg.out}/{name}" for name in (SAMPLES, RECORD, "report.html")), width=10
    )
    console.next_command(following(cfg))
    console.emit({"out": str(cfg.out), "report": str(cfg.out / "report.html"), **facts})


# ---------------------------------------------------------------- who is asked, and how


@dataclass
class Asker:
    """How prompts reach the model."""

    chat: bool
    """through the chat template"""
    route: str = "memory"
    """memory, chat/completions or completions"""
    url: str = ""
    server_model: str = ""
    room: int | None = None

    def server_client(self, cfg: Config, folder: Path | None) -> Any:
        """lm-eval's client of the server."""
        from moesmith.eval.harness_models import on_server

        return on_server(
            self.url, self.server_model, chat=self.route == "chat/completions", tokenizer=folder,
            room=self.room, concurrency=cfg.concurrency, seed=cfg.seed,
        )  # fmt: skip


def choose(cfg: Config, tasks: Tasks, tokenizer: Any, room: int | None) -> Asker:
    """Memory or a server's route, with the chat template or without.

    Raises:
        UserError: no template where one is asked for, or a task that this way of asking cannot do.
    """
    from moesmith.eval.harness import SCORED, longest_answer
    from moesmith.eval.harness_models import STOPS, check_scores_prompts, server_models, server_url

    kinds = tasks.kinds()
    template = tokenizer is not None and bool(tokenizer.chat_template)
    if cfg.chat_template == "on" and tokenizer is not None and not template:
        raise UserError("--chat-template on: the model has no chat template", "leave it at auto")
    chat = template if cfg.chat_template == "auto" else cfg.chat_template == "on"
    for name, task in tasks.loaded["tasks"].items():
        if room is not None and kinds[name] == "generate_until" and longest_answer(task) >= room:
            raise UserError(
                f"{name} lets the model write {longest_answer(task):,} tokens, and it sees {room:,}",
                "give a smaller --max-new-tokens",
            )
    if cfg.server is None:
        return Asker(chat, room=room)

    url = server_url(cfg.server)
    models = server_models(url)
    model = cfg.server_model or (models[0] if models else "")
    if not model or (models and cfg.server_model and model not in models):
        raise UserError(
            f"the server at {url} has no model {model}".rstrip(), f"it lists: {', '.join(models) or 'none'}"
        )
    scored = [name for name, kind in kinds.items() if kind in SCORED]
    if scored and tokenizer is None:
        raise UserError(
            f"{', '.join(scored[:4])}: scored by log-probability, which /v1/chat/completions does not give",
            "name the model too: moesmith eval MODEL --server URL asks /v1/completions with its tokenizer; "
            "or take tasks that generate",
        )
    if scored:
        check_scores_prompts(url, model, tokenizer.encode("The sky is blue.", add_special_tokens=False))
    elif cfg.chat_template != "off":
        for name, task in tasks.loaded["tasks"].items():
            stops = (task.get_config("generation_kwargs") or {}).get("until") or []
            if isinstance(stops, list) and len(stops) > STOPS:
                console.warn(
                    f"{name} has {len(stops)} stop texts, a chat server takes {STOPS}: the rest are lost"
                )
        return Asker(True, "chat/completions", url, model, room)
    return Asker(chat, "completions", url, model, room)


def in_process(
    source: str, base: dict[str, Any] | None, cfg: Config, tokenizer: Any, room: int | None, asker: Asker
) -> Any:
    """The model, loaded, as lm-eval wants it."""
    from moesmith.eval.harness_models import in_memory
    from moesmith.jobs._answers import stop_ids

    model = load(source, base, cfg)
    if getattr(model, "generation_config", None) is not None:
        # lm-eval stops at the tokenizer's end of text; a chat model ends its turn with another token
        model.generation_config.eos_token_id = stop_ids(model, tokenizer) or None
    return in_memory(model, tokenizer, batch_size=cfg.batch_size, room=room, chat=asker.chat)


def what_is_asked(cfg: Config, folder: Path | None, tasks: Tasks, asker: Asker) -> dict[str, Any]:
    """Everything the responses depend on, as JSON values."""
    from moesmith.models.identity import model_hash

    digest = hashlib.sha256()
    for name, task in tasks.loaded["tasks"].items():
        digest.update(f"{name} {task.VERSION} {task.get_config('num_fewshot')}".encode())
        for place, row in enumerate(task.eval_docs):
            if tasks.samples is None or place in set(tasks.samples[name]):
                digest.update(json.dumps(row, default=str).encode() + b"\n")
    options = ("few_shot", "max_new_tokens", "batch_size", "scheme", "dtype", "seed", "limit")
    return {
        "model": None if folder is None else model_hash(folder),
        "adapter": None if cfg.adapter is None else adapter_digest(cfg.adapter),
        "server": [asker.url, asker.server_model, asker.route] if cfg.server else None,
        "tasks": list(tasks.loaded["tasks"]),
        "items": digest.hexdigest()[:32],
        "chat_template": asker.chat,
        **{name: getattr(cfg, name) for name in options},
        "version": [moesmith.__version__, metadata.version("lm_eval")],
    }


def read_run(folder: Path) -> tuple[list[Item], dict[str, Any]]:
    """Items and record of an earlier run."""
    from moesmith.eval.items import Item
    from moesmith.jobs._eval import read_lines

    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    try:
        return [Item.from_dict(row) for row in read_lines(folder / SAMPLES)], record
    except TypeError as error:
        raise UserError(
            f"against: {folder / SAMPLES} holds other columns than this version writes: {error}",
            "evaluate that model again",
        ) from None


def check_ids(earlier: Sequence[Item], tasks: Tasks) -> None:
    """Raise UserError, before anything is asked, when no task is in common or one has other items."""
    from moesmith.eval.harness import keys
    from moesmith.eval.items import another_item, by_task

    first, counts = by_task(earlier), tasks.counts()
    common = [name for name in counts if name in first]
    if not common:
        raise UserError(
            f"against: the earlier run has {', '.join(first)}, this one {', '.join(counts)}",
            "compare runs that have a task in common",
        )
    for name in common:
        places = (tasks.samples or {}).get(name) or range(counts[name])
        if {item.id for item in first[name]} != set(places):
            raise UserError(
                f"against: {name} has other items in the earlier run: {len(first[name]):,} there, "
                f"{counts[name]:,} here",
                "compare runs with the same --limit",
            )
        now = keys(tasks, name)
        for item in first[name]:
            if item.key != now[item.id]:
                raise another_item(name, item.id)
    left = [name for name in counts if name not in first]
    if left:
        console.warn(f"not in the earlier run, so not compared: {', '.join(left)}")


def generated(items: Sequence[Item], tasks: Tasks) -> Iterator[Item]:
    """Items of tasks that generate."""
    kinds = tasks.kinds()
    return (item for item in items if kinds[item.task] == "generate_until")


# ---------------------------------------------------------------- the folder


def write(
    cfg: Config, facts: dict[str, Any], asked: Asked, earlier: tuple[list[Item], dict[str, Any]] | None
) -> None:
    """samples.jsonl, eval.json and the report, whole or not there."""
    from moesmith.jobs._eval import lines
    from moesmith.jobs._folder import finish_folder, start_folder
    from moesmith.jobs._tasks_words import report_facts
    from moesmith.report import write_report

    temporary = start_folder(cfg.out)
    write_atomically(temporary / SAMPLES, lines(item.facts() for item in asked.items))
    write_atomically(temporary / RECORD, json.dumps(facts, indent=1) + "\n")
    write_report(temporary, report_facts(facts, asked, earlier))
    finish_folder(temporary, cfg.out)


def how(cfg: Config, identity: dict[str, Any], asker: Asker) -> dict[str, Any]:
    """How it was measured, for the record."""
    return {
        "command": command(cfg),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "moesmith": moesmith.__version__,
            **{
                name: metadata.version(name)
                for name in ("torch", "transformers", "peft", "lm_eval", "datasets")
            },
        },
        "machine": machine(cfg) if cfg.server is None else f"server {asker.url}, {asker.route}",
        "model_hash": identity["model"],
        "adapter_hash": identity["adapter"],
        "items_hash": identity["items"],
        "prompts": "chat template" if asker.chat else "plain text",
        "intervals": "95 %: Wilson of shares, bootstrap over items of the rest and of differences",
    }


def following(cfg: Config) -> str:
    """What to run next."""
    if cfg.server is not None:
        named = [cfg.server_model] if cfg.server_model else []
        return shlex.join(["moesmith", "chat", *named, "--server", cfg.server])
    if cfg.against is not None:
        adapter = ["--adapter", str(cfg.adapter)] if cfg.adapter else []
        return shlex.join(["moesmith", "chat", *([cfg.model] if cfg.model else []), *adapter])
    words = shlex.join(["moesmith", "eval", *([cfg.model] if cfg.model else [])])
    names, earlier = ",".join(cfg.tasks or []), shlex.quote(str(cfg.out))
    return f"{words} --adapter … --tasks {names} --out … --against {earlier}"
