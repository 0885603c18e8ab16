"""`moesmith eval --tasks`: a tiny model end to end, stopped, gone on with, compared, and what goes wrong."""

import json
import shutil

import pytest

pytest.importorskip("lm_eval")

from chats import tokenizer, write_jsonl
from moesmith import cli
from moesmith.eval.items import Item
from tasks import lines, write_tasks

SPECIAL = [f"<{i}>" for i in range(27)]  # every id of the tiny vocabulary is some text


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory):
    """A tiny model in 16 bits that sees enough for a prompt of single characters."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(checkpoint("olmoe"), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 512}))
    tokenizer(special=SPECIAL).save_pretrained(folder)
    return folder


@pytest.fixture
def files(tmp_path):
    write_tasks(tmp_path / "tasks", n=8)
    return tmp_path


def run(capsys, files, *argv, tasks="sums,choices", out="run"):
    """(status, stdout, stderr) of one evaluation."""
    given = ["--tasks", tasks, "--task-path", files / "tasks", "--out", files / out, "--dtype", "float32"]
    status = cli.main(["eval", *map(str, [*argv, *given])])
    return status, *capsys.readouterr()


def record(files, out="run"):
    return json.loads((files / out / "eval.json").read_text())


@pytest.fixture
def adapter(plain, tmp_path):
    """An adapter that changes answers, and knows its base."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from moesmith import ExpertsConfig
    from moesmith.models.checkpoint import base_record

    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=ExpertsConfig("nf4"), dtype=torch.float32
    )
    about = base_record(model, plain)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.8)
    folder = tmp_path / "run1" / "best"
    tuned.save_pretrained(folder)
    (folder / "moesmith.json").write_text(json.dumps({"base": about}))
    return folder


def test_a_packed_model_before_and_after_an_adapter(plain, files, adapter, capsys):
    status, out, err = run(capsys, files, plain, "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert facts == record(files) | {"out": str(files / "run"), "report": str(files / "run" / "report.html")}
    items = [Item.from_dict(row) for row in lines(files / "run" / "samples.jsonl")]
    assert len(items) == 16 == facts["tasks"]["items"]
    for score in facts["tasks"]["scores"]:
        values = [item.metrics[score["metric"]] for item in items if item.task == score["task"]]
        assert score["value"] == sum(values) / len(values)
    assert sorted(path.name for path in (files / "run").iterdir()) == [
        "eval.json", "report.html", "report.json", "report.png", "samples.jsonl"]  # fmt: skip
    assert not (files / "run.unfinished").exists() and not (files / "run.tmp").exists()
    assert facts["how"]["command"].startswith(f"moesmith eval {plain} --tasks sums,choices --out ")
    assert facts["how"]["prompts"] == "chat template" and facts["model"]["hash"]

    status, out, err = run(capsys, files, "--adapter", adapter, "--against", files / "run", out="tuned")
    assert status == 0, err
    after = record(files, "tuned")
    assert after["name"] == "run1/best" and after["adapter"]["digest"]
    changed = [
        a["logprobs"] != b["logprobs"]
        for a, b in zip(lines(files / "run/samples.jsonl"), lines(files / "tuned/samples.jsonl"), strict=True)
        if "logprobs" in a
    ]
    assert all(changed) and len(changed) == 8, "the adapter was on"
    rows = {(row["task"], row["metric"]): row for row in after["paired"]["rows"]}
    assert set(rows) == {("sums", "exact_match"), ("choices", "acc"), ("choices", "acc_norm")}
    acc = rows["choices", "acc"]
    assert acc["both"] + acc["only_a"] + acc["only_b"] + acc["neither"] == 8
    assert after["paired"]["all"]["n"] == 16 and after["paired"]["asked_otherwise"] == 0
    assert "in all" in out and "McNemar" in out
    page = (files / "tuned" / "report.html").read_text()
    assert "What changed on the same items?" in page and "run1/best against" in page


def test_a_run_that_was_stopped_goes_on(plain, files, capsys, monkeypatch):
    from moesmith.eval.harness_models import Kept

    status, _, err = run(capsys, files, plain, out="whole")
    assert status == 0, err
    keep, kept = Kept._keep, []

    def dies(self, key, value):
        keep(self, key, value)
        kept.append(key)
        if len(kept) == 11:
            raise KeyboardInterrupt

    monkeypatch.setattr(Kept, "_keep", dies)
    assert run(capsys, files, plain)[0] == 130
    assert not (files / "run").exists()
    assert len(lines(files / "run.unfinished" / "responses.jsonl")) == 11

    monkeypatch.setattr(Kept, "_keep", keep)
    status, _, err = run(capsys, files, plain, "--seed", 1)
    assert status == 2 and "interrupted run with another seed" in err
    status, _, err = run(capsys, files, plain)
    assert status == 0 and "going on with an interrupted run: 11 responses are there" in err
    assert lines(files / "run" / "samples.jsonl") == lines(files / "whole" / "samples.jsonl")
    assert not (files / "run.unfinished").exists()


def test_what_the_terminal_says(plain, files, capsys):
    status, out, err = run(capsys, files, plain, "--limit", 4, "--few-shot", 2, tasks="both,sums,texts")
    assert status == 0, err
    assert "choices: 4 of 8 items, choices by log-probability, 2 examples each" in out
    assert "asked     through the chat template" in out
    (row,) = [line for line in out.splitlines() if line.startswith("both ")]
    assert row.split()[1] == "acc" and row.split()[-1] == "8"
    assert any(line.startswith("texts") and "word_perplexity" in line for line in out.splitlines())
    assert f"next: moesmith eval {plain} --adapter … --tasks both,sums,texts" in out
    assert record(files)["tasks"]["scores"][0]["shots"] == 2

    status, out, err = run(capsys, files, plain, "--chat-template", "off", out="off")
    assert status == 0 and "as plain text" in out, err
    assert not any("<|im_start|>" in row["prompt"] for row in lines(files / "off" / "samples.jsonl"))


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--tasks", "sums", "--requests", "rows.jsonl"], "--requests and --tasks"),
        ([], "nothing to ask"),
        (
            ["--requests", "rows.jsonl", "--few-shot", "2"],
            "--few-shot goes with --tasks, not with --requests",
        ),
        (["--tasks", "sums", "--reasoning-tokens", "9"], "--reasoning-tokens goes with --gpqa"),
        (["--tasks", "sums", "--task-path", "nowhere"], "task_path: no such file: nowhere"),
        (["--tasks", "sums", "--server", "x", "--adapter", "ADAPTER"], "--adapter goes with a model"),
        (["--tasks", "sums", "--against", "nowhere"], "nowhere"),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(plain, files, adapter, capsys, monkeypatch, argv, said):
    monkeypatch.chdir(files)
    argv = [str(adapter) if word == "ADAPTER" else word for word in argv]
    status = cli.main(["eval", str(plain), *argv, "--out", "run"])
    _, err = capsys.readouterr()
    assert status == 2 and said in err and "Traceback" not in err


def test_what_is_refused_before_anything_is_asked(plain, files, capsys, monkeypatch):
    monkeypatch.setattr("moesmith.jobs._tasks.load", lambda *_: pytest.fail("the model was loaded"))
    status, _, err = run(capsys, files, plain, "--max-new-tokens", 512)
    assert status == 2 and "sums lets the model write 512 tokens, and it sees 512" in err
    monkeypatch.undo()
    assert run(capsys, files, plain, "--limit", 2, tasks="choices")[0] == 0
    monkeypatch.setattr("moesmith.jobs._tasks.load", lambda *_: pytest.fail("the model was loaded"))
    for more, tasks, said in (
        ([], "choices", "choices has other items in the earlier run: 2 there, 8 here"),
        ([], "sums", "has choices, this one sums"),
    ):
        status, _, err = run(
            capsys, files, plain, "--against", files / "run", *more, tasks=tasks, out="again"
        )
        assert status == 2 and said in err
    rows = lines(files / "run" / "samples.jsonl")
    rows[1]["key"] = "another"
    write_jsonl(files / "run" / "samples.jsonl", rows)
    more = ("--against", files / "run", "--limit", 2)
    status, _, err = run(capsys, files, plain, *more, tasks="choices", out="again")
    assert status == 2 and f"choices: item {rows[1]['id']} is another one in the earlier run" in err
    status, _, err = run(capsys, files, plain)
    assert status == 2 and "exists" in err


def test_a_chat_server_cannot_score_choices(files, capsys, monkeypatch):
    monkeypatch.setattr("moesmith.eval.harness_models.server_models", lambda url: ["tiny"])
    status, _, err = run(capsys, files, "--server", "127.0.0.1:1")
    assert (
        status == 2 and "choices: scored by log-probability, which /v1/chat/completions does not give" in err
    )
    status, _, err = run(capsys, files, "--server", "127.0.0.1:1", "--server-model", "big", tasks="sums")
    assert status == 2 and "has no model big" in err and "it lists: tiny" in err
