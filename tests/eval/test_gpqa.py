"""Questions, their shuffle, the prompt of the protocol, and figures that add up."""

import csv
import json
import random
from collections import Counter

import pytest

from moesmith.errors import UserError
from moesmith.eval import gpqa
from moesmith.eval.gpqa import GpqaEval, from_rows, judge, paired, read_questions
from moesmith.eval.reasoning import Reply


def row(number: int, **more):
    return {
        "Record ID": f"q{number}",
        "Question": f"What is {number} + {number}?",
        "Correct Answer": f"{2 * number}",
        **{f"Incorrect Answer {i}": f"{2 * number + i}" for i in (1, 2, 3)},
        "High-level domain": ("Physics", "Biology")[number % 2],
        **more,
    }


def write(path, rows):
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), encoding="utf-8")
    return path


@pytest.fixture
def questions(tmp_path):
    return read_questions(write(tmp_path / "q.jsonl", [row(i) for i in range(1, 13)]))[0]


def reply(answer, **more):
    made = Reply(answer, "", "stop", 10, len(answer) + 5, 5, False, 1.0)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def evaluate(questions, answers, **more):
    return GpqaEval([judge(q, reply(a, **more)) for q, a in zip(questions, answers, strict=True)], 1.0)


# ---------------------------------------------------------------- questions


def test_the_order_of_choices_depends_on_the_question_and_the_seed_alone(tmp_path, questions):
    rows = [row(i) for i in range(1, 13)]
    random.Random(1).shuffle(rows)
    shuffled, _ = read_questions(write(tmp_path / "other.jsonl", rows))
    assert {q.id: q.prompt for q in shuffled} == {q.id: q.prompt for q in questions}
    swap = {"Incorrect Answer 1": "Incorrect Answer 3", "Incorrect Answer 3": "Incorrect Answer 1"}
    turned = [{name: one[swap.get(name, name)] for name in one} for one in rows]
    again, _ = read_questions(write(tmp_path / "turned.jsonl", turned[:4]))
    assert {q.id: q.prompt for q in again}.items() <= {q.id: q.prompt for q in questions}.items()
    other, _ = read_questions(tmp_path / "q.jsonl", seed=1)
    assert [q.prompt for q in other] != [q.prompt for q in questions]
    assert all(q.choices["ABCD".index(q.gold)] == str(2 * int(q.id[1:])) for q in [*questions, *other])


def test_right_answers_are_spread_over_the_letters(tmp_path):
    many, _ = read_questions(write(tmp_path / "q.jsonl", [row(i) for i in range(1, 401)]))
    counts = Counter(q.gold for q in many)
    assert set(counts) == set("ABCD") and min(counts.values()) > 70


def test_the_order_is_the_same_on_every_machine():
    """A known value: Python's random numbers, hash seeds and versions play no part."""
    assert gpqa.order(["1", "2", "3", "4"], "q", 0) == ["3", "1", "2", "4"]


def test_the_prompt_is_the_harness_s(tmp_path):
    """Byte for byte, with lm-eval's own template and cleaning."""
    pytest.importorskip("lm_eval")
    from importlib.resources import files

    import yaml
    from jinja2 import Template
    from lm_eval.tasks.gpqa.cot_zeroshot.utils import preprocess

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    path = files("lm_eval") / "tasks" / "gpqa" / "cot_zeroshot" / "_gpqa_cot_zeroshot_yaml"
    template = yaml.load(path.read_text(encoding="utf-8"), Loader)["doc_to_text"]
    odd = row(1, **{"Correct Answer": "  two  [title]s ", "Question": " Which\n\none? "})
    question = read_questions(write(tmp_path / "q.jsonl", [odd]))[0][0]
    texts = [odd["Correct Answer"], *(odd[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
    assert sorted(question.choices) == sorted(map(preprocess, texts))
    fields = {f"choice{i}": choice for i, choice in enumerate(question.choices, 1)}
    assert question.prompt == Template(template, keep_trailing_newline=True).render(
        Question=odd["Question"], **fields
    )


def test_csv_json_and_jsonl_are_the_same(tmp_path, questions):
    rows = [row(i) for i in range(1, 13)]
    (tmp_path / "q.json").write_text(json.dumps(rows))
    with (tmp_path / "q.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    for name in ("q.json", "q.csv"):
        assert [q.prompt for q in read_questions(tmp_path / name)[0]] == [q.prompt for q in questions]


def test_rows_that_are_no_questions_are_counted(tmp_path):
    rows = [
        row(1),
        row(2, **{"Incorrect Answer 2": " "}),
        row(3, **{"Incorrect Answer 1": "6"}),
        row(1, **{"Record ID": "z"}),
    ]
    path = write(tmp_path / "q.jsonl", rows)
    with path.open("a") as file:
        file.write("not json\n[1]\n")
    found, counts = read_questions(path)
    assert [q.id for q in found] == ["q1"]
    assert counts.dropped == {
        "an empty cell": 1, "the right answer is also a wrong one": 1, "asked before": 1,
        "not a JSON object": 2,
    }  # fmt: skip
    assert counts.read == 6 == counts.kept + sum(counts.dropped.values())


def test_zero_is_an_answer_and_no_empty_cell(tmp_path):
    found, counts = read_questions(write(tmp_path / "q.jsonl", [row(1, **{"Correct Answer": 0})]))
    assert counts.dropped == {} and found[0].choices["ABCD".index(found[0].gold)] == "0"


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"Question": "x"}], "no column 'Correct Answer'"),
        ([row(1), row(2, **{"Record ID": "q1"})], "id q1 is twice"),
        ([row(1, **{"Question": ""})], "has no question: 1 an empty cell"),
        ([], "it has no rows"),
    ],
)
def test_a_file_without_questions_says_what_is_wrong(tmp_path, rows, said):
    with pytest.raises(UserError, match=said):
        read_questions(write(tmp_path / "q.jsonl", rows))


def test_a_row_without_an_id_gets_one_of_its_own(tmp_path):
    bare = [{k: v for k, v in row(i).items() if k != "Record ID"} for i in (1, 2)]
    ids = [q.id for q in read_questions(write(tmp_path / "q.jsonl", bare))[0]]
    assert len(set(ids)) == 2
    assert [q.id for q in read_questions(write(tmp_path / "r.jsonl", bare[::-1]))[0]] == ids[::-1]


# ---------------------------------------------------------------- figures


def test_figures_add_up(questions):
    answers = [f"The answer is ({q.gold})." for q in questions[:7]]
    wrong = ["ABCD"[("ABCD".index(q.gold) + 1) % 4] for q in questions[7:10]]
    answers += [f"I think {letter}" for letter in wrong] + ["", "no idea"]
    facts = evaluate(questions, answers).facts()
    assert (facts["right"], facts["wrong"], facts["invalid"], facts["n"]) == (7, 3, 2, 12)
    assert facts["flexible"]["rate"] == 7 / 12 and facts["strict"]["right"] == 7
    assert sum(facts["wrong_by_predicted"].values()) == 3 == sum(facts["wrong_by_gold"].values())
    assert facts["wrong_by_predicted"] == {letter: wrong.count(letter) for letter in "ABCD"}
    assert facts["wrong_by_gold"] == {x: [q.gold for q in questions[7:10]].count(x) for x in "ABCD"}
    assert facts["invalid_by_rule"] == {"empty": 1, "none": 1}
    assert sum(map(sum, facts["table"]["counts"])) == 12
    assert sum(one["right"] for one in facts["by_domain"]) == 7 == facts["right"]
    low, high = facts["flexible"]["interval"]
    assert low < 7 / 12 < high


def test_the_harness_counts_its_own_way(questions):
    answers = [
        f"The answer is ({q.gold}) because ({'B' if q.gold == 'A' else 'A'}) is wrong" for q in questions
    ]
    facts = evaluate(questions, answers).facts()
    assert facts["right"] == 12 and facts["harness"]["flexible"]["right"] == 0
    assert facts["audit"] == {"harness": 12}


def test_what_was_cut_is_counted_where_it_was_cut(questions):
    records = [
        judge(questions[0], reply("", reasoning="on and on", finish="length", budget_hit=False)),
        judge(questions[1], reply("So the", finish="length", budget_hit=True)),
        judge(questions[2], reply("The answer is (A).", budget_hit=True)),
        judge(questions[3], reply("The answer is (A).", finish="content_filter", budget_hit=None)),
    ]
    facts = GpqaEval(records, 1.0).facts()
    cut = {"reasoning": 1, "answer": 1, "budget": 2, "budget_unknown": 1, "other": {"content_filter": 1}}
    assert facts["cut"] == cut
    assert facts["invalid_by_rule"]["empty"] == 1, "no answer, no letter: reasoning is not read"
    inside = judge(questions[0], reply("", reasoning="The answer is (A).", finish="length"))
    assert inside.flexible is None and inside.look == []


def test_lengths_are_of_reasoning_and_answer_together(questions):
    sizes = [100, 200, 300, 400, 20_001]
    records = [
        judge(q, reply("x" * 10, reasoning="y" * n, tokens=n)) for q, n in zip(questions, sizes, strict=False)
    ]
    records.append(judge(questions[5], reply("B", tokens=None)))
    found = GpqaEval(records, 1.0).facts()["lengths"]
    tokens = found["tokens"]
    assert (tokens["median"], tokens["mean"], tokens["max"], tokens["unknown"]) == (300, 4200.2, 20_001, 1)
    assert tokens["p95"] == 20_001 and found["long"] == {"tokens": 1, "reasoning_tokens": 0, "characters": 1}


def test_answers_come_back_from_their_file(questions):
    from dataclasses import asdict

    run = evaluate(questions, [f"({q.gold})" for q in questions])
    rows = [json.loads(json.dumps(asdict(one))) for one in run.records]
    assert from_rows(rows, 1.0).facts() == run.facts()


# ---------------------------------------------------------------- two runs


def test_two_runs_are_compared_question_by_question(questions):
    a = evaluate(questions, [f"({q.gold})" if i < 6 else "(E)" for i, q in enumerate(questions)])
    b = evaluate(questions, [f"({q.gold})" if 2 <= i < 11 else "(E)" for i, q in enumerate(questions)])
    found = paired(a, b)
    assert (found["both"], found["only_a"], found["only_b"], found["neither"]) == (4, 2, 5, 1)
    assert found["difference"] == pytest.approx(3 / 12)
    assert paired(a, a)["p"] == 1


def test_other_questions_and_other_orders_are_refused(tmp_path, questions):
    a = evaluate(questions, ["B"] * 12)
    with pytest.raises(UserError, match="other questions: 2 only there, 0 only here"):
        paired(a, evaluate(questions[:10], ["B"] * 10))
    other, _ = read_questions(tmp_path / "q.jsonl", seed=5)
    with pytest.raises(UserError, match="in another order there"):
        paired(a, evaluate(other, ["B"] * 12))
