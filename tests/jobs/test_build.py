"""`moesmith build` on a tiny model: what it writes, what it proves and says, what it refuses and leaves."""

import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from chats import tokenizer, write_jsonl
from moesmith import cli
from moesmith.jobs import _build_proof, _cut
from moesmith.jobs import build as job

DOMAINS = ("code", "math", "prose")
QUICK = ("--max-length", 64, "--tokens", 600, "--judge-tokens", 200)
LETTERS = {"code": "(){}[];=_", "math": "0123456789+-", "prose": "etaoinshrdlu"}


def sentence(domain: str, seed: int, n: int = 12) -> str:
    draw = random.Random(f"{domain} {seed}")
    return " ".join("".join(draw.choices(LETTERS[domain], k=4)) for _ in range(n))


def save(folder: Path, seed: int, dtype=torch.float32, like: Path | None = None) -> Path:
    """A tiny llama; `like`: with all but the FFNs of that one, as a fine-tune of FFNs alone would be."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if like is not None:
        own = {name: value.clone() for name, value in model.state_dict().items() if ".mlp." in name}
        model.load_state_dict({**LlamaForCausalLM.from_pretrained(like).state_dict(), **own})
    model.to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """base, code, math, prose: one attention, four FFNs; and their corpora."""
    folder = tmp_path_factory.mktemp("models")
    save(folder / "base", 0)
    for seed, domain in enumerate(DOMAINS, 1):
        save(folder / domain, seed, like=folder / "base")
        write_jsonl(folder / f"{domain}.jsonl", [{"text": sentence(domain, n)} for n in range(12)])
    return folder


def recipe(models: Path, place: Path, corpora: bool = True, **more) -> Path:
    experts = []
    for domain in DOMAINS:
        text = {"corpus": str(models / f"{domain}.jsonl")}
        text = text if corpora else {"positive_prompts": [sentence(domain, 100), sentence(domain, 101)]}
        experts.append({"source_model": str(models / domain), **text})
    path = place / "recipe.yaml"
    path.write_text(yaml.safe_dump({"base_model": str(models / "base"), "experts": experts, **more}))
    return path


def build(capsys, *argv, status: int = 0) -> str:
    code = cli.main(["build", *map(str, argv)])
    captured = capsys.readouterr()
    assert code == status, captured.err + captured.out
    return captured.out + captured.err if status == 0 else captured.err


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    """Reports without drawing, but in one test."""
    import moesmith.report

    if request.node.name == "test_the_built_folder":
        return
    monkeypatch.setattr(
        moesmith.report,
        "write_report",
        lambda folder, facts: (folder / "report.json").write_text(json.dumps(moesmith.report.clean(facts))),
    )


def logits(folder, ids):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def test_the_built_folder(models, tmp_path, capsys):
    out = tmp_path / "moe"
    text = build(capsys, recipe(models, tmp_path), "--out", out, *QUICK)
    for line in (
        r"base +base · llama, 2 layers, FFNs of 96 neurons on 32",
        r"experts +3: code, math, prose",
        r"class +MixtralForCausalLM · top-2 of 3 · init copy · float32",
        r"route +probe: every expert has a corpus",
        r"to fit: \d+ documents, .* · held out: \d+ documents",
        r"routing +\d+ % \[\d+, \d+\] of \d+ held-out tokens go to their own expert first \(chance 33 %\)",
        r"probe \(this model\) +\d",
        r"random \(mean of 3\) +\d",
        r"oracle",
        r"base \(dense\)",
        r"code \(dense\)",
        r"proof +each expert alone == its source's FFNs in the base: logits differ by \d",
        r"written .*\(264 kB: 768 B made, the rest copied byte for byte\)",
        r"next: moesmith inspect .*moesmith quantize .*moesmith sft",
    ):
        assert re.search(line, text), f"{line}\n{text}"
    names = {f.name for f in out.iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "moesmith.json", "recipe.yaml",
                     "report.html", "report.json", "README.md"}  # fmt: skip
    assert "state" not in names and sorted(p.name for p in tmp_path.iterdir()) == ["moe", "recipe.yaml"]
    record = json.loads((out / "moesmith.json").read_text())
    facts = record["build"]
    assert facts["proof"]["equal"] and facts["proof"]["difference"] < 1e-3
    assert {"embed", "probe", "lda"} <= facts["routing"]["layers"][0]["by_method"].keys()
    assert facts["routing"]["layers"][0]["temperature"] > 0
    assert [row["key"] for row in facts["perplexity"]["rows"]][:2] == ["router", "embed"]
    assert facts["routing"]["accuracy"] > 0.6  # texts of different letters are easily told apart
    total = sum(t.numel() for t in load_file(out / "model.safetensors").values())
    assert facts["parameters"]["total"] == total
    assert facts["parameters"]["active"] == total - 2 * 3 * 96 * 32
    assert AutoTokenizer.from_pretrained(out).chat_template == tokenizer().chat_template
    assert "| code |" in (out / "README.md").read_text()


def test_the_saved_recipe_and_seed_give_the_same_bytes(models, tmp_path, capsys):
    build(capsys, recipe(models, tmp_path), "--out", tmp_path / "a", *QUICK)
    build(capsys, tmp_path / "a" / "recipe.yaml", "--out", tmp_path / "b", *QUICK)
    a, b = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert a == b
    said = yaml.safe_load((tmp_path / "a" / "recipe.yaml").read_text())
    assert (said["route"], said["output"], said["dtype"]) == ("probe", "mixtral", "float32")
    assert (tmp_path / "a" / "recipe.yaml").read_bytes() == (tmp_path / "b" / "recipe.yaml").read_bytes()


def test_prompts_alone_say_that_nothing_is_held_out(models, tmp_path, capsys):
    text = build(capsys, recipe(models, tmp_path, corpora=False), "--out", tmp_path / "moe", *QUICK)
    assert "route    centered" in text and "nothing is held out (code, math, prose have prompts only)" in text
    assert "fitted tokens go to their own expert" in text
    report = json.loads((tmp_path / "moe" / "report.json").read_text())
    assert report["verdict"]["level"] == "caution" and not report["build"]["routing"]["held_out"]


def test_identical_experts_are_built_with_a_warning_and_are_the_dense_model(models, tmp_path, capsys):
    experts = [{"name": name, "corpus": str(models / f"{name}.jsonl")} for name in DOMAINS]
    path = recipe(models, tmp_path, experts=experts)
    text = build(capsys, path, "--out", tmp_path / "moe", *QUICK)
    assert "3 identical experts: exactly the dense model at 3x the FFN memory" in text
    ids = list(range(5, 60))
    torch.testing.assert_close(
        logits(tmp_path / "moe", ids), logits(models / "base", ids), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("route", ["embed", "loss", "random"])
def test_every_route(models, tmp_path, capsys, route):
    path = recipe(models, tmp_path)
    text = build(capsys, path, "--out", tmp_path / "moe", "--route", route, *QUICK)
    assert f"{route}: asked for" in text and f"{route} (this model)" in text
    assert len(re.findall(r"^embed", text, re.M)) == 1


@pytest.mark.parametrize(
    ("init", "words"),
    [
        ("drop:0.5", r"changed on purpose by init drop:0.5\).* KL"),
        ("noise:0.01", "changed on purpose"),
        ("lora:8", "changed on purpose"),
        ("virtual-group:3", "each group of experts alone == .* at most"),
    ],
)
def test_every_init(models, tmp_path, capsys, init, words):
    text = build(capsys, recipe(models, tmp_path), "--out", tmp_path / "moe", "--init", init, *QUICK)
    assert re.search(words, text), text
    routing = json.loads((tmp_path / "moe" / "moesmith.json").read_text())["build"]["routing"]
    assert routing["layers"][0]["accuracy"] > 0.8  # later layers read what the experts wrote


def test_a_split_is_proved_with_all_experts_on(models, tmp_path, capsys):
    experts = [{"corpus": str(models / "prose.jsonl")}]
    path = recipe(models, tmp_path, experts=experts, init="split", num_experts=8)
    text = build(capsys, path, "--out", tmp_path / "moe", *QUICK)
    assert "all experts on == the dense model" in text and "ridge (this model)" in text
    assert "top-6 of 8" in text and re.search(r"split +the routers keep \d\d\.\d %", text)


def test_sixteen_bits_and_a_shared_expert(models, tmp_path, capsys):
    shared = {"source_model": str(models / "code"), "weight": 0.25}
    path = recipe(models, tmp_path, shared_expert=shared, dtype="bfloat16")
    text = build(capsys, path, "--out", tmp_path / "moe", *QUICK)
    assert "Qwen2MoeForCausalLM" in text and "one shared expert" in text and "bfloat16" in text


def test_an_adapter_and_a_scale_make_experts_of_one_model(models, tmp_path, capsys):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    tuned = get_peft_model(
        LlamaForCausalLM.from_pretrained(models / "base"),
        LoraConfig(r=4, target_modules=["gate_proj", "down_proj", "q_proj"], init_lora_weights=False),
    )
    tuned.save_pretrained(tmp_path / "lora")
    changes = {"code": {"adapter": str(tmp_path / "lora")}, "math": {"residual_scale": 0.5}, "prose": {}}
    experts = [{"name": n, "corpus": str(models / f"{n}.jsonl"), **more} for n, more in changes.items()]
    text = build(capsys, recipe(models, tmp_path, experts=experts), "--out", tmp_path / "moe", *QUICK)
    assert "identical" not in text and "each expert alone ==" in text
    written = load_file(tmp_path / "moe" / "model.safetensors")
    merged = tuned.merge_and_unload().state_dict()
    for kind, name in (("gate", "w1"), ("up", "w3"), ("down", "w2")):
        torch.testing.assert_close(
            written[f"model.layers.1.block_sparse_moe.experts.0.{name}.weight"],
            merged[f"model.layers.1.mlp.{kind}_proj.weight"],
        )


def test_a_gemma_is_built_and_loads_with_the_code_beside_it(models, tmp_path, capsys):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    for seed, name in enumerate(("base", "tuned")):
        torch.manual_seed(seed)
        config = Gemma2Config(
            vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=16, query_pre_attn_scalar=8,
            initializer_range=0.2,
        )  # fmt: skip
        Gemma2ForCausalLM(config).save_pretrained(tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
    experts = [
        {"name": "code", "corpus": str(models / "code.jsonl")},
        {"source_model": str(tmp_path / "tuned"), "corpus": str(models / "math.jsonl")},
    ]
    path = recipe(models, tmp_path, base_model=str(tmp_path / "base"), experts=experts)
    text = build(capsys, path, "--out", tmp_path / "moe", *QUICK)
    assert "Gemma2MoeForCausalLM" in text and "each expert alone ==" in text
    assert (
        "trust_remote_code=True" in text and "trust_remote_code" in (tmp_path / "moe/README.md").read_text()
    )
    assert "auto_map" in json.loads((tmp_path / "moe" / "config.json").read_text())


def test_nothing_is_judged_when_that_is_asked_for(models, tmp_path, capsys):
    experts = [{"source_model": str(models / name)} for name in DOMAINS]
    path = recipe(models, tmp_path, experts=experts, route="random")
    text = build(capsys, path, "--out", tmp_path / "moe", *QUICK, "--judge-tokens", 0, "--json")
    facts = json.loads(text[text.index("{") : text.rindex("}") + 1])
    assert "perplexity" not in facts["build"] and facts["build"]["proof"]["equal"]
    assert "not measured: --judge-tokens 0" in text


# ---------------------------------------------------------------- what goes wrong


def test_an_expert_that_is_not_its_source_is_not_kept(models, tmp_path, capsys, monkeypatch):
    real = job.write

    def gate_and_up_swapped(parts, routers, folder, made):
        real(parts, routers, folder, made)
        tensors = load_file(folder / "model.safetensors")
        one, other = (f"model.layers.1.block_sparse_moe.experts.2.{name}.weight" for name in ("w1", "w3"))
        tensors[one], tensors[other] = tensors[other], tensors[one]
        from safetensors.torch import save_file

        save_file(tensors, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(job, "write", gate_and_up_swapped)
    err = build(capsys, recipe(models, tmp_path), "--out", tmp_path / "moe", *QUICK, status=2)
    assert "prose: alone it is not the base with the FFNs of its source" in err
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.yaml"]


def test_a_source_of_nan_is_called_damaged(models, tmp_path, capsys):
    from safetensors.torch import save_file

    shutil.copytree(models / "code", tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    experts = [{"source_model": str(models / "math")}, {"source_model": str(tmp_path / "damaged")}]
    path = recipe(models, tmp_path, experts=experts, route="random")
    err = build(capsys, path, "--out", tmp_path / "moe", *QUICK, status=2)
    assert "damaged gives NaN or infinite logits" in err and "fault of moesmith" not in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["damaged", "recipe.yaml"]


def test_two_builds_do_not_write_into_one_folder(models, tmp_path, capsys, monkeypatch):
    path, out, real = recipe(models, tmp_path, route="random"), tmp_path / "moe", job.write

    def another_one_starts(*args):
        monkeypatch.setattr(job, "write", real)
        err = build(capsys, path, "--out", out, *QUICK, status=2)
        assert f"{out} is being written by process {os.getpid()}" in err
        return real(*args)

    monkeypatch.setattr(job, "write", another_one_starts)
    build(capsys, path, "--out", out, *QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moe", "recipe.yaml"]
    assert not any(name.name.startswith(".") for name in out.iterdir())


def test_copies_of_another_corpus_are_said(models, tmp_path, capsys):
    own = [{"text": sentence("math", n)} for n in range(8)]
    write_jsonl(tmp_path / "copy.jsonl", [*(models / "code.jsonl").read_text().splitlines(), *own])
    names = {"code": models / "code.jsonl", "math": tmp_path / "copy.jsonl", "prose": models / "prose.jsonl"}
    experts = [{"source_model": str(models / n), "corpus": str(p)} for n, p in names.items()]
    flags = ("--out", tmp_path / "moe", *QUICK, "--tokens", 2000)
    assert "12 of 20 rows of math are copies" in build(
        capsys, recipe(models, tmp_path, experts=experts, route="embed"), *flags
    )


def test_noise_of_one_expert_is_named_as_what_changed_it(models, tmp_path, capsys):
    experts = [{"source_model": str(models / n)} for n in DOMAINS]
    experts[1]["noise_scale"] = 0.1
    path = recipe(models, tmp_path, experts=experts, route="random", dtype="bfloat16")
    text = build(capsys, path, "--out", tmp_path / "moe", *QUICK)
    assert "(changed on purpose by noise_scale)" in text
    assert re.search(r"all made, since the sources are not in bfloat16\)", text)


@pytest.mark.parametrize("step", ["writing", "proving"])
def test_an_interrupted_build_leaves_nothing_under_its_name(models, tmp_path, capsys, monkeypatch, step):
    path = recipe(models, tmp_path)

    def stop(*_args, **_more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "writing":
            patch.setattr("moesmith.build.assemble.tensor_bytes", stop)
        else:
            patch.setattr(_build_proof, "prove", stop)
        build(capsys, path, "--out", tmp_path / "moe", *QUICK, status=130)
    assert not (tmp_path / "moe").exists() and not (tmp_path / "moe.tmp").exists()
    build(capsys, path, "--out", tmp_path / "moe", *QUICK)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moe", "recipe.yaml"]


def test_what_can_be_refused_is_refused_before_anything_is_read(models, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moesmith.build.capture.capture", lambda *a, **k: pytest.fail("it ran"))
    out = tmp_path / "moe"

    def refused(**more):
        return build(capsys, recipe(models, tmp_path, **more), "--out", out, *QUICK, status=2)

    corpora = [{"name": n, "corpus": str(models / f"{n}.jsonl")} for n in DOMAINS]
    assert "positve_prompts" in refused(experts=[{**corpora[0], "positve_prompts": "x"}, *corpora[1:]])
    assert "no such file" in refused(experts=[{**corpora[0], "corpus": "codo.jsonl"}, *corpora[1:]])
    same = [str(models / "code.jsonl"), str(models / ".." / models.name / "code.jsonl")]
    assert "same corpus" in refused(experts=[{**corpora[0], "corpus": p, "name": p[-30:]} for p in same])
    assert "same corpus" in refused(experts=[{**c, "corpus": corpora[0]["corpus"]} for c in corpora])
    assert "does not divide the FFN width 96" in refused(init="virtual-group:5")
    assert "does not divide the FFN width 96" in refused(init="split", num_experts=9, experts=[])
    assert "rows of 8 bytes" in refused(init="split", num_experts=48, experts=[])
    assert "fits into mixtral or qwen2_moe" in refused(output="qwen3_moe")
    other = save(tmp_path / "other", 9)
    (other / "config.json").write_text((other / "config.json").read_text().replace('"silu"', '"gelu"'))
    assert "activation gelu" in refused(experts=[{**corpora[0], "source_model": str(other)}, *corpora[1:]])
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": 10})())
    assert "the new model takes" in refused()
    assert not out.exists() and not out.with_name("moe.tmp").exists()


def test_a_model_that_does_not_fit_into_memory_is_built_and_says_what_is_missing(
    models, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(_cut, "no_room", lambda *_: "the model needs about 1 TB, 1 GB of RAM are free")
    text = build(capsys, recipe(models, tmp_path), "--out", tmp_path / "moe", *QUICK)
    assert "neither proved nor judged: the model needs about 1 TB" in text
    record = json.loads((tmp_path / "moe" / "moesmith.json").read_text())
    assert "proof" not in record["build"] and "nothing was measured" in str(record["verdict"]["points"])
