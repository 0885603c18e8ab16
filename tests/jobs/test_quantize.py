"""`moesmith quantize`: the folder it writes, what it proves, and what it refuses to touch."""

import json
import re
import shutil

import pytest
import torch

from moesmith import cli
from moesmith.experts.report import count
from moesmith.jobs import quantize as job
from moesmith.jobs._folder import INCOMPLETE
from moesmith.models.checkpoint import Checkpoint, fingerprint
from moesmith.models.checksums import CHECKSUMS, digest, verify
from moesmith.models.headers import read_headers


def quantize(capsys, model, out, *argv, status: int = 0) -> str:
    code = cli.main(["quantize", str(model), "--out", str(out), *argv])
    captured = capsys.readouterr()
    assert code == status, captured.err
    return captured.out if status == 0 else captured.err


def reload(folder, config=None):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def test_the_packed_folder(checkpoint, tmp_path, capsys):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(checkpoint("olmoe"), source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "special_tokens_map.json").write_text("{}")
    text = quantize(capsys, source, out)
    for words in (
        "72 expert matrices in nf4 · 0 stacks left in 16 bits that were asked for",
        "logits of 32 tokens bit-equal",
        f"next: moesmith chat {out}",
        "peak",
    ):
        assert words in text
    assert {f.name for f in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "moesmith.json", CHECKSUMS,
        "chat_template.jinja", "special_tokens_map.json"}  # fmt: skip
    assert not (tmp_path / "out.tmp").exists()
    record = json.loads((out / "moesmith.json").read_text())
    assert record["config"]["scheme"] == "nf4" and record["fingerprint"] == fingerprint(out)
    assert record["counts"]["matrices"] == {"nf4": 72} and record["versions"]["torch"]
    assert Checkpoint.open(out).is_packed
    assert count(reload(out)).not_packed == []


@pytest.mark.parametrize(
    "argv",
    [
        ("--scheme", "int8"),
        ("--scheme", "fp8", "--blocksize", "32"),
        ("--double-quant", "--linears", "nf4"),
        ("--linears", "int8"),
        ("--scheme", "fp4", "--dtype", "float32"),
        ("--scheme", "bf16"),
    ],
    ids=" ".join,
)
def test_every_setting_is_proved_by_reloading(checkpoint, tmp_path, capsys, argv):
    assert "bit-equal" in quantize(capsys, checkpoint("qwen2_moe"), tmp_path / "out", *argv)


@pytest.mark.parametrize("family", ["gemma4", "gpt_oss", "mixtral", "nemotron_h"])
def test_families(checkpoint, tmp_path, capsys, family):
    facts = json.loads(quantize(capsys, checkpoint(family), tmp_path / "out", "--json"))
    before, after = Checkpoint.open(checkpoint(family)), Checkpoint.open(tmp_path / "out")
    assert after.config["architectures"] == before.config["architectures"]
    split = [name for name in after.tensors if re.search(r"experts\.\d+\.", name)]
    assert not split, "a packed stack is one tensor on disk: that is what can be memory-mapped"
    assert facts["counts"]["not_packed"] == [] and facts["proof"]["tokens"] == 32
    assert facts["bytes"] == sum(f.stat().st_size for f in (tmp_path / "out").glob("*.safetensors"))


def tensors(folder):
    """name -> dtype, shape, bytes"""
    return {
        name: (h.dtype, h.shape, (folder / h.file).read_bytes()[h.start : h.end])
        for name, h in read_headers(folder).items()
    }


@pytest.mark.parametrize("family", ["olmoe", "gemma4"])
def test_layer_by_layer_gives_the_same_tensors_and_record(checkpoint, tmp_path, capsys, family):
    whole = json.loads(quantize(capsys, checkpoint(family), tmp_path / "whole", "--json"))
    text = quantize(capsys, checkpoint(family), tmp_path / "parts", "--stream")
    assert "tensors bit-equal to what was packed, the logits of 32 tokens finite" in text
    assert tensors(tmp_path / "whole") == tensors(tmp_path / "parts")
    record = json.loads((tmp_path / "parts" / "moesmith.json").read_text())
    assert record["streamed"] and not whole["streamed"]
    for key in ("fingerprint", "counts"):
        assert record[key] == whole[key]
    assert record["proof"]["tensors"] == whole["proof"]["tensors"]
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert not (tmp_path / "parts.tmp").exists()


def test_a_model_too_large_for_memory_is_streamed(checkpoint, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("moesmith.jobs._pair.free_memory", lambda device: 100_000)
    text = quantize(capsys, checkpoint("olmoe"), tmp_path / "out")
    assert "layer by layer: the packed model takes" in text and "100 kB free" in text
    assert "layer by layer" not in quantize(capsys, checkpoint("olmoe"), tmp_path / "two", "--no-stream")
    error = quantize(capsys, checkpoint("diffusion_gemma"), tmp_path / "three", status=2)
    assert "in 2 stacks" in error and "--no-stream" in error


def test_a_killed_streamed_run_leaves_no_folder(checkpoint, tmp_path, capsys, monkeypatch):
    from moesmith.models.pack import LayerPacker

    def stop(self, tensors, out, file):
        if file.startswith("model-00003"):
            raise KeyboardInterrupt
        save(self, tensors, out, file)

    save = LayerPacker._save
    with monkeypatch.context() as patch:
        patch.setattr(LayerPacker, "_save", stop)
        argv = ["quantize", str(checkpoint("olmoe")), "--out", str(tmp_path / "out"), "--stream"]
        assert cli.main(argv) == 130
    assert not (tmp_path / "out").exists() and (tmp_path / "out.tmp" / INCOMPLETE).exists()
    quantize(capsys, checkpoint("olmoe"), tmp_path / "out", "--stream")
    assert verify(tmp_path / "out").tensors and not (tmp_path / "out.tmp").exists()


@pytest.mark.parametrize("what", ["disk", "loading"])
def test_the_streamed_proof_sees_one_changed_bit(checkpoint, tmp_path, capsys, what):
    out = tmp_path / "out"
    quantize(capsys, checkpoint("olmoe"), out)
    model = reload(out)
    packed = {name: digest(tensor) for name, tensor in model.state_dict().items()}
    name = "model.layers.1.mlp.experts.down_proj"
    assert job.prove_streamed(packed, dict(packed), model, out)["tokens"] == 32
    on_disk = packed | {name: "0" * 64}
    if what == "loading":
        codes = model.model.layers[1].mlp.experts.down_proj
        codes.data = codes.data.clone()
        codes.data[0, 0, 0] ^= 1
    else:
        packed = packed | {name: "1" * 64}
    with pytest.raises(RuntimeError, match="layers.1.mlp.experts.down_proj was saved"):
        job.prove_streamed(packed, on_disk, model, out)


def test_an_existing_folder_is_left_alone(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    source = checkpoint("olmoe")
    assert f"{out} exists" in quantize(capsys, source, out, status=2)
    assert "leaves it alone" in quantize(capsys, source, out, "--overwrite", status=2)
    assert "is the model itself" in quantize(capsys, source, source, "--overwrite", status=2)
    (tmp_path / "new.tmp").mkdir()
    assert "is in the way" in quantize(capsys, source, tmp_path / "new", status=2)
    assert (out / "thesis.tex").exists() and (tmp_path / "new.tmp").exists()


def test_overwrite_replaces_an_earlier_output(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    quantize(capsys, checkpoint("olmoe"), out)
    quantize(capsys, checkpoint("olmoe"), out, "--scheme", "int8", "--overwrite")
    assert Checkpoint.open(out).quantization["scheme"] == "int8"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_a_killed_run_leaves_no_folder_and_the_next_one_succeeds(checkpoint, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(job, "prove", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        assert cli.main(["quantize", str(checkpoint("olmoe")), "--out", str(out)]) == 130
    assert not out.exists() and (tmp_path / "out.tmp" / INCOMPLETE).exists()
    quantize(capsys, checkpoint("olmoe"), out)
    assert out.exists() and not (tmp_path / "out.tmp").exists()


def test_a_full_disk_is_noticed_before_writing(checkpoint, tmp_path, capsys, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    error = quantize(capsys, checkpoint("olmoe"), tmp_path / "out", status=2)
    assert "1.0 kB free, the packed model takes" in error
    assert not list(tmp_path.iterdir())


def test_the_estimate_is_close_to_what_is_written(checkpoint, tmp_path, capsys):
    from moesmith.models.checkpoint import read_config

    for argv in ((), ("--scheme", "int8", "--dtype", "float32"), ("--linears", "nf4", "--double-quant")):
        facts = json.loads(
            quantize(capsys, checkpoint("olmoe"), tmp_path / "out", "--json", "--overwrite", *argv)
        )
        cfg = job.Config(**facts["config"])
        estimate = job.estimate(read_config(checkpoint("olmoe")), cfg)
        assert 0.85 * facts["bytes"] < estimate < 1.2 * facts["bytes"]


def test_what_cannot_be_packed(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    quantize(capsys, checkpoint("olmoe"), out)
    assert "packed already (nf4)" in quantize(capsys, out, tmp_path / "again", status=2)
    config = json.loads((checkpoint("olmoe") / "config.json").read_text())
    shutil.copytree(checkpoint("olmoe"), tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "awq"}})
    )
    assert "quantised with awq" in quantize(capsys, tmp_path / "other", tmp_path / "again", status=2)
    error = quantize(capsys, checkpoint("olmoe"), tmp_path / "again", "--blocksize", "63", status=2)
    assert "blocksize=63" in error


def test_the_proof_sees_one_changed_bit(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    quantize(capsys, checkpoint("olmoe"), out)
    model, other = reload(out), reload(out)
    assert job.prove(model, other, out)["tokens"] == 32
    codes = other.model.layers[1].mlp.experts.down_proj
    codes.data = codes.data.clone()
    codes.data[0, 0, 0] ^= 1
    with pytest.raises(RuntimeError, match="layers.1.mlp.experts.down_proj was saved"):
        job.prove(model, other, out)


def test_bit_equality():
    nan, one = torch.tensor([float("nan")]), torch.ones(1)
    assert job._bit_equal(nan, nan.clone()) and not job._bit_equal(one, one.double())
    assert not job._bit_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
