"""`moesmith eval`: a tiny model end to end, canned answers for the figures, and what goes wrong."""

import json
import shutil

import pytest
import torch

from chats import chat, tokenizer, write_jsonl
from eval.test_served import Fake
from moesmith import cli
from moesmith.eval import tool_calls
from moesmith.jobs import _requests as job
from moesmith.jobs._eval import Unfinished, lines, read_lines

ESCAPE = "\x1b"
SPECIAL = [ESCAPE, *(f"<{i}>" for i in range(26))]  # every id of the tiny vocabulary is some text
NAME = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
TOOLS = [{"name": name, "parameters": NAME} for name in ("restart", "stop", "logs")]


def row(text, tool=None, category="one", **more):
    calls = [{"type": "function", "function": {"name": tool, "arguments": {"name": "web"}}}] if tool else []
    answer = {"role": "assistant", "content": "" if tool else "Which one?"} | (
        {"tool_calls": calls} if calls else {}
    )
    return {"id": text, "messages": [*chat(text), answer], "category": category, **more}


ROWS = [row("restart web", "restart"), row("stop web", "stop"), row("logs web", "logs", "two"),
        row("start it", None, "ask"), row("halt web", "stop", "two")]  # fmt: skip


@pytest.fixture
def files(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    write_jsonl(tmp_path / "held_out.jsonl", ROWS)
    return tmp_path


@pytest.fixture(scope="module")
def plain(checkpoint, tmp_path_factory):
    """A tiny model in 16 bits that sees enough for a prompt of single characters."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(checkpoint("olmoe"), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    tokenizer(special=SPECIAL).save_pretrained(folder)
    return folder


def run(capsys, files, *argv, out="run", tokens=6):
    """(status, stdout, stderr) of one evaluation."""
    paths = ["--tools", files / "tools.json", "--requests", files / "held_out.jsonl", "--out", files / out]
    status = cli.main(["eval", *map(str, [*argv, *paths, "--max-new-tokens", tokens])])
    return status, *capsys.readouterr()


def answers(files, out="run"):
    return [json.loads(line) for line in (files / out / "answers.jsonl").read_text().splitlines()]


# ---------------------------------------------------------------- a real model


def test_a_model_end_to_end(plain, files, capsys):
    status, out, err = run(capsys, files, plain, "--json")
    assert status == 0, err
    facts = json.loads(out)
    assert facts == json.loads((files / "run" / "eval.json").read_text()) | {
        "out": str(files / "run"), "report": str(files / "run" / "report.html")}  # fmt: skip
    assert facts["tool_calls"]["n"] == 5 == len(answers(files))
    assert [record["id"] for record in answers(files)] == [r["id"] for r in ROWS]
    assert facts["requests"]["rows"]["kept"] == 5 and [t["function"]["name"] for t in facts["tools"]] == [
        "restart", "stop", "logs"]  # fmt: skip
    assert sorted(path.name for path in (files / "run").iterdir()) == [
        "answers.jsonl", "eval.json", "report.html", "report.json", "report.png"]  # fmt: skip
    assert not (files / "run.unfinished").exists() and not (files / "run.tmp").exists()
    assert facts["how"]["command"].startswith(f"moesmith eval {plain} --requests ")

    status, _, err = run(capsys, files, plain)
    assert status == 2 and "exists" in err
    status, out, err = run(capsys, files, plain, "--against", files / "run", out="again")
    assert status == 0, err
    assert "0 only now, 0 only then" in out and "p = 1" in out and "+0.0 points" in out
    assert answers(files, "again") == answers(files), "greedy answers repeat"
    assert json.loads((files / "again" / "eval.json").read_text())["paired"]["p"] == 1


def test_an_adapter_brings_its_base_and_changes_answers(plain, files, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from moesmith import ExpertsConfig
    from moesmith.models.checkpoint import base_record

    model = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=ExpertsConfig("nf4"), dtype=torch.bfloat16
    )
    record = base_record(model, plain)
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    torch.manual_seed(0)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.8)
    adapter = tmp_path / "run1" / "best"
    tuned.save_pretrained(adapter)
    (adapter / "moesmith.json").write_text(json.dumps({"base": record}))

    assert run(capsys, files, plain, "--dtype", "bfloat16")[0] == 0
    status, out, err = run(capsys, files, "--adapter", adapter, "--dtype", "bfloat16", out="tuned")
    assert status == 0, err
    assert [a["answer"] for a in answers(files, "tuned")] != [a["answer"] for a in answers(files)]
    facts = json.loads((files / "tuned" / "eval.json").read_text())
    assert facts["name"] == "run1/best" and facts["adapter"]["folder"] == str(adapter)
    status, _, err = run(capsys, files, plain, "--adapter", adapter, "--scheme", "fp4", out="other")
    assert status == 2 and "trained on another base" in err


def test_a_run_that_was_killed_goes_on(plain, files, capsys, monkeypatch):
    real, calls = tool_calls.continuations, []

    def dies(model, tok, prompts, limit):
        calls.append(len(prompts))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(model, tok, prompts, limit)

    assert run(capsys, files, plain, "--batch-size", 2, out="whole")[0] == 0
    monkeypatch.setattr(tool_calls, "continuations", dies)
    assert run(capsys, files, plain, "--batch-size", 2)[0] == 130
    assert not (files / "run").exists()
    kept = files / "run.unfinished" / "answers.jsonl"
    assert len(kept.read_text().splitlines()) == 2
    with kept.open("a") as file:
        file.write('{"place": 4, "answer": {"id": "torn')

    status, _, err = run(capsys, files, plain, "--batch-size", 2, tokens=7)
    assert status == 2 and "interrupted run with another max_new_tokens" in err
    calls[:] = [0, 0]
    status, out, err = run(capsys, files, plain, "--batch-size", 2)
    assert status == 0 and "going on with an interrupted run: 2 answers are there" in err
    assert calls == [0, 0, 2, 1], "the first batch is not asked again"
    assert answers(files) == answers(files, "whole")
    assert not kept.parent.exists()


def test_a_torn_line_takes_no_other_with_it(tmp_path):
    """Killed in the middle of a line, gone on, and killed again: what was whole is there."""
    record = tool_calls.ToolAnswer(
        id="a", category="c", request="", expected=[], called=[], malformed=[], answer="", tokens=1,
        cut=False, verdict="right", name_match=True, arguments_match=True, order_match=True,
        json_valid=True, gold=None, row=1,
    )  # fmt: skip
    unfinished = Unfinished(tmp_path / "run")
    assert unfinished.open({"asked": 1}, overwrite=False) == {}
    unfinished.add({0: record})
    with (unfinished.folder / "answers.jsonl").open("a") as file:
        file.write('{"place": 1, "ans')
    unfinished.add({2: record})
    assert unfinished.open({"asked": 1}, overwrite=False) == {0: record, 2: record}
    assert unfinished.open({"asked": 2}, overwrite=True) == {}


def test_an_interrupted_run_with_other_options_is_replaced_when_asked(plain, files, capsys, monkeypatch):
    def dies(*_):
        raise KeyboardInterrupt

    real = tool_calls.continuations
    monkeypatch.setattr(tool_calls, "continuations", dies)
    assert run(capsys, files, plain)[0] == 130
    monkeypatch.setattr(tool_calls, "continuations", real)
    status, _, err = run(capsys, files, plain, tokens=3)
    assert status == 0, f"nothing was lost: {err}"
    (files / "other.unfinished").mkdir()
    (files / "other.unfinished" / "mine.txt").touch()
    status, _, err = run(capsys, files, plain, out="other")
    assert status == 2 and "is in the way" in err and (files / "other.unfinished" / "mine.txt").exists()


# ---------------------------------------------------------------- canned answers


def said(name, /, **arguments):
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


class Canned:
    """Says what it was given for each request."""

    training = False
    device = torch.device("cpu")

    def __init__(self, words):
        self.tok, self.words = tokenizer(special=SPECIAL), words
        self.generation_config = type("G", (), {"eos_token_id": None})()

    def eval(self):
        return self

    def train(self, mode):
        return self

    def generate(self, input_ids, attention_mask, max_new_tokens, pad_token_id, **_):
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            prompt = self.tok.decode(ids[mask.bool()])
            words = next(text for key, text in self.words.items() if f"user\n{key}" in prompt)
            tokens = self.tok(words + "<|im_end|>").input_ids[:max_new_tokens]
            rows.append(torch.tensor(tokens + [pad_token_id] * (max_new_tokens - len(tokens))))
        return torch.cat([input_ids, torch.stack(rows)], dim=1)


WORDS = {
    "restart web": said("restart", name="web"), "stop web": said("restart", name="web"),
    "halt web": said("restart", name="web"), "logs web": said("logs", name="db"),
    "start it": "Which?",
}  # fmt: skip


def canned(capsys, files, monkeypatch, *argv, words=WORDS, out="run"):
    monkeypatch.setattr(job, "load", lambda *_: Canned(words))
    return run(capsys, files, *argv, out=out, tokens=110)


def test_what_the_terminal_says(plain, files, capsys, monkeypatch):
    status, out, err = canned(capsys, files, monkeypatch, plain)
    assert status == 0, err
    lines = out.splitlines()
    assert "5 rows → 5 requests" in lines[0]
    assert any(line.startswith("right     2 of 5 · 40.0 % (95 %: 11.8 – 76.9)") for line in lines)
    assert "of 4 that want one: 2 call the right tools, 1 with the right arguments" in out
    table = {line.split()[0]: line.split()[1:3] for line in lines if line[:3] in ("one", "two", "ask")}
    assert table == {"one": ["2", "1"], "two": ["2", "0"], "ask": ["1", "1"]}
    assert "wrong_tool: another tool than the one expected" in out and "confused  restart for stop 2" in out
    assert 'expected        stop(name="web")' in out and "logs.name" in out
    assert lines[-1] == f"next: moesmith pairs analyse {files / 'run'}"
    page = (files / "run" / "report.html").read_text()
    assert "2 of 5 requests right: 40.0 %" in page


def test_control_characters_of_an_answer_do_not_reach_the_terminal(plain, files, capsys, monkeypatch):
    _, out, _ = canned(capsys, files, monkeypatch, plain, words=WORDS | {"stop web": f"{ESCAPE}[2J gone"})
    assert ESCAPE in answers(files)[1]["answer"] and ESCAPE not in out and "\\x1b[2J gone" in out


def test_against_an_earlier_run(plain, files, capsys, monkeypatch):
    assert canned(capsys, files, monkeypatch, plain)[0] == 0
    better = WORDS | {"stop web": said("stop", name="web"), "halt web": said("stop", name="web")}
    again = better | {"restart web": "no"}
    status, out, err = canned(
        capsys, files, monkeypatch, plain, "--against", files / "run", words=again, out="b"
    )
    assert status == 0, err
    assert "2 → 3 of 5 right · +20.0 points" in out
    assert "2 only now, 1 only then, 1 both, 1 neither · McNemar p = 1" in out
    facts = json.loads((files / "b" / "report.json").read_text())
    assert [one["right"] for one in facts["tool_calls"]["runs"]] == [2, 3]
    assert facts["tool_calls"]["paired"][0]["difference"] == 0.2
    shown = [[sample["request"] for sample in one["samples"]] for one in facts["tool_calls"]["runs"]]
    assert shown[0] == shown[1], "the same requests side by side"
    assert shown[0] == ["restart web", "stop web", "halt web", "logs web"], "what changed, then what is wrong"


def test_a_server_end_to_end_and_against_memory(plain, files, capsys, monkeypatch):
    def script(body):
        text = body["messages"][-1]["content"]
        words = WORDS[text]
        calls = [json.loads(words.split("\n")[1])] if words.startswith("<tool_call>") else []
        made = [{"function": {**call, "arguments": json.dumps(call["arguments"])}} for call in calls]
        message = {"content": None if calls else words, "tool_calls": made}
        return 200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {}}, ()

    assert canned(capsys, files, monkeypatch, plain)[0] == 0
    fake = Fake(script, owner="moesmith")
    try:
        options = ("--server", fake.url, "--concurrency", 1, "--against", files / "run", "--json")
        status, out, err = run(capsys, files, *options, out="served")
        assert status == 0, err
        record = json.loads(out)
        assert record["tool_calls"]["right"] == 2 and record["model"] is None
        assert record["server"]["kind"] == "moesmith" and record["paired"]["difference"] == 0
        assert [one["verdict"] for one in answers(files, "served")] == [
            one["verdict"] for one in answers(files)
        ]
        assert len(fake.asked) == 5
        status, _, err = run(capsys, files, "--server", fake.url, plain, out="other")
        assert status == 2 and "MODEL and --server" in err
    finally:
        fake.shutdown()
        fake.server_close()


def test_a_server_that_goes_away_loses_nothing(files, capsys, monkeypatch):
    asked = []

    def script(body):
        asked.append(body["messages"][-1]["content"])
        if len(asked) > 3 and not back:
            return 400, {"error": "gone"}, ()
        message = {"content": "Which?", "tool_calls": []}
        return 200, {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {}}, ()

    back: list[bool] = []
    fake = Fake(script, owner="moesmith")
    try:
        options = ("--server", fake.url, "--concurrency", 1)
        assert run(capsys, files, *options)[0] == 2 and len(asked) == 4
        back.append(True)
        status, out, err = run(capsys, files, *options)
        assert status == 0 and "3 answers are there" in out + err
        assert sorted(asked[:3] + asked[4:]) == sorted(one["id"] for one in ROWS)
    finally:
        fake.shutdown()
        fake.server_close()


def test_the_page_says_what_to_act_on(plain, files, capsys, monkeypatch):
    words = WORDS | {"restart web": said("reboot", name="web")}
    assert canned(capsys, files, monkeypatch, plain, words=words)[0] == 0
    verdict = json.loads((files / "run" / "report.json").read_text())["verdict"]
    assert verdict["points"] == [
        "2 of 4 wrong answers are `wrong_tool`: `restart` for `stop` 2; say in their descriptions what tells "
        "these apart, and train on pairs of the two.",
        "1 of 4 wrong answers are `invented_tool`: `reboot` 1; train on rows and pairs with these tools.",
    ]


def test_every_failure_has_something_to_act_on():
    from moesmith.eval.failures import FAILURES
    from moesmith.jobs._eval import ADVICE, advice

    named = {"wrong_tool", "invented_tool", "wrong_argument"}
    assert ADVICE.keys() | named == FAILURES.keys() and not ADVICE.keys() & named
    weak = {"name": "hard", "n": 8, "right": 0, "rate": 0.0, "interval": (0.0, 0.32)}
    facts = {"n": 100, "right": 50, "rate": 0.5, "failures": [], "by_category": [weak]}
    assert advice([], facts) == ["The category `hard` is weaker than the rest: 0 of 8."]
    assert advice([], facts | {"rate": 0.3}) == [], "within its interval"


def test_a_run_asked_in_another_way_is_compared_with_a_warning(plain, files, capsys, monkeypatch):
    assert canned(capsys, files, monkeypatch, plain)[0] == 0
    again = ("--against", files / "run", "--batch-size", 3)
    status, _, err = canned(capsys, files, monkeypatch, plain, *again, out="b")
    assert status == 0 and "run had --batch-size 16, this run has 3" in err and err.count(" had --") == 1


def test_when_all_is_right(plain, files, capsys, monkeypatch):
    right = {r["id"]: said(r["messages"][-1]["tool_calls"][0]["function"]["name"], name="web")
             for r in ROWS if "tool_calls" in r["messages"][-1]} | {"start it": "Which?"}  # fmt: skip
    status, out, _ = canned(capsys, files, monkeypatch, plain, words=right)
    assert status == 0 and "5 of 5 · 100.0 %" in out and "wrong" not in out
    assert out.splitlines()[-1] == f"next: moesmith chat {plain}"


def test_half_a_surrogate_pair_can_be_kept(tmp_path):
    """JSON may name one, and no UTF-8 file can hold it but escaped."""
    (tmp_path / "rows").write_text(lines([{"a": "\ud83d"}, {"a": "\u00fc\u2028"}]))
    assert read_lines(tmp_path / "rows") == [{"a": "\ud83d"}, {"a": "\u00fc\u2028"}]


def test_a_limit_is_spread_over_the_file(plain, files, capsys, monkeypatch):
    status, out, _ = canned(capsys, files, monkeypatch, plain, "--limit", 3)
    assert status == 0 and "3 of them are asked" in out
    assert [record["id"] for record in answers(files)] == ["restart web", "stop web", "start it"]


def test_rows_that_are_no_requests_are_counted(plain, files, capsys, monkeypatch):
    write_jsonl(files / "held_out.jsonl", [*ROWS, "{broken", row("fly", "fly"), ROWS[0]])
    status, out, _ = canned(capsys, files, monkeypatch, plain)
    assert status == 0
    assert (
        "8 rows → 5 requests" in out and "not JSON" in out and "unknown tool" in out and "asked before" in out
    )


def test_requests_that_do_not_fit_are_left_out_and_said(plain, files, capsys, monkeypatch):
    write_jsonl(files / "held_out.jsonl", [*ROWS, row("stop " * 200, "stop")])
    status, _, err = canned(capsys, files, monkeypatch, plain)
    assert status == 0 and "1 requests are left out: too long for the model" in err
    assert len(answers(files)) == 5


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--tools": "nowhere.json"}, "tools: no such file: nowhere.json"),
        ({"--requests": "nowhere.jsonl"}, "requests: no such file: nowhere.jsonl"),
        ({"--requests": "EMPTY"}, "EMPTY"),
        ({"--tools": "EMPTY"}, "EMPTY"),
        ({"--adapter": "nowhere"}, "adapter: no such file: nowhere"),
        ({"--against": "nowhere"}, "against: no such file: nowhere"),
        ({"--against": "FOLDER"}, "has no eval.json"),
        ({"--out": "MODEL"}, "exists"),
        ({"--max-new-tokens": "2000"}, "none of 5 requests can be asked"),
        ({"--limit": "0"}, "limit=0"),
    ],
)
def test_mistakes(plain, files, change, words, capsys):
    (files / "EMPTY").touch()
    (files / "FOLDER").mkdir()
    argv = {"--tools": "tools.json", "--requests": "held_out.jsonl", "--out": "run"} | change
    paths = {key: str(files / value) if (files / value).exists() or key == "--out" else value
             for key, value in argv.items()}  # fmt: skip
    if change.get("--out") == "MODEL":
        paths["--out"] = str(plain)
    status = cli.main(["eval", str(plain), *(part for pair in paths.items() for part in pair)])
    error = capsys.readouterr().err
    assert status == 2 and words in error and error.startswith("error: ")
    assert not (files / "run").exists()


def test_no_model_is_named(files, capsys):
    assert run(capsys, files)[0] == 2


def test_no_chat_template(plain, files, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(plain, bare)
    for name in ("chat_template.jinja", "chat_template.json"):
        (bare / name).unlink(missing_ok=True)
    tokenizer(template=None).save_pretrained(bare)
    status, _, err = run(capsys, files, bare)
    assert status == 2 and "the model has no chat template" in err


def test_other_requests_cannot_be_compared(plain, files, capsys, monkeypatch):
    assert canned(capsys, files, monkeypatch, plain, "--limit", 3)[0] == 0
    status, _, err = canned(capsys, files, monkeypatch, plain, "--against", files / "run", out="b")
    assert status == 2 and "different requests: 0 only in the first, 2 only in the second" in err
    assert not (files / "b.unfinished").exists(), "refused before anything is asked"


def test_weights_that_are_not_finite(plain, files, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(plain, broken)
    weights = load_file(broken / "model.safetensors")
    weights["lm_head.weight"][5] = float("nan")
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    status, _, err = run(capsys, files, broken, "--scheme", "none")
    assert status == 2 and "logits are not finite" in err and not (files / "run").exists()
