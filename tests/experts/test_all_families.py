"""The laws on every decorated experts class, built tiny: load, save, compute, adapt, permute, count.

Laws 1, 3, 4, 7 and 12 of the design. The reference is the stock class loaded from the same checkpoint with
the dequantised weights copied in, its experts run by transformers' own functions. fp32, so that only our
arithmetic can differ.
"""

# E experts

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.experts import lora as lora_seam
from moesmith.experts.report import count
from moesmith.experts.storage import named_experts, stack, weight_names
from moesmith.models import layers
from moesmith.models.layers import (
    adapter_targets,
    expert_id_tensors,
    moe_layers,
    per_expert_tensors,
    submodule,
)
from moesmith.ops import cpu

Checkpoint = Callable[[str], Path]

# One of each kind: stacks on disk; interleaved, transposed, with biases; no gate, experts wider than the
# model; two sizes of experts in one layer.
SAMPLE = ["gemma4", "gpt_oss", "nemotron_h", "ernie4_5_vl_moe"]


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def packed(family: str, checkpoint: Checkpoint) -> nn.Module:
    """The family packed to nf4 on the fly. Tests do not change it."""
    return load(family, checkpoint(family), ExpertsConfig("nf4"))


@pytest.fixture(scope="module")
def dequantised(family: str, checkpoint: Checkpoint, packed: nn.Module) -> nn.Module:
    """The stock model holding the weights that `packed` stands for. Tests do not change it."""
    return dequantise(packed, load(family, checkpoint(family)))


def load(family: str, folder: Path, config: ExpertsConfig | None = None, **kwargs: Any) -> nn.Module:
    """Load in fp32, every tensor found and none left over.

    A memory-mapped tensor may start at any 8 bytes, where some CPU kernels sum in another order (convolutions
    of `zaya` and `inkling2`, 1e-6); copies start where all tensors do, so equal models give equal bits.
    """
    kwargs = {"dtype": torch.float32, "quantization_config": config} | kwargs
    model, info = tiny.model_class(family).from_pretrained(folder, output_loading_info=True, **kwargs)
    assert not any(info.values()), info
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = tensor.data.clone()
    return model.eval()


def dequantise(packed: nn.Module, stock: nn.Module) -> nn.Module:
    for (_, ours), (_, theirs) in zip(named_experts(packed), named_experts(stock), strict=True):
        for name in weight_names(theirs):
            getattr(theirs, name).data.copy_(stack(ours, name).dense(torch.float32))
    return stock


@torch.no_grad()
def logits(model: nn.Module, experts: str | None = None) -> Tensor:
    """Logits for the tiny inputs, experts run by the function of that name (the model's own if None)."""
    if experts is not None:
        model.set_experts_implementation(experts)
    return model(**tiny.inputs(model)).logits


def assert_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Largest difference, measured in standard deviations of the expected logits."""
    assert float((actual - expected).abs().max() / expected.std()) <= tolerance


def assert_same_state(actual: nn.Module, expected: nn.Module) -> None:
    ours, theirs = actual.state_dict(), expected.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name].dtype != theirs[name].dtype] == []
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


def used_experts(model: nn.Module) -> dict[str, Tensor]:
    """Experts module -> ids of the experts that the tiny inputs reach."""
    used: dict[str, Tensor] = {}
    hooks = [
        submodule(model, layer.experts).register_forward_pre_hook(
            lambda _, args, name=layer.experts: used.update({name: args[1].unique()})
        )
        for layer in moe_layers(model)
    ]
    logits(model)
    for hook in hooks:
        hook.remove()
    return used


# --- the tiny models themselves ---


def test_there_are_65_classes_in_64_folders():
    """A number that changes when transformers adds one: then families.py has to be looked at."""
    assert len(tiny.DECORATED) == 64
    assert len(tiny.FAMILIES) - len(tiny.OWN) == sum(map(len, tiny.DECORATED.values())) == 65


def test_the_tiny_model_is_of_the_class_and_reaches_its_experts(family: str, dequantised: nn.Module):
    experts = dict(named_experts(dequantised))
    folder = "qwen3_omni_moe" if family == "qwen3_omni_moe_talker" else family
    assert {type(module).__name__ for module in experts.values()} <= set((tiny.DECORATED | tiny.OWN)[folder])
    used = used_experts(dequantised)
    assert used.keys() == experts.keys()
    assert all(len(ids) >= 7 for ids in used.values()), used
    for module in experts.values():
        for name in weight_names(module):
            _, rows, columns = getattr(module, name).shape
            assert rows != columns and rows % 64 == columns % 64 == 0


def test_the_two_qwen_omni_models_are_of_different_classes():
    names = ["qwen3_omni_moe", "qwen3_omni_moe_talker"]
    classes = {type(module).__name__ for name in names for _, module in named_experts(tiny.build(name))}
    assert classes == set(tiny.DECORATED["qwen3_omni_moe"])


# --- law 1: packed == holding the dequantised weights; save and reload bit-equal ---


def test_packed_equals_dequantised(packed: nn.Module, dequantised: nn.Module):
    """Exactly, against transformers' grouped_mm: same steps in the same order."""
    assert torch.equal(logits(packed), logits(dequantised, "grouped_mm"))


def test_packing_is_not_a_no_op(family: str, packed: nn.Module):
    """4 bits cost something: else the comparison above compares nothing."""
    assert float((logits(packed) - logits(tiny.build(family))).abs().max()) > 1e-2


def test_saved_and_reloaded_without_arguments_it_is_bit_equal(family: str, packed: nn.Module, tmp_path: Path):
    packed.save_pretrained(tmp_path)
    stacks = {getattr(m, w).data_ptr() for _, m in named_experts(packed) for w in weight_names(m)}
    files = [load_file(file) for file in tmp_path.glob("*.safetensors")]
    assert sum(t.dtype == torch.uint8 for tensors in files for t in tensors.values()) == len(stacks)  # whole
    again = load(family, tmp_path)
    assert_same_state(again, packed)
    assert torch.equal(logits(again), logits(packed))


def test_packed_in_bf16_and_reloaded_without_arguments_it_is_bit_equal(
    family: str, checkpoint: Checkpoint, tmp_path: Path
):
    """The dtype of every day. What a model keeps in fp32 (biases of routers) stays so, block scales too."""
    model = load(family, checkpoint(family), ExpertsConfig("nf4"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    again = load(family, tmp_path, dtype="auto")
    assert_same_state(again, model)
    assert torch.equal(logits(again), logits(model))
    assert {p.dtype for n, p in again.named_parameters() if n.endswith("_absmax")} == {torch.float32}


@pytest.mark.parametrize("name", SAMPLE)
@pytest.mark.parametrize(
    "config",
    [
        ExpertsConfig("fp4"),
        ExpertsConfig("int8"),
        ExpertsConfig("fp8"),
        ExpertsConfig("bf16"),
        ExpertsConfig("fp16"),
        ExpertsConfig("nf4", double_quant=True),
        ExpertsConfig("int8", double_quant=True),
        ExpertsConfig("nf4", blocksize=32),
    ],
    ids=lambda config: f"{config.scheme}-{config.blocksize}{'-double' if config.double_quant else ''}",
)
def test_other_schemes(name: str, config: ExpertsConfig, checkpoint: Checkpoint, tmp_path: Path):
    model = load(name, checkpoint(name), config)
    assert torch.equal(logits(model), logits(dequantise(model, load(name, checkpoint(name))), "grouped_mm"))
    model.save_pretrained(tmp_path)
    again = load(name, tmp_path)
    assert_same_state(again, model)
    assert torch.equal(logits(again), logits(model))


def test_per_expert_and_fused_checkpoints_pack_to_the_same_bytes(
    family: str, packed: nn.Module, tmp_path: Path
):
    """`save_pretrained` writes a family's original layout; without the reversal it writes the stacks."""
    stock = tiny.build(family)
    stock.save_pretrained(tmp_path, save_original_format=False)
    stacks = {f"{name}.{w}" for name, module in named_experts(stock) for w in weight_names(module)}
    assert len(stacks & load_file(tmp_path / "model.safetensors").keys()) in (
        len(stacks),
        len(stacks) // 2,
    )  # tied
    assert_same_state(load(family, tmp_path, ExpertsConfig("nf4")), packed)


def test_shards_and_a_single_file_pack_and_reload_to_the_same_bytes(
    family: str, packed: nn.Module, tmp_path: Path
):
    """Shards cut through layers and between the experts of one layer."""
    tiny.build(family).save_pretrained(tmp_path / "stock", max_shard_size="100KB")
    assert len(list((tmp_path / "stock").glob("*.safetensors"))) > 4
    sharded = load(family, tmp_path / "stock", ExpertsConfig("nf4"))
    assert_same_state(sharded, packed)
    sharded.save_pretrained(tmp_path / "packed", max_shard_size="50KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 4
    assert_same_state(load(family, tmp_path / "packed"), packed)


def test_qwen3_vl_checkpoints_that_store_experts_transposed_pack_to_the_same_bytes(
    checkpoint: Checkpoint, tmp_path: Path
):
    """As published ones do: the converter turns a stack when its shape is not the model's."""
    family = "qwen3_vl_moe"
    stock = tiny.build(family)
    stock.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    turned = {
        name: t.transpose(1, 2).contiguous() if ".experts." in name else t for name, t in tensors.items()
    }
    save_file(turned, tmp_path / "model.safetensors", metadata={"format": "pt"})
    straight = load(family, checkpoint(family), ExpertsConfig("nf4"))
    assert_same_state(load(family, tmp_path, ExpertsConfig("nf4")), straight)


# --- law 3 on whole models: our forward == transformers' plain loop over experts ---


def test_packed_forward_equals_the_eager_loop(packed: nn.Module, dequantised: nn.Module):
    assert_close(logits(packed), logits(dequantised, "eager"), 1e-5)


def test_native_kernels_equal_the_eager_loop(
    family: str, checkpoint: Checkpoint, dequantised: nn.Module, monkeypatch: pytest.MonkeyPatch
):
    """bf16, on matrices normally too small for them: no further from fp32 than torch's own products."""
    if not cpu.has_grouped():
        pytest.skip(cpu.status())
    model = load(family, checkpoint(family), ExpertsConfig("nf4"), dtype=torch.bfloat16)
    plain = logits(model)
    calls = []
    project = cpu.project
    monkeypatch.setattr(cpu, "_MIN_ELEMENTS", 0)
    monkeypatch.setattr(cpu, "project", lambda *args: calls.append(args) or project(*args))
    native = logits(model)
    assert len(calls) == sum(len(weight_names(module)) for _, module in named_experts(model))
    exact = logits(dequantised, "eager")
    ours, theirs = (float((x.float() - exact).norm() / exact.norm()) for x in (native, plain))
    assert ours <= 1.5 * theirs + 1e-3


# --- law 4: adapters ---

# Where PEFT cannot keep the law, layers.adapter_targets says so: families.lost_adapters, and tied experts.
REFUSED = {
    "deepseek_ocr2": "load",
    "unlimited_ocr": "load",
    "mistral_large4": "load",
    "diffusion_gemma": "merged",
}


@pytest.fixture
def stock_peft() -> Iterator[None]:
    """PEFT without our wrapper."""
    lora_seam.unregister()
    yield
    lora_seam.register()


def adapted(model: nn.Module, seed: int = 1) -> PeftModel:
    """`model` with adapters on its experts that change its output."""
    modules, parameters = adapter_targets(model, ["experts"])
    config = LoraConfig(r=4, lora_alpha=8, target_modules=modules, target_parameters=parameters)
    peft_model = get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in adapter_parameters(peft_model).items():
        scale = parameter.shape[-1] ** -0.5 if "lora_A" in name else 0.05
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return peft_model


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_adapters_that_cannot_keep_the_law_are_refused(family: str):
    with pytest.raises(UserError, match=REFUSED[family]):
        adapter_targets(tiny.build(family), ["experts"])


@pytest.fixture(scope="module")
def adapter(family: str, packed: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A saved adapter on the packed family: its folder, the logits with it and without, its gradients."""
    if family in REFUSED:
        pytest.skip(f"adapters on the experts of {family} are refused")
    model = deepcopy(packed)
    without = logits(model)
    peft_model = adapted(model)
    peft_model(**tiny.inputs(model)).logits.square().mean().backward()
    gradients = {name: parameter.grad for name, parameter in adapter_parameters(peft_model).items()}
    frozen = [n for n, p in peft_model.named_parameters() if p.grad is not None and n not in gradients]
    folder = tmp_path_factory.mktemp(family)
    peft_model.save_pretrained(folder)
    return {
        "folder": folder,
        "logits": logits(peft_model),
        "without": without,
        "gradients": gradients,
        "frozen_with_gradient": frozen,
        "used": used_experts(model),
    }


def test_adapter_changes_the_model_and_reloaded_is_the_same(
    family: str, adapter: dict, checkpoint: Checkpoint
):
    assert float((adapter["logits"] - adapter["without"]).abs().max()) > 1e-2
    base = load(family, checkpoint(family), ExpertsConfig("nf4"))
    again = PeftModel.from_pretrained(base, adapter["folder"]).eval()
    assert torch.equal(logits(again), adapter["logits"])


def test_gradient_reaches_every_adapter_parameter_of_every_used_expert(packed: nn.Module, adapter: dict):
    assert len(adapter["gradients"]) == 2 * len(adapter_targets(packed, ["experts"])[1])
    assert adapter["frozen_with_gradient"] == []
    for name, gradient in adapter["gradients"].items():
        experts = name.removeprefix("base_model.model.").replace(".base_layer", "").partition(".lora_")[0]
        E = submodule(packed, experts).num_experts
        assert gradient is not None and bool(gradient.isfinite().all()), name
        # A is (E*r, in), expert slowest; B is (out, r*E), expert fastest.
        per_expert = gradient.view(E, -1) if ".lora_A." in name else gradient.reshape(-1, E).T
        reached = per_expert.abs().sum(dim=1).nonzero().flatten()
        assert torch.equal(reached, adapter["used"][experts]), name


def test_stock_peft_runs_and_merges_our_adapter(adapter: dict, dequantised: nn.Module, stock_peft: None):
    stock = deepcopy(dequantised)
    stock.set_experts_implementation("eager")
    running = PeftModel.from_pretrained(stock, adapter["folder"]).eval()
    assert_close(logits(running), adapter["logits"], 1e-4)
    assert_close(logits(running.merge_and_unload()), adapter["logits"], 1e-4)


@pytest.mark.parametrize("name", SAMPLE)
def test_merged_equals_running_on_a_16bit_base(name: str, checkpoint: Checkpoint):
    """A base that moesmith keeps in 16 bits merges within their rounding; a packed one refuses."""
    model = adapted(load(name, checkpoint(name), ExpertsConfig("bf16")))
    running = logits(model)
    merged = logits(model.merge_and_unload())
    # The median: where rounding changes which expert a token goes to, its logits differ by more.
    assert float((merged - running).abs().median() / running.std()) < 0.005
    with pytest.raises(ValueError, match="merge"):
        adapted(load(name, checkpoint(name), ExpertsConfig("nf4"))).merge_and_unload()


# --- law 7: experts and router rows permuted together ---


def permute(model: nn.Module, router: bool) -> nn.Module:
    """Renumber the experts of every layer; group-limited routing keeps its groups together."""
    generator = torch.Generator().manual_seed(3)
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    done: set[int] = set()
    for layer in moe_layers(model):
        size = layer.num_experts // layer.n_group
        groups = torch.randperm(layer.n_group, generator=generator)
        new_to_old = torch.cat([g * size + torch.randperm(size, generator=generator) for g in groups])
        old_to_new = new_to_old.argsort()
        for name, dim in per_expert_tensors(model, layer).items():
            tensor = tensors[name].data
            if tensor.data_ptr() in done or not (router or name.startswith(layer.experts + ".")):
                continue  # tied to another layer's
            done.add(tensor.data_ptr())
            kept = torch.arange(layer.num_experts, tensor.shape[dim])  # rows of no expert
            tensor.copy_(tensor.index_select(dim, torch.cat([new_to_old, kept])))
        for name in expert_id_tensors(model, layer) if router else ():
            tensors[name].data.copy_(old_to_new[tensors[name].long()])
    return model


# Its router's softmax adds up in another order, and its recurrent attention makes 1e-7 of that into 2e-5.
PERMUTED_TOLERANCE = {"qwen3_next": 1e-4}


def test_experts_permuted_with_the_router_change_nothing(family: str, packed: nn.Module):
    permuted = permute(deepcopy(packed), router=True)
    assert_close(logits(permuted), logits(packed), PERMUTED_TOLERANCE.get(family, 1e-5))


def test_experts_permuted_alone_change_the_logits(packed: nn.Module):
    permuted = permute(deepcopy(packed), router=False)
    assert float((logits(permuted) - logits(packed)).abs().max()) > 1e-2


# --- law 12: counts ---


def test_every_expert_matrix_is_packed_and_counted(packed: nn.Module, dequantised: nn.Module):
    stacks = {
        id(parameter): (name, parameter)
        for _, module in named_experts(dequantised)
        for name in weight_names(module)
        for parameter in [getattr(module, name)]
    }
    matrices = sum(p.shape[0] * (2 if name == "gate_up_proj" else 1) for name, p in stacks.values())
    weights = sum(p.numel() for _, p in stacks.values())
    counts = count(packed)
    assert counts.matrices == {"nf4": matrices}
    assert counts.not_packed == []
    assert counts.expert_parameters == weights
    assert counts.expert_bytes == weights / 2 + 4 * weights / 64
    assert counts.expert_parameters + counts.other_parameters == sum(
        p.numel() for p in dequantised.parameters()
    )
    for _, module in named_experts(packed):
        assert all(getattr(module, name).dtype == torch.uint8 for name in weight_names(module))


@pytest.mark.parametrize("name", SAMPLE)
def test_asked_for_and_not_done_is_an_error(
    name: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
):
    """A stack that no block size divides is refused by name, and kept in 16 bits only when asked for."""
    monkeypatch.setattr("moesmith.experts.quantizer.pick_blocksize", lambda columns, blocksize: None)
    with pytest.raises(UserError, match="_proj: last dimension"):
        load(name, checkpoint(name), ExpertsConfig("nf4"))
    kept = load(name, checkpoint(name), ExpertsConfig("nf4", unpackable="keep"))
    assert len(count(kept).not_packed) == sum(len(weight_names(module)) for _, module in named_experts(kept))


# --- linears: bitsandbytes beside packed experts ---


def test_linears_are_quantised_but_no_router_gate_or_head(
    family: str, checkpoint: Checkpoint, tmp_path: Path
):
    config = ExpertsConfig("nf4", linears="nf4")
    model = load(family, checkpoint(family), config, dtype=torch.bfloat16)
    quantised = {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}
    attention, _ = layers._all_targets(tiny.build(family))["attention"]
    assert quantised & set(attention) or family == "diffusion_gemma"  # bitsandbytes leaves tied linears alone
    for name in quantised:
        assert not any(name == x.router or name.startswith(x.router + ".") for x in moe_layers(model))
        assert not name.endswith(("_head", "expert_gate"))
    before = logits(model)
    assert bool(before.isfinite().all()) and torch.equal(logits(model), before)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(family, tmp_path, dtype="auto")), before)
