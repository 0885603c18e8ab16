"""Scores: planted truths, formulas by hand, and experts that no token reached."""

import pytest
import torch

from moesmith.errors import UserError
from moesmith.prune.criteria import CRITERIA, domain_weights, parse_domains, per_domain, scores
from profiles import profile, random_profile

# Those that see an expert's output: one scaled to nothing has to come last.
CONTRIBUTION = (
    "contribution", "reap", "prompt_norm", "easyep", "relative", "ean", "man", "msan", "ean_ca", "max_norm",
)  # fmt: skip
NAME = "model.layers.0.mlp"


@pytest.mark.parametrize("criterion", CONTRIBUTION)
def test_an_expert_scaled_to_nothing_comes_last(criterion):
    found = random_profile(experts=8)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(50, 60, (1, 6, 8), generator=generator)
    tokens[0, :, 5] = 500  # and it is the most used
    norm = torch.ones(1, 8)
    norm[0, 5] = 1e-6
    found = profile(tokens, norm)
    assert int(scores(found, criterion)[NAME].argmin()) == 5
    assert int(scores(found, "frequency")[NAME].argmax()) == 5, "usage does not see it"


@pytest.mark.parametrize("criterion", ["contribution", "frequency", "prompt_norm", "relative", "gate"])
def test_a_specialist_survives_max_and_falls_under_mean(criterion):
    tokens = torch.full((1, 10, 8), 100)
    tokens[0, :, 3] = 0
    tokens[0, 0::5, 3] = 300  # only in the first of five domains, and there the best
    found = profile(tokens, domains=5)
    assert int(scores(found, criterion, "max")[NAME].argmax()) == 3
    assert int(scores(found, criterion, "mean")[NAME].argmin()) == 3
    assert int(scores(found, criterion, {"code": 1.0})[NAME].argmax()) == 3
    assert float(scores(found, criterion, {"math": 2.0})[NAME][3]) == 0


@pytest.mark.parametrize("criterion", CRITERIA)
def test_an_expert_never_reached_scores_nothing_and_never_nan(criterion):
    found = random_profile(layers=1, experts=8)
    tokens = found.layers[0].per_document["tokens"].clone()[None]
    tokens[..., 2] = 0
    tokens[:, 1::2] = 0  # and a domain without a token
    found = profile(tokens)
    score = per_domain(found.layers[0], criterion)
    assert score.shape == (2, 8) and bool(score.isfinite().all()) and score.dtype == torch.float64
    assert torch.allclose(score[0].sum(), torch.ones(1, dtype=torch.float64))
    if criterion != "random":
        assert bool((score[:, 2] == 0).all())
    if criterion not in ("random", "ean_ca"):  # profiles hold one mean output for all domains
        assert bool((score[1] == 0).all())


def test_formulas_by_hand():
    """Two documents of one domain; expert 0: 400 tokens of norm 1, expert 1: 4 tokens of norm 10."""
    tokens = torch.tensor([[[400, 4]]])
    found = profile(tokens, torch.tensor([[1.0, 10.0]]), domains=1, top_k=1).layers[0]
    by_hand = {
        "frequency": [400, 4], "gate": [400, 4], "ean": [400, 40], "man": [1, 10], "msan": [1, 100],
        "contribution": [400, 40], "reap": [1, 10], "prompt_norm": [20, 20], "max_norm": [1, 10],
        "esft_token": [400 / 404, 4 / 404], "esft_gate": [400 / 404, 4 / 404],
    }  # fmt: skip
    for name, values in by_hand.items():
        raw = CRITERIA[name].score(found)
        assert torch.allclose(raw, torch.tensor([values], dtype=torch.float64)), name


def test_domains_weigh_the_same_however_long_they_are():
    tokens = torch.ones(1, 2, 4)
    tokens[0, 0] = torch.tensor([1000, 3000, 1000, 1000])  # a long domain likes expert 1
    tokens[0, 1] = torch.tensor([1, 1, 3, 1])  # a short one expert 2, as much
    values = scores(profile(tokens), "frequency")[NAME]
    assert torch.allclose(values[1], values[2])
    assert torch.allclose(values.sum(), torch.ones((), dtype=torch.float64))


def test_random_is_seeded_and_differs_between_layers():
    found = random_profile(layers=2)
    first, again, other = (scores(found, "random", seed=seed) for seed in (1, 1, 7))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first[NAME], other[NAME])
    assert not torch.equal(*first.values())


def test_what_cannot_be_scored():
    found = random_profile()
    with pytest.raises(UserError, match=r"unknown score 'usage'\nchoose from contribution"):
        scores(found, "usage")
    with pytest.raises(UserError, match=r"no domain 'poems'\nit has code, math"):
        scores(found, "reap", {"poems": 1})
    found.layers[1].sums["easyep"][:] = float("nan")
    with pytest.raises(UserError, match="easyep is not known for model.layers.1.mlp"):
        scores(found, "easyep")
    found.layers[1].sums["contribution"][0, 0] = float("inf")
    with pytest.raises(UserError, match="profile again"):
        scores(found, "contribution")


def test_domain_words():
    assert parse_domains("max") == "max"
    assert parse_domains("code=2, math=1") == {"code": 2.0, "math": 1.0}
    for wrong in ("median", "code=a", "code=1=2", "code"):
        with pytest.raises(UserError, match="mean, max, or weights"):
            domain_weights(["code", "math"], parse_domains(wrong))
    for weights in ({"code": -1.0}, {"code": 0.0}, {"code": float("nan")}):
        with pytest.raises(UserError, match="0 or more"):
            domain_weights(["code"], weights)


def test_every_score_says_its_unit_and_source():
    for name, criterion in CRITERIA.items():
        assert criterion.unit and (criterion.score.__doc__ or "").strip(), name
