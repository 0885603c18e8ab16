"""Tokens of Gaussian classes, as FFN inputs are: a strong common mean, noise that is not round."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesmith.build import estimators

E, H = 4, 24


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class World:
    """Classes with known means and one known covariance; noise of 0.3 to 5 along its axes, or of 1."""

    def __init__(self, round: bool = False) -> None:
        self.common = 6 * torch.randn(H, generator=generator(0))
        self.offset = torch.randn(E, H, generator=generator(1))
        shape = torch.linalg.qr(torch.randn(H, H, generator=generator(2))).Q
        self.scale = shape * (1 if round else torch.logspace(-0.5, 0.7, H))

    @property
    def means(self) -> Tensor:
        return self.common + self.offset

    @property
    def covariance(self) -> Tensor:
        return self.scale @ self.scale.T

    def draw(self, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
        label = torch.arange(tokens) % E
        noise = torch.randn(tokens, H, generator=generator(seed)) @ self.scale.T
        return self.means[label] + noise, label


@pytest.fixture(scope="module")
def world() -> World:
    return World()


def accuracy(rows: Tensor, x: Tensor, label: Tensor) -> float:
    return float(((x @ rows.T).argmax(dim=1) == label).float().mean())


FITS = {
    "hidden": estimators.hidden,
    "centered": estimators.centered,
    "lda": estimators.lda,
    "probe": estimators.probe,
}


def test_whitening_beats_directions_of_means(world):
    """And comes up to Bayes' rule with its bias. Unit norm does for `hidden` what centring does."""
    x, label = world.draw(4000, 3)
    unseen = world.draw(4000, 4)
    seen = {name: accuracy(fit(x, label, E), *unseen) for name, fit in FITS.items()}
    whitened = world.means.double() @ world.covariance.double().inverse()
    constant = 0.5 * (whitened * world.means.double()).sum(dim=1)
    bayes = (unseen[0].double() @ whitened.T - constant).argmax(dim=1) == unseen[1]
    assert max(seen["hidden"], seen["centered"]) < min(seen["lda"], seen["probe"]) - 0.05
    assert float(bayes.double().mean()) - 0.02 < min(seen["lda"], seen["probe"])


def test_lda_is_the_bayes_direction(world):
    """Differences of rows, off the direction that carries the constant, are S^-1 (mu_e - mu_f)."""
    x, label = world.draw(200_000, 5)
    rows = estimators.lda(x, label, E).double()
    inverse = world.covariance.double().inverse()
    carrier = torch.nn.functional.normalize(inverse @ world.means.mean(dim=0).double(), dim=0)

    def differences(rows: Tensor) -> Tensor:
        rows = rows - rows.mean(dim=0)
        return rows - (rows @ carrier)[:, None] * carrier

    want = differences(world.offset.double() @ inverse)
    cosine = torch.nn.functional.cosine_similarity(differences(rows), want, dim=1)
    assert cosine.min() > 0.99


def test_lda_carries_its_constant_without_a_bias():
    """Classes along one line: without the constant no row of the middle class can win."""
    generator_ = generator(6)
    label = torch.arange(3000) % 3
    x = 0.3 * torch.randn(3000, 8, generator=generator_)
    x[:, 0] += label - 1.0
    x[:, 1] += 10
    assert accuracy(estimators.lda(x, label, 3), x, label) > 0.9
    assert accuracy(estimators.centered(x, label, 3), x, label) < 0.75


@pytest.mark.parametrize("name", FITS)
def test_classes_permuted_are_rows_permuted(world, name):
    x, label = world.draw(400, 7)
    order = torch.tensor([2, 0, 3, 1])
    rows, renamed = FITS[name](x, label, E), FITS[name](x, order[label], E)
    torch.testing.assert_close(renamed[order], rows, rtol=1e-3, atol=1e-3 * float(rows.abs().max()))


@pytest.mark.parametrize("name", FITS)
def test_same_tokens_same_bits(world, name):
    x, label = world.draw(400, 8)
    assert FITS[name](x, label, E).equal(FITS[name](x, label, E))


@pytest.mark.parametrize("name", FITS)
def test_a_few_prompts_give_sane_rows(name):
    """Four prompts of five tokens per expert in 512 dimensions."""
    label = torch.arange(80) % E
    x = torch.randn(80, 512, generator=generator(9)) + 3
    mark = torch.randn(E, 512, generator=generator(10))
    rows = FITS[name](x + mark[label], label, E)
    assert rows.shape == (E, 512) and rows.dtype == torch.float32 and rows.isfinite().all()
    unseen = torch.randn(400, 512, generator=generator(11)) + 3 + mark[torch.arange(400) % E]
    assert accuracy(rows, unseen, torch.arange(400) % E) > 0.6


@pytest.mark.parametrize("name", FITS)
def test_text_an_expert_is_not_for_lowers_its_logit(world, name):
    x, label = world.draw(400, 12)
    direction = torch.zeros(H)
    direction[5] = 4
    negatives = world.common + direction + torch.randn(50, H, generator=generator(13))
    named = torch.full((50,), 2)
    plain, told = (FITS[name](x, label, E, given) for given in (None, (negatives, named)))

    def probability(rows: Tensor) -> Tensor:
        return (negatives @ (rows / rows.norm(dim=1).mean()).T).softmax(dim=1)[:, 2].mean()

    assert probability(told) < probability(plain)


@pytest.mark.parametrize("name", FITS)
def test_text_an_expert_is_not_for_takes_no_text_of_its_own(world, name):
    """Only one expert has negatives; what they share with all tokens must not count against it."""
    (x, label), (unseen, own) = world.draw(400, 12), world.draw(4000, 99)
    direction = torch.zeros(H)
    direction[5] = 4
    negatives = world.common + direction + torch.randn(50, H, generator=generator(13))
    told = FITS[name](x, label, E, (negatives, torch.full((50,), 2)))
    assert accuracy(told, unseen[own == 2], own[own == 2]) > 0.8


def test_covariance_is_shrunk_by_what_the_sample_adds(world):
    """Ledoit-Wolf: nothing at 50,000 tokens; at 20, fewer than dimensions, closer to the truth than they."""
    many, few = (estimators.within_covariance(*world.draw(n, 14), E) for n in (50_000, 20))
    truth = world.covariance.double()
    assert (many - truth).norm() < 0.05 * truth.norm()
    x, label = world.draw(20, 14)
    centred = (x - torch.stack([x[label == e].mean(dim=0) for e in range(E)])[label]).double()
    assert (few - truth).norm() < (centred.T @ centred / 20 - truth).norm()
    assert torch.linalg.eigvalsh(few).min() > 0.01


def test_one_token_in_a_hundred_does_not_decide(world):
    x, label = world.draw(2000, 15)
    unseen = world.draw(2000, 16)
    loud = x.clone()
    loud[::101] += 3e4 * torch.randn(H, generator=generator(17))
    for fit in (estimators.centered, estimators.lda):
        alone, clipped = (accuracy(fit(y, label, E), *unseen) for y in (loud, estimators.clip_rows(loud)))
        assert clipped > alone
    quiet = estimators.clip_rows(x)
    torch.testing.assert_close(quiet, x)


def test_embed_is_the_mean_of_tokens_less_half_the_negatives():
    embedding = torch.randn(50, 8, generator=generator(18)).bfloat16()
    ids = [torch.tensor([3, 3, 4]), torch.tensor([7]), torch.tensor([1, 2])]
    rows = estimators.embed(embedding, ids, [None, torch.tensor([9, 10]), None])
    mean = torch.stack([embedding[i].double().mean(dim=0) for i in ids])
    mean[1] -= 0.5 * embedding[[9, 10]].double().mean(dim=0)
    want = torch.nn.functional.normalize(mean - mean.mean(dim=0), dim=1).float()
    torch.testing.assert_close(rows, want)


def test_probe_chooses_its_penalty_on_documents_set_aside():
    """It beats the fixed one on unseen documents, be these all alike or each with a subject of its own."""
    document = torch.arange(80).repeat_interleave(5)
    label = document % E
    mark = torch.randn(E, 64, generator=generator(30))
    subject = torch.randn(80, 64, generator=generator(31))[document]
    noise = torch.randn(400, 64, generator=generator(32))
    fit = document < 40

    def nats(x: Tensor, given: Tensor | None) -> float:
        rows = estimators.probe(x[fit], label[fit], E, document=given)
        return float(torch.nn.functional.cross_entropy(x[~fit] @ rows.T, label[~fit]))

    for x in (2 * mark[label] + noise, 0.5 * mark[label] + 4 * subject + noise):
        assert nats(x, document[fit]) < nats(x, None)


def test_probe_lets_no_class_outvote_another(world):
    """A class of a tenth of the tokens is found as often as the others are."""
    x, label = world.draw(4000, 33)
    keep = (label != 1) | (torch.arange(4000) % 40 == 1)
    unseen, truth = world.draw(4000, 34)
    chosen = (unseen @ estimators.probe(x[keep], label[keep], E).T).argmax(dim=1)
    recall = [float((chosen[truth == e] == e).float().mean()) for e in range(E)]
    assert recall[1] > min(recall[0], *recall[2:]) - 0.02


def test_documents_are_dealt_whole_and_evenly():
    document = torch.arange(9).repeat_interleave(3)
    group = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, -1]).repeat_interleave(3)
    fold = estimators.fold_of(document, group, 4)
    assert fold.view(9, 3).eq(fold.view(9, 3)[:, :1]).all()
    assert fold.view(9, 3)[:, 0].tolist() == [0, 1, 2, 3, 0, 0, 1, 2, 0]


def test_planted_losses_are_found():
    """Each source is half a nat better on its own class, under a nat of noise on every token; some NaN."""
    world = World(round=True)
    document = torch.arange(6000) // 50
    label = document % E
    x = world.draw(6000, 20)[0] - world.means[torch.arange(6000) % E] + world.means[label]
    losses = 3 + torch.randn(6000, E, generator=generator(21))
    losses[torch.arange(6000), label] -= 0.5
    best = losses.argmin(dim=1)
    losses[::50] = float("nan")
    unseen = world.draw(4000, 22)
    planted, known, single = (
        accuracy(rows, *unseen)
        for rows in (
            estimators.loss(x, losses, document),
            estimators.probe(x, label, E),
            estimators.probe(x, best, E),
        )
    )
    assert known - 0.06 < planted and single + 0.02 < planted


@pytest.mark.parametrize("scale", [0.05, 1.0, 30.0])
def test_temperature_recovers_a_known_scale(scale):
    truth = torch.randn(20_000, E, generator=generator(23))
    label = torch.multinomial(truth.softmax(dim=1), 1, generator=generator(24))[:, 0]
    assert estimators.fit_temperature(truth / scale, label) == pytest.approx(scale, rel=0.06)


def test_temperature_is_bounded():
    label = torch.arange(40) % E
    told_apart = torch.nn.functional.one_hot(label, E).float()
    temperature = estimators.fit_temperature(told_apart, label)
    confidence = (temperature * told_apart).softmax(dim=1).max()
    assert 0.9 < confidence < 1 - 0.5 / 40
    wrong = estimators.fit_temperature(-told_apart, label)
    assert wrong * estimators.spread(told_apart) == pytest.approx(estimators.SPREAD[0], rel=1e-3)
    assert estimators.fit_temperature(torch.zeros(40, E), label) == 1.0


def test_mixture_temperature_is_an_interior_optimum():
    """Where one source predicts the token and the other cannot, the best gate is the posterior itself."""
    logits = torch.randn(40_000, 2, generator=generator(25))
    source = torch.multinomial((0.7 * logits).softmax(dim=1), 1, generator=generator(26))[:, 0]
    losses = torch.where(torch.nn.functional.one_hot(source, 2).bool(), 0.0, 30.0)
    losses[5] = float("nan")
    assert estimators.fit_mixture_temperature(logits, losses) == pytest.approx(0.7, rel=0.06)
    assert estimators.fit_mixture_temperature(10 * logits, losses) == pytest.approx(0.07, rel=0.06)


def test_random_rows_are_unit_and_seeded():
    rows = estimators.random_rows(E, H, 3)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(E))
    assert rows.equal(estimators.random_rows(E, H, 3)) and not rows.equal(estimators.random_rows(E, H, 4))
