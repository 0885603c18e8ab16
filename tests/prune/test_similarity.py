"""Similarity: what matching neurons reveals, and what it does not invent."""

from __future__ import annotations

import pytest
import torch

import tiny
from moesmith.experts.storage import named_experts, weight_names
from moesmith.prune import similarity as sim
from moesmith.prune.merge import weight_cosines
from moesmith.prune.neurons import expert_weights, num_neurons, permuted


def disguise(model):
    """Every expert computes what expert 0 does, each with its neurons in another order."""
    for _, module in named_experts(model):
        first = expert_weights(module, 0)
        for expert in range(1, module.num_experts):
            order = torch.randperm(num_neurons(module), generator=torch.Generator().manual_seed(expert))
            for name, tensor in permuted(module, first, order).items():
                getattr(module, name).data[expert] = tensor


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_equal_experts_in_disguise_look_unrelated_until_matched(family):
    model = tiny.build(family)
    disguise(model)
    rows = sim.similarity(model)
    assert len(rows) == len(list(named_experts(model)))
    for row in rows:
        assert abs(row.raw) < 0.1 and row.aligned == pytest.approx(1, abs=1e-4)
        assert abs(row.raw_sampled) < 0.1 and row.pairs == 28 and row.output is None


def test_matching_random_experts_finds_little():
    for row in sim.similarity(tiny.build("olmoe")):
        assert abs(row.raw) < 0.05
        assert row.raw_sampled < row.aligned < 0.35


def test_cosines_are_those_of_the_flat_weights(checkpoint):
    module = next(named_experts(tiny.build("gpt_oss")))[1]
    flat = torch.cat([getattr(module, name).detach().flatten(1) for name in weight_names(module)], dim=1)
    wanted = torch.nn.functional.normalize(flat, dim=1) @ torch.nn.functional.normalize(flat, dim=1).T
    assert torch.allclose(weight_cosines(module, 8), wanted.double(), atol=1e-5)


def test_packed_weights_are_read_too(checkpoint):
    from transformers import AutoModelForCausalLM

    from moesmith import ExpertsConfig

    packed = AutoModelForCausalLM.from_pretrained(
        checkpoint("olmoe"), quantization_config=ExpertsConfig("int8")
    )
    plain = AutoModelForCausalLM.from_pretrained(checkpoint("olmoe"))
    for a, b in zip(sim.similarity(packed), sim.similarity(plain), strict=True):
        assert a.raw == pytest.approx(b.raw, abs=2e-3) and a.aligned == pytest.approx(b.aligned, abs=2e-2)


def test_pairs_are_seeded_distinct_and_few_where_experts_are_large(monkeypatch):
    assert sim.sample_pairs(4, 100, 0) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    pairs = sim.sample_pairs(64, 32, 7)
    assert pairs == sim.sample_pairs(64, 32, 7) != sim.sample_pairs(64, 32, 8)
    assert len(set(pairs)) == 32 and all(a < b for a, b in pairs)
    monkeypatch.setattr(sim, "MATCHED_NEURONS", 4 * tiny.EXPERT)
    rows = sim.similarity(tiny.build("olmoe"), seed=3)
    assert [row.pairs for row in rows] == [4] * len(rows)
    facts = sim.facts(rows, seed=3)
    assert "4 sampled pairs per layer (seed 3)" in facts["note"] and len(facts["raw"]) == len(rows)


def test_output_cosine_leaves_unused_experts_out():
    outputs = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 0.0], [0.0, 3.0]])
    assert sim.output_cosine(outputs) == pytest.approx(1 / 3)
    assert sim.output_cosine(outputs[2:]) is None
