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
