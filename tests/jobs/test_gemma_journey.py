"""Commands on a model whose class is moesmith's own: a tiny Gemma 2 with experts, from folder to folder."""

import json
import random

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import tiny
from chats import sums, tokenizer, write_jsonl
from moesmith import cli
from moesmith.models.checkpoint import Checkpoint
from moesmith.prune.stats import Profile

CODE = {"configuration_gemma_moe.py", "modeling_gemma_moe.py"}
WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew strong ale under old oaks".split()


@pytest.fixture
def moesmith(capsys, monkeypatch):
    """A command line -> what it prints on stdout. Pages are not drawn."""

    def write_report(folder, facts):
        (folder / "report.html").write_text("page")
        return folder / "report.html"

    monkeypatch.setattr("moesmith.report.write_report", write_report)

    def command(*argv):
        status = cli.main([str(arg) for arg in argv])
        captured = capsys.readouterr()
        assert status == 0, captured.err + captured.out
        return captured.out

    return command


def write_text(path, seed):
    draw = random.Random(seed)
    return write_jsonl(path, [{"text": " ".join(draw.choices(WORDS, k=12))} for _ in range(24)])


def names(folder):
    return {file.name for file in folder.iterdir()}


def test_inspect_quantize_chat_sft_profile_prune_verify(moesmith, tmp_path):
    model, packed, prof, small = (tmp_path / name for name in ("model", "packed", "prof", "small"))
    tiny.save("gemma2_moe", model)
    tokenizer().save_pretrained(model)
    greedy = ("--prompt", "hello", "--max-new-tokens", 8, "--temperature", 0, "--json")

    text = moesmith("inspect", model)
    assert "gemma2_moe · 3 layers, 3 with experts · 8 experts, top-2" in text
    assert "72 expert matrices, one scale per 64 weights" in text

    text = moesmith("quantize", model, "--out", packed, "--dtype", "float32")
    assert "72 expert matrices in nf4" in text and "bit-equal" in text
    assert names(packed) >= CODE and Checkpoint.open(packed).is_packed

    answer = json.loads(moesmith("chat", packed, *greedy))
    assert answer["tokens"] > 0
    on_the_way_in = json.loads(moesmith("chat", model, *greedy, "--dtype", "float32"))
    assert on_the_way_in["answer"] == answer["answer"]

    run = {
        "model": str(packed), "out": str(tmp_path / "sft"),
        "lora": {"r": 2, "targets": ["experts", "attention", "router"]},
        "data": {"path": str(write_jsonl(tmp_path / "rows.jsonl", sums(24))), "eval_fraction": 0.1},
        "train": {"max_steps": 2, "batch_size": 2, "grad_accum": 1, "lr": 1e-2, "eval_steps": 1,
                  "save_steps": 2, "dtype": "float32", "router_aux_loss": 0.01},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    moesmith("sft", tmp_path / "run.yaml")
    log = [json.loads(line) for line in (tmp_path / "sft" / "log.jsonl").read_text().splitlines()]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    tuned = json.loads(moesmith("chat", "--adapter", tmp_path / "sft" / "best", *greedy))
    assert tuned["tokens"] > 0

    profile = (
        "profile", model, "--corpus", f"plain={write_text(tmp_path / 'a.jsonl', 0)}",
        "--max-length", 64, "--new-tokens", 8, "--dtype", "float32",
    )  # fmt: skip
    moesmith(*profile, "--out", prof)
    moesmith(*profile, "--out", tmp_path / "streamed", "--stream")
    whole, streamed = (Profile.read(folder) for folder in (prof, tmp_path / "streamed"))
    for one, other in zip(whole.layers, streamed.layers, strict=True):
        assert torch.equal(one.sums["tokens"], other.sums["tokens"])

    text = moesmith("prune", model, "--profile", prof, "--keep", 6, "--out", small, "--new-tokens", 8,
                    "--canary", 2)  # fmt: skip
    assert "mask == slice" in text
    assert names(small) >= CODE and Checkpoint.open(small).config["num_experts"] == 6
    cut = AutoModelForCausalLM.from_pretrained(small)
    assert type(cut).__name__ == "Gemma2MoeForCausalLM"
    with torch.no_grad():
        assert cut(**tiny.inputs(cut)).logits.isfinite().all()

    text = moesmith(
        "verify", model, small, "--corpus", f"plain={write_text(tmp_path / 'b.jsonl', 1)}",
        "--max-length", 64, "--new-tokens", 8, "--canary", 2, "--out", tmp_path / "check",
    )  # fmt: skip
    assert "6 experts, top-2, 3 layers" in text and "verdict" in text
