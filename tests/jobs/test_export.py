"""`moesmith export`: what is written says what its source says, or is not there."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import chats
import tiny
from jobs_export import adapter_on
from moesmith import cli
from moesmith.errors import UserError
from moesmith.export import parity as parity_room
from moesmith.jobs import _export, _export_ask, _export_gguf
from moesmith.jobs import export as job
from moesmith.jobs.export import Config

QUESTIONS = [{"prompt": f"What is {i}+{i}?"} for i in range(4)]  # a few: what is tested is the command


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """plain/ (16 bits), packed/ (nf4) and adapter/ (over packed); do not write to them."""
    import moesmith

    moesmith.register()
    root = tmp_path_factory.mktemp("export")
    model = tiny.build("olmoe", dtype=torch.bfloat16)
    model.save_pretrained(root / "plain")
    packed = tiny.model_class("olmoe").from_pretrained(
        root / "plain", quantization_config=moesmith.ExpertsConfig("nf4"), dtype=torch.bfloat16
    )
    packed.save_pretrained(root / "packed")
    for name in ("plain", "packed"):
        chats.tokenizer().save_pretrained(root / name)
    adapter_on(root / "packed", root / "adapter")
    chats.write_jsonl(root / "prompts.jsonl", QUESTIONS)
    return root


@pytest.fixture
def card(monkeypatch):
    """The card has tests of its own."""
    monkeypatch.setattr("moesmith.jobs._export_card.card_text", lambda *_: "# card\n")


def run(place, out, *words, action="merged", adapter="adapter", prompts=True):
    argv = ["export", action, *(["--adapter", str(place / adapter)] if adapter else []), "--out", str(out)]
    argv += ["--prompts", str(place / "prompts.jsonl")] if prompts and action != "card" else []
    return cli.main([*argv, *map(str, words)])


def left_over(out: Path) -> list[str]:
    return [path.name for path in out.parent.iterdir() if path.name.startswith(out.name)]


def logits(folder: Path, adapter: Path | None = None):
    model = _export_ask.load(folder)
    model = _export_ask.put(model, adapter) if adapter is not None else model
    with torch.no_grad():
        return model(input_ids=torch.arange(5, 37)[None]).logits


def test_two_adapters_become_their_sum_with_the_tokenizer_of_the_last(place, tmp_path):
    first, last = tmp_path / "first", tmp_path / "last"
    for folder in (first, last):
        shutil.copytree(place / "adapter", folder)
        (folder / "tokenizer_config.json").write_text(f'{{"of": "{folder.name}"}}')
    with _export_ask.one_adapter([first, last]) as both:
        assert both is not None
        assert json.loads((both / "tokenizer_config.json").read_text()) == {"of": "last"}
        once, summed = logits(place / "packed", first), logits(place / "packed", both)
    plain = logits(place / "packed")
    assert (summed - plain).norm() > 1.5 * (once - plain).norm()


# ---------------------------------------------------------------- merged


def test_the_merged_folder_is_the_source_and_says_so(place, tmp_path, card, capsys):
    out = tmp_path / "out"
    assert run(place, out, "--dtype", "float32", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert torch.allclose(logits(out), logits(place / "packed", place / "adapter"), atol=1e-4)
    from transformers import AutoModelForCausalLM

    stock = AutoModelForCausalLM.from_pretrained(out)
    assert stock.dtype == torch.float32 and not hasattr(stock.config, "quantization_config")
    record = json.loads((out / "moesmith.json").read_text())
    proof = json.loads((out / "parity.json").read_text())
    assert proof["parity"] == record["parity"] == facts["parity"]
    parity = proof["parity"][0]
    assert parity["parity"]["prompts"] == 4 and parity["parity"]["mean"] < 1e-4
    assert parity["effect"]["mean"] > 0.05, "without an effect this shows nothing"
    assert record["merged"]["changed"] == {"experts": 6, "attention": 12}
    assert (
        record["source"]["path"] == str((place / "packed").resolve()) and record["source"]["scheme"] == "nf4"
    )
    assert record["adapters"][0]["path"] == str((place / "adapter").resolve())
    assert (out / "README.md").read_text() == "# card\n"
    assert left_over(out) == ["out"]


def test_sixteen_bits_are_measured_against_what_sixteen_bits_do_to_the_source(
    place, tmp_path, card, monkeypatch
):
    narrow = parity_room.Tolerance(1e-9, 1e-9, 1e-9, 0.0, "only the source itself widens this")
    monkeypatch.setitem(parity_room.TOLERANCES, "bfloat16", narrow)
    out = tmp_path / "out"
    assert run(place, out) == 0
    parity = json.loads((out / "parity.json").read_text())["parity"][0]
    assert parity["own"]["mean"] > 0
    assert parity["bounds"]["mean"] >= 2 * parity["own"]["mean"] * 0.999


def test_layer_by_layer_says_the_same(place, tmp_path, card):
    for adapters, folder in (([place / "adapter"], "packed"), ([], "plain")):
        prompts = _export_ask.Prompts([[5, 6, 7, 30], [40, 41]], ["a", "b"], "two")
        whole = _export_ask.ask(place / folder, adapters, prompts)
        streamed = _export_ask.ask(place / folder, adapters, prompts, also=whole.full, stream=True)
        assert streamed.streamed and not whole.streamed
        pairs = [(whole.full, streamed.full)] + ([(whole.bare, streamed.bare)] if adapters else [])
        for mine, theirs in pairs:
            for one, other in zip(mine, theirs, strict=True):
                assert max(abs(one[token] - other[token]) for token in one) < 1e-4
        if adapters:
            assert whole.full != whole.bare


def test_two_adapters_are_their_sum(place, tmp_path, card):
    second = adapter_on(place / "packed", tmp_path / "second", placements=("attention",))
    once, twice = tmp_path / "once", tmp_path / "twice"
    assert run(place, once, "--dtype", "float32") == 0
    assert run(place, twice, "--adapter", second, "--dtype", "float32") == 0
    key = "model.layers.0.self_attn.q_proj.weight"
    change = load_file(twice / "model.safetensors")[key] - load_file(once / "model.safetensors")[key]
    factors = load_file(second / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{key.removesuffix('.weight')}.lora_{one}.weight"] for one in "AB")
    assert torch.allclose(change, b.float() @ a.float() * 5 / 3, atol=1e-5)


def test_a_lost_adapter_is_found_and_nothing_is_kept(place, tmp_path, card, monkeypatch, capsys):
    from moesmith.export import merge

    real = merge.merge_checkpoint

    def without(source, adapters, out, **options):
        made = real(source, [], out, **options)
        made.targeted = made.changed = {"experts": 6}
        return made

    monkeypatch.setattr(merge, "merge_checkpoint", without)
    out = tmp_path / "out"
    assert run(place, out) == 2
    assert "the adapter is not in the export" in capsys.readouterr().err
    assert left_over(out) == []


def test_swapped_gate_and_up_are_found(place, tmp_path, card, monkeypatch, capsys):
    from moesmith.export import merge

    real = merge.merge_checkpoint

    def swapped(source, adapters, out, **options):
        made = real(source, adapters, out, **options)
        tensors = load_file(out / "model.safetensors")
        for name in [name for name in tensors if "layers.1." in name and "gate_proj" in name]:
            other = name.replace("gate_proj", "up_proj")
            tensors[name], tensors[other] = tensors[other].clone(), tensors[name].clone()
        save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
        return made

    monkeypatch.setattr(merge, "merge_checkpoint", swapped)
    out = tmp_path / "out"
    assert run(place, out, "--dtype", "float32") == 2
    said = capsys.readouterr().err
    assert "differs from the source" in said or "not in the export" in said
    assert left_over(out) == []


def test_an_update_that_rounding_swallows_is_an_error(place, tmp_path, card, capsys):
    small = adapter_on(place / "packed", tmp_path / "small", scale=1e-9)
    out = tmp_path / "out"
    assert cli.main(["export", "merged", "--adapter", str(small), "--out", str(out)]) == 2
    said = capsys.readouterr().err
    assert "too small for this dtype" in said and "--dtype float32" in said
    assert left_over(out) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError("full")])
def test_what_is_stopped_leaves_nothing(place, tmp_path, card, monkeypatch, error):
    def stop(*_, **__):
        raise error

    monkeypatch.setattr(_export_ask, "ask", stop)
    out = tmp_path / "out"
    assert run(place, out) in (2, 130)
    assert left_over(out) == []


def test_what_a_killed_run_left_is_cleared_away(place, tmp_path, card):
    out = tmp_path / "out"
    killed = tmp_path / "out.tmp"
    killed.mkdir()
    (killed / ".incomplete").touch()
    (killed / "model.safetensors").write_bytes(b"half of it")
    assert run(place, out, "--dtype", "float32") == 0
    assert left_over(out) == ["out"]


def test_a_bound_of_ones_own_decides(place, tmp_path, card, capsys):
    assert run(place, tmp_path / "a", "--tolerance", "1e-9") == 2
    assert "--tolerance" in capsys.readouterr().err


# ---------------------------------------------------------------- lora


@pytest.mark.parametrize("form", ["peft", "vllm"])
def test_an_adapter_in_another_form_is_the_same_adapter(place, tmp_path, card, form):
    out = tmp_path / "out"
    assert run(place, out, "--for", form, action="lora") == 0
    record = json.loads((out / "moesmith.json").read_text())
    record = record if form == "vllm" else record["export"]
    parity = record["parity"][0]
    assert parity["parity"]["mean"] < 1e-4 < parity["effect"]["mean"]
    assert record["lora"]["form"] == form
    assert sorted(left_over(out)) == ["out"]
    if form == "peft":  # every command of ours still knows its base
        base = json.loads((out / "moesmith.json").read_text())["base"]
        assert base == json.loads((place / "adapter/moesmith.json").read_text())["base"]
        assert torch.equal(logits(place / "packed", out), logits(place / "packed", place / "adapter"))
    else:
        assert any("experts.3.up_proj" in key for key in load_file(out / "adapter_model.safetensors"))


def test_pairs_that_name_the_wrong_expert_are_found(place, tmp_path, card, monkeypatch, capsys):
    from moesmith.export import lora

    real = lora.export_lora

    def mixed(adapter, out, **options):
        made = real(adapter, out, **options)
        tensors = load_file(out / "adapter_model.safetensors")
        renamed = {
            name.replace("experts.3.", "experts.X.")
            .replace("experts.4.", "experts.3.")
            .replace("X.", "4."): value
            for name, value in tensors.items()
        }
        save_file(renamed, out / "adapter_model.safetensors", metadata={"format": "pt"})
        return made

    monkeypatch.setattr(lora, "export_lora", mixed)
    out = tmp_path / "out"
    assert run(place, out, "--for", "vllm", action="lora") == 2
    assert "differs from the source" in capsys.readouterr().err
    assert left_over(out) == []


# ---------------------------------------------------------------- gguf, with a stand-in for llama.cpp


class FakeLlama:
    """A "GGUF file" names a folder beside it; the server is transformers. Quantising adds `noise` to it."""

    noise = 0.01

    def version(self):
        return "fake"

    def convert(self, model, out, outtype="bf16", pre_tokenizer=None, on_share=None):
        kept = out.parent.parent.parent / f"kept-{out.name}"
        shutil.copytree(model, kept)
        out.write_text(json.dumps({"folder": str(kept), "noise": 0, "size": "x" * 500}))

    def kinds(self):
        return {"Q4_K_M", "Q8_0", "BF16", "F16", "IQ2_XS"}

    def quantize(self, gguf, out, kind, imatrix=None, threads=None, on_share=None):
        out.write_text(
            json.dumps({**json.loads(gguf.read_text()), "noise": self.noise, "imatrix": str(imatrix)})
        )
        return {"kind": kind, "bytes": out.stat().st_size, "bpw": 4.5, "tensors": 9, "types": {"q4_K": 9},
                "fallback": {"q4_K -> q5_0": 2}}  # fmt: skip

    def imatrix(self, gguf, text, out, chunks=None, *, threads=None, chunk_tokens=512, on_share=None):
        on_share(1.0)
        assert len(text.read_text()) > 1000
        out.write_text("matrix")
        return {"chunks": chunks, "perplexity": 9.0, "partial": {}}

    def serve(self, gguf, *, lora=None, threads=None, ctx=0, parallel=1, cache="f16", timeout=0):
        from contextlib import contextmanager

        @contextmanager
        def running():
            what = json.loads(gguf.read_text())
            model = _export_ask.load(Path(what["folder"]))

            class Server:
                def next_logprobs(self, ids, top=50):
                    from moesmith.export.parity import next_logprobs

                    assert len(ids) < ctx
                    said = next_logprobs(model, [ids], top)[0]
                    shift = {token: value - what["noise"] * (token % 7) for token, value in said.items()}
                    total = math.log(sum(math.exp(value) for value in shift.values()))
                    return {token: value - total for token, value in shift.items()}

            yield Server()

        return running()


@pytest.fixture
def llama(monkeypatch, card):
    fake = FakeLlama()
    monkeypatch.setattr(job, "llama_of", lambda cfg: fake)
    monkeypatch.setattr(job, "check_gguf", lambda *_: None)
    monkeypatch.setattr(_export_gguf, "write_modelfile", lambda *_: True)
    return fake


def test_gguf_files_are_compared_each_with_what_it_is_made_of(place, tmp_path, llama):
    out = tmp_path / "gg"
    assert run(place, out, "--quant", "q4_k_m,q8_0", "--imatrix", "auto", action="gguf") == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "README.md", "gg-Q4_K_M.gguf", "gg-Q8_0.gguf", "gg.imatrix.gguf", "moesmith.json", "parity.json",
    ]  # fmt: skip
    record = json.loads((out / "moesmith.json").read_text())
    routes = [(one["route"], one["against"]) for one in record["parity"]]
    assert routes == [
        ("gguf bf16", "the source"), ("gguf q4_k_m", "the bf16 file"), ("gguf q8_0", "the bf16 file"),
    ]  # fmt: skip
    assert record["parity"][0]["effect"] is not None and record["parity"][1]["effect"] is None
    assert 0.005 < record["parity"][1]["parity"]["mean"] < 0.05
    assert record["gguf"]["imatrix"]["file"] == "gg.imatrix.gguf"
    assert json.loads((out / "gg-Q4_K_M.gguf").read_text())["imatrix"].endswith("gg.imatrix.gguf")


def test_without_quantisation_the_16_bit_file_is_kept(place, tmp_path, llama):
    out = tmp_path / "gg"
    assert run(place, out, "--dtype", "float32", action="gguf") == 0
    assert (out / "gg-F32.gguf").is_file() and not (out / ".work").exists()
    assert json.loads((out / "parity.json").read_text())["parity"][0]["parity"]["mean"] < 1e-4


def test_a_16_bit_model_is_converted_as_it_is(place, tmp_path, llama):
    out = tmp_path / "gg"
    assert cli.main(["export", "gguf", str(place / "plain"), "--out", str(out), "--quant", "bf16,q8_0"]) == 0
    assert {path.name for path in out.glob("*.gguf")} == {"gg-BF16.gguf", "gg-Q8_0.gguf"}
    assert "merged" not in json.loads((out / "moesmith.json").read_text())["gguf"]


def test_a_quantised_file_that_says_other_things_is_not_kept(place, tmp_path, llama, monkeypatch, capsys):
    monkeypatch.setattr(llama, "noise", 5.0)
    out = tmp_path / "gg"
    assert run(place, out, "--quant", "q8_0", action="gguf") == 2
    assert "gguf q8_0 differs from the bf16 file" in capsys.readouterr().err
    assert left_over(out) == []


# ---------------------------------------------------------------- before any work


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merged", "--for", "vllm"], "--for belongs to `export lora`"),
        (["merged", "--quant", "q4_k_m"], "--quant belongs to `export gguf`"),
        (["card", "--dtype", "float16"], "not to `export card`"),
        (["lora"], "missing --adapter"),
        (["lora", "--llama-cpp", "x", "--adapter", "ADAPTER"], "goes with --for gguf"),
        (["merged"], "missing MODEL"),
        (["gguf", "PLAIN", "--imatrix", "auto"], "is for quantising"),
        (["gguf", "PLAIN", "--imatrix", "no.gguf", "--quant", "q4_k_m"], "no such file"),
        (["merged", "PLAIN"], "nothing to merge"),
        (["merged", "--adapter", "ADAPTER", "--prompts", "none.jsonl"], "no such file"),
        (["merged", "PLAIN", "--adapter", "FOREIGN"], "other routers"),
        (["merged", "OTHER", "--adapter", "ADAPTER"], "other base"),
    ],
)
def test_what_cannot_be_done_is_refused_first(place, tmp_path, tmp_path_factory, words, said, capsys):
    root = place / "refusals"
    if not root.exists():
        tiny.build("olmoe", seed=1, dtype=torch.bfloat16).save_pretrained(root / "other16")
        import moesmith

        tiny.model_class("olmoe").from_pretrained(
            root / "other16", quantization_config=moesmith.ExpertsConfig("nf4"), dtype=torch.bfloat16
        ).save_pretrained(root / "other")
        adapter_on(root / "other", root / "foreign")
    known = {
        "ADAPTER": place / "adapter",
        "PLAIN": place / "plain",
        "OTHER": root / "other",
        "FOREIGN": root / "foreign",
    }
    argv = ["export", *(str(known.get(word, word)) for word in words), "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_writes_nothing(place, tmp_path, capsys):
    assert run(place, tmp_path / "out", "--dry-run") == 0
    said = capsys.readouterr().out
    assert "takes up to" in said and "was not written" in said
    assert list(tmp_path.iterdir()) == []


def test_an_output_is_replaced_only_when_asked(place, tmp_path, card):
    out = tmp_path / "out"
    assert run(place, out, "--dtype", "float32") == 0
    assert run(place, out, "--dtype", "float32") == 2
    before = (out / "moesmith.json").read_text()
    assert run(place, out, "--dtype", "float32", "--overwrite") == 0
    assert (out / "moesmith.json").read_text() != before


def test_a_full_disk_is_seen_before_any_work(place, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert run(place, tmp_path / "out") == 2
    assert "free" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- prompts


def test_our_prompts_are_questions_in_the_template_and_passages():
    tokenizer = chats.tokenizer()
    asked = _export_ask.read_prompts(None, tokenizer, {"vocab_size": 128, "max_position_embeddings": 256})
    assert len(asked.ids) == 24
    said = [tokenizer.decode(ids) for ids in asked.ids]
    assert sum(text.endswith("<|im_start|>assistant\n") for text in said) == 16
    assert not any("<|im_start|>" in text for text in asked.texts), "the question, for people"
    assert max(map(len, asked.ids)) <= 255 and asked.cut > 0
    assert all(max(ids) < 128 for ids in asked.ids)
    assert len({tuple(ids) for ids in asked.ids}) == 24


def test_without_a_template_a_question_is_plain_text():
    asked = _export_ask.read_prompts(None, chats.tokenizer(template=None), {"vocab_size": 128})
    assert not any("<|im_start|>" in text for text in asked.texts)
    assert "as plain text" in asked.what


def test_without_a_tokenizer_numbers_are_asked():
    asked = _export_ask.read_prompts(None, None, {"text_config": {"vocab_size": 50}})
    assert len(asked.ids) == 16 and max(map(max, asked.ids)) < 50


def test_rows_of_a_file_are_asked_without_their_answers(tmp_path):
    rows = [
        {"messages": chats.chat("2+2?", "4.")},
        {"text": "plain"},
        {"prompt": [{"role": "user", "content": "hm"}], "chosen": "x"},
        {"other": 1},
    ]
    path = chats.write_jsonl(tmp_path / "p.jsonl", [*rows, "not json"])
    asked = _export_ask.read_prompts(path, chats.tokenizer(), {"vocab_size": 128})
    assert len(asked.ids) == 3
    said = chats.tokenizer().decode(asked.ids[0])
    assert "4." not in said and said.endswith("assistant\n") and asked.texts[0] == "2+2?"
    assert asked.texts[1] == "plain"


def test_a_file_without_prompts_is_refused(tmp_path):
    path = chats.write_jsonl(tmp_path / "p.jsonl", [{"other": 1}])
    with pytest.raises(UserError, match="none of 1 rows"):
        _export_ask.read_prompts(path, chats.tokenizer(), {"vocab_size": 128})


# ---------------------------------------------------------------- small things


def test_every_key_belongs_to_an_action():
    from moesmith import config

    for key in config.keys(Config):
        assert set(job.actions_of(key)) <= set(job.ACTIONS)
    by_name = {key.name: job.actions_of(key) for key in config.keys(Config)}
    assert by_name["quant"] == ["gguf"] and by_name["for_"] == ["lora"] and len(by_name["out"]) == 4


def test_texts_for_the_matrix_take_turns():
    said = _export_gguf.mixed(["a" * 6000, "b" * 2600])
    assert [part[0] for part in said.split("\n\n")] == ["a", "b", "a", "b", "a"]


@pytest.mark.parametrize(
    ("kinds", "dtype", "error"), [("f16", "bfloat16", "--dtype float16"), ("q8_0,Q8_0", "bfloat16", "twice")]
)
def test_quantisations_that_make_no_sense_are_refused(kinds, dtype, error):
    cfg = Config(action="gguf", model="m", out="o", quant=kinds.split(","), dtype=dtype)
    with pytest.raises(UserError, match=error):
        _export_gguf.check_quants(cfg)


def test_space_for_a_quantisation_is_an_upper_bound():
    wide = 2_000_000
    assert wide * 5.5 / 16 > _export.quant_bytes(wide, "q4_k_m") > wide * 4.9 / 16
    assert _export.quant_bytes(wide, "bf16") == wide
    assert _export.quant_bytes(2 * wide, "q8_0", width=4) == _export.quant_bytes(wide, "q8_0")
