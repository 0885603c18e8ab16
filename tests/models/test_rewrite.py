"""Checkpoints with fewer experts, on disk: the same model as one cut in memory, in every family."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import tiny
from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.models import ranges, rewrite
from moesmith.models.anatomy import meta_model
from moesmith.models.hash_tables import cut_expert_ids
from moesmith.models.headers import INDEX, SINGLE, read_headers
from moesmith.models.layers import expert_id_tensors, moe_layers, per_expert_tensors
from moesmith.models.rewrite import plan_tensors, result_bytes, rewrite_checkpoint
from moesmith.models.surgery import Keep, slice_model

PACKED = ("gpt_oss", "deepseek_v3", "gemma4", "mixtral", "olmoe", "qwen3_moe", "qwen3_vl_moe", "aria",
          "ernie4_5_vl_moe", "nemotron_h", "lfm2_moe", "diffusion_gemma")  # fmt: skip

Checkpoints = Callable[[str], Path]
NUMBERED = re.compile(r"(.*experts)\.(\d+)\.(.*)")


def choice(model: nn.Module) -> Keep:
    """Other experts in every layer, not the first ones, half of each group; 5 of 8 without groups."""
    keep = {}
    for layer in moe_layers(model):
        number = int(re.findall(r"\d+", layer.name)[-1]) + ("vision" in layer.name)
        if layer.n_group > 1:
            keep[layer.name] = [[1, 2, 4, 7], [0, 3, 5, 6], [2, 3, 4, 5]][number % 3]
        else:
            keep[layer.name] = [[1, 2, 4, 5, 7], [0, 3, 4, 6, 7], [2, 3, 4, 5, 6]][number % 3]
    return keep


def load(family: str, folder: Path, **kwargs: Any) -> nn.Module:
    model, info = tiny.model_class(family).from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32, **kwargs
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(**tiny.inputs(model)).logits


def expected(model: nn.Module, keep: Keep) -> dict[str, torch.Tensor]:
    """The state of the cut model, by plain indexing."""
    state = dict(model.state_dict())
    for layer in moe_layers(model):
        kept = keep[layer.name]
        for name, dim in per_expert_tensors(model, layer).items():
            if name in state:
                rows = [*kept, *range(layer.num_experts, state[name].shape[dim])]
                state[name] = state[name].index_select(dim, torch.tensor(rows))
        for name in expert_id_tensors(model, layer):
            ids = cut_expert_ids(state[name].numpy(), kept, layer.num_experts)
            state[name] = torch.from_numpy(ids)
    return state


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def cut(source: Path, out: Path, keep: Keep, **kwargs: Any) -> rewrite.Rewritten:
    out.mkdir(exist_ok=True)
    return rewrite_checkpoint(source, out, keep, **kwargs)


def check(family: str, source: Path, out: Path) -> None:
    """The cut checkpoint is the original with its tensors indexed, and answers like one cut in memory."""
    original = load(family, source)
    keep = choice(original)
    wanted = expected(original, keep)
    counted: list[int] = []
    done = cut(source, out, keep, on_bytes=counted.append)
    smaller = load(family, out)
    assert_same(smaller.state_dict(), wanted)
    slice_model(original, keep)
    # Not bit for bit: tensors of a memory map start at other addresses, and products round by alignment.
    assert float((logits(smaller) - logits(original)).abs().max()) <= 1e-5
    assert done.nbytes == sum(counted) == sum(header.nbytes for header in read_headers(out).values())
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in read_headers(out):
        if match := NUMBERED.match(name):
            numbers.setdefault((match.group(1), match.group(3)), set()).add(int(match.group(2)))
    assert all(found == set(range(len(found))) for found in numbers.values()), "numbers without gaps"
    assert done.nbytes < done.source_bytes and done.heads == [] and done.left == []


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_family(family: str, checkpoint: Checkpoints, tmp_path: Path):
    check(family, checkpoint(family), tmp_path / "out")


def pack(family: str, source: Path, out: Path) -> Path:
    model = tiny.model_class(family).from_pretrained(
        source, quantization_config=ExpertsConfig("nf4", double_quant=True), dtype=torch.float32
    )
    model.save_pretrained(out)
    return out


def check_packed(family: str, checkpoint: Checkpoints, tmp_path: Path) -> None:
    check(family, pack(family, checkpoint(family), tmp_path / "packed"), tmp_path / "out")


@pytest.mark.parametrize("family", PACKED)
def test_packed(family: str, checkpoint: Checkpoints, tmp_path: Path):
    check_packed(family, checkpoint, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family in tiny.FAMILIES if family not in PACKED])
def test_packed_in_every_other_family(family: str, checkpoint: Checkpoints, tmp_path: Path):
    check_packed(family, checkpoint, tmp_path)


# --- layouts ---


def first_layer(model: nn.Module) -> Keep:
    """The same choice everywhere, for tests that look at single tensors."""
    return {layer.name: [1, 2, 4, 7] for layer in moe_layers(model)}


def meta(folder: Path) -> nn.Module:
    return meta_model(json.loads((folder / "config.json").read_text()))


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen2_moe", "granitemoe", "inkling2"])
def test_checkpoints_saved_with_names_of_memory(family: str, tmp_path: Path):
    """`save_original_format=False` writes stacks where the published checkpoint has a tensor per expert."""
    tiny.build(family).save_pretrained(tmp_path / "in", save_original_format=False)
    check(family, tmp_path / "in", tmp_path / "out")


def test_qwen3_vl_stacks_stored_transposed(tmp_path: Path):
    tiny.build("qwen3_vl_moe").save_pretrained(tmp_path / "in")
    file = tmp_path / "in" / SINGLE
    tensors = {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor
        for name, tensor in load_file(file).items()
    }
    save_file(tensors, file, metadata={"format": "pt"})
    check("qwen3_vl_moe", tmp_path / "in", tmp_path / "out")


@pytest.mark.parametrize("family", ["gemma4", "mixtral", "ernie4_5_vl_moe"])
def test_shards_in_and_out(family: str, tmp_path: Path):
    source, out = tmp_path / "in", tmp_path / "out"
    tiny.build(family).save_pretrained(source, max_shard_size="100KB")
    keep = choice(meta(source))
    done = cut(source, out, keep, shard_bytes=60_000)
    sizes = {name: sum(h.nbytes for h in read_headers(out).values() if h.file == name) for name in done.files}
    assert len(done.files) > 4 and sorted(path.name for path in out.glob("*.safetensors")) == done.files
    index = json.loads((out / INDEX).read_text())
    assert index["metadata"]["total_size"] == done.nbytes == sum(sizes.values())
    whole = tmp_path / "whole"
    cut(source, whole, keep)
    assert_same(load(family, out).state_dict(), load(family, whole).state_dict())
    biggest = max(header.nbytes for header in read_headers(out).values())
    assert max(sizes.values()) <= max(60_000, biggest)


def test_files_are_as_safetensors_wants_them(checkpoint: Checkpoints, tmp_path: Path):
    """Aligned, without gaps, header padded, metadata kept; dtypes of several widths."""
    source = tmp_path / "in"
    shutil.copytree(checkpoint("deepseek_v4"), source)
    tensors = load_file(source / SINGLE)
    tensors = {name: t.bfloat16() if "experts" in name else t for name, t in tensors.items()}
    tensors["a_mask"] = torch.ones(3, dtype=torch.bool)
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    cut(source, tmp_path / "out", choice(meta(source)))
    file = tmp_path / "out" / SINGLE
    headers = sorted(read_headers(tmp_path / "out").values(), key=lambda header: header.start)
    width = {"I64": 8, "F32": 4, "BF16": 2, "BOOL": 1}
    assert {header.dtype for header in headers} == set(width)
    assert [h.end for h in headers] == [*(h.start for h in headers[1:]), file.stat().st_size]
    assert all(header.start % width[header.dtype] == 0 for header in headers) and headers[0].start % 64 == 0
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


def test_an_uncut_layer_stays_and_an_uncut_model_is_a_copy(checkpoint: Checkpoints, tmp_path: Path):
    source = checkpoint("olmoe")
    done = cut(source, tmp_path / "out", {})
    assert done.counts == {"copied": len(read_headers(source)), "cut": 0, "renumbered": 0, "dropped": 0,
                           "remapped": 0}  # fmt: skip
    assert_same(load("olmoe", tmp_path / "out").state_dict(), load("olmoe", source).state_dict())


def test_only_the_text_model_of_a_model_with_two(checkpoint: Checkpoints, tmp_path: Path):
    """qwen3_omni_moe: the thinker is cut, config and weights of towers stay."""
    source = checkpoint("qwen3_omni_moe")
    keep = first_layer(meta(source))
    cut(source, tmp_path / "out", keep)
    before, after = (
        json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out")
    )
    assert after["text_config"]["num_experts"] == 4
    assert {k: v for k, v in after.items() if k != "text_config"} == {
        k: v for k, v in before.items() if k != "text_config"
    }
    old, new = load_file(source / SINGLE), load_file(tmp_path / "out" / SINGLE)
    towers = [name for name in old if "visual" in name or "audio" in name]
    assert towers and all(torch.equal(new[name], old[name]) for name in towers)


# --- heads: experts on disk that the model does not load ---


def with_head(source: Path, folder: Path, old: str, new: str, router: torch.Tensor) -> Path:
    """A copy of a checkpoint with another layer, made of a layer it has."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / SINGLE)
    head = {name.replace(old, new, 1): t.clone() for name, t in tensors.items() if name.startswith(old)}
    gate = next(name for name in head if name.endswith(("mlp.gate.weight", "ffn.gate.weight")))
    assert head[gate].shape == router.shape
    save_file(tensors | head | {gate: router}, folder / SINGLE, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("deepseek_v3", "model.layers.2.", "model.layers.61."),
        ("glm4_moe", "model.layers.2.", "model.layers.46."),
        ("qwen3_next", "model.layers.1.", "mtp.layers.0."),
        ("hy_v4", "model.layers.2.", "model.layers.3."),
        ("deepseek_v4", "model.layers.2.", "mtp.0."),
    ],
)
def test_heads_keep_the_experts_with_the_largest_router_rows(
    family: str, old: str, new: str, checkpoint: Checkpoints, tmp_path: Path
):
    router = torch.randn(8, tiny.HIDDEN, generator=torch.Generator().manual_seed(1))
    router *= torch.tensor([9.0, 8, 7, 6, 1, 3, 2, 4])[:, None]
    source = with_head(checkpoint(family), tmp_path / "in", old, new, router)
    model = meta(source)
    grouped = moe_layers(model)[0].n_group == 2
    wanted = [0, 1, 5, 7] if grouped else [0, 1, 2, 3, 7]
    done = cut(source, tmp_path / "out", choice(model))
    assert [head.kept for head in done.heads] == [wanted]
    assert done.heads[0].name.startswith(new.rstrip("."))
    before, after = load_file(source / SINGLE), load_file(tmp_path / "out" / SINGLE)
    names = {name for name in before if name.startswith(new)}
    for name in names:
        match = NUMBERED.match(name)
        if match and int(match.group(2)) in wanted:
            place = f"{match.group(1)}.{wanted.index(int(match.group(2)))}.{match.group(3)}"
            assert torch.equal(after.pop(place), before[name])
        elif not match:
            tensor = before[name]
            per_expert = name.rpartition("mlp.")[2].startswith(("gate.", "experts."))
            per_expert |= name.rpartition("ffn.")[2].startswith("gate.")
            assert torch.equal(after.pop(name), tensor[wanted] if per_expert else tensor), name
    assert not [name for name in after if name.startswith(new)]


def test_a_head_without_a_router_is_refused(checkpoint: Checkpoints, tmp_path: Path):
    source = with_head(
        checkpoint("deepseek_v3"), tmp_path / "in", "model.layers.2.", "mtp.0.", torch.zeros(8, tiny.HIDDEN)
    )
    tensors = load_file(source / SINGLE)
    del tensors["mtp.0.mlp.gate.weight"]
    save_file(tensors, source / SINGLE, metadata={"format": "pt"})
    with pytest.raises(UserError, match="mtp.0.mlp has experts but no router"):
        plan_tensors(source, choice(meta(source)))


def test_experts_of_another_number_are_left_whole(checkpoint: Checkpoints, tmp_path: Path):
    source = tmp_path / "in"
    shutil.copytree(checkpoint("qwen3_moe"), source)
    tensors = load_file(source / SINGLE)
    extra = {f"draft.mlp.experts.{i}.up_proj.weight": torch.ones(2, 2) for i in range(3)}
    save_file(tensors | extra, source / SINGLE, metadata={"format": "pt"})
    done = cut(source, tmp_path / "out", choice(meta(source)))
    assert done.left == ["draft.mlp"] and done.heads == []
    assert extra.keys() <= read_headers(tmp_path / "out").keys()


# --- checkpoints that others quantised ---


def quantised(source: Path, folder: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Path:
    shutil.copytree(source, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def fp8(source: Path, folder: Path) -> Path:
    """DeepSeek-V3's own layout: fp8 weights of experts with a scale per block beside each."""
    tensors = load_file(source / SINGLE)
    for name in [name for name in tensors if ".experts." in name]:
        number = float(name.split(".experts.")[1].split(".")[0])
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = torch.full((1, 1), number)
    return quantised(source, folder, tensors, {"quant_method": "fp8", "weight_block_size": [128, 128]})


@pytest.mark.parametrize("prefix", ["model.", ""])
def test_scales_of_single_experts_go_with_them(prefix: str, checkpoint: Checkpoints, tmp_path: Path):
    """Also where the checkpoint is of the base model, whose names begin a level lower."""
    source = fp8(checkpoint("deepseek_v3"), tmp_path / "in")
    old = {name.replace("model.", prefix, 1): t for name, t in load_file(source / SINGLE).items()}
    save_file(old, source / SINGLE, metadata={"format": "pt"})
    done = cut(source, tmp_path / "out", first_layer(meta(source)))
    tensors = load_file(tmp_path / "out" / SINGLE)
    for new_id, old_id in enumerate([1, 2, 4, 7]):
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            name = prefix + "layers.1.mlp.experts.{}." + leaf + ".weight"
            assert float(tensors[name.format(new_id) + "_scale_inv"]) == old_id
            assert tensors[name.format(new_id)].dtype == torch.float8_e4m3fn
            assert torch.equal(tensors[name.format(new_id)].float(), old[name.format(old_id)].float())
    assert done.counts["dropped"] == done.counts["renumbered"] == 2 * 4 * 3 * 2


def mxfp4(source: Path, folder: Path) -> Path:
    """gpt-oss as published: blocks and scales instead of the stacks, biases and routers in bf16."""
    tensors = load_file(source / SINGLE)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        _, columns, rows = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 255, (8, rows, columns // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(0, 255, (8, rows, columns // 32), dtype=torch.uint8)
    return quantised(source, folder, tensors, {"quant_method": "mxfp4"})


def test_blocks_and_scales_of_gpt_oss(checkpoint: Checkpoints, tmp_path: Path):
    source = mxfp4(checkpoint("gpt_oss"), tmp_path / "in")
    cut(source, tmp_path / "out", first_layer(meta(source)))
    before, after = load_file(source / SINGLE), load_file(tmp_path / "out" / SINGLE)
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        per_expert = ".experts." in name or ".router." in name
        assert torch.equal(after[name], tensor[[1, 2, 4, 7]] if per_expert else tensor), name


def spoiled(source: Path, folder: Path, more: dict[str, torch.Tensor], without: str = "") -> Path:
    shutil.copytree(source, folder)
    tensors = {name: t for name, t in load_file(folder / SINGLE).items() if name != without}
    save_file(tensors | more, folder / SINGLE, metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("family", "more", "without", "message"),
    [
        ("gpt_oss", {"model.layers.0.mlp.experts.down_proj_scale": torch.ones(3, 8)}, "",
         r"experts.down_proj_scale \[3, 8\] should have 8 experts along its first dimension"),
        ("qwen3_moe", {"model.layers.0.mlp.gate.weight_scale_inv": torch.ones(1, 2)}, "",
         r"gate.weight_scale_inv \[1, 2\] seems to be part of a router"),
        ("qwen3_moe", {}, "model.layers.1.mlp.experts.3.up_proj.weight",
         r"experts.\*.up_proj.weight for 7 experts, the config says 8"),
        ("qwen3_moe", {}, "model.layers.1.mlp.gate.weight", "has no model.layers.1.mlp.gate.weight"),
        ("gpt_oss", {}, "model.layers.2.mlp.experts.down_proj", "has no .*layers.2.mlp.experts.down_proj"),
        ("gpt_oss", {"model.layers.2.mlp.experts.down_proj": torch.ones(7, 128, 64)}, "",
         r"down_proj \[7, 128, 64\] should have 8 experts along dimension 0"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_apart_is_refused_by_name(
    family: str, more: dict, without: str, message: str, checkpoint: Checkpoints, tmp_path: Path
):
    source = spoiled(checkpoint(family), tmp_path / "in", more, without)
    with pytest.raises(UserError, match=message):
        plan_tensors(source, first_layer(meta(source)))


@pytest.mark.parametrize("family", ["qwen2_moe", "deepseek_v3", "gemma4", "qwen3_next"])
def test_nothing_of_a_packed_linear_is_cut(family: str, checkpoint: Checkpoints, tmp_path: Path):
    """Code books and scales of E numbers: bitsandbytes keeps them beside the weight, inside the block."""
    source = checkpoint(family)
    model = meta(source)
    layers = moe_layers(model)
    routers = tuple(name for layer in layers for name in per_expert_tensors(model, layer))
    live = rewrite.live_names(model, read_headers(source))
    linears = [
        name
        for name, header in read_headers(source).items()
        if len(header.shape) == 2 and name.endswith("_proj.weight") and ".experts." not in name
        and live[name].name.startswith(tuple(layer.name for layer in layers))
        and live[name].name not in routers
    ]  # fmt: skip
    assert linears
    experts = layers[0].num_experts
    extras = {
        name.removesuffix("weight") + leaf: torch.arange(float(experts))
        for name in linears
        for leaf in ("weight.quant_map", "weight.nested_quant_map", "weight.absmax", "SCB")
    }
    source = spoiled(source, tmp_path / "in", extras)
    cut(source, tmp_path / "out", choice(model))
    found = load_file(tmp_path / "out" / SINGLE)
    for name, tensor in extras.items():
        assert torch.equal(found[name], tensor), name


def test_an_unknown_bias_of_the_router_is_cut(checkpoint: Checkpoints, tmp_path: Path):
    names = [f"model.layers.0.mlp.{leaf}" for leaf in ("gate.extra_bias", "correction")]
    source = spoiled(checkpoint("qwen3_moe"), tmp_path / "in", {name: torch.arange(8.0) for name in names})
    cut(source, tmp_path / "out", choice(meta(source)))
    found = load_file(tmp_path / "out" / SINGLE)
    kept = choice(meta(source))["model.layers.0.mlp"]
    assert all(found[name].tolist() == kept for name in names)


def test_a_scalar_scale_is_everyones(checkpoint: Checkpoints, tmp_path: Path):
    name = "model.layers.0.mlp.experts.input_scale"
    source = spoiled(checkpoint("gpt_oss"), tmp_path / "in", {name: torch.tensor(3.0)})
    cut(source, tmp_path / "out", first_layer(meta(source)))
    assert float(load_file(tmp_path / "out" / SINGLE)[name]) == 3.0


def test_settings_that_name_single_experts_are_refused(checkpoint: Checkpoints, tmp_path: Path):
    settings = {"quant_method": "fp8", "modules_to_not_convert": ["model.layers.1.mlp.experts.7.up_proj"]}
    source = quantised(
        checkpoint("qwen3_moe"), tmp_path / "in", load_file(checkpoint("qwen3_moe") / SINGLE), settings
    )
    with pytest.raises(UserError, match="names single experts.*experts.7.up_proj"):
        plan_tensors(source, first_layer(meta(source)))


# --- what goes wrong ---


def test_choices_that_cannot_run(checkpoint: Checkpoints, tmp_path: Path):
    source = checkpoint("qwen3_moe")
    keep = first_layer(meta(source))
    first, *others = keep
    for wrong, message in (
        ({**keep, first: [1]}, "would keep 1 experts, but a token goes to 2"),
        ({**keep, first: [0, 1, 2]}, "different numbers"),
        ({first: keep[first]}, "different numbers"),
        ({**keep, "model.layers.99.mlp": [0, 1]}, "no MoE layer"),
    ):
        with pytest.raises(UserError, match=message):
            plan_tensors(source, wrong)


def test_a_source_cut_short(checkpoint: Checkpoints, tmp_path: Path):
    source = tmp_path / "in"
    shutil.copytree(checkpoint("gemma4"), source)
    keep = choice(meta(source))
    plan = plan_tensors(source, keep)
    data = (source / SINGLE).read_bytes()
    (source / SINGLE).write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cut short"):
        plan_tensors(source, keep)
    with pytest.raises(UserError, match="model.safetensors is cut short: it ends before byte"):
        cut(source, tmp_path / "out", keep, plan=plan)


def test_a_disk_that_is_too_small_is_noticed_before_writing(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(UserError, match="has 1,000 bytes free"):
        cut(checkpoint("olmoe"), tmp_path / "out", choice(meta(checkpoint("olmoe"))))
    assert not list((tmp_path / "out").iterdir())


def test_what_lies_beside_the_weights_takes_space_too(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = tmp_path / "in"
    shutil.copytree(checkpoint("olmoe"), source)
    (source / "train.parquet").write_bytes(bytes(300_000))
    plan = plan_tensors(source, choice(meta(source)))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=plan.nbytes + 250_000))
    with pytest.raises(UserError, match="bytes free, the new checkpoint takes"):
        cut(source, tmp_path / "out", choice(meta(source)))


def test_a_dtype_that_is_unknown_is_refused_by_name(checkpoint: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rewrite, "DTYPE_BITS", {"BF16": 16})
    source = checkpoint("olmoe")
    with pytest.raises(UserError, match=r"lm_head.weight is stored as F32, which moesmith does not know"):
        plan_tensors(source, choice(meta(source)))


def test_a_folder_with_weights_is_not_written_to(checkpoint: Checkpoints, tmp_path: Path):
    source = checkpoint("olmoe")
    keep = choice(meta(source))
    cut(source, tmp_path / "out", keep)
    for folder in (tmp_path / "out", source):
        with pytest.raises(UserError, match="holds weights already"):
            rewrite_checkpoint(source, folder, keep)


def test_what_was_written_is_read_back(
    checkpoint: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    honest = ranges.header_bytes
    monkeypatch.setattr(ranges, "header_bytes", lambda tensors: honest(tensors).replace(b"[5,64]", b"[64,5]"))
    with pytest.raises(RuntimeError, match="does not hold what was planned: .*gate.weight"):
        cut(checkpoint("olmoe"), tmp_path / "out", choice(meta(checkpoint("olmoe"))))


# --- beside the weights ---


def test_files_beside_the_weights(checkpoint: Checkpoints, tmp_path: Path):
    source, out = tmp_path / "in", tmp_path / "out"
    shutil.copytree(checkpoint("olmoe"), source)
    beside = ("tokenizer.json", "chat_template.jinja", "LICENSE", "README.md", "preprocessor_config.json",
              "encoding/words.txt", "processor/config.json")  # fmt: skip
    not_copied = ("moesmith.json", "pytorch_model.bin", "original/consolidated.00.pth", "model.gguf",
                  "pytorch_model.bin.index.json", ".cache/lock", ".gitattributes", "heal.json", "verify.json",
                  "report.html", "ngrams.npy", "adapter/adapter_config.json",
                  "adapter/adapter_model.safetensors", "prof/profile.json",
                  "prof/documents.jsonl", "small/config.json", "small/tokenizer.json",
                  "small/model.safetensors", "runs/one/verify.json", "runs/one/page.html")  # fmt: skip
    for name in (*beside, *not_copied):
        (source / name).parent.mkdir(exist_ok=True, parents=True)
        (source / name).write_text(name)
    out.mkdir()
    (out / "README.md").write_text("mine")
    done = cut(source, out, choice(meta(source)))
    assert sorted(done.side_files) == sorted({*beside, "generation_config.json"} - {"README.md"})
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {*beside, "generation_config.json", "config.json", SINGLE}
    assert (out / "README.md").read_text() == "mine" and (out / "LICENSE").read_text() == "LICENSE"


def test_an_output_inside_the_model_folder_is_not_copied_into_itself(checkpoint: Checkpoints, tmp_path: Path):
    source = tmp_path / "in"
    shutil.copytree(checkpoint("olmoe"), source)
    out = source / "cut" / "small"
    out.mkdir(parents=True)
    (out / "note.txt").write_text("")
    assert cut(source, out, choice(meta(source))).side_files == ["generation_config.json"]


def test_result_bytes_is_the_size_written(checkpoint: Checkpoints, tmp_path: Path):
    for family, count in (("olmoe", 5), ("deepseek_v3", 4), ("gpt_oss", 5)):
        out = tmp_path / family
        cut(checkpoint(family), out, choice(meta(checkpoint(family))))
        assert result_bytes(checkpoint(family), count) == (out / SINGLE).stat().st_size
    with pytest.raises(UserError, match="5 experts cannot be spread over 2 groups"):
        result_bytes(checkpoint("deepseek_v3"), 5)
