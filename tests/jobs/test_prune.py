"""`moesmith prune`: the folder it writes, what it measures, and what it refuses."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
import torch

import tiny
from chats import tokenizer
from moesmith import cli
from moesmith.data import leaks
from moesmith.data.corpora import Document, corpus_hash, write_documents
from moesmith.jobs import _cut
from moesmith.jobs import prune as job
from moesmith.models.checkpoint import Checkpoint
from moesmith.models.layers import text_layers
from moesmith.prune.criteria import CRITERIA, scores
from moesmith.prune.observe import Collector
from moesmith.prune.plan import FILE, Plan, make_plan
from moesmith.prune.sizes import measure
from moesmith.prune.stats import Document as Observed
from moesmith.prune.stats import Profile, identity

WORDS = (
    "the sum of two numbers is found by adding them one after the other until nothing is left to add and "
    "then the answer is written down below the line so that everybody can read it without asking again"
).split()


def documents(side: int, per_domain: int = 4) -> list[Document]:
    """Sentences of the same words in another order for either side, in three domains."""
    made = []
    tokens = tokenizer()
    for d, domain in enumerate(("code", "math", "prose")):
        for n in range(per_domain):
            draw = random.Random(100 * side + 10 * d + n)
            text = " ".join(draw.sample(WORDS[8 * d :], 18))
            made.append(Document(f"{domain}/{side}{n}", domain, text, tokens(text).input_ids[:96]))
    return made


def make_profile(model_folder: Path, out: Path, model=None) -> Path:
    """What `moesmith profile` leaves, of a few sentences."""
    model = model or load(model_folder)
    used, unseen = documents(0), documents(1)
    layers = text_layers(model)
    observed = [Observed(d.id, d.domain, len(d.ids), str(i)) for i, d in enumerate(used)]
    collector = Collector(layers, observed)
    with collector.attach(model), torch.no_grad():
        for i, document in enumerate(used):
            with collector.batch(torch.full((1, len(document.ids)), i)):
                model(input_ids=torch.tensor([document.ids]), use_cache=False)
    about = identity(model_folder, {layer.num_experts for layer in layers})
    meta = {"model": str(model_folder), "corpus_hash": corpus_hash(used), "date": "today", **about}
    collector.finish(meta).write(out)
    write_documents(out / "held_out.jsonl", unseen)
    leaks.write(out / "ngrams.npy", leaks.collect(used))
    return out


def load(folder: Path):
    return _cut.load(folder, "cpu")


def prune(capsys, *argv, status: int = 0) -> str:
    code = cli.main(["prune", *map(str, argv)])
    captured = capsys.readouterr()
    assert code == status, captured.err
    return captured.out if status == 0 else captured.err


@pytest.fixture(scope="module")
def model(tmp_path_factory, checkpoint) -> Path:
    """A tiny OLMoE (3 layers, 8 experts, top-2) with a tokenizer; expert 5 of layer 1 gives nothing."""
    folder = tmp_path_factory.mktemp("model") / "olmoe"
    made = tiny.build("olmoe")
    with torch.no_grad():
        made.model.layers[1].mlp.experts.down_proj[5] *= 1e-6
    made.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# a model\n")
    return folder


@pytest.fixture(scope="module")
def prof(tmp_path_factory, model) -> Path:
    return make_profile(model, tmp_path_factory.mktemp("prof") / "prof")


@pytest.fixture
def no_pictures(monkeypatch):
    """Reports without drawing: the facts are written, the rest is tested where it is made."""
    import moesmith.report

    def write(folder, facts):
        (folder / "report.json").write_text(json.dumps(moesmith.report.clean(facts)))

    monkeypatch.setattr(moesmith.report, "write_report", write)


QUICK = ("--new-tokens", 8, "--canary", 3)


def test_the_pruned_folder(model, prof, tmp_path, capsys):
    out = tmp_path / "small"
    text = prune(capsys, model, "--profile", prof, "--keep", 6, "--out", out, *QUICK)
    for line in (
        r"score +contribution, mean over 3 domains · .* routed tokens, fewest for one expert: \d+ \(layer",
        r"keep +6 of 8 in every layer: worst layer \d keeps \d\d\.\d\d % of weighted output norm",
        r"held-out +KL .* median .* p99 .* top-1 agreement .* perplexity .*code .*math .*prose",
        r"canary +3 answers: loops \d \(was \d\), ended \d \(was \d\), length ×",
        r"random +as many experts dropped at random, one draw: KL",
        r"only 12 documents in all, fewer than 20, and only 4 in code, 4 in math, 4 in prose",
        r"verdict +6 of 8 experts kept: ",
        r"written .*small .*mask == slice: .* report: .*report.html",
        r"next: moesmith heal .* --teacher .*moesmith verify",
    ):
        assert re.search(line, text), line
    assert {"config.json", "model.safetensors", "tokenizer.json", FILE, "moesmith.json", "report.html",
            "report.json", "report.png", "README.md"} <= {f.name for f in out.iterdir()}  # fmt: skip
    assert [p.name for p in tmp_path.iterdir()] == ["small"]
    plan = Plan.read(out)
    assert plan.count == 6 and 5 in plan.drop["model.layers.1.mlp"]
    assert plan.meta["asked"] == {"keep": 6} and plan.meta["evidence"]["mask_equals_slice"]["tokens"] == 64
    assert Checkpoint.open(out).config["num_experts"] == 6
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# a model\n\n## Pruned with moesmith") and "| KL" in card
    assert "only 12 documents" in card and "optimistic" not in card and "optimistic" not in text
    report = json.loads((out / "report.json").read_text())
    assert {"verdict", "pareto", "divergence", "canary", "heatmap", "retained", "agreement"} <= set(report)
    assert report["heatmap"]["dropped"] == list(plan.drop.values())


def test_the_written_model_is_the_masked_one(model, prof, tmp_path, capsys, no_pictures):
    from moesmith.models.surgery import masked

    out = tmp_path / "small"
    prune(capsys, model, "--profile", prof, "--cut", "50%", "--out", out, "--canary", 0)
    original, small = load(model), load(out)
    ids = torch.tensor([documents(1)[0].ids])
    plan = Plan.read(out)
    with torch.no_grad():
        with masked(original, plan.keep):
            expected = original(input_ids=ids).logits
        assert (small(input_ids=ids).logits - expected).abs().max() < 1e-5
        assert (original(input_ids=ids).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "glm4_moe", "gemma4"])
def test_families(checkpoint, tmp_path, capsys, family, no_pictures):
    source = checkpoint(family)
    prof = make_profile(source, tmp_path / "prof")
    facts = json.loads(
        prune(capsys, source, "--profile", prof, "--keep", 6, "--out", tmp_path / "small", "--json")
    )
    parity = facts["evidence"]["mask_equals_slice"]
    assert parity["difference"] <= 1e-5 * max(parity["largest_logit"], 1)
    assert facts["evidence"]["canary"] is None and "no tokenizer" in facts["evidence"]["skipped"][0]
    assert facts["bytes"]["after"] == pytest.approx(facts["written"]["nbytes"], rel=0.02)


def test_a_packed_model_takes_the_profile_of_its_original(model, prof, tmp_path, capsys, no_pictures):
    packed = tmp_path / "packed"
    assert cli.main(["quantize", str(model), "--out", str(packed), "--dtype", "float32"]) == 0
    capsys.readouterr()
    out = tmp_path / "small"
    facts = json.loads(
        prune(capsys, packed, "--profile", prof, "--keep", 6, "--out", out, "--canary", 0, "--json")
    )
    assert Checkpoint.open(out).is_packed and facts["evidence"]["mask_equals_slice"]["difference"] < 1e-3
    sizes = [measure(c.tensors, 8, c.quantization) for c in map(Checkpoint.open, (model, packed))]
    assert sizes[0].expert_weights == sizes[1].expert_weights, "codes are counted as weights, scales are not"
    assert sizes[0].matrix_weights == sizes[1].matrix_weights
    assert facts["bytes"]["after"] < facts["bytes"]["before"]


@pytest.mark.parametrize(
    "criterion", ["contribution", "reap", "prompt_norm", "easyep", "relative", "man", "ean_ca"]
)
def test_an_expert_scaled_to_nothing_goes_first(prof, criterion):
    """In a real forward pass, not only in sums made up."""
    found = scores(Profile.read(prof), criterion)["model.layers.1.mlp"]
    assert int(found.argmin()) == 5
    assert int(scores(Profile.read(prof), "frequency")["model.layers.1.mlp"].argmin()) != 5


# ---------------------------------------------------------------- looking first


def test_a_dry_run_writes_nothing_and_loads_no_model(model, prof, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(_cut, "load", lambda *args: pytest.fail("a model was loaded"))
    text = prune(capsys, model, "--profile", prof, "--retain", "60%", "--dry-run")
    assert re.search(r"layer +keep +retained +fewest tokens +dropped", text)
    assert "smallest count by unit" in text and "→" in text and "nothing written" in text
    assert f"next: moesmith prune {model} --profile {prof} --out small --retain 60%" in text
    facts = json.loads(
        prune(
            capsys,
            model,
            "--profile",
            prof,
            "--fit",
            "500kB@bf16",
            "--dry-run",
            "--json",
            "--out",
            tmp_path / "x",
        )
    )
    assert facts["bytes"]["after_bf16"] <= 500_000 and facts["asked"] == {"fit": "500kB@bf16"}
    assert facts["seconds"]["plan"] < 2
    assert not list(tmp_path.iterdir())


def test_the_same_wish_gives_the_same_plan(model, prof, capsys):
    argv = (
        model,
        "--profile",
        prof,
        "--cut",
        "30%",
        "--domains",
        "max",
        "--protect",
        1,
        "--dry-run",
        "--json",
    )
    first, second = (json.loads(prune(capsys, *argv)) for _ in range(2))
    assert first["kept"] == second["kept"] and first["protected"] == second["protected"]


def test_every_score_can_be_asked_for(model, prof, capsys):
    words = job.Config.model_fields["score"].annotation.__args__
    assert set(words) == {"auto", *CRITERIA}
    for score in CRITERIA:
        prune(capsys, model, "--profile", prof, "--keep", 5, "--score", score, "--dry-run")


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ((), "no size given"),
        (("--keep", 6, "--cut", "10%"), "both --keep and --cut given"),
        (("--cut", "15"), "--cut 15 is no share"),
        (("--retain", "100%"), "--retain 100% is no share"),
        (("--keep", 1), "keep 1 is fewer than the 2 experts a token uses"),
        (("--keep", 8), "drops none"),
        (("--cut", "5%"), "the smallest cut is 12.5 %"),
        (("--retain", "99.9%"), "no cut retains 99.9 %"),
        (("--fit", "1kB@q4"), "even 2 experts per layer take"),
        (("--fit", "14GB@q4"), "all 8 experts fit already"),
        (("--fit", "14GB@q7"), "--fit 14GB@q7"),
        (("--keep", 6, "--domains", "poems=1"), "no domain 'poems'"),
        (("--keep", 4, "--protect", 8), "has to keep"),
    ],
)
def test_wishes_that_cannot_be_met(model, prof, tmp_path, capsys, argv, message):
    error = prune(capsys, model, "--profile", prof, "--out", tmp_path / "small", *argv, status=2)
    assert message in error
    assert not list(tmp_path.iterdir())


def test_groups_that_cannot_be_equal(checkpoint, tmp_path, capsys):
    source = checkpoint("glm4_moe")
    prof = make_profile(source, tmp_path / "prof")
    error = prune(capsys, source, "--profile", prof, "--keep", 5, "--dry-run", status=2)
    assert "compares 2 groups" in error and "4 and 6" in error


def test_a_profile_of_another_model(model, prof, checkpoint, tmp_path, capsys):
    error = prune(capsys, checkpoint("olmoe"), "--profile", prof, "--keep", 6, "--dry-run")  # same routers
    error = prune(capsys, checkpoint("qwen3_moe"), "--profile", prof, "--keep", 6, "--dry-run", status=2)
    assert "was made of another model" in error
    assert "no such file" in prune(
        capsys, model, "--profile", tmp_path / "x", "--keep", 6, "--dry-run", status=2
    )
    error = prune(capsys, model, "--profile", tmp_path, "--keep", 6, "--dry-run", status=2)
    assert "no finished profile" in error
    assert "missing --out" in prune(capsys, model, "--profile", prof, "--keep", 6, status=2)


def test_a_layer_without_tokens(model, prof, tmp_path, capsys):
    profile = Profile.read(prof)
    for tensor in (*profile.layers[2].sums.values(), *profile.layers[2].per_document.values()):
        tensor.zero_()
    profile.write(tmp_path / "prof")
    error = prune(capsys, model, "--profile", tmp_path / "prof", "--keep", 6, "--dry-run", status=2)
    assert "no token of the profile reached model.layers.2.mlp" in error


def test_held_out_text_that_was_profiled(model, prof, tmp_path, capsys):
    shutil.copytree(prof, tmp_path / "prof")
    write_documents(tmp_path / "prof" / "held_out.jsonl", [*documents(1), documents(0)[3]])
    error = prune(
        capsys, model, "--profile", tmp_path / "prof", "--keep", 6, "--out", tmp_path / "small", status=2
    )
    assert "held-out text leaks" in error and not (tmp_path / "small").exists()


def test_a_place_that_is_taken(model, prof, tmp_path, capsys, no_pictures):
    out = tmp_path / "small"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    argv = (model, "--profile", prof, "--keep", 6, "--evidence", "none", "--out")
    assert f"{out} exists" in prune(capsys, *argv, out, status=2)
    assert "leaves it alone" in prune(capsys, *argv, out, "--overwrite", status=2)
    assert "is the model itself" in prune(capsys, *argv, model, "--overwrite", status=2)
    prune(capsys, *argv, tmp_path / "other")
    prune(capsys, *argv, tmp_path / "other", "--overwrite")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "small"]


# ---------------------------------------------------------------- whole or not at all


def test_a_wrong_checkpoint_is_not_kept(model, prof, tmp_path, capsys, monkeypatch):
    """Mask == slice can fail: here the router's rows are those of the dropped experts."""
    from moesmith.models import rewrite

    original = rewrite.plan_tensors

    def wrong(source, keep):
        swapped = {name: [e for e in range(8) if e not in kept[:2]][:6] for name, kept in keep.items()}
        return original(source, swapped)

    monkeypatch.setattr(rewrite, "plan_tensors", wrong)
    argv = (model, "--profile", prof, "--keep", 6, "--out", tmp_path / "small", "--canary", 0)
    assert "is not the masked original" in prune(capsys, *argv, status=2)
    assert not list(tmp_path.iterdir())


def test_a_killed_run_leaves_no_folder_and_the_next_one_succeeds(
    model, prof, tmp_path, capsys, monkeypatch, no_pictures
):
    argv = ("prune", model, "--profile", prof, "--keep", 6, "--out", tmp_path / "small", "--canary", 0)
    with monkeypatch.context() as patch:
        patch.setattr(_cut, "same_logits", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert cli.main([*map(str, argv)]) == 130
    assert not (tmp_path / "small").exists()
    assert cli.main([*map(str, argv)]) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["small"]


def test_a_full_disk_is_noticed_before_writing(model, prof, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    error = prune(capsys, model, "--profile", prof, "--keep", 6, "--out", tmp_path / "small", status=2)
    assert "1.0 kB free" in error and not list(tmp_path.iterdir())


# ---------------------------------------------------------------- with and without evidence


def test_without_room_it_says_so_and_writes_all_the_same(
    model, prof, tmp_path, capsys, monkeypatch, no_pictures
):
    monkeypatch.setattr(_cut, "no_room", lambda *args: "the model needs 50 GB, 1 GB of RAM are free")
    monkeypatch.setattr(_cut, "load", lambda *args: pytest.fail("a model was loaded"))
    code = cli.main(
        [*map(str, ("prune", model, "--profile", prof, "--keep", 6, "--out", tmp_path / "small"))]
    )
    captured = capsys.readouterr()
    assert code == 0 and "nothing is measured: the model needs 50 GB" in captured.err
    assert "not measured, so nobody knows yet" in captured.out and "next: moesmith verify" in captured.out
    report = json.loads((tmp_path / "small" / "report.json").read_text())
    assert report["verdict"]["level"] == "info" and "pareto" not in report
    assert Plan.read(tmp_path / "small").meta["evidence"]["skipped"]


def fake_row(series: str, kl: float, keeps: dict) -> dict:
    return {
        "series": series, "kind": "prune", "keep": 5, "kl": kl, "keeps": keeps,
        "documents": {"nats": [kl, kl], "tokens": [1, 1]},
    }  # fmt: skip


@pytest.mark.parametrize(
    "wish",
    [
        ("--retain", "80%"),
        ("--keep", 5, "--protect", 2),
        ("--cut", "30%", "--multiple", 2, "--domains", "max"),
        ("--keep", 4, "--no-super-experts"),
    ],
)
def test_auto_compares_the_plans_that_would_be_written(model, prof, capsys, monkeypatch, wish):
    """Whatever decides the experts: each score is measured with the very set that it would keep."""
    from moesmith.jobs import _plans

    seen = {}

    def compare(model, texts, candidates, **given):
        seen.update({candidate.series: candidate.keep for candidate in candidates})
        return [
            {**fake_row(c.series, 0.1 if c.series == "man" else 0.5, c.keep), "keep": c.count}
            for c in candidates
        ]

    monkeypatch.setattr(_plans, "compare_plans", compare)
    argv = (model, "--profile", prof, *wish, "--dry-run", "--json", "--score")
    facts = json.loads(prune(capsys, *argv, "auto"))
    alone = {score: json.loads(prune(capsys, *argv, score)) for score in _plans.SCORES}
    assert seen == {score: found["kept"] for score, found in alone.items()}
    assert facts["score"] == "man" and facts["kept"] == seen["man"]
    assert {row["series"]: row["keep"] for row in facts["chosen_from"]} == {
        score: found["keep"] for score, found in alone.items()
    }


def test_what_was_compared_on_another_model_is_not_taken(model, prof, tmp_path, capsys, monkeypatch):
    """A packed copy's figures choose nothing for the 16-bit model, though its routers are the same."""
    from moesmith.jobs import _plans

    profile, there = Profile.read(prof), shutil.copytree(prof, tmp_path / "prof")
    plans = {name: make_plan(profile, keep=5, score=name).keep for name in _plans.SCORES}
    record = {
        "format": _plans.FORMAT, "profile_hash": _plans.profile_hash(profile), "corpus": _plans.HELD_OUT,
        "evidence": [fake_row(name, 0.5 - 0.4 * (name == "man"), keep) for name, keep in plans.items()],
    }  # fmt: skip
    monkeypatch.setattr(_cut, "no_room", lambda *args: "there is no room")
    argv = (model, "--profile", there, "--keep", 5, "--score", "auto", "--dry-run", "--json")
    (there / _plans.FILE).write_text(json.dumps({**record, "model_hash": profile.meta["model_hash"]}))
    assert json.loads(prune(capsys, *argv))["score"] == "man"
    (there / _plans.FILE).write_text(json.dumps({**record, "model_hash": "a packed copy's"}))
    assert "has to measure and cannot: there is no room" in prune(capsys, *argv, status=2)


def test_a_score_that_compare_chose_on_the_same_text_is_said_to_be(
    model, prof, tmp_path, capsys, no_pictures
):
    from moesmith.jobs import _plans

    profile, there = Profile.read(prof), shutil.copytree(prof, tmp_path / "prof")
    plans = {name: make_plan(profile, keep=5, score=name).keep for name in _plans.SCORES}
    record = {
        "format": _plans.FORMAT, "profile_hash": _plans.profile_hash(profile), "corpus": _plans.HELD_OUT,
        "evidence": [fake_row(name, 0.5 - 0.4 * (name == "reap"), keep) for name, keep in plans.items()],
    }  # fmt: skip
    (there / _plans.FILE).write_text(json.dumps(record))
    argv = (model, "--profile", there, "--keep", 5, "--canary", 0, "--score")
    said = "`moesmith compare` chose or measured this score and count on the held-out text that also judges"
    text = prune(capsys, *argv, "reap", "--out", tmp_path / "small")
    card, report = ((tmp_path / "small" / name).read_text() for name in ("README.md", "report.json"))
    assert all(said in " ".join(where.split()) for where in (text, card, report))
    assert "--corpus NAME=FILE" in text[text.index("next: ") :]
    assert said in Plan.read(tmp_path / "small").meta["selected"]
    # Text of its own chose nothing here.
    (there / _plans.FILE).write_text(json.dumps({**record, "corpus": ["code=other.jsonl"]}))
    text = prune(capsys, *argv, "reap", "--out", tmp_path / "other")
    assert "optimistic" not in text


def test_a_profile_that_held_out_nothing(model, prof, tmp_path, capsys, no_pictures):
    shutil.copytree(prof, tmp_path / "prof")
    (tmp_path / "prof" / "held_out.jsonl").write_text("")
    text = prune(capsys, model, "--profile", tmp_path / "prof", "--keep", 6, "--out", tmp_path / "small")
    assert "not measured, so nobody knows yet" in text


def test_the_best_score_is_chosen_by_measuring(model, prof, capsys, monkeypatch):
    from moesmith.jobs import _plans

    argv = (model, "--profile", prof, "--keep", 5, "--score", "auto", "--dry-run", "--json")
    facts = json.loads(prune(capsys, *argv))
    rows = facts["chosen_from"]
    assert {row["series"] for row in rows} == {"reap", "man", "contribution", "frequency"}
    assert facts["score"] == min(rows, key=lambda row: row["kl"])["series"]

    # What compare has measured is taken if it is the same plan, and the rest measured.
    profile = Profile.read(prof)
    plans = {name: make_plan(profile, keep=5, score=name).keep for name in (*_plans.SCORES, "easyep")}
    known = [fake_row(name, 0.5, keep) for name, keep in plans.items()]
    known[-1]["kl"] = 0.1
    monkeypatch.setattr(_plans, "read_evidence", lambda *args: known)
    monkeypatch.setattr(_cut, "no_room", lambda *args: "there is no room")
    facts = json.loads(prune(capsys, *argv))
    assert facts["score"] == "easyep" and "so the figures are optimistic" in facts["selected"]
    known[0]["keeps"] = known[1]["keeps"]
    assert "has to measure and cannot: there is no room" in prune(capsys, *argv, status=2)


def test_counts_per_layer_write_the_plan_only(model, prof, tmp_path, capsys, no_pictures):
    out = tmp_path / "plan"
    text = prune(
        capsys, model, "--profile", prof, "--keep", 5, "--budget", "layer", "--out", out, "--canary", 0
    )
    assert "the plan only" in text and "held-out" in text
    assert not list(out.glob("*.safetensors")) and not (out / "config.json").exists()
    plan = Plan.read(out)
    assert sum(plan.counts.values()) == 15


# ---------------------------------------------------------------- the verdict


def figures(kl: float, ratio: float = 1.0, width: float = 0.001, documents=(20, 20), math=None) -> dict:
    """Facts of a Divergence; `math` is the KL of that domain, where it is another."""
    ppl = {"ratio": ratio, "ci": (ratio - width, ratio + width)}

    def part(mean: float, n: int) -> dict:
        return {"kl": {"mean": mean, "ci": (mean - width, mean + width) if width else None}, "documents": n}

    return {
        **part(kl, sum(documents)),
        "ppl": {"overall": ppl, "per_domain": {"code": ppl, "math": ppl}},
        "per_domain": {"code": part(kl, documents[0]), "math": part(math or kl, documents[1])},
    }


ENDED = {"eos_rate": {"a": {"hits": 4}}, "n": 9, "max_new_tokens": 64}
FINE = {"worse": [], "significantly_worse": [], **ENDED}


@pytest.mark.parametrize(
    ("row", "canary", "level"),
    [
        (figures(0.01), FINE, "safe"),
        (figures(0.01), None, "safe"),
        (figures(0.05), FINE, "caution"),
        (figures(0.029, width=0.01), FINE, "caution"),
        (figures(0.01, 1.05), FINE, "caution"),
        (figures(0.2), FINE, "stop"),
        (figures(0.01, 1.2), FINE, "stop"),
        (figures(0.105, width=0.01), FINE, "caution"),
        (figures(0.001, width=0), FINE, "caution"),
        (figures(0.01), {**FINE, "worse": ["1 of 9 answers loop, it was 0"]}, "caution"),
        (figures(0.01), {"worse": ["w"], "significantly_worse": ["w"]}, "stop"),
        # One domain is enough, though it is a tenth of the tokens.
        (figures(0.01, math=0.2), FINE, "stop"),
        (figures(0.01, math=0.05), FINE, "caution"),
        # So few documents say nothing for sure, except that it is bad.
        (figures(0.01, documents=(14, 5)), FINE, "caution"),
        (figures(0.01, documents=(15, 5)), FINE, "safe"),
        (figures(0.01, documents=(90, 4)), FINE, "caution"),
        (figures(0.2, documents=(2, 2)), FINE, "stop"),
    ],
)
def test_grades(row, canary, level):
    assert _cut.grade(row, canary) == level


def test_a_verdict_says_what_a_hurried_person_needs():
    def verdict(rows):
        return _cut.verdict(_cut.Evidence(rows, FINE), "12 of 16 experts kept", "keeping 15 of 16")

    found = verdict({"plan": figures(0.01), "random": figures(0.05)})
    assert found["level"] == "safe" and "(one draw), as many experts do 5 times" in found["points"][-1]
    found = verdict({"plan": figures(0.01), "random": figures(0.009)})
    assert (
        found["level"] == "caution"
        and "one draw only, but the ranking may say nothing" in found["points"][-1]
    )
    found = verdict({"plan": figures(0.3), "random": figures(0.5), "smallest cut": figures(0.2)})
    assert (
        found["level"] == "stop"
        and "No cut by this score is safe: even keeping 15 of 16" in found["sentence"]
    )
    found = verdict({"plan": figures(0.3), "random": figures(0.5), "smallest cut": figures(0.002)})
    assert "Keeping 15 of 16 would be safe" in found["sentence"]
    found = verdict({"plan": figures(0.01, math=0.2), "random": figures(0.5)})
    assert "KL on math 0.2 [0.2, 0.2] reaches above what 3-bit quantisation costs (0.1)" in found["points"]
    found = verdict({"plan": figures(0.01, documents=(30, 2)), "random": figures(0.5)})
    assert found["points"][0].startswith("only 2 in math, fewer than 5 in a domain: too few")
    assert "--corpus" in found["points"][0] and "--held-out" in found["points"][0]
    short = {**FINE, "eos_rate": {"a": {"hits": 2}}}
    found = _cut.verdict(_cut.Evidence({"plan": figures(0.01), "random": figures(0.05)}, short), "", "")
    assert "the original ended 2 of 9 answers within 64 tokens" in found["points"][0]
    vague = figures(0.002, width=0.1, documents=(2, 1))
    found = verdict({"plan": vague, "random": figures(0.5), "smallest cut": vague})
    assert "The held-out text is too little to call any cut safe" in found["sentence"]


def test_domains_take_turns():
    picked = _cut.in_turn(documents(0), tokens=1)
    assert [d.domain for d in picked] == ["code"]
    picked = _cut.in_turn(documents(0), tokens=300)
    assert [d.domain for d in picked] == ["code", "math", "prose", "code"]
    assert len(_cut.in_turn(documents(0), 10**6)) == 12
