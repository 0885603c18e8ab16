"""The harness's reading is the harness's own, and hard answers are found."""

import string

import pytest
import yaml

from eval.test_choices import CASES, CHOICES
from moesmith.eval import choice_audit
from moesmith.eval.choice_audit import KINDS, audit, lm_eval, same_to_lm_eval
from moesmith.eval.choices import flexible

# What the harness takes for a letter and a person does not: (answer, harness, a person).
MISREAD = [
    ("The correct answer is (B) because (A) is wrong", "(A)", "B"),
    ("**B**", "[invalid]", "B"),
    ("\\boxed{B}", "[invalid]", "B"),
    ("I think B", "[invalid]", "B"),
    ("(A), (B), (C)... Wait", "(C)", None),
    ("The answer is not (A).", "(A)", None),
    ("The final answer is C.", "[invalid]", "C"),
]


@pytest.mark.parametrize(("answer", "theirs", "ours"), MISREAD)
def test_the_harness_misreads_these_and_the_audit_says_so(answer: str, theirs: str, ours: str | None):
    assert lm_eval(answer, CHOICES)[1] == theirs
    assert flexible(answer, CHOICES).letter == ours
    assert "harness" in audit(answer, CHOICES)


@pytest.fixture(scope="module")
def harness():
    """(strict, flexible) as lm-eval's own filters and metric, with the arguments of its gpqa task."""
    pytest.importorskip("lm_eval")
    from importlib.resources import files

    from lm_eval.api.metrics import exact_match_hf_evaluate
    from lm_eval.filters.extraction import MultiChoiceRegexFilter, RegexFilter

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    path = files("lm_eval") / "tasks" / "gpqa" / "cot_zeroshot" / "_gpqa_cot_zeroshot_yaml"
    task = yaml.load(path.read_text(encoding="utf-8"), Loader)
    kinds = {"regex": RegexFilter, "multi_choice_regex": MultiChoiceRegexFilter}
    made = {}
    for one in task["filter_list"]:
        kind, *rest = one["filter"]
        options = dict(kind)
        made[one["name"]] = kinds[options.pop("function")](**options)
        assert [step["function"] for step in rest] == ["take_first"]
    options = {key: task["metric_list"][0][key] for key in ("ignore_case", "ignore_punctuation")}

    def read(answers: list[str], choices: list[str]) -> list[tuple[str, str]]:
        docs = [{"choices": choices}] * len(answers)  # all at once: each call makes a table of all characters
        found = (
            made[n].apply([[one] for one in answers], docs) for n in ("strict-match", "flexible-extract")
        )
        return [(one[0], other[0]) for one, other in zip(*found, strict=True)]

    def right(read: str, gold: str) -> bool:
        return bool(exact_match_hf_evaluate([read], [f"({gold})"], **options)["exact_match"])

    return read, right


MORE = [
    "The answer is correct.", "The answer is (B)", "The answer is B", "The answer is (B).\nThe answer is C.",
    "So it is the red one, not 5.3 EV!", "d glucose", "Answer: C", "answer:D and more", "(E)", "(b)", "",
    "a proton moves left", "The answer is\n(B)", "The answer is ", "5.3 eV or the red one", ":B :C",
    "The answer is (A) (D)",
]  # fmt: skip


def test_the_harness_is_read_as_it_reads_itself(harness):
    """Held against lm-eval itself: the filtered answers and what counts as right, for every case here."""
    read, right = harness
    wide = ["30 %", "20 %", "3", "30"]
    texts = [
        *(answer for answer, _ in CASES),
        *MORE,
        *(answer for answer, _, _ in MISREAD),
        "it is 30",
        "20 %",
    ]
    for choices in (CHOICES, wide):
        for answer, theirs in zip(texts, read(texts, choices), strict=True):
            ours = lm_eval(answer, choices)
            assert ours == theirs, answer
            for gold in "ABCD":
                for one in ours:
                    assert same_to_lm_eval(one, gold) == right(one, gold), (answer, one, gold)


def test_an_easy_answer_needs_no_look():
    assert audit("The answer is (B).", CHOICES) == []
    assert audit("", CHOICES) == [], "there is nothing to look at"


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        ("The answer is either (A) or (B).", "no_letter"),
        ("I do not know.", "no_mention"),
        ("The answer is (A). No: the answer is (B).", "several"),
        ("The answer is (B) D-glucose", "words"),
    ],
)
def test_hard_answers_have_a_reason(answer: str, kind: str):
    assert kind in audit(answer, CHOICES)


def test_strict_and_flexible_that_disagree_are_found(monkeypatch):
    """They never do today: the kind is there for the day they would."""
    real = choice_audit.strict
    monkeypatch.setattr(choice_audit, "strict", lambda text, choices: real("The answer is (C).", choices))
    assert "disagree" in audit("The answer is (B).", CHOICES)


def test_the_letter_and_the_right_words_beside_it_are_fine():
    for letter, words in zip(string.ascii_uppercase, CHOICES, strict=False):
        assert "words" not in audit(f"The answer is ({letter}) {words}", CHOICES)
    assert set(KINDS) >= set(audit("(A) (B)", CHOICES))
