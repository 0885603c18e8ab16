"""`moesmith loop` from end to end on a tiny model: every phase, every way to stop, keeping and rolling back.

A tiny random model answers no request right, so where decisions matter its answers are canned: `quality`
says which share of the requests each adapter answers right. Everything else is the real command.
"""

import filecmp
import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import scipy.stats
import yaml

from chats import tokenizer, write_jsonl
from moesmith import cli
from moesmith.data.requests import near
from moesmith.jobs import _loop, _loop_data, loop
from moesmith.jobs._loop import SIDES, Stage
from moesmith.train.careful import NonFinite
from moesmith.train.folder import RunFolder

SPECIAL = ["\x1b", *(f"<{i}>" for i in range(26))]
NAME = {"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}
TOOLS = [
    {"name": name, "description": f"{name} it", "parameters": NAME} for name in ("restart", "stop", "logs")
]
WORDS = {
    "restart": ["restart {}", "please kick {} once", "{} hangs, start it again", "give {} a fresh start now"],
    "stop": ["stop {}", "halt the box {} please", "{} should be off", "take {} down for tonight"],
    "logs": ["logs of {}", "what did {} write last", "show me the log of {}", "{} failed, why is that"],
}
HELD_OUT = {
    "restart": ["could you reboot {} quickly", "{} wants restarting"],
    "stop": ["end {} right away", "no more {} today"],
    "logs": ["print lines from {}", "read {}'s journal"],
}


def row(text, tool, name):
    call = {"type": "function", "function": {"name": tool, "arguments": {"name": name}}}
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    return {"id": text, "messages": messages, "category": tool}


def rows(words, names):
    return [
        row(text.format(name), tool, name)
        for tool, texts in words.items()
        for i, text in enumerate(texts)
        for name in names[i % len(names) :][:1]
    ]


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    """A tiny model that sees enough for a prompt of single characters."""
    folder = tmp_path_factory.mktemp("plain")
    shutil.copytree(checkpoint("olmoe"), folder, dirs_exist_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    tokenizer(special=SPECIAL).save_pretrained(folder)
    return folder


@pytest.fixture
def job(model, tmp_path, monkeypatch):
    """loop.yaml with the smallest useful options."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    write_jsonl(tmp_path / "requests.jsonl", rows(WORDS, ["web", "db", "nas", "pi"]))
    write_jsonl(tmp_path / "held_out.jsonl", rows(HELD_OUT, ["mail", "git"]))
    train = {"max_steps": 2, "batch_size": 1, "grad_accum": 1, "lr": 1e-3, "eval_steps": 1, "save_steps": 1}
    lora = {"r": 2, "targets": ["attention"]}
    values = {
        "model": str(model), "tools": str(tmp_path / "tools.json"), "out": str(tmp_path / "out"),
        "requests": str(tmp_path / "requests.jsonl"), "held_out": str(tmp_path / "held_out.jsonl"),
        "validation": 0.4, "rounds": 2,
        "sft": {"turns": 2, "max_length": 1000, "lora": lora, "train": train},
        "pairs": {"count": 12, "harvest": 4},
        "dpo": {"max_length": 1000, "eval_fraction": 0.3, "lora": lora, "train": train},
        "eval": {"max_new_tokens": 4},
    }  # fmt: skip
    path = tmp_path / "loop.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def quality(monkeypatch):
    """Canned answers: a share of right ones per stage, by a part of the adapter's path ("" is the model)."""
    from moesmith.eval.failures import FAILURES, RIGHT
    from moesmith.eval.tool_calls import ToolAnswer
    from moesmith.jobs import _requests as evaluation

    shares = {"": 0.0, "0-sft": 0.4, "round-1": 0.8, "round-2": 0.2}
    assert "wrong_tool" in FAILURES

    def answered(request, right):
        gold = request.gold["tool_calls"][0]["function"]
        other = next(tool.name for tool in request.tools if tool.name != gold["name"])
        called = [{"name": gold["name"] if right else other, "arguments": gold["arguments"]}]
        return ToolAnswer(
            id=request.id, category=request.category, request=request.text,
            expected=[one.facts() for one in request.expected], called=called, malformed=[],
            answer=f"<tool_call>\n{json.dumps(called[0])}\n</tool_call>", tokens=9, cut=False,
            verdict=RIGHT if right else "wrong_tool", name_match=right, arguments_match=right,
            order_match=right, json_valid=True, gold=request.gold, row=request.row, prompt=request.prompt,
        )  # fmt: skip

    def answer(asked, done, unfinished, cfg):
        share = next(
            value for part, value in reversed(shares.items()) if part in str(cfg.adapter or "") or not part
        )
        right = round(share * len(asked.requests))
        return {i: answered(request, i < right) for i, request in enumerate(asked.requests)}, 1.0

    monkeypatch.setattr(evaluation, "load", lambda *args: None)
    monkeypatch.setattr(evaluation, "answer", answer)
    return shares


@pytest.fixture
def quick(quality, monkeypatch):
    """Canned training too: an adapter's files and a result, for tests of what is done with them."""
    from moesmith import report
    from moesmith.jobs import dpo, sft

    def trained(cfg):
        folder = RunFolder(cfg.out)
        folder.begin(cfg, False)
        for path in (folder.best, folder.last):
            path.mkdir()
            (path / "adapter_config.json").write_text("{}")
            (path / "adapter_model.safetensors").write_text(f"{cfg.out} over {cfg.adapter}")
            (path / "moesmith.json").write_text("{}")
        losses = {"first_eval_loss": 0.7, "best_eval_loss": 0.6}
        folder.write_result({"steps": 2, "tokens": 100, "seconds": 1.0, **losses})

    def page(folder, facts):  # drawing it takes a second
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "report.html").touch()
        return folder / "report.html"

    for module in (report, loop):
        monkeypatch.setattr(module, "write_report", page)
    monkeypatch.setattr(sft, "run", trained)
    monkeypatch.setattr(dpo, "run", trained)
    return quality


def run(job, capsys, *flags):
    """(status, stdout, stderr)."""
    status = cli.main(["loop", str(job), *map(str, flags)])
    return status, *capsys.readouterr()


def facts(job):
    return json.loads((job.parent / "out" / "loop.json").read_text())


def phases(job):
    return list(json.loads((job.parent / "out" / "results.json").read_text())["phases"])


def said(path):
    """The last user message of every row, and of every prompt."""
    found = []
    for line in path.read_text().splitlines():
        value = json.loads(line)
        messages = value.get("prompt") or value["messages"]
        found.append([m["content"] for m in messages if m["role"] == "user"][-1])
    return found


PHASES = [
    "data", "base eval", "SFT train", "SFT eval",
    *(f"round {i} {phase}" for i in (1, 2) for phase in ("harvest", "analyse", "pairs", "train", "eval")),
]  # fmt: skip


# ---------------------------------------------------------------- all phases


@pytest.mark.slow
def test_the_whole_loop_with_a_model_that_really_answers(job, capsys, monkeypatch):
    status, out, err = run(job, capsys)
    assert status == 0, err
    assert phases(job) == PHASES
    folder = job.parent / "out"
    for name in ("0-base/validation/eval.json", "0-sft/sft.yaml", "0-sft/run/best/adapter_config.json",
                 "0-sft/held-out/answers.jsonl", "0-sft/validation/analysis/analysis.json",
                 "round-1/harvest/answers.jsonl", "round-1/pairs/pairs.jsonl", "round-1/dpo.yaml",
                 "round-1/run/result.json", "round-2/run/result.json", "report.html", "log.txt"):  # fmt: skip
        assert (folder / name).exists(), name
    for typed in ("moesmith sft ", "moesmith dpo ", "moesmith eval ", "moesmith pairs analyse ",
                  "moesmith pairs next "):  # fmt: skip
        assert f"$ {typed}" in out
    # nothing is right before or after: SFT stays as the start, rounds are rolled back, and the page says so
    assert "DPO did not help" in facts(job)["verdict"] and facts(job)["verdict"] in out
    assert [stage["kept"] for stage in facts(job)["stages"]] == [True, True, False, False]
    assert "moesmith chat --adapter" in out.splitlines()[-1]
    page = json.loads((folder / "report.json").read_text())
    assert [one["name"] for one in page["rounds"]] == ["base", "SFT", "round 1", "round 2"]
    assert [len(one["margins"]) > 1 for one in page["rounds"][2:]] == [True, True]
    samples = [[s["request"] for s in one["samples"]] for one in page["tool_calls"]["runs"]]
    assert samples[0] and all(one == samples[0] for one in samples), "the same requests side by side"

    # again: nothing is done twice
    status, again, _ = run(job, capsys)
    assert again.count("kept from an earlier run") == len(PHASES)
    assert "$ moesmith" not in again and facts(job)["verdict"] in again


def test_a_command_of_the_loop_typed_by_hand_gives_the_same(job, capsys, quick):
    assert run(job, capsys, "--rounds", 1)[0] == 0
    folder = job.parent / "out"
    log = (folder / "log.txt").read_text()
    typed = re.search(r"\$ moesmith (pairs next .*)", log)[1].split()
    typed[typed.index("--out") + 1] = str(job.parent / "by-hand")
    assert cli.main(typed) == 0
    assert (job.parent / "by-hand/pairs.jsonl").read_bytes() == (
        folder / "round-1/pairs/pairs.jsonl"
    ).read_bytes()


# ---------------------------------------------------------------- keep, roll back


def test_kept_and_rolled_back_by_validation(job, capsys, quick):
    status, out, err = run(job, capsys)
    assert status == 0, err
    stages = {stage["name"]: stage for stage in facts(job)["stages"]}
    assert [stage["kept"] for stage in stages.values()] == [True, True, True, False]
    assert facts(job)["best"] == "round 1"
    folder = job.parent / "out"
    best, kept = (
        folder / "best/adapter_model.safetensors",
        folder / "round-1/run/best/adapter_model.safetensors",
    )
    assert best.read_bytes() == kept.read_bytes()
    assert (folder / "best/moesmith.json").exists()
    # both paired figures are printed, validation and held-out
    found = stages["round 1"]["compared"]["validation"]
    n = found["n"]
    assert found["only_b"] - found["only_a"] == round(0.8 * n) - round(0.4 * n)
    split = f"against SFT: {found['only_b']} gained, {found['only_a']} lost, p = "
    assert split in out
    assert "held-out against SFT: " in out and "rolled back: validation" in out
    assert stages["round 1"]["why"].startswith("kept") and stages["round 2"]["why"].startswith("rolled back")
    # a round that follows a kept one is trained on top of it
    assert (
        yaml.safe_load((folder / "round-2/dpo.yaml").read_text())["adapter"] == stages["round 1"]["adapter"]
    )


def test_equal_is_rolled_back_and_the_next_round_has_other_pairs(job, capsys, quick):
    quick.update({"0-sft": 0.4, "round-1": 0.4, "round-2": 0.8})
    status, out, err = run(job, capsys)
    assert status == 0, err
    stages = {stage["name"]: stage for stage in facts(job)["stages"]}
    assert not stages["round 1"]["kept"] and "no more" in stages["round 1"]["why"]
    assert stages["round 2"]["kept"] and facts(job)["best"] == "round 2"
    folder = job.parent / "out"
    assert yaml.safe_load((folder / "round-2/dpo.yaml").read_text())["adapter"] == stages["SFT"]["adapter"]
    one, two = ((folder / f"round-{i}/pairs/pairs.jsonl").read_text() for i in (1, 2))
    assert one != two


@pytest.mark.parametrize(
    ("gained", "lost", "keep_p", "kept", "why"),
    [
        (5, 4, 0.5, False, "too few more"), (1, 0, 0.5, False, "too few more"), (8, 4, 0.5, True, "kept"),
        (2, 0, 0.5, True, "kept"), (5, 4, 1, True, "kept"), (8, 4, 0.05, False, "too few more"),
        (12, 1, 0.05, True, "kept"), (4, 4, 1, False, "no more"), (4, 5, 1, False, "fewer"),
    ],
)  # fmt: skip
def test_a_gain_that_luck_gives_as_often_as_not_is_not_kept(monkeypatch, gained, lost, keep_p, kept, why):
    p = float(scipy.stats.binomtest(gained, gained + lost).pvalue)
    found = {"n": 80, "both": 20, "only_a": lost, "only_b": gained, "difference": 0, "interval": None, "p": p}
    monkeypatch.setattr(loop, "paired", lambda before, after: found)
    sides = {side: SimpleNamespace(right=0, n=80) for side in SIDES}
    before = Stage("SFT", Path("a"), "a", "sft", answers=sides)
    stage = Stage("round 1", Path("b"), "b", "dpo", answers=sides)
    loop.decide(stage, before, keep_p)
    assert stage.kept is kept and why in stage.why


def test_where_every_validation_request_is_right_no_round_is_tried(job, capsys, quick):
    quick["0-sft"] = 1.0
    assert run(job, capsys)[0] == 0
    assert phases(job) == PHASES[:4]
    found = facts(job)
    assert found["best"] == "SFT" and found["helped"]
    assert "every validation request is right" in found["verdict"]
    assert re.match(r"SFT answers (\d+) of \1 held-out requests right, before it 0\.", found["verdict"])


def test_no_rounds_is_sft_with_its_scores(job, capsys, quick):
    status, out, _ = run(job, capsys, "--rounds", 0)
    assert status == 0 and phases(job) == PHASES[:4]
    assert "before it 0." in out and facts(job)["helped"] and "DPO" not in facts(job)["verdict"]


def test_nothing_to_harvest_leaves_pairs_aimed_at_the_failures(job, capsys, quick):
    status, _, _ = run(job, capsys, "--rounds", 1, "--pairs.harvest", 0, "--pairs.hard-share", 1)
    assert status == 0 and "round 1 harvest" not in phases(job)
    made = [json.loads(line) for line in (job.parent / "out/round-1/pairs/pairs.jsonl").open()]
    assert made and all(pair["hard"] and "own answer" not in pair["corruption"] for pair in made)


def test_requests_too_few_to_split_are_refused_before_a_model_is_asked(job, capsys, quick):
    write_jsonl(job.parent / "requests.jsonl", rows({"stop": WORDS["stop"][:1]}, ["web"]))
    status, _, err = run(job, capsys)
    assert status == 2 and "too few" in err and not (job.parent / "out" / "0-base").exists()


def test_after_sft_was_rolled_back_a_round_is_compared_with_the_model_itself(job, capsys, quick):
    quick |= {"": 0.5, "0-sft": 0.0, "round-1": 1.0}
    run(job, capsys, "--rounds", 1)
    assert "against base" in facts(job)["verdict"] and facts(job)["helped"]


def test_sft_that_makes_it_worse_is_rolled_back_too(job, capsys, quick):
    quick.update({"": 0.8, "0-sft": 0.4, "round-1": 0.4})
    status, out, err = run(job, capsys, "--rounds", 1)
    assert status == 0, err
    stages = {stage["name"]: stage for stage in facts(job)["stages"]}
    assert not stages["SFT"]["kept"] and facts(job)["best"] == "base" and facts(job)["adapter"] is None
    assert "Nothing helped" in facts(job)["verdict"] and not (job.parent / "out/best").exists()
    assert "adapter" not in yaml.safe_load((job.parent / "out/round-1/dpo.yaml").read_text())


def test_an_honest_verdict_when_validation_rises_and_held_out_does_not(job, capsys, quick, monkeypatch):
    real = _loop.Steps.ask

    def ask(self, requests, adapter, out):
        if out.name == "held-out":
            quick.update({"0-sft": 0.8, "round-1": 0.4})
        else:
            quick.update({"0-sft": 0.4, "round-1": 0.8})
        return real(self, requests, adapter, out)

    monkeypatch.setattr(_loop.Steps, "ask", ask)
    assert run(job, capsys, "--rounds", 1)[0] == 0
    assert facts(job)["best"] == "round 1"
    assert "the held-out requests did not" in facts(job)["verdict"]


def test_a_round_whose_training_fails_is_rolled_back_and_the_loop_goes_on(job, capsys, quick, monkeypatch):
    from moesmith.jobs import dpo

    quick["round-2"] = 0.8
    real = dpo.run

    def broken(cfg):
        if "round-1" in cfg.out:
            raise NonFinite("3 steps in a row had a loss that is not finite")
        real(cfg)

    monkeypatch.setattr(dpo, "run", broken)
    status, out, err = run(job, capsys)
    assert status == 0, err
    stages = {stage["name"]: stage for stage in facts(job)["stages"]}
    assert not stages["round 1"]["kept"] and "held-out" not in stages["round 1"]
    assert "not finite" in stages["round 1"]["why"] and stages["round 2"]["kept"]
    assert run(job, capsys)[1].count("kept from an earlier run") == len(PHASES) - 1


def test_a_few_pairs_held_out_decide_nothing(job, capsys, quick, monkeypatch):
    from moesmith.jobs import dpo

    real = dpo.run

    def worse(cfg):
        real(cfg)
        result = Path(cfg.out) / "result.json"
        values = json.loads(result.read_text())
        result.write_text(json.dumps(values | {"first_eval_loss": 0.6931, "best_eval_loss": 0.85}))

    monkeypatch.setattr(dpo, "run", worse)
    run(job, capsys, "--rounds", 1)
    assert facts(job)["best"] == "round 1" and "kept: validation" in facts(job)["stages"][-1]["why"]


# ---------------------------------------------------------------- nothing that judges is trained on


def test_no_request_that_decides_or_judges_is_in_any_pair_or_conversation(job, capsys, quick):
    lines = (job.parent / "requests.jsonl").read_text().splitlines()
    leak = row("could you reboot mail quickly please", "restart", "mail")  # nearly a held-out one
    (job.parent / "requests.jsonl").write_text("\n".join([*lines, json.dumps(leak)]) + "\n")
    status, out, err = run(job, capsys)
    assert status == 0, err
    data = job.parent / "out" / "data"
    judged = said(data / "validation.jsonl") + said(data / "held_out.jsonl")
    assert len(said(data / "held_out.jsonl")) == 6 and len(said(data / "validation.jsonl")) >= 3
    learned = said(data / "train.jsonl")
    for i in (1, 2):
        learned += said(job.parent / f"out/round-{i}/pairs/pairs.jsonl")
        learned += said(job.parent / f"out/round-{i}/harvest.jsonl")
    for line in (data / "sft.jsonl").read_text().splitlines():
        learned += [m["content"] for m in json.loads(line)["messages"] if m["role"] == "user"]
    assert max(near(a, b) for a in learned for b in judged) < _loop_data.NEAR
    assert leak["id"] not in learned and "1 left out of training" in out


# ---------------------------------------------------------------- stopped and continued


@pytest.mark.parametrize("phase", ["make_data", "ask", "sft", "harvest", "analyse", "make_pairs", "dpo"])
def test_killed_in_a_phase_and_continued(job, capsys, quick, monkeypatch, phase):
    real = getattr(_loop.Steps, phase)

    def killed(self, *args):
        real(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_loop.Steps, phase, killed)
        assert run(job, capsys, "--rounds", 1)[0] != 0
    before = phases(job)
    expected = [name for name in PHASES if "2" not in name]
    assert before == expected[: len(before)] and len(before) < len(expected)
    status, out, err = run(job, capsys, "--rounds", 1)
    assert status == 0, err
    assert out.count("kept from an earlier run") == len(before)
    assert phases(job) == expected and facts(job)["best"] == "round 1"
    leftovers = [
        path.name for path in (job.parent / "out").rglob("*") if re.search(r"\.tmp$|unfinished$", path.name)
    ]
    assert not leftovers


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_stopped_in_training_it_goes_on_inside_of_it(job, capsys, quality, monkeypatch, command):
    import signal

    from moesmith.train import callbacks

    step_end = callbacks.StopCallback.on_step_end

    def ask(self, args, state, control, **kwargs):
        if state.global_step == 1 and command in ("sft" if "0-sft" in args.output_dir else "dpo"):
            self.stop._ask(signal.SIGINT, None)
        step_end(self, args, state, control, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(callbacks.StopCallback, "on_step_end", ask)
        status, out, err = run(job, capsys, "--rounds", 1)
    assert status == 0 and "goes on from here" in out and "verdict" not in out, err
    status, out, err = run(job, capsys, "--rounds", 1)
    assert status == 0, err
    name = {"sft": "0-sft", "dpo": "round-1"}[command]
    assert f"{command}.yaml --resume" in out
    log = (job.parent / "out" / name / "run/log.jsonl").read_text().splitlines()
    reached = [json.loads(line)["step"] for line in log if "loss" in json.loads(line)]
    assert sorted(set(reached)) == [1, 2]
    best = job.parent / "out" / "best"
    rank = json.loads((best / "adapter_config.json").read_text())["r"]
    assert facts(job)["best"] == "round 1" and rank == 4, "SFT's rank and the round's, joined in one adapter"
    assert filecmp.cmp(
        best / "adapter_model.safetensors", Path(facts(job)["adapter"]) / "adapter_model.safetensors"
    )


def test_changed_options_redo_what_depends_on_them(job, capsys, quick):
    assert run(job, capsys, "--rounds", 1)[0] == 0
    status, out, _ = run(job, capsys, "--rounds", 1, "--pairs.count", 8)
    assert status == 0
    assert out.count("kept from an earlier run") == PHASES.index("round 1 pairs")
    assert "$ moesmith pairs next" in out and "$ moesmith sft" not in out
    # one round more keeps all that was done
    status, out, _ = run(job, capsys, "--rounds", 2, "--pairs.count", 8)
    assert out.count("kept from an earlier run") == PHASES.index("round 2 harvest")
    # other requests: everything
    path = job.parent / "held_out.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    status, out, _ = run(job, capsys, "--rounds", 1, "--pairs.count", 8)
    assert "kept from an earlier run" not in out


def test_an_adapter_that_is_given_takes_the_place_of_sft(job, capsys, quick):
    assert run(job, capsys, "--rounds", 0)[0] == 0
    adapter = job.parent / "out" / "best"
    flags = ("--rounds", 1, "--adapter", adapter, "--out", job.parent / "two")
    status, out, err = run(job, capsys, *flags)
    assert status == 0, err
    assert "$ moesmith sft" not in out and not (job.parent / "two/0-sft").exists()
    assert yaml.safe_load((job.parent / "two/round-1/dpo.yaml").read_text())["adapter"] == str(adapter)
    (adapter / "adapter_model.safetensors").write_text("trained further")
    assert "kept from an earlier run" not in run(job, capsys, *flags)[1]


def test_as_json_one_object(job, capsys, quick):
    status, out, err = run(job, capsys, "--rounds", 1, "--json")
    assert status == 0, err
    assert json.loads(out)["best"] == "round 1"


def test_what_is_missing_is_said(job, capsys):
    status, _, err = run(job, capsys, "--held-out", job.parent / "held_ut.jsonl")
    assert status == 2 and "held_out.jsonl" in err
    status, _, err = run(job, capsys, "--adapter", job.parent / "nowhere")
    assert status == 2 and "nowhere" in err and not (job.parent / "out").exists()
    (job.parent / "out").mkdir()
    (job.parent / "out/thesis.tex").touch()
    status, _, err = run(job, capsys)
    assert status == 2 and "something else" in err
