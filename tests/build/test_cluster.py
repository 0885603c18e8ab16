import pytest
import torch

from moesmith.build.cluster import balanced_assignment, cluster_neurons, neuron_profiles
from moesmith.errors import UserError


def test_finds_planted_groups():
    """24 neurons in 4 groups, each group active on its own tokens."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.randperm(24, generator=generator).view(4, 6)
    activations = 0.05 * torch.rand(80, 24, generator=generator)
    for token in range(80):
        activations[token, groups[token % 4]] += torch.rand(6, generator=generator) + 0.5
    members = cluster_neurons(neuron_profiles(activations, torch.ones(24)), num_experts=4)
    assert {frozenset(row.tolist()) for row in members} == {frozenset(row.tolist()) for row in groups}


def test_every_neuron_once_in_equal_groups():
    profiles = torch.rand(60, 200, generator=torch.Generator().manual_seed(1))
    members = cluster_neurons(profiles, num_experts=5)
    assert members.shape == (5, 12)
    assert sorted(members.flatten().tolist()) == list(range(60))


def test_assignment_is_balanced_and_stable():
    score = torch.rand(40, 4, generator=torch.Generator().manual_seed(2))
    owner = balanced_assignment(score)
    assert torch.bincount(owner, minlength=4).tolist() == [10] * 4
    worst = torch.tensor([score[owner == column, column].min() for column in range(4)])
    for row in range(40):  # nobody is turned away by a column that holds someone it likes less
        better = score[row] > score[row, owner[row]]
        assert (score[row] <= worst)[better].all()


def test_a_silent_neuron_is_placed_too():
    activations = torch.rand(50, 8)
    activations[:, 3] = 0
    members = cluster_neurons(neuron_profiles(activations, torch.ones(8)), num_experts=2)
    assert sorted(members.flatten().tolist()) == list(range(8))


def test_counts_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match="10 neurons") as caught:
        cluster_neurons(torch.rand(10, 5), num_experts=4)
    assert caught.value.hint == "counts that do: 2, 5, 10"
