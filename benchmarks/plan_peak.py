"""The memory that `moesmith plan` says against what is measured: training and decoding, on a CPU.

Every measurement is a process of its own that loads a packed model the way the commands do, trains two
optimizer steps (`train.sft.run_sft`, rows of exactly --seq tokens) or generates, while a thread samples its
anonymous memory (RssAnon: what cannot be dropped and read again from a file). The shapes have true widths,
top-k and norms of the published models, random weights, and fewer layers, experts and tokens in the
vocabulary, so that they fit a small disk. Figures: planned and measured bytes, their ratio, and the parts.
By default ten configurations, four of them with experts on disk; --only and --seq give more.

    python benchmarks/plan_peak.py [--only olmoe gpt_oss] [--seq 512 2048] [--folder DIR] [--model DIR ...]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from common import arguments, emit, say, table, thread_env

# True widths; layers, experts and vocabulary are cut.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": (
        "OlmoeConfig",
        {"hidden_size": 2048, "intermediate_size": 1024, "num_experts": 16, "num_experts_per_tok": 8,
         "num_hidden_layers": 4, "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 50304},
    ),
    "qwen3": (
        "Qwen3MoeConfig",
        {"hidden_size": 2048, "moe_intermediate_size": 768, "num_experts": 32, "num_experts_per_tok": 8,
         "num_hidden_layers": 4, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
         "vocab_size": 50304},
    ),
    "gemma4": (
        "Gemma4TextConfig",
        {"hidden_size": 2816, "intermediate_size": 2112, "moe_intermediate_size": 704, "num_experts": 16,
         "top_k_experts": 8, "enable_moe_block": True, "num_attention_heads": 16, "num_key_value_heads": 8,
         "num_global_key_value_heads": 2, "head_dim": 256, "global_head_dim": 512, "num_hidden_layers": 6,
         "hidden_size_per_layer_input": 0, "vocab_size": 65536, "attention_k_eq_v": True,
         "num_kv_shared_layers": 0, "final_logit_softcapping": None},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {"hidden_size": 2880, "intermediate_size": 2880, "num_local_experts": 8, "num_experts_per_tok": 4,
         "num_hidden_layers": 3, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
         "vocab_size": 50304, "sliding_window": 128},
    ),
}  # fmt: skip


def make(folder: Path, name: str) -> None:
    """A packed folder of random weights; the 16-bit files are there only meanwhile."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    from moesmith import ExpertsConfig

    kind, fields = SHAPES[name]
    config = getattr(transformers, kind)(**fields)
    torch.manual_seed(0)
    plain = folder.with_name(folder.name + "-16bit")
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(plain)
    del model
    packed = AutoModelForCausalLM.from_pretrained(
        plain, quantization_config=ExpertsConfig("nf4"), dtype=torch.bfloat16
    )
    packed.save_pretrained(folder)
    shutil.rmtree(plain)


# ---------------------------------------------------------------- one measurement, in a process of its own


def train(cfg: dict[str, Any], stages: dict[str, int]) -> None:
    """A few optimizer steps, the way `moesmith sft` makes them."""
    import numpy as np

    from moesmith.data.masks import Example
    from moesmith.jobs._fit import lent
    from moesmith.jobs._memory import anonymous_memory
    from moesmith.jobs._train import QuantConfig, load_model
    from moesmith.train.settings import ExpertsPlace, LoraSettings, RunSettings, TrainSettings
    from moesmith.train.sft import run_sft

    stages["imports"] = anonymous_memory()
    place = ExpertsPlace(home=[cfg["home"]])
    model, base = load_model(cfg["model"], QuantConfig(), "bfloat16", place)
    stages["loaded"] = anonymous_memory()
    vocabulary = model.config.get_text_config().vocab_size
    draw = np.random.default_rng(0)
    rows = []
    for i in range(8):
        ids = draw.integers(3, vocabulary, cfg["seq"], dtype=np.int32)
        labels = np.where(np.arange(cfg["seq"]) < cfg["seq"] - cfg["learned"], -100, ids).astype(np.int32)
        rows.append(Example(i + 1, ids, labels))
    settings = TrainSettings(
        max_steps=cfg["steps"], batch_size=cfg["batch"], grad_accum=cfg["accum"],
        gradient_checkpointing=cfg["checkpointing"], save_steps=cfg["steps"] + 1, eval_steps=cfg["steps"] + 1,
    )  # fmt: skip
    lora = LoraSettings(r=cfg["r"], targets=cfg["targets"])
    with tempfile.TemporaryDirectory() as out, lent(model):
        run = RunSettings(out=f"{out}/run", lora=lora, train=settings)
        run_sft(model, _tokenizer(), rows, [], run, base=base, quiet=True)
    stages["end"] = anonymous_memory()


def _tokenizer() -> Any:
    """As much of a tokenizer as training on prepared rows needs."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<pad>": 0, "<s>": 1, "</s>": 2}, unk_token="<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def decode(cfg: dict[str, Any], stages: dict[str, int]) -> None:
    """One answer after a prompt of --seq tokens."""
    import torch

    from moesmith.jobs._fit import lent
    from moesmith.jobs._memory import anonymous_memory
    from moesmith.jobs._train import QuantConfig, load_model
    from moesmith.train.settings import ExpertsPlace

    stages["imports"] = anonymous_memory()
    model, _ = load_model(cfg["model"], QuantConfig(), "bfloat16", ExpertsPlace(home=[cfg["home"]]))
    model.eval()
    stages["loaded"] = anonymous_memory()
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (1, cfg["seq"]), generator=torch.Generator().manual_seed(0))
    with lent(model):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
    stages["end"] = anonymous_memory()


def worker(cfg: dict[str, Any]) -> None:
    """Measure one configuration and print it as JSON."""
    from moesmith.jobs._memory import PeakMemory

    stages: dict[str, int] = {}
    started = time.perf_counter()
    with PeakMemory() as peak:
        (train if cfg["kind"] == "train" else decode)(cfg, stages)
    print("RESULT " + json.dumps({"peak": peak.nbytes, "seconds": time.perf_counter() - started, **stages}))


def measure(cfg: dict[str, Any]) -> dict[str, Any]:
    """Run `worker` in a fresh process."""
    done = subprocess.run(
        [sys.executable, __file__, "--worker", json.dumps(cfg)], capture_output=True, text=True,
        env=thread_env(cfg.get("threads", 1)),
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(lines[0].removeprefix("RESULT "))


# ---------------------------------------------------------------- all of them


def planned(cfg: dict[str, Any]) -> Any:
    """What the planner says for the same work."""
    from moesmith.models.checkpoint import Checkpoint
    from moesmith.plan.footprint import Choice, Work, footprint
    from moesmith.plan.shape import Shape

    shape = Shape.of_checkpoint(Checkpoint.open(cfg["model"], weights=False))
    if cfg["kind"] == "train":
        work = Work(
            "train", seq=cfg["seq"], batch=cfg["batch"] * cfg["accum"], lora_r=cfg["r"],
            lora_targets=tuple(cfg["targets"]), learned=cfg["learned"],
        )  # fmt: skip
        choice = Choice(
            homes=cfg["home"], checkpointing=cfg["checkpointing"], batch_size=cfg["batch"],
            grad_accum=cfg["accum"],
        )  # fmt: skip
    else:
        work = Work("decode", seq=cfg["seq"], context=cfg["seq"] + 16, lora_targets=())
        choice = Choice(homes=cfg["home"])
    return footprint(shape, work, choice, on_gpu=False)


def settings(model: str, seqs: list[int]) -> list[dict[str, Any]]:
    """The configurations of one model."""
    common = {"model": model, "steps": 2, "batch": 1, "accum": 2, "r": 16}
    common["targets"] = ["experts", "attention"]
    found = []
    for seq in seqs:
        for home, checkpointing in (("device", True), ("device", False), ("disk", True)):
            row = {"kind": "train", "seq": seq, "learned": seq // 2, "checkpointing": checkpointing}
            found.append({**common, **row, "home": home})
        found += [{"model": model, "kind": "decode", "seq": seq, "home": home} for home in ("device", "disk")]
    return found


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--only", nargs="*", default=["olmoe", "qwen3"], choices=list(SHAPES))
    parser.add_argument("--seq", nargs="*", type=int, default=[512])
    parser.add_argument("--model", nargs="*", default=[], help="packed folders to measure too")
    parser.add_argument("--folder", type=Path, help="where the packed shapes are made; kept if given")
    args = parser.parse_args()
    if args.worker:
        worker(json.loads(args.worker))
        return
    home = args.folder or Path(tempfile.mkdtemp(prefix="plan_peak"))
    rows = []
    try:
        for name in [*args.only, *args.model]:
            folder = Path(name) if name in args.model else home / name
            if not folder.exists():
                make(folder, name)
            for cfg in settings(str(folder), args.seq):
                measured = measure(cfg)
                plan = planned(cfg)
                ratio = plan.anonymous / measured["peak"]
                label = {"train": "SFT" if cfg.get("checkpointing") else "SFT, no checkpointing"}
                setting = {**cfg, "model": Path(name).name}
                emit("plan_peak", setting, {"planned": plan.anonymous, **measured, "ratio": ratio},
                     parts=dict(plan.device))  # fmt: skip
                rows.append(
                    [Path(name).name, label.get(cfg["kind"], "decode"), cfg["home"], cfg["seq"],
                     plan.anonymous / 1e6, measured["peak"] / 1e6, ratio]
                )  # fmt: skip
                say(f"{rows[-1]} {plan}")
            if args.folder is None and name not in args.model:
                shutil.rmtree(folder)
    finally:
        if args.folder is None:
            shutil.rmtree(home, ignore_errors=True)
    table(["model", "work", "experts", "tokens", "planned MB", "measured MB", "ratio"], rows)


if __name__ == "__main__":
    main()
