"""A model run one decoder layer at a time is the model: every family, packed or not, stopped or not."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import dense_models
import tiny
from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.models.layerwise import Layerwise
from moesmith.models.partial import FillStack, _decoder_stack

Checkpoints = Callable[[str], Path]
REFUSED = {"diffusion_gemma"}  # an encoder and a decoder: test_two_stacks

# What only deeper models show: states shared between layers that are not neighbours.
DEEP: dict[str, dict[str, Any]] = {
    # keys and values of layers 2 and 3 are used by 4 to 7
    "gemma4": {
        "text_config.num_hidden_layers": 8,
        "text_config.num_kv_shared_layers": 4,
        "text_config.layer_types": ["sliding_attention", "full_attention"] * 4,
    },
    # every second layer leaves its input to all later ones
    "inkling2": {"text_config.num_hidden_layers": 7, "text_config.n_layers_per_attn_res_block": 2},
    # positions chosen by layer 0 are used by 1 and 2
    "glm_moe_dsa": {
        "num_hidden_layers": 6,
        "indexer_types": ["full", "shared", "shared", "full", "shared", "full"],
    },
    "mistral_large4": {"text_config.num_hidden_layers": 6},
    "zaya": {"num_hidden_layers": 5},
}


def chunks(model: Any) -> list[dict[str, Tensor]]:
    """Two shapes."""
    return [dict(tiny.inputs(model, 2, 24)), dict(tiny.inputs(model, 1, 40))]


def whole(model: Any, stack: str, given: list[dict[str, Tensor]]) -> list[Tensor]:
    """Last hidden states of the model in memory."""
    found: list[Tensor] = []
    owner = model.get_submodule(stack.rpartition(".")[0])
    hook = owner.register_forward_hook(lambda _module, _args, output: found.append(output[0]))
    with torch.no_grad():
        for chunk in given:
            model(**chunk, use_cache=False)
    hook.remove()
    return found


def streamed(model: Layerwise, given: list[dict[str, Tensor]], spool: Path, **more: Any) -> list[Tensor]:
    found: dict[int, Tensor] = {}
    model.run(given, spool, on_output=lambda number, hidden: found.update({number: hidden}), **more)
    return [found[number] for number in range(len(given))]


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def deep_model(family: str, overrides: dict[str, Any], folder: Path, monkeypatch: Any) -> Any:
    """A tiny model with more layers, saved and loaded."""
    depth = next(value for key, value in overrides.items() if key.endswith("num_hidden_layers"))
    monkeypatch.setattr(tiny, "LAYERS", depth)
    monkeypatch.setitem(tiny.OVERRIDES, family, {**tiny.OVERRIDES.get(family, {}), **overrides})
    tiny.save(family, folder)
    return tiny.model_class(family).from_pretrained(folder).eval()


@pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name not in REFUSED])
def test_streamed_is_whole(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    model = tiny.model_class(family).from_pretrained(checkpoint(family)).eval()
    layerwise = Layerwise.open(checkpoint(family))
    given = chunks(model)
    assert_equal(whole(model, layerwise.stack, given), streamed(layerwise, given, tmp_path))


@pytest.mark.parametrize("family", DEEP)
def test_states_shared_between_layers(family: str, tmp_path: Path, monkeypatch: Any) -> None:
    model = deep_model(family, DEEP[family], tmp_path / "model", monkeypatch)
    layerwise = Layerwise.open(tmp_path / "model")
    given = chunks(model)
    held: list[list[int]] = []

    def on_layer(_: int) -> None:
        held.append([int(path.stem[-4:]) for path in sorted((tmp_path / "spool").glob("*.bin"))])

    found = streamed(layerwise, given, tmp_path / "spool", on_layer=on_layer)
    assert_equal(whole(model, layerwise.stack, given), found)
    if family == "gemma4":  # layers 2 and 3 are kept until the last
        assert [layers[:1] for layers in held[3:]] == [[2]] * 5
    elif family == "inkling2":  # what odd layers give enters even ones, and all after them
        assert held[-1] == [1, 3, 5]
    else:
        assert all(len(layers) <= 2 for layers in held)


def test_two_stacks(checkpoint: Checkpoints) -> None:
    with pytest.raises(UserError, match=r"2 stacks .*decoder.*encoder"):
        Layerwise.open(checkpoint("diffusion_gemma"))


def test_a_layer_that_cannot_be_followed_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    """Layer 3 gets what layer 0 gave, and nothing between showed that it would be wanted."""
    model = deep_model("olmoe", {"num_hidden_layers": 4}, tmp_path / "model", monkeypatch)
    layerwise = Layerwise.open(tmp_path / "model")
    layers = layerwise.model.model.layers

    def forward(input_ids: Tensor, **_: Any) -> tuple[Tensor]:
        backbone = layerwise.model.model
        hidden = backbone.embed_tokens(input_ids)
        positions = torch.arange(hidden.shape[1])[None]
        rotary = backbone.rotary_emb(hidden, positions)
        gave = []
        for index, layer in enumerate(layers):
            hidden = layer(hidden + gave[0] if index == 3 else hidden, position_embeddings=rotary)
            gave.append(hidden)
        return (hidden,)

    monkeypatch.setattr(layerwise.model.model, "forward", forward)
    with pytest.raises(UserError, match="layer 3 depends on a layer before"):
        layerwise.run([{"input_ids": torch.arange(8)[None]}], tmp_path / "spool")
    assert model is not None


def test_a_cache_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    layerwise = Layerwise.open(checkpoint("olmoe"))
    chunk = {"input_ids": torch.arange(8)[None]}
    hook = layerwise.model.model.register_forward_pre_hook(
        lambda _module, args, kwargs: (args, kwargs | {"past_key_values": DynamicCache()}), with_kwargs=True
    )
    with pytest.raises(UserError, match="keeps a cache"):
        layerwise.run([chunk], tmp_path)
    hook.remove()


def test_a_change_in_place_is_refused(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """What a dropped layer gave is one zero seen many times: nothing can be added to it."""
    layerwise = Layerwise.open(checkpoint("olmoe"))

    def add(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        args[0].add_(1)

    hooks = [layer.register_forward_pre_hook(add) for layer in layerwise.layers[1:]]
    with pytest.raises(UserError, match="changes what its layers gave.*\nprofile it in memory"):
        layerwise.run([{"input_ids": torch.arange(8)[None]}], tmp_path)
    for hook in hooks:
        hook.remove()


def test_one_layer_at_a_time(checkpoint: Checkpoints, tmp_path: Path) -> None:
    layerwise = Layerwise.open(checkpoint("qwen3_moe"))
    assert layerwise.decoder_layers == ["model.layers.0", "model.layers.1", "model.layers.2"]
    assert layerwise.model.lm_head.weight.is_meta and not layerwise.model.model.embed_tokens.weight.is_meta
    seen = []

    @contextmanager
    def around_layer(number: int, layer: nn.Module) -> Iterator[None]:
        for other, module in enumerate(layerwise.model.model.layers):
            assert all(tensor.is_meta == (other != number) for tensor in module.parameters())
        assert layer is layerwise.model.model.layers[number]
        yield
        seen.append(number)

    layerwise.run([dict(tiny.inputs(layerwise.model))], tmp_path, around_layer=around_layer)
    assert seen == [0, 1, 2]
    assert all(tensor.is_meta for tensor in layerwise.model.model.layers.parameters())


def test_a_layer_is_dropped_whoever_holds_it(checkpoint: Checkpoints) -> None:
    layerwise = Layerwise.open(checkpoint("mixtral"))
    with layerwise.layer(1) as layer:
        assert sum(tensor.nbytes for tensor in layer.parameters()) == layerwise.layer_bytes(1) > 0
    assert not list(layer.parameters())


@pytest.mark.parametrize("scheme, family", [("nf4", "mixtral"), ("nf4", "gpt_oss"), ("int8", "gemma4")])
@pytest.mark.parametrize("on_the_fly", [False, True])
def test_packed(scheme: str, family: str, on_the_fly: bool, checkpoint: Checkpoints, tmp_path: Path) -> None:
    config = ExpertsConfig(scheme, double_quant=scheme == "nf4")
    model = tiny.model_class(family).from_pretrained(checkpoint(family), quantization_config=config).eval()
    if on_the_fly:
        layerwise = Layerwise.open(checkpoint(family), quantization_config=config)
    else:
        model.save_pretrained(tmp_path / "packed")
        layerwise = Layerwise.open(tmp_path / "packed")
    given = chunks(model)
    assert_equal(whole(model, layerwise.stack, given), streamed(layerwise, given, tmp_path / "spool"))


def test_packed_linears(checkpoint: Checkpoints, tmp_path: Path) -> None:
    """bitsandbytes keeps more in a module than its parameters; all of it goes with the layer."""
    config = ExpertsConfig("nf4", linears="nf4")
    model = tiny.model_class("olmoe").from_pretrained(checkpoint("olmoe"), quantization_config=config).eval()
    model.save_pretrained(tmp_path / "packed")
    layerwise = Layerwise.open(tmp_path / "packed")
    given = chunks(model)
    assert_equal(whole(model, layerwise.stack, given), streamed(layerwise, given, tmp_path / "spool"))
    assert all(tensor.is_meta for tensor in layerwise.model.model.layers.parameters())
    assert layerwise.model.model.layers[0].self_attn.q_proj.quant_state is None


@pytest.mark.parametrize("family", ["deepseek_v3", "zaya"])
def test_cast(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """fp32 on disk, bf16 in memory; what an architecture keeps in fp32 stays there."""
    model = tiny.model_class(family).from_pretrained(checkpoint(family), dtype=torch.bfloat16).eval()
    layerwise = Layerwise.open(checkpoint(family), dtype=torch.bfloat16)
    given = chunks(model)
    assert_equal(whole(model, layerwise.stack, given), streamed(layerwise, given, tmp_path))


def test_sharded(tmp_path: Path) -> None:
    model = tiny.build("qwen2_moe")
    model.save_pretrained(tmp_path / "model", max_shard_size="300KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 3
    layerwise = Layerwise.open(tmp_path / "model")
    given = chunks(model)
    assert_equal(whole(model, layerwise.stack, given), streamed(layerwise, given, tmp_path / "spool"))


def test_a_stopped_run_goes_on_at_its_layer(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = checkpoint("mixtral")
    layerwise = Layerwise.open(folder)
    given = chunks(layerwise.model)
    wanted = streamed(layerwise, given, tmp_path / "whole")
    begun: list[int] = []

    @contextmanager
    def around_layer(number: int, _: nn.Module) -> Iterator[None]:
        begun.append(number)
        yield

    def around_chunk(number: int) -> Any:
        if begun == [0, 1] and number == 1:
            raise KeyboardInterrupt
        return contextmanager(lambda: iter([None]))()

    with pytest.raises(KeyboardInterrupt):
        layerwise.run(given, tmp_path / "spool", around_layer, around_chunk)
    again = Layerwise.open(folder)
    assert again.layers_done(given, tmp_path / "spool") == 1
    assert_equal(wanted, streamed(again, given, tmp_path / "spool", around_layer=around_layer))
    assert begun == [0, 1, 1, 2]


# ---------------------------------------------------------------- damaged checkpoints


def copied(folder: Path, out: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    out.mkdir()
    (out / "config.json").write_text((folder / "config.json").read_text())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_a_truncated_shard(tmp_path: Path) -> None:
    tiny.build("mixtral").save_pretrained(tmp_path, max_shard_size="300KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    with open(shard, "r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    with pytest.raises(UserError, match=f"{shard.name} is cut short"):
        Layerwise.open(tmp_path)


def test_a_missing_tensor(checkpoint: Checkpoints, tmp_path: Path) -> None:
    name = "model.layers.1.self_attn.q_proj.weight"
    folder = copied(checkpoint("olmoe"), tmp_path / "model", lambda tensors: tensors.pop(name))
    layerwise = Layerwise.open(folder)
    with pytest.raises(UserError, match=f"has no {name}"):
        layerwise.run([dict(tiny.inputs(layerwise.model))], tmp_path / "spool")


def test_a_missing_expert(checkpoint: Checkpoints, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.7.up_proj.weight"
    folder = copied(checkpoint("olmoe"), tmp_path / "model", lambda tensors: tensors.pop(name))
    layerwise = Layerwise.open(folder)
    with pytest.raises(UserError, match=r"layers\.1\.mlp\.experts\.gate_up_proj"):
        layerwise.run([dict(tiny.inputs(layerwise.model))], tmp_path / "spool")


def test_missing_layers(checkpoint: Checkpoints, tmp_path: Path) -> None:
    folder = copied(checkpoint("olmoe"), tmp_path / "model", lambda _: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    with pytest.raises(UserError, match=r"no tensors for model\.layers\.3 \(2 of 5 layers\)"):
        Layerwise.open(folder)


def test_another_width(checkpoint: Checkpoints, tmp_path: Path) -> None:
    def cut(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.2.mlp.gate.weight"
        tensors[name] = tensors[name][:-1].clone()

    layerwise = Layerwise.open(copied(checkpoint("olmoe"), tmp_path / "model", cut))
    with pytest.raises(
        UserError, match=r"layers\.2\.mlp\.gate\.weight is \[7, 64\], config.json wants \[8, 64\]"
    ):
        layerwise.run([dict(tiny.inputs(layerwise.model))], tmp_path / "spool")


def test_fill_stack_is_stack_and_join() -> None:
    gates, ups = [list(torch.randn(3, 4, 5)) for _ in range(2)]
    wanted = torch.stack([torch.cat(pair) for pair in zip(gates, ups, strict=True)])
    given = {"up": list(ups), "gate": list(gates)}
    assert torch.equal(FillStack().convert(given, ["gate", "up"], ["both"])["both"], wanted)
    with pytest.raises(ValueError, match=r"\[3, 2\] matrices for both"):
        FillStack().convert({"gate": gates, "up": ups[:2]}, ["gate", "up"], ["both"])


# ---------------------------------------------------------------- dense models and the head


@pytest.mark.parametrize("family", dense_models.FAMILIES)
def test_dense(family: str, tmp_path: Path) -> None:
    model = dense_models.load(dense_models.save(family, tmp_path / "model"))
    layerwise = Layerwise.open(tmp_path / "model")
    given = [{"input_ids": torch.randint(3, 90, shape)} for shape in ((2, 24), (1, 40))]
    assert_equal(whole(model, layerwise.stack, given), streamed(layerwise, given, tmp_path / "spool"))


def test_a_tower_with_gated_ffns_is_not_the_text() -> None:
    shape = dense_models.SHAPE
    config = LlavaConfig(
        text_config={**shape, "model_type": "mistral"}, vision_config={**shape, "model_type": "llama"}
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    assert _decoder_stack(model) == "model.language_model.layers"


def test_no_layers_that_we_know() -> None:
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=97)
    with torch.device("meta"), pytest.raises(UserError, match="no MoE layers, nor .* FFN `mlp` of gate_proj"):
        _decoder_stack(GPT2LMHeadModel(config))


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3"])
def test_logits_of_the_head(family: str, tmp_path: Path) -> None:
    """Stored and tied; with a cap in Gemma 2."""
    model = dense_models.load(dense_models.save(family, tmp_path / "model"))
    layerwise = Layerwise.open(tmp_path / "model")
    ids = torch.randint(3, 90, (1, 24))
    hidden = streamed(layerwise, [{"input_ids": ids}], tmp_path / "spool")[0]
    with layerwise.head() as logits, torch.no_grad():
        assert torch.equal(logits(hidden), model(input_ids=ids).logits)
    assert layerwise.model.lm_head.weight.is_meta


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss", "gemma4", "deepseek_v3"])
def test_logits_of_the_head_of_a_moe(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    """Its classes ask what the decoder gave for more than hidden states."""
    layerwise = Layerwise.open(checkpoint(family))
    model = type(layerwise.model).from_pretrained(checkpoint(family)).eval()
    inputs = dict(tiny.inputs(model, 1, 24))
    hidden = streamed(layerwise, [inputs], tmp_path / "spool")[0]
    with layerwise.head() as logits, torch.no_grad():
        assert torch.equal(logits(hidden), model(**inputs).logits)
