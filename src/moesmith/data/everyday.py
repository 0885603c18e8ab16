"""Ordinary questions that keep a chat model a chat model while it learns a narrow task.

Only questions: the answers come from the model itself, before anything was changed (`own_answers` rows).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

QUESTIONS = tuple(
    """
What is the capital of Italy?
What is the capital of Spain?
What is the capital of Japan?
What is the capital of Germany?
What is the capital of Poland?
What is the capital of Canada?
What is the capital of Egypt?
What is the capital of India?
What is the capital of Portugal?
What is the capital of Norway?
What is the capital of Greece?
What is the capital of China?
Which country is Berlin in?
Which country is Kyoto in?
Which continent is Brazil on?
Which ocean lies between Europe and America?
What is the longest river in Africa?
What is the highest mountain in the world?
What is the largest planet in the solar system?
Which planet is closest to the sun?
What is the moon?
Why is the sky blue?
Why do leaves change colour in autumn?
Why do we have seasons?
What is a rainbow?
What causes thunder?
What is photosynthesis?
What is gravity?
What is an atom?
What is a molecule of water made of?
What is electricity?
What is a magnet?
What do bees make?
What do pandas eat?
How do birds fly?
How do fish breathe?
What is a mammal?
Is a whale a fish?
What is a volcano?
What is an earthquake?
What is a computer?
What is a program?
What is the internet?
What is a web browser?
What is a database?
What is Python in programming?
What does a compiler do?
What is machine learning?
What is a book?
What is a poem?
Who wrote Romeo and Juliet?
Who painted the Mona Lisa?
Who was Albert Einstein?
Who was Marie Curie?
Who was Isaac Newton?
What is a piano?
What is an orchestra?
What is football?
What is chess?
What is a museum?
What is a library for?
What is bread made of?
How do I boil an egg?
How do I make tea?
How do I make a sandwich?
Name three fruits.
Name three vegetables.
Name three animals that live in the sea.
Name three colours.
Name three musical instruments.
Name a synonym for happy.
Name a synonym for big.
What is the opposite of hot?
What is the opposite of fast?
What is a noun?
What is a verb?
Write one sentence about the sea.
Write one sentence about a cat.
Write one sentence about winter.
Write a short greeting for a birthday card.
Say hello in Spanish.
Say thank you in French.
Give me a tip for better sleep.
Give me a tip for learning a language.
Give me a tip for saving money.
Give me a tip for staying calm before an exam.
Why is exercise good for us?
Why should we drink water?
Why do people read books?
Why do we need to sleep?
What is a healthy breakfast?
What does a doctor do?
What does a teacher do?
What does a baker do?
What is a friend?
What is money for?
Hello! How are you?
Can you help me with something?
Who are you?
What can you do?
""".strip().splitlines()
)


def whole_sentences(text: str) -> str:
    """The text up to the end of its last complete sentence; empty when there is none."""
    ends = [match.end() for match in re.finditer(r"[.!?](?=\s|$)", text)]
    # "1." at the start of a list item ends no sentence.
    while ends and re.search(r"(?:^|\n)\s*\d+\.$", text[: ends[-1]]):
        ends.pop()
    return text[: ends[-1]].strip() if ends else ""


def own_answers(questions: Iterable[str], answers: Iterable[tuple[str, bool]]) -> list[dict[str, Any]]:
    """Chat rows of questions and a model's answers, (text, cut off); what was cut ends at a whole sentence.

    A question whose answer is empty, or was cut before its first sentence ended, makes no row.
    """
    rows = []
    for question, (text, cut) in zip(questions, answers, strict=True):
        answer = whole_sentences(text) if cut else text.strip()
        if answer:
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            rows.append({"messages": messages})
    return rows
