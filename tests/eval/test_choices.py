"""A letter is read where a person would read it, with the rule that says so, and never guessed."""

import pytest

from moesmith.eval.choices import FOUND, RULES, flexible, plain, strict

CHOICES = ["the red one", "5.3 eV", "D-glucose", "A proton moves left"]

# (answer, what a person reads)
CASES = [
    # a letter alone, with anything around it
    ("B", "B"), ("(B)", "B"), ("b", "B"), ("(b)", "B"), ("b.", "B"), ("**B**", "B"), ("`B`", "B"),
    ("\\boxed{B}", "B"), ("$\\boxed{\\mathbf{B}}$", "B"), ("\\boxed{(D)}", "D"), ("$$\\boxed{B}$$", "B"),
    ("\\[\\boxed{D}\\]", "D"), ("（B）", "B"), ("Ⓒ", "C"), ("> **D**", "D"), ("<answer>B</answer>", "B"),
    ("D) A proton moves left", "D"), ("B. 5.3 eV", "B"),
    # stated
    ("The answer is (B).", "B"), ("Answer: B", "B"), ("Answer: **B**", "B"), ("**Answer: B**", "B"),
    ("**Answer:** B", "B"), ("**Final Answer**\n\n**(C)**", "C"), ("### Answer\nC", "C"), ("ANSWER: C", "C"),
    ("The answer is $\\boxed{\\text{C}}$.", "C"), ("The answer is \\(B\\)", "B"), ('The answer is "B"', "B"),
    ("The answer is\n\nB", "B"), ("Answer - B", "B"), ("Final answer: `C`", "C"), ("My answer is: D", "D"),
    ("The correct option is B) 5.3 eV", "B"), ("Correct answer: option c", "C"),
    ("Therefore, the correct choice is therefore option (D).", "D"), ("So, the answer would be B)", "B"),
    ("The best answer is therefore C: D-glucose", "C"), ("I believe the answer is option D", "D"),
    ("I think B", "B"), ("I'd go with C", "C"), ("I would choose (A).", "A"), ("Let's go with B.", "B"),
    ("Solution: the energy is 3. Answer (A)", "A"), ("It's C.", "C"), ("Thus B, because of x", "B"),
    ("The energy is 5.3 eV, which corresponds to option (B).", "B"),
    # other letters stand beside it
    ("The correct answer is (B) because (A) is wrong", "B"),
    ("So the correct answer is (D), as (A), (B) and (C) are all too small.", "D"),
    ("The final answer is (C), not (A).", "C"), ("The answer must be (A) rather than (B)", "A"),
    ("The answer is **(B)** since A fails", "B"),
    ("Given that the options are (A) x (B) y (C) z (D) w, I pick (C).", "C"),
    ("We find B > 0 and the field B points up. So (A).", "A"), ("Vitamin D deficiency. The answer is B", "B"),
    # called correct
    ("Option C is correct.", "C"), ("Therefore B is correct.", "B"),
    ("(A) is incorrect. (B) is incorrect. (C) is correct. (D) is incorrect.", "C"),
    ("A is wrong, B is wrong, D is wrong, so it must be C.", "C"),
    ("Let's think step by step. (A) looks plausible but (C) is the best.", "C"),
    # denied, asked, supposed
    ("The answer is not (A). It is (B).", "B"), ("The answer isn't A.", None), ("(A) is not correct", None),
    ("I don't think the answer is B.", None), ("I don't think it is B; the answer is C.", "C"),
    ("The answer cannot be B. We choose A.", "A"), ("We eliminate (A), (B) and (D).", None),
    ("Choice A is wrong; choice B is wrong; choice D is wrong.", None),
    ("Is (B) correct? Not sure.", None), ("The answer is A? No. The answer is C.", "C"),
    ("(A) is right? No: (A) violates conservation. Thus (C).", "C"),
    ("If the answer is A, then energy would be lost. (B) is the correct answer.", "B"),
    ("Why could the answer be B? Because... The correct answer is A.", "A"),
    ("the red one is not the correct answer", None),
    ("The electrons were excited so the answer is (B).", "B"), ("I think it might be (A).", "A"),
    ("Assuming an ideal gas the answer is (B).", "B"), ("If we use Gauss's law the answer is (C).", "C"),
    ("Assuming the answer is (A), v is too large. So (C).", "C"),
    # changed, taken back
    ("The answer is (A).\n\nHmm, actually, no. The answer is (D).", "D"),
    ("The answer is (B). Wait, let me re-read the question. The", None),
    ("The answer is (B). Wait, let me check. Yes, it holds.", "B"),
    ("(A), (B), (C)... Wait", None),
    # two, or none
    ("The answer is either (A) or (B).", None), ("The answer is A and C", None), ("The answer is A/B", None),
    ("Answer: (B) or (C)?", None), ("", None), ("I do not know.", None), ("The answer is E.", None),
    # words and names that look like letters
    ("The answer is a combination of things.", None), ("The answer is A.", "A"), ("the answer is a", "A"),
    ("I am unable to answer. A better question would help.", None), ("The answer is C6H12O6", None),
    ("The compound B reacts with C to give D.", None), ("It reacts to give B.", None),
    ("A = 6\nThe pH falls.", None), ("So, A is 30% A.", None), ("So B grows and C falls.", None),
    ("The temperature is 37 C.", None),
    ("Answer: A because the proton moves", "A"),
    # choices in their words
    ("The answer is D-glucose", "C"), ("The answer is 5.3 eV, so (B).", "B"), ("5.3 eV", "B"),
    ("The answer is 5.3eV.", "B"), ("So we get 42.\n5.3 eV", "B"), ("Answer: A proton moves left", "D"),
    ("So, it is D-glucose.", "C"),
    ("The answer is: (C) D-glucose", "C"), ("correct answer: C. D-glucose", "C"),
    ("We conclude that D-glucose is the correct answer.", "C"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "wanted"), CASES)
def test_the_letter_is_the_one_that_a_person_reads(answer: str, wanted: str | None):
    read = flexible(answer, CHOICES)
    assert read.letter == wanted, (read.rule, read.candidates)
    assert (read.rule in FOUND) == (wanted is not None), "every reading has a rule that fits it"
    tight = strict(answer, CHOICES)
    assert tight.letter in (None, wanted), "strict reads less than flexible, never something else"
    assert read.rule in RULES and tight.rule in RULES and read.why


SPEEDS = ["3 m/s", "25 %", "12 m/s", "None of the above"]
LENGTHS = ["2 m", "4 m", "8 m", "16 m"]
RINGS = ["Benzene", "Toluene", "Benzene and toluene", "Phenol"]

# (choices, answer, what a person reads); written after the rules, by someone who had not seen them
HARD = [
    # quoted choices beside the letter, LaTeX, Markdown
    (SPEEDS, "Answer: C) 12 m/s", "C"), (SPEEDS, "c) 12 m/s", "C"), (SPEEDS, "answer: c) 12 m/s", "C"),
    (SPEEDS, "\\boxed{\\text{C) 12 m/s}}", "C"), (SPEEDS, "$\\boxed{12\\ \\text{m/s}}$", "C"),
    (SPEEDS, "$$\\boxed{\\textbf{(C)}}$$", "C"), (SPEEDS, "The answer is \\text{C}.", "C"),
    (LENGTHS, "First \\boxed{4 m}.\n\nFinally \\boxed{8\\,\\mathrm{m}}", "C"),
    (LENGTHS, "$8\\,\\text{m}$", "C"), (LENGTHS, "\\boxed{4}", None), (LENGTHS, "\\boxed{A, C}", None),
    (SPEEDS, "__C__", "C"), (SPEEDS, "***C***", "C"), (SPEEDS, "- **C) 12 m/s** ✅", "C"),
    (SPEEDS, "## Final Answer\n\n**Option C** – 12 m/s", "C"),
    (SPEEDS, "So the correct option is:\n\n> C. 12 m/s", "C"),
    (SPEEDS, '```json\n{"answer": "C"}\n```', "C"), (SPEEDS, "<answer>(C) 12 m/s</answer>", "C"),
    # signs of other languages
    (SPEEDS, "答案：Ｃ", "C"), (SPEEDS, "The answer is «C».", "C"), (SPEEDS, "The answer is 「C」", "C"),
    (SPEEDS, "正确答案是（C）。", "C"), (SPEEDS, "The answer is Ｃ．", "C"), (SPEEDS, "Antwort: C。", "C"),
    # tables and lists of verdicts
    (SPEEDS, "| Choice | |\n|---|---|\n| A | wrong |\n| B | wrong |\n| C | correct |\n| D | wrong |", "C"),
    (SPEEDS, "| A | ❌ |\n| B | ❌ |\n| C | ✅ |\n| D | ❌ |", "C"), (SPEEDS, "(A) ✗ (B) ✗ (C) ✓ (D) ✗", "C"),
    (SPEEDS, "A: incorrect\nB: incorrect\nC: correct\nD: incorrect", "C"),
    (SPEEDS, "A: correct\nB: correct\nC: correct\nD: incorrect", None),
    (SPEEDS, "| Option | Value |\n|---|---|\n| (A) | 3 |\n| (B) | 25 |\n\n**Answer: (B)**", "B"),
    # a change of mind
    (SPEEDS, "The answer is A... no wait, the answer is C.", "C"),
    (SPEEDS, "The answer is B. Actually, it's C.", "C"),
    (SPEEDS, "Answer: B\n\nCorrection: the answer is C.", "C"),
    (SPEEDS, "I initially thought the answer was B, but it is C.", "C"),
    (SPEEDS, "The answer would be B if friction mattered, but it does not, so C.", "C"),
    (LENGTHS, "The answer is B, no, C.", None), (LENGTHS, "The answer is B, I mean C.", None),
    (LENGTHS, "The answer is B, no doubt.", "B"), (LENGTHS, "The answer is 4 m... wait, 8 m.", None),
    # several
    (SPEEDS, "A and B", None), (SPEEDS, "Options A and C are both correct.", None),
    (SPEEDS, "Answer: A, B", None),
    (LENGTHS, "Answer: B (or possibly C)", None), (LENGTHS, "The answer is B C.", None),
    (LENGTHS, "Answer:\nA\nB\nC\nD", None), (LENGTHS, "Answer: (A) (B) (C) (D)", None),
    (LENGTHS, "Answer: B\nB\nB", "B"), (LENGTHS, "Answer: B\n\nA. 2 m is too short.", "B"),
    (SPEEDS, "(C) because p is conserved, while (A) and (B) are not.", "C"),
    # in words
    (SPEEDS, "The answer is **none of the above**.", "D"),
    (RINGS, "None of the above is right. The answer is (B).", "B"),
    (RINGS, "The answer is Benzene and toluene.", "C"), (RINGS, "The answer is benzene or toluene.", None),
    (RINGS, "The answer is toluene and not benzene.", "B"), (LENGTHS, "The answer is 8 m/s.", None),
    (LENGTHS, "The answer is 4 m or 8 m.", None), (LENGTHS, "The answer is 8 m (C), not 4 m (B).", "C"),
    (LENGTHS, "-8 m", None), (LENGTHS, "The answer is 16 m², not a choice.", None),
    # names that are letters
    (SPEEDS, "The reaction A→B is fast.", None), (SPEEDS, "A + B → C", None), (LENGTHS, "P(A)", None),
    (LENGTHS, "Figure (A) shows it.", None), (LENGTHS, "We choose C as the constant of integration.", None),
    (LENGTHS, "I choose C as my answer.", "C"), (LENGTHS, "I choose C as the best answer.", "C"),
    (LENGTHS, "Select A from the set. Then B follows.", None),
    (SPEEDS, "A particle moves. The answer is a good question.", None),
    (SPEEDS, "Answer: A particle at 12 m/s", None), (SPEEDS, "The field is B_1 and A_{2}.", None),
]  # fmt: skip


@pytest.mark.parametrize(("choices", "answer", "wanted"), HARD)
def test_hard_answers_are_read_as_a_person_reads_them_or_not_at_all(
    choices: list[str], answer: str, wanted: str | None
):
    read = flexible(answer, choices)
    assert read.letter == wanted, (read.rule, read.candidates)
    assert strict(answer, choices).letter in (None, wanted)


@pytest.mark.parametrize(
    "answer",
    ["The answer is (B)? No, (C).", "The correct answer is not B but C.", "Die Antwort ist C.", "12 m/s → C",
     "Eliminate A. Eliminate B. Eliminate D. C remains.", "Correct: C. Incorrect: A, B, D."],
)  # fmt: skip
def test_where_the_rules_are_at_their_end_no_letter_is_guessed(answer: str):
    assert flexible(answer, SPEEDS).letter is None, "a person reads C here; another letter would be worse"


@pytest.mark.parametrize("letter", "ABCD")
@pytest.mark.parametrize(
    "form", ["{}", "({})", "**{}**", "\\boxed{{{}}}", "The answer is ({}).", "Answer: {}"]
)
def test_set_forms_are_strict_for_every_letter(form: str, letter: str):
    assert strict(form.format(letter), CHOICES).letter == letter


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        ("The answer is (A). The answer is (B).", "changed"),
        ("I'd go with C", "form"),
        ("The answer is (B). Wait, no. It", "taken_back"),
        ("", "empty"),
    ],
)
def test_strict_says_why_it_reads_nothing(answer: str, rule: str):
    assert (strict(answer, CHOICES).letter, strict(answer, CHOICES).rule) == (None, rule)


def test_a_later_statement_replaces_an_earlier_one_and_a_mention_does_not():
    assert flexible("The answer is (A). Checking again: the answer is (C).", CHOICES).letter == "C"
    assert flexible("The answer is (A). (B) and (C) have the wrong sign.", CHOICES).letter == "A"


def test_only_the_letters_of_the_choices_count():
    assert flexible("The answer is (D).", CHOICES[:3]).letter is None
    assert flexible("The answer is (E).", [*CHOICES, "none of these"]).letter == "E"


def test_the_place_of_the_decision_is_shown_with_the_text_around():
    text = "x " * 200 + "The answer is (B). " + "y " * 200
    read = flexible(text, CHOICES)
    assert text[read.start : read.end].endswith("(B")
    excerpt = read.excerpt(text)
    assert "The answer is (B" in excerpt and excerpt.startswith("… ") and len(excerpt) < 300
    assert flexible("no idea", CHOICES).excerpt("no idea") == "no idea"


def test_styled_letters_keep_their_places():
    assert plain("𝐁 and ﬁ") == "B and ﬁ", "a character that becomes two stays"


def test_choices_that_read_alike_are_not_told_apart_by_their_words():
    assert flexible("The answer is 5.", ["5", "5", "6", "7"]).letter is None
    assert flexible("The answer is 5.3 eV", ["5", "5.3 eV", "6", "7"]).letter == "B", "the longest that fits"


@pytest.mark.parametrize("piece", ["answer is ", "(A) ", "so, the answer ", "*", " ", "is the ", "\\boxed{"])
def test_time_grows_with_the_length_not_with_its_square(piece: str):
    """A model that loops writes tens of thousands of characters of the same."""
    import time

    def took(count: int) -> float:
        started = time.process_time()
        flexible("answer: " + piece * count, CHOICES)
        return time.process_time() - started

    few = 1200 // len(piece)
    assert took(4 * few) < 12 * max(took(few), 0.01)
