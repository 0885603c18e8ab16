"""Merging: neurons may change places in every family, and a model is merged only for as long as asked."""

from __future__ import annotations

import pytest
import torch

import tiny
from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.experts.storage import named_experts, stack, weight_names
from moesmith.models.layers import moe_layers, submodule
from moesmith.prune import merge
from moesmith.prune.merge import Groups, group_layer, make_groups, merge_model, merge_stacks, merged
from moesmith.prune.neurons import (
    align,
    as_neurons,
    expert_weights,
    num_neurons,
    order_is_free,
    permuted,
)
from moesmith.prune.stats import PER_DOCUMENT, SUMS, Document, LayerStats, Profile

E = tiny.NUM_EXPERTS


def logits(model, batch=1):
    with torch.no_grad():
        torch.manual_seed(0)  # one family draws
        return model(**tiny.inputs(model, batch=batch, length=24)).logits


def stats_of(layer, width, seed=0) -> LayerStats:
    """Random statistics of the right shapes; tokens count up, so that expert E-1 is the most used."""
    generator = torch.Generator().manual_seed(seed)
    sums = {
        name: torch.rand(1, layer.num_experts, generator=generator, dtype=torch.float64) + 0.1
        for name in SUMS
    }
    sums["tokens"] = torch.arange(1, layer.num_experts + 1, dtype=torch.float64)[None] * 10
    return LayerStats(
        name=layer.experts,
        layer=layer.name,
        num_experts=layer.num_experts,
        top_k=layer.top_k,
        n_group=layer.n_group,
        sums=sums,
        max_norm=sums["norm"],
        max_abs=sums["norm"],
        mean_output=torch.randn(layer.num_experts, width, generator=generator),
        coactivation=torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64),
        per_document={name: sums[name].clone() for name in PER_DOCUMENT},
    )


def profile_of(model, seed=0) -> Profile:
    layers = [stats_of(layer, tiny.HIDDEN, seed + i) for i, layer in enumerate(moe_layers(model))]
    return Profile(layers, ["text"], [Document("0", "text", 100)], {})


def shuffle_neurons(module, expert, seed):
    """Give one expert's neurons another order, in place; returns the order."""
    order = torch.randperm(num_neurons(module), generator=torch.Generator().manual_seed(seed))
    for name, tensor in permuted(module, expert_weights(module, expert), order).items():
        getattr(module, name).data[expert] = tensor.to(getattr(module, name).dtype)
    return order


class Mixing(torch.nn.Module):
    """An activation in which the order of neurons matters."""

    def forward(self, x):
        return x.cumsum(-1)


# ---------------------------------------------------------------- neurons


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_order_of_neurons_does_not_change_what_an_expert_computes(family):
    model = tiny.build(family)
    for _, module in list(named_experts(model))[:1]:
        assert order_is_free(module)
        width = expert_weights(module, 0)[weight_names(module)[0]].shape[0 if module.is_transposed else 1]
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, width, generator=generator)
        index = torch.randint(0, E, (32, 2), generator=generator)
        weights = torch.rand(32, 2, generator=generator)
        with torch.no_grad():
            before = module(x, index, weights)
            old = as_neurons(module, expert_weights(module, 3))
            order = shuffle_neurons(module, 3, seed=1)
            after = module(x, index, weights)
        new = as_neurons(module, expert_weights(module, 3))
        assert torch.equal(new, old[order]) and not torch.equal(new, old)
        assert (after - before).norm() <= 1e-5 * before.norm()


def test_an_activation_that_mixes_neurons_is_noticed():
    module = next(named_experts(tiny.build("olmoe")))[1]
    module.act_fn = Mixing()
    assert not order_is_free(module)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h", "openai_privacy_filter"])
def test_alignment_finds_a_permutation_again(family):
    module = next(named_experts(tiny.build(family)))[1]
    reference = as_neurons(module, expert_weights(module, 2))
    order = shuffle_neurons(module, 2, seed=5)
    found = align(reference, as_neurons(module, expert_weights(module, 2)))
    assert torch.equal(order[found], torch.arange(len(order)))


# ---------------------------------------------------------------- groups


@pytest.mark.parametrize("method", merge.METHODS)
@pytest.mark.parametrize("family", ["olmoe", "deepseek_v3", "gemma4"])
def test_groups_are_what_a_router_can_run(family, method):
    model = tiny.build(family)
    profile = profile_of(model)
    keep = 4
    groups = make_groups(model, profile, method, keep)
    for layer in moe_layers(model):
        found = groups[layer.name]
        assert len(found.centroids) == keep == len(set(found.slot)) and found.centroids == sorted(
            found.centroids
        )
        for slot, centroid in enumerate(found.centroids):
            members = found.members(slot)
            assert centroid in members and sum(found.weight[e] for e in members) == pytest.approx(1)
        size = layer.num_experts // layer.n_group
        for expert, slot in enumerate(found.slot):
            assert found.centroids[slot] // size == expert // size, "a merge across router groups"
        for group in range(layer.n_group):
            assert sum(c // size == group for c in found.centroids) == keep // layer.n_group


def test_deepseek_has_groups_here():
    assert {layer.n_group for layer in moe_layers(tiny.build("deepseek_v3"))} == {2}


def test_the_most_used_stay_and_weigh_by_use():
    model = tiny.build("olmoe")
    for layer, found in make_groups(model, profile_of(model), "frequency", 5).items():
        assert found.centroids == [3, 4, 5, 6, 7], layer
        for slot in range(5):
            members = found.members(slot)
            total = sum(e + 1 for e in members)
            assert [found.weight[e] for e in members] == pytest.approx([(e + 1) / total for e in members])
    for found in make_groups(model, profile_of(model), "average", 5).values():
        for slot in range(5):
            members = found.members(slot)
            assert [found.weight[e] for e in members] == pytest.approx([1 / len(members)] * len(members))


def test_ream_keeps_what_reap_keeps_and_follows_outputs():
    model = tiny.build("olmoe")
    profile = profile_of(model)
    for stats in profile.layers:
        reap = (stats.sums["contribution"] / stats.sums["tokens"])[0]
        best = reap.argsort(descending=True)
        # The least expert writes the same direction as the best one.
        stats.mean_output[best[-1]] = 3 * stats.mean_output[best[0]]
    groups = make_groups(model, profile, "ream", 4)
    for stats in profile.layers:
        found = groups[stats.layer]
        best = (stats.sums["contribution"] / stats.sums["tokens"])[0].argsort(descending=True).tolist()
        assert found.centroids == sorted(best[:4]) and found.align
        assert found.centroids[found.slot[best[-1]]] == best[0]


def test_clusters_join_equal_outputs():
    model = tiny.build("olmoe")
    profile = profile_of(model)
    for stats in profile.layers:
        stats.mean_output[[1, 3, 5]] = stats.mean_output[[0, 2, 4]]
    for found in make_groups(model, profile, "hc", 5).values():
        assert (
            found.slot[0] == found.slot[1]
            and found.slot[2] == found.slot[3]
            and found.slot[4] == found.slot[5]
        )
        assert found.centroids[found.slot[0]] == 1, "the most used one gives the router row"


def test_unused_experts_share_equally():
    model = tiny.build("olmoe")
    layer = moe_layers(model)[0]
    stats = stats_of(layer, tiny.HIDDEN)
    found = group_layer(model, layer, stats, "frequency", 2, torch.zeros(E))
    for slot in range(2):
        members = found.members(slot)
        assert [found.weight[e] for e in members] == pytest.approx([1 / len(members)] * len(members))


def test_what_cannot_be_merged():
    model = tiny.build("deepseek_v3")
    profile = profile_of(model)
    with pytest.raises(UserError, match="unknown merging method"):
        make_groups(model, profile, "soup", 4)
    with pytest.raises(UserError, match="cannot be merged to 5"):
        make_groups(model, profile, "hc", 5)
    with pytest.raises(UserError, match="cannot be merged to 0"):
        make_groups(model, profile, "hc", 0)
    for _, module in named_experts(model):
        module.act_fn = Mixing()
    with pytest.raises(UserError, match="cannot be matched"):
        make_groups(model, profile, "ream", 4)
    make_groups(model, profile, "average", 4)


# ---------------------------------------------------------------- the average


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "nemotron_h"])
def test_the_merged_stack_is_the_weighted_mean(family):
    module = next(named_experts(tiny.build(family)))[1]
    groups = Groups([1, 4], [0, 0, 1, 1, 1, 1, 1, 1], [0.25, 0.75, 0.1, 0.1, 0.5, 0.1, 0.1, 0.1])
    stacks = merge_stacks(module, groups, torch.bfloat16)
    for name, tensor in stacks.items():
        own = getattr(module, name).detach()
        assert tensor.shape == (2, *own.shape[1:]) and tensor.dtype == own.dtype
        assert torch.allclose(tensor[0], 0.25 * own[0] + 0.75 * own[1], atol=1e-6)
        weights = torch.tensor(groups.weight[2:]).view(-1, *[1] * (own.ndim - 1))
        assert torch.allclose(tensor[1], (weights * own[2:]).sum(0), atol=1e-6)
    assert any(name.endswith("_bias") for name in stacks) == (family == "gpt_oss")


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "nemotron_h", "gemma4"])
def test_shuffled_twins_merge_to_themselves_only_when_aligned(family):
    """Experts in pairs of equal function: with summed gates the aligned merge is the same model."""
    model = tiny.build(family)
    slot = [e // 2 for e in range(E)]
    for _, module in named_experts(model):
        for expert in range(1, E, 2):
            for name, tensor in expert_weights(module, expert - 1).items():
                getattr(module, name).data[expert] = tensor
            shuffle_neurons(module, expert, seed=expert)
    before = logits(model)
    apart = {}
    for aligned in (True, False):
        groups = {
            layer.name: Groups(list(range(0, E, 2)), slot, [0.5] * E, aligned) for layer in moe_layers(model)
        }
        with merged(model, groups, merge_model(model, groups), router="sum"):
            apart[aligned] = float((logits(model) - before).abs().max())
    assert apart[True] <= 1e-5 * float(before.abs().max()) + 1e-5
    assert apart[False] > 1e-2


# ---------------------------------------------------------------- a model merged for a while


@pytest.mark.parametrize("router", ["centroid", "sum"])
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "deepseek_v3", "deepseek_v4", "gemma4"])
def test_merging_nothing_changes_nothing_and_all_comes_back(family, router):
    model = tiny.build(family)
    before, weights = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    profile = profile_of(model)
    alone = make_groups(model, profile, "hc", E)
    with merged(model, alone, merge_model(model, alone), router):
        assert torch.allclose(logits(model), before, atol=1e-5)
    groups = make_groups(model, profile, "ream", 4)
    stacks = merge_model(model, groups)
    with pytest.raises(ZeroDivisionError), merged(model, groups, stacks, router):
        assert float((logits(model) - before).abs().max()) > 1e-3
        raise ZeroDivisionError
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    for _, module in named_experts(model):
        assert module.num_experts == E and not hasattr(module, "experts_kept")
    assert torch.equal(logits(model), before)


def test_tables_of_expert_ids_follow_the_groups():
    """Tokens that a table sent to a merged expert are sent to its group, not to whoever is left."""
    model = tiny.build("deepseek_v4")
    layers = moe_layers(model)
    slot = [e // 2 for e in range(E)]
    groups = {la.name: Groups(list(range(0, E, 2)), slot, [0.5] * E) for la in layers}
    router = submodule(model, layers[0].router)
    table = router.tid2eid.clone()
    with merged(model, groups, merge_model(model, groups)):
        assert torch.equal(router.tid2eid, torch.tensor(slot)[table.long()].to(table.dtype))
        logits(model)
    assert torch.equal(router.tid2eid, table)


def test_the_centroid_router_is_a_mask_over_merged_weights():
    """Centroids that are alone in their groups compute as under a mask that keeps exactly them."""
    from moesmith.models.surgery import masked

    model = tiny.build("olmoe")
    keep = {layer.name: [0, 2, 3, 6] for layer in moe_layers(model)}
    # All weight on the centroid: the merge is pruning.
    slot = [0, 0, 1, 2, 0, 0, 3, 0]
    weight = [1.0, 0, 1, 1, 0, 0, 1, 0]
    groups = {name: Groups(kept, slot, weight) for name, kept in keep.items()}
    with masked(model, keep):
        wanted = logits(model)
    with merged(model, groups, merge_model(model, groups)):
        assert torch.allclose(logits(model), wanted, atol=1e-5)


@pytest.mark.parametrize("scheme", ["nf4", "int8", "bf16"])
def test_packed_models_merge_like_their_dequantised_twin(checkpoint, scheme):
    from transformers import AutoModelForCausalLM

    folder = checkpoint("olmoe")
    packed = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=ExpertsConfig(scheme), dtype=torch.float32
    )
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    twins = dict(named_experts(plain))
    for name, module in named_experts(packed):
        for weight in weight_names(module):
            dense = torch.stack([stack(module, weight).expert(e, torch.float32) for e in range(E)])
            getattr(twins[name], weight).data.copy_(dense)
    profile = profile_of(packed)
    groups = make_groups(packed, profile, "ream", 4)
    found = {}
    for name, model in (("packed", packed), ("plain", plain)):
        stacks = merge_model(model, groups)
        with merged(model, groups, stacks):
            found[name] = logits(model).float()
    # Stacks kept in bf16 stay bf16 when merged.
    apart = (found["packed"] - found["plain"]).norm() / found["plain"].norm()
    assert apart < (3e-2 if scheme == "bf16" else 1e-5)
    assert submodule(packed, moe_layers(packed)[0].experts).down_proj.dtype == (
        torch.bfloat16 if scheme == "bf16" else torch.uint8
    )
