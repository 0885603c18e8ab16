"""Tasks of lm-eval over local files, small enough for a tiny model with one token per character."""

from __future__ import annotations

import json
from pathlib import Path

from chats import write_jsonl

SUMS = """task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
training_split: train
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["\\n", "#"], do_sample: false, max_gen_toks: 5}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""

CHOICES = """task: choices
dataset_path: json
dataset_kwargs: {{data_files: {{train: {folder}/train.jsonl, test: {folder}/test.jsonl}}}}
training_split: train
test_split: test
fewshot_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""

SHUFFLED = """task: shuffled
include: choices.yaml
process_docs: !function shuffle.shuffled
"""

SHUFFLE = """
import random


def shuffled(dataset):
    def one(row):
        order = list(range(len(row["choices"])))
        random.shuffle(order)
        label = order.index(row["label"])
        return {**row, "choices": [row["choices"][i] for i in order], "label": label}

    return dataset.map(one)
"""

TEXTS = """task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/test.jsonl}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list:
  - {{metric: word_perplexity}}
  - {{metric: bits_per_byte}}
metadata: {{version: 1.0}}
"""

GROUP = """group: both
task: [choices, shuffled]
aggregate_metric_list:
  - {metric: acc, aggregation: mean, weight_by_size: true}
metadata: {version: 1.0}
"""


def rows(n: int, start: int = 0) -> list[dict]:
    """Additions with four answers to choose from, the right one at places that differ."""
    found = []
    for i in range(start, start + n):
        right = 2 * i + 1
        order = [right, right + 1, right + 10, right - 1]
        order = order[i % 4 :] + order[: i % 4]
        found.append(
            {
                "question": f"{i}+{i + 1}?", "answer": str(right), "choices": [str(x) for x in order],
                "label": order.index(right),
            }
        )  # fmt: skip
    return found


def write_tasks(folder: Path, n: int = 12) -> Path:
    """A folder with the tasks sums, choices, shuffled, texts and the group both."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "test.jsonl", rows(n, start=12))  # a tiny model has some of them right
    write_jsonl(folder / "train.jsonl", rows(8, start=50))
    for name, text in (("sums", SUMS), ("choices", CHOICES), ("texts", TEXTS)):
        (folder / f"{name}.yaml").write_text(text.format(folder=folder))
    (folder / "shuffled.yaml").write_text(SHUFFLED)
    (folder / "shuffle.py").write_text(SHUFFLE)
    (folder / "both.yaml").write_text(GROUP)
    return folder


def lines(path: Path) -> list[dict]:
    """A JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
