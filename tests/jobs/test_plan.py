"""What `moesmith plan` prints and refuses, on tiny configs."""

import json

import pytest

from moesmith import cli


def plan(capsys, folder, *argv) -> str:
    status = cli.main(["plan", str(folder), *argv])
    captured = capsys.readouterr()
    assert status == 0, captured.err
    return captured.out + captured.err


@pytest.fixture(autouse=True)
def nothing_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_the_page_says_what_fits_and_how_to_run_it(checkpoint, capsys):
    folder = checkpoint("olmoe")
    text = plan(capsys, folder, "--vram", "12GB", "--ram", "32GB", "--seq", "64")
    for words in (
        "olmoe for sft in 12.0 GB of GPU memory, 32.0 GB of RAM",
        "everything fits",
        "of 12.0 GB GPU",
        "gradients+optimizer",
        "cautious defaults, not measured",
        "what fits",
        f"next: moesmith quantize {folder} --out packed/",
        "moesmith sft run.yaml --model packed/",
    ):
        assert words in text
    assert "\x1b" not in text, "a pipe gets no colours"


def test_the_bar_is_as_long_as_the_budget(checkpoint, capsys):
    text = plan(capsys, checkpoint("olmoe"), "--vram", "12GB", "--ram", "32GB", "--for", "chat")
    bars = [
        line.removeprefix("peak").strip().split("  ")[0] for line in text.splitlines() if "peak" in line[:5]
    ]
    assert len(bars) == 2 and {len(bar) for bar in bars} == {60}
    assert 1 <= 60 - bars[0].count("·") <= 6, "half a GB of 12 is used"


def test_the_same_facts_for_a_program(checkpoint, capsys):
    argv = ["--vram", "12GB", "--ram", "32GB", "--seq", "64", "--experts", "ram", "--json"]
    facts = json.loads(plan(capsys, checkpoint("olmoe"), *argv))
    won = facts["plan"]
    assert won["choice"]["homes"] == "ram" and won["choice"]["checkpointing"]
    assert won["footprint"]["peak"] == sum(won["footprint"]["device"].values()) < 12e9
    assert facts["budget"] == {"device": 12_000_000_000, "ram": 32_000_000_000, "gpu": True}
    assert not facts["machine"]["measured"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--vram", "a lot"], "'a lot' is not a size"),
        (["--vram", "12GB", "--device", "cpu"], "--vram is of a GPU"),
        (["--seq", "0"], "seq=0 must be at least 1"),
        (["--vram", "100MB"], "of GPU memory at least, there is 100 MB"),
        (["--vram", "12GB", "--lora-targets", "dense_mlp"], "olmoe has no dense_mlp"),
    ],
)
def test_what_cannot_be_planned_is_refused(checkpoint, capsys, argv, words):
    assert cli.main(["plan", str(checkpoint("olmoe")), *argv]) != 0
    assert words in capsys.readouterr().err


def test_it_plans_for_this_cpu_and_for_a_server(checkpoint, capsys):
    text = plan(capsys, checkpoint("olmoe"), "--device", "cpu", "--for", "serve", "--ram", "8GB")
    assert "olmoe for serve in 8.0 GB of RAM" in text and "a token of 8" in text
