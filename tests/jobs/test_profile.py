"""The profile command on a tiny model: what is observed, held out and refused, and what a kill leaves."""

import json
import math
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from chats import chat, tokenizer, write_jsonl
from moesmith import cli, report
from moesmith.data import leaks
from moesmith.data.corpora import read_held_out
from moesmith.errors import UserError
from moesmith.jobs import _answers, _profile_words, _replay
from moesmith.jobs import profile as job
from moesmith.jobs._answers import groups, repeats_from
from moesmith.prune.stats import Profile

SMALL = ["--max-length", "64", "--new-tokens", "12", "--dtype", "float32", "--batch-tokens", "256"]
TOP_K = 2


@pytest.fixture(autouse=True)
def page(monkeypatch):
    """The page is drawn elsewhere; here only what it is given counts."""
    given = {}

    def write(folder, facts):
        given.update(facts)
        (folder / "report.html").write_text("page")
        return folder / "report.html"

    monkeypatch.setattr(report, "write_report", write)
    return given


@pytest.fixture(autouse=True)
def saved_as_often_as_asked(monkeypatch):
    """Tiny sums are saved in no time, but tiny batches take none either."""
    monkeypatch.setattr(_replay, "COMMIT_SHARE", math.inf)


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    """A tiny OLMoE with a tokenizer of single characters and a chat template."""
    folder = tmp_path_factory.mktemp("model") / "tiny"
    shutil.copytree(checkpoint("olmoe"), folder)
    tokenizer().save_pretrained(folder)
    return folder


def words(seed, n=25):
    generator = torch.Generator().manual_seed(seed)
    letters = torch.randint(97, 123, (n, 6), generator=generator).tolist()
    return " ".join("".join(map(chr, word)) for word in letters)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    chats = [{"messages": chat(words(i, 4), words(50 + i, 4))} for i in range(10)]
    code = write_jsonl(folder / "code.jsonl", [{"text": words(100 + i)} for i in range(10)])
    talk = write_jsonl(folder / "talk.jsonl", [*chats, "{broken"])
    return [f"--corpus=code={code}", "--corpus", f"talk={talk}"]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    rows = [
        {"domain": d, "prompt": words(i, n)}
        for d in ("a", "b")
        for i, n in enumerate((2, 3, 4, 5, 6), ord(d))
    ]
    return write_jsonl(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", rows)


def run(model, out, *more):
    return cli.main(["profile", str(model), "--out", str(out), *SMALL, *map(str, more)])


def refused(capsys, *words_):
    err = capsys.readouterr().err
    missing = [word for word in words_ if word not in err]
    assert not missing, err
    return err


def sums(profile):
    return [
        {**layer.sums, **layer.per_document, "m": layer.mean_output, "c": layer.coactivation}
        for layer in profile.layers
    ]


def assert_same_bits(a, b):
    for one, other in zip(sums(a), sums(b), strict=True):
        for name, tensor in one.items():
            assert torch.equal(tensor.nan_to_num(-1), other[name].nan_to_num(-1)), name


@pytest.fixture(scope="module")
def whole(model, corpora, tmp_path_factory):
    """One finished profile of the corpora."""
    out = tmp_path_factory.mktemp("whole") / "prof"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda folder, facts: folder / "report.html")
        assert run(model, out, *corpora) == 0
    return out


# ---------------------------------------------------------------- what is in a profile


def test_every_observed_token_is_counted_once_in_every_layer(whole):
    profile = Profile.read(whole)
    assert profile.domains == ["code", "talk"]
    for layer in profile.layers:
        assert layer.sums["tokens"].sum(-1).tolist() == [TOP_K * n for n in profile.domain_tokens().tolist()]
    rows = [json.loads(line) for line in (whole / "documents.jsonl").open()]
    assert [len(row["ids"]) for row in rows] == [document.tokens for document in profile.documents]


def test_held_out_text_is_of_every_domain_and_was_not_observed(whole):
    held_out = read_held_out(whole)
    assert {document.domain for document in held_out} == {"code", "talk"}
    source = lambda name: name.split(".")[0]  # noqa: E731
    observed = {source(document.id) for document in Profile.read(whole).documents}
    assert observed.isdisjoint(source(document.id) for document in held_out)
    assert leaks.check_disjoint(leaks.read(whole), held_out)["documents"] == len(held_out)


def test_a_finished_folder_holds_no_leftovers(whole):
    names = {path.name for path in whole.iterdir()}
    assert names >= {
        "profile.json",
        "stats.safetensors",
        "held_out.jsonl",
        "ngrams.npy",
        "documents.jsonl",
        "config.yaml",
    }
    assert not names & {job.UNFINISHED, job.STATE, job.SPOOL, "generated.jsonl"}


def test_the_record_says_where_the_numbers_come_from(whole, model):
    meta = Profile.read(whole).meta
    assert meta["model"] == str(model.resolve())
    assert {"model_hash", "router_hash", "corpus_hash", "settings", "versions", "date", "rows"} <= meta.keys()
    assert meta["rows"]["talk"]["dropped"] == {"not JSON": 1}


def test_batches_change_no_count_and_padding_is_not_observed(whole, model, corpora, tmp_path):
    assert run(model, tmp_path / "prof", *corpora, "--batch-tokens", 64) == 0
    one, other = Profile.read(whole), Profile.read(tmp_path / "prof")
    assert [d.id for d in one.documents] == [d.id for d in other.documents]
    for a, b in zip(one.layers, other.layers, strict=True):
        torch.testing.assert_close(a.per_document["tokens"], b.per_document["tokens"], atol=2, rtol=0)
        torch.testing.assert_close(a.sums["contribution"], b.sums["contribution"], rtol=1e-2, atol=1e-2)


def test_two_runs_give_the_same_bits(whole, model, corpora, tmp_path):
    assert run(model, tmp_path / "prof", *corpora) == 0
    assert_same_bits(Profile.read(whole), Profile.read(tmp_path / "prof"))


def test_streamed_is_the_same_bits_as_in_memory(whole, model, corpora, tmp_path):
    assert run(model, tmp_path / "prof", *corpora, "--stream") == 0
    assert_same_bits(Profile.read(whole), Profile.read(tmp_path / "prof"))
    assert not (tmp_path / "prof" / job.SPOOL).exists()


def test_a_packed_model_is_profiled_as_it_is(model, corpora, tmp_path, capsys):
    assert cli.main(["quantize", str(model), "--out", str(tmp_path / "nf4")]) == 0
    assert run(tmp_path / "nf4", tmp_path / "prof", *corpora) == 0
    profile = Profile.read(tmp_path / "prof")
    assert profile.layers[0].sums["tokens"].sum() == TOP_K * profile.domain_tokens().sum()


def test_json_and_page_say_what_was_found(model, corpora, tmp_path, capsys, page):
    assert run(model, tmp_path / "prof", *corpora, "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["out"] == str(tmp_path / "prof") and facts["tokens"] > 0
    assert facts["held_out"]["by_domain"].keys() == {"code", "talk"}
    assert {
        "heatmap",
        "concentration",
        "domains",
        "reliability",
        "agreement",
        "verdict",
        "how",
    } <= page.keys()
    assert page["how"]["command"].startswith(f"moesmith profile {model} --out ")


# ---------------------------------------------------------------- answers


def test_prompts_are_answered_greedily_and_replayed_with_their_answers(model, prompts, tmp_path, capsys):
    assert run(model, tmp_path / "prof", "--prompts", prompts) == 0
    rows = [json.loads(line) for line in (tmp_path / "prof" / "generated.jsonl").open()]
    assert len(rows) == 10 and {row["domain"] for row in rows} == {"a", "b"}
    kept = {row["id"]: row for row in map(json.loads, (tmp_path / "prof" / "documents.jsonl").open())}
    kept |= {d.id: vars(d) for d in read_held_out(tmp_path / "prof")}
    assert kept.keys() == {row["id"] for row in rows}
    assert {d.domain for d in read_held_out(tmp_path / "prof")} == {"a", "b"}

    alone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    speak = AutoTokenizer.from_pretrained(model)
    for row in rows:
        asked = speak.apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]
        with torch.no_grad():
            out = alone.generate(torch.tensor([asked]), max_new_tokens=12, do_sample=False)[
                0, len(asked) :
            ].tolist()
        assert row["response_ids"] == out[: len(row["response_ids"])], (
            "batched with padding differs from alone"
        )
        said = row["response_ids"][: row["repeats_from"]]
        assert kept[row["id"]]["ids"] == asked + said
    assert "10 of at most 12 tokens" in capsys.readouterr().out


def test_answers_of_an_earlier_profile_are_taken_to_the_token(model, prompts, tmp_path):
    assert run(model, tmp_path / "a", "--prompts", prompts) == 0
    rows = read_rows(tmp_path / "a")
    rows[0] |= {"response": "", "response_ids": []}  # a model may end at once
    rows[1] |= {"repeats_from": 5}
    answered = write_jsonl(tmp_path / "answered.jsonl", rows)
    assert run(model, tmp_path / "b", "--prompts", answered, "--stream") == 0  # which asks for nothing
    before, after = ({tuple(d["ids"]) for d in every(tmp_path / name)} for name in ("a", "b"))
    assert len(before) == len(after) == 10
    changed = [tuple(asked(row) + row["response_ids"][: row["repeats_from"]]) for row in rows[:2]]
    assert after - before == set(changed)


def asked(row):
    return tokenizer().apply_chat_template(row["prompt"], add_generation_prompt=True)["input_ids"]


def every(folder):
    files = (folder / "documents.jsonl", folder / "held_out.jsonl")
    return [json.loads(line) for file in files for line in file.open()]


def test_sampled_answers_are_repeatable_and_follow_the_seed(model, prompts, tmp_path):
    said = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert run(model, tmp_path / name, "--prompts", prompts, "--sample", "--seed", seed) == 0
        said.append(
            [json.loads(line)["response_ids"] for line in (tmp_path / name / "generated.jsonl").open()]
        )
    assert said[0] == said[1] != said[2]


def test_prompts_without_answers_when_nothing_is_generated(model, prompts, tmp_path):
    assert run(model, tmp_path / "prof", "--prompts", prompts, "--no-generate") == 0
    assert not (tmp_path / "prof" / "generated.jsonl").exists()


def test_an_answer_is_cut_where_it_goes_round_in_circles():
    fresh = list(range(50))
    assert repeats_from(fresh) is None
    assert repeats_from([*fresh, *fresh[:20]]) is None  # a quotation, not a circle
    assert repeats_from([1, 2, 3] * 20) == 3
    assert repeats_from([*fresh, *([7, 8, 9, 10, 11] * 10)]) in range(50, 56)
    assert repeats_from([5] * 40) == 1


def test_batches_hold_every_row_once_within_their_tokens():
    lengths = [5, 90, 17, 17, 40, 3, 300, 64]
    found = groups(lengths, 100)
    assert sorted(i for group in found for i in group) == list(range(8))
    assert found[0] == [6] and found[1] == [1]  # the longest first; what fits nowhere is alone
    for group in found[1:]:
        assert len(group) * max(lengths[i] for i in group) <= 100


# ---------------------------------------------------------------- stopped and taken up


def stop_at(monkeypatch, module, name, call, error=KeyboardInterrupt):
    """Make the `call`-th call of module.name raise."""
    original, calls = getattr(module, name), []

    def counted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(module, name, counted)
    return calls


def test_a_killed_replay_goes_on_to_the_same_bits(whole, model, corpora, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_replay, "COMMIT_SECONDS", -1.0)
    out = tmp_path / "prof"
    with monkeypatch.context() as patch:
        stop_at(patch, _replay, "forward", 4)
        assert run(model, out, *corpora) == 130
    assert not (out / "profile.json").exists() and (out / job.STATE).exists()
    calls = stop_at(monkeypatch, _replay, "forward", -1)
    assert run(model, out, *corpora) == 0
    assert "after batch 3 of" in capsys.readouterr().err
    batches = groups([d.tokens for d in Profile.read(out).documents], 256)
    assert len(calls) == len(batches) - 3 > 0
    assert_same_bits(Profile.read(whole), Profile.read(out))
    assert not (out / job.STATE).exists()


def test_sums_of_other_text_are_not_taken_up(model, tmp_path, monkeypatch):
    monkeypatch.setattr(_replay, "COMMIT_SECONDS", -1.0)
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": words(i)} for i in range(8)])
    with monkeypatch.context() as patch:
        stop_at(patch, _replay, "forward", 3)
        assert run(model, tmp_path / "prof", f"--corpus=code={path}") == 130
    write_jsonl(path, [{"text": words(i)} for i in range(20, 28)])
    for name in ("prof", "fresh"):
        assert run(model, tmp_path / name, f"--corpus=code={path}") == 0
    assert_same_bits(Profile.read(tmp_path / "prof"), Profile.read(tmp_path / "fresh"))


def test_killed_answers_go_on_where_they_were(model, prompts, tmp_path, monkeypatch):
    assert run(model, tmp_path / "whole", "--prompts", prompts) == 0
    out = tmp_path / "prof"
    with monkeypatch.context() as patch:
        stop_at(patch, _answers, "answer_batch", 3)
        assert run(model, out, "--prompts", prompts) == 130
    generated = out / "generated.jsonl"
    lines = generated.read_text().split("\n")
    generated.write_text("\n".join([*lines[:-2], lines[-2][:40]]))  # and the last line is torn
    calls = stop_at(monkeypatch, _answers, "answer_batch", -1)
    assert run(model, out, "--prompts", prompts, "--overwrite") == 0  # there is nothing to start over for
    assert len(calls) == len(groups([len(asked(row)) + 12 for row in read_rows(tmp_path / "whole")], 256)) - 1
    assert read_rows(out) == read_rows(tmp_path / "whole")
    assert_same_bits(Profile.read(tmp_path / "whole"), Profile.read(out))


def read_rows(folder):
    found = {}
    for line in (folder / "generated.jsonl").open():
        if line.endswith("}\n"):
            row = json.loads(line)
            found[row["id"]] = row
    return [found[name] for name in sorted(found)]


def test_an_interrupted_run_with_other_options_is_not_mixed(model, corpora, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_replay, "COMMIT_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        stop_at(patch, _replay, "forward", 3)
        assert run(model, tmp_path / "prof", *corpora) == 130
    assert run(model, tmp_path / "prof", *corpora, "--held-out", 0.4) == 2
    refused(capsys, "interrupted profile with other options (held_out=0.2)", "--overwrite")
    assert run(model, tmp_path / "prof", *corpora, "--held-out", 0.4, "--overwrite") == 0


def test_an_interrupted_run_goes_on_however_its_paths_are_written(
    model, corpora, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(_replay, "COMMIT_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        stop_at(patch, _replay, "forward", 3)
        assert run(model, tmp_path / "prof", *corpora) == 130
    (tmp_path / "prof").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(Path(corpora[2].partition("=")[2]).parent)
    here = [part.replace(f"{Path.cwd()}/", "") for part in map(str, corpora)]
    assert here != [*map(str, corpora)]
    capsys.readouterr()
    assert run(tmp_path / "link", tmp_path / "moved", *here, "--seed", 3) == 0
    assert "replay goes on after batch 2" in capsys.readouterr().err


def test_sums_that_take_long_to_save_are_saved_seldom(model, corpora, tmp_path, monkeypatch):
    saved = []

    def slow(*_):
        saved.append(time.perf_counter())
        time.sleep(0.05)

    monkeypatch.setattr(_replay, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(_replay, "commit", slow)
    monkeypatch.setattr(_replay, "COMMIT_SHARE", 1e-3)
    assert run(model, tmp_path / "prof", *corpora) == 0
    assert len(saved) == 1


def test_sums_of_other_versions_are_not_mixed(model, corpora, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_replay, "COMMIT_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        stop_at(patch, _replay, "forward", 3)
        assert run(model, tmp_path / "prof", *corpora) == 130
    monkeypatch.setattr(_profile_words, "versions", lambda: {"torch": "1.0"})
    capsys.readouterr()
    assert run(model, tmp_path / "prof", *corpora) == 0
    assert "replay goes on" not in capsys.readouterr().err


def test_a_full_disk_does_not_end_the_replay(model, corpora, whole, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise UserError("writing it failed: no space left on device")

    monkeypatch.setattr(_replay, "COMMIT_SECONDS", -1.0)
    monkeypatch.setattr(_replay, "commit", full)
    assert run(model, tmp_path / "prof", *corpora) == 0
    assert capsys.readouterr().err.count("no space left on device; going on") == 1
    assert_same_bits(Profile.read(tmp_path / "prof"), Profile.read(whole))


def test_an_interrupted_run_of_another_model_is_not_mixed(model, corpora, tmp_path, monkeypatch, capsys):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    monkeypatch.setattr(_replay, "COMMIT_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        stop_at(patch, _replay, "forward", 3)
        assert run(copy, tmp_path / "prof", *corpora) == 130
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.1}))
    assert run(copy, tmp_path / "prof", *corpora) == 2
    refused(capsys, "has changed since")


# ---------------------------------------------------------------- refused


def test_a_place_that_is_taken_is_left_alone(whole, model, corpora, tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("x")
    assert run(model, tmp_path / "mine", *corpora) == 2
    refused(capsys, "mine exists", "choose another --out")
    assert run(model, tmp_path / "mine", *corpora, "--overwrite") == 2
    refused(capsys, "holds no profile")
    assert run(model, whole, *corpora) == 2
    refused(capsys, "exists")
    assert run(model, model, *corpora) == 2
    refused(capsys, "is the model itself")


def test_overwrite_replaces_a_profile_and_keeps_other_files(whole, model, corpora, tmp_path):
    shutil.copytree(whole, tmp_path / "prof")
    (tmp_path / "prof" / "notes.txt").write_text("mine")
    assert run(model, tmp_path / "prof", *corpora[:1], "--overwrite") == 0
    assert Profile.read(tmp_path / "prof").domains == ["code"]
    assert (tmp_path / "prof" / "notes.txt").read_text() == "mine"


def test_no_text_no_profile(model, corpora, tmp_path, capsys):
    assert run(model, tmp_path / "p", "--corpus", "code=nowhere.jsonl") == 2
    refused(capsys, "corpus code: no such file: nowhere.jsonl")
    assert run(model, tmp_path / "p", corpora[0], corpora[0]) == 2
    refused(capsys, "two domains are called 'code'")
    assert run(model, tmp_path / "p", *corpora, "--prompts", "x.jsonl") == 2
    refused(capsys, "--corpus and --prompts")
    empty = write_jsonl(tmp_path / "empty.jsonl", [])
    assert run(model, tmp_path / "p", "--corpus", f"code={empty}") == 2
    refused(capsys, "corpus code: it is empty")
    short = write_jsonl(tmp_path / "short.jsonl", [{"text": "hello"}, {"text": "there"}])
    assert run(model, tmp_path / "p", "--corpus", f"code={short}") == 2
    refused(capsys, "corpus code: 5 tokens", "64 are wanted")
    assert not (tmp_path / "p" / "profile.json").exists()


def test_models_that_cannot_be_profiled(model, corpora, tmp_path, capsys):
    dense = tmp_path / "dense"
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=128)).save_pretrained(dense)
    tokenizer().save_pretrained(dense)
    assert run(dense, tmp_path / "p", *corpora) == 2
    refused(capsys, "has no MoE layers")
    mute = tmp_path / "mute"
    shutil.copytree(model, mute, ignore=shutil.ignore_patterns("tokenizer*", "chat_template*"))
    assert run(mute, tmp_path / "p", *corpora) == 2
    refused(capsys, "has no tokenizer")
    assert not (tmp_path / "p").exists()


def test_more_than_the_model_can_see_is_refused(model, prompts, tmp_path, capsys):
    assert run(model, tmp_path / "p", "--prompts", prompts, "--max-length", 250) == 2
    refused(capsys, "the model sees only 256 tokens")


def test_a_model_that_writes_no_text_wants_some(checkpoint, prompts, corpora, tmp_path, capsys):
    for name in ("openai_privacy_filter", "diffusion_gemma"):  # a tagger, and one that writes by denoising
        shutil.copytree(checkpoint(name), tmp_path / name)
        tokenizer().save_pretrained(tmp_path / name)
        assert run(tmp_path / name, tmp_path / f"p-{name}", "--prompts", prompts) == 2
        refused(capsys, "cannot answer prompts", "--corpus")
    # The refused run left nothing that took time, so its folder is free.
    assert run(tmp_path / "openai_privacy_filter", tmp_path / "p-openai_privacy_filter", corpora[0]) == 0


def test_a_streamed_model_cannot_answer(model, prompts, tmp_path, capsys):
    assert run(model, tmp_path / "p", "--prompts", prompts, "--stream") == 2
    refused(capsys, "--stream cannot", "10 prompts")


def test_a_layer_that_overflows_is_named_and_leaves_no_profile(model, corpora, tmp_path, capsys):
    broken = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        broken.model.layers[1].mlp.experts.down_proj[3] = float("nan")
    broken.save_pretrained(tmp_path / "nan")
    tokenizer().save_pretrained(tmp_path / "nan")
    assert run(tmp_path / "nan", tmp_path / "p", *corpora) == 2
    refused(capsys, "layers.1.mlp.experts: expert 3 gave NaN")
    assert not (tmp_path / "p" / "profile.json").exists()


def test_held_out_copies_of_observed_text_are_left_out(model, tmp_path, capsys):
    rows = [{"text": words(i)} for i in range(6)]
    rows += [{"text": row["text"] + " more"} for row in rows]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    assert run(model, tmp_path / "prof", f"--corpus=code={path}", "--held-out", 0.4, "--max-length", 200) == 0
    dropped = Profile.read(tmp_path / "prof").meta["held_out_dropped"]
    assert dropped and "share passages with the observed text" in capsys.readouterr().out
    held_out = (tmp_path / "prof" / "held_out.jsonl").read_text()
    assert not any(f'"{name}"' in held_out for name in dropped)


def test_short_numbers_are_understood():
    assert job.Config(model="m", out="p", tokens="200k").tokens == 200_000
    assert job.Config(model="m", out="p", tokens="1.5M").tokens == 1_500_000
