"""Routing and losses measured on models whose routing is known."""

import math

import numpy as np
import pytest
import torch

from moesmith.errors import UserError
from moesmith.eval import routing as subject
from moesmith.eval.routed import Forced, by_rows, routed
from moesmith.eval.routing import Labelled, losses, measure_routing
from planted_routers import FAMILIES, E, plain, planted, rows, texts_of


@pytest.mark.parametrize("family", FAMILIES)
def test_a_planted_router_is_always_right(family):
    model, texts = planted(family), texts_of()
    facts = measure_routing(model, texts, E)
    assert facts["accuracy"] == facts["majority"] == facts["in_top_k"] == 1.0
    assert facts["share"] == pytest.approx(1.0) and facts["accuracy_ci"] is None  # single documents
    assert facts["tokens"] == 86 and facts["documents"] == 7 and facts["chance"] == 2 / E
    confusion = np.full((E, E), np.nan)
    for label in (0, 1, 3, 5, 7):
        confusion[label] = np.eye(E)[label]
    load = np.array([22, 30, 0, 22, 0, 3, 0, 9]) / 86
    np.testing.assert_array_equal(np.array(facts["confusion"], float), confusion)
    assert [layer["layer"] for layer in facts["layers"]] == [0, 1, 2]
    for layer in facts["layers"]:
        assert layer["accuracy"] == 1.0
        np.testing.assert_array_equal(np.array(layer["confusion"], float), confusion)
        np.testing.assert_allclose(layer["load"], load, atol=1e-9)
        np.testing.assert_allclose(layer["load_top1"], load)
        some = load[load > 0]
        assert layer["entropy"] == pytest.approx(-(some * np.log(some)).sum() / math.log(E))

    for text in texts:
        text.label = (text.label + 1) % E
    wrong = measure_routing(model, texts, E)
    assert wrong["accuracy"] == wrong["majority"] == 0 and wrong["share"] < 1e-6


def test_half_right_and_by_position():
    """One text whose first 4 tokens are another expert's; one without a label, which only has a load."""
    ids = [9, 9, 9, 9, *[10] * 14]
    texts = [Labelled(ids, "a", "a/0", 2), Labelled([11] * 6, "b", "b/0", -1)]
    facts = measure_routing(planted("mixtral"), texts, E)
    assert facts["accuracy"] == pytest.approx(14 / 18) and facts["majority"] == 1.0
    assert facts["tokens"] == 18 and facts["documents"] == 1 and facts["accuracy_ci"] is None
    assert facts["positions"] == [
        {"from": 0, "to": 0, "accuracy": 0.0, "tokens": 1},
        {"from": 1, "to": 3, "accuracy": 0.0, "tokens": 3},
        {"from": 4, "to": 15, "accuracy": 1.0, "tokens": 12},
        {"from": 16, "to": 17, "accuracy": 1.0, "tokens": 2},
    ]
    assert facts["confusion"][2] == [0, 4 / 18, 14 / 18, 0, 0, 0, 0, 0]
    np.testing.assert_allclose(
        facts["layers"][1]["load"], np.array([0, 4, 14, 6, 0, 0, 0, 0]) / 24, atol=1e-9
    )
    unlabelled = measure_routing(planted("mixtral"), texts[1:], E)
    assert unlabelled["accuracy"] is None and unlabelled["layers"][0]["load"][3] == 1.0
    # pieces of one row are one document: 9 of its 15 tokens are expert 1's, 6 expert 2's
    pieces = [Labelled([9] * 9, "a", "a/3", 2), Labelled([10] * 6, "a", "a/3.2", 2)]
    found = measure_routing(planted("mixtral"), pieces, E)
    assert found["majority"] == 0.0 and found["documents"] == 1


def test_an_expert_with_most_of_the_text_does_not_decide():
    """A router that gives everything to one expert is at chance, though 40 of 44 tokens are that expert's."""
    texts = [Labelled([8] * 20, "a", f"a/{i}", 0) for i in range(2)]
    texts += [Labelled([8] * 2, "b", f"b/{i}", 1) for i in range(2)]
    facts = measure_routing(planted("mixtral"), texts, E)
    assert facts["accuracy"] == 0.5 and facts["share"] == pytest.approx(0.5) and facts["majority"] == 0.5
    assert facts["accuracy_ci"] == (0.5, 0.5) and facts["positions"][0]["accuracy"] == 0.5
    assert facts["positions"][-1]["accuracy"] == 1.0  # no text of the other is as long
    texts[0].ids = [
        9
    ] * 20  # of two texts of label 0 one is right: 0, 1/2 or all, widened by sqrt(2), cut to 0..1
    low, high = measure_routing(planted("mixtral"), texts, E)["accuracy_ci"]
    assert low == 0 and high == pytest.approx((0.5 + 0.5 * math.sqrt(2)) / 2)


def test_virtual_groups_count_as_one():
    model = planted("mixtral")  # experts 2g and 2g + 1 are group g
    texts = [Labelled([2 * g + 8 + i % 2 for i in range(9)], "a", f"a/{g}", g) for g in range(4)]
    facts = measure_routing(model, texts, 4, group=2)
    assert facts["accuracy"] == 1.0 and facts["share"] == pytest.approx(1.0)
    assert facts["chance"] == facts["chance_top1"] == 1 / 4
    assert facts["layers"][0]["load"] == pytest.approx([0.25] * 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_observing_changes_no_bit_and_padding_never_counts(family, monkeypatch):
    model, texts = plain(family), texts_of()
    outputs = []
    plain_logits = subject.logits

    def recorded(*args):
        outputs.append(plain_logits(*args))
        return outputs[-1]

    monkeypatch.setattr(subject, "logits", recorded)
    together, whole = losses(model, texts), measure_routing(model, texts, E)
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True)) and len(outputs[0]) == 7
    assert 0 < whole["accuracy"] < 1

    for choose in (None, Forced(), by_rows([row.flip(1) for row in rows(model)], 3)):
        together = losses(model, texts, choose=choose)
        alone = [losses(model, [text], choose=choose)[0] for text in texts]
        assert [tokens for _, tokens in together] == [len(text.ids) - 1 for text in texts]
        np.testing.assert_allclose(together, alone, rtol=1e-5)
    one = [measure_routing(model, [text], E) for text in texts]
    tokens = [facts["tokens"] for facts in one]
    for key in ("accuracy", "share", "in_top_k"):
        of = {text.label: [i for i, other in enumerate(texts) if other.label == text.label] for text in texts}
        means = [
            np.average([one[i][key] for i in its], weights=[tokens[i] for i in its]) for its in of.values()
        ]
        assert whole[key] == pytest.approx(np.mean(means))
    for number, layer in enumerate(whole["layers"]):
        load = np.average([facts["layers"][number]["load"] for facts in one], axis=0, weights=tokens)
        np.testing.assert_allclose(layer["load"], load, rtol=1e-5)


def test_losses_are_cross_entropy_and_a_routing_can_be_measured():
    model, texts = plain("qwen3_moe"), texts_of()
    for text, (nats, tokens) in zip(texts, losses(model, texts), strict=True):
        ids = torch.tensor([text.ids])
        with torch.no_grad():
            mean = float(model(input_ids=ids, labels=ids).loss)
        assert nats / tokens == pytest.approx(mean, rel=1e-5)
    done = []
    losses(model, texts, lambda *progress: done.append(progress), by_rows(rows(model), 2))
    assert done[-1] == (7, 7)
    flipped = [row.flip(0) for row in rows(model)]
    with routed(model, by_rows(flipped, 2)):
        found = measure_routing(model, texts, E)
    for text in texts:
        text.label = E - 1 - text.label
    with routed(model, by_rows(rows(model), 2)):
        assert measure_routing(model, texts, E)["accuracy"] != found["accuracy"]


def test_what_does_not_fit_is_said():
    model, texts = plain("mixtral"), texts_of()
    with pytest.raises(UserError, match="has 8 experts, wanted 4"):
        measure_routing(model, texts, 4)
    with pytest.raises(UserError, match="label 9"):
        measure_routing(model, [Labelled([3, 4], "a", "a/0", 9)], E)
    with pytest.raises(UserError, match="a/7.*no label"):
        losses(model, [Labelled([3, 4], "a", "a/7", -1)], choose=Forced())
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(UserError, match=r"loss of nan on text d\d"):
        losses(model, texts)
