"""A profile on disk: the same when read back, and never taken for a whole one when it is not."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from moesmith import ExpertsConfig
from moesmith.errors import UserError
from moesmith.models.layers import moe_layers
from moesmith.prune.observe import Collector
from moesmith.prune.stats import RECORD, STATS, SUMS, Document, Profile, identity, same_model


@pytest.fixture(scope="module")
def profile():
    model = tiny.build("qwen3_moe")
    documents = [Document("a", "x", 64), Document("b", "y", 64)]
    collector = Collector(moe_layers(model), documents)
    with collector.attach(model), collector.batch(torch.tensor([0, 1])[:, None].expand(2, 64)):
        with torch.no_grad():
            model(input_ids=tiny.inputs(model)["input_ids"])
    return collector.finish({"model": "here"})


def test_read_back_equal(profile, tmp_path):
    profile.write(tmp_path)
    again = Profile.read(tmp_path)
    assert (again.domains, again.documents, again.meta) == (profile.domains, profile.documents, profile.meta)
    for one, other in zip(profile.layers, again.layers, strict=True):
        assert one.layer == other.layer and one.top_k == other.top_k
        for name in SUMS:
            assert torch.equal(one.sums[name], other.sums[name])
        assert torch.equal(one.mean_output, other.mean_output)
    assert again.domain_tokens().tolist() == [64, 64]
    assert again.document_domains().tolist() == [0, 1]


def test_without_its_record_it_is_unfinished(profile, tmp_path):
    profile.write(tmp_path)
    (tmp_path / RECORD).unlink()
    with pytest.raises(UserError, match="no finished profile"):
        Profile.read(tmp_path)


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Profile.read(tmp_path / "nowhere")


def test_numbers_that_do_not_fit_the_record_are_refused(profile, tmp_path):
    profile.write(tmp_path)
    record = json.loads((tmp_path / RECORD).read_text())
    record["documents"].append({"id": "c", "domain": "x", "tokens": 1})
    (tmp_path / RECORD).write_text(json.dumps(record))
    with pytest.raises(UserError, match=r"per_document\.tokens .* wanted \[3, 8\]"):
        Profile.read(tmp_path)


def test_a_nan_is_refused(profile, tmp_path):
    profile.write(tmp_path)
    tensors = load_file(tmp_path / STATS)
    tensors["0.sums.norm"][0, 0] = torch.nan
    save_file(tensors, tmp_path / STATS)
    with pytest.raises(UserError, match="not finite"):
        Profile.read(tmp_path)


def test_a_truncated_file_is_refused(profile, tmp_path):
    profile.write(tmp_path)
    with open(tmp_path / STATS, "r+b") as file:
        file.truncate(1000)
    with pytest.raises(UserError, match="cannot be read"):
        Profile.read(tmp_path)


def test_a_profile_knows_its_model_and_packed_and_cast_copies_of_it(tmp_path):
    model = tiny.build("qwen3_moe")
    folders = {name: tmp_path / name for name in ("fp32", "bf16", "nf4", "other")}
    model.save_pretrained(folders["fp32"])
    tiny.build("qwen3_moe", dtype=torch.bfloat16).save_pretrained(folders["bf16"])
    packed = type(model).from_pretrained(
        folders["fp32"], quantization_config=ExpertsConfig("nf4"), dtype=torch.bfloat16
    )
    packed.save_pretrained(folders["nf4"])
    tiny.build("qwen3_moe", seed=1).save_pretrained(folders["other"])
    profile = Profile([], [], [], {"model": "fp32", **identity(folders["fp32"], {8})})
    profile.layers = [type("Layer", (), {"num_experts": 8})()]
    known = {name: same_model(profile, folders[name]) for name in ("fp32", "bf16", "nf4")}
    assert known == {"fp32": True, "bf16": False, "nf4": False}, "the others only by their routers"
    with pytest.raises(UserError, match="another model"):
        same_model(profile, folders["other"])
