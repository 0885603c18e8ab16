"""Another routing than the router's: rows, all experts, one expert; and that nothing of it stays."""

import pytest
import torch

import tiny
from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.eval.routed import Forced, by_rows, mixed, routed, set_labels, uniform
from moesmith.models.layers import moe_layers, submodule
from planted_routers import FAMILIES, E, plain, planted, routers, rows


def run(model, choose=None):
    inputs = tiny.inputs(model, batch=2, length=12)
    with torch.no_grad():
        if choose is None:
            return model(**inputs).logits
        with routed(model, choose):
            return model(**inputs).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", [*FAMILIES, "flex_olmo", "gemma2_moe", "gemma3_moe_text"])
def test_a_models_own_rows_give_its_own_bits(family, dtype):
    model = plain(family, dtype)
    before = run(model)
    assert torch.equal(run(model, by_rows(rows(model), top_k=2)), before)
    other = [row.flip(0) for row in rows(model)]
    changed = run(model, by_rows(other, top_k=2))
    assert not torch.equal(changed, before)
    for router, row in zip(routers(model), other, strict=True):
        router.weight.data = row
    assert torch.equal(run(model), changed)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_any_experts_function(implementation):
    model = plain("qwen3_moe")
    model.set_experts_implementation(implementation)
    before = run(model)
    assert torch.equal(run(model, by_rows(rows(model), top_k=2)), before)
    everything = run(model, uniform(E))
    model.set_experts_implementation("grouped_mm")
    torch.testing.assert_close(run(model, uniform(E)), everything, atol=1e-4, rtol=1e-4)


def test_packed_experts(checkpoint):
    model = tiny.model_class("mixtral").from_pretrained(
        checkpoint("mixtral"), quantization_config=ExpertsConfig("nf4"), dtype=torch.float32
    )
    before = run(model)
    assert torch.equal(run(model, by_rows(rows(model), top_k=2)), before)
    assert run(model, uniform(E)).isfinite().all() and torch.equal(run(model), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_forced_expert_is_a_one_hot_router(family):
    model = planted(family)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, :E] = 0
        model.get_input_embeddings().weight[:, 0] = 100.0  # what every token has in common
        for router in routers(model):
            router.weight.zero_()
            router.weight[5, 0] = 10.0
    torch.testing.assert_close(run(model, Forced(5)), run(model), atol=1e-5, rtol=1e-5)
    assert (run(model, Forced(4)) - run(model)).abs().max() > 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_uniform_is_the_mean_of_the_experts(family):
    model = plain(family)
    experts = submodule(model, moe_layers(model)[0].experts)

    def output(choose):
        seen = []
        handle = experts.register_forward_hook(lambda _m, _a, out: seen.append(out))
        run(model, choose)
        handle.remove()
        return seen[0]

    mean = torch.stack([output(Forced(e)) for e in range(E)]).mean(0)
    torch.testing.assert_close(output(uniform(E)), mean, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(output(uniform(E, scale=4.0)), 4 * mean, atol=1e-5, rtol=1e-4)
    group = torch.stack([output(Forced(e)) for e in (4, 5)]).mean(0)
    torch.testing.assert_close(output(Forced(2, group=2)), group, atol=1e-5, rtol=1e-4)


def test_an_oracle_takes_the_label_of_each_text_and_mixed_the_choice_of_each_layer():
    model = plain("qwen3_moe")
    oracle = Forced()
    set_labels(oracle, torch.tensor([2, 6]))
    both = run(model, oracle)
    torch.testing.assert_close(both[0], run(model, Forced(2))[0])
    torch.testing.assert_close(both[1], run(model, Forced(6))[1])
    own = by_rows(rows(model), top_k=2)
    some = mixed([(range(0, 1), own)], otherwise=oracle)
    set_labels(some, torch.tensor([1, 1]))
    assert torch.equal(
        run(model, some), run(model, mixed([(range(1, 9), Forced(1)), (range(0, 9), own)], Forced(7)))
    )
    assert not torch.equal(run(model, some), run(model))


def test_nothing_stays_behind():
    model = plain("mixtral")
    before = run(model)
    with pytest.raises(UserError, match=r"expert 8 was chosen, it has 8"):
        run(model, Forced(E))
    assert torch.equal(run(model), before)
    with pytest.raises(UserError, match="no MoE layers"), routed(torch.nn.Linear(2, 2), Forced(0)):
        pass
