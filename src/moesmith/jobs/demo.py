"""Show it works, now: make a MoE out of a real small model, pack it, fine-tune it, talk to it.

SmolLM2-135M-Instruct becomes a native 16-expert Mixtral-class model, its experts are packed to 4 bits, and a
few minutes of QLoRA teach it to add, which it cannot at first. Under 10 minutes on 2 CPU cores. Every
artefact stays in one folder; a second run continues where the first one stopped.
"""

from __future__ import annotations

from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

import pydantic

from moesmith import console
from moesmith.config import JobConfig, save
from moesmith.jobs._demo import MODEL_NAME, Facts, Steps, Stopped
from moesmith.jobs._journey import Journey, Phase
from moesmith.train.settings import LoraSettings, TrainSettings

POSITIONAL = ()
JSON = True
EXAMPLE = "moesmith demo --out demo-out"

OWNED = ("config.yaml", "results.json", "sft.yaml", "dense", "data", "moe", "packed", "eval", "sft")


class DemoLora(LoraSettings):
    """The adapter: small, because the task is."""

    r: int = pydantic.Field(8, ge=1)
    """rank, per expert and per linear"""
    alpha: float = pydantic.Field(16, gt=0)
    """the update is scaled by alpha / r"""


class DemoTrain(TrainSettings):
    """The optimisation: many small steps, because time is short and rows are alike."""

    batch_size: int = pydantic.Field(3, ge=1)
    """conversations per forward pass"""
    grad_accum: int = pydantic.Field(1, ge=1)
    """forward passes per optimizer step"""
    lr: float = pydantic.Field(2e-3, gt=0)
    """highest learning rate"""
    min_lr_ratio: float = pydantic.Field(0.05, ge=0, le=1)
    """the cosine ends at this share of lr"""
    warmup: float = pydantic.Field(0.05, ge=0)
    """steps of linear warm-up, or their share of all steps when below 1"""
    eval_steps: int | None = pydantic.Field(75, ge=1)
    """evaluate every so many steps, before the first and after the last"""
    save_steps: int | None = pydantic.Field(75, ge=1)
    """write a checkpoint to continue from every so many steps"""
    gradient_checkpointing: bool = False
    """compute activations again in backward instead of keeping them"""


class Config(JobConfig):
    out: Path = Path("demo-out")
    """Folder for every artefact of the journey."""
    model: str | None = None
    """A dense chat model (folder or hub name) to use instead of SmolLM2-135M-Instruct."""
    num_experts: int = 16
    """Experts that each FFN is split into."""
    top_k: int = 12
    """How many of them a token gets."""
    scheme: Literal["nf4", "fp4", "int8", "fp8"] = "nf4"
    """How the experts are packed."""
    questions: int = 1300
    """Different problems to train on."""
    turns: int = 6
    """Problems in one training conversation."""
    held_out: int = 128
    """Other problems to judge by."""
    lora: DemoLora = DemoLora()
    train: DemoTrain = DemoTrain()
    seed: int = 0
    """Of everything that is drawn."""
    fresh: bool = False
    """Start over, removing what an earlier run wrote in OUT."""


def run(cfg: Config) -> None:
    journey = Journey(cfg.out, cfg.fresh, OWNED)
    save(cfg.model_copy(update={"fresh": False}), cfg.out / "config.yaml")
    steps = Steps(cfg)
    say_start(cfg)

    dense = journey.phase("dense", {"model": cfg.model}, [steps.dense], steps.get_dense)
    say("1 dense", dense, *dense_lines(dense.facts))
    data = journey.phase("data", steps.data_options(), [steps.data], steps.make_data)
    say("2 data", data, *data_lines(data.facts))
    split = journey.phase("split", steps.split_options(), [steps.moe], steps.split)
    say("3 split", split, *split_lines(split.facts, dense.facts))

    console.say(f"\n$ moesmith quantize {steps.moe} --out {steps.packed}", style="cyan")
    packed = journey.phase("pack", {"scheme": cfg.scheme}, [steps.packed], steps.pack)
    say("4 pack", packed, *pack_lines(packed.facts, cfg.scheme))
    before = journey.phase("before", {}, [steps.eval / "before.json"], steps.judge_before)
    say("5 before", before, *before_lines(before.facts))

    console.say(f"\n$ moesmith sft {steps.sft_yaml}", style="cyan")
    try:
        train = journey.phase("train", steps.train_options(), [steps.sft / "result.json"], steps.train)
    except Stopped:
        console.next_command(f"moesmith demo --out {cfg.out}   (goes on from here)")
        return
    say("6 train", train, *train_lines(train.facts))
    after = journey.phase("after", {}, [steps.eval / "after.json"], steps.judge_after)
    say("7 after", after, *after_lines(after.facts))

    summary = summarise(journey, cfg, steps.dtype)
    journey.write({"summary": summary})
    say_summary(summary, journey)
    console.row("written", f"{journey.file}, {cfg.out / 'config.yaml'}, and a folder for every phase")
    console.next_command(*next_commands(steps))
    console.emit({"out": str(cfg.out), **summary})


# ---------------------------------------------------------------- what the terminal shows


def say_start(cfg: Config) -> None:
    """What is going to happen, and where it goes."""
    name = MODEL_NAME if cfg.model is None else cfg.model
    console.row(
        "demo", f"{name} → {cfg.num_experts} experts, {cfg.top_k} active → {cfg.scheme} → fine-tuned → a chat"
    )
    console.row(
        "", f"about 7 minutes on 2 quiet cores · everything is kept in {cfg.out}/ · Ctrl-C loses nothing"
    )


def say(label: str, phase: Phase, *lines: str) -> None:
    """The lines of a phase, and what it took."""
    took = "kept from an earlier run" if phase.kept else console.duration(phase.seconds)
    for i, line in enumerate(lines):
        console.row("" if i else label, line if i else f"{line} · {took}")


def dense_lines(facts: Facts) -> list[str]:
    parameters = f"{facts['architecture']}, {facts['parameters']:,} parameters"
    return [f"{parameters} from {facts['source']} → {facts['path']} ({console.size(facts['bytes'])})"]


def data_lines(facts: Facts) -> list[str]:
    return [
        f"{facts['questions']:,} sums in {facts['conversations']:,} conversations to learn from, "
        f"{facts['held_out']} others to judge by, {facts['shared']} on both sides",
        f"{facts['chats']} everyday questions, answered by the dense model, to stay a chat model",
        "for example: " + " · ".join(facts["examples"]),
    ]


def split_lines(facts: Facts, dense: Facts) -> list[str]:
    loss = facts["text_loss"]
    all_of_them, active = facts["experts"], facts["top_k"]
    return [
        f"{dense['layers']} FFNs of {dense['ffn_width']:,} neurons → {all_of_them} experts of "
        f"{facts['width']}, {active} active, in {facts['class']}",
        f"all {all_of_them} active: logits within {facts['all_active_difference']:.0e} of the dense model's",
        f"{active} active, loss on unseen text: {loss['split']:.2f} with fitted routers, "
        f"{loss['random_router']:.2f} with random ones, dense {loss['dense']:.2f}",
    ]


def pack_lines(facts: Facts, scheme: str) -> list[str]:
    counts = facts["counts"]
    before, after = counts["expert_bytes_16bit"], counts["expert_bytes"]
    bits = 8 * after / counts["expert_parameters"]
    return [
        f"experts {console.size(before)} in 16 bits → {console.size(after)} in {scheme}: "
        f"{before / after:.1f} times smaller, {bits:.1f} bits per weight"
    ]


def before_lines(facts: Facts) -> list[str]:
    lines = [f"dense model: {score(facts['dense'])}", f"packed MoE:  {score(facts['packed'])}"]
    return [*lines, *(f"  {example(record)}" for record in facts["packed"]["examples"])]


def train_lines(facts: Facts) -> list[str]:
    rate = facts["tokens"] / facts["seconds"]
    return [
        f"{facts['steps']} steps, {facts['tokens']:,} tokens, {rate:,.0f} tok/s · loss of the held-out "
        f"answers {facts['first_eval_loss']:.2f} → {facts['best_eval_loss']:.2f}"
    ]


def after_lines(facts: Facts) -> list[str]:
    lines = [f"tuned MoE:   {score(facts['tuned'])}"]
    lines += [f"  {example(record)}" for record in facts["tuned"]["examples"]]
    for turn in facts["chat"]:
        lines += ["", f"you    {turn['question']}", f"model  {' '.join(turn['answer'].split())}"]
    return lines


def score(facts: Facts) -> str:
    """`3 of 128 right (2 %, 95 % interval 1 to 7 %), 5 more mention the right number`."""
    low, high = facts["interval_95"]
    share = f"{facts['rate']:.0%}, 95 % interval {low:.0%} to {high:.0%}"
    text = f"{facts['correct']} of {facts['n']} right ({share})"
    more = facts["mentioned"] - facts["correct"]
    return text + (f", {more} more mention the right number" if more else "")


def example(record: Facts) -> str:
    """A question, the answer and, when it is wrong, the right one."""
    answer = " ".join(record["answer"].split())
    right = "right" if record["score"] >= 1 else f"wrong, {record['gold']} is right"
    return f"{record['question']}  {answer}{' …' if record['cut'] else ''}  ({right})"


def summarise(journey: Journey, cfg: Config, dtype: str) -> Facts:
    """The figures of the whole journey, for `results.json` and `--json`."""
    phases = journey.phases
    split, pack = phases["split"].facts, phases["pack"].facts
    before, after, train = phases["before"].facts, phases["after"].facts, phases["train"].facts
    keys = ("n", "correct", "rate", "interval_95", "mentioned")
    return {
        "text_loss": {
            **split["text_loss"],
            "packed": before["text_loss"],
            "tuned": after["text_loss"],
        },
        "answer_loss": {"before": train["first_eval_loss"], "after": train["best_eval_loss"]},
        "exact_match": {
            "dense": {key: before["dense"][key] for key in keys},
            "before": {key: before["packed"][key] for key in keys},
            "after": {key: after["tuned"][key] for key in keys},
        },
        "expert_bytes": {
            "16bit": pack["counts"]["expert_bytes_16bit"],
            cfg.scheme: pack["counts"]["expert_bytes"],
        },
        "seconds": {name: phase.seconds for name, phase in phases.items()},
        "cpu_seconds": {name: phase.cpu_seconds for name, phase in phases.items()},
        "peak_bytes": {name: phase.peak_bytes for name, phase in phases.items()},
        "chat": after["chat"],
        "machine": {**machine(), "dtype": dtype},
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "trl")},
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def machine() -> Facts:
    """Processor and threads, so that seconds mean something later."""
    import platform

    import torch

    return {
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "os": platform.platform(),
    }


def say_summary(facts: Facts, journey: Journey) -> None:
    """The short table."""
    text, right, answer = facts["text_loss"], facts["exact_match"], facts["answer_loss"]
    size_16bit, size_packed = facts["expert_bytes"].values()

    def share(name: str) -> str:
        return f"{right[name]['rate']:.0%} of {right[name]['n']}"

    console.say()
    console.table(
        ["", "dense", "MoE, 16 bits", "packed", "fine-tuned"],
        [
            ["right answers", share("dense"), "", share("before"), share("after")],
            ["loss of the answers", "", "", f"{answer['before']:.2f}", f"{answer['after']:.2f}"],
            ["loss on unseen text", *(f"{text[name]:.2f}" for name in ("dense", "split", "packed", "tuned"))],
            [
                "experts in memory",
                "",
                console.size(size_16bit),
                console.size(size_packed),
                console.size(size_packed),
            ],
        ],
    )
    console.say()
    seconds = facts["seconds"]
    console.row("time", " · ".join(f"{name} {console.duration(value)}" for name, value in seconds.items()))
    console.row(
        "", f"{console.duration(sum(seconds.values()))} in all, on {facts['machine']['threads']} threads"
    )
    worst = max(facts["peak_bytes"], key=lambda name: facts["peak_bytes"][name])
    console.row("memory", f"peak {console.size(facts['peak_bytes'][worst])} of RAM, in {worst}")


def next_commands(steps: Steps) -> list[str]:
    """What to try with what is in the folder now."""
    return [
        f"moesmith chat --adapter {steps.sft / 'best'}",
        f"moesmith inspect {steps.packed}",
        f"moesmith sft {steps.sft_yaml} --out {steps.sft}-2 --lora.r 16",
    ]
