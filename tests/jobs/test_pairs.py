"""`moesmith pairs`: every pair is counted, what one judges by stays out, the folder is whole or not there."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import tiny
from chats import chat, tokenizer, write_jsonl
from moesmith import cli, config
from moesmith.data.requests import read_requests
from moesmith.data.tools import Call
from moesmith.eval.tool_calls import ToolAnswer
from moesmith.jobs import _analysis, _pairs, _sample
from moesmith.jobs import pairs as job
from moesmith.pairs.categories import CATEGORIES

HOSTS = ("alpha", "beta", "gamma", "delta", "omega", "sigma")
THINGS = ("web", "mail", "cache", "wiki", "media", "proxy")


def tool(name, about, *arguments):
    properties = {argument: {"type": "string"} for argument in arguments}
    parameters = {"type": "object", "properties": properties, "required": list(arguments)}
    return {"type": "function", "function": {"name": name, "description": about, "parameters": parameters}}


TOOLS = [
    tool("start_service", "Start a service on a host", "host", "service"),
    tool("stop_service", "Stop a service on a host", "host", "service"),
    tool("restart_service", "Restart a service on a host", "host", "service"),
    tool("host_status", "Show how a host is doing", "host"),
]


def request(verb, host, thing, wording="Please {} the {} service on {} for me now"):
    call = Call(f"{verb}_service", {"host": host, "service": thing}).openai()
    messages = [
        *chat(wording.format(verb, thing, host)),
        {"role": "assistant", "content": "", "tool_calls": [call]},
    ]
    return {"messages": messages, "category": verb}


def requests(hosts=HOSTS):
    return [
        request(verb, host, thing)
        for verb in ("start", "stop", "restart")
        for host in hosts
        for thing in THINGS
    ]


def answered(row, number, name=None, verdict="right"):
    """A request and what a model said to it: the right call, or one of another tool."""
    gold = row["messages"][-1]
    wanted = gold["tool_calls"][0]["function"]
    called = {"name": name or wanted["name"], "arguments": wanted["arguments"]}
    arguments = {key: [value] for key, value in wanted["arguments"].items()}
    return asdict(
        ToolAnswer(
            id=f"r{number}", category=row["category"], request=row["messages"][0]["content"],
            expected=[{"name": wanted["name"], "arguments": arguments, "optional": []}], called=[called],
            malformed=[], answer=json.dumps(called), tokens=9, cut=False, verdict=verdict,
            name_match=verdict == "right", arguments_match=True, order_match=True, json_valid=True, gold=gold,
            row=number, prompt=row["messages"][:1],
        )
    )  # fmt: skip


def run_folder(path, rows, confuse="stop"):
    """What `moesmith eval` leaves: every request for `confuse` got a call of restart_service."""
    path.mkdir()
    records = []
    for number, row in enumerate(rows, 1):
        wrong = row["category"] == confuse
        records.append(
            answered(row, number, "restart_service", "wrong_tool") if wrong else answered(row, number)
        )
    write_jsonl(path / "answers.jsonl", records)
    (path / "eval.json").write_text(json.dumps({"name": "some model", "tool_calls": {"seconds": 1.0}}))
    return path


@pytest.fixture
def files(tmp_path):
    """tools.json, train.jsonl, held_out.jsonl."""
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    write_jsonl(tmp_path / "train.jsonl", requests())
    held_out = [request("stop", host, "printer") for host in HOSTS] + requests(HOSTS[:1])
    write_jsonl(tmp_path / "held_out.jsonl", held_out)
    return tmp_path


def pairs(capsys, *argv, status=0):
    code = cli.main(["pairs", *map(str, argv)])
    captured = capsys.readouterr()
    assert code == status, captured.err
    return captured.out if status == 0 else captured.err


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def given(files, *names):
    return [
        word
        for name in names
        for word in (f"--{name}", files / {"tools": "tools.json"}.get(name, "train.jsonl"))
    ]


# ---------------------------------------------------------------- the keys


def test_every_key_says_which_action_it_belongs_to():
    for key in config.keys(job.Config):
        if key.name != "action":
            assert set(job.actions_of(key)) <= {"build", "analyse", "next", "verifier"}, key.name


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("", "missing ACTION"),
        ("bild", "choose from build, analyse, next"),
        ("build", "nothing to make pairs from"),
        ("build run1 --out x --requests r", "RUN belongs to `pairs analyse` and `pairs next`"),
        ("build --requests r", "pairs build: missing --out"),
        ("BUILD --hard-share 0.1", "--hard-share belongs to `pairs next`"),
        ("BUILD --samples 2", "--samples goes with `pairs build --verifier`"),
        ("build --verifier v.py:f --out x", "which model?"),
        ("build --verifier v.py:f --model m --out x --count 9", "--count goes with --requests"),
        ("build --failures run1 --out x", "--tools tools.json"),
        ("analyse", "missing RUN"),
        ("analyse run1 --count 3", "--count belongs to `pairs build` and `pairs next`"),
        ("next run1 --out x", "pairs next: missing --requests"),
        ("NEXT --temperature 1", "goes with `pairs build --verifier`"),
        ("NEXT --failures ./run1", "never becomes a pair"),
        ("NEXT --categories recovery", "belongs to `pairs build`"),
    ],
)
def test_a_key_that_would_not_be_used_is_refused(capsys, argv, words):
    argv = argv.replace("BUILD", "build --requests r --out x").replace(
        "NEXT", "next run1 --requests r --out x"
    )
    assert words in pairs(capsys, *argv.split(), status=2)


def test_an_unknown_category_names_the_nearest(files, capsys):
    argv = (
        "build",
        *given(files, "tools", "requests"),
        "--out",
        files / "out",
        "--categories",
        "tool_confussion",
    )
    assert "did you mean tool_confusion?" in pairs(capsys, *argv, status=2)


def test_the_page_of_the_documentation_has_every_category_as_the_code_describes_it():
    page = (Path(__file__).parents[2] / "docs" / "pairs.md").read_text(encoding="utf-8")
    for category in CATEGORIES.values():
        chosen, _, rejected = category.doc.removeprefix("chosen: ").partition("; rejected: ")
        assert f"| `{category.name}` | {chosen} | {rejected} |" in page
    assert page.count("\n| `") >= len(CATEGORIES) == 13


# ---------------------------------------------------------------- build


def test_pairs_from_requests_are_counted_and_leave_out_what_is_excluded(files, capsys):
    out = files / "out"
    argv = ("build", *given(files, "tools", "requests"), "--exclude", files / "held_out.jsonl", "--out", out)
    text = pairs(capsys, *argv, "--count", 60)
    rows, facts = rows_of(out / "pairs.jsonl"), json.loads((out / "pairs.json").read_text())
    assert facts["made"] == len(rows) == sum(one["made"] for one in facts["categories"]) <= 60
    assert facts["made"] > 30 and facts["hard"] == sum(row["hard"] for row in rows)
    assert {row["category"] for row in rows} <= set(CATEGORIES)
    assert "out/pairs.jsonl" in text and "next: moesmith dpo examples/dpo.yaml --data.path" in text
    for one in facts["categories"]:
        assert sum(row["category"] == one["name"] for row in rows) == one["made"]
    judged = [
        r.text
        for r in read_requests(
            files / "held_out.jsonl", _pairs.read_material(None, files / "tools.json").tools
        )[0]
    ]
    for row in rows:
        asked = [m["content"] for m in row["prompt"] if m["role"] == "user"]
        assert not set(asked) & set(judged)
        assert row["chosen"] != row["rejected"] and row["tools"]
    page = json.loads((out / "report.json").read_text())
    assert page["pairs"]["made"] == len(rows) and page["pairs"]["samples"]
    assert (out / "report.html").exists() and not list(files.glob("out.*"))


def test_the_same_seed_makes_the_same_pairs(files, capsys):
    argv = ("build", *given(files, "tools", "requests"), "--count", 30)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pairs(capsys, *argv, "--seed", seed, "--out", files / name)
    made = [(files / name / "pairs.jsonl").read_text() for name in "abc"]
    assert made[0] == made[1] != made[2]


def test_what_a_model_got_wrong_becomes_the_rejected_answer(files, capsys):
    run = run_folder(files / "run", requests(HOSTS[:2]))
    text = pairs(capsys, "build", *given(files, "tools"), "--failures", run, "--out", files / "out")
    rows = rows_of(files / "out" / "pairs.jsonl")
    assert "12 wrong of 36" in text and len(rows) == 12
    for row in rows:
        names = [row[side][0]["tool_calls"][0]["function"]["name"] for side in ("chosen", "rejected")]
        assert names == ["stop_service", "restart_service"] and row["hard"]
    # what is judged by is left out of failures, too
    write_jsonl(files / "judged.jsonl", requests(HOSTS[:1]))
    argv = ("build", *given(files, "tools"), "--failures", run, "--exclude", files / "judged.jsonl")
    pairs(capsys, *argv, "--out", files / "fewer")
    assert len(rows_of(files / "fewer" / "pairs.jsonl")) < 12


def test_an_exclude_file_without_requests_is_refused(files, capsys):
    write_jsonl(files / "nothing.jsonl", [{"text": "no request"}])
    argv = (
        "build",
        *given(files, "tools", "requests"),
        "--exclude",
        files / "nothing.jsonl",
        "--out",
        files / "o",
    )
    assert "has no row with a request" in pairs(capsys, *argv, status=2)


@pytest.mark.parametrize(
    "row",
    [
        {"messages": chat("Hello there", "Hi")},
        {"prompt": "Hello there", "chosen": "a", "rejected": "b"},
        {"prompt": chat("Hello there"), "chosen": chat("a"), "rejected": chat("b")},
        {"question": [chat("Hello there")], "function": []},
        {"conversations": [{"from": "human", "value": "Hello there"}, {"from": "gpt", "value": "Hi"}]},
    ],
)
def test_every_format_of_a_request_can_be_excluded(row):
    prompt = _pairs.prompt_of(row)
    assert [message["content"] for message in prompt] == ["Hello there"]


# ---------------------------------------------------------------- the folder


def test_a_run_that_dies_leaves_no_folder_and_the_next_one_works(files, capsys, monkeypatch):
    argv = ("build", *given(files, "tools", "requests"), "--count", 20, "--out", files / "out")
    with monkeypatch.context() as patch:
        patch.setattr("moesmith.report.write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(["pairs", *map(str, argv)]) == 130
    capsys.readouterr()
    assert not (files / "out").exists()
    pairs(capsys, *argv)
    before = (files / "out" / "pairs.jsonl").read_text()
    assert "exists" in pairs(capsys, *argv, status=2)
    with monkeypatch.context() as patch:
        patch.setattr("moesmith.report.write_report", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert cli.main(["pairs", *map(str, argv), "--overwrite", "--seed", "3"]) == 130
    assert (files / "out" / "pairs.jsonl").read_text() == before
    capsys.readouterr()
    pairs(capsys, *argv, "--overwrite", "--seed", 3)
    assert (files / "out" / "pairs.jsonl").read_text() != before
    assert sorted(path.name for path in files.iterdir() if path.name.startswith("out")) == ["out"]


def test_somebody_elses_folder_is_left_alone(files, capsys):
    (files / "out").mkdir()
    (files / "out" / "thesis.txt").write_text("years")
    argv = ("build", *given(files, "tools", "requests"), "--out", files / "out", "--overwrite")
    assert "moesmith did not write it" in pairs(capsys, *argv, status=2)
    assert (files / "out" / "thesis.txt").read_text() == "years"


# ---------------------------------------------------------------- analyse


def test_analysis_counts_every_answer_once(files, capsys):
    rows = requests(HOSTS[:2])
    run = run_folder(files / "run", rows)
    text = pairs(capsys, "analyse", run)
    found = json.loads((run / "analysis" / "analysis.json").read_text())
    assert (found["n"], found["right"], found["run"]) == (36, 24, str(run))
    assert [(one["name"], one["count"]) for one in found["failures"]] == [("wrong_tool", 12)]
    assert found["failures"][0]["interval"][0] < 1 / 3 < found["failures"][0]["interval"][1]
    assert sum(map(sum, found["confusion"]["counts"])) == 36
    assert found["confused"] == [{"expected": "stop_service", "called": "restart_service", "count": 12}]
    assert [one["n"] for one in found["by_category"]] == [12, 12, 12]
    assert "24 of 36" in text and "wrong_tool" in text
    table = text[text.index("expected ↓") :].splitlines()
    assert [line.split() for line in table[:2]] == [
        ["expected", "↓", "called", "→", "right", "restart_service"],
        ["stop_service", "·", "12"],
    ]
    page = json.loads((run / "analysis" / "report.json").read_text())
    assert page["tool_calls"]["runs"][0]["right"] == 24
    assert {one["verdict"] for one in page["tool_calls"]["runs"][0]["samples"]} == {"wrong_tool"}
    assert json.loads(pairs(capsys, "analyse", run, "--json"))["right"] == 24  # again, over the earlier one


def test_the_matrix_on_the_terminal_has_only_tools_that_were_confused(capsys):
    names = ["a", "b", "c", "d", "(none)"]
    counts = [
        [5, 2, 0, 0, 0, 0, 0],
        [0, 6, 0, 0, 1, 0, 0],
        [0, 0, 7, 0, 0, 0, 0],
        [0] * 7,
        [0, 0, 0, 3, 4, 0, 0],
    ]
    matrix = {"expected": names, "called": [*names, "(invented)", "(malformed)"], "counts": counts}
    wrong = [("(none)", "d", 3), ("a", "b", 2), ("b", "(none)", 1)]
    found = [{"expected": e, "called": c, "count": n} for e, c, n in wrong]
    down, across, rest = _analysis.confused_only(matrix, found)
    assert (down, across) == (["a", "b", "(none)"], ["right", "b", "d", "(none)"])
    assert rest == [[5, 2, 0, 0], [6, 0, 0, 1], [4, 0, 3, 0]]
    _analysis.say_confusion(matrix, found)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[2:] == [["a", "5", "2", "·", "·"], ["b", "6", "·", "·", "1"], ["(none)", "4", "·", "3", "·"]]
    many = [f"t{i}" for i in range(27)]
    matrix = {"expected": many, "called": many, "counts": [[1] * 27] * 27}
    cells = [{"expected": e, "called": c, "count": 1} for e, c in zip(many, many[1:], strict=False)]
    _analysis.say_confusion(matrix, [*cells, {"expected": "t26", "called": "t0", "count": 1}])  # too wide
    assert "and 12 more kinds" in capsys.readouterr().out


def test_a_run_without_a_mistake_has_nothing_to_confuse(files, capsys):
    run = run_folder(files / "run", requests(HOSTS[:1]), confuse="none")
    assert "wrong     nothing" in pairs(capsys, "analyse", run)


def test_a_folder_that_is_no_run_says_what_writes_one(files, capsys):
    assert "no such file" in pairs(capsys, "analyse", files / "runn", status=2)
    (files / "other").mkdir()
    assert "has no eval.json" in pairs(capsys, "analyse", files / "other", status=2)
    write_jsonl(files / "other" / "answers.jsonl", [{"key": "x", "answers": []}])
    assert "has no eval.json" in pairs(capsys, "analyse", files / "other", status=2)
    (files / "other" / "eval.json").write_text('{"tool_calls": {"seconds": 1.0}}')
    assert "holds other columns" in pairs(capsys, "analyse", files / "other", status=2)


# ---------------------------------------------------------------- next


def test_the_next_round_aims_at_what_was_confused_and_never_asks_it(files, capsys):
    judged = [request("stop", host, "printer") for host in HOSTS]
    run = run_folder(files / "run", [*judged, *requests(HOSTS[:1])])
    argv = ("next", run, *given(files, "tools", "requests"), "--count", 50, "--out", files / "out")
    text = pairs(capsys, *argv)
    assert "what it asked is left out" in text
    rows, facts = (
        rows_of(files / "out" / "pairs.jsonl"),
        json.loads((files / "out" / "pairs.json").read_text()),
    )
    assert facts["made"] == len(rows) <= 50 and 0 < facts["hard"] == sum(row["hard"] for row in rows)
    asked = {record["request"] for record in rows_of(run / "answers.jsonl")}
    for row in rows:
        for message in row["prompt"]:
            assert message["role"] != "user" or message["content"] not in asked
    swaps = [
        {row[side][0]["tool_calls"][0]["function"]["name"] for side in ("chosen", "rejected")}
        for row in rows
        if row["hard"] and row["category"] == "tool_confusion"
    ]
    assert {"stop_service", "restart_service"} in swaps


def test_failures_of_training_requests_go_into_the_next_round_and_those_of_run_do_not(files, capsys):
    judged = run_folder(files / "judged", requests(HOSTS[:1]))
    trained = run_folder(files / "trained", requests(HOSTS[:3]))
    argv = ("next", judged, *given(files, "tools", "requests"), "--failures", trained, "--count", 40)
    pairs(capsys, *argv, "--out", files / "out")
    rows = rows_of(files / "out" / "pairs.jsonl")
    asked = {record["request"] for record in rows_of(judged / "answers.jsonl")}
    assert not asked & {m["content"] for row in rows for m in row["prompt"] if m["role"] == "user"}
    assert any(row["hard"] for row in rows)


# ---------------------------------------------------------------- verifier


@pytest.fixture(scope="module")
def answering(tmp_path_factory):
    """A tiny model that ends its answers soon, and a check that takes every other length as right."""
    root = tmp_path_factory.mktemp("answering")
    model = tiny.build("olmoe")
    model.generation_config.eos_token_id = list(range(2, 50))
    model.save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    (root / "check.py").write_text("def score(row, answer):\n    return len(answer) % 2\n")
    write_jsonl(root / "chats.jsonl", [{"messages": chat(f"{i}+{i}?", str(2 * i))} for i in range(12)])
    return root


def verify(root, *argv):
    check = (
        "--verifier",
        f"{root / 'check.py'}:score",
        "--prompts",
        root / "chats.jsonl",
        "--dtype",
        "float32",
    )
    return ("build", *check, "--model", root / "model", "--max-new-tokens", 12, "--samples", 5, *argv)


def test_answers_of_the_model_itself_become_pairs(answering, tmp_path, capsys):
    out = tmp_path / "out"
    text = pairs(capsys, *verify(answering, "--questions", 10, "--out", out))
    facts, judged = json.loads((out / "pairs.json").read_text()), rows_of(out / "answers.jsonl")
    source = facts["sources"][0]
    without = source["all_right"] + source["all_wrong"] + source["equal_texts"] + source["cut"]
    assert source["prompts"] == 10 == source["used"] + without == len(judged)
    assert source["answers"] + source["unfinished"] == 60 == sum(len(row["answers"]) for row in judged)
    rows = rows_of(out / "pairs.jsonl")
    assert 0 < len(rows) == source["made"] == facts["made"]
    for row in rows:
        assert row["category"] == "verified" and "tools" not in row
        assert len(row["chosen"][0]["content"]) % 2 == 1 and len(row["rejected"][0]["content"]) % 2 == 0
    assert "10 rows of" in text and "10 prompts →" in text
    assert [answer["greedy"] for answer in judged[0]["answers"]] == [True] + 5 * [False]
    assert not list(tmp_path.glob("*.samples.jsonl"))


def test_a_stopped_run_goes_on_with_the_answers_it_has(answering, tmp_path, capsys, monkeypatch):
    argv = verify(answering, "--questions", 6, "--batch-size", 12, "--out", tmp_path / "a")
    draw, calls = _sample.draw, []

    def dies(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return draw(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(_sample, "draw", dies)
        assert cli.main(["pairs", *map(str, argv)]) == 130
    capsys.readouterr()
    kept = tmp_path / "a.samples.jsonl"
    assert len(rows_of(kept)) == 4 and not (tmp_path / "a").exists()
    kept.write_text(kept.read_text() + '{"key": "torn')
    text = pairs(capsys, *argv)
    assert "4 prompts were answered already" in text and not kept.exists()
    pairs(capsys, *verify(answering, "--questions", 6, "--out", tmp_path / "whole"))  # other batches
    assert rows_of(tmp_path / "a" / "answers.jsonl") == rows_of(tmp_path / "whole" / "answers.jsonl")


def test_a_check_that_fails_does_so_before_the_model_is_loaded(answering, tmp_path, capsys, monkeypatch):
    (tmp_path / "bad.py").write_text("def score(row, answer):\n    return row['no such column']\n")
    monkeypatch.setattr(_sample, "load", lambda *_: pytest.fail("loaded"))
    argv = ("build", "--verifier", f"{tmp_path / 'bad.py'}:score", "--prompts", answering / "chats.jsonl")
    text = pairs(capsys, *argv, "--model", "m", "--out", tmp_path / "out", status=2)
    assert "bad.py:2: KeyError: 'no such column'" in text


def test_questions_that_are_held_out_are_not_asked(answering, tmp_path, capsys):
    write_jsonl(
        tmp_path / "held_out.jsonl", [{"messages": chat(" 3+3? ", "6")}, {"messages": chat("4+4?", "8")}]
    )
    argv = verify(answering, "--exclude", tmp_path / "held_out.jsonl", "--out", tmp_path / "out")
    assert "10 rows of" in pairs(capsys, *argv)
    asked = {row["messages"][0]["content"] for row in rows_of(tmp_path / "out" / "answers.jsonl")}
    assert asked == {f"{i}+{i}?" for i in range(12) if i not in (3, 4)}


def test_a_task_makes_its_questions_and_gold_answers_help_where_none_was_right(answering, tmp_path, capsys):
    spec = "reasoning_gym:basic_arithmetic?min_terms=2&max_terms=2&max_digits=1"
    argv = ("build", "--verifier", spec, "--model", answering / "model", "--questions", 4, "--samples", 1)
    argv = (*argv, "--max-new-tokens", 40, "--dtype", "float32")
    text = pairs(capsys, *argv, "--out", tmp_path / "none", status=2)
    assert "no pair could be made" in text and (tmp_path / "none.samples.jsonl").exists()
    pairs(capsys, *argv, "--gold", "--out", tmp_path / "gold")
    judged = {
        row["messages"][0]["content"]: row["gold"] for row in rows_of(tmp_path / "gold" / "answers.jsonl")
    }
    rows = rows_of(tmp_path / "gold" / "pairs.jsonl")
    assert rows and all(row["chosen"][0]["content"] == judged[row["prompt"][0]["content"]] for row in rows)
    assert "makes its own questions" in pairs(
        capsys, *argv, "--prompts", answering / "chats.jsonl", "--out", tmp_path / "x", status=2
    )


def test_gumbel_noise_draws_from_the_softmax_and_leaves_greedy_rows_alone():
    logits = torch.tensor([1.0] + 11 * [0.0])  # noise of the other sign would give the first 0.68, not 0.40
    n = 4000
    noise = _sample.Gumbel([None, *range(n)], temperature=0.5, device="cpu")
    scores = noise(torch.zeros(n + 1, 1), logits.repeat(n + 1, 1))
    assert torch.equal(scores[0], logits)
    counts = torch.bincount(scores[1:].argmax(-1), minlength=12) / n
    wanted = torch.softmax(logits / 0.5, -1)
    assert torch.allclose(counts, wanted, atol=4 * (0.25 / n) ** 0.5)
