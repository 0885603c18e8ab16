"""Law 6 on every architecture: router without the dropped experts == masked == sliced == reloaded.

The oracle keeps the whole model: whatever multiplies with a router's weight gets -inf in the columns of
dropped experts, and so do the biases that are added to scores. fp32, so that only our surgery can differ.
"""

# E experts

from __future__ import annotations

import json
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedConfig

import tiny
from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.models.layers import (
    MoELayer,
    adapter_targets,
    expert_id_tensors,
    moe_layers,
    per_expert_tensors,
    submodule,
)
from moesmith.models.surgery import (
    CONFIG_COUNTS,
    Keep,
    check_keep,
    masked,
    minimum_kept,
    resized_config,
    slice_model,
)

Checkpoint = Callable[[str], Path]
KEPT = 6  # of 8: in two groups of 4 that is 3 each


@pytest.fixture(scope="module", params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def model(family: str) -> nn.Module:
    """The plain tiny model. Tests leave it as it was."""
    return tiny.build(family)


def some_kept(model: nn.Module, count: int = KEPT, seed: int = 0) -> Keep:
    """A random choice per layer, the same number in each group; layers that share weights choose alike."""
    chosen: Keep = {}
    shared: dict[int, list[int]] = {}
    for number, layer in enumerate(moe_layers(model)):
        generator = random.Random(1000 * seed + number)
        size = layer.num_experts // layer.n_group
        kept = sorted(
            expert
            for group in range(layer.n_group)
            for expert in generator.sample(range(group * size, group * size + size), count // layer.n_group)
        )
        chosen[layer.name] = shared.setdefault(id(submodule(model, layer.experts).down_proj), kept)
    return chosen


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(**tiny.inputs(model)).logits


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Largest difference, measured in standard deviations of the expected logits."""
    assert bool(expected.isfinite().all())
    assert float((actual - expected).abs().max() / expected.std()) <= tolerance


class MinusInfinity(TorchFunctionMode):
    """Products with some weights give -inf in some columns."""

    def __init__(self, columns: dict[int, list[int]]):
        super().__init__()
        self.columns = columns  # address of the weight -> columns
        self.met: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.linear and args[1].data_ptr() in self.columns:
            self.met.add(args[1].data_ptr())
            out = out.clone()
            out[..., self.columns[args[1].data_ptr()]] = float("-inf")
        return out


def router_of_old(model: nn.Module, keep: Keep) -> Tensor:
    """Logits of the whole model whose routers cannot choose a dropped expert: the oracle."""
    model = deepcopy(model)
    if not any(hasattr(module, "experts_scheme") for module in model.modules()):
        model.set_experts_implementation("eager")
    tensors = {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}
    columns: dict[int, list[int]] = {}
    for layer in moe_layers(model):
        dropped = sorted(set(range(layer.num_experts)) - set(keep[layer.name]))
        for name, dim in per_expert_tensors(model, layer).items():
            tensor = tensors[name]
            if name.startswith(layer.experts + "."):
                continue
            if tensor.ndim == 2 and dim == 0:
                columns[tensor.data_ptr()] = dropped
            elif "bias" in name:
                tensor.data.view(-1)[dropped] = float("-inf")
        for name in expert_id_tensors(model, layer):  # these routers do not choose by score
            tensors[name].copy_(torch.tensor(successors(tensors[name].tolist(), keep[layer.name])))
    with MinusInfinity(columns) as mode:
        found = logits(model)
    assert mode.met == columns.keys(), "a router multiplies in a way that the oracle does not see"
    return found


def successors(table: list[list[int]], kept: list[int]) -> list[list[int]]:
    """The rule of hash_tables.cut_expert_ids as a loop, in the old numbering."""
    rows = []
    for token, row in enumerate(table):
        left = [expert if expert in kept else -1 for expert in row]
        for place, expert in enumerate(row):
            if left[place] < 0:
                position = (token + expert) % len(kept)
                while kept[position] in left:
                    position = (position + 1) % len(kept)
                left[place] = kept[position]
        rows.append(left)
    return rows


def sizes(model: nn.Module) -> dict[str, Any]:
    """Every integer any module has noted, and every shape."""
    found: dict[str, Any] = {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in model.state_dict().items()
    }
    for name, module in model.named_modules():
        found |= {f"{name}:{k}": v for k, v in vars(module).items() if type(v) is int and k[0] != "_"}
    return found


def counts_in_config(config: dict[str, Any], path: str = "") -> dict[str, Any]:
    """Every integer in a config, sub-configs included."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= counts_in_config(value, f"{path}{key}.")
        elif type(value) is int:
            found[f"{path}{key}"] = value
    return found


def reload(family: str, model: nn.Module, folder: Path) -> nn.Module:
    model.save_pretrained(folder)
    again, info = tiny.model_class(family).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    return again.eval()


# --- law 6 ---


def test_oracle_masked_sliced_and_reloaded_are_one(family: str, model: nn.Module, tmp_path: Path):
    check_law_6(family, model, tmp_path)


def test_the_same_packed(family: str, checkpoint: Checkpoint, tmp_path: Path):
    packed = tiny.model_class(family).from_pretrained(
        checkpoint(family), quantization_config=ExpertsConfig("nf4"), dtype=torch.float32
    )
    check_law_6(family, packed.eval(), tmp_path)


# Its router's softmax adds up in another order, and its recurrent attention makes 1e-7 of that into 3e-5.
TOLERANCE = {"qwen3_next": 1e-4}


def check_law_6(family: str, model: nn.Module, folder: Path) -> None:
    keep = some_kept(model)
    whole = logits(model)
    expected, tolerance = router_of_old(model, keep), TOLERANCE.get(family, 1e-5)
    assert float((expected - whole).abs().max()) > 1e-2, "dropping changed nothing: nothing is compared"

    with masked(model, keep):
        by_mask = logits(model)
    assert_close(by_mask, expected, tolerance)
    assert torch.equal(logits(model), whole)

    sliced = deepcopy(model)
    slice_model(sliced, keep)
    assert {layer.num_experts for layer in moe_layers(sliced)} == {KEPT}
    assert_close(logits(sliced), expected, tolerance)

    again = reload(family, sliced, folder)
    assert sizes(again) == sizes(sliced)
    assert counts_in_config(again.config.to_dict()) == counts_in_config(sliced.config.to_dict())
    assert_close(logits(again), expected, tolerance)


@pytest.mark.parametrize(
    "config",
    [
        ExpertsConfig("nf4", double_quant=True),
        ExpertsConfig("int8"),
        ExpertsConfig("fp8"),
        ExpertsConfig("bf16"),
    ],
    ids=lambda config: f"{config.scheme}{'-double' if config.double_quant else ''}",
)
@pytest.mark.parametrize("name", ["gpt_oss", "gemma4"])
def test_other_schemes(name: str, config: ExpertsConfig, checkpoint: Checkpoint, tmp_path: Path):
    packed = tiny.model_class(name).from_pretrained(
        checkpoint(name), quantization_config=config, dtype=torch.float32
    )
    check_law_6(name, packed.eval(), tmp_path)


@pytest.mark.parametrize("name", ["deepseek_v2", "deepseek_ocr2"])
def test_groups_compared_by_their_best_expert(name: str, tmp_path: Path):
    """The larger checkpoints of this class; the default routes without groups."""
    model = tiny.build(name)
    for layer in moe_layers(model):
        submodule(model, layer.router).topk_method = "group_limited_greedy"
    model.config.get_text_config().topk_method = "group_limited_greedy"
    check_law_6(name, model, tmp_path)


@pytest.mark.parametrize("count", [KEPT, 3])
def test_the_choice_to_skip_the_layer_stays(count: int):
    """`zaya` compares the id with its config's count. By default its tiny router never skips."""
    model = tiny.build("zaya")
    skipped = []
    for layer in moe_layers(model):
        router = submodule(model, layer.router)
        router.balancing_biases[-1] = 0.04
        router.register_forward_hook(lambda _, args, out: skipped.append(float((out[1] == 0).float().mean())))
    keep = some_kept(model, count)
    expected = router_of_old(model, keep)
    assert any(0.1 < share < 0.9 for share in skipped)
    with masked(model, keep):
        assert_close(logits(model), expected)
    slice_model(model, keep)
    assert_close(logits(model), expected)


def test_kept_weights_are_the_old_ones(family: str, model: nn.Module):
    keep = some_kept(model)
    sliced = deepcopy(model)
    slice_model(sliced, keep)
    old, new = tensors(model), tensors(sliced)
    cut = {name for layer in moe_layers(model) for name in per_expert_tensors(model, layer)}
    cut |= {name for layer in moe_layers(model) for name in expert_id_tensors(model, layer)}
    assert {name for name in old if not torch.equal(old[name], new[name])} == cut
    for layer in moe_layers(model):
        for name, dim in per_expert_tensors(model, layer).items():
            beyond = range(layer.num_experts, old[name].shape[dim])
            expected = [old[name].select(dim, e) for e in [*keep[layer.name], *beyond]]
            assert torch.equal(new[name], torch.stack(expected, dim))


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers())}


# --- a mask comes off ---


def everything(model: nn.Module) -> dict[str, Any]:
    """What a mask touches or might: every tensor object with its bytes, every plain attribute."""
    found: dict[str, Any] = {name: (id(t), t.clone()) for name, t in tensors(model).items()}
    configs: dict[int, PreTrainedConfig] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, PreTrainedConfig):
                configs[id(value)] = value
                found[f"{name}:{key}"] = id(value)
            elif isinstance(value, Tensor):  # what a forward leaves behind
                found[f"{name}:{key}"] = value.tolist()
            elif isinstance(value, (int, float, str)):
                found[f"{name}:{key}"] = value
    for number, config in enumerate(configs.values()):
        found[f"config {number}"] = (repr(config.to_dict()), config._experts_implementation)
    return found


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, tuple) and isinstance(value[1], Tensor):
            assert actual[key][0] == value[0] and torch.equal(actual[key][1], value[1]), key
        else:
            assert actual[key] == value, key


def test_everything_is_as_before(family: str, model: nn.Module):
    before = everything(model)
    with masked(model, some_kept(model)):
        logits(model)
    assert_same(everything(model), before)
    with pytest.raises(KeyError), masked(model, some_kept(model, seed=1)):
        raise KeyError
    assert_same(everything(model), before)


def test_a_mask_that_fails_half_way_leaves_nothing():
    model = tiny.build("ernie4_5_vl_moe")
    before = everything(model)
    text_only = {name: kept for name, kept in some_kept(model).items() if "text" in name}
    with pytest.raises(UserError, match="equally many"), masked(model, text_only):
        pass
    assert_same(everything(model), before)


def test_keeping_all_is_the_model_itself(family: str, model: nn.Module):
    everyone = {layer.name: list(range(layer.num_experts)) for layer in moe_layers(model)}
    whole, before = logits(model), everything(model)
    for keep in (everyone, {}):
        with masked(model, keep):
            assert torch.equal(logits(model), whole)
            assert_same(everything(model), before)
        same = deepcopy(model)
        slice_model(same, keep)
        assert torch.equal(logits(same), whole)


def test_a_mask_costs_the_router_only():
    model = tiny.build("gpt_oss")
    before = {name: id(t) for name, t in tensors(model).items()}
    with masked(model, some_kept(model)):
        new = {name for name, t in tensors(model).items() if id(t) != before[name]}
        assert new == {f"{layer.router}.{key}" for layer in moe_layers(model) for key in ("weight", "bias")}


def test_a_mask_inside_a_mask():
    """On another layer it is a second cut; on the same one it would mean something else to everyone."""
    model = tiny.build("olmoe")
    keep = some_kept(model)
    first, *others = keep
    with masked(model, keep):
        expected = logits(model)
        with pytest.raises(UserError, match="masked already"), masked(model, {first: keep[first]}):
            pass
        assert torch.equal(logits(model), expected)
    with masked(model, {first: keep[first]}), masked(model, {name: keep[name] for name in others}):
        assert torch.equal(logits(model), expected)


# --- layers that keep different numbers ---

UNEVEN = [
    "olmoe",
    "gemma4",
    "deepseek_v3",
    "deepseek_v4",
    "gpt_oss",
    "inkling",
    "zaya",
    "minimax_m2",
    "jamba",
]


def uneven_kept(model: nn.Module) -> Keep:
    """Down to 4 and 6, and the last layer whole."""
    names = [layer.name for layer in moe_layers(model)]
    few, many = some_kept(model, 4), some_kept(model, 6)
    return {name: (few if i == 0 else many)[name] for i, name in enumerate(names[:-1])}


@pytest.mark.parametrize("name", UNEVEN)
def test_uneven_layers(name: str):
    model = tiny.build(name)
    keep = uneven_kept(model)
    full = {layer.name: list(range(8)) for layer in moe_layers(model)}
    expected = router_of_old(model, full | keep)
    with masked(model, keep):
        assert_close(logits(model), expected)
    with pytest.raises(UserError, match="different numbers of experts: 4 in .*, 8 in"):
        slice_model(model, keep)
    slice_model(model, keep, uneven=True)
    counts = [layer.num_experts for layer in moe_layers(model)]
    assert counts == [len((full | keep)[name]) for name in full] and len(set(counts)) > 1
    assert_close(logits(model), expected)
    assert any(8 == getattr(model.config.get_text_config(), key, None) for key in CONFIG_COUNTS)


def test_sliced_twice_is_sliced_once():
    model, once = tiny.build("zaya"), tiny.build("zaya")
    slice_model(model, {layer.name: [0, 2, 3, 5, 7] for layer in moe_layers(model)})
    slice_model(model, {layer.name: [1, 2, 4] for layer in moe_layers(model)})
    slice_model(once, {layer.name: [2, 3, 7] for layer in moe_layers(once)})
    assert torch.equal(logits(model), logits(once))
    assert sizes(model) == sizes(once)


@pytest.mark.parametrize("name", ["mixtral", "ernie4_5_moe", "glm4v_moe"])
def test_the_balancing_loss_counts_the_kept_experts(name: str):
    model = tiny.build(name)
    inputs = tiny.inputs(model) | {"labels": tiny.inputs(model)["input_ids"], "output_router_logits": True}
    sliced, keep = deepcopy(model), some_kept(model)
    slice_model(sliced, keep)
    with torch.no_grad(), masked(model, keep):
        by_mask = model(**inputs)
    found = sliced(**inputs)
    assert float(found.aux_loss) == pytest.approx(float(by_mask.aux_loss), rel=1e-5)
    assert float(found.loss) == pytest.approx(float(by_mask.loss), rel=1e-5)


# --- adapters ---


@pytest.mark.parametrize("packed", [False, True], ids=["16bit", "packed"])
@pytest.mark.parametrize("name", ["gemma4", "olmoe", "zaya"])
def test_a_mask_on_a_model_with_adapters(name: str, packed: bool, checkpoint: Checkpoint):
    """On its experts and its router (a linear; a parameter; a linear deeper inside): cut like the weights."""
    config = ExpertsConfig("nf4") if packed else None
    model = tiny.model_class(name).from_pretrained(
        checkpoint(name), quantization_config=config, dtype=torch.float32
    )
    modules, parameters = adapter_targets(model, ["experts", "router", "attention"])
    lora = LoraConfig(r=2, target_modules=modules, target_parameters=parameters, init_lora_weights=False)
    adapted = get_peft_model(model.eval(), lora).eval()
    keep = some_kept(adapted)
    whole = logits(adapted)
    with masked(adapted, keep):
        by_mask = logits(adapted)
        again = logits(adapted)
    assert torch.equal(again, by_mask) and torch.equal(logits(adapted), whole)
    with pytest.raises(UserError, match="adapters cannot be sliced"):
        slice_model(adapted, keep)

    router = {f"{layer.router}.{key}" for layer in moe_layers(model) for key in layer.family.per_expert}
    assert any(name.rpartition(".")[0] in modules or name in parameters for name in router)
    if packed:
        return
    merged = adapted.merge_and_unload()
    assert_close(whole, logits(merged), 1e-4)
    slice_model(merged, keep)
    assert_close(by_mask, logits(merged), 1e-4)


def test_a_router_trained_whole_is_refused():
    model = tiny.build("olmoe")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp.gate"]))
    with pytest.raises(UserError, match="ModulesToSaveWrapper"), masked(adapted, some_kept(adapted)):
        pass


# --- what is refused ---


@pytest.mark.parametrize(
    ("name", "kept", "message"),
    [
        ("olmoe", [3], "would keep 1 experts, but a token goes to 2\nkeep at least 2"),
        ("olmoe", [], "would keep 0 experts"),
        ("olmoe", [0, 1, 8], "has no expert 8\nits experts are 0 to 7"),
        ("olmoe", [-1, 1], "has no expert -1"),
        ("olmoe", [1, 0, 2], "ascending"),
        ("olmoe", [1, 1, 2], "named twice"),
        ("deepseek_v3", [0, 1, 2, 4], "routes by groups of 4 experts and would keep \\[3, 1\\]"),
        ("deepseek_v3", [0, 4], "would keep 1 experts in each group.*\nkeep at least 4"),
    ],
)
def test_what_could_not_run_is_refused(name: str, kept: list[int], message: str):
    model = tiny.build(name)
    keep = {layer.name: kept for layer in moe_layers(model)}
    for refused in (lambda: check_keep(moe_layers(model), keep), lambda: slice_model(model, keep)):
        with pytest.raises(UserError, match=message):
            refused()
    with pytest.raises(UserError, match=message), masked(model, keep):
        pass


def test_an_unknown_layer_is_refused():
    model = tiny.build("olmoe")
    with pytest.raises(UserError, match="no MoE layer is called 'model.layers.9.mlp'\nthe model has model.l"):
        check_keep(moe_layers(model), {"model.layers.9.mlp": [0, 1]})
    with pytest.raises(UserError, match="dense"):
        check_keep([], {"x": [0]})


def test_layers_that_share_weights_lose_the_same():
    model = tiny.build("diffusion_gemma")
    keep = some_kept(model)
    keep["model.decoder.layers.0"] = [0, 1, 2, 3, 4, 5]
    keep["model.encoder.language_model.layers.0"] = [2, 3, 4, 5, 6, 7]
    before = everything(model)
    with pytest.raises(UserError, match="share their weights"):
        slice_model(model, keep)
    assert_same(everything(model), before)


def layer(**changes: Any) -> MoELayer:
    facts = {"name": "a", "router": "a.gate", "experts": "a.experts", "num_experts": 256, "top_k": 8}
    return MoELayer(**(facts | {"n_group": 1, "model_type": "deepseek_v3"} | changes))


def test_minimum_kept():
    assert minimum_kept(layer()) == 8
    assert minimum_kept(layer(n_group=8, topk_group=4)) == 16
    assert minimum_kept(layer(n_group=8, topk_group=2)) == 32
    assert minimum_kept(layer(n_group=2, topk_group=2, top_k=1)) == 4
    kept = [32 * group + expert for group in range(8) for expert in (0, 31)]
    check_keep([layer(n_group=8, topk_group=4)], {"a": kept})
    with pytest.raises(UserError, match="keep at least 32"):
        check_keep([layer(n_group=8, topk_group=2)], {"a": kept})


def test_layers_of_different_configs_may_differ():
    """An image tower with experts of its own beside the text model's."""
    layers = [layer(), layer(name="b"), layer(name="v", num_experts=16, model_type="vision")]
    kept = list(range(100))
    check_keep(layers, {"a": kept, "b": kept})
    with pytest.raises(UserError, match="different numbers of experts: 100 in a, 256 in b"):
        check_keep(layers, {"a": kept})
    check_keep(layers, {"a": kept}, uneven=True)


# --- the config alone ---


def test_resized_config_is_what_a_sliced_model_saves(family: str, model: nn.Module, tmp_path: Path):
    sliced = deepcopy(model)
    slice_model(sliced, some_kept(model))
    config = as_saved(model)
    before = deepcopy(config)
    assert resized_config(config, KEPT) == as_saved(sliced)
    assert config == before


def as_saved(model: nn.Module) -> dict[str, Any]:
    config = deepcopy(model.config)
    config.architectures = [type(model).__name__]
    return json.loads(config.to_json_string())


@pytest.mark.parametrize(
    ("name", "key", "alias"),
    [
        ("qwen3_moe", "num_local_experts", "num_experts"),
        ("deepseek_v3", "n_routed_experts", "num_local_experts"),
    ],
)
def test_resized_config_under_an_alias_or_left_at_its_default(name: str, key: str, alias: str):
    config = as_saved(tiny.build(name))
    config[alias] = config.pop(key)
    assert resized_config(config, KEPT) == config | {alias: KEPT}
    del config[alias]
    assert resized_config(config, 4) == config | {key: 4}
    both = config | {key: 8, alias: 8}
    assert resized_config(both, 4) == config | {key: 4, alias: 4}


def test_resized_config_where_the_text_config_is_left_at_its_defaults():
    config = as_saved(tiny.build("qwen3_vl_moe"))
    config["text_config"].pop("num_local_experts")
    assert resized_config(config, 4)["text_config"] == config["text_config"] | {"num_local_experts": 4}


def test_resized_config_of_a_packed_model(checkpoint: Checkpoint):
    config = as_saved(tiny.build("gemma4")) | {"quantization_config": ExpertsConfig("nf4").to_dict()}
    resized = resized_config(config, 4)
    assert resized["text_config"].pop("num_experts") == 4
    del config["text_config"]["num_experts"]
    assert resized == config


def test_resized_config_says_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch):
    config = as_saved(tiny.build("olmoe"))
    with pytest.raises(UserError, match="1 experts, but a token goes to 2"):
        resized_config(config, 1)
    dense = as_saved(tiny.build("olmoe")) | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    with pytest.raises(UserError, match="llama has no experts"):
        resized_config(dense, 4)
    monkeypatch.setattr("moesmith.models.surgery.CONFIG_COUNTS", ("num_hidden_layers",))
    with pytest.raises(UserError, match="cannot be changed.*num_hidden_layers = 4 gives \\[8\\]"):
        resized_config(config, 4)


@pytest.mark.gpu
def test_a_mask_on_a_gpu_is_the_sliced_model():
    model = tiny.build("gemma4").cuda()
    keep = {layer.name: [0, 2, 3, 5, 7] for layer in moe_layers(model)}
    inputs = {name: tensor.cuda() for name, tensor in tiny.inputs(model).items()}
    with torch.no_grad():
        with masked(model, keep):
            under_mask = model(**inputs).logits
        slice_model(model, keep)
        torch.testing.assert_close(model(**inputs).logits, under_mask, rtol=1e-3, atol=1e-3)
