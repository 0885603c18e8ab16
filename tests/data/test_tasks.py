"""Checkable tasks: no problem on both sides, and a verifier that knows right from wrong."""

import pytest

from moesmith.data.tasks import Question, Task, draw, rows, split, verifier
from moesmith.errors import UserError

SUMS = Task(
    "basic_arithmetic",
    {
        "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1, "operators": ["+"],
        "allow_parentheses": False, "allow_negation": False, "format_style": "natural",
    },
)  # fmt: skip


def test_no_problem_is_on_both_sides_in_any_wording():
    """121 sums of 0..10 exist, each in four wordings: 70 + 40 distinct ones only fit if wording does not
    count.
    """
    train, held_out = split(SUMS, 70, 40)
    expressions = [question.metadata["expression"] for question in train + held_out]
    assert len(expressions) == len(set(expressions)) == 110
    assert {question.question for question in train}.isdisjoint(question.question for question in held_out)


def test_seed_decides():
    assert split(SUMS, 10, 5, seed=1) == split(SUMS, 10, 5, seed=1)
    assert split(SUMS, 10, 5, seed=1) != split(SUMS, 10, 5, seed=2)


def test_excluded_problems_do_not_come():
    first = draw(SUMS, 30, seed=5)
    again = draw(SUMS, 30, seed=5, exclude={question.problem for question in first})
    assert {q.problem for q in first}.isdisjoint(q.problem for q in again)


def test_too_few_problems_is_an_error():
    with pytest.raises(UserError, match="121 different problems, wanted 200"):
        draw(SUMS, 200, seed=0)


def test_problem_is_the_expression_or_the_question():
    assert Question("What is 3 + 4?", "7", {"expression": "3 + 4"}).problem == "3 + 4"
    assert Question("Sort: b a", "a b", {}).problem == "Sort: b a"


@pytest.mark.parametrize(
    "task",
    [SUMS, Task("chain_sum", {"max_terms": 2}), Task("gcd"), Task("products"), Task("letter_counting")],
    ids=lambda task: task.dataset,
)
def test_verifier_takes_the_gold_answer_and_no_other(task):
    score = verifier(task)
    for row in rows(draw(task, 12, seed=3)):
        gold = row["messages"][-1]["content"]
        assert score(row, gold) == 1
        for wrong in ("", gold + "1", "1" + gold, "I do not know", f"maybe {gold} or 9999"):
            assert score(row, wrong) < 1, wrong


def test_rows_hold_every_question_once():
    questions = draw(SUMS, 10, seed=0)
    made = rows(questions, turns=4)
    assert [len(row["messages"]) for row in made] == [8, 8, 4]
    asked = [m["content"] for row in made for m in row["messages"] if m["role"] == "user"]
    told = [m["content"] for row in made for m in row["messages"] if m["role"] == "assistant"]
    assert asked == [question.question for question in questions]
    assert told == [question.answer for question in questions]


def test_unknown_task_and_option_name_themselves():
    with pytest.raises(UserError, match="no_such_task"):
        draw(Task("no_such_task"), 1, seed=0)
    with pytest.raises(UserError, match="terms"):
        draw(Task("chain_sum", {"min_terms": 0}), 1, seed=0)
    with pytest.raises(UserError, match="wheels"):
        draw(Task("chain_sum", {"wheels": 3}), 1, seed=0)
