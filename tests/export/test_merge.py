"""A merged checkpoint is the model with its adapter running, and is laid out like the architecture's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from chats import tokenizer
from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.experts import lora as lora_seam
from moesmith.experts.storage import named_experts, stack, weight_names
from moesmith.export.merge import merge_checkpoint, merged_bytes
from moesmith.models.checkpoint import RECORD
from moesmith.models.headers import read_headers
from moesmith.models.layers import PLACEMENTS, adapter_targets, moe_layers
from moesmith.models.rewrite import rewrite_checkpoint

Checkpoint = Callable[[str], Path]

# On disk: experts apart, joined, transposed, interleaved, with biases; tied embeddings; a class of ours;
# towers beside the text; no gate.
SAMPLE = (
    "gemma2_moe", "gemma4", "gpt_oss", "granitemoe", "inkling", "lfm2_moe", "mixtral",
    "nemotron_h", "olmoe", "qwen3_vl_moe",
)  # fmt: skip
# Their linear attention, and a norm after the experts, make more of the last bit of a sum.
LOOSE = {"muse_spark": 5e-5, "qwen3_5_moe": 2e-4, "qwen3_next": 2e-4}
REST = [family for family in tiny.FAMILIES if family not in SAMPLE]


def load(family: str, folder: Path, config: ExpertsConfig | None = None, **options: Any) -> nn.Module:
    """In fp32, every tensor found and none left over."""
    options = {"dtype": torch.float32, "quantization_config": config} | options
    model, info = tiny.model_class(family).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = (
            tensor.data.clone()
        )  # a mapped tensor may start where a CPU kernel sums in another order
    return model.eval()


def dequantised(family: str, folder: Path, packed: nn.Module) -> nn.Module:
    """The stock model of the numbers that the packed one stands for."""
    model = load(family, folder)
    for (_, ours), (_, theirs) in zip(named_experts(packed), named_experts(model), strict=True):
        for name in weight_names(theirs):
            getattr(theirs, name).data.copy_(stack(ours, name).dense(torch.float32))
    return model


def everywhere(model: nn.Module) -> list[str]:
    """Placements that adapters work on."""
    found = []
    for placement in PLACEMENTS:
        try:
            adapter_targets(model, [*found, placement])
        except UserError:
            continue
        found.append(placement)
    return found


def adapter(
    model: nn.Module, out: Path, placements: Sequence[str], seed: int = 1, scale: float = 0.05, **options: Any
) -> PeftModel:
    """An adapter that changes the model's output, on the model and saved to `out`."""
    modules, parameters = adapter_targets(model, placements)
    options = {"r": 4, "lora_alpha": 8} | options
    made = get_peft_model(
        model, LoraConfig(target_modules=modules, target_parameters=parameters or None, **options)
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in made.named_parameters():
        if ".lora_" in name:
            size = parameter.shape[-1] ** -0.5 if "lora_A" in name else scale
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * size)
    made.save_pretrained(out)
    return made


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    plain = model.get_base_model() if isinstance(model, PeftModel) else model
    return model(**tiny.inputs(plain)).logits


def near(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Largest difference, in standard deviations of what is expected; of one token in a hundred, a router
    may be so undecided that the last bit of a sum gives it other experts."""
    off = (actual - expected).abs().amax(-1).flatten() / expected.std()
    assert float(off.kthvalue(len(off) - len(off) // 100).values) <= tolerance


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    return {name: header.shape for name, header in read_headers(folder).items()}


def stored(folder: Path) -> dict[str, tuple[str, bytes]]:
    """Every tensor's dtype and bytes."""
    return {
        name: (header.dtype, (folder / header.file).read_bytes()[header.start : header.end])
        for name, header in read_headers(folder).items()
    }


def merge(source: Path, adapters: Sequence[Path], out: Path, **options: Any) -> Any:
    out.mkdir()
    return merge_checkpoint(source, adapters, out, **options)


def check_the_laws(family: str, folder: Path, tmp: Path) -> None:
    placements = everywhere(tiny.build(family))
    packed = load(family, folder, ExpertsConfig("nf4"))
    packed.save_pretrained(tmp / "packed")
    plain = dequantised(family, folder, packed)

    # no adapter: the dequantised model, bit for bit
    merge(tmp / "packed", [], tmp / "alone", dtype="float32")
    again, wanted = load(family, tmp / "alone").state_dict(), plain.state_dict()
    assert again.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(again[name], wanted[name])] == []
    assert shapes(tmp / "alone") == shapes(folder)  # what a stock save_pretrained wrote
    # in 16 bits: what the stock class saves, tensor by tensor, also where it keeps 32
    stock = load(family, folder, dtype=torch.bfloat16)
    stock.save_pretrained(tmp / "stock")
    merge(folder, [], tmp / "halved")
    assert stored(tmp / "halved") == stored(tmp / "stock")
    if not placements:
        return

    running = adapter(packed, tmp / "adapter", placements)
    both = logits(running)
    assert float((both - logits(plain)).abs().max() / both.std()) > 1e-2
    report = merge(tmp / "packed", [tmp / "adapter"], tmp / "merged", dtype="float32")
    assert shapes(tmp / "merged") == shapes(folder)
    assert report.changed == report.targeted and set(placements) == report.targeted.keys()
    assert not report.unchanged and not report.zero and not report.left
    merged = load(family, tmp / "merged")
    near(logits(merged), both, LOOSE.get(family, 1e-5))

    lora_seam.unregister()
    try:  # PEFT's own wrapper from here on
        stock = PeftModel.from_pretrained(deepcopy(plain), tmp / "adapter").merge_and_unload()
        states = stock.state_dict()
        for name, tensor in merged.state_dict().items():
            torch.testing.assert_close(tensor, states[name], rtol=1e-5, atol=1e-6, msg=name)
        # a 16-bit source, here 32 bits: the same adapter on the numbers before packing
        stock = PeftModel.from_pretrained(load(family, folder), tmp / "adapter").merge_and_unload()
        states = stock.state_dict()
    finally:
        lora_seam.register()
    report = merge(folder, [tmp / "adapter"], tmp / "from_floats", dtype="float32")
    assert report.changed == report.targeted and shapes(tmp / "from_floats") == shapes(folder)
    for name, tensor in load(family, tmp / "from_floats").state_dict().items():
        torch.testing.assert_close(tensor, states[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("family", SAMPLE)
def test_merged_is_the_adapter_running_is_peft(family: str, checkpoint: Checkpoint, tmp_path: Path):
    check_the_laws(family, checkpoint(family), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", REST)
def test_merged_is_the_adapter_running_is_peft_everywhere(
    family: str, checkpoint: Checkpoint, tmp_path: Path
):
    check_the_laws(family, checkpoint(family), tmp_path)


# ---------------------------------------------------------------- sources


@pytest.fixture(scope="module")
def olmoe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny OLMoE in bf16, with a tokenizer."""
    folder = tmp_path_factory.mktemp("olmoe")
    tiny.build("olmoe", dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def lora(olmoe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    adapter(load("olmoe", olmoe), folder, ["experts", "attention", "router"])
    return folder


PACKED = [
    {"scheme": "int8"},
    {"scheme": "nf4", "double_quant": True, "linears": "nf4"},
    {"scheme": "fp8", "linears": "int8"},
    {"scheme": "bf16", "linears": "nf4"},
]


@pytest.mark.parametrize("packing", PACKED, ids=lambda packing: "-".join(map(str, packing.values())))
@pytest.mark.filterwarnings("ignore")
def test_every_packing_becomes_the_numbers_it_stands_for(
    olmoe: Path, lora: Path, tmp_path: Path, packing: dict[str, Any]
):
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    packed = load("olmoe", olmoe, ExpertsConfig(**packing), dtype=torch.bfloat16)
    packed.save_pretrained(tmp_path / "packed")
    merge(tmp_path / "packed", [], tmp_path / "alone")
    merge(tmp_path / "packed", [], tmp_path / "alone32", dtype="float32")
    merge(tmp_path / "packed", [lora], tmp_path / "merged", dtype="float32")
    assert shapes(tmp_path / "merged") == shapes(olmoe)
    alone = load("olmoe", tmp_path / "alone", dtype=torch.bfloat16)
    for (_, ours), (_, theirs) in zip(named_experts(packed), named_experts(alone), strict=True):
        for name in weight_names(theirs):
            assert torch.equal(getattr(theirs, name), stack(ours, name).dense(torch.bfloat16))
    for name, module in packed.named_modules():
        if type(module).__name__ in ("Linear4bit", "Linear8bitLt"):
            wanted = dequantize_bnb_weight(module.weight, module.state if hasattr(module, "state") else None)
            assert torch.equal(alone.get_submodule(name).weight, wanted.to(torch.bfloat16))
    lora_seam.unregister()
    try:
        stock = PeftModel.from_pretrained(load("olmoe", tmp_path / "alone32"), lora).merge_and_unload()
    finally:
        lora_seam.register()
    merged = load("olmoe", tmp_path / "merged").state_dict()
    for name, tensor in stock.state_dict().items():
        torch.testing.assert_close(merged[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_one_rounding(checkpoint: Checkpoint, tmp_path: Path):
    """From 32 bits to 16: base + update in 32, then rounded."""
    folder = checkpoint("olmoe")
    adapter(load("olmoe", folder), tmp_path / "lora", ["experts", "attention"])
    merge(folder, [tmp_path / "lora"], tmp_path / "exact", dtype="float32")
    merge(folder, [tmp_path / "lora"], tmp_path / "rounded")
    exact, rounded = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "rounded"))
    assert all(torch.equal(rounded[name], exact[name].to(torch.bfloat16)) for name in exact)
    assert json.loads((tmp_path / "rounded/config.json").read_text())["dtype"] == "bfloat16"


def test_several_adapters_are_their_sum(olmoe: Path, lora: Path, tmp_path: Path):
    other = load("olmoe", olmoe)
    adapter(other, tmp_path / "other", ["attention"], seed=7, r=2, lora_alpha=3, use_rslora=True)
    for name, adapters in {"a": [lora], "b": [tmp_path / "other"], "ab": [lora, tmp_path / "other"]}.items():
        merge(olmoe, adapters, tmp_path / name, dtype="float32")
    base, a, b, both = (
        load_file(folder / "model.safetensors")
        for folder in (olmoe, tmp_path / "a", tmp_path / "b", tmp_path / "ab")
    )
    for name in base:
        torch.testing.assert_close(both[name], a[name] + b[name] - base[name].float(), rtol=1e-6, atol=1e-6)
    assert any(not torch.equal(both[name], a[name]) for name in base)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_pruned_model(family: str, checkpoint: Checkpoint, tmp_path: Path):
    folder = checkpoint(family)
    keep = {layer.name: [0, 2, 3, 6, 7] for layer in moe_layers(tiny.build(family))}
    (tmp_path / "pruned").mkdir()
    rewrite_checkpoint(folder, tmp_path / "pruned", keep)
    packed = load(family, tmp_path / "pruned", ExpertsConfig("nf4"))
    packed.save_pretrained(tmp_path / "packed")
    both = logits(adapter(packed, tmp_path / "lora", ["experts", "attention"]))
    merge(tmp_path / "packed", [tmp_path / "lora"], tmp_path / "merged", dtype="float32")
    assert shapes(tmp_path / "merged") == shapes(tmp_path / "pruned")
    near(logits(load(family, tmp_path / "merged")), both)
    with pytest.raises(UserError, match="does not fit the model: on .*gate_up_proj it is for"):
        merge(folder, [tmp_path / "lora"], tmp_path / "wrong")


def test_shards_and_the_bytes_said_before(olmoe: Path, lora: Path, tmp_path: Path):
    counted: list[int] = []
    merge(olmoe, [lora], tmp_path / "one")
    report = merge(olmoe, [lora], tmp_path / "many", shard_bytes=300_000, on_bytes=counted.append)
    files = sorted(tmp_path.glob("many/*.safetensors"))
    assert len(files) == report.shards > 3 and sum(counted) == report.bytes
    one, many = load("olmoe", tmp_path / "one"), load("olmoe", tmp_path / "many")
    assert all(torch.equal(tensor, many.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert merged_bytes(olmoe) == (tmp_path / "one/model.safetensors").stat().st_size
    assert merged_bytes(olmoe, "float32") > 1.99 * merged_bytes(olmoe)
    layer = sum(t.numel() for n, t in one.state_dict().items() if n.startswith("model.layers.0."))
    assert report.layer_bytes == 4 * layer


# ---------------------------------------------------------------- tied weights, and what is not there


def small(tmp: Path, **config: Any) -> Path:
    """A tiny mixtral whose tensors can be edited."""
    made = tiny.config("mixtral")
    for name, value in config.items():
        setattr(made, name, value)
    tiny.model_class("mixtral")(made).save_pretrained(tmp)
    return tmp


def edit(folder: Path, **changes: Any) -> dict[str, Tensor]:
    """Add, replace or (None) remove tensors; dots are written `__`."""
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del tensors[name]
        else:
            tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return tensors


def test_tied_weights_stay_tied_and_untied_ones_apart(tmp_path: Path):
    source = small(tmp_path / "tied", tie_word_embeddings=True)
    assert "lm_head.weight" not in shapes(source)
    merge(source, [], tmp_path / "a", dtype="float32")
    assert stored(tmp_path / "a") == stored(source)

    # written by a program that stores both, the same
    embedding = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    edit(source, lm_head__weight=embedding.clone())
    merge(source, [], tmp_path / "b", dtype="float32")
    assert stored(tmp_path / "b") == stored(tmp_path / "a")

    # both, and not the same: transformers does not tie them, whatever the config says
    edit(source, lm_head__weight=embedding + 1)
    merge(source, [], tmp_path / "c", dtype="float32")
    assert stored(tmp_path / "c") == stored(source)

    # the head alone
    edit(source, lm_head__weight=embedding.clone(), model__embed_tokens__weight=None)
    merge(source, [], tmp_path / "d", dtype="float32")
    assert stored(tmp_path / "d") == stored(tmp_path / "a")


def test_an_adapter_on_a_tied_weight_is_refused(tmp_path: Path):
    source = small(tmp_path / "tied", tie_word_embeddings=True)
    model = get_peft_model(load("mixtral", source), LoraConfig(target_modules=["lm_head"]))
    model.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    with pytest.raises(UserError, match="lm_head.weight, which is one tensor with another"):
        merge(source, [tmp_path / "lora"], tmp_path / "out")
    untied = small(tmp_path / "untied")
    report = merge(untied, [tmp_path / "lora"], tmp_path / "out2", dtype="float32")
    assert report.targeted == {"other": 1} and report.zero == ["lm_head.weight"]


def test_tensors_that_the_class_does_not_load_are_named(tmp_path: Path):
    source = small(tmp_path / "source")
    edit(source, mtp__head__weight=torch.ones(2, 2))
    report = merge(source, [], tmp_path / "out")
    assert report.left == ["mtp.head.weight"] and "mtp.head.weight" not in shapes(tmp_path / "out")


def test_a_checkpoint_with_a_tensor_missing_or_of_another_shape(tmp_path: Path):
    source = small(tmp_path / "source")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    tensors = edit(source)
    edit(source, **{name.replace(".", "__"): tensors[name][:2].clone()})
    with pytest.raises(UserError, match=r"experts.3.w2.weight is \[2, 128\], config.json wants \[64, 128\]"):
        merge(source, [], tmp_path / "a")
    edit(source, **{name.replace(".", "__"): None})
    with pytest.raises(UserError, match="has no model.layers.1.block_sparse_moe.experts.3.w2.weight"):
        merge(source, [], tmp_path / "b")


@pytest.mark.parametrize("cut", [2, slice(0, 5)], ids=["columns", "experts"])
def test_a_packed_stack_of_another_shape(olmoe: Path, lora: Path, tmp_path: Path, cut: Any):
    load("olmoe", olmoe, ExpertsConfig("nf4"), dtype=torch.bfloat16).save_pretrained(tmp_path / "packed")
    for name in ("gate_up_proj", "gate_up_proj_absmax"):
        key = f"model.layers.1.mlp.experts.{name}"
        tensor = load_file(tmp_path / "packed/model.safetensors")[key]
        tensor = tensor[cut] if isinstance(cut, slice) else tensor.repeat(1, 1, cut)
        edit(tmp_path / "packed", **{key.replace(".", "__"): tensor.contiguous()})
    with pytest.raises(UserError, match=r"layers.1.mlp.experts.gate_up_proj is \[.*, config.json wants"):
        merge(tmp_path / "packed", [lora], tmp_path / "out")


# ---------------------------------------------------------------- what is said


def test_updates_that_are_zero_or_too_small_are_named(olmoe: Path, tmp_path: Path):
    model = adapter(load("olmoe", olmoe), tmp_path / "lora", ["attention"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layers.0.self_attn.q_proj.lora_B" in name:
                parameter.zero_()
            if "layers.1.self_attn.k_proj.lora_B" in name:
                parameter.mul_(1e-7)
    model.save_pretrained(tmp_path / "lora")
    report = merge(olmoe, [tmp_path / "lora"], tmp_path / "out")
    assert report.zero == ["model.layers.0.self_attn.q_proj.weight"]
    assert report.unchanged == ["model.layers.1.self_attn.k_proj.weight"]
    assert report.targeted == {"attention": 12} and report.changed == {"attention": 10}
    assert not merge(olmoe, [tmp_path / "lora"], tmp_path / "exact", dtype="float32").unchanged


def test_what_cannot_be_merged_is_refused_before_a_byte_is_written(
    olmoe: Path, lora: Path, checkpoint: Checkpoint, tmp_path: Path
):
    def refused(match: str, source: Path = olmoe, adapter: Path = lora, **options: Any) -> None:
        (out := tmp_path / match.replace("/", "")).mkdir()
        with pytest.raises(UserError, match=match):
            merge_checkpoint(source, [adapter], out, **options)
        assert not list(out.iterdir())

    refused("dtype=int8, wanted bfloat16", dtype="int8")
    refused("holds no adapter", adapter=olmoe)
    refused("holds an adapter, not a model", source=lora)
    refused("which has no model.layers.0.mlp.experts", source=checkpoint("deepseek_v3"))

    def edited(name: str, **changes: Any) -> Path:
        (folder := tmp_path / name).mkdir()
        config = json.loads((lora / "adapter_config.json").read_text()) | changes
        (folder / "adapter_config.json").write_text(json.dumps(config))
        tensors = load_file(lora / "adapter_model.safetensors")
        if name == "nan":
            key = next(key for key in tensors if "layers.1.mlp.experts.lora_B" in key)
            tensors[key][0, 0] = torch.nan
        save_file(tensors, folder / "adapter_model.safetensors")
        return folder

    refused("layers.1.mlp.experts.down_proj are not finite", adapter=edited("nan"))
    refused("use_dora=True", adapter=edited("dora", use_dora=True))
    (foreign := tmp_path / "foreign").mkdir()
    config = json.loads((olmoe / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8"}
    (foreign / "config.json").write_text(json.dumps(config))
    (foreign / "model.safetensors").symlink_to(olmoe / "model.safetensors")
    refused("is quantised by fp8", source=foreign)
    with pytest.raises(UserError, match="holds weights already"):
        merge_checkpoint(olmoe, [lora], olmoe)


def test_a_sum_that_overflows_is_refused(olmoe: Path, tmp_path: Path):
    adapter(load("olmoe", olmoe), tmp_path / "lora", ["attention"], scale=1e5)
    with pytest.raises(UserError, match="values with the adapter added are not finite in float16"):
        merge(olmoe, [tmp_path / "lora"], tmp_path / "out", dtype="float16")


# ---------------------------------------------------------------- beside the weights


def test_config_and_tokenizer(olmoe: Path, lora: Path, tmp_path: Path):
    packed = load("olmoe", olmoe, ExpertsConfig("nf4"))
    packed.save_pretrained(source := tmp_path / "packed")
    tokenizer().save_pretrained(source)
    (source / "LICENSE").write_text("free")
    (source / "README.md").write_text("another model")
    (source / RECORD).write_text("{}")
    merge(source, [lora], tmp_path / "plain")
    names = {path.name for path in (tmp_path / "plain").iterdir()}
    assert {"LICENSE", "tokenizer.json", "generation_config.json", "chat_template.jinja"} <= names
    assert not {"README.md", RECORD} & names
    config = json.loads((tmp_path / "plain/config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "bfloat16"

    # the adapter's own template goes over the model's; its tokenizer too
    for file in lora.iterdir():
        (tmp_path / "own").mkdir(exist_ok=True)
        (tmp_path / "own" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "own/chat_template.jinja").write_text("{{ mine }}")
    merge(source, [tmp_path / "own"], tmp_path / "b")
    assert (tmp_path / "b/chat_template.jinja").read_text() == "{{ mine }}"
    assert (tmp_path / "b/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    (tmp_path / "own/tokenizer.json").write_text("{}")
    merge(source, [tmp_path / "own"], tmp_path / "c")
    assert (tmp_path / "c/tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "c/tokenizer_config.json").exists()  # half of two tokenizers is none
    assert (tmp_path / "c/generation_config.json").is_file()
