"""`moesmith heal` on a tiny model: kept when it helps, reverted when not, and it goes on when stopped."""

import json
import shutil

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from chats import CHATML, tokenizer, write_jsonl
from moesmith import ExpertsConfig, cli
from moesmith.data import leaks
from moesmith.data.corpora import Document, write_documents
from moesmith.eval.canary import Answer, Canary
from moesmith.eval.divergence import Divergence
from moesmith.jobs import heal
from moesmith.models.headers import read_headers
from moesmith.models.layers import moe_layers
from moesmith.models.surgery import slice_model
from moesmith.prune.stats import Profile, identity

WORDS = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma".split()


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory):
    """A teacher, the same without three of its experts, and text of one domain."""
    root = tmp_path_factory.mktemp("heal")
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"))
    teacher.save_pretrained(root / "teacher")
    tokenizer(CHATML).save_pretrained(root / "teacher")
    slice_model(teacher, {layer.name: [0, 1, 2, 4, 6] for layer in moe_layers(teacher)})
    teacher.save_pretrained(root / "pruned")
    tokenizer(CHATML).save_pretrained(root / "pruned")
    rows = [" ".join(WORDS[(i * j + i) % len(WORDS)] for j in range(3, 12)) + f" {i * 37}" for i in range(90)]
    write_jsonl(root / "rows.jsonl", [{"text": row} for row in rows])
    return root


def options(folders, out, *more):
    return [
        "heal", str(folders / "pruned"), "--teacher", str(folders / "teacher"), "--out", str(out),
        "--corpus", f"words={folders / 'rows.jsonl'}", "--max-length", "64", "--canary", "0",
        "--router.max-steps", "16", "--router.lr", "0.01", "--router.warmup", "0",
        "--router.gradient-checkpointing", "false", "--router.dtype", "float32",
        *(() if "--stages" in more else ("--stages", "router")), *more,
    ]  # fmt: skip


def command(capsys, *args):
    status = cli.main([*args])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_a_stage_that_helps_is_kept_written_and_proved(folders, tmp_path, capsys):
    status, out, _ = command(capsys, *options(folders, tmp_path / "healed"))
    assert status == 0, out
    assert "kept: KL -" in out
    record = json.loads((tmp_path / "healed" / "heal.json").read_text())
    assert record["accepted"] == ["router"]
    assert record["after"]["kl"]["mean"] < record["before"]["kl"]["mean"]
    assert record["proof"]["logits"] == "bit-equal"
    assert "## Healed" in (tmp_path / "healed" / "README.md").read_text()
    assert (tmp_path / "healed" / "report.html").exists()
    assert not (tmp_path / "healed.work").exists() and not (tmp_path / "healed.tmp").exists()

    healed = AutoModelForCausalLM.from_pretrained(tmp_path / "healed")
    pruned = AutoModelForCausalLM.from_pretrained(folders / "pruned")
    changed = {
        name
        for name, tensor in healed.state_dict().items()
        if not torch.equal(tensor, pruned.state_dict()[name])
    }
    assert changed == {f"{layer.router}.weight" for layer in moe_layers(healed)}


def test_a_stage_that_does_not_help_is_reverted(folders, tmp_path, capsys):
    wild = options(folders, tmp_path / "out", "--router.lr", "30", "--router.max-grad-norm", "0")
    status, out, _ = command(capsys, *wild)
    assert status == 0, out
    assert "reverted: " in out and "stays as it is" in out
    record = json.loads((tmp_path / "out" / "heal.json").read_text())
    assert record["accepted"] == [] and record["before"] == record["after"]
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_packed_model_keeps_its_lora_beside_it(folders, tmp_path, capsys):
    from peft import PeftModel

    for name in ("teacher", "pruned"):
        model = AutoModelForCausalLM.from_pretrained(
            folders / name, quantization_config=ExpertsConfig("int8"), dtype=torch.float32
        )
        model.save_pretrained(tmp_path / name)
        tokenizer(CHATML).save_pretrained(tmp_path / name)
    shutil.copy(folders / "rows.jsonl", tmp_path)
    args = options(tmp_path, tmp_path / "out", "--stages", "lora", "--lora.max-steps", "6")
    args += ["--lora.lr", "0.003", "--lora.warmup", "0", "--lora.gradient-checkpointing", "false"]
    status, out, err = command(capsys, *args)
    assert status == 0, err
    record = json.loads((tmp_path / "out" / "heal.json").read_text())
    assert record["accepted"] == ["lora"], record["stages"]
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[3, 20, 30, 40]])
    with torch.no_grad():
        alone = base(input_ids=ids).logits
        together = PeftModel.from_pretrained(base, tmp_path / "out" / "adapter").eval()(input_ids=ids).logits
    assert not torch.equal(alone, together)


def test_a_stopped_run_goes_on_to_the_same_result(folders, tmp_path, capsys, monkeypatch):
    status, _, _ = command(capsys, *options(folders, tmp_path / "whole"))
    assert status == 0

    measure, calls = heal.Judge.measure, []

    def stop_after_training(self, model):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure(self, model)

    monkeypatch.setattr(heal.Judge, "measure", stop_after_training)
    status, _, _ = command(capsys, *options(folders, tmp_path / "out"))
    assert status != 0 and not (tmp_path / "out").exists()
    assert (tmp_path / "out.work" / "router" / "result.json").exists()

    monkeypatch.setattr(heal.Judge, "measure", measure)
    status, _, err = command(capsys, *options(folders, tmp_path / "out"))
    assert status == 0 and "going on with" in err
    whole, again = (json.loads((tmp_path / name / "heal.json").read_text()) for name in ("whole", "out"))
    assert whole["stages"] == again["stages"]


def test_other_options_do_not_go_on_with_an_unfinished_run(folders, tmp_path, capsys, monkeypatch):
    def stop(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(heal, "teach", stop)
    command(capsys, *options(folders, tmp_path / "out"))
    status, _, err = command(capsys, *options(folders, tmp_path / "out", "--seed", "5"))
    assert status == 2 and "unfinished run with another seed" in err


def test_what_transformers_does_not_load_is_kept(folders, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    shutil.copytree(folders, tmp_path / "f")
    file = tmp_path / "f" / "pruned" / "model.safetensors"
    head = torch.arange(12.0).view(3, 4)
    save_file({**load_file(file), "mtp.layers.0.weight": head}, file, metadata={"format": "pt"})
    drops = {"layers": {}, "meta": {"evidence": {"kl": 1}}}
    (tmp_path / "f" / "pruned" / "expert_drop_metadata.json").write_text(json.dumps(drops))
    status, _, err = command(capsys, *options(tmp_path / "f", tmp_path / "out"))
    assert status == 0, err
    record = json.loads((tmp_path / "out" / "heal.json").read_text())
    assert record["not_loaded"] == ["mtp.layers.0.weight"]
    assert read_headers(tmp_path / "out").keys() == read_headers(tmp_path / "f" / "pruned").keys()
    assert torch.equal(
        load_file(tmp_path / "out" / "model-not-loaded.safetensors")["mtp.layers.0.weight"], head
    )
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    healed = json.loads((tmp_path / "out" / "expert_drop_metadata.json").read_text())
    assert healed["meta"] == {} and healed["healed"]["stages"] == ["router"]


def test_every_domain_has_a_say_in_the_best_step():
    documents = [
        Document(f"{d}/{i}", d, None, [1, 2, 3]) for i in range(12) for d in ("a", "b", "c", "d", "e")
    ]
    train, dev = heal.examples(documents)
    domains = [documents[example.row - 1].domain for example in dev]
    assert sorted(domains) == sorted("abcde" * 2) and len(train) == 50


@pytest.mark.parametrize("stages", ["lora,router", "router,router"])
def test_stages_have_an_order(folders, tmp_path, capsys, stages):
    status, _, err = command(capsys, *options(folders, tmp_path / "out", "--stages", stages))
    assert status == 2 and "in this order" in err


def test_text_is_needed_and_only_once(folders, tmp_path, capsys):
    args = [
        "heal",
        str(folders / "pruned"),
        "--teacher",
        str(folders / "teacher"),
        "--out",
        str(tmp_path / "x"),
    ]
    status, _, err = command(capsys, *args)
    assert status == 2 and "either --profile or --corpus" in err


def test_a_profile_that_judges_on_what_it_trains_on_is_refused(folders, tmp_path, capsys):
    words = tokenizer(CHATML)
    texts = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(12)]
    documents = [Document(f"words/{i}", "words", text, words(text).input_ids) for i, text in enumerate(texts)]
    profile = tmp_path / "prof"
    profile.mkdir()
    Profile([], ["words"], [], identity(folders / "teacher", {8})).write(profile)
    write_documents(profile / "documents.jsonl", documents)
    write_documents(profile / "held_out.jsonl", documents[:2])
    leaks.write(profile / leaks.NGRAMS, leaks.collect(documents))
    args = options(folders, tmp_path / "out")
    at = args.index("--corpus")
    args[at : at + 2] = ["--profile", str(profile)]
    status, _, err = command(capsys, *args)
    assert status == 2 and "words/0" in err


def test_updates_of_small_routers_are_small(folders):
    model = AutoModelForCausalLM.from_pretrained(folders / "teacher")
    usual = heal.router_rms(model)
    with torch.no_grad():
        for layer in moe_layers(model):
            model.get_submodule(layer.router).weight.mul_(1e-3)
    assert heal.router_rms(model) == pytest.approx(1e-3 * usual)


def measured(kl, looped=()):
    """A model judged on documents of one token each; answers that loop by number."""
    n = len(kl)
    found = Divergence(
        ["words"] * n, [np.array([x], np.float32) for x in kl], np.zeros(n), np.zeros(n), np.zeros(n),
        [f"words/{i}" for i in range(n)],
    )  # fmt: skip
    answers = [Answer(f"p{i}", "text", [1, 2], True, i in looped) for i in range(4)]
    return heal.Measured(found, Canary(answers, 8))


@pytest.mark.parametrize(
    ("after", "looped", "reason"),
    [
        ([0.10] * 30, (), None),
        ([0.30] * 30, (), "the divergence rose"),
        ([0.19, 0.90, 0.01, 0.04] * 8 + [0.1], (), "the divergence rose"),
        ([0.0, 0.38] * 15, (), "may be"),
        ([0.10] * 30, (1,), "answers that loop: 1 of 4, before 0"),
    ],
)
def test_the_gate(after, looped, reason):
    after = after[:30]
    decision = heal.decide("lora", measured([0.20] * 30), measured(after, looped))
    assert decision["accepted"] == (reason is None)
    assert reason is None or any(reason in said for said in decision["reasons"])
