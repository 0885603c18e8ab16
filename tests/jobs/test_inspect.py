"""What `moesmith inspect` prints, on checkpoints of every kind."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesmith import ExpertsConfig, cli


def inspect(capsys, folder, *argv) -> str:
    status = cli.main(["inspect", str(folder), *argv])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out + captured.err


def test_a_plain_checkpoint(checkpoint, capsys):
    text = inspect(capsys, checkpoint("olmoe"))
    for words in (
        "olmoe · 3 layers, 3 with experts · 8 experts, top-2",
        "active per token (embeddings counted)",
        "72 expert matrices, one scale per 64 weights",
        "3 routers (gate), embeddings, head, norms",
        "1 file · F32 · one tensor per expert",
        "chat template    none",
        f"next: moesmith quantize {checkpoint('olmoe')} --out packed/",
    ):
        assert words in text
    assert "\x1b" not in text, "a pipe gets no colours"


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("gemma4", ["gemma4_text", "dense MLP beside them", "in vision or audio towers", "experts fused"]),
        ("mixtral", ["one tensor per expert"]),
        ("gpt_oss", ["router.bias", "experts fused"]),
        ("deepseek_v3", ["3 layers, 2 with experts", "shared expert beside them"]),
    ],
)
def test_families(checkpoint, capsys, family, words):
    text = inspect(capsys, checkpoint(family))
    assert [word for word in words if word not in text] == []


def test_facts_for_a_program(checkpoint, capsys):
    facts = json.loads(inspect(capsys, checkpoint("olmoe"), "--json"))
    assert facts["moe_layers"] == 3 and facts["num_experts"] == [8] and facts["top_k"] == [2]
    parameters = facts["parameters"]
    parts = [v for k, v in parameters.items() if k not in ("total", "active", "towers")]
    assert sum(parts) == parameters["total"]
    disk = facts["disk"]
    assert disk["bytes"] == 4 * parameters["total"] and disk["files"] == 1 and disk["experts"] == "per expert"
    for scheme in facts["bytes"].values():
        assert scheme["total"] == scheme["experts"] + scheme["linears"] + scheme["rest"]


def test_a_packed_checkpoint_and_what_it_takes(checkpoint, capsys, tmp_path):
    from transformers import AutoModelForCausalLM

    config = ExpertsConfig("nf4", double_quant=True, linears="nf4")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint("olmoe"), quantization_config=config, dtype=torch.bfloat16
    )
    model.save_pretrained(tmp_path)
    text = inspect(capsys, tmp_path)
    assert "packed by moesmith (nf4 + double quant, linears nf4)" in text
    assert f"next: moesmith chat {tmp_path}" in text
    facts = json.loads(inspect(capsys, tmp_path, "--json"))
    expected = facts["bytes"]["nf4 + double quant"]["total_with_linears_packed"]
    assert expected == pytest.approx(facts["disk"]["bytes"], rel=0.1), "quant_state entries come on top"


def test_a_config_alone(checkpoint, capsys, tmp_path):
    shutil.copy(checkpoint("olmoe") / "config.json", tmp_path)
    text = inspect(capsys, tmp_path)
    assert "no weights in this folder" in text and "on disk" not in text and "next:" not in text


def test_foreign_quantisation_is_named(checkpoint, capsys, tmp_path):
    config = json.loads((checkpoint("gpt_oss") / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "mxfp4"}})
    )
    assert "not quantised with mxfp4" in inspect(capsys, tmp_path)


def test_template_and_tokenizer(checkpoint, capsys, tmp_path):
    shutil.copy(checkpoint("olmoe") / "config.json", tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{% generation %}{{ m }}{% endgeneration %}")
    text = inspect(capsys, tmp_path)
    assert "yes, with {% generation %} marks" in text and "tokenizer        none in this folder" in text


def test_a_dense_model_and_unreachable_experts(capsys, tmp_path):
    small = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 64}
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "num_attention_heads": 2, **small})
    )
    assert "dense, no experts" in inspect(capsys, tmp_path)
    jetmoe = {
        "model_type": "jetmoe",
        "num_key_value_heads": 2,
        "kv_channels": 16,
        "num_local_experts": 4,
        **small,
    }
    (tmp_path / "config.json").write_text(json.dumps(jetmoe))
    text = inspect(capsys, tmp_path)
    assert "transformers does not dispatch JetMoeParallelExperts" in text and "expert matrices" not in text


def test_files_that_hold_less_than_the_config_says(checkpoint, capsys, tmp_path):
    shutil.copytree(checkpoint("olmoe"), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in tensors.items() if "layers.2." not in k}, tmp_path / "model.safetensors")
    assert "weights are missing" in inspect(capsys, tmp_path)


def test_no_weight_is_read(checkpoint, capsys, tmp_path):
    """Headers are enough: the tensors' bytes may be anything, here a hole in the file."""
    shutil.copytree(checkpoint("olmoe"), tmp_path, dirs_exist_ok=True)
    path = tmp_path / "model.safetensors"
    size = path.stat().st_size
    with open(path, "r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        file.truncate(header)
        file.truncate(size)
    assert "72 expert matrices" in inspect(capsys, tmp_path)


def test_verify_reads_every_byte(checkpoint, tmp_path, capsys):
    out = tmp_path / "packed"
    assert cli.main(["quantize", str(checkpoint("olmoe")), "--out", str(out)]) == 0
    capsys.readouterr()
    assert "verified" not in inspect(capsys, out)
    assert "every byte as it was written" in inspect(capsys, out, "--verify")
    facts = json.loads(inspect(capsys, out, "--verify", "--json"))
    assert facts["verified"]["nbytes"] == (out / "model.safetensors").stat().st_size
    data = bytearray((out / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (out / "model.safetensors").write_bytes(data)
    assert cli.main(["inspect", str(out), "--verify"]) == 2
    assert "in model.safetensors" in capsys.readouterr().err
    (out / "model.safetensors").write_bytes(data[:-1])
    assert cli.main(["inspect", str(out), "--verify"]) == 2
    assert "cut short" in capsys.readouterr().err


def test_verify_needs_checksums(checkpoint, capsys):
    assert cli.main(["inspect", str(checkpoint("olmoe")), "--verify"]) == 2
    assert "has no checksums.json" in capsys.readouterr().err
