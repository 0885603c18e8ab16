"""Which rows a process gets of every step; that the losses are the same is in tests/distributed."""

import itertools
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch.utils.data import BatchSampler, SequentialSampler

from moesmith import ranks
from moesmith.data.masks import IGNORED
from moesmith.train.batches import Collator, Share, WithSpares, to_dataset
from moesmith.train.together import Together
from runs import examples


def windows(batches, size):
    batches = iter(batches)
    return list(iter(lambda: list(itertools.islice(batches, size)), []))


@pytest.mark.parametrize("shares", [1, 2, 3, 5])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 6])
def test_every_step_has_the_rows_it_has_in_one_process(window, shares):
    for rows in range(1, 20):
        whole = BatchSampler(SequentialSampler(range(rows)), batch_size=2, drop_last=False)
        parts = [list(Share(whole, window, shares, i)) for i in range(shares)]
        lengths = {len(part) for part in parts}
        assert lengths == {len(Share(whole, window, shares, 0))}, "sharded weights need equal numbers"
        local = -(-window // shares)
        steps = [windows(part, local) for part in parts]
        for step, alone in enumerate(windows(whole, window)):
            real = [batch for mine in steps for batch in mine[step] if batch[0] >= 0]
            assert sorted(real) == sorted(alone)
            spares = [batch for mine in steps for batch in mine[step] if batch[0] < 0]
            assert all(batch == [~alone[0][0]] for batch in spares)
        assert len(windows(whole, window)) == len(steps[0]), "as many steps"


def test_a_spare_batch_learns_nothing_and_names_no_row():
    rows = WithSpares(to_dataset([[example] for example in examples(3)]))
    assert len(rows) == 3
    collate = Collator(0, packed=False)
    real, spare = collate([rows[1]]), collate([rows[~1]])
    assert "spare" not in real and spare["spare"]
    assert real["rows"] == [2] and spare["rows"] == []
    assert (real["input_ids"] == spare["input_ids"]).all()
    assert (spare["shift_labels"] == IGNORED).all() and not (real["shift_labels"] == IGNORED).any()


def bare(monkeypatch, **values):
    """A trainer of which only the parts that are asked for are there."""
    made = object.__new__(Together)
    made.__dict__.update(values)
    monkeypatch.setattr(Together, "together", True)
    monkeypatch.setattr(Together, "get_tp_size", lambda self: 1)
    return made


@pytest.mark.parametrize(("spare", "expected"), [(False, 3.0), (True, 0.0)])
def test_the_loss_of_a_spare_batch_is_nothing_whatever_the_loss(monkeypatch, spare, expected):
    """Also one with a part that no label masks: a preference loss, load balancing."""
    monkeypatch.setattr(transformers.Trainer, "compute_loss", lambda *_, **__: torch.tensor(3.0))
    monkeypatch.setattr(transformers.Trainer, "compute_loss_context_manager", lambda self: ExitStack())
    made = bare(monkeypatch, _spare=spare, accelerator=SimpleNamespace(), model=None)
    assert made.compute_loss(None, {}) == expected


def test_a_step_has_the_passes_of_all_processes_without_the_spare_ones(monkeypatch):
    """What a loss that is a mean over forward passes is divided by."""
    batches = [{"rows": [1]}, {"rows": [], "spare": True}]
    monkeypatch.setattr(transformers.Trainer, "get_batch_samples", lambda *_: (batches, None))
    monkeypatch.setattr(ranks, "add", lambda tensor: tensor + 2)  # of the other process
    made = bare(monkeypatch)
    made.get_batch_samples(None, 2, torch.device("cpu"))
    assert made._step_passes == 3
