"""Law 5: wherever the experts lie, the model computes the same bits.

Logits, losses and adapters over 20 steps, generation, observers and masks, cold experts on the CPU; with a
residency that evicts everything at once (`offloaded.Harsh`) and with the real one under every policy.
"""

# E experts

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny
from moesmith import ExpertsConfig, ExpertsLoRA, ExpertsNbit
from moesmith.errors import UserError
from moesmith.experts.forward import experts_forward
from moesmith.experts.residency import attach as seam
from moesmith.experts.residency.attach import attach, detach, packed_experts, residency_of
from moesmith.experts.residency.policy import Policy
from offloaded import POLICIES, Harsh, adapted, assert_same, load, outputs, same_training

Checkpoint = Callable[[str], Path]

# stacks on disk beside dense ones; transposed, interleaved, with biases; no gate; two sizes in one layer
FAST = ["olmoe", "gemma4", "gpt_oss", "nemotron_h", "ernie4_5_vl_moe", "deepseek_v3"]


@pytest.fixture
def harsh(monkeypatch: pytest.MonkeyPatch) -> Policy:
    monkeypatch.setattr(seam, "Residency", Harsh)
    return Policy("ram")


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Policy:
    return POLICIES[request.param]


# ---------------------------------------------------------------- the law


@pytest.mark.parametrize("family", FAST)
def test_logits_and_decoding_with_everything_evicted_at_once(family: str, checkpoint: Checkpoint, harsh):
    model = load(family, checkpoint(family))
    want = outputs(model)
    attach(model, harsh)
    assert_same(outputs(model), want)
    assert residency_of(model).calls


@pytest.mark.parametrize(("family", "reentrant"), [("olmoe", False), ("gpt_oss", False), ("olmoe", True)])
def test_losses_and_adapters_with_everything_evicted_at_once(
    family: str, reentrant: bool, checkpoint: Checkpoint, harsh
):
    model, resident = (adapted(load(family, checkpoint(family))) for _ in range(2))
    attach(model, harsh)
    same_training(model, resident, 3, reentrant)


@pytest.mark.parametrize("name", ["one slot", "kept and a cache", "mapped"])
def test_losses_and_adapters_for_three_policies(name: str, checkpoint: Checkpoint):
    model, resident = (adapted(load("olmoe", checkpoint("olmoe"))) for _ in range(2))
    attach(model, POLICIES[name])
    same_training(model, resident, 2)
    detach(model)


def test_logits_and_decoding_for_every_policy(policy: Policy, checkpoint: Checkpoint):
    model = load("olmoe", checkpoint("olmoe"))
    want = outputs(model)
    attach(model, policy)
    assert_same(outputs(model), want)
    detach(model)


def test_losses_and_adapters_over_20_steps(checkpoint: Checkpoint):
    model, resident = (adapted(load("olmoe", checkpoint("olmoe"))) for _ in range(2))
    attach(model, Policy("ram", kept=1, slots=2))
    same_training(model, resident, 20)
    detach(model)


@pytest.mark.slow
def test_losses_and_adapters_for_every_policy(policy: Policy, checkpoint: Checkpoint):
    model, resident = (adapted(load("olmoe", checkpoint("olmoe"))) for _ in range(2))
    attach(model, policy)
    same_training(model, resident, 3)
    detach(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family: str, checkpoint: Checkpoint):
    model = load(family, checkpoint(family), ExpertsConfig("nf4", double_quant=True))
    want = outputs(model)
    for one in (Policy("ram", slots=1), Policy("ram", kept=2, cache=2)):
        attach(model, one)
        assert_same(outputs(model), want)
    detach(model)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["olmoe", "qwen3_moe", "mixtral", "gpt_oss", "gemma4", "deepseek_v3"])
def test_every_policy_trains_the_common_families(family: str, policy: Policy, checkpoint: Checkpoint):
    model, resident = (adapted(load(family, checkpoint(family))) for _ in range(2))
    attach(model, policy)
    same_training(model, resident, 20)
    detach(model)


@pytest.mark.parametrize(
    "config",
    [ExpertsConfig("nf4", double_quant=True), ExpertsConfig("int8"), ExpertsConfig("bf16")],
    ids=["double quantised", "int8", "bf16"],
)
def test_every_storage(config: ExpertsConfig, checkpoint: Checkpoint, harsh):
    model = load("gpt_oss", checkpoint("gpt_oss"), config)
    want = outputs(model)
    attach(model, harsh)
    assert_same(outputs(model), want)


def test_generation_is_the_same(checkpoint: Checkpoint):
    model = load("olmoe", checkpoint("olmoe"))
    ids = tiny.inputs(model)["input_ids"][:1, :8]
    want = model.generate(ids, max_new_tokens=24, do_sample=False)
    for one in (Policy("ram", cache=2, kept=1), Policy("ram", slots=1), Policy("disk")):
        attach(model, one)
        assert torch.equal(model.generate(ids, max_new_tokens=24, do_sample=False), want)
    detach(model)


def test_large_matrices_on_the_native_kernels(harsh):
    torch.manual_seed(0)
    experts = ExpertsNbit.from_float(torch.randn(6, 512, 256) / 16, torch.randn(6, 256, 256) / 16)
    layer = ExpertsLoRA(experts, r=4)
    nn.init.normal_(layer.down_lora_B, std=0.05)
    results = []
    for attached in (False, True):
        if attached:
            attach(layer, harsh)
        for rows in (1, 3, 40):
            torch.manual_seed(rows)
            hidden = torch.randn(rows, 256).bfloat16().requires_grad_()
            index, weights = torch.randint(6, (rows, 2)), torch.rand(rows, 2)
            layer.zero_grad()
            with torch.no_grad():
                results.append(layer(hidden, index, weights))
            layer(hidden, index, weights).sum().backward()
            results.append(hidden.grad)
            results += [p.grad.clone() for p in layer.parameters() if p.requires_grad]
    assert_same(results[len(results) // 2 :], results[: len(results) // 2])


def test_tokens_are_counted_once_though_backward_computes_them_again(checkpoint: Checkpoint):
    model = adapted(load("olmoe", checkpoint("olmoe")))
    batch = tiny.inputs(model.get_base_model(), length=16)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    layers = len(packed_experts(model))
    for homes in ("ram", ("device",) * (layers - 1) + ("ram",)):
        residency = attach(model, Policy(homes))
        assert residency is not None
        residency.reset_statistics()
        for _ in range(2):
            model(**batch, labels=batch["input_ids"]).loss.backward()
        assert residency.statistics()["tokens"] == 2 * batch["input_ids"].numel()
    detach(model)


# ---------------------------------------------------------------- training without checkpointing


def test_without_gradient_checkpointing_it_fails_loudly(checkpoint: Checkpoint):
    model = adapted(load("olmoe", checkpoint("olmoe")))
    model.enable_input_require_grads()
    attach(model, Policy("ram", slots=1))
    batch = tiny.inputs(model.get_base_model(), length=16)
    loss = model(**batch, labels=batch["input_ids"]).loss
    with pytest.raises(UserError, match="evicted before their backward") as error:
        loss.backward()
    assert "gradient_checkpointing" in error.value.hint
    detach(model)


# ---------------------------------------------------------------- what else hangs on a call


def test_observers_see_the_same_rows_and_masks_keep_working(checkpoint: Checkpoint, harsh):
    model = load("olmoe", checkpoint("olmoe"))
    results: list[list[Tensor]] = []
    for attached in (False, True):
        if attached:
            attach(model, harsh)
        seen: list[Tensor] = []
        for _, module in packed_experts(model):
            module.experts_kept = torch.tensor([1, 2, 3, 4, 5, 6, 7, 0])
            module.experts_observer = lambda *args, seen=seen: seen.extend([args[4], args[6]])
        seen += outputs(model)
        results.append(seen)
    assert_same(results[1], results[0])


def test_slots_computed_elsewhere_contribute_nothing(checkpoint: Checkpoint, harsh):
    model = load("olmoe", checkpoint("olmoe"))
    (_, module), *_ = packed_experts(model)
    hidden, weights = torch.randn(5, tiny.HIDDEN), torch.rand(5, 2)
    index = torch.tensor([[0, 8], [8, 8], [3, 4], [8, 1], [2, 2]])
    calls = [
        (hidden, index, weights),
        (hidden[1:2], index[1:2], weights[1:2]),
        (hidden[:0], index[:0], weights[:0]),
    ]
    want = [experts_forward(module, *call) for call in calls]
    attach(model, harsh)
    assert_same([experts_forward(module, *call) for call in calls], want)


@pytest.mark.parametrize("family", ["olmoe", "gpt_oss", "gemma4"])
@pytest.mark.parametrize("cache", [0, 2])
def test_cold_experts_on_the_cpu(family: str, cache: int, checkpoint: Checkpoint, harsh):
    """Few experts are asked for: those that are not there are computed where they lie, adapters included."""
    model = adapted(load(family, checkpoint(family)))
    model.eval()
    want = outputs(model)
    residency = attach(model, Policy("ram", cold_on_cpu=True, cache=cache))
    assert_same(outputs(model), want)
    lent = [e for experts in residency.last.values() for e in experts]
    assert lent, "the last call asks for many experts: all are lent"
    with torch.no_grad():
        one = {"input_ids": torch.tensor([[5]])}
        model(**one)
    assert all(e % 2 for experts in residency.last.values() for e in experts)
    remembered = [e for _, experts in residency.expected for e in experts if e % 2 == 0]
    assert bool(remembered) or not cache
    detach(model)


def test_while_training_no_expert_is_left_on_the_cpu(checkpoint: Checkpoint, harsh):
    """Reentrant checkpointing runs its first forward without gradients: both must compute alike."""
    model = load("olmoe", checkpoint("olmoe"))
    residency = attach(model, Policy("ram", cold_on_cpu=True))
    model.train()
    with torch.no_grad():
        model(input_ids=torch.tensor([[5]]))
    assert any(e % 2 == 0 for experts in residency.last.values() for e in experts)
    detach(model)


def test_cold_experts_with_a_real_cache(checkpoint: Checkpoint):
    model = load("olmoe", checkpoint("olmoe"))
    want = outputs(model)
    for one in (Policy("ram", cold_on_cpu=True, kept=2, cache=2), Policy("ram", cold_on_cpu=True, kept=3)):
        attach(model, one)
        assert_same(outputs(model), want)
    detach(model)


# ---------------------------------------------------------------- on a card


@pytest.mark.gpu
def test_on_the_card_logits_and_decoding(policy: Policy, checkpoint: Checkpoint):
    model = load("olmoe", checkpoint("olmoe"), dtype=torch.bfloat16)
    want = outputs(deepcopy(model).cuda())
    attach(model, policy, "cuda")
    assert next(model.parameters()).is_cuda
    assert_same(outputs(model), want)
    detach(model)


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["olmoe", "gpt_oss"])
def test_on_the_card_losses_and_adapters(family: str, policy: Policy, checkpoint: Checkpoint):
    model, resident = (adapted(load(family, checkpoint(family))) for _ in range(2))
    attach(model, policy, "cuda")
    same_training(model, resident.cuda(), 20)
    detach(model)


@pytest.mark.gpu
def test_on_the_card_cold_experts_and_late_adapters(checkpoint: Checkpoint):
    model = load("olmoe", checkpoint("olmoe"))
    attach(model, Policy("ram", cold_on_cpu=True, kept=2, cache=2), "cuda")
    model = adapted(model).eval()
    assert all(p.is_cuda for name, p in model.named_parameters() if "lora" in name)
    resident = adapted(load("olmoe", checkpoint("olmoe"))).cuda().eval()
    for one, other in zip(outputs(model), outputs(resident), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    detach(model)
