"""`moesmith export` through llama.cpp itself, and stopped by force."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from jobs_export import adapter_on
from llama import GOOD, PRE, build, give_tokenizer, llama, save  # noqa: F401  (a fixture)
from moesmith import cli
from moesmith.models.layers import moe_layers

pytestmark = pytest.mark.slow


FAMILIES = ("olmoe", "qwen3_moe", "mixtral", "gemma4", "gpt_oss")


def models(family, root):
    """16-bit, packed and pruned models of a family below `root`, each with an adapter on it."""
    import moesmith
    from moesmith.models.surgery import slice_model

    moesmith.register()
    model = build(family, **GOOD[family]).to(torch.bfloat16)
    save(model, root / "plain")
    kind = tiny.model_class(family)
    kind.from_pretrained(
        root / "plain", quantization_config=moesmith.ExpertsConfig("nf4"), dtype=torch.bfloat16
    ).save_pretrained(root / "packed")
    slice_model(model, {layer.name: [1, 2, 4, 5, 6, 7] for layer in moe_layers(model)})
    save(model, root / "pruned")
    for file in (root / "plain").glob("*token*"):
        shutil.copy(file, root / "packed")
    for name in ("plain", "packed", "pruned"):
        adapter_on(root / name, root / f"on-{name}")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_of_every_family_says_what_its_source_says(family, tmp_path, llama):  # noqa: F811
    """The command's own parity, in 32 bits: so an export can only agree, or have lost something."""
    models(family, tmp_path)
    gguf_words = ["--pre-tokenizer", PRE, "--threads", "1"]
    for action, base, words in (
        ("merged", "packed", []),
        ("merged", "plain", []),
        ("lora", "packed", ["--for", "peft"]),
        ("lora", "packed", ["--for", "vllm"]),
        ("gguf", "packed", gguf_words),
        ("gguf", "plain", gguf_words),
        ("lora", "packed", ["--for", "gguf", *gguf_words]),
        ("merged", "pruned", []),
        ("gguf", "pruned", gguf_words),
        ("lora", "pruned", ["--for", "gguf", *gguf_words]),
    ):
        out = tmp_path / "-".join([action, base, *words[:2]]).replace("---for", "")
        argv = ["export", action, "--adapter", str(tmp_path / f"on-{base}"), *words, "--dtype", "float32"]
        # GELU from a table of 16-bit values tips a router over now and then
        gelu = ["--tolerance", "0.05"] if family == "gemma4" and words[-1:] == ["1"] else []
        assert cli.main([*argv, *gelu, "--out", str(out)]) == 0, (family, action, base, words)
        proofs = json.loads((out / "parity.json").read_text())["parity"]
        if words == ["--for", "vllm"] and family in ("gpt_oss", "gemma4"):
            assert proofs == [], "names of vLLM's own are said not to be compared"
            continue
        (proof,) = proofs
        assert proof["parity"]["mean"] < (0.05 if gelu else 1e-3) and proof["effect"]["mean"] > 0.05


@pytest.mark.parametrize("turned", [False, True], ids=["as transformers writes it", "as the original is"])
def test_stacks_of_qwen3_vl_go_either_way(turned, tmp_path, llama):  # noqa: F811
    folder = save(build("qwen3_vl_moe", **GOOD["qwen3_vl_moe"]).to(torch.bfloat16), tmp_path / "m")
    if turned:
        tensors = load_file(folder / "model.safetensors")
        stacks = [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]
        assert stacks
        tensors |= {name: tensors[name].mT.contiguous() for name in stacks}
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    argv = ["export", "gguf", str(folder), "--dtype", "float32", "--pre-tokenizer", PRE, "--threads", "1"]
    assert cli.main([*argv, "--out", str(tmp_path / "gg")]) == 0
    parity = json.loads((tmp_path / "gg" / "parity.json").read_text())["parity"][0]["parity"]
    assert parity["mean"] < 1e-3
    adapter_on(folder, tmp_path / "on")
    argv = ["export", "merged", str(folder), "--adapter", str(tmp_path / "on"), "--dtype", "float32"]
    assert cli.main([*argv, "--out", str(tmp_path / "merged")]) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """packed/ (nf4) and adapter/ of a tiny model whose tokenizer llama.cpp takes."""
    import moesmith

    moesmith.register()
    root = tmp_path_factory.mktemp("export")
    build("olmoe", num_key_value_heads=4).to(torch.bfloat16).save_pretrained(root / "plain")
    tiny.model_class("olmoe").from_pretrained(
        root / "plain", quantization_config=moesmith.ExpertsConfig("nf4"), dtype=torch.bfloat16
    ).save_pretrained(root / "packed")
    for name in ("plain", "packed"):
        give_tokenizer(root / name)
    adapter_on(root / "packed", root / "adapter")
    return root


def test_packed_base_and_adapter_run_in_llama_cpp(place, tmp_path, llama):  # noqa: F811
    out = tmp_path / "gg"
    argv = ["export", "gguf", "--adapter", str(place / "adapter"), "--quant", "f32,q8_0,q4_k_m"]
    argv += ["--dtype", "float32", "--imatrix", "auto", "--pre-tokenizer", PRE, "--threads", "1", "--out"]
    assert cli.main([*argv, str(out)]) == 0
    record = json.loads((out / "moesmith.json").read_text())
    wide, eight, four = (one["parity"] for one in record["parity"])
    assert record["parity"][0]["effect"]["mean"] > 0.05
    assert wide["mean"] < 1e-3 and wide["missing"] == 0
    assert wide["mean"] < eight["mean"] < four["mean"]
    assert {path.name for path in out.glob("*.gguf")} == {
        "gg-F32.gguf", "gg-Q8_0.gguf", "gg-Q4_K_M.gguf", "gg.imatrix.gguf",
    }  # fmt: skip
    assert sum(record["gguf"]["files"][2]["fallback"].values()) > 0, "64 is no multiple of 256"
    assert (out / "Modelfile").read_text().startswith("FROM ./gg-F32.gguf")


def test_an_adapter_alone_runs_over_the_base_in_llama_cpp(place, tmp_path, llama):  # noqa: F811
    out = tmp_path / "ad"
    argv = ["export", "lora", "--adapter", str(place / "adapter"), "--for", "gguf", "--dtype", "float32"]
    assert cli.main([*argv, "--pre-tokenizer", PRE, "--threads", "1", "--out", str(out)]) == 0
    parity = json.loads((out / "parity.json").read_text())["parity"][0]
    assert parity["parity"]["mean"] < 1e-3 < parity["effect"]["mean"]
    assert [path.name for path in out.glob("*.gguf")] == ["ad.gguf"]
    assert not list(out.glob("*.safetensors"))


def test_an_adapter_that_the_converter_loses_is_found(place, tmp_path, llama, monkeypatch, capsys):  # noqa: F811
    """As some exporters do: the file is there, loads, and holds the base."""
    from moesmith.export import merge

    real = merge.merge_checkpoint
    monkeypatch.setattr(
        merge, "merge_checkpoint", lambda source, adapters, out, **how: real(source, [], out, **how)
    )
    monkeypatch.setattr("moesmith.jobs._export.say_merged", lambda *_: None)
    out = tmp_path / "gg"
    argv = ["export", "gguf", "--adapter", str(place / "adapter"), "--pre-tokenizer", PRE, "--threads", "1"]
    assert cli.main([*argv, "--out", str(out)]) == 2
    assert "the adapter is not in the export" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT])
def test_stopped_by_force_nothing_has_the_name_and_the_next_run_clears_up(place, tmp_path, sign):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "moesmith", "export", "merged", "--adapter", str(place / "adapter")]
    process = subprocess.Popen([*command, "--out", str(out)], env=os.environ, stderr=subprocess.PIPE)
    temporary = tmp_path / "out.tmp"
    while process.poll() is None and not (temporary / "config.json").exists():
        time.sleep(0.02)
    assert process.poll() is None, process.stderr.read()
    process.send_signal(sign)
    process.communicate(timeout=60)
    assert not out.exists()
    assert temporary.exists() == (sign == signal.SIGKILL)
    assert cli.main([*command[3:], "--out", str(out), "--dtype", "float32"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
