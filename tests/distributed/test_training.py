"""Several processes train what one trains: the same losses, the same rows in every step, the same adapter."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import rank_runs
import runs
from moesmith.errors import UserError
from processes import together

# 15 passes an epoch, 2 or 3 a step: the last step of an epoch has a single one, and a spare beside it.
TWO = {"rows": 29, "max_steps": 9}
THREE = {"rows": 29, "grad_accum": 3, "max_steps": 6}


def test_two_processes_train_what_one_trains_and_drop_a_step_together(tmp_path):
    """One row has a loss that is not a number: one of the processes sees it, both drop the step."""
    options = {**TWO, "poisoned": 7}
    alone = rank_runs.sft(tmp_path / "one", **options)
    assert alone["skipped"] == 1
    assert together(rank_runs.sft, tmp_path / "two", **options) == [alone, alone]
    rank_runs.assert_same_run(tmp_path / "one", tmp_path / "two")
    dropped = [json.loads((tmp_path / out / "nonfinite.jsonl").read_text()) for out in ("one", "two")]
    assert dropped[0] == {**dropped[1], "rows": dropped[0]["rows"]}
    assert sorted(dropped[0]["rows"]) == sorted(dropped[1]["rows"])
    assert 7 in dropped[0]["bad_rows"]


def test_split_weights_train_what_whole_ones_train(tmp_path):
    alone = rank_runs.sft(tmp_path / "one", **THREE)
    assert together(rank_runs.sft, tmp_path / "two", sharding="fsdp2", **THREE) == [alone, alone]
    rank_runs.assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "options", "more"),
    [
        (3, {"rows": 13, "grad_accum": 4, "max_steps": 5}, {}),
        (2, {"rows": 5, "grad_accum": 1, "max_steps": 4}, {}),  # one of them has nothing but spares
        (2, {"gradient_checkpointing": True, **TWO}, {}),
        (2, {"router_aux_loss": 0.1, **TWO}, {}),
        (2, {"gradient_checkpointing": True, **THREE}, {"sharding": "fsdp2"}),
        (2, {"layer_major": True, "gradient_checkpointing": True, **TWO}, {}),
    ],
)
def test_other_ways_to_train(tmp_path, world, options, more):
    alone = rank_runs.sft(tmp_path / "one", **options)
    several = together(rank_runs.sft, tmp_path / "several", world=world, **options, **more)
    assert several == [alone] * world
    rank_runs.assert_same_run(tmp_path / "one", tmp_path / "several")


@pytest.mark.slow
@pytest.mark.parametrize("sharding", [None, "fsdp2"])
def test_an_adapter_in_16_bits_stays_so(tmp_path, sharding):
    options = {"max_steps": 2, "dtype": "bfloat16", "adapter_dtype": "bfloat16", "sharding": sharding}
    together(rank_runs.sft, tmp_path, **options)
    for name in ("best", "last", "checkpoints/checkpoint-2"):
        weights = load_file(tmp_path / name / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}, name


@pytest.mark.slow
def test_packed_sequences_too(tmp_path):
    alone = rank_runs.packed_sequences(tmp_path / "one", grad_accum=3, max_steps=4)
    several = together(rank_runs.packed_sequences, tmp_path / "two", grad_accum=3, max_steps=4)
    assert several == [alone, alone]
    rank_runs.assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "more"),
    [
        ({"max_steps": 6, "batch_size": 2, "grad_accum": 3}, {}),
        ({"max_steps": 3, "dpo": {"reference": "recompute"}}, {}),
        ({"max_steps": 3, "batch_size": 2, "dpo": {"loss": ["aot"]}}, {}),
        ({"max_steps": 4, "batch_size": 2}, {"sharding": "fsdp2"}),
    ],
)
def test_pairs(tmp_path, options, more):
    """The reference is computed in shares, and margins, KL and figures of all held-out pairs are the same."""
    alone = rank_runs.dpo(tmp_path / "one", **options)
    assert together(rank_runs.dpo, tmp_path / "two", **options, **more) == [alone, alone]
    rank_runs.assert_same_run(tmp_path / "one", tmp_path / "two")
    logged = [[e for e in runs.log(tmp_path / out) if "eval_kl" in e] for out in ("one", "two")]
    for a, b in zip(*logged, strict=True):
        for name in ("eval_kl", "eval_margin", "eval_accuracy", "eval_rewards_chosen"):
            assert b[name] == pytest.approx(a[name], rel=1e-4, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("first", ["fsdp2", None])
def test_a_run_goes_on_in_several_processes(tmp_path, first, monkeypatch):
    """Stopped after step 4 of 8; without sharding it may go on in another number of processes."""
    options = {"rows": 29, "max_steps": 8, "save_steps": 2, "sharding": first}
    alone = rank_runs.sft(tmp_path / "one", **{**options, "sharding": None})
    together(rank_runs.stopped, tmp_path / "two", 4, **options)
    if first is None:
        rank_runs.sft(tmp_path / "two", resume=True, **options)
    else:
        shutil.copytree(tmp_path / "two", tmp_path / "begun")
        config = (tmp_path / "begun/config.yaml").read_text().replace("fsdp2", "null")
        (tmp_path / "begun/config.yaml").write_text(config)
        with pytest.raises(UserError, match="was written with weights split over processes"):
            rank_runs.sft(tmp_path / "begun", resume=True, **{**options, "sharding": None})
        assert together(rank_runs.sft, tmp_path / "two", resume=True, **options) == [alone, alone]
    rank_runs.assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_processes_with_different_rows_are_refused(tmp_path):
    with pytest.raises(AssertionError, match=r"rank \d has other rows than rank \d"):
        together(rank_runs.with_rows_of_its_own, tmp_path / "out")
