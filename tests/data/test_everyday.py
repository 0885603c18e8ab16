from moesmith.data.everyday import QUESTIONS, own_answers, whole_sentences


def test_questions_differ_and_leave_the_demos_own_question_unasked():
    assert len(set(QUESTIONS)) == len(QUESTIONS) >= 90
    assert all(question == question.strip() and question for question in QUESTIONS)
    assert not any("France" in question for question in QUESTIONS)


def test_what_was_cut_ends_at_a_whole_sentence():
    assert whole_sentences("Rome is old. It was built in") == "Rome is old."
    assert whole_sentences("Is it 3.5 metres? Yes, I thi") == "Is it 3.5 metres?"
    assert whole_sentences("Three colours:\n\n1. Red is one. 2") == "Three colours:\n\n1. Red is one."
    assert whole_sentences("Three colours:\n\n1. Red and\n2.") == ""
    assert whole_sentences("no end in sight") == ""


def test_rows_of_own_answers():
    answers = [
        ("Rome.", False),
        ("", False),
        ("Cut before the", True),
        ("One. Tw", True),
        ("unfinished but whole", False),
    ]
    made = own_answers(["a", "b", "c", "d", "e"], answers)
    told = [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in made]
    assert told == [("a", "Rome."), ("d", "One."), ("e", "unfinished but whole")]
