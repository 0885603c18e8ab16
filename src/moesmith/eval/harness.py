"""Benchmarks by lm-eval (EleutherAI's harness): its tasks, asked, and what came out as items and scores.

lm-eval brings the prompts, the choices and the metrics; this file loads its tasks reproducibly and turns its
samples into items. Not here: who is asked (`harness_models.py`), intervals and comparisons (`items.py`).
lm-eval is optional and imported inside of functions. Tested with 0.4.13, whose `evaluate` this calls.
"""

from __future__ import annotations

import difflib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moesmith.errors import UserError

from .harness_models import Kept, quiet
from .items import Item, Score, interval_of, is_share, pooled_interval

INSTALL = 'pip install "moesmith[eval]"'
CLIENTS = ("aiohttp", "requests", "tenacity", "asyncio", "json")  # what raises when a server fails
SCORED = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")


@dataclass
class Tasks:
    """Tasks that are loaded, and which of their items are asked."""

    loaded: dict[str, Any]
    """lm-eval's own: tasks, groups, group_map"""
    samples: dict[str, list[int]] | None
    """places of the items that are asked, where not all are"""
    notes: list[str] = field(default_factory=list)

    def kinds(self) -> dict[str, str]:
        """The output type of each task: generate_until or one of SCORED."""
        return {name: str(task.OUTPUT_TYPE) for name, task in self.loaded["tasks"].items()}

    def counts(self) -> dict[str, int]:
        """Items asked of each task."""
        tasks = self.loaded["tasks"]
        return {name: len((self.samples or {}).get(name) or task.eval_docs) for name, task in tasks.items()}

    def versions(self) -> dict[str, str]:
        """The version that each task gives itself."""
        return {name: str(task.VERSION) for name, task in self.loaded["tasks"].items()}


def check_installed() -> None:
    """Raise UserError with the line to install when lm-eval is not there."""
    from importlib.util import find_spec

    for name in ("lm_eval", "sqlitedict", "aiohttp", "tenacity"):
        if find_spec(name) is None:
            raise UserError("--tasks needs lm-eval", INSTALL)


# ---------------------------------------------------------------- tasks


def read_tasks(
    names: Sequence[str],
    folder: Path | None = None,
    *,
    few_shot: int | None = None,
    max_new_tokens: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> Tasks:
    """lm-eval's tasks by name, group or tag, those of `folder` first.

    Some tasks shuffle their choices with Python's global generator, each time that lm-eval looks at their
    data; that all looks agree it leaves to the cache of `datasets`, which also remembers the shuffle of
    another seed. Here the data of each task is made once, without that cache, from the seed and the task's
    name: the prompts do not depend on the tasks beside it.

    Args:
        few_shot: examples before each question, for the tasks that do not fix 0.
        max_new_tokens: for tasks that generate.
        limit: items of each task, spread evenly over its data.

    Raises:
        UserError: no such task, its data is not on this machine, or it cannot be run here.
    """
    import datasets

    manager = _manager(names, folder)
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    state, caching = random.getstate(), datasets.is_caching_enabled()
    datasets.disable_caching()
    try:
        for name in names:
            random.seed(seed)
            with quiet():
                loaded = _load(manager, name)
            for key in loaded["tasks"].keys() & tasks.keys():
                raise UserError(f"--tasks names {key} twice", "a group brings its tasks with it")
            for key, task in loaded["tasks"].items():
                random.seed(f"{seed} {key}")
                _pin(task)
            tasks |= loaded["tasks"]
            groups |= loaded["groups"]
    finally:
        random.setstate(state)
        if caching:
            datasets.enable_caching()
    found = Tasks({"tasks": tasks, "groups": groups, "group_map": {}}, None)
    for name, task in tasks.items():
        _check_runnable(name, task)
        found.notes += _configure(name, task, few_shot, max_new_tokens, seed)
    if limit is not None:
        sizes = {name: len(task.eval_docs) for name, task in tasks.items()}
        found.samples = {
            name: [i * n // min(limit, n) for i in range(min(limit, n))] for name, n in sizes.items()
        }
    return found


def _manager(names: Sequence[str], folder: Path | None) -> Any:
    """lm-eval's index of tasks: of the folder alone if it has all of them, else with its own 14,000.

    Raises:
        UserError: a name that neither has.
    """
    from lm_eval.tasks import TaskManager

    def unknown(manager: Any) -> list[str]:
        return [name for name in names if name not in manager.task_index]

    if folder is not None:
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        if not unknown(manager):
            return manager
    manager = TaskManager(include_path=str(folder) if folder is not None else None)
    for name in unknown(manager):
        near = difflib.get_close_matches(name, manager.all_tasks, n=3)
        also = f"did you mean {', '.join(near)}? " if near else ""
        where = f" in lm-eval and {folder}" if folder is not None else " in lm-eval"
        raise UserError(
            f"no task {name}{where}", f"{also}`lm_eval ls tasks` lists them; --task-path DIR adds your own"
        )
    return manager


def _load(manager: Any, name: str) -> dict[str, Any]:
    """One task, group or tag with its data."""
    try:
        return manager.load([name])
    except (OSError, ValueError) as error:  # datasets: no connection, offline, no such file, no such config
        why = " ".join(str(error).split())[:200]
        if isinstance(error, OSError) or "cache" in why:
            raise UserError(
                f"task {name}: its data is not on this machine: {why}",
                "connect once, so that it comes into the cache; or give a task with local files, --task-path",
            ) from None
        raise UserError(f"task {name} cannot be read: {why}") from None
    except ImportError as error:
        raise UserError(f"task {name} needs another package: {error}", "install it, then run again") from None


def _pin(task: Any) -> None:
    """Make the data of a task once: it is the same rows each time it is looked at."""
    docs = task.eval_docs
    setattr(task, "test_docs" if task.has_test_docs() else "validation_docs", lambda: docs)


def _check_runnable(name: str, task: Any) -> None:
    """Raise UserError for a task that runs code, or that shows pictures or sound."""
    if getattr(task, "UNSAFE_CODE", False):
        raise UserError(
            f"task {name} runs the code that a model writes, on this machine",
            "run it with lm-eval in a container, against `moesmith serve`",
        )
    if getattr(task, "MULTIMODAL", False):
        raise UserError(f"task {name} shows pictures or sound", "only text is asked here")


def _configure(
    name: str, task: Any, few_shot: int | None, max_new_tokens: int | None, seed: int
) -> Iterator[str]:
    """Put the options into a loaded task, as lm-eval's simple_evaluate does; yields what was not done."""
    own = task.get_config("num_fewshot")
    if few_shot is not None and own == 0 and few_shot > 0:
        yield f"{name} is asked without examples: the task fixes 0"
    elif few_shot is not None or own is None:
        task.set_config(key="num_fewshot", value=few_shot or 0)
    if max_new_tokens is not None and task.OUTPUT_TYPE == "generate_until":
        settings = {
            key: value
            for key, value in (task.get_config("generation_kwargs") or {}).items()
            if key not in ("max_new_tokens", "max_tokens", "max_completion_tokens")
        }
        task.set_config(key="generation_kwargs", value={**settings, "max_gen_toks": max_new_tokens})
    task.set_fewshot_seed(seed=seed)


def longest_answer(task: Any) -> int:
    """Tokens that a task lets a model write: its own limit, or lm-eval's 256."""
    settings = task.get_config("generation_kwargs") or {}
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    return int(next((settings[name] for name in names if settings.get(name) is not None), 256))


# ---------------------------------------------------------------- asking


@dataclass
class Asked:
    """What came out."""

    items: list[Item]
    scores: list[Score]
    groups: list[Score]
    warnings: list[str]
    """what lm-eval warned of, each once"""


def ask(lm: Kept, tasks: Tasks, *, chat: bool, seed: int = 0) -> Asked:
    """Ask every item of the tasks.

    Raises:
        UserError: the server fails, or log-probabilities are not numbers.
    """
    import torch
    from lm_eval.evaluator import evaluate

    random.seed(seed)
    torch.manual_seed(seed)
    with quiet() as heard:
        try:
            results = evaluate(
                lm=lm,
                task_dict=tasks.loaded,
                samples=tasks.samples,
                bootstrap_iters=0,
                apply_chat_template=chat,
                fewshot_as_multiturn=chat,
            )
        except UserError:
            raise
        except Exception as error:
            if type(error).__module__.split(".")[0] not in CLIENTS:
                raise
            # The other requests under way failed too, and each would say so when it is collected.
            logging.getLogger("asyncio").setLevel(logging.CRITICAL)
            said = next((" ".join(one.split()) for one in reversed(heard) if "failed" in one.lower()), "")
            key = "its key is read from $OPENAI_API_KEY; " if "code: 401" in said else ""
            raise UserError(
                f"the server failed: {said[:300] or f'{type(error).__name__}, {error}'[:300]}",
                f"{key}the same command goes on where it stopped",
            ) from None
    assert results is not None
    items = [
        item
        for name, task in tasks.loaded["tasks"].items()
        for item in to_items(name, task, results["samples"][name])
    ]
    scores = _scores(tasks, results, items)
    return Asked(items, scores, _groups(tasks, results, items), list(dict.fromkeys(heard))[:20])


# ---------------------------------------------------------------- samples to items


def to_items(name: str, task: Any, samples: Sequence[dict[str, Any]]) -> list[Item]:
    """lm-eval's samples (one for each filter of an item) as items, in the order of the data."""
    found: dict[int, Item] = {}
    for sample in samples:
        place, filtered_by = sample["doc_id"], sample["filter"]
        item = found.get(place)
        if item is None:
            item = found[place] = _item(name, task, sample)
        for metric in sample["metrics"]:
            item.metrics[label(metric, filtered_by)] = plain(sample[metric])
        taken = sample["filtered_resps"]
        if filtered_by != "none" and taken and task.OUTPUT_TYPE == "generate_until":
            item.filtered[filtered_by] = _words(taken[0])
    return [found[place] for place in sorted(found)]


def keys(tasks: Tasks, name: str) -> dict[int, str]:
    """`Item.key` of each item of a task that is asked, by its place, before it is asked."""
    from lm_eval.utils import handle_non_serializable, hash_string

    task, found = tasks.loaded["tasks"][name], {}
    asked = set(tasks.samples[name]) if tasks.samples is not None else None
    for place, row in enumerate(task.eval_docs):
        if asked is None or place in asked:
            text = json.dumps(row, indent=2, default=handle_non_serializable, ensure_ascii=False)
            found[place] = _item_key(hash_string(text), hash_string(str(task.doc_to_target(row))))
    return found


def _item_key(row_hash: str, target_hash: str) -> str:
    """From lm-eval's two hashes of a sample."""
    from lm_eval.utils import hash_string

    return hash_string(row_hash + target_hash)[:16]


def _item(name: str, task: Any, sample: dict[str, Any]) -> Item:
    from lm_eval.utils import hash_string

    first = sample["resps"][0][0]
    item = Item(
        task=name,
        id=sample["doc_id"],
        key=_item_key(sample["doc_hash"], sample["target_hash"]),
        asked=hash_string(json.dumps(sample["arguments"], default=str))[:16],
        prompt=_words(sample["arguments"][0][0]),
        target=_words(sample["target"]),
        answer=first if isinstance(first, str) else "",
    )
    if task.OUTPUT_TYPE in ("loglikelihood", "multiple_choice"):
        item.logprobs = [float(one[0][0]) for one in sample["resps"]]
    if task.OUTPUT_TYPE == "multiple_choice":
        item.choices = [str(choice) for choice in task.doc_to_choice(sample["doc"])]
        item.logprobs = item.logprobs[: len(item.choices)]
        item.answer = item.choices[max(range(len(item.logprobs)), key=item.logprobs.__getitem__)]
        gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
        if isinstance(gold, int) and gold < len(item.choices):
            item.target = item.choices[gold]
    return item


def _words(value: Any) -> str:
    """A prompt, a target or an answer as text; accepted ones side by side, a chat's JSON as it is."""
    if isinstance(value, tuple) and len(value) == 1:  # lm-eval's JsonChatStr
        return str(value[0])
    if isinstance(value, list):
        return " | ".join(map(str, value))
    return str(value)


def label(metric: str, filtered_by: str) -> str:
    """acc, or exact_match,strict-match where a filter has a name."""
    return metric if filtered_by == "none" else f"{metric},{filtered_by}"


def plain(value: Any) -> Any:
    """numpy's numbers as Python's, for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return [plain(one) for one in value] if isinstance(value, (tuple, list)) else value


def _scores(tasks: Tasks, results: Any, items: Sequence[Item]) -> list[Score]:
    """Every metric of every task, as lm-eval computes it, with its interval."""
    found: list[Score] = []
    for name, task in tasks.loaded["tasks"].items():
        own = [item for item in items if item.task == name]
        higher = results["higher_is_better"].get(name, {})
        scores = []
        for metric, filtered_by, value in _figures(results["results"][name]):
            key = label(metric, filtered_by)
            values = [item.metrics[key] for item in own if key in item.metrics]
            function = task.aggregation().get(metric)
            form = getattr(function, "__name__", "mean" if function is None else "other")
            share = form == "mean" and is_share(values)
            scores.append(
                Score(
                    name, key, value, len(values), interval_of(values, form, function),
                    int(sum(values)) if share else None, higher.get(metric) is not False, form,
                    shots=int(task.get_config("num_fewshot") or 0),
                )
            )  # fmt: skip
        _choose_main(scores)
        found += scores
    return found


def _groups(tasks: Tasks, results: Any, items: Sequence[Item]) -> list[Score]:
    """The scores of groups, as lm-eval computes them."""
    found: list[Score] = []
    for name, figures in (results.get("groups") or {}).items():
        group = tasks.loaded["groups"][name]
        members = {task.task_name for task in group.get_all_tasks()}
        by_size = {one.metric: one.weight_by_size for one in group.aggregate_metric_list or ()}
        scores = []
        for metric, filtered_by, value in _figures(figures):
            key = label(metric, filtered_by)
            values: dict[str, list[Any]] = {}
            for item in items:
                if item.task in members and key in item.metrics:
                    values.setdefault(item.task, []).append(item.metrics[key])
            forms = {
                getattr(tasks.loaded["tasks"][task].aggregation().get(metric), "__name__", "mean")
                for task in values
            }
            interval = None
            if forms == {"mean"}:
                interval = pooled_interval(list(values.values()), by_size.get(metric, True))
            scores.append(Score(name, key, value, sum(map(len, values.values())), interval))
        _choose_main(scores)
        found += scores
    return found


def _figures(found: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(metric, filter, value) of lm-eval's row of a task or a group."""
    for key, value in found.items():
        metric, comma, filtered_by = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(plain(value), (int, float)):
            yield metric, filtered_by, float(plain(value))


def _choose_main(scores: Sequence[Score]) -> None:
    """Of several metrics the first that is a share of right answers, else the first."""
    shares = [score for score in scores if score.right is not None]
    for score in [*shares, *scores][:1]:
        score.main = True
