"""What `eval` keeps while it runs, what it finds in an earlier run, and how it says its figures.

Answers lie in `<out>.unfinished` until all are there: a line each, on the disk after every batch. The same
command goes on where a killed one stopped; the folder `<out>` appears whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moesmith import console
from moesmith.config import no_such_file, write_atomically
from moesmith.errors import UserError

if TYPE_CHECKING:
    from moesmith.eval.tool_calls import ToolAnswer, ToolEval

ANSWERS, RECORD = "answers.jsonl", "eval.json"
ASKED = "asked.json"  # what the unfinished answers are answers to
SHOWN, PAGE_SAMPLES, CONFUSED, WIDTH = 3, 16, 6, 240


# ---------------------------------------------------------------- unfinished answers


class Unfinished:
    """The answers of a run that is not whole yet, by the place of their request."""

    def __init__(self, out: Path):
        real = out.resolve()
        self.folder = real.with_name(real.name + ".unfinished")

    def start(self, asked: Mapping[str, Any], overwrite: bool) -> bool:
        """Make the folder; True if an interrupted run that asked the very same lies in it.

        Args:
            asked: everything the answers depend on, as JSON values.

        Raises:
            UserError: an interrupted run with other options lies there, or something else.
        """
        mark = self.folder / ASKED
        if self.folder.exists() and not mark.is_file() and any(self.folder.iterdir()):
            raise UserError(f"{self.folder} is in the way", "move it, or choose another --out")
        if mark.is_file() and any(path != mark for path in self.folder.iterdir()):
            earlier = json.loads(mark.read_text(encoding="utf-8"))
            other = sorted(key for key in {*earlier, *asked} if earlier.get(key) != asked.get(key))
            if not other:
                return True
            if not overwrite:
                raise UserError(
                    f"{self.folder} holds an interrupted run with another {', '.join(other)}",
                    "give the same options to go on with it, --overwrite to start over, or another --out",
                )
        self.remove()
        self.folder.mkdir(parents=True)
        write_atomically(mark, json.dumps(asked, indent=1) + "\n")
        return False

    def open(self, asked: Mapping[str, Any], overwrite: bool) -> dict[int, ToolAnswer]:
        """Answers of an interrupted run that asked the very same; otherwise start over, as `start` does."""
        from moesmith.eval.tool_calls import ToolAnswer

        answers = self.folder / ANSWERS
        if not self.start(asked, overwrite) or not answers.is_file():
            return {}
        return {row["place"]: ToolAnswer(**row["answer"]) for row in read_lines(answers)}

    def add(self, answers: Mapping[int, ToolAnswer]) -> None:
        """Append answers and wait until they are on the disk; a line that a kill tore is closed first."""
        path = self.folder / ANSWERS
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        text = lines({"place": place, "answer": asdict(answer)} for place, answer in answers.items())
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" * torn + text)
            file.flush()
            os.fsync(file.fileno())

    def remove(self) -> None:
        """Take it away."""
        shutil.rmtree(self.folder, ignore_errors=True)


def lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as JSONL. A model may write half a surrogate pair, which no file can hold but escaped."""
    made = []
    for row in rows:
        text = json.dumps(row, ensure_ascii=False)
        try:
            text.encode()
        except UnicodeEncodeError:
            text = json.dumps(row)
        made.append(text + "\n")
    return "".join(made)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Every whole line of a JSONL file; one that a kill tore is left out."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def read_run(folder: Path, key: str = "against") -> tuple[ToolEval, dict[str, Any]]:
    """The answers and the record of an earlier run.

    Raises:
        UserError: no such folder, or no run of `moesmith eval`.
    """
    from moesmith.eval.tool_calls import ToolAnswer, ToolEval

    check_run(folder, key)
    record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    try:
        answers = [ToolAnswer(**row) for row in read_lines(folder / ANSWERS)]
    except TypeError as error:
        raise UserError(
            f"{key}: {folder / ANSWERS} holds other columns than this version writes: {error}",
            "evaluate that model again",
        ) from None
    return ToolEval(answers, record["tool_calls"]["seconds"]), record


def check_run(folder: Path, key: str = "against", kind: str = "requests", answers: str = ANSWERS) -> None:
    """Raise UserError unless a folder holds a run of `moesmith eval --<kind>`.

    Args:
        answers: the file in it that has the answers.
    """
    if not folder.is_dir():
        raise no_such_file(folder, key)
    hint = f"wanted a folder that `moesmith eval --{kind}` wrote"
    if not (folder / RECORD).is_file():
        raise UserError(f"{key}: {folder} has no {RECORD}", hint)
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8")).get("kind", "requests")
    except (ValueError, AttributeError):
        raise UserError(f"{key}: {folder / RECORD} is no record of a run", hint) from None
    if found != kind:
        raise UserError(f"{key}: {folder} is a run of --{found}", hint)
    if not (folder / answers).is_file():
        raise UserError(f"{key}: {folder} has no {answers}", hint)


# ---------------------------------------------------------------- figures in words


def percent(share: float | None) -> str:
    """0.617 -> '61.7 %'."""
    return "–" if share is None else f"{100 * share:.1f} %"


def between(interval: Sequence[float] | None) -> str:
    """(0.49, 0.729) -> '49.0 – 72.9'."""
    return "" if interval is None else f"{100 * interval[0]:.1f} – {100 * interval[1]:.1f}"


def in_words(call: Mapping[str, Any]) -> str:
    """A call, made or wanted: restart_container(host="nas", force=true|false?)."""
    wanted, optional = "optional" in call, call.get("optional", ())
    given = []
    for name, value in call["arguments"].items():
        values = value if wanted else [value]
        text = "|".join(json.dumps(item, ensure_ascii=False) for item in values)
        given.append(f"{name}={text}{'?' if name in optional else ''}")
    return f"{call['name']}({', '.join(given)})"


def calls_in_words(calls: Sequence[Mapping[str, Any]]) -> str:
    """Several calls, or 'no call'."""
    return ", then ".join(map(in_words, calls)) if calls else "no call"


def short(text: str, width: int = WIDTH) -> str:
    """One line without control characters, cut at `width` characters."""
    from moesmith.report.values import clean, visible

    line = " ".join(visible(clean(text)).split())
    return line if len(line) <= width else line[: width - 1] + "…"


def samples(records: Sequence[ToolAnswer], count: int) -> list[ToolAnswer]:
    """Wrong answers to look at: one of each failure in turn, the most frequent failure first."""
    kinds: dict[str, list[ToolAnswer]] = {}
    for record in records:
        if not record.right:
            kinds.setdefault(record.verdict, []).append(record)
    order = sorted(kinds.values(), key=len, reverse=True)
    rounds = max(map(len, order), default=0)
    return [group[i] for i in range(rounds) for group in order if i < len(group)][:count]


def say(evaluation: ToolEval) -> None:
    """Accuracy, categories, failures, confused tools and some wrong answers, on the terminal."""
    facts = evaluation.facts(records=False)
    low, high = evaluation.interval
    console.row(
        "right",
        f"{facts['right']:,} of {facts['n']:,} · {percent(facts['rate'])} "
        f"(95 %: {100 * low:.1f} – {100 * high:.1f})",
        width=10,
    )
    found = facts["matches"]
    wanted, begun = found["name_match"]["n"], found["json_valid"]["n"]
    if wanted:
        console.row(
            "calls",
            f"of {wanted:,} that want one: {found['name_match']['count']:,} call the right tools, "
            f"{found['arguments_match']['count']:,} with the right arguments",
            width=10,
        )
    if begun:
        valid = f"{found['json_valid']['count']:,} are valid JSON for their tools"
        console.row("" if wanted else "calls", f"of {begun:,} that begin one: {valid}", width=10)
    if len(facts["by_category"]) > 1:
        console.say()
        console.table(
            ("category", "n", "right", "share", "95 %"),
            [
                (short(one["name"], 40), f"{one['n']:,}", f"{one['right']:,}", percent(one["rate"]),
                 between(one["interval"]))
                for one in facts["by_category"]
            ],
        )  # fmt: skip
    if facts["failures"]:
        console.say()
        say_failures(facts)
        for record in samples(evaluation.records, SHOWN):
            say_sample(record)
    console.say()


def say_failures(facts: Mapping[str, Any]) -> None:
    """What went wrong, how often, and which tools were taken for which."""
    for i, one in enumerate(facts["failures"]):
        span = f"{percent(one['rate']):>7} ({between(one['interval'])})"
        console.row(
            "" if i else "wrong", f"{one['count']:>5,} {span:<23} {one['name']}: {one['doc']}", width=10
        )
    pairs = [one for one in facts["confused"] if "(" not in one["expected"] + one["called"]]
    if pairs:
        told = [f"{one['called']} for {one['expected']} {one['count']:,}" for one in pairs[:CONFUSED]]
        console.row("confused", " · ".join(short(one, 100) for one in told), width=10)


def say_sample(record: ToolAnswer) -> None:
    """One wrong answer."""
    console.say()
    console.row(short(record.verdict), short(record.request), width=18)
    console.row("  expected", short(calls_in_words(record.expected)), width=18)
    console.row("  answered", short(record.answer) or "(nothing)", width=18)
    if record.wrong:
        console.row("  wrong", short(", ".join(record.wrong)), width=18)


def say_paired(name: str, other: ToolEval, evaluation: ToolEval, found: Mapping[str, Any]) -> None:
    """This run against an earlier one on the same requests."""
    interval = found["interval"]
    span = f" (95 %: {100 * interval[0]:+.1f} – {100 * interval[1]:+.1f})" if interval else ""
    console.row(
        "against",
        f"{name}: {other.right:,} → {evaluation.right:,} of {found['n']:,} right · "
        f"{100 * found['difference']:+.1f} points{span}",
        width=10,
    )
    console.row(
        "",
        f"{found['only_b']:,} only now, {found['only_a']:,} only then, {found['both']:,} both, "
        f"{found['neither']:,} neither · McNemar p = {found['p']:.2g}",
        width=10,
    )


ADVICE = {
    "loop": "a base model has never seen a turn end: train on chat rows first, `moesmith sft`",
    "too_long": "a model that thinks first needs a higher --max-new-tokens; any other has to learn to stop: "
    "train on chat rows, `moesmith sft`",
    "malformed_json": "the form of a call is not learned yet: train on rows with calls, `moesmith sft`",
    "no_call": "train on rows with calls, `moesmith sft`; if it does call elsewhere, on pairs",
    "refused": "train on rows in which such requests are answered with a call",
    "missing_call": "add requests that want several calls",
    "wrong_order": 'add chains in this order, or mark rows whose order is free: "any_order": true',
    "unwanted_call": "add requests whose right answer is no call: a question back, a refusal",
}
WEAK = 5  # requests a category has at least before it is called weak


def advice(records: Sequence[ToolAnswer], facts: Mapping[str, Any]) -> list[str]:
    """What to act on: the two most frequent failures with what they have in common, and a weak category."""
    points = []
    wrong = facts["n"] - facts["right"]
    for one in facts["failures"][:2]:
        seen = [record for record in records if record.verdict == one["name"]]
        what = ADVICE.get(one["name"]) or _in_common(one["name"], seen)
        points.append(f"{one['count']:,} of {wrong:,} wrong answers are `{one['name']}`: {what}.")
    groups = [one for one in facts["by_category"] if one["n"] >= WEAK and one["right"] < one["n"]]
    worst = min(groups, key=lambda one: one["rate"], default=None)
    if worst is not None and worst["interval"][1] < facts["rate"]:
        points.append(
            f"The category `{worst['name']}` is weaker than the rest: {worst['right']:,} of {worst['n']:,}."
        )
    return points


def _in_common(failure: str, records: Sequence[ToolAnswer]) -> str:
    """The names that answers of one failure share: tools taken for others, invented ones, arguments."""
    from moesmith.eval.tool_calls import confused

    if failure == "wrong_tool":
        told = [f"`{one['called']}` for `{one['expected']}` {one['count']:,}" for one in confused(records)]
        what = "say in their descriptions what tells these apart, and train on pairs of the two"
    else:
        kind = "invented" if failure == "invented_tool" else "wrong"
        counts = Counter(name for record in records for name in dict.fromkeys(getattr(record, kind)))
        told = [f"`{name}` {count:,}" for name, count in counts.most_common()]
        what = "train on rows and pairs with these tools"
    names = ", ".join(short(one, 100) for one in told[:3])
    return f"{names}; {what}" if names else what


def shown_ids(records: Sequence[ToolAnswer], earlier: Sequence[ToolAnswer] = ()) -> list[str]:
    """Requests whose answers the page shows: first those that an earlier run answered better or worse."""
    before = {record.id: record.right for record in earlier}
    changed = [record.id for record in records if before.get(record.id, record.right) != record.right]
    wrong = [record.id for record in samples(records, PAGE_SAMPLES)]
    return list(dict.fromkeys([*changed[: PAGE_SAMPLES // 2], *wrong]))[:PAGE_SAMPLES]


def report_run(
    name: str, facts: Mapping[str, Any], records: Sequence[ToolAnswer], ids: Sequence[str]
) -> dict[str, Any]:
    """One run as the report's `tool_calls` section takes it, with its answers to the requests `ids`."""
    by_id = {record.id: record for record in records}
    keys = ("n", "right", "rate", "interval", "by_category", "failures", "confusion", "matches")
    shown = [
        {
            "request": record.request,
            "expected": calls_in_words(record.expected),
            "answer": record.answer,
            "verdict": record.verdict,
            "wrong": record.wrong,
            "category": record.category,
        }
        for record in map(by_id.__getitem__, ids)
    ]
    return {"name": name, **{key: facts[key] for key in keys}, "samples": shown}
