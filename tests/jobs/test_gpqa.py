"""`moesmith eval --gpqa`: a server and a tiny model end to end, resume, what is refused, the example."""

import json
import shutil
from pathlib import Path

import pytest

from chats import tokenizer
from eval.test_gpqa import row, write
from eval.test_served import Fake, said
from moesmith import cli
from moesmith.eval import reasoning
from moesmith.eval.gpqa import read_questions

EXAMPLE = Path(__file__).parents[2] / "examples" / "gpqa-synthetic.jsonl"


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "q.jsonl", [row(i) for i in range(1, 9)])


@pytest.fixture
def start():
    made = []

    def start(script, **options):
        made.append(Fake(script, **{"owner": "llamacpp", **options}))
        return made[-1]

    yield start
    for one in made:
        one.shutdown()
        one.server_close()


def right_of(file, seed=0):
    """question's prompt -> the right letter."""
    return {one.prompt: one.gold for one in read_questions(file, seed)[0]}


def ask(capsys, file, *argv, out="run"):
    status = cli.main(["eval", "--gpqa", str(file), "--out", str(file.parent / out), *map(str, argv)])
    return status, *capsys.readouterr()


def answers(file, out="run"):
    return [json.loads(line) for line in (file.parent / out / "answers.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- a server


def test_a_server_end_to_end(file, start, capsys):
    gold = right_of(file)
    wrong = {"A": "B", "B": "C", "C": "D", "D": "A"}

    def script(body):
        prompt = body["messages"][0]["content"]
        place = list(gold).index(prompt)
        if place == 7:
            return said("", "length", "on and on", 16_384)
        letter = gold[prompt] if place < 5 else wrong[gold[prompt]]
        return said(f"The answer is ({letter}).", "stop", "so and so", 100 + place)

    fake = start(script)
    status, out, err = ask(capsys, file, "--server", fake.url, "--json")
    assert status == 0, err
    facts = json.loads(out)
    scores = facts["gpqa"]
    assert (scores["right"], scores["wrong"], scores["invalid"], scores["n"]) == (5, 2, 1, 8)
    assert scores["cut"]["reasoning"] == 1 and scores["invalid_by_rule"] == {"empty": 1}
    assert scores["lengths"]["tokens"]["max"] == 16_384
    assert (scores["max_new_tokens"], scores["reasoning_tokens"]) == (16_384, 8_192), "the protocol's"
    assert all(
        body["max_tokens"] == 16_384 and body["reasoning_budget_tokens"] == 8_192 for body in fake.asked
    )
    assert [one["id"] for one in answers(file)] == [f"q{i}" for i in range(1, 9)], "in the file's order"
    assert answers(file)[0]["reasoning"] == "so and so"
    folder = file.parent / "run"
    assert sorted(path.name for path in folder.iterdir()) == [
        "answers.jsonl", "eval.json", "report.html", "report.json", "report.png"]  # fmt: skip
    assert not (file.parent / "run.unfinished").exists()
    page = (folder / "report.html").read_text()
    assert "5 of 8 questions right: 62.5 %" in page

    status, out, err = ask(capsys, file, "--server", fake.url, "--against", folder, out="again")
    assert status == 0, err
    assert "+0.0 points" in out and "p = 1" in out
    assert "5 right + 2 wrong + 1 invalid = 8 · invalid: empty 1" in out
    status, _, err = ask(capsys, file, "--server", fake.url, "--seed", 4, "--against", folder, out="other")
    assert status == 2 and "in another order there" in err


def test_a_run_that_a_server_broke_goes_on(file, start, capsys):
    gold, broken = right_of(file), [True]

    def script(body):
        prompt = body["messages"][0]["content"]
        if broken and list(gold).index(prompt) == 4:
            return 400, {"error": {"message": "boom"}}
        return said(f"({gold[prompt]})")

    fake = start(script)
    options = ("--server", fake.url, "--concurrency", 1)
    status, _, err = ask(capsys, file, *options)
    assert status == 2 and "boom" in err
    assert not (file.parent / "run").exists() and (file.parent / "run.unfinished").is_dir()
    broken.clear()
    before = len(fake.asked)
    status, _, err = ask(capsys, file, *options, "--max-new-tokens", 50)
    assert status == 2 and "interrupted run with another max_new_tokens" in err
    status, out, err = ask(capsys, file, *options)
    assert status == 0 and "going on with an interrupted run: 4 answers are there" in err
    assert len(fake.asked) - before == 4 and "8 right + 0 wrong + 0 invalid = 8" in out


def test_ctrl_c_keeps_what_was_answered(file, start, capsys, monkeypatch):
    from moesmith.jobs._eval import Unfinished

    real, kept = Unfinished.add, []

    def add(self, new):
        real(self, new)
        kept.append(new)
        if len(kept) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Unfinished, "add", add)
    fake = start(lambda body: said("(A)"))
    status, _, _ = ask(capsys, file, "--server", fake.url, "--concurrency", 1)
    assert status == 130 and not (file.parent / "run").exists()
    lines = (file.parent / "run.unfinished" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 3 and len(fake.asked) <= 4


def test_a_server_without_a_budget_is_said_and_one_that_was_asked_for_is_refused(file, start, capsys):
    fake = start(lambda body: said("(A)"), owner="someone")
    status, _, err = ask(capsys, file, "--server", fake.url)
    assert status == 0 and "takes no budget" in err
    assert not any("budget" in key for body in fake.asked for key in body)
    status, _, err = ask(capsys, file, "--server", fake.url, "--reasoning-tokens", 100, out="other")
    assert status == 2 and "takes no budget" in err


def test_a_small_context_is_said(file, start, capsys):
    props = {"default_generation_settings": {"n_ctx": 4096}}
    fake = start(lambda body: said("(A)"), props=props)
    _, _, err = ask(capsys, file, "--server", fake.url)
    assert "the server sees 4,096 tokens: longer answers are cut there, not at 16,384" in err


def test_so_many_questions_are_asked_spread_over_the_file(file, start, capsys):
    fake = start(lambda body: said("(A)"))
    assert ask(capsys, file, "--server", fake.url, "--limit", 4)[0] == 0
    assert [one["id"] for one in answers(file)] == ["q1", "q3", "q5", "q7"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (("x", "--server", "http://h"), "MODEL and --server"),
        (("--server", "http://h", "--batch-size", "2"), "--batch-size and --server"),
        (("--server", "h"), "is no URL"),
        (("x", "--concurrency", "2"), "--concurrency goes with --server"),
        (("--server", "http://h", "--against", "nowhere"), "against"),
    ],
)
def test_what_does_not_go_together_is_refused_before_anything_is_asked(file, capsys, argv, said):
    status, _, err = ask(capsys, file, *argv)
    assert status == 2 and said in err


def test_a_run_of_other_questions_is_no_run_to_compare_with(file, start, capsys):
    other = file.parent / "calls"
    other.mkdir()
    (other / "eval.json").write_text("{}")
    (other / "answers.jsonl").write_text("")
    status, _, err = ask(capsys, file, "--server", "http://127.0.0.1:1", "--against", other)
    assert status == 2 and "is a run of --requests" in err and "`moesmith eval --gpqa`" in err
    (other / "eval.json").write_text("no JSON")
    status, _, err = ask(capsys, file, "--server", "http://127.0.0.1:1", "--against", other)
    assert status == 2 and "is no record of a run" in err


# ---------------------------------------------------------------- a model in memory

OPENS = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def thinker(checkpoint, tmp_path_factory):
    """A tiny model whose template opens its reasoning, with room for a prompt of single characters."""
    folder = tmp_path_factory.mktemp("thinker")
    shutil.copytree(checkpoint("olmoe"), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    tokenizer(template=OPENS, special=["<think>", "</think>"]).save_pretrained(folder)
    return folder


def test_a_model_in_memory_is_held_to_its_budget(thinker, file, capsys):
    status, out, err = ask(
        capsys,
        file,
        thinker,
        "--scheme",
        "none",
        "--max-new-tokens",
        20,
        "--reasoning-tokens",
        6,
        "--limit",
        3,
    )
    assert status == 0, err
    found = answers(file)
    assert [one["reasoning_tokens"] for one in found] == [6, 6, 6]
    assert all(one["budget_hit"] and one["answer"] and one["reasoning"] for one in found)
    assert "3 reasonings ended by the budget" in out and "6 of them for the reasoning" in out
    facts = json.loads((file.parent / "run" / "eval.json").read_text())
    assert facts["model"]["hash"] and facts["server"] is None


def test_a_killed_run_in_memory_goes_on_batch_by_batch(thinker, file, capsys, monkeypatch):
    options = (thinker, "--scheme", "none", "--max-new-tokens", 8, "--reasoning-tokens", 2, "--batch-size", 2)
    assert ask(capsys, file, *options, out="whole")[0] == 0
    real, calls = reasoning._answer, []

    def dies(*given):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(reasoning, "_answer", dies)
    assert ask(capsys, file, *options)[0] == 130
    status, _, err = ask(capsys, file, *options)
    assert status == 0 and "4 answers are there" in err and len(calls) == 5
    drop = {"seconds": None}
    assert [one | drop for one in answers(file)] == [one | drop for one in answers(file, "whole")]


def test_the_room_a_model_has_is_kept_to_and_said(thinker, file, capsys, monkeypatch):
    monkeypatch.setattr(reasoning, "_answer", lambda *_: pytest.fail("not asked"))
    status, _, err = ask(capsys, file, thinker, "--max-new-tokens", 500)
    assert status == 2 and "sees 512 tokens" in err and "--max-new-tokens " in err


def test_a_budget_for_a_model_that_marks_no_reasoning_is_refused(checkpoint, thinker, file, capsys, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(thinker, plain)
    tokenizer().save_pretrained(plain)
    status, _, err = ask(capsys, file, plain, "--max-new-tokens", 8, "--reasoning-tokens", 4)
    assert status == 2 and "marks no reasoning" in err


# ---------------------------------------------------------------- the example


def test_the_example_is_whole():
    questions, counts = read_questions(EXAMPLE)
    assert len(questions) >= 30 and not counts.dropped
    assert len({one.domain for one in questions}) == 3
    assert min(sum(one.gold == letter for one in questions) for letter in "ABCD") >= 4
