"""`moesmith demo` from end to end, on a tiny random Llama: every phase, every artefact, every way to stop."""

import json
import signal

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from chats import tokenizer
from moesmith import cli
from moesmith.jobs import sft
from moesmith.jobs._demo import Steps

PHASES = ["dense", "data", "split", "pack", "before", "train", "after"]


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A dense chat model of nobody's, with one token per character."""
    folder = tmp_path_factory.mktemp("dense")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=1024, initializer_range=0.1, tie_word_embeddings=True,
        pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def options(dense, tmp_path):
    return [
        "demo", "--model", str(dense), "--out", str(tmp_path / "out"), "--num-experts", "4", "--top-k", "3",
        "--questions", "24", "--turns", "4", "--held-out", "8", "--lora.r", "2", "--train.max-steps", "4",
        "--train.batch-size", "2", "--train.lr", "1e-2", "--train.eval-steps", "2", "--train.save-steps", "2",
    ]  # fmt: skip


def results(tmp_path):
    return json.loads((tmp_path / "out/results.json").read_text())


def test_the_whole_journey(options, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    assert cli.main(options) == 0
    said = capsys.readouterr().out

    # every artefact, and what each phase came to
    stored = results(tmp_path)
    assert list(stored["phases"]) == PHASES
    for name in ("config.yaml", "sft.yaml", "data/train.jsonl", "data/held_out.jsonl", "moe/config.json",
                 "moe/split.json", "packed/moesmith.json", "sft/best/adapter_config.json", "sft/result.json",
                 "eval/dense.json", "eval/before.json", "eval/after.json"):  # fmt: skip
        assert (out / name).is_file(), name
    assert not list(out.rglob("*.tmp"))
    split = stored["phases"]["split"]["facts"]
    assert split["class"] == "MixtralForCausalLM" and split["all_active_difference"] < 1e-3
    counts = stored["phases"]["pack"]["facts"]["counts"]
    assert counts["matrices"] == {"nf4": 2 * 4 * 3} and counts["not_packed"] == []
    assert counts["expert_bytes_16bit"] / counts["expert_bytes"] == pytest.approx(16 / 4.5)
    summary = stored["summary"]
    assert summary["exact_match"]["before"]["n"] == 8
    assert summary["answer_loss"]["after"] < summary["answer_loss"]["before"]
    records = json.loads((out / "eval/after.json").read_text())["records"]
    judged = [json.loads(line) for line in (out / "data/held_out.jsonl").read_text().splitlines()]
    assert [r["question"] for r in records] == [row["messages"][0]["content"] for row in judged]

    # nothing held out is trained on
    learned = {
        message["content"]
        for line in (out / "data/train.jsonl").read_text().splitlines()
        for message in json.loads(line)["messages"]
    }
    assert learned.isdisjoint(r["question"] for r in records)

    # the options are the record, and lead to the same run
    config = yaml.safe_load((out / "config.yaml").read_text())
    assert config["top_k"] == 3 and config["fresh"] is False
    assert "right answers" in said and "next: moesmith chat --adapter" in said
    assert f"$ moesmith quantize {out}/moe --out {out}/packed" in said

    # again: nothing is done twice
    for work in ("get_dense", "make_data", "split", "pack", "judge_before", "train", "judge_after"):
        monkeypatch.setattr(Steps, work, lambda self, work=work: pytest.fail(f"{work} ran again"))
    assert cli.main(options) == 0
    again = capsys.readouterr().out
    assert again.count("kept from an earlier run") == len(PHASES)
    assert again.splitlines()[-1] == said.splitlines()[-1]
    monkeypatch.undo()

    # as JSON: one object on stdout, the commands inside keep quiet there
    assert cli.main([*options, "--train.lr", "2e-2", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["exact_match"]["after"]["n"] == 8
    assert "trained" in captured.err


def test_stopped_in_training_and_continued(options, tmp_path, capsys, monkeypatch):
    """Ctrl-C in the middle of training: the next run goes on from the checkpoint and keeps everything
    before.
    """
    inner = sft.run

    def interrupted(cfg):
        from moesmith.train import callbacks

        step_end = callbacks.StopCallback.on_step_end

        def ask(self, args, state, control, **kwargs):
            if state.global_step == 2:
                self.stop._ask(signal.SIGINT, None)
            step_end(self, args, state, control, **kwargs)

        monkeypatch.setattr(callbacks.StopCallback, "on_step_end", ask)
        inner(cfg)

    with monkeypatch.context() as patch:
        patch.setattr(sft, "run", interrupted)
        assert cli.main(options) == 0
    monkeypatch.undo()
    said = capsys.readouterr().out
    assert "next: moesmith demo --out" in said and "right answers" not in said
    assert list(results(tmp_path)["phases"]) == PHASES[:5]

    assert cli.main(options) == 0
    said = capsys.readouterr().out
    assert said.count("kept from an earlier run") == 5
    steps = [json.loads(line)["step"] for line in (tmp_path / "out/sft/log.jsonl").read_text().splitlines()]
    assert [step for step in sorted(set(steps)) if step] == [1, 2, 3, 4]
    assert results(tmp_path)["phases"]["train"]["facts"]["steps"] == 4


def test_a_folder_with_something_else_is_refused_before_any_work(options, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    assert cli.main(options) == 2
    assert "holds something else" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_an_error(options, capsys):
    options[options.index("--model") + 1] = "./no/such/model"
    assert cli.main(options) == 2
    assert "no/such/model" in capsys.readouterr().err


def test_a_model_that_cannot_be_split_is_refused(options, tmp_path, capsys):
    from transformers import GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=48, n_head=2, vocab_size=128)).save_pretrained(
        tmp_path / "gpt2"
    )
    tokenizer().save_pretrained(tmp_path / "gpt2")
    options[options.index("--model") + 1] = str(tmp_path / "gpt2")
    assert cli.main(options) == 2
    assert "no native MoE class" in capsys.readouterr().err


def test_result_loads_with_stock_transformers(dense, tmp_path):
    """The split model in the folder is a plain Mixtral checkpoint."""
    from moesmith.build.split import split_model

    model = AutoModelForCausalLM.from_pretrained(dense)
    chunks = [torch.randint(5, 128, (2, 16)) for _ in range(3)]
    moe, _ = split_model(model, chunks, num_experts=4, top_k=3)
    moe.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert "model.layers.1.block_sparse_moe.experts.3.w2.weight" in file.keys()  # noqa: SIM118
