"""`moesmith verify`: two tiny models on a text, what is said about them, and what is refused."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import tiny
from chats import chat, tokenizer, write_jsonl
from moesmith import ExpertsConfig, cli
from moesmith.data import leaks
from moesmith.data.corpora import Document, write_documents
from moesmith.jobs import _pair
from moesmith.jobs import verify as job
from moesmith.jobs._evidence import OPENINGS, verdict
from moesmith.models.layers import moe_layers
from moesmith.models.surgery import slice_model
from moesmith.prune.plan import Plan

WORDS = "the quick brown fox jumps over a lazy dog while seven wizards brew strong ale under old oaks".split()


def text(seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (22,), generator=generator).tolist())


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A: a tiny Mixtral with a tokenizer. `like(name, change)` makes another from it."""
    root = tmp_path_factory.mktemp("models")
    tok = tokenizer()

    def like(name, change=lambda model: model, words=tok):
        folder = root / name
        if not folder.exists():
            model = tiny.build("mixtral")
            model.generation_config.eos_token_id = 2
            model = change(model) or model
            model.save_pretrained(folder)
            if words is not None:
                words.save_pretrained(folder)
        return folder

    like("a")
    like.root = root
    return like


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    a = write_jsonl(root / "plain.jsonl", [{"text": text(i)} for i in range(12)])
    b = write_jsonl(root / "chats.jsonl", [{"messages": chat(f"say {i}", text(50 + i))} for i in range(12)])
    return ["--corpus", f"plain={a}", "--corpus", f"chats={b}"]


FAST = ("--max-length", "150", "--new-tokens", "6", "--canary", "3", "--tokens", "2000")


@pytest.fixture
def no_report(monkeypatch):
    """Drawing takes seconds; one test does it."""
    seen = []

    def write(folder, facts):
        seen.append(json.loads(json.dumps(facts)))
        (folder / "report.html").write_text("")
        return folder / "report.html"

    monkeypatch.setattr("moesmith.report.write_report", write)
    return seen


def verify(capsys, *argv, status=0):
    code = cli.main(["verify", *map(str, argv)])
    captured = capsys.readouterr()
    assert code == status, captured.err
    return captured.out if status == 0 else captured.err


def noisy(scale):
    def change(model):
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, p in model.named_parameters():
                if "experts" in name:
                    p += scale * p.std() * torch.randn(p.shape, generator=generator)

    return change


def test_a_copy_can_stand_in(models, corpora, tmp_path, capsys, no_report):
    shutil.copytree(models("a"), tmp_path / "copy")
    out = tmp_path / "out"
    words = verify(capsys, models("a"), tmp_path / "copy", *corpora, *FAST, "--out", out)
    for line in (
        "8 experts, top-2, 3 layers",
        "plain: 12 rows → 12 kept",
        "0.0000 - 0.0000",
        "3 word for word the same",
        "verdict  B can stand in for A: KL 0 nats per token [0, 0], the same next token 100.0 % of the time",
        "100 % of A on disk",
        f"next: moesmith chat {tmp_path / 'copy'}",
    ):
        assert line in words
    record = json.loads((out / "verify.json").read_text())
    assert record["verdict"]["level"] == "safe" and record["divergence"]["kl"]["max"] == 0
    assert len(record["canaries"]["a"]["answers"]) == 3
    assert record["canaries"]["a"]["answers"] == record["canaries"]["b"]["answers"]
    assert record["how"]["command"].startswith(f"moesmith verify {models('a')} {tmp_path / 'copy'} --corpus ")
    assert {f.name for f in out.iterdir()} == {"verify.json", "report.html"}


def test_a_damaged_copy_cannot(models, corpora, tmp_path, capsys, no_report):
    b = models("damaged", noisy(3.0))
    facts = json.loads(verify(capsys, models("a"), b, *corpora, *FAST, "--out", tmp_path / "o", "--json"))
    measured = facts["divergence"]
    assert facts["verdict"]["level"] != "safe" and measured["kl"]["mean"] > 0.01
    low, high = measured["kl"]["ci"]
    assert low < measured["kl"]["mean"] < high
    assert list(measured["per_domain"]) == ["plain", "chats"]
    [seen] = no_report
    assert seen["title"] == "damaged against a" and seen["divergence"][0]["kl_mean"] == measured["kl"]["mean"]
    assert len(seen["canary"]["rows"]) == 2 and seen["how"]["corpus_hash"]


def test_packed_and_the_report(models, corpora, tmp_path, capsys):
    from transformers import AutoModelForCausalLM

    packed = tmp_path / "packed"
    model = AutoModelForCausalLM.from_pretrained(models("a"), quantization_config=ExpertsConfig("nf4"))
    model.save_pretrained(packed)
    tokenizer().save_pretrained(packed)
    out = tmp_path / "out"
    words = verify(capsys, models("a"), packed, *corpora, *FAST, "--canary", "2", "--out", out)
    assert "packed · nf4 · 8 experts" in words and "KL, nats" in words
    assert {f.name for f in out.iterdir()} == {"verify.json", "report.html", "report.json", "report.png"}
    assert "packed against a" in (out / "report.html").read_text()
    assert json.loads((out / "verify.json").read_text())["divergence"]["kl"]["mean"] > 0


def test_one_after_the_other_gives_the_same(models, corpora, tmp_path, capsys, no_report):
    found = {}
    for how in ("together", "apart"):
        b = models("noisy", noisy(0.3))
        argv = (*corpora, *FAST, "--memory", how, "--out", tmp_path / how, "--json")
        found[how] = json.loads(verify(capsys, models("a"), b, *argv))
        assert {f.name for f in (tmp_path / how).iterdir()} == {"verify.json", "report.html"}
    for key in ("divergence", "canary"):
        assert found["together"][key] == found["apart"][key]
    assert found["apart"]["divergence"]["kl"]["mean"] > 0


def test_apart_when_memory_is_short(models, monkeypatch):
    side = _pair.open_side("A", str(models("a")), anatomy=False)
    cfg = job.Config(a="x", b="y")
    monkeypatch.setattr(_pair, "free_memory", lambda device: 10**12)
    assert not job.apart(cfg, side, side)
    monkeypatch.setattr(_pair, "free_memory", lambda device: side.nbytes)
    assert job.apart(cfg, side, side)
    assert not job.apart(cfg.model_copy(update={"memory": "together"}), side, side)


def pruned(models, name, change=None):
    """A without three of its eight experts in every layer, with the plan beside it."""

    def cut(model):
        keep = {layer.name: [0, 2, 3, 5, 7] for layer in moe_layers(model)}
        slice_model(model, keep)
        if change:
            change(model)

    folder = models(name, cut)
    layers = [layer.name for layer in moe_layers(tiny.build("mixtral"))]
    keep = {layer: [0, 2, 3, 5, 7] for layer in layers}
    counts = dict.fromkeys(layers, 5)
    Plan(keep, "reap", "mean", counts, {}, num_experts=dict.fromkeys(layers, 8)).write(folder)
    return folder


def test_mask_equals_slice(models, corpora, tmp_path, capsys, no_report):
    b = pruned(models, "pruned")
    argv = (*corpora, *FAST, "--canary", "0", "--out", tmp_path / "o")
    words = verify(capsys, models("a"), b, *argv)
    assert "cut      B is A without the dropped experts, nothing else: logits of 64 tokens within" in words
    assert "no answers were compared" in words and f"moesmith heal {b} --teacher" in words
    facts = json.loads((tmp_path / "o" / "verify.json").read_text())
    assert facts["mask_equals_slice"]["equal"] and facts["divergence"]["kl"]["mean"] > 1e-4
    healed = pruned(models, "healed", noisy(0.05))
    words = verify(capsys, models("a"), healed, *argv, "--overwrite")
    assert "B is more than A without the dropped experts (healed or trained?)" in words


def test_text_that_leaked_is_refused(models, corpora, tmp_path, capsys, no_report):
    b = pruned(models, "pruned")
    seen = [Document("x/1", "x", text(3), [])]
    leaks.write(b / leaks.NGRAMS, leaks.collect(seen))
    try:
        argv = (models("a"), b, *corpora, *FAST, "--out", tmp_path / "o")
        words = verify(capsys, *argv, status=2)
    finally:
        (b / leaks.NGRAMS).unlink()
    assert "held-out text leaks: plain, document plain/4" in words
    assert not (tmp_path / "o").exists()


def profile_folder(root, documents):
    root.mkdir()
    write_documents(root / "held_out.jsonl", documents)
    leaks.write(root / leaks.NGRAMS, leaks.collect([Document("c/1", "c", text(900), [])]))
    return root


def test_held_out_text_of_a_profile(models, tmp_path, capsys, no_report):
    tok = tokenizer()
    documents = [
        Document(f"{domain}/{i}", domain, text(i), tok(text(i), add_special_tokens=False).input_ids[:80])
        for i in range(6)
        for domain in ("one", "two")
    ]
    for document in documents:
        document.text = tok.decode(document.ids)
    profile = profile_folder(tmp_path / "prof", documents)
    words = verify(capsys, models("a"), models("noisy", noisy(0.3)), "--profile", profile, *FAST,
                   "--out", tmp_path / "o")  # fmt: skip
    assert f"12 documents, 948 tokens: held out by {profile}" in words
    assert f"runs of 13 words are in the calibration text ({profile}): no leak" in words

    for document in documents:
        document.ids = [(i * 7) % 100 + 5 for i in document.ids]
    other = profile_folder(tmp_path / "other", documents)
    words = verify(capsys, models("a"), models("a"), "--profile", other, "--out", tmp_path / "p", status=2)
    assert "held-out text was tokenised for another model" in words


def test_an_adapter(models, corpora, tmp_path, capsys, no_report):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models("a"))
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter += 0.05
    adapted.save_pretrained(tmp_path / "adapter")
    argv = (models("a"), tmp_path / "adapter", *corpora, *FAST, "--out", tmp_path / "o", "--json")
    facts = json.loads(verify(capsys, *argv))
    assert facts["b"]["storage"] == "adapter on f32" and facts["b"]["bytes"] > facts["a"]["bytes"]
    assert facts["divergence"]["kl"]["mean"] > 1e-5
    ids = torch.tensor([list(range(10, 40))])
    with torch.no_grad():
        wanted = adapted.eval()(ids).logits
        got = _pair.load(_pair.open_side("B", str(tmp_path / "adapter")))(ids).logits
    torch.testing.assert_close(got, wanted)


def test_other_vocabularies_are_refused(models, corpora, tmp_path, capsys):
    swapped = tokenizer(special=["<|odd|>"])  # every character's id is one higher
    b = models("swapped", words=swapped)
    words = verify(capsys, models("a"), b, *corpora, *FAST, "--out", tmp_path / "o", status=2)
    assert "the tokenizers of" in words and "differ: document plain/1, token 0" in words

    c = models("resized", lambda model: model.resize_token_embeddings(140) and None)
    words = verify(capsys, models("a"), c, *corpora, *FAST, "--out", tmp_path / "o", status=2)
    assert "has a vocabulary of 128, " in words and "of 140" in words


def test_what_is_refused_before_anything_is_loaded(models, corpora, tmp_path, capsys):
    a = models("a")
    assert "no such file" in verify(capsys, a, tmp_path / "nowhere", status=2)
    assert "profile: no such file" in verify(capsys, a, a, "--profile", tmp_path / "nope", status=2)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").touch()
    assert "full exists" in verify(capsys, a, a, "--out", tmp_path / "full", status=2)
    words = verify(capsys, a, a, "--out", tmp_path / "full", "--overwrite", status=2)
    assert "moesmith did not write it" in words
    assert "missing B" in verify(capsys, a, status=2)
    missing = ("--corpus", f"x={tmp_path / 'nope.jsonl'}", "--out", tmp_path / "o")
    assert "nope.jsonl" in verify(capsys, a, a, *missing, status=2)


def test_no_tokenizer(models, corpora, tmp_path, capsys, no_report):
    bare = models("bare", words=None)
    words = verify(capsys, bare, bare, *corpora, *FAST, "--out", tmp_path / "o", status=2)
    assert "has a tokenizer" in words
    assert (
        cli.main(["verify", str(models("a")), str(bare), *corpora, *FAST, "--out", str(tmp_path / "o")]) == 0
    )
    assert "bare has no tokenizer: it reads with that of" in capsys.readouterr().err


def test_without_text_the_error_names_the_flag(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    monkeypatch.setitem(sys.modules, "reasoning_gym.data", None)
    words = verify(capsys, models("a"), models("a"), "--out", tmp_path / "o", status=2)
    assert "no text to compare on" in words and "--corpus name=path" in words


# ---------------------------------------------------------------- verdict and prompts


def measured(kl, ratio, documents=40, kl_ci=0.1, ratio_ci=0.004):
    part = {"ratio": ratio, "ci": (ratio - ratio_ci, ratio + ratio_ci) if documents > 1 else None}
    ends = (kl * (1 - kl_ci), kl * (1 + kl_ci)) if documents > 1 else None
    return {
        "kl": {"mean": kl, "ci": ends},
        "top1": {"rate": 0.9},
        "ppl": {"overall": part, "per_domain": {"easy": {"ratio": 1.0, "ci": (1.0, 1.0)}, "hard": part}},
        "per_domain": {
            "easy": {"documents": documents, "kl": {"mean": kl, "ci": ends}},
            "hard": {"documents": documents, "kl": {"mean": kl, "ci": ends}},
        },
        "documents": documents,
    }


def canary(worse=(), significantly=()):
    ended = {"eos_rate": {"a": {"hits": 9}}, "n": 9, "max_new_tokens": 64}
    return {"worse": list(worse), "significantly_worse": list(significantly), **ended}


@pytest.mark.parametrize(
    ("facts", "answers", "level"),
    [
        (measured(0.005, 1.002), canary(), "safe"),
        (measured(0.029, 1.002), canary(), "caution"),  # its interval reaches beyond
        (measured(0.005, 1.028), canary(), "caution"),
        (measured(0.005, 1.002), canary(["loops"]), "caution"),
        (measured(0.005, 1.002), canary(["x"], ["x"]), "stop"),
        (measured(0.05, 1.05), canary(), "caution"),
        (measured(0.4, 1.05), canary(), "stop"),
        (measured(0.05, 1.2), canary(), "stop"),  # one domain is enough
        (measured(0.05, 1.102), canary(), "caution"),  # not sure
        (measured(0.0, 1.001, documents=1), canary(), "caution"),
        (measured(9.0, 5.0, documents=1), canary(), "caution"),
        (measured(0.005, 1.002), None, "safe"),
    ],
)
def test_verdict(facts, answers, level):
    found, sentence, points = verdict(facts, answers)
    assert found == level and sentence.startswith(OPENINGS[level])
    assert "in hard, the worst domain" in sentence and "90.0 %" in sentence
    assert any("one held-out document" in point for point in points) == (facts["documents"] == 1)
    assert any("no answers" in point for point in points) == (answers is None)


def test_verdict_says_what_it_does_not_know():
    facts = measured(0.005, 1.002, documents=9)
    facts["per_domain"]["easy"] = {"documents": 1, "kl": {"mean": 0.005, "ci": None}}
    level, _, points = verdict(facts, canary())
    assert level == "caution", "never safe by nine documents"
    assert points[0].startswith("only 9 documents in all, fewer than 20, and only 1 in easy, fewer than 5")
    assert "--corpus" in points[0] and "--held-out" in points[0]
    assert points[1:] == ["one document in easy: no interval there"]


def test_a_cut_chosen_on_this_very_text_is_said_to_be():
    def points(plan, **given):
        return job.chosen_here(SimpleNamespace(**{"corpus": [], "profile": Path("prof"), **given}), plan)

    meta = {"selected": "chosen on it", "profile": {"folder": str(Path("prof").resolve())}}
    assert points(SimpleNamespace(meta=meta)) == ["chosen on it"]
    assert points(SimpleNamespace(meta=meta), corpus=["code=a.jsonl"]) == []
    assert points(SimpleNamespace(meta=meta), profile=Path("other")) == []
    assert points(SimpleNamespace(meta={"profile": meta["profile"]})) == [] and points(None) == []


def test_prompts_end_where_the_last_answer_begins():
    tok = tokenizer()
    rendered = tok.apply_chat_template(chat("one", "two", "three", "four"), tokenize=False)
    talk = Document("c/1", "c", rendered, tok(rendered, add_special_tokens=False).input_ids)
    plain = Document("p/1", "p", None, list(range(10, 210)))
    short = Document("p/2", "p", None, list(range(10, 30)))
    found = _pair.canary_prompts(tok, [talk, plain, short], 9)
    assert tok.decode(found[0]).endswith("three<|im_end|>\n<|im_start|>assistant\n")
    assert found[1:] == [list(range(10, 58)), list(range(10, 20))]
    assert [len(_pair.canary_prompts(tok, [talk, plain, short], n)) for n in (0, 1, 2)] == [0, 1, 2]
    assert _pair.canary_prompts(tok, [talk, talk], 5) == found[:1], "no prompt twice"


def test_prompts_where_the_template_opens_thinking():
    think = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    tok = tokenizer(think)
    rendered = tok.apply_chat_template(chat("one", "two"), tokenize=False)
    talk = Document("c/1", "c", rendered, tok(rendered, add_special_tokens=False).input_ids)
    [prompt] = _pair.canary_prompts(tok, [talk], 1)
    assert tok.decode(prompt).endswith("one<|im_end|>\n<|im_start|>assistant\n")


def test_prompts_where_the_template_knows_no_generation_prompt():
    """Mixtral's: an answer simply follows. A prompt must not stop inside the question."""
    tok = tokenizer(
        "{% if messages[0]['role'] != 'user' %}{{ raise_exception('a user first') }}{% endif %}"
        "{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
        "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
    )
    rendered = tok.apply_chat_template(chat("one", "two", "three", "four"), tokenize=False)
    talk = Document("c/1", "c", rendered, tok(rendered, add_special_tokens=False).input_ids)
    [prompt] = _pair.canary_prompts(tok, [talk], 1)
    assert tok.decode(prompt).rstrip() == "[INST] one [/INST] two</s>[INST] three [/INST]"


def test_prompts_where_the_template_refuses():
    tok = tokenizer("{{ raise_exception('a system message first') }}")
    plain = Document("p/1", "p", None, list(range(10, 210)))
    assert _pair.canary_prompts(tok, [plain], 1) == [list(range(10, 58))]


def test_tokens_per_domain():
    documents = [
        SimpleNamespace(domain=d, ids=[0] * n) for d, n in (("a", 50), ("a", 60), ("a", 30), ("b", 500))
    ]
    assert [len(d.ids) for d in _pair.first_tokens(documents, 100)] == [50, 30, 500]
