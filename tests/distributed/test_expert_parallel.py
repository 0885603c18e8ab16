"""Processes that share the experts compute, train and save what one process does."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers.distributed import DistributedConfig

import rank_runs
import shared_experts
import tiny
from moesmith.errors import UserError
from moesmith.experts.lora import Share
from moesmith.experts.quantizer import ExpertsConfig, ExpertsQuantizer
from moesmith.train import expert_parallel
from processes import together


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory):
    """family -> folder of its tiny model, packed."""

    def get(family):
        folder = tmp_path_factory.mktemp("packed") / family
        shared_experts.load(family, checkpoint(family)).save_pretrained(folder)
        return folder

    return get


def check(found, out, exact=True):
    """`found` of `shared_experts.compare`, on every rank."""
    first, *others = found
    assert all(rank["reloaded"] and rank["fingerprint"] == first["fingerprint"] for rank in found)
    assert first["same fingerprint"] and first["answer"]
    assert first["share"] == 1 / len(found)
    assert first["first weights"] == 0
    limit = 0 if exact else 2e-5  # the sum over the ranks: order of additions
    assert max(first["logits"], first["loss"], first["gradients"]) <= limit
    assert first["norm"] < 1e-6
    assert first["clipped"] < 1e-9
    files = [
        (out / name / "adapter_model.safetensors").read_bytes() for name in ("alone", "shared", "by-one-rank")
    ]
    assert files[0] == files[1] == files[2]
    configs = [(out / name / "adapter_config.json").read_text() for name in ("alone", "shared")]
    assert configs[0] == configs[1]


def test_two_ranks_compute_and_save_what_one_process_does(packed, tmp_path):
    """Logits, gradients of every adapter, clipping, the saved files and loading them; to the bit."""
    folder = packed("olmoe")
    check(together(shared_experts.compare, "olmoe", folder, tmp_path), tmp_path)


def test_two_ranks_train_what_one_process_trains(packed, tmp_path):
    folder = packed("olmoe")
    options = {"max_steps": 4, "max_grad_norm": 0.5, "gradient_checkpointing": True}
    alone = shared_experts.train(folder, tmp_path / "one", processes=1, **options)
    shared = together(shared_experts.train, folder, tmp_path / "two", **options)
    for found in shared:
        assert found == {**alone, "loss": pytest.approx(alone["loss"], rel=1e-6)}
    rank_runs.assert_same_run(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss", "gemma4"])
def test_families(packed, tmp_path, family):
    folder = packed(family)
    check(together(shared_experts.compare, family, folder, tmp_path), tmp_path)


@pytest.mark.slow
def test_four_ranks_pack_their_own_experts_while_loading(checkpoint, tmp_path):
    found = together(shared_experts.compare, "olmoe", checkpoint("olmoe"), tmp_path, processes=4, world=4)
    check(found, tmp_path, exact=False)


@pytest.mark.slow
def test_ranks_that_send_each_other_rows(packed, tmp_path):
    """transformers' other way: every rank takes half of the tokens and sends their rows to the experts."""
    folder = packed("olmoe")
    found = together(shared_experts.compare, "olmoe", folder, tmp_path, ep_implementation="all_to_all")
    check(found, tmp_path, exact=False)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_with_any_number_of_processes(packed, tmp_path, before, after):
    folder = packed("olmoe")

    def train(out, processes, **options):
        if processes == 1:
            return shared_experts.train(folder, out, 1, **options)
        return together(shared_experts.train, folder, out, processes, **options)

    train(tmp_path / "whole", before)
    cut = shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for gone in ("checkpoints/checkpoint-6", "last"):
        shutil.rmtree(cut / gone)
    (cut / "result.json").unlink()
    train(cut, after, resume=True)
    if before == after:
        assert (cut / "last/adapter_model.safetensors").read_bytes() == (
            tmp_path / "whole/last/adapter_model.safetensors"
        ).read_bytes()
    rank_runs.assert_same_run(tmp_path / "whole", cut)


# ---------------------------------------------------------------- without processes


def shares(experts, processes):
    ranks = [SimpleNamespace(size=lambda: processes, get_local_rank=lambda r=r: r) for r in range(processes)]
    return [Share(experts, rank) for rank in ranks]


@pytest.mark.parametrize(("factor", "shape"), [("lora_A", (8 * 3, 5)), ("lora_B", (7, 3 * 8))])
def test_parts_join_to_the_whole(factor, shape):
    whole = torch.randn(shape)
    parts = [share.cut(factor, whole) for share in shares(8, 4)]
    assert torch.equal(shares(8, 4)[0].join(factor, parts), whole)


def test_a_part_holds_the_updates_of_its_own_experts():
    """PEFT's formula for each expert's delta, on the whole and on the parts."""
    A, B = torch.randn(8 * 3, 5), torch.randn(7, 3 * 8)

    def deltas(A, B, experts):
        return torch.einsum("ore,eri->eoi", B.view(7, -1, experts), A.view(experts, -1, 5))

    for rank, share in enumerate(shares(8, 2)):
        own = deltas(share.cut("lora_A", A), share.cut("lora_B", B), 4)
        assert torch.equal(own, deltas(A, B, 8)[4 * rank : 4 * rank + 4])


def plan(family, processes, tp_plan=None):
    """The rules of both plans that a packed model of the family gets."""
    model = tiny.build(family)
    model.config.distributed_config = DistributedConfig(tp_size=processes, ep_size=processes, tp_plan=tp_plan)
    quantizer = ExpertsQuantizer(ExpertsConfig("nf4"))
    quantizer._process_model_before_weight_loading(model)
    quantizer.update_parallel_plan(model, model.tp_plan)
    quantizer.update_parallel_plan(model, model.ep_plan)
    return model.tp_plan, model.ep_plan


def test_scales_and_biases_are_shared_like_the_codes():
    _, rules = plan("gpt_oss", 2)
    place = "model.layers.*.mlp.experts"
    tensors = {f"{place}.{n}{s}" for n in ("gate_up_proj", "down_proj") for s in ("", "_absmax", "_bias")}
    assert rules == {place: "ep_dispatch_experts", **dict.fromkeys(tensors, "grouped_gemm")}


def test_the_rest_of_a_packed_model_stays_whole_unless_asked():
    dense, rules = plan("gemma4", 2)
    assert {name.rpartition(".")[2] for name in dense} == {"experts"}
    assert not any("mlp" in name for name in rules)
    assert any(name.endswith("q_proj") for name in plan("olmoe", 2, tp_plan="auto")[0])


def test_experts_that_do_not_divide_are_refused_before_loading(monkeypatch):
    with pytest.raises(UserError, match="8 experts do not divide evenly among 3"):
        plan("olmoe", 3)
    with pytest.raises(UserError, match="do not divide evenly") as refused:
        expert_parallel.check({"model_type": "olmoe", "num_experts": 8}, 3)
    assert "2, 4, 8" in refused.value.hint
    with pytest.raises(UserError, match="do not divide evenly"):
        expert_parallel.check({"text_config": {"num_local_experts": 6}}, 4)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="expert_parallel=2, and the run has one process") as refused:
        expert_parallel.check({"num_experts": 8}, 2)
    assert "torchrun --nproc-per-node 2" in refused.value.hint
    monkeypatch.setenv("WORLD_SIZE", "2")
    expert_parallel.check({"num_experts": 8}, 2)


def test_an_optimizer_with_another_kind_of_state_is_refused(tmp_path):
    made = expert_parallel.trainer_class(object, SimpleNamespace(is_distributed_loading_by_transformers=True))
    with pytest.raises(UserError, match="adafactor cannot be split"):
        made(SimpleNamespace(), args=SimpleNamespace(optim="adafactor", save_only_model=False))


def test_an_ordinary_model_is_left_alone(tmp_path):
    model = tiny.build("olmoe")
    assert expert_parallel.trainer_class(json.JSONDecoder, model) is json.JSONDecoder
    with expert_parallel.whole(model):
        assert not any(True for _ in expert_parallel.shared_factors(model))
    assert expert_parallel.loading(1) == {}
