"""`moesmith export` through llama.cpp itself, and stopped by force."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import tiny
from jobs_export import adapter_on
from llama import PRE, build, give_tokenizer, llama  # noqa: F401  (a fixture)
from moesmith import cli

pytestmark = pytest.mark.slow


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
