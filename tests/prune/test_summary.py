"""The profile's part of a report: known shapes have known figures, and every section is there."""

import json

import pytest
import torch

from moesmith.prune.plan import make_plan
from moesmith.prune.summary import (
    DRAWS,
    agreement_facts,
    concentration_facts,
    domain_facts,
    gini_of,
    heatmap_facts,
    jaccard,
    profile_facts,
    reliability_facts,
    retained_facts,
    short_names,
    spearman,
    unit_facts,
)
from profiles import profile, random_profile


@pytest.fixture
def found():
    return random_profile(layers=3, experts=16, documents=12, domains=3)


def keep_of(found, n):
    return make_plan(found, keep=n, super_experts=False).keep


def test_every_section_is_plain_data(found):
    plan = make_plan(found, keep=12)
    facts = profile_facts(found, plan)
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts
    assert set(facts) == {
        "heatmap", "concentration", "domains", "reliability", "agreement", "units", "notes", "retained"
    }  # fmt: skip
    assert facts == profile_facts(found, plan), "seeded"
    assert "retained" not in profile_facts(found)


def test_the_heatmap_has_every_layer_expert_and_domain(found):
    plan = make_plan(found, keep=12)
    facts = heatmap_facts(found, plan)
    assert facts["layers"] == ["0", "1", "2"] and facts["experts"] == 16
    assert facts["dropped"] == list(plan.drop.values())
    for statistic in facts["statistics"].values():
        assert list(statistic["by_domain"]) == ["all", "code", "math", "prose"]
        assert torch.tensor(list(statistic["by_domain"].values())).shape == (4, 3, 16)
    shares = torch.tensor(facts["statistics"]["contribution"]["by_domain"]["math"])
    assert torch.allclose(shares.sum(-1), torch.full((3,), 100.0), atol=1.0)


def test_concentration_of_known_shares():
    tokens = torch.zeros(2, 2, 10)
    tokens[0] = 50  # all equal
    tokens[1, :, 3] = 50  # one holds everything
    facts = concentration_facts(profile(tokens))
    assert facts["gini"] == [0.0, 0.9]
    assert facts["experts_for"] == {"50": [5, 1], "80": [8, 1], "95": [10, 1], "99": [10, 1]}
    assert facts["top8_share"] == [0.8, 1.0] and facts["bottom_half_share"] == [0.5, 0.0]
    assert facts["dead"] == [[], [0, 1, 2, 4, 5, 6, 7, 8, 9]]
    assert facts["lorenz"]["0"][5] == [0.5, 0.5] and facts["lorenz"]["1"][-2:] == [[0.9, 0.0], [1.0, 1.0]]


def test_gini_is_scale_free_and_within_bounds():
    values = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert gini_of(values) == pytest.approx(gini_of(7 * values))
    mean_difference = (values[:, None] - values[None]).abs().mean()
    assert gini_of(values) == pytest.approx(float(mean_difference / (2 * values.mean())))
    assert gini_of(torch.zeros(4)) == 0


def test_domains_that_share_nothing_and_domains_that_share_all():
    tokens = torch.zeros(1, 4, 16)
    tokens[0, 0::2, :8] = 100  # code
    tokens[0, 1::2, 8:] = 100  # math
    found = profile(tokens)
    facts = domain_facts(found, keep_of(found, 8))
    assert facts["names"] == ["code", "math"] and facts["top"] == 4
    assert facts["overlap"] == [[1.0, 0.0], [0.0, 1.0]]
    assert facts["regret"] == [[0.0, 1.0], [1.0, 0.0]], "each would drop all that the other lives on"
    same = torch.arange(1, 17).expand(1, 4, 16)
    facts = domain_facts(profile(same), keep_of(profile(same), 12))
    assert facts["overlap"] == [[1.0, 1.0], [1.0, 1.0]] and facts["dropped_overlap"][0][1] == 1.0
    assert facts["regret"][0][1] == facts["regret"][0][0] == pytest.approx((1 + 2 + 3 + 4) / 136, abs=1e-4)
    assert facts["chance"] == pytest.approx(4 / 28, abs=1e-4)


def test_chance_is_what_random_sets_share():
    draws = [set(torch.randperm(128)[:32].tolist()) for _ in range(2000)]
    measured = sum(jaccard(a, b) for a, b in zip(draws[::2], draws[1::2], strict=True)) / 1000
    assert measured == pytest.approx(32 / (256 - 32), rel=0.05)


def test_documents_that_agree_and_documents_that_do_not():
    agreeing = torch.arange(1, 17).expand(1, 8, 16) * 100
    facts = reliability_facts(profile(agreeing))
    assert facts["split_half"] == [1.0] and facts["warning"] is None
    assert facts["tokens_per_expert"] == {"min": 800, "median": 6400, "below": 0, "layer": "0", "expert": 0}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(1, 9, (1, 8, 64), generator=generator)
    facts = reliability_facts(profile(noise))
    assert abs(facts["split_half"][0]) < 0.5
    assert "fewer than 100 tokens" in facts["warning"] and facts["tokens_per_expert"]["below"] == 64
    assert reliability_facts(profile(agreeing[:, :1], domains=1))["split_half"] == [None]


def test_retained_has_an_interval_around_it(found):
    for score, domains in (("contribution", "mean"), ("prompt_norm", "max"), ("reap", {"code": 1.0})):
        plan = make_plan(found, keep=12, score=score, domains=domains)
        for row in retained_facts(found, plan):
            low, high = row["ci"]
            assert low <= row["norm"] <= high and 0 < high - low < 0.2
            assert row["norm"] == pytest.approx(plan.retained[f"model.layers.{row['layer']}.mlp"], abs=1e-4)


def test_the_interval_covers_documents_not_drawn():
    """Documents drawn from one population: about 95 in 100 intervals hold its true share."""
    generator = torch.Generator().manual_seed(0)
    kept, hits = [0, 1, 2], 0
    rate = torch.tensor([5.0, 4.0, 3.0, 2.0])
    for trial in range(100):
        noise = torch.rand(1, 24, 4, generator=generator) * 2  # mean 1
        found = profile(100 * rate * noise, domains=1)
        plan = make_plan(found, keep=3, super_experts=False)
        plan.keep = {name: kept for name in plan.keep}
        low, high = retained_facts(found, plan, seed=trial)[0]["ci"]
        hits += low <= 12 / 14 <= high
    assert 85 <= hits <= 100 and DRAWS >= 200


def test_one_document_has_no_interval():
    found = profile(torch.full((1, 1, 8), 100), domains=1)
    assert retained_facts(found, make_plan(found, keep=4))[0]["ci"] is None


def test_pieces_of_one_row_are_one_document():
    """A row cut into six says no more than it did whole: not in its interval, nor in its halves."""
    generator = torch.Generator().manual_seed(0)
    pieces = (torch.rand(1, 6, 16, generator=generator) * 100).round().repeat_interleave(6, 1)
    whole = 6 * pieces[:, ::6]
    one, many = profile(whole, domains=1), profile(pieces, domains=1)
    for i, document in enumerate(one.documents):
        document.id = f"code/{i}"
    for i, document in enumerate(many.documents):
        document.id = f"code/{i // 6}" + (f".{i % 6 + 1}" if i % 6 else "")
    a, b = (retained_facts(p, make_plan(p, keep=12, super_experts=False))[0]["ci"] for p in (one, many))
    assert a == pytest.approx(b, abs=1e-9)
    a, b = (reliability_facts(p) for p in (one, many))
    assert a["split_half"] == b["split_half"] and (a["documents"], b["documents"]) == (6, 6)


def test_a_domain_with_one_document_has_no_interval():
    """Drawn again it is always itself, so the interval would have no width."""
    found = profile(torch.arange(1, 25).reshape(1, 3, 8) * 10)  # code, math, code
    assert retained_facts(found, make_plan(found, keep=6))[0]["ci"] is None
    assert retained_facts(found, make_plan(found, keep=6, domains={"code": 1.0}))[0]["ci"] is not None


def test_criteria_agree_with_themselves_and_leave_out_what_is_unknown(found):
    facts = agreement_facts(found, keep_of(found, 12))
    n = len(facts["criteria"])
    for table in (facts["spearman"], facts["dropped_jaccard"]):
        table = torch.tensor(table)
        assert table.shape == (n, n) and torch.equal(table, table.T) and bool((table.diagonal() == 1).all())
    easyep, contribution = facts["criteria"].index("easyep"), facts["criteria"].index("contribution")
    assert facts["spearman"][easyep][contribution] == 1.0, "here easyep is a tenth of contribution"
    for layer in found.layers:
        layer.sums["easyep"][:] = float("nan")
    assert "easyep" not in agreement_facts(found, keep_of(found, 12))["criteria"]


def test_where_the_two_units_disagree():
    """The rare loud expert: last as a sum over tokens, not last as a norm over the document."""
    tokens = torch.tensor([[[400, 4, 30, 400]]])
    found = profile(tokens, torch.tensor([[1.0, 10.0, 2.0, 1.0]]), domains=1, top_k=1)
    facts = unit_facts(found, keep_of(found, 3))
    row = facts["per_layer"][0]
    assert (row["only_contribution_drops"], row["only_prompt_norm_drops"]) == ([1], [2])
    assert row["spearman"] < 1 and "1 of 1 dropped experts differ, in 1 of 1 layers" in facts["note"]
    same = profile(torch.arange(1, 9).expand(1, 2, 8) * 10)
    assert "both would drop the same 4 experts" in unit_facts(same, keep_of(same, 4))["note"]


def test_spearman_is_scipys():
    from scipy.stats import spearmanr

    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        a, b = torch.randint(0, 6, (2, 30), generator=generator)
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(torch.ones(4), torch.arange(4)) == 0


def test_names_stay_distinct(found):
    assert short_names(found) == ["0", "1", "2"]
    found.layers[1].layer = "model.layers.0.other"
    assert len(set(short_names(found))) == 3
