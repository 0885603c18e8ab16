"""Routers of made-up layers: Gaussian classes around a strong mean, as FFN inputs are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from moesmith.build import estimators, routers
from moesmith.build.capture import LayerInputs, Text
from moesmith.build.routers import METHODS, RouterFit, Routers
from moesmith.errors import UserError

E, H, V = 3, 32, 40
CLASSED = [method for method in METHODS if method not in ("loss", "random")]


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


EMBEDDING = torch.randn(V, H, generator=generator(0))


def texts_of(documents: int, tokens: int, fit: bool = True, seed: int = 1) -> list[Text]:
    """`documents` for each expert; an expert's ids are from its own part of the vocabulary."""
    found = []
    for n in range(documents * E):
        low = (n % E) * 10
        ids = torch.randint(low, low + 20, (tokens,), generator=generator(1000 * seed + n)).tolist()
        found.append(Text(ids=ids, label=n % E, fit=fit, id=f"{seed}/{n}", domain="abc"[n % E]))
    return found


def layer_of(texts: Sequence[Text], layer: int = 0, labels: Sequence[int] | None = None) -> LayerInputs:
    """Inputs of the classes; `labels` instead of those of the texts."""
    lengths = torch.tensor([len(text.ids) for text in texts])
    document = torch.repeat_interleave(torch.arange(len(texts)), lengths)
    position = torch.cat([torch.arange(int(n)) for n in lengths])
    label = torch.tensor([t.label for t in texts] if labels is None else list(labels))[document]
    mark = torch.randn(E, H, generator=generator(50 + layer))
    noise = torch.randn(len(document), H, generator=generator(60 + layer))
    x = 4 * torch.randn(H, generator=generator(70)) + mark[label] + noise
    x[position == 0] = 1000 * torch.randn(H, generator=generator(80))  # a sink
    return LayerInputs(layer, x, document, position, nn.Identity())


def fitted(
    texts: Sequence[Text],
    methods: Sequence[str] = CLASSED,
    layers: int = 1,
    negatives: Sequence[Text] | None = None,
    losses: Tensor | None = None,
    seed: int = 0,
) -> Routers:
    fit = RouterFit(texts, E, methods, EMBEDDING, losses, negatives, seed)
    for layer in range(layers):
        fit.visit(layer_of([*texts, *(negatives or [])], layer))
    return fit.routers()


def planted_losses(texts: Sequence[Text], labels: Sequence[int] | None = None) -> Tensor:
    inputs = layer_of(texts, labels=labels)
    label = torch.tensor([t.label for t in texts] if labels is None else list(labels))[inputs.document]
    losses = 2 + 0.5 * torch.randn(len(label), E, generator=generator(90))
    losses[torch.arange(len(label)), label] -= 1
    return losses


@pytest.fixture(scope="module")
def corpus() -> list[Text]:
    return [*texts_of(8, 20), *texts_of(4, 20, fit=False, seed=2)]


def test_every_method_of_every_layer_is_measured_on_held_out_text(corpus):
    found = fitted(corpus, METHODS, layers=2, losses=planted_losses(corpus))
    assert set(found.weights) == set(found.temperature) == set(METHODS)
    assert found.facts["measured_on"] == routers.HELD_OUT
    assert found.facts["fitted_tokens"] == [8 * 19] * E and found.facts["unseen_tokens"] == [4 * 19] * E
    assert found.facts["first_tokens_left_out"] == len(corpus)
    for method in METHODS:
        assert [rows.shape for rows in found.weights[method]] == [(E, H)] * 2
        assert all(rows.dtype == torch.float32 and rows.isfinite().all() for rows in found.weights[method])
        for layer in range(2):
            figures = found.facts["layers"][layer][method]
            assert figures["temperature"] == found.temperature[method][layer]
            if method not in ("random", "loss"):
                assert figures["nll"] <= figures["nll_before"] + 0.02
    one = found.facts["layers"][0]
    assert one["probe"]["accuracy"] > 0.9 > one["random"]["accuracy"]
    assert one["loss"]["accuracy"] > 0.9 and one["loss"]["mixture_loss"] < one["loss"]["uniform_mixture_loss"]
    assert not found.weights["probe"][0].equal(found.weights["probe"][1])


def test_figures_are_those_of_the_rows_on_the_held_out_tokens(corpus):
    """The weights with their temperature give the accuracy and the nats that are reported."""
    found = fitted(corpus)
    inputs = layer_of(corpus)
    unseen = (inputs.position > 0) & ~torch.tensor([text.fit for text in corpus])[inputs.document]
    label = torch.tensor([text.label for text in corpus])[inputs.document][unseen]
    for method in CLASSED:
        logits = (inputs.inputs[unseen] @ found.weights[method][0].T).double()
        figures = found.facts["layers"][0][method]
        assert figures["accuracy"] == pytest.approx(float((logits.argmax(1) == label).double().mean()))
        assert figures["nll"] == pytest.approx(float(nn.functional.cross_entropy(logits, label)), rel=1e-4)


def test_an_expert_with_most_of_the_text_does_not_decide(corpus):
    """Accuracy is the mean of the experts': rows that give all to one are at chance."""
    texts = [*corpus, *(text for text in texts_of(12, 20, fit=False, seed=3) if text.label == 0)]
    found = fitted(texts, ["embed", "random"])
    inputs, unseen = layer_of(texts), ~torch.tensor([text.fit for text in texts])
    mask = unseen[inputs.document] & (inputs.position > 0)
    label = torch.tensor([text.label for text in texts])[inputs.document][mask]
    assert len(label) == (3 * 4 + 12) * 19
    for method in ("embed", "random"):
        right = (inputs.inputs[mask] @ found.weights[method][0].T).argmax(1) == label
        recalls = [float(right[label == e].double().mean()) for e in range(E)]
        accuracy = found.facts["layers"][0][method]["accuracy"]
        assert accuracy == pytest.approx(sum(recalls) / E) != float(right.double().mean())


def test_rows_are_centred_and_embed_is_one_matrix(corpus):
    found = fitted(corpus, layers=2)
    for method in CLASSED:
        assert found.weights[method][0].mean(dim=0).abs().max() < 1e-5 * found.weights[method][0].abs().max()
    first, second = (nn.functional.normalize(rows.flatten(), dim=0) for rows in found.weights["embed"])
    torch.testing.assert_close(first, second)


def test_held_out_text_changes_no_direction(corpus):
    """What is judged on is not fitted on: other held-out texts, same rows but for one scalar."""
    mislabelled = [text if text.fit else replace(text, label=(text.label + 1) % E) for text in corpus]
    one, two = fitted(corpus), Routers({}, {}, {})
    fit = RouterFit(mislabelled, E, CLASSED, EMBEDDING)
    fit.visit(layer_of(corpus))  # the same inputs
    two = fit.routers()
    for method in CLASSED:
        a, b = (nn.functional.normalize(r.weights[method][0].flatten(), dim=0) for r in (one, two))
        torch.testing.assert_close(a, b)
        if method != "embed":  # which says nothing about these inputs
            assert two.facts["layers"][0][method]["accuracy"] < one.facts["layers"][0][method]["accuracy"]


def test_four_prompts_are_judged_by_rows_that_have_not_seen_them():
    """Labels of chance: rows fitted on a prompt know it, rows fitted on the others do not."""
    prompts = texts_of(4, 7)
    chance = [1, 2, 0, 0, 1, 2, 2, 1, 0, 0, 2, 1]
    fit = RouterFit(prompts, E, CLASSED, EMBEDDING)
    fit.visit(layer_of(prompts, labels=chance))
    found = fit.routers()
    assert found.facts["measured_on"] == routers.LEFT_OUT
    layer = found.facts["layers"][0]
    x, label = layer_of(prompts, labels=chance), torch.tensor([t.label for t in prompts])
    own = ((x.inputs @ found.weights["probe"][0].T).argmax(1) == label[x.document])[x.position > 0]
    assert layer["probe"]["accuracy"] < 0.5 < float(own.double().mean())
    for method in CLASSED:
        rows = found.weights[method][0]
        assert rows.isfinite().all() and layer[method]["spread"] <= estimators.SPREAD[1] * 1.001

    honest = fitted(prompts)
    assert honest.facts["layers"][0]["probe"]["accuracy"] > 0.6


def test_a_single_document_is_not_believed():
    found = fitted(texts_of(1, 6))
    assert found.facts["measured_on"] == routers.FITTED
    for method in CLASSED:
        assert found.facts["layers"][0][method]["spread"] <= routers.UNSURE * 1.001


def test_pieces_of_one_row_are_never_on_both_sides():
    """Two rows an expert, each in four pieces alike, labels of chance: pieces would tell each other apart."""
    texts = texts_of(8, 7)
    rows = [(text.label, n // E % 2) for n, text in enumerate(texts)]
    pieces = [
        replace(text, id=f"{text.domain}/{row}" + (f".{n // E // 2 + 1}" if n // E >= 2 else ""))
        for n, (text, (_, row)) in enumerate(zip(texts, rows, strict=True))
    ]
    inputs = layer_of(texts, labels=[0] * len(texts))
    own = torch.randn(
        2 * E, H, generator=generator(7)
    )  # what a row has of its own says nothing of its expert
    inputs.inputs += 2 * own[torch.tensor([2 * label + row for label, row in rows])[inputs.document]]

    def accuracy(given: Sequence[Text]) -> float:
        fit = RouterFit(given, E, ["probe"], EMBEDDING)
        fit.visit(inputs)
        found = fit.routers().facts
        assert found["measured_on"] == routers.LEFT_OUT
        return found["layers"][0]["probe"]["accuracy"]

    assert accuracy(texts) > 0.8 and accuracy(pieces) < 0.6


def test_held_out_text_of_some_experts_is_not_enough(corpus):
    some = [text for text in corpus if text.fit or text.label == 0]
    assert fitted(some, ["probe"]).facts["measured_on"] == routers.LEFT_OUT


def test_loss_needs_no_label_and_skips_what_is_not_known(corpus):
    labels = [text.label for text in corpus]
    unlabelled = [replace(text, label=-1) for text in corpus]
    losses = planted_losses(unlabelled, labels)
    losses[3::20] = float("nan")
    fit = RouterFit(unlabelled, E, ["loss"], EMBEDDING, losses)
    inputs = layer_of(unlabelled, labels=labels)
    fit.visit(inputs)
    found = fit.routers()
    chosen = (inputs.inputs @ found.weights["loss"][0].T).argmax(dim=1)
    right = (chosen == torch.tensor(labels)[inputs.document])[inputs.position > 0]
    assert float(right.double().mean()) > 0.9
    assert found.facts["layers"][0]["loss"]["accuracy"] is None
    assert found.facts["layers"][0]["loss"]["tokens"] == 12 * 18  # less the first and the NaN of each text


def test_negatives_are_no_text_of_their_expert(corpus):
    """Text of expert 1's kind as negatives of expert 0: rows move, counts do not."""
    negatives = [replace(text, label=0) for text in texts_of(2, 10, seed=3) if text.label == 1]
    plain, told = fitted(corpus), fitted(corpus, negatives=negatives)
    assert told.facts["fitted_tokens"] == plain.facts["fitted_tokens"] and told.facts["negatives"] == 2
    for method in CLASSED:
        assert not told.weights[method][0].equal(plain.weights[method][0])


def test_random_rows_are_as_long_as_the_probes_and_seeded(corpus):
    one, two, other = (fitted(corpus, ["random", "probe"], seed=seed) for seed in (0, 0, 1))
    assert one.weights["random"][0].equal(two.weights["random"][0])
    assert not one.weights["random"][0].equal(other.weights["random"][0])
    assert fitted(corpus, ["random"]).weights["random"][0].isfinite().all()
    lengths = [r.norm(dim=1).mean() for r in (one.weights["random"][0], one.weights["probe"][0])]
    assert 0.5 < lengths[0] / lengths[1] < 2


def test_same_inputs_same_bits(corpus):
    one, two = (fitted(corpus, METHODS, losses=planted_losses(corpus)) for _ in range(2))
    for method in METHODS:
        assert one.weights[method][0].equal(two.weights[method][0])
        assert one.temperature[method] == two.temperature[method]


def test_tokens_above_the_limit_are_taken_at_a_stride(corpus, monkeypatch):
    monkeypatch.setattr(routers, "TOKEN_LIMIT", 200)
    found = fitted(corpus)
    assert sum(found.facts["fitted_tokens"]) == 8 * 19 * E // 3 and min(found.facts["fitted_tokens"]) > 40
    assert found.facts["layers"][0]["probe"]["accuracy"] > 0.8


def test_a_loud_token_is_counted_and_clipped(corpus):
    quiet, loud = layer_of(corpus), layer_of(corpus)
    loud.inputs[33] *= 1000
    found = []
    for inputs in (quiet, loud):
        fit = RouterFit(corpus, E, CLASSED, EMBEDDING)
        fit.visit(inputs)
        found.append(fit.routers())
    assert [r.facts["clipped_tokens"] for r in found] == [[0], [1]]
    for method in ("hidden", "centered", "lda"):
        one, two = (nn.functional.normalize(r.weights[method][0].flatten(), dim=0) for r in found)
        assert one @ two > 0.85


def test_nan_aborts_naming_the_layer(corpus):
    for value in (float("nan"), float("inf")):
        inputs = layer_of(corpus, layer=7)
        inputs.inputs[33, 2] = value
        with pytest.raises(UserError, match=r"FFN of layer 7 reads NaN or infinity at 1 of 720 tokens"):
            RouterFit(corpus, E, CLASSED, EMBEDDING).visit(inputs)


def test_what_cannot_be_fitted_is_said(corpus):
    with pytest.raises(UserError, match="unknown routing method 'proob'"):
        RouterFit(corpus, E, ["proob"], EMBEDDING)
    with pytest.raises(UserError, match="losses of every source"):
        RouterFit(corpus, E, ["loss"], EMBEDDING)
    with pytest.raises(UserError, match="no text to fit the router of expert 1"):
        RouterFit([text for text in corpus if text.label != 1], E, ["probe"], EMBEDDING)
