"""Offloaded and planned runs of `sft` and `dpo`: the same losses, the same adapter, and one clear error."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import yaml

import tiny
from chats import CHATML, sums, tokenizer, write_jsonl
from moesmith import cli, config
from moesmith.errors import UserError
from moesmith.jobs import _fit, dpo, sft
from moesmith.plan.choose import Planned
from moesmith.plan.footprint import Choice, Footprint
from moesmith.plan.times import Times
from moesmith.train import memory
from moesmith.train.settings import ExpertsPlace
from profiles import profile

STAGED = ("--experts.home", "ram", "--experts.slots")
LAYERS, KEYS = 3, ("loss", "eval_loss", "grad_norm", "learning_rate")


@pytest.fixture(scope="module")
def packed(checkpoint, tmp_path_factory):
    """A tiny OLMoE packed on disk, with a tokenizer and a chat template."""
    import shutil

    plain, folder = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("models") / "packed"
    shutil.copytree(checkpoint("olmoe"), plain, dirs_exist_ok=True)
    tokenizer(CHATML).save_pretrained(plain)
    assert cli.main(["quantize", str(plain), "--out", str(folder), "--scheme", "nf4"]) == 0
    return folder


@pytest.fixture
def job(packed, tmp_path):
    """run.yaml over the packed model: 4 rows a step, 2 at a time."""
    write_jsonl(tmp_path / "rows.jsonl", sums(24))
    values = {
        "model": str(packed), "out": str(tmp_path / "out"),
        "lora": {"r": 2, "targets": ["attention", "experts"]},
        "data": {"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.1},
        "train": {
            "max_steps": 4, "batch_size": 2, "grad_accum": 2, "lr": 1e-2, "eval_steps": 2, "save_steps": 2,
            "dtype": "float32",
        },
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(job, out, *flags, command="sft"):
    """Losses of a run into the folder `out` beside the job, and its last adapter."""
    folder = job.parent / out
    assert cli.main([command, str(job), "--out", str(folder), *map(str, flags)]) == 0
    return losses(folder), (folder / "last" / "adapter_model.safetensors").read_bytes()


def losses(folder):
    entries = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [{key: entry[key] for key in ("step", *KEYS) if key in entry} for entry in entries]


def settings(*flags, kind=sft):
    return config.parse(kind.Config, ["--model", "m", "--out", "o", "--data.path", "d", *flags], ("config",))


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((*STAGED, "2", "--train.gradient-checkpointing", "false"), "experts have left the device"),
        (("--experts.kept", "3"), "experts.kept is given, but all experts are on the device"),
        (("--experts.home", "device", "--experts.slots", "3", "--fit", "auto"), "experts.slots is given"),
        (("--experts.home", "ram", "--experts.profile", "p"), "which experts to keep"),
        (("--experts.home", "disk", "--train.expert-parallel", "2"), "each process holds its own"),
        (("--ram", "much"), "ram=much: 'much' is not a size"),
        pytest.param(
            ("--vram", "12GB"), "vram=12GB: there is no GPU here",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU"),
        ),
    ],
)  # fmt: skip
def test_options_that_contradict_each_other_are_refused_before_anything_is_loaded(flags, said):
    for kind in (sft, dpo):
        with pytest.raises(UserError) as error:
            kind.check(settings(*flags, kind=kind))
        assert said in error.value.message


def test_a_home_is_one_word_or_one_for_each_layer(tmp_path):
    place = settings("--experts.home", "ram").experts
    assert place.homes == "ram" and place.offloaded
    assert settings().experts.homes == "device" and not settings().experts.offloaded
    mixed = settings("--experts.home", "device,ram,ram")
    assert mixed.experts.homes == ("device", "ram", "ram")
    for cfg in (mixed, settings("--experts.home", "disk")):
        config.save(cfg, tmp_path / "c.yaml")
        again = config.parse(sft.Config, [str(tmp_path / "c.yaml")], ("config",))
        assert again.experts == cfg.experts
    assert yaml.safe_load((tmp_path / "c.yaml").read_text())["experts"]["home"] == "disk"
    with pytest.raises(UserError, match="experts.home=rum"):
        settings("--experts.home", "rum")


def test_on_a_cpu_ram_is_the_device_unless_slots_are_asked_for():
    assert _fit.homes_of(ExpertsPlace(home="ram"), on_gpu=False) == "device"
    assert _fit.homes_of(ExpertsPlace(home="ram", slots=1), on_gpu=False) == "ram"
    assert _fit.homes_of(ExpertsPlace(home="ram"), on_gpu=True) == "ram"
    assert _fit.homes_of(ExpertsPlace(home=["ram", "disk"]), on_gpu=False) == ("device", "disk")


def test_experts_on_disk_of_a_model_that_is_not_packed_there(checkpoint, job, capsys, tmp_path):
    import shutil

    plain = tmp_path / "plain"
    shutil.copytree(checkpoint("olmoe"), plain)
    tokenizer(CHATML).save_pretrained(plain)
    assert cli.main(["sft", str(job), "--model", str(plain), "--experts.home", "disk"]) == 2
    err = capsys.readouterr().err
    assert "is not packed on disk" in err and f"moesmith quantize {plain} --out plain-nf4" in err


# ---------------------------------------------------------------- offloaded runs


def test_an_offloaded_run_is_the_resident_run(job, capsys):
    expected = run(job, "resident")
    capsys.readouterr()
    assert run(job, "staged", *STAGED, 1, "--experts.kept", 3, "--experts.statistics") == expected
    out = capsys.readouterr().out
    assert "staging " in out and "of experts moved" in out
    moved = json.loads((job.parent / "staged" / "transfers.json").read_text())["transfers"]
    assert moved["bytes"] > 0 and len(moved["layers"]) == LAYERS
    assert yaml.safe_load((job.parent / "staged" / "config.yaml").read_text())["experts"]["home"] == "ram"
    assert run(job, "mapped", "--experts.home", "disk") == expected
    assert run(job, "mixed", "--experts.home", "device,ram,disk", "--experts.slots", 2) == expected


def test_a_layer_major_run_learns_the_same_and_moves_less(job):
    flags = (*STAGED, 1, "--train.max-steps", 6, "--train.eval-steps", 6, "--experts.statistics")
    expected, _ = run(job, "plain", *flags)
    found, adapter = run(job, "major", *flags, "--train.layer-major")
    assert run(job, "resident", *flags[4:], "--train.layer-major") == (found, adapter)
    for before, after in zip(expected, found, strict=True):
        assert before.keys() == after.keys()
        assert all(after[key] == pytest.approx(before[key], rel=1e-3) for key in before)
    figures = [json.loads((job.parent / out / "transfers.json").read_text()) for out in ("plain", "major")]
    plain, major = (f["transfers"]["bytes"] for f in figures)
    assert major < 0.75 * plain  # the evaluations and the one check of the loss are the same


def test_an_offloaded_run_on_pairs_is_the_resident_run(job, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run(job, "sft", "--train.max-steps", 1)
    pairs = [{"prompt": f"{i}+{i}?", "chosen": f"{2 * i}.", "rejected": f"{i} or so."} for i in range(10)]
    values = yaml.safe_load(job.read_text()) | {"adapter": str(tmp_path / "sft" / "last")}
    values["data"] = {"path": str(write_jsonl(tmp_path / "pairs.jsonl", pairs)), "eval_fraction": 0.2}
    job.write_text(yaml.safe_dump(values))
    steps = ("--train.max-steps", 2)
    expected = run(job, "resident", *steps, "--dpo.reference-cache", tmp_path / "a", command="dpo")
    found = run(job, "staged", *steps, *STAGED, 1, "--dpo.reference-cache", tmp_path / "b", command="dpo")
    assert found == expected


def test_the_experts_kept_are_the_hottest_of_a_profile(tmp_path):
    model = tiny.build("olmoe")
    tokens = (
        torch.arange(LAYERS * 4 * 8).reshape(LAYERS, 4, 8) % 7 + torch.tensor([5, 1, 9, 2, 8, 3, 7, 4]) * 100
    )
    made = profile(tokens)
    for i, layer in enumerate(made.layers):
        layer.name = f"model.layers.{i}.mlp.experts"
    made.write(tmp_path / "profile")
    assert _fit.hottest(tmp_path / "profile", model) == dict.fromkeys(range(LAYERS), [2, 4, 6, 0, 7, 5, 3, 1])
    with pytest.raises(UserError, match="knows none of this model's layers"):
        _fit.hottest(tmp_path / "profile", tiny.build("mixtral").model.embed_tokens)
    model.model.layers[1].mlp.experts.num_experts = 4
    with pytest.raises(UserError, match="had 8 experts when it was profiled, now it has 4"):
        _fit.hottest(tmp_path / "profile", model)


# ---------------------------------------------------------------- fit: auto


def test_a_planned_run_says_what_was_chosen_and_resumes_with_it(job, capsys, monkeypatch):
    values = yaml.safe_load(job.read_text())
    del values["train"]["batch_size"], values["train"]["grad_accum"]
    job.write_text(yaml.safe_dump(values))
    assert cli.main(["sft", str(job), "--fit", "auto", "--train.max-steps", "2", "--ram", "20GB"]) == 0
    out = capsys.readouterr().out
    assert "fit      experts nf4" in out and "of 20.0 GB" in out
    saved = yaml.safe_load((job.parent / "out" / "config.yaml").read_text())
    assert saved["fit"] == "none" and saved["ram"] == "20GB" and saved["lora"]["r"] == 2
    assert saved["train"]["batch_size"] * saved["train"]["grad_accum"] == 16

    def never(*args, **kwargs):
        raise AssertionError("planned again")

    monkeypatch.setattr("moesmith.plan.choose.best", never)
    (job.parent / "out" / "result.json").unlink()
    flags = ("--fit", "auto", "--train.max-steps", "2", "--ram", "20GB", "--resume")
    assert cli.main(["sft", str(job), *flags]) == 0


def test_what_is_given_is_not_the_planners_to_choose():
    cfg = settings(
        "--fit", "auto", "--experts.home", "ram", "--train.grad-accum", "3", "--quant.linears", "nf4"
    )
    fixed = _fit.fixed_by(cfg, {"linears"}, packing=True, on_gpu=True)
    expected = {"homes": "ram", "grad_accum": 3, "batch_size": 1, "linears": "nf4", "layer_major": False}
    assert fixed == expected | {"chunked_loss": True, "cache": 0}
    cfg = settings("--fit", "auto", "--train.gradient-checkpointing", "false")
    assert _fit.fixed_by(cfg, set(), packing=False, on_gpu=True)["homes"] == "device"


def test_what_was_chosen_becomes_the_options_of_the_run():
    cfg = settings("--fit", "auto")
    _fit.write(
        cfg, Choice(homes=("device", "disk"), kept=5, slots=1, layer_major=True, grad_accum=4), on_gpu=True
    )
    assert cfg.experts.homes == ("device", "disk") and (cfg.experts.kept, cfg.experts.slots) == (5, 1)
    assert cfg.train.layer_major and cfg.train.grad_accum == 4 and cfg.fit == "none"
    _fit.check(cfg)
    cfg = settings("--fit", "auto")
    _fit.write(cfg, Choice(double_quant=True, kept=5), on_gpu=False)
    assert not cfg.experts.offloaded and cfg.experts.kept == 0 and cfg.experts.slots is None
    assert cfg.quant.double_quant
    _fit.check(cfg)


def test_what_the_plan_made_pointless_is_not_left_for_the_resumed_run_to_refuse():
    for chosen, kept in ((Choice(), 0), (Choice(homes="disk"), 3)):
        cfg = settings("--fit", "auto", "--experts.kept", "3", "--experts.profile", "profile")
        _fit.write(cfg, replace(chosen, kept=kept), on_gpu=True)
        assert (cfg.experts.kept, cfg.experts.profile is not None) == (kept, kept > 0)
        cfg.experts.home = list(cfg.experts.home)  # as config.yaml gives it
        _fit.check(cfg)


def test_nothing_fits_is_one_error_with_the_smallest_need(job, capsys):
    assert cli.main(["sft", str(job), "--fit", "auto", "--ram", "50MB"]) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err and "MB" in err
    assert not (job.parent / "out").exists()


def test_a_run_that_takes_more_than_it_was_given_says_what_differed(capsys):
    planned = memory.MemoryPlan({"experts": 1000, "activations": 500}, loaded={"experts": 1000})

    class Result:
        peak_bytes = 2600

    _fit.say_difference(Result(), planned, within=2000)
    err = capsys.readouterr().err
    assert "2.6 kB" in err and "1.5 kB planned, 2.0 kB allowed" in err
    assert "what differed most: activations, 1.1 kB more than planned" in err
    Result.peak_bytes = 1550
    _fit.say_difference(Result(), planned, within=2000)
    assert capsys.readouterr().err == ""


def test_the_planner_gets_the_longest_row_and_the_rows_of_a_step(job, monkeypatch):
    asked = {}

    def best(shape, work, budget, machine=None, fixed=None):
        asked.update(work=work, budget=budget, fixed=fixed)
        return Planned(
            Choice(batch_size=2, grad_accum=2), Footprint({"dense": 1}), Times(1.0, 1.0, "compute")
        )

    monkeypatch.setattr("moesmith.plan.choose.best", best)
    assert cli.main(["sft", str(job), "--fit", "auto", "--ram", "3GB", "--dry-run"]) == 0
    work = asked["work"]
    assert (work.kind, work.batch, work.lora_r, work.dtype) == ("train", 4, 2, "float32")
    assert 10 < work.seq < 60 and 0 < work.learned < work.seq
    assert asked["budget"].ram_bytes == 3_000_000_000 and asked["budget"].disk
    assert asked["fixed"]["scheme"] == "nf4" and asked["fixed"]["batch_size"] == 2


# ---------------------------------------------------------------- killed while staging


@pytest.mark.slow
def test_an_offloaded_run_that_is_killed_while_staging_resumes_to_the_same_losses(job, tmp_path):
    """SIGKILL at moments in the middle of steps, then --resume: the log is that of a run nobody touched."""

    def start(*more, staged=True):
        flags = ["--train.max-steps", "8", *(STAGED if staged else ()), *(["1"] if staged else [])]
        arguments = [sys.executable, "-m", "moesmith", "sft", str(job), *flags, *more]
        return subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ)

    assert start("--out", str(tmp_path / "whole")).wait(600) == 0
    parts = tmp_path / "parts"
    for step in (2, 5):
        process = start("--out", str(parts), *(["--resume"] if (parts / "config.yaml").exists() else []))
        reached = False
        while process.poll() is None and not reached:
            time.sleep(0.01)
            lines = (parts / "log.jsonl").read_text().splitlines() if (parts / "log.jsonl").exists() else []
            reached = any(f'"step": {step},' in line and '"loss"' in line for line in lines)
        time.sleep(0.05)  # into the next step
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert reached
        assert not [entry for entry in parts.rglob("*") if entry.name == "transfers.json"]
    assert start("--out", str(parts), "--resume").wait(600) == 0
    assert losses(parts) == losses(tmp_path / "whole")
    assert (
        start("--out", str(tmp_path / "resident"), "--experts.home", "device").wait(600) != 0
    )  # slots given


@pytest.mark.slow
def test_ctrl_c_while_staging_loses_nothing(job, tmp_path):
    flags = [*STAGED, "1", "--train.max-steps", "6"]
    words = [sys.executable, "-m", "moesmith", "sft", str(job), *flags, "--out", str(tmp_path / "parts")]
    process = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    log = tmp_path / "parts" / "log.jsonl"
    while process.poll() is None and not (log.exists() and '"loss"' in log.read_text()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert "nothing lost" in out
    assert subprocess.run([*words, "--resume"], capture_output=True, timeout=600).returncode == 0
    words[words.index(str(tmp_path / "parts"))] = str(tmp_path / "whole")
    assert subprocess.run(words, capture_output=True, timeout=600).returncode == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
