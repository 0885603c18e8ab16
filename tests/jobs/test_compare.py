"""`moesmith compare`: what it measures is what the pruned model is, and nothing is measured twice."""

import json
import random
import shlex
import shutil

import numpy as np
import pytest
import torch

import tiny
from chats import tokenizer
from moesmith import cli
from moesmith.data import leaks
from moesmith.data.corpora import Document, encode, write_documents
from moesmith.errors import UserError
from moesmith.eval import divergence as measuring
from moesmith.eval.divergence import divergence
from moesmith.jobs import _plans
from moesmith.jobs import compare as job
from moesmith.jobs._plans import Candidate, best, candidate_plans, compare_plans, counts_of
from moesmith.models.layers import text_layers
from moesmith.models.surgery import slice_model
from moesmith.prune.observe import Collector
from moesmith.prune.stats import Document as Observed
from moesmith.prune.stats import Profile, identity

WORDS = (
    "a river runs from the hill down to the town and every boat that floats on it is counted twice by the "
    "keeper of the bridge who writes the number into a book with a green cover before the sun goes down"
).split()
DEAD = 5  # the expert of layer 1 that gives nothing


def documents(side: int, per_domain: int = 5) -> list[Document]:
    made, tokens = [], tokenizer()
    for d, domain in enumerate(("code", "math")):
        for n in range(per_domain):
            text = " ".join(random.Random(1000 * side + 10 * d + n).sample(WORDS, 20))
            made.append(Document(f"{domain}/{side}{n}", domain, text, tokens(text).input_ids))
    return made


def build(family: str = "olmoe"):
    model = tiny.build(family)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj[DEAD] *= 1e-6
    return model


def profile_of(model, **hashes) -> Profile:
    used, layers = documents(0), text_layers(model)
    collector = Collector(layers, [Observed(d.id, d.domain, len(d.ids), d.id) for d in used])
    with collector.attach(model), torch.no_grad():
        for i, document in enumerate(used):
            with collector.batch(torch.full((1, len(document.ids)), i)):
                model(input_ids=torch.tensor([document.ids]), use_cache=False)
    return collector.finish({"model": "tiny", "corpus_hash": "c", **hashes})


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(model, profile) as `moesmith profile` leaves them."""
    root = tmp_path_factory.mktemp("compare")
    model = build()
    model.save_pretrained(root / "model")
    tokenizer().save_pretrained(root / "model")
    layers = text_layers(model)
    hashes = identity(root / "model", {layer.num_experts for layer in layers})
    profile_of(model, **hashes).write(root / "prof")
    write_documents(root / "prof" / "held_out.jsonl", documents(1))
    leaks.write(root / "prof" / leaks.NGRAMS, leaks.collect(documents(0)))
    return root / "model", root / "prof"


@pytest.fixture(scope="module")
def measured():
    """A model, its profile and text, for the tests that need no files."""
    model = build()
    return model, profile_of(model), encode(tokenizer(), documents(1))


def compare(capsys, *argv, status: int = 0) -> str:
    code = cli.main(["compare", *map(str, argv)])
    captured = capsys.readouterr()
    assert code == status, captured.err
    return captured.out if status == 0 else captured.err


# ---------------------------------------------------------------- the command


def test_the_whole_command(folders, tmp_path, capsys):
    model, prof = folders[0], shutil.copytree(folders[1], tmp_path / "prof")
    argv = (model, "--profile", prof, "--cut", "1/8,1/2", "--random", 3, "--canary", 2, "--canary-tokens", 12)
    text = compare(capsys, *argv, "--out", tmp_path / "out")
    for words in ("keep 7", "keep 4", "reap", "random, median", "merge ream", "canary", "verdict", "next: "):
        assert words in text, text
    record = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert record == json.loads((prof / "compare.json").read_text())
    assert len(record["evidence"]) == 2 * (4 + 3 + 4)
    for one in record["evidence"]:
        assert one["kl"] >= 0 and one["kl_ci"][0] <= one["kl"] <= one["kl_ci"][1] and one["kl_p99"] >= 0
        assert set(one["ppl"]) == {"code", "math"} and len(one["documents"]["nats"]) == 10
    assert [v["keep"] for v in record["verdicts"]] == [7, 4]
    assert set(record["verdicts"][0]["against"]) >= {"random", "merge"}
    facts = json.loads((tmp_path / "out" / "report.json").read_text())
    assert {"pareto", "heatmap", "canary", "similarity", "verdict", "reliability"} <= facts.keys()
    assert {s["kind"] for s in facts["pareto"]["series"]} == {"prune", "merge"}
    assert [b["keep"] for b in facts["pareto"]["random_band"]] == [7, 4]
    assert (tmp_path / "out" / "report.html").exists()
    # prune --score auto finds it, as long as the profile is the same.
    profile = Profile.read(prof)
    some = (
        "--keep",
        7,
        "--scores",
        "ean",
        "--random",
        0,
        "--merge",
        "none",
        "--canary",
        0,
        "--no-similarity",
    )
    compare(capsys, model, "--profile", prof, *some, "--out", tmp_path / "more")
    assert len(_plans.read_evidence(prof, profile)) == len(record["evidence"]) + 1
    assert _plans.read_evidence(prof, profile, record["model_hash"]) == _plans.read_evidence(prof, profile)
    assert _plans.read_evidence(prof, profile, "another model's") is None
    # Who prunes by it chooses on the text that judges, and is told.
    winner = record["verdicts"][0]["best"]
    assert "this score and count" in _plans.selected(prof, profile, winner, 7)
    assert "this count" in _plans.selected(prof, profile, "random", 4)
    assert _plans.selected(prof, profile, "random", 3) is None
    assert "so these figures are optimistic" in text
    assert best(_plans.read_evidence(prof, profile), 7)["series"] == record["verdicts"][0]["best"]
    profile.layers[0].sums["tokens"] += 1
    assert _plans.read_evidence(prof, profile) is None


def test_json_and_no_extras(folders, tmp_path, capsys):
    model, prof = folders[0], shutil.copytree(folders[1], tmp_path / "prof")
    argv = ("--scores", "all", "--random", 0, "--merge", "none", "--canary", 0, "--no-similarity", "--json")
    out = compare(capsys, model, "--profile", prof, "--keep", 6, *argv, "--out", tmp_path / "out")
    facts = json.loads(out)
    names = {one["series"] for one in facts["evidence"]}
    assert {"reap", "easyep", "ean_ca", "max_norm"} <= names and "random" not in names
    assert facts["canary"] is None and "documents" not in facts["evidence"][0]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--cut", "3/2"), "is no share of the experts"),
        (("--cut", "abc"), "is no share of the experts"),
        (("--keep", "1"), "1 experts, but a token uses 2"),
        (("--keep", "8"), "8 of 8 experts drops none"),
        (("--scores", "reap,saliency"), "unknown score 'saliency'"),
        (("--profile", "nowhere"), "nowhere"),
        (("--domains", "law=1"), "no domain 'law'"),
        (("--scores", "[]"), "no score to compare"),
    ],
)
def test_what_cannot_be_asked(folders, tmp_path, capsys, argv, message):
    model, prof = folders
    error = compare(capsys, model, "--profile", prof, *argv, "--out", tmp_path / "out", status=2)
    assert message in error
    assert not (tmp_path / "out" / "compare.json").exists()


def test_places_that_are_taken(folders, tmp_path, capsys):
    model, prof = folders
    assert "is the profile itself" in compare(capsys, model, "--profile", prof, "--out", prof, status=2)
    assert "is the model itself" in compare(capsys, model, "--profile", prof, "--out", model, status=2)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "a.tex").write_text("work")
    error = compare(capsys, model, "--profile", prof, "--out", tmp_path / "thesis", status=2)
    assert "holds no comparison" in error


def test_a_profile_of_another_model_is_refused(folders, tmp_path, capsys):
    _, prof = folders
    other = tiny.build("olmoe", seed=1)
    other.save_pretrained(tmp_path / "other")
    tokenizer().save_pretrained(tmp_path / "other")
    error = compare(capsys, tmp_path / "other", "--profile", prof, "--out", tmp_path / "out", status=2)
    assert "made of another model" in error


def test_a_sibling_with_the_same_routers_is_measured_itself(folders, tmp_path, capsys):
    """A fine-tune with frozen routers: nothing measured on the profiled model is taken for it."""
    model, prof = folders[0], shutil.copytree(folders[1], tmp_path / "prof")
    sibling = build()
    with torch.no_grad():
        sibling.model.layers[0].mlp.experts.down_proj.mul_(1.5)
    sibling.save_pretrained(tmp_path / "sibling")
    tokenizer().save_pretrained(tmp_path / "sibling")
    argv = ("--profile", prof, "--keep", 6, "--random", 0, "--merge", "none", "--canary", 0)
    argv = (*argv, "--no-similarity", "--scores", "reap", "--out", tmp_path / "out")
    rows = []
    for folder in (model, tmp_path / "sibling"):
        assert cli.main(["compare", *map(str, (folder, *argv))]) == 0
        said = capsys.readouterr().err
        assert ("same routers" in said) == (folder != model)
        rows.append(json.loads((tmp_path / "out" / "compare.json").read_text()))
    assert rows[0]["model_hash"] != rows[1]["model_hash"]
    assert rows[0]["evidence"][0]["kl"] != rows[1]["evidence"][0]["kl"]
    known = _plans.read_evidence(prof, Profile.read(prof), rows[1]["model_hash"])
    assert [one["kl"] for one in known] == [rows[1]["evidence"][0]["kl"]]


def test_the_suggested_prune_writes_the_plan_that_was_compared(folders, tmp_path, capsys):
    model, prof = folders[0], shutil.copytree(folders[1], tmp_path / "prof")
    argv = ("--keep", 4, "--domains", "max", "--random", 0, "--merge", "none", "--canary", 0)
    out = compare(capsys, model, "--profile", prof, *argv, "--no-similarity", "--out", tmp_path / "out")
    command = shlex.split(out[out.index("next: ") :].splitlines()[0])[2:]
    assert cli.main([*command, "--dry-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    winner = best(json.loads((tmp_path / "out" / "compare.json").read_text())["evidence"], 4)
    assert found["kept"] == winner["keeps"] and (found["score"], found["domains"]) == (
        winner["series"],
        "max",
    )
    assert "--domains max" in record_command(tmp_path / "out")


def record_command(out) -> str:
    return json.loads((out / "report.json").read_text())["how"]["command"]


def test_pieces_of_one_row_are_one_document(measured):
    model, profile, encoded = measured
    pieces = [type(one)(one.ids, one.domain, f"{one.domain}/7" + f".{i}" * (i > 0)) for i, one in
              enumerate(encoded[:3])]  # fmt: skip
    (found,) = compare_plans(model, pieces, candidate_plans(profile, [5], ["reap"], randoms=0))
    assert found["documents"]["tokens"] == [sum(len(one.ids) - 1 for one in pieces)]
    assert found["kl_ci"] is None and found["per_domain"]["code"]["documents"] == 1


def test_text_that_was_profiled_is_refused(folders, tmp_path, capsys):
    model, prof = folders
    rows = "".join(json.dumps({"text": d.text}) + "\n" for d in documents(0))
    (tmp_path / "seen.jsonl").write_text(rows)
    argv = (model, "--profile", prof, "--corpus", f"code={tmp_path / 'seen.jsonl'}")
    assert "leaks" in compare(capsys, *argv, "--out", tmp_path / "out", status=2)


# ---------------------------------------------------------------- what is measured


def test_evidence_is_that_of_the_sliced_model(measured):
    model, profile, encoded = measured
    (candidate,) = candidate_plans(profile, [5], ["reap"], randoms=0)
    (found,) = compare_plans(model, encoded, [candidate])
    small = build()
    slice_model(small, candidate.keep)
    wanted = divergence(model, small, encoded).facts()
    assert found["kl"] == pytest.approx(wanted["kl"]["mean"], rel=1e-4)
    assert found["kl_p99"] == pytest.approx(wanted["kl"]["p99"], rel=1e-3)
    assert found["ppl_ratio"] == pytest.approx(wanted["ppl"]["overall"]["ratio"], rel=1e-5)
    assert found["documents"]["tokens"] == [len(d.ids) - 1 for d in encoded], "documents keep their order"


def test_an_expert_that_gives_nothing_is_free_to_drop(measured):
    model, profile, encoded = measured
    keep = {la.layer: list(range(8)) for la in profile.layers}
    keep[profile.layers[1].layer] = [e for e in range(8) if e != DEAD]
    other = dict(keep)
    other[profile.layers[1].layer] = [e for e in range(8) if e != DEAD - 1]
    dead, alive = compare_plans(
        model, encoded, [Candidate("a", "prune", 7, keep), Candidate("b", "prune", 7, other)]
    )
    plan = candidate_plans(profile, [7], ["contribution"], randoms=0)[0]
    assert DEAD not in plan.keep[profile.layers[1].layer]
    assert dead["kl"] != alive["kl"]


def test_merging_leaves_the_model_as_it_was(measured):
    model, profile, encoded = measured
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    candidates = candidate_plans(profile, [5], ["reap"], randoms=0, merges=_plans_methods())
    rows = compare_plans(model, encoded, candidates, profile)
    assert {row["kind"] for row in rows} == {"prune", "merge"} and all(row["kl"] > 0 for row in rows)
    assert len({row["kl"] for row in rows}) == len(rows), "every method is another model"
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def _plans_methods():
    from moesmith.prune.merge import METHODS

    return METHODS


def test_equal_plans_are_measured_once(measured, monkeypatch):
    model, profile, encoded = measured
    counts = count_contexts(monkeypatch)
    first = candidate_plans(profile, [5], ["reap"], randoms=0)[0]
    twin = Candidate("twin", "prune", 5, first.keep)
    a, b = compare_plans(model, encoded, [first, twin], batch_tokens=10_000)
    assert counts == [1] and b["same_as"] == "reap@5" and (b["series"], b["kl"]) == ("twin", a["kl"])


def test_random_controls_differ_and_repeat(measured):
    _, profile, _ = measured
    draws = candidate_plans(profile, [5], [], randoms=4)
    assert len({json.dumps(one.keep) for one in draws}) == 4
    assert [one.keep for one in draws] == [one.keep for one in candidate_plans(profile, [5], [], randoms=4)]
    assert [one.name for one in draws] == [f"random#{i}@5" for i in (1, 2, 3, 4)]


# ---------------------------------------------------------------- going on


def count_contexts(monkeypatch, stop_after: int | None = None) -> list[int]:
    """How many plans each call of `divergences` ran; a call too many is a kill."""
    counts: list[int] = []
    real = measuring.divergences

    def counting(model, part, contexts, *args):
        if stop_after is not None and len(counts) == stop_after:
            raise KeyboardInterrupt
        counts.append(len(contexts))
        return real(model, part, contexts, *args)

    monkeypatch.setattr(measuring, "divergences", counting)
    return counts


def test_a_killed_comparison_goes_on_and_more_scores_cost_only_themselves(measured, tmp_path, monkeypatch):
    model, profile, encoded = measured
    some = candidate_plans(profile, [5], ["reap", "frequency"], randoms=1, merges=["hc"])
    whole = compare_plans(model, encoded, some, profile, batch_tokens=250)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        before = count_contexts(patch, stop_after=2)
        compare_plans(model, encoded, some, profile, tmp_path, "m", batch_tokens=250)
    assert before == [3, 3]
    with monkeypatch.context() as patch:
        after = count_contexts(patch)
        steps = []
        again = compare_plans(
            model, encoded, some, profile, tmp_path, "m", 250, lambda *step: steps.append(step)
        )
    batches = len(list(measuring.batches(encoded, 250)))
    assert after == [3] * (batches - 2) + [1] * batches
    assert again == whole
    assert steps[-1][0] == steps[-1][1]
    more = candidate_plans(profile, [5], ["reap", "frequency", "max_norm"], randoms=0, merges=["hc"])
    with monkeypatch.context() as patch:
        third = count_contexts(patch)
        compare_plans(model, encoded, more, profile, tmp_path, "m", batch_tokens=250)
    assert third == [1] * batches
    # Another model's measurements are not taken up.
    with monkeypatch.context() as patch:
        fourth = count_contexts(patch)
        compare_plans(model, encoded, some[:1], profile, tmp_path, "other", batch_tokens=250)
    assert fourth == [1] * batches


def test_a_torn_file_is_measured_again(measured, tmp_path):
    model, profile, encoded = measured
    some = candidate_plans(profile, [5], ["reap"], randoms=0)
    whole = compare_plans(model, encoded, some, profile, tmp_path, "m", batch_tokens=250)
    file = sorted(tmp_path.rglob("*.npz"))[0]
    file.write_bytes(file.read_bytes()[:100])
    assert compare_plans(model, encoded, some, profile, tmp_path, "m", batch_tokens=250) == whole


# ---------------------------------------------------------------- counting and choosing


def test_counts(measured):
    _, profile, _ = measured
    assert counts_of(profile, [7, 3], [0.25, 0.5]) == ([7, 6, 4, 3], [])
    found, notes = counts_of(profile, [1], [0.01, 1 / 3])
    assert found == [6] and "keep 1: 1 experts, but a token uses 2" in notes[0] and "cut 1 %" in notes[1]
    grouped = profile_of(tiny.build("deepseek_v3"))
    assert {layer.n_group for layer in grouped.layers} == {2}
    assert counts_of(grouped, [], [0.4])[0] == [6], "5 kept experts cannot be split over 2 groups"
    assert "2 groups" in counts_of(grouped, [5], [])[1][0]
    assert "the router needs 4" in counts_of(grouped, [2], [], least=4)[1][0]


def row(name: str, nats, kind: str = "prune", keep: int = 5):
    tokens = [10] * len(nats)
    return {
        "name": f"{name}@{keep}", "series": name, "kind": kind, "keep": keep, "kl": sum(nats) / sum(tokens),
        "documents": {"nats": list(nats), "tokens": tokens},
    }  # fmt: skip


def test_best_and_by_how_much():
    rng = np.random.default_rng(0)
    base = rng.random(30)
    rows = [row("a", base + 1), row("b", base + 0.5), row("r", base + 2, "random"), row("m", base, "merge")]
    assert best(rows, 5)["series"] == "b" and best(rows, 5, ("prune", "merge"))["series"] == "m"
    more = _plans.difference(rows[1], [rows[2]])
    assert more["kl_more"] == pytest.approx(0.15) and more["ci"] == pytest.approx((0.15, 0.15))
    assert _plans.win_shares(rows[:2]) == {"a": 0.0, "b": 1.0}
    with pytest.raises(UserError, match="no plan that keeps 4"):
        best(rows, 4)


def test_levels_and_the_sentence():
    def verdict(keep, level):
        figures = {"best": "reap", "kl": 0.5, "ppl_ratio": 1.5}
        return {"keep": keep, "level": level, "seems_safe": False, **figures}

    level, sentence = job.sentence([verdict(15, "safe"), verdict(14, "safe"), verdict(8, "stop")], 16)
    assert level == "safe" and "Keeping 14 of 16 experts (12.5 % dropped)" in sentence
    level, sentence = job.sentence([verdict(15, "stop"), verdict(8, "stop")], 16)
    assert level == "stop" and sentence.startswith("No cut that was tried is safe")
    # A deeper cut that looks safe below one that is not was lucky.
    lucky = [verdict(15, "safe"), verdict(14, "caution"), verdict(8, "safe")]
    assert "Keeping 15 of 16" in job.sentence(lucky, 16)[1] and job.recommended(lucky)["keep"] == 15
    assert job.recommended(lucky[1:]) is None and job.sentence(lucky[1:], 16)[0] == "caution"

    level, sentence = job.sentence([{**verdict(15, "caution"), "seems_safe": True}], 16)
    assert level == "caution" and sentence.startswith("Too little text to call any cut safe.")

    domains = {"code": (0.999, 1.001), "math": (0.999, 1.001)}
    part = {"kl": 0.001, "kl_ci": (0.0005, 0.002), "documents": 10}
    one = {
        "kl": 0.001, "kl_ci": (0.0005, 0.002), "ppl_ci": domains, "ppl": dict.fromkeys(domains, 1.0),
        "per_domain": {"code": part, "math": part}, "documents": {"nats": [0.01] * 20},
    }  # fmt: skip
    assert _plans.level(one) == "safe"
    assert _plans.level({**one, "documents": {"nats": [0.01] * 19}}) == "caution"
    few = {**part, "documents": 4}
    assert _plans.level({**one, "per_domain": {"code": part, "math": few}}) == "caution"
    bad = {**part, "kl": 0.2, "kl_ci": (0.15, 0.25)}
    assert _plans.level({**one, "per_domain": {"code": part, "math": bad}}) == "stop"
    assert _plans.level(one, {"worse": ["2 of 8 answers loop"], "significantly_worse": []}) == "caution"
    assert _plans.level({**one, "ppl_ci": {"code": (0.999, 1.001), "math": (1.2, 1.4)}}) == "stop"
    assert _plans.level({**one, "kl_ci": None}) == "caution"
