"""Chat with experts in RAM or on disk: the answers of resident ones, and figures that add up."""

import io
import json
import sys

import pytest
import torch

import chats
import profiles
import tiny
from moesmith import cli
from moesmith.experts.residency.attach import packed_experts
from moesmith.jobs import chat as job

TOKENS = 12


@pytest.fixture(scope="module")
def made(checkpoint, tmp_path_factory):
    """A packed tiny model with a tokenizer, an adapter on it, a profile of it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from moesmith import ExpertsConfig
    from moesmith.models.checkpoint import base_record

    root = tmp_path_factory.mktemp("offloaded")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint("olmoe"), quantization_config=ExpertsConfig("nf4"), dtype=torch.bfloat16
    )
    model.save_pretrained(root / "packed")
    chats.tokenizer().save_pretrained(root / "packed")
    base = base_record(model, root / "packed")
    tokens = torch.randint(1, 90, (tiny.LAYERS, 6, tiny.NUM_EXPERTS))
    profile = profiles.profile(tokens)
    for stats, (name, _) in zip(profile.layers, packed_experts(model), strict=True):
        stats.name = name
    profile.write(root / "profile")
    lora = LoraConfig(r=4, target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    adapted = get_peft_model(model, lora)
    torch.manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(root / "adapter")
    (root / "adapter" / "moesmith.json").write_text(json.dumps({"base": base}))
    return root


def ask(capsys, *argv: str, tokens: int = TOKENS) -> dict:
    status = cli.main(["chat", *map(str, argv), "--prompt", "hello", "--max-new-tokens", str(tokens),
                       "--temperature", "0", "--device", "cpu", "--json"])  # fmt: skip
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return json.loads(captured.out)


@pytest.mark.parametrize(
    "flags",
    [
        ["--experts", "disk"],
        ["--experts", "ram"],
        ["--experts", "ram", "--cache", "0"],
        ["--experts", "ram", "--cache", "1", "--kept", "2", "--hot", "PROFILE"],
        ["--experts", "ram", "--kept", "8"],
        ["--experts", "ram", "--cold-on-cpu"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("with_adapter", [False, True])
def test_answers_are_those_of_resident_experts(made, flags, with_adapter, capsys):
    model = ["--adapter", made / "adapter"] if with_adapter else [made / "packed"]
    resident = ask(capsys, *model)
    flags = [str(made / "profile") if word == "PROFILE" else word for word in flags]
    offloaded = ask(capsys, *model, *flags)
    assert offloaded["answer"] == resident["answer"] and len(resident["answer"]) > 4
    assert "transfers" not in resident and offloaded["transfers"]["layers"]


def test_figures_are_of_the_answer_and_the_prompt_is_apart(made, capsys):
    facts = ask(capsys, made / "packed", "--experts", "ram", "--cache", "2")
    found, steps = facts["transfers"], facts["tokens"] - 1  # the first token comes of reading the prompt
    assert steps > 4 and found["tokens"] == steps
    assert found["hits"] + found["misses"] == steps * tiny.LAYERS * tiny.TOP_K
    each = found["experts_bytes"] / (tiny.LAYERS * tiny.NUM_EXPERTS)
    assert found["bytes"] % each == 0
    assert found["misses"] <= found["bytes"] / each <= found["misses"] + found["predicted"]
    assert found["bytes_per_token"] == found["bytes"] / steps and 0 < found["hit_rate"] < 1
    assert found["prompt"]["tokens"] == facts["prompt_tokens"] and found["prompt"]["bytes"] > 0
    assert [row["layer"] for row in found["layers"]] == [f"model.layers.{i}.mlp.experts" for i in range(3)]
    assert found["bytes"] == sum(row["bytes"] for row in found["layers"])


def test_all_kept_nothing_moves(made, capsys):
    facts = ask(capsys, made / "packed", "--experts", "ram", "--kept", str(tiny.NUM_EXPERTS))
    assert facts["transfers"]["bytes"] == 0 and facts["transfers"]["misses"] == 0


def test_a_hot_expert_is_a_hit(made, capsys):
    """What a profile says is hot is kept instead of the first half."""
    flags = ["--experts", "ram", "--kept", "4", "--cache", "0"]
    first = ask(capsys, made / "packed", *flags)["transfers"]
    hot = ask(capsys, made / "packed", *flags, "--hot", made / "profile")["transfers"]
    assert first["hits"] != hot["hits"] and first["hits"] + first["misses"] == hot["hits"] + hot["misses"]


def talk(monkeypatch, capsys, lines: str, *argv) -> str:
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    status = cli.main(["chat", *map(str, argv), "--max-new-tokens", "6", "--temperature", "0"])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.err


def test_transfers_are_shown_after_an_answer_and_a_page_is_left(made, monkeypatch, capsys, tmp_path):
    page = tmp_path / "page"
    said = talk(
        monkeypatch, capsys, "/transfers\nhello\n/transfers\nagain\n", made / "packed", "--experts", "ram",
        "--transfers", page,
    )  # fmt: skip
    before, _, after = said.partition("of experts per token")
    assert "no answer yet, so nothing was fetched" in before
    assert "of experts were fetched for each token, and computing waited" in after
    assert "of the experts asked for were there already" in after and "Reading the prompts" in after
    facts = json.loads((page / "report.json").read_text())
    assert facts["transfers"]["tokens"] == 10, "two answers of six tokens, less the first of each"
    assert facts["how"]["command"].startswith(f"moesmith chat {made / 'packed'} ")
    assert "--experts ram" in facts["how"]["command"]
    assert (page / "report.html").is_file() and str(page / "report.html") in after


def test_without_transfers_there_are_none_to_show(made, monkeypatch, capsys):
    said = talk(monkeypatch, capsys, "hello\n/transfers\n", made / "packed")
    assert "all experts lie on the device" in said


def test_a_conversation_ends_with_no_thread_left(made, monkeypatch, capsys):
    import threading

    before = set(threading.enumerate())
    talk(monkeypatch, capsys, "hello\n", made / "packed", "--experts", "ram")
    left = [t for t in set(threading.enumerate()) - before if t.is_alive()]
    for thread in left:
        thread.join(5)
    assert not [thread.name for thread in left if thread.is_alive()]


def test_a_plan_is_run(made, capsys):
    facts = ask(capsys, made / "packed", "--fit", "auto")
    assert facts["answer"] == ask(capsys, made / "packed")["answer"]


def test_damage_is_found_before_anything_is_loaded(made, capsys, tmp_path, monkeypatch):
    import shutil

    from moesmith.models.checksums import write_checksums

    folder = tmp_path / "packed"
    shutil.copytree(made / "packed", folder)
    write_checksums(folder)
    assert ask(capsys, folder, "--verify")["answer"] == ask(capsys, made / "packed")["answer"]
    weights = folder / "model.safetensors"
    whole = bytearray(weights.read_bytes())
    whole[-5] ^= 1
    weights.write_bytes(whole)
    monkeypatch.setattr(job, "load", lambda *_: pytest.fail("the model is loaded"))
    assert cli.main(["chat", str(folder), "--verify", "--prompt", "x"]) == 2
    assert "model.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--experts=ram", "--fit=auto", "--transfers=t", "--verify"])
def test_a_server_has_placed_its_experts_itself(flag, capsys):
    assert cli.main(["chat", "--server", "http://127.0.0.1:1", flag, "--prompt", "x"]) == 2
    assert "does not go with --server" in capsys.readouterr().err
