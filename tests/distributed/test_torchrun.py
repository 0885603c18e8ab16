"""`torchrun -m moesmith` as a person uses it: one terminal, one folder, Ctrl-C, and processes that die."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from chats import CHATML, sums, tokenizer, write_jsonl

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]

# Rank 1 fails in its fourth step, as a bug or a bad machine would make it.
FAILING = """
import os, sys
import moesmith
from moesmith import cli
from moesmith.train.trainer import Trainer

if os.environ["RANK"] == "1":
    step = Trainer.training_step

    def fail(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise ValueError("the seventh disk is on fire")
        return step(self, *args, **kwargs)

    Trainer.training_step = fail
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def model(checkpoint, tmp_path_factory):
    """A tiny OLMoE with a tokenizer and a chat template."""
    import shutil

    folder = tmp_path_factory.mktemp("model")
    shutil.copytree(checkpoint("olmoe"), folder, dirs_exist_ok=True)
    tokenizer(CHATML).save_pretrained(folder)
    return folder


@pytest.fixture
def job(model, tmp_path):
    write_jsonl(tmp_path / "rows.jsonl", sums(40))
    values = {
        "model": str(model), "out": str(tmp_path / "out"),
        "lora": {"r": 2, "targets": ["attention", "experts"]},
        "data": {"path": str(tmp_path / "rows.jsonl"), "eval_fraction": 0.1},
        "train": {"max_steps": 6, "batch_size": 2, "grad_accum": 3, "eval_steps": 3, "save_steps": 2},
    }  # fmt: skip
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def start(*args, launcher=(*TORCHRUN, "-m", "moesmith")):
    return subprocess.Popen(
        [*launcher, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def finish(process, seconds=300):
    """(exit status, everything it printed)"""
    try:
        said, _ = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, said


def losses(out: Path):
    entries = map(json.loads, (out / "log.jsonl").read_text().splitlines())
    return {(e["step"], k): e[k] for e in entries for k in ("loss", "eval_loss") if k in e}


def wait_for_step(process, out: Path, step: int):
    """rank -> process, once the run has taken so many steps."""
    deadline = time.monotonic() + 240
    while not (out / "log.jsonl").exists() or max(s for s, _ in losses(out)) < step:
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    found = {}
    for child in psutil.Process(process.pid).children(recursive=True):
        number = child.environ().get("RANK")
        if number is not None:
            found[int(number)] = child
    return found


def test_one_terminal_one_folder_and_the_losses_of_one_process(job):
    status, alone = finish(start(job, launcher=[sys.executable, "-m", "moesmith", "sft"]))
    assert status == 0, alone
    out = job.parent / "two"
    status, said = finish(start("sft", job, "--out", out))
    assert status == 0, said
    for line in ("data  ", "train  ", "step 3  held-out loss", "done  ", "next: moesmith chat"):
        assert said.count(line) == 1, f"{line} is said once: {said}"
    assert sorted(path.name for path in out.iterdir()) == sorted(
        path.name for path in (job.parent / "out").iterdir()
    )
    one, two = losses(job.parent / "out"), losses(out)
    assert one.keys() == two.keys()
    assert all(two[key] == pytest.approx(value, rel=2e-3) for key, value in one.items())  # bf16


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_run_which_goes_on_in_one(job, rank):
    out = job.parent / "killed"
    options = ("--out", out, "--train.max_steps", 40)
    process = start("sft", job, *options)
    children = wait_for_step(process, out, 5)
    children[rank].kill()
    killed = time.monotonic()
    status, said = finish(process)
    assert status != 0
    assert time.monotonic() - killed < 60
    assert f"rank {rank} of this run ended without a word: killed, or out of memory" in said
    newest = sorted(out.glob("checkpoints/checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))[-1]
    assert f"{newest} is whole: the same command with --resume goes on from it" in said
    assert not list(out.glob("checkpoints/.*"))

    one = (sys.executable, "-m", "moesmith")
    status, said = finish(start("sft", job, *options, "--resume", launcher=one))
    assert status == 0, said
    status, said = finish(start("sft", job, *options[2:], launcher=one))
    assert status == 0, said
    whole, parts = losses(job.parent / "out"), losses(out)
    assert whole.keys() == parts.keys()
    assert all(parts[key] == pytest.approx(value, rel=5e-3) for key, value in whole.items())


@pytest.mark.parametrize("how", [("--train.expert_parallel", 2), ("--train.sharding", "fsdp2")])
def test_a_killed_process_ends_a_run_that_has_split_the_model(job, how):
    out = job.parent / "killed"
    process = start("sft", job, "--out", out, "--train.max_steps", 40, *how)
    wait_for_step(process, out, 5)[1].kill()
    killed = time.monotonic()
    status, said = finish(process)
    assert status != 0
    assert time.monotonic() - killed < 60
    assert "rank 1 of this run ended without a word: killed, or out of memory" in said
    assert "is whole: the same command with --resume goes on from it" in said


FSDP = {
    "compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "num_machines": 1, "num_processes": 2,
    "machine_rank": 0, "mixed_precision": "bf16", "use_cpu": False,
    "fsdp_config": {
        "fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "fsdp_cpu_ram_efficient_loading": False, "fsdp_state_dict_type": "FULL_STATE_DICT",
    },
}  # fmt: skip


def test_accelerate_launch_with_its_own_fsdp(job):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = job.parent / "fsdp.yaml"
    config.write_text(yaml.safe_dump({**FSDP, "main_process_port": port}))
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "-m", "moesmith"]
    out = job.parent / "split"
    status, said = finish(start("sft", job, "--out", out, launcher=tuple(map(str, launch))))
    assert status == 0, said
    assert (out / "checkpoints/checkpoint-6/optimizer.bin").is_file()  # of weights that are split
    status, said = finish(start("sft", job, launcher=(sys.executable, "-m", "moesmith")))
    assert status == 0, said
    one, two = losses(job.parent / "out"), losses(out)
    assert one.keys() == two.keys()
    assert all(two[key] == pytest.approx(value, rel=2e-3) for key, value in one.items())


def test_an_error_in_one_process_is_the_runs(job):
    script = job.parent / "failing.py"
    script.write_text(FAILING)
    status, said = finish(start("sft", job, launcher=(*TORCHRUN, script)))
    assert status != 0
    assert "ValueError: the seventh disk is on fire" in said
    assert "rank 1 of this run ended: ValueError: the seventh disk is on fire" in said
    assert "checkpoint-2 is whole" in said


def test_ctrl_c_saves_once_and_resumes(job):
    out = job.parent / "out"
    process = start("sft", job, "--train.max_steps", 40)
    wait_for_step(process, out, 5)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: the launcher and its processes
    _, said = finish(process)
    assert said.count("saving, then stopping") == 1
    assert "nothing lost" in said
    step = max(s for s, _ in losses(out))
    assert (out / "checkpoints" / f"checkpoint-{step}").is_dir()
    assert not (out / "result.json").exists()


def test_an_error_that_all_processes_have_is_said_once(job):
    status, said = finish(start("sft", job, "--lora.targets", "shared_experts"))
    assert status != 0
    assert said.count("error: ") == 1 and "shared_experts" in said


def test_a_profile_is_written_once(model, tmp_path):
    write_jsonl(tmp_path / "text.jsonl", [{"text": f"{i} is not {i + 1}, and " * 9} for i in range(12)])
    write_jsonl(tmp_path / "ask.jsonl", [{"domain": "ask", "prompt": f"what is {i}?"} for i in range(6)])
    for source in (["--corpus", f"a={tmp_path / 'text.jsonl'}"], ["--prompts", str(tmp_path / "ask.jsonl")]):
        tokens = []
        for out, launcher in (
            ("one", (sys.executable, "-m", "moesmith")),
            ("two", (*TORCHRUN, "-m", "moesmith")),
        ):
            options = ["--max-length", 64, "--new-tokens", 8, "--batch-tokens", 128, "--overwrite"]
            run = start("profile", model, *source, "--out", tmp_path / out, *options, launcher=launcher)
            status, said = finish(run)
            assert status == 0, said
            assert said.count("observed ") == 1
            from moesmith.prune.stats import Profile

            profile = Profile.read(tmp_path / out)
            tokens.append([layer.sums["tokens"].tolist() for layer in profile.layers])
            assert not list((tmp_path / out).glob("*-of-*"))
        assert tokens[0] == tokens[1]
