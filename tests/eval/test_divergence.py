"""KL, agreement and perplexity against numpy, and the laws they obey."""

import contextlib
import copy
import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import tiny
from moesmith.errors import UserError
from moesmith.eval import divergence as subject
from moesmith.eval.divergence import Divergence, Spool, batches, divergence, divergences, report_row


@dataclass
class Doc:
    ids: list[int]
    domain: str
    id: str


def documents(lengths=(30, 7, 2, 19, 30, 12), vocabulary=128):
    generator = torch.Generator().manual_seed(0)
    return [
        Doc(torch.randint(5, vocabulary, (n,), generator=generator).tolist(), "ab"[i % 2], f"d{i}")
        for i, n in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def other(model):
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter += 0.1 * parameter.std() * torch.randn(parameter.shape, generator=generator)
    return changed


def figures(found):
    return np.concatenate(found.kl), found.agree, found.nll_a, found.nll_b


def brute_force(a, b, document):
    """One document alone, everything spelled out in fp64."""
    with torch.no_grad():
        x, y = (m(torch.tensor([document.ids])).logits[0, :-1].double().numpy() for m in (a, b))
    p, q = (np.exp(v) / np.exp(v).sum(-1, keepdims=True) for v in (x, y))
    kl = (p * (np.log(p) - np.log(q))).sum(-1)
    rows, targets = np.arange(len(p)), document.ids[1:]
    nll = [-np.log(v[rows, targets]).sum() for v in (p, q)]
    return kl, (p.argmax(-1) == q.argmax(-1)).sum(), *nll


def test_against_brute_force(model, other):
    docs = documents()
    found = divergence(model, other, docs)
    for i, document in enumerate(docs):
        kl, agree, nll_a, nll_b = brute_force(model, other, document)
        np.testing.assert_allclose(found.kl[i], kl, atol=2e-6)
        assert found.agree[i] == agree
        assert found.nll_a[i] == pytest.approx(nll_a, rel=1e-5)
        assert found.nll_b[i] == pytest.approx(nll_b, rel=1e-5)
    facts = found.facts()
    kl = np.concatenate([brute_force(model, other, d)[0] for d in docs])
    assert facts["tokens"] == len(kl) == sum(len(d.ids) - 1 for d in docs) and facts["documents"] == 6
    assert facts["kl"]["mean"] == pytest.approx(kl.mean(), rel=1e-4)
    assert facts["kl"]["median"] == pytest.approx(np.quantile(kl, 0.5, method="inverted_cdf"), rel=1e-4)
    assert facts["kl"]["p99"] == pytest.approx(kl.max(), rel=1e-4)  # of 94 tokens
    ppl = facts["ppl"]["overall"]
    assert ppl["ratio"] == pytest.approx(ppl["b"] / ppl["a"])
    assert ppl["a"] == pytest.approx(np.exp(sum(brute_force(model, other, d)[2] for d in docs) / len(kl)))
    for low, value, high in (
        (facts["kl"]["ci"][0], facts["kl"]["mean"], facts["kl"]["ci"][1]),
        (facts["top1"]["ci"][0], facts["top1"]["rate"], facts["top1"]["ci"][1]),
        (ppl["ci"][0], ppl["ratio"], ppl["ci"][1]),
    ):
        assert low < value < high


def test_domains_add_up(model, other):
    docs = documents()
    facts = divergence(model, other, docs).facts()
    alone = divergence(model, other, [d for d in docs if d.domain == "b"]).facts()
    assert facts["per_domain"]["b"]["kl"]["mean"] == pytest.approx(alone["kl"]["mean"], rel=1e-4)
    assert facts["ppl"]["per_domain"]["b"]["ratio"] == pytest.approx(
        alone["ppl"]["overall"]["ratio"], rel=1e-4
    )
    parts = facts["per_domain"].values()
    assert sum(part["tokens"] for part in parts) == facts["tokens"]
    mean = sum(part["kl"]["mean"] * part["tokens"] for part in parts) / facts["tokens"]
    assert mean == pytest.approx(facts["kl"]["mean"])
    row = report_row("b", facts)
    assert row["per_domain"].keys() == {"a", "b"} and row["kl_mean"] == facts["kl"]["mean"]
    json.dumps([facts, row])


def test_identical_models_do_not_differ(model):
    facts = divergence(model, model, documents()).facts()
    assert facts["kl"]["mean"] == facts["kl"]["max"] == 0 and facts["top1"]["rate"] == 1
    assert facts["ppl"]["overall"]["ratio"] == 1 and facts["ppl"]["overall"]["ci"] == (1, 1)


@pytest.mark.parametrize("batch_tokens", [1, 31, 64])
def test_batch_size_changes_nothing(model, other, batch_tokens):
    wanted = divergence(model, other, documents(), batch_tokens=10_000)
    found = divergence(model, other, documents(), batch_tokens=batch_tokens)
    for mine, theirs in zip(figures(found), figures(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)


def test_pieces_change_nothing(model, other, monkeypatch):
    wanted = divergence(model, other, documents())
    monkeypatch.setattr(subject, "PIECE", 128 * 4)  # 4 positions at a time
    for mine, theirs in zip(figures(divergence(model, other, documents())), figures(wanted), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6, atol=1e-7)


def test_batches_keep_to_their_size():
    docs = documents((50, 3, 9, 9, 8, 2, 30))
    found = list(batches(docs, 32))
    assert sorted(i for batch in found for i in batch) == list(range(7))
    for batch in found:
        width = max(len(docs[i].ids) for i in batch)
        assert width * len(batch) <= 32 or len(batch) == 1
    lengths = [len(docs[i].ids) for batch in found for i in batch]
    assert lengths == sorted(lengths, reverse=True)


def test_an_expert_that_is_gone_costs_something():
    """One model, several contexts: each candidate sees its own, and the model is left as it was."""
    model = tiny.build("mixtral").eval()
    experts = next(m for m in model.modules() if tiny.is_experts(m))
    before = experts.down_proj.detach().clone()

    @contextlib.contextmanager
    def without(expert):
        kept = experts.down_proj.data.clone()
        experts.down_proj.data[expert] = 0
        try:
            yield
        finally:
            experts.down_proj.data.copy_(kept)

    docs = documents(vocabulary=100)
    candidates = {"same": contextlib.nullcontext, **{f"no {e}": lambda e=e: without(e) for e in (0, 5)}}
    found = divergences(model, docs, candidates, batch_tokens=40)
    kl = {name: one.facts()["kl"]["mean"] for name, one in found.items()}
    assert kl["same"] == 0 and kl["no 0"] > 1e-5 and kl["no 5"] > 1e-5 and kl["no 0"] != kl["no 5"]
    assert torch.equal(experts.down_proj, before)
    with without(5):
        alone = divergence(tiny.build("mixtral").eval(), model, docs)
    np.testing.assert_allclose(np.concatenate(alone.kl), np.concatenate(found["no 5"].kl), atol=2e-6)


def test_reference_runs_once_per_batch(model, monkeypatch):
    runs = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda *a, **k: runs.append(1) or forward(*a, **k))
    done = []
    divergences(model, documents(), {c: contextlib.nullcontext for c in "xyz"}, done.append, batch_tokens=60)
    batched = len(list(batches(documents(), 60)))
    assert len(runs) == 4 * batched and len(done) == batched and done[-1] == 94


def test_spooled_reference_is_exact(model, other, tmp_path):
    half = copy.deepcopy(model).bfloat16()
    with Spool(tmp_path / "logits") as spool:
        spool.record(half, documents(), batch_tokens=40)
        assert spool.path.stat().st_size == Spool.nbytes(documents(), 128, 2)
        found = divergence(spool, other, documents(), batch_tokens=40)
    assert not spool.path.exists()
    wanted = divergence(half, other, documents(), batch_tokens=40)
    for mine, theirs in zip(figures(found), figures(wanted), strict=True):
        assert np.array_equal(mine, theirs)


def test_measured_in_parts_and_put_together(model, other):
    docs = documents()
    whole = divergence(model, other, docs)
    parts = [divergence(model, other, docs[:2]), divergence(model, other, docs[2:])]
    back = [
        Divergence.from_state_dict(json.loads(json.dumps(p.state_dict(), default=lambda x: x.tolist())))
        for p in parts[:1]
    ]
    merged = Divergence.merged([*back, parts[1]])
    for mine, theirs in zip(figures(merged), figures(whole), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=2e-5, atol=2e-6)
    assert merged.ids == whole.ids and merged.domains == whole.domains
    assert merged.facts()["kl"]["ci"] == pytest.approx(whole.facts()["kl"]["ci"], rel=1e-4)


def test_vocabulary_padded_with_minus_infinity(model):
    """Ids that no model can say have probability 0 in both: they count nothing."""

    class Masked(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, **inputs):
            out = self.inner(**inputs)
            out.logits[..., 127] = -torch.inf
            return out

    docs = documents(vocabulary=120)
    assert divergence(Masked(), Masked(), docs).facts()["kl"]["max"] == 0
    with pytest.raises(UserError, match="the candidate: probability 0 for a token of document d"):
        divergence(model, Masked(), docs)


def broken(model, change):
    class Broken(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = model, model.config

        def forward(self, **inputs):
            out = self.inner(**inputs)
            out.logits = change(out.logits)
            return out

    return Broken().eval()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite(model, value):
    def spoil(logits):
        logits[:, 1, 77] = value
        return logits

    with pytest.raises(UserError, match="the candidate: logits that are not finite in document d0"):
        divergence(model, broken(model, spoil), documents((30,)))
    with pytest.raises(UserError, match="the reference: logits that are not finite"):
        divergence(broken(model, spoil), model, documents((30,)))


def test_refusals(model):
    small = LlamaForCausalLM(
        LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2)
    )  # fmt: skip
    names = ("A", "B")
    with pytest.raises(UserError, match="A has a vocabulary of 128, B of 96"):
        divergence(model, small, documents(vocabulary=90), names=names)
    with pytest.raises(UserError, match=r"B: token id \d+ is beyond its vocabulary of 96"):
        divergence(model, small, documents(), names=names)
    with pytest.raises(UserError, match="no documents"):
        divergence(model, model, [])
    with pytest.raises(UserError, match=r"document d1 \(b\) has 1 tokens"):
        divergence(model, model, documents((5, 1)))
    with pytest.raises(UserError, match=r"B: logits \(1, 5\) for ids \(1, 5\), wanted"):
        divergence(model, broken(model, lambda x: x[..., 0]), documents((5,)), names=names)
    with pytest.raises(UserError, match=r"B: logits \(1, 1, 128\)"):
        divergence(model, broken(model, lambda x: x[:, -1:]), documents((5,)), names=names)


def test_modes_are_kept(model, other):
    model.train()
    other.eval()
    divergence(model, other, documents((5, 6)))
    assert model.training and not other.training
    model.eval()


def test_pieces_of_one_row_are_one_document():
    """Cutting every row into four equal pieces tells nothing new, so no interval gets narrower."""
    rng = np.random.default_rng(0)
    values = rng.random((6, 40)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)[:, None]

    def made(pieces: int) -> Divergence:
        parts = [part for row in values for part in np.split(row, pieces)]
        ids = [f"a/{r}" + (f".{p + 1}" if p else "") for r in range(6) for p in range(pieces)]
        loss = np.array([part.sum(dtype=np.float64) for part in parts])
        return Divergence(["a"] * len(parts), parts, loss / 50, loss, 1.1 * loss, ids)

    whole, cut = made(1).facts(), made(4).facts()
    assert (whole["documents"], cut["documents"], cut["per_domain"]["a"]["documents"]) == (6, 6, 6)
    for figure in ("kl", "top1"):
        assert cut[figure]["ci"] == pytest.approx(whole[figure]["ci"])
    assert cut["kl"]["p99_ci"] == whole["kl"]["p99_ci"]
    assert cut["ppl"]["overall"]["ci"] == pytest.approx(whole["ppl"]["overall"]["ci"])
    alone = Divergence(
        ["a"] * 2, [values[0], values[1]], np.ones(2), np.ones(2), np.ones(2), ["a/1", "a/1.2"]
    )
    assert alone.facts()["kl"]["ci"] is None
