"""An exported adapter is the same adapter: the same update of every tensor, the same logits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.core_model_loading import revert_weight_conversion

import tiny
from llama import PRE, llama  # noqa: F401 (a fixture)
from llama import build as build_for_gguf
from llama import save as save_for_gguf
from moesmith.errors import UserError
from moesmith.export.lora import GGUF, VLLM, export_lora
from moesmith.export.merge import merge_checkpoint
from moesmith.models.layers import PLACEMENTS, adapter_targets, text_layers
from moesmith.models.lora_factors import factors, parameters, read_adapter

PREFIX = "base_model.model."
R, ALPHA = 3, 5  # neither a power of two: a scaling that is lost or applied twice shows


def placements(model) -> list[str]:
    """Those that an adapter can go on."""
    found = []
    for placement in PLACEMENTS:
        try:
            adapter_targets(model, [placement])
            found.append(placement)
        except UserError:
            pass
    return found


def adapted(model, words, **options) -> PeftModel:
    """The model with a random adapter whose B is not zero."""
    modules, parameters_ = adapter_targets(model, words)
    options = {"r": R, "lora_alpha": ALPHA} | options
    config = LoraConfig(target_modules=modules, target_parameters=parameters_, **options)
    torch.manual_seed(1)
    peft = get_peft_model(model, config)
    for name, tensor in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(tensor, std=0.1)
    return peft.eval()


def saved(family: str, folder: Path, words=None, **options) -> tuple[Path, Path, dict]:
    """(model, adapter) folders of a tiny family, and its stock tensors' updates by their names in memory."""
    model = tiny.build(family)
    words = placements(model) if words is None else words
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir(parents=True)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(base)
    adapted(model, words, **options).save_pretrained(adapter)
    return base, adapter


def updates(adapter: Path, family: str) -> dict[str, torch.Tensor]:
    """In-memory parameter -> B @ A as PEFT itself computes it, in the parameter's own orientation."""
    config, weights = read_adapter(adapter)
    with torch.device("meta"):
        model = tiny.model_class(family)(tiny.config(family))

    def order(module):
        return [name for name, _ in model.get_submodule(module).named_parameters(recurse=False)]

    found = {}
    for place, name in parameters(config, weights, order).items():
        part = factors(place, config, weights, parameter=name)
        delta = part.b_EOR @ part.a_ERI
        shape = model.get_parameter(name).shape
        holder = model.get_submodule(name.rpartition(".")[0])
        if getattr(holder, "is_transposed", False):
            delta = delta.transpose(1, 2)
        found[name] = delta.reshape(shape)
    return found


def read_back(folder: Path) -> dict[str, torch.Tensor]:
    """Name without prefix -> its factors' product, by nothing but the folder's own config."""
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = load_file(folder / "adapter_model.safetensors")
    scaling = config["lora_alpha"] / config["r"]
    return {
        key.removeprefix(PREFIX).removesuffix(".lora_A.weight"): scaling
        * tensors[key.replace("lora_A", "lora_B")].float()
        @ a.float()
        for key, a in tensors.items()
        if key.endswith(".lora_A.weight")
    }


FAST = (
    "olmoe",
    "mixtral",
    "qwen2_moe",
    "granitemoe",
    "lfm2_moe",
    "minimax_m3_vl",
    "nemotron_h",
    "deepseek_v2",
)
# Where `on disk` is not what the form wants, or the form is refused.
ODD = {"vllm": set(VLLM), "gguf": set(GGUF)}


@pytest.mark.parametrize("form", ["vllm", "gguf"])
@pytest.mark.parametrize(
    "family", [pytest.param(f, marks=() if f in FAST else pytest.mark.slow) for f in tiny.FAMILIES]
)
def test_the_update_of_every_tensor_on_disk_is_that_of_the_stock_adapter(family, form, tmp_path):
    model = tiny.build(family)
    words = placements(model)
    if not words:
        pytest.skip("PEFT loses adapters of this family")
    layer = text_layers(model)[0]
    base, adapter = saved(family, tmp_path, words)
    out = tmp_path / "out"
    out.mkdir()
    if layer.model_type in ODD[form]:
        words = [word for word in words if word != "experts"]
        base, adapter = saved(family, tmp_path / "rest", words)
    try:
        done = export_lora(adapter, out, form=form, base=base, base_name="org/name")
    except UserError as error:
        assert "moesmith export merged" in str(error.hint), error
        assert family not in FAST or (form, family) == ("vllm", "granitemoe")
        return
    state = {name: torch.zeros_like(t) for name, t in model.state_dict().items() if t.ndim > 1}
    mine = updates(adapter, family)
    assert mine.keys() <= state.keys()
    wanted = revert_weight_conversion(model, state | mine)
    wanted = {name.removesuffix(".weight"): delta for name, delta in wanted.items() if bool(delta.any())}
    found = read_back(out)
    assert wanted.keys() <= found.keys()
    for name, delta in found.items():
        if name in wanted:
            if (form, name[-9:]) == ("vllm", ".mlp.gate") and delta.shape != wanted[name].shape:
                delta = delta.T  # ernie's router: (D, E) on disk, in and out features in a server
            torch.testing.assert_close(delta, wanted[name], rtol=1e-5, atol=1e-6)
        else:
            assert not bool(delta.any()), name
    assert done.tensors == 2 * len(found)
    assert set(done.placements) == set(words)


# ---------------------------------------------------------------- what an architecture's row says


def test_vllm_reads_the_stacks_of_gpt_oss_as_they_were_trained(tmp_path):
    """By what vLLM does with them: lora_a to (E, r, I), lora_b to (O, r, E), gate_up under base_layer."""
    base, adapter = saved("gpt_oss", tmp_path, ["experts", "attention"])
    (out := tmp_path / "out").mkdir()
    done = export_lora(adapter, out, form="vllm", base=base, base_name=None)
    assert (done.layout, done.experts) == ("stacks", 0)
    tensors = load_file(out / "adapter_model.safetensors")
    config = json.loads((out / "adapter_config.json").read_text())
    assert not config["target_parameters"] and "experts" in config["target_modules"]
    mine = updates(adapter, "gpt_oss")
    for layer in range(tiny.LAYERS):
        for place, leaf in ((".base_layer", "gate_up_proj"), ("", "down_proj")):
            name = f"{PREFIX}model.layers.{layer}.mlp.experts{place}"
            a, b = (tensors[f"{name}.lora_{x}.weight"] for x in "AB")
            a = a.reshape(tiny.NUM_EXPERTS, -1, a.shape[-1])
            b = b.reshape(b.shape[0], -1, tiny.NUM_EXPERTS).permute(2, 0, 1)
            delta = (b @ a) * config["lora_alpha"] / config["r"]
            wanted = mine[f"model.layers.{layer}.mlp.experts.{leaf}"].mT  # kept as (E, I, O)
            torch.testing.assert_close(delta, wanted, rtol=1e-5, atol=1e-6)


def test_vllm_gets_gemma_4_per_expert_below_a_module_of_its_own(tmp_path):
    base, adapter = saved("gemma4", tmp_path, ["experts"])
    (out := tmp_path / "out").mkdir()
    done = export_lora(adapter, out, form="vllm", base=base, base_name=None)
    assert done.experts == 3 * tiny.NUM_EXPERTS * tiny.LAYERS == done.tensors // 2
    found, mine = read_back(out), updates(adapter, "gemma4")
    for layer in range(tiny.LAYERS):
        above = f"model.language_model.layers.{layer}"
        for e in range(tiny.NUM_EXPERTS):
            gate, up, down = (
                found[f"{above}.moe.experts.{e}.{leaf}"] for leaf in ("gate_proj", "up_proj", "down_proj")
            )
            gate_up = mine[f"{above}.experts.gate_up_proj"][e]
            torch.testing.assert_close(torch.cat([gate, up]), gate_up, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(down, mine[f"{above}.experts.down_proj"][e], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_vl_moe"])
def test_llama_cpp_gets_gate_and_up_taken_apart_where_the_checkpoint_is_transposed(family, tmp_path):
    base, adapter = saved(family, tmp_path, ["experts"])
    (out := tmp_path / "out").mkdir()
    export_lora(adapter, out, form="gguf", base=base, base_name=None)
    found, mine = read_back(out), updates(adapter, family)
    above = "model.layers" if family == "gpt_oss" else "model.language_model.layers"
    for layer in range(tiny.LAYERS):
        gate_up, down = (
            mine[f"{above}.{layer}.mlp.experts.{leaf}"] for leaf in ("gate_up_proj", "down_proj")
        )
        if family == "gpt_oss":  # (E, I, O), gate and up in turns
            wanted = gate_up.mT[:, ::2], gate_up.mT[:, 1::2], down.mT
        else:
            wanted = *gate_up.chunk(2, 1), down
        for leaf, delta in zip(("linear", "linear_v", "linear_1"), wanted, strict=True):
            name = f"transformer.decoder_layer.{layer}.moe.{leaf}"
            torch.testing.assert_close(found[name], delta, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- read by stock PEFT


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(**tiny.inputs(model)).logits


def whole(family: str, folder: Path) -> Path:
    """The family's 16-bit checkpoint (here: float32), as stock from_pretrained reads it."""
    return tiny.save(family, folder / "whole")


def load(base: Path, adapter: Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return logits(PeftModel.from_pretrained(model, str(adapter)))


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_per_expert_form_read_by_peft_gives_the_stock_adapters_logits(family, tmp_path):
    _, adapter = saved(family, tmp_path, ["experts", "attention"])
    base = whole(family, tmp_path)
    (out := tmp_path / "out").mkdir()
    export_lora(adapter, out, form="vllm", base=base, base_name="org/name")
    wanted, plain = load(base, adapter), logits(AutoModelForCausalLM.from_pretrained(base))
    assert (wanted - plain).abs().max() > 0.05
    torch.testing.assert_close(load(base, out), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["olmoe", "mixtral", "gpt_oss"])
def test_the_peft_form_is_the_adapter_with_another_base_and_its_record(family, tmp_path):
    _, adapter = saved(family, tmp_path, ["experts", "router"])
    base = whole(family, tmp_path)
    (adapter / "moesmith.json").write_text('{"step": 7}')
    (adapter / "README.md").write_text("PEFT's")
    (out := tmp_path / "out").mkdir()
    done = export_lora(adapter, out, form="peft", base=base, base_name="org/name")
    assert (done.layout, done.rank, done.placements) == ("stacks", R, {"experts": 6, "router": 3})
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/name" and config["target_parameters"]
    assert json.loads((out / "moesmith.json").read_text()) == {"step": 7}
    assert not (out / "README.md").exists()
    mine, theirs = (load_file(f / "adapter_model.safetensors") for f in (adapter, out))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    torch.testing.assert_close(load(base, out), load(base, adapter), rtol=0, atol=0)


def test_without_a_base_only_the_peft_form_can_be_written(tmp_path):
    _, adapter = saved("olmoe", tmp_path, ["experts"])
    (out := tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="needs the model"):
        export_lora(adapter, out, form="vllm", base=None, base_name=None)
    assert export_lora(adapter, out, form="peft", base=None, base_name="org/name").tensors == 12
    assert export_lora(adapter, _empty(tmp_path), form="peft", base=None, base_name=None).layout == "stacks"


def _empty(folder: Path) -> Path:
    (folder / "empty").mkdir()
    return folder / "empty"


# ---------------------------------------------------------------- ranks, scaling, dtypes


def test_ranks_of_different_places_and_rslora_become_one_rank_with_scaling_one(tmp_path):
    options = {
        "rank_pattern": {r".*\.self_attn\.q_proj": 2},
        "alpha_pattern": {r".*\.self_attn\.o_proj": 11},
        "use_rslora": True,
    }
    base, adapter = saved("olmoe", tmp_path, ["experts", "attention"], **options)
    (out := tmp_path / "out").mkdir()
    assert export_lora(adapter, out, form="vllm", base=base, base_name=None).rank == R
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (R, R, False)
    assert not config["rank_pattern"] and not config["alpha_pattern"]
    mine, found = updates(adapter, "olmoe"), read_back(out)
    for leaf in ("q_proj", "k_proj", "o_proj"):
        name = f"model.layers.1.self_attn.{leaf}"
        torch.testing.assert_close(found[name], mine[f"{name}.weight"], rtol=1e-5, atol=1e-6)
    tensors = load_file(out / "adapter_model.safetensors")
    assert {t.shape[0] for k, t in tensors.items() if "lora_A" in k} == {R}


def test_an_adapter_on_down_proj_alone_gets_zeros_for_gate_and_up(tmp_path):
    model = tiny.build("olmoe")
    names = [f"{layer.experts}.down_proj" for layer in text_layers(model)][:2]
    base, adapter = saved("olmoe", tmp_path, ["attention"])
    peft = get_peft_model(
        model, LoraConfig(r=R, lora_alpha=ALPHA, target_modules=[], target_parameters=names)
    )
    for name, tensor in peft.named_parameters():
        if "lora_B" in name:
            torch.nn.init.ones_(tensor)
    peft.save_pretrained(adapter)
    (out := tmp_path / "out").mkdir()
    done = export_lora(adapter, out, form="vllm", base=base, base_name=None)
    found = read_back(out)
    assert len(found) == 2 * 3 * tiny.NUM_EXPERTS == done.experts
    zero = {name.rpartition(".")[2] for name, delta in found.items() if not bool(delta.any())}
    assert zero == {"gate_proj", "up_proj"}
    assert done.placements == {"experts": 2}


@pytest.mark.parametrize(("alpha", "dtype"), [(6, torch.bfloat16), (5, torch.float32)])
def test_bfloat16_stays_when_the_scaling_costs_no_bit(alpha, dtype, tmp_path):
    base, adapter = saved("olmoe", tmp_path, ["experts"], lora_alpha=alpha)
    file = adapter / "adapter_model.safetensors"
    save_file({k: t.bfloat16() for k, t in load_file(file).items()}, file)
    (out := tmp_path / "out").mkdir()
    export_lora(adapter, out, form="gguf", base=base, base_name=None)
    tensors = load_file(out / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {dtype}
    mine = updates(adapter, "olmoe")["model.layers.0.mlp.experts.down_proj"]
    for e in range(tiny.NUM_EXPERTS):
        delta = read_back(out)[f"model.layers.0.mlp.experts.{e}.down_proj"]
        torch.testing.assert_close(delta, mine[e], rtol=1e-6, atol=1e-7)


# ---------------------------------------------------------------- refused


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path):
    _, adapter = saved("olmoe", tmp_path / "a", ["experts"])
    other, _ = saved("gemma4", tmp_path / "b", ["experts"])
    for form in ("peft", "vllm", "gguf"):
        (out := tmp_path / form).mkdir()
        with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.experts"):
            export_lora(adapter, out, form=form, base=other, base_name=None)
        assert not any(out.iterdir())


def test_an_adapter_with_nan_is_refused_by_name(tmp_path):
    base, adapter = saved("olmoe", tmp_path, ["attention"])
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors[f"{PREFIX}model.layers.1.self_attn.k_proj.lora_B.weight"][0, 0] = float("nan")
    save_file(tensors, file)
    (out := tmp_path / "out").mkdir()
    with pytest.raises(UserError, match=r"layers\.1\.self_attn\.k_proj"):
        export_lora(adapter, out, form="vllm", base=base, base_name=None)
    assert not any(out.iterdir())


def test_a_folder_with_weights_is_left_alone(tmp_path):
    base, adapter = saved("olmoe", tmp_path, ["attention"])
    with pytest.raises(UserError, match="holds weights"):
        export_lora(adapter, adapter, form="vllm", base=base, base_name=None)


# ---------------------------------------------------------------- read by llama.cpp's converter

READ_GGUF = """
import sys; sys.path.insert(0, "gguf-py")
import gguf, numpy
from safetensors.numpy import save_file
reader = gguf.GGUFReader(sys.argv[1])
save_file({t.name: numpy.array(t.data, dtype=numpy.float32) for t in reader.tensors}, sys.argv[2])
alpha = reader.fields.get("adapter.lora.alpha")
print(float(alpha.parts[alpha.data[0]][0]) if alpha else 0)
"""


def gguf_tensors(tree: Path, path: Path) -> tuple[dict[str, torch.Tensor], float]:
    """Tensors of a GGUF file in f32, and the adapter's alpha."""
    out = path.with_suffix(".safetensors")
    command = [sys.executable, "-c", READ_GGUF, str(path), str(out)]
    said = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True).stdout
    return load_file(out), float(said)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "gemma4", "gpt_oss"])
def test_in_gguf_base_and_lora_are_the_merged_model(family, tmp_path, llama):  # noqa: F811
    """Tensor by tensor, through the converter's own renaming, splitting and permuting of all three."""
    overrides = {"text_config__global_head_dim": 32} if family == "gemma4" else {}
    model = build_for_gguf(family, **overrides)
    base = save_for_gguf(model, tmp_path / "base")
    words = placements(model)
    adapted(model, words).save_pretrained(tmp_path / "adapter")
    form, merged = tmp_path / "form", tmp_path / "merged"
    form.mkdir()
    export_lora(tmp_path / "adapter", form, form="gguf", base=base, base_name=None)
    merged.mkdir()
    merge_checkpoint(base, [tmp_path / "adapter"], merged, dtype="float32")
    llama.convert(base, tmp_path / "base.gguf", "f32", pre_tokenizer=PRE)
    llama.convert(merged, tmp_path / "merged.gguf", "f32", pre_tokenizer=PRE)
    llama.convert_lora(form, base, tmp_path / "lora.gguf")
    plain, _ = gguf_tensors(llama.tree, tmp_path / "base.gguf")
    whole, _ = gguf_tensors(llama.tree, tmp_path / "merged.gguf")
    lora, alpha = gguf_tensors(llama.tree, tmp_path / "lora.gguf")
    names = {name.removesuffix(".lora_a") for name in lora if name.endswith(".lora_a")}
    assert names == {name for name in plain if not torch.equal(plain[name], whole[name])} != set()
    for name in names:
        a, b = lora[f"{name}.lora_a"], lora[f"{name}.lora_b"]
        delta = (b @ a) * alpha / b.shape[-1]
        torch.testing.assert_close(plain[name] + delta, whole[name], rtol=1e-5, atol=1e-6)
