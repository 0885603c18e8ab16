"""Ask a model questions whose answers are known, and count what it gets right and what goes wrong.

--requests asks for tool calls: each answer is judged against the calls its row ends in. --tasks asks
benchmarks of lm-eval, --gpqa the questions of GPQA. The folder has every answer, the figures (eval.json) and
a page. --against compares with an earlier run, item by item. A run that was stopped goes on when the same
command is given again.
"""

from __future__ import annotations

import hashlib
import platform
import shlex
import time
from pathlib import Path
from typing import Any, Literal

import pydantic

from moesmith import console
from moesmith.config import JobConfig
from moesmith.errors import UserError

POSITIONAL = ("model",)
JSON = True
EXAMPLE = "moesmith eval olmoe-nf4 --tools tools.json --requests held_out.jsonl --out run1/eval"
OUT_OF_MEMORY = "lower --batch-tokens or --batch-size; or load it in fewer bits: --scheme nf4"


class Config(JobConfig):
    model: str | None = None
    """Model folder or hub name; without it, the base that the adapter names."""
    requests: Path | None = None
    """Tool calls: chat rows that end in the right answer, JSONL; or a file of the Berkeley benchmark."""
    tasks: list[str] | None = None
    """Benchmarks: tasks of lm-eval by name, comma-separated; needs moesmith[eval]."""
    gpqa: Path | None = None
    """GPQA: its questions, JSONL or CSV."""
    out: Path
    """Folder to create: every answer, eval.json, report.html."""
    tools: Path | None = None
    """JSON list of the tools that are offered, for the rows that name none."""
    task_path: Path | None = None
    """Folder with task files (YAML) of your own."""
    few_shot: int | None = pydantic.Field(None, ge=0)
    """Solved examples before each question; without it, the task's own number."""
    chat_template: Literal["auto", "on", "off"] = "auto"
    """Ask through the chat template; auto does where there is one."""
    adapter: Path | None = None
    """Folder of an adapter trained by `moesmith sft` or `moesmith dpo`."""
    server: str | None = None
    """Ask a server with OpenAI's routes at this URL instead of loading a model."""
    server_model: str | None = None
    """The model's name there; without it, the first that the server lists."""
    concurrency: int = pydantic.Field(4, ge=1)
    """Requests that a server gets at a time."""
    against: Path | None = None
    """OUT of an earlier run on the same items, to compare with."""
    limit: int | None = pydantic.Field(None, ge=1)
    """Ask so many items at most (of each task), spread evenly."""
    max_new_tokens: int | None = pydantic.Field(None, ge=1)
    """Longest answer, in tokens; without it 128 for tool calls, what the task says for --tasks."""
    reasoning_tokens: int | None = pydantic.Field(None, ge=0)
    """Longest reasoning before the answer of a model that thinks first."""
    batch_size: int = pydantic.Field(16, ge=1)
    """Items in one batch, at most."""
    batch_tokens: int = pydantic.Field(16_384, ge=1)
    """Tokens in one batch, at most: prompts, answers and padding."""
    seed: int = 0
    """Shuffles choices and picks examples; the same seed gives the same prompts."""
    scheme: Literal["nf4", "fp4", "int8", "fp8", "bf16", "none"] | None = None
    """How to pack a model that is not: as the adapter's base was, else nf4; none leaves it alone."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of everything that is not packed; auto takes the checkpoint's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU if there is one."""
    overwrite: bool = False
    """Replace an earlier output of this command, or an interrupted run with other options."""

    @pydantic.model_validator(mode="after")
    def _one_kind(self) -> Config:
        given = [f"--{kind}" for kind in KINDS if getattr(self, kind)]
        if len(given) != 1:
            said = " and ".join(given) if given else "nothing to ask"
            raise UserError(said, "give one of --requests FILE, --tasks NAMES, --gpqa FILE")
        for name, kinds in ONLY_FOR.items():
            if name in self.model_fields_set and self.kind not in kinds:
                flags = " or ".join(f"--{kind}" for kind in kinds)
                raise UserError(f"--{name.replace('_', '-')} goes with {flags}, not with {given[0]}")
        if self.kind == "requests" and self.max_new_tokens is None:
            self.__dict__["max_new_tokens"] = 128  # not by assignment: that would read as if it were given
        return self

    @property
    def kind(self) -> str:
        """What is asked: requests, tasks or gpqa."""
        return next(kind for kind in KINDS if getattr(self, kind))


KINDS = ("requests", "tasks", "gpqa")
# Options that one kind has no use for are refused, not ignored.
ONLY_FOR = {
    "tools": ("requests",),
    "batch_tokens": ("requests", "gpqa"),
    "task_path": ("tasks",),
    "few_shot": ("tasks",),
    "chat_template": ("tasks",),
    "seed": ("tasks", "gpqa"),
    "reasoning_tokens": ("gpqa",),
}


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused: files that are not there, a place that is taken."""
    procedure(cfg).check(cfg)


def run(cfg: Config) -> None:
    procedure(cfg).run(cfg)


def procedure(cfg: Config) -> Any:
    """The module that asks this kind: jobs/_requests.py, _tasks.py or _gpqa.py."""
    from importlib import import_module

    return import_module(f"moesmith.jobs._{cfg.kind}")


# ---------------------------------------------------------------- shared by all kinds


def check_server(cfg: Config) -> None:
    """Raise UserError for --server beside options of a model that is loaded, and the other way round."""
    if cfg.server is not None:
        from moesmith.eval.served import root

        root(cfg.server)
        loading = ("model", "adapter", "scheme", "dtype", "device", "batch_size", "batch_tokens")
        given = [name for name in loading if name in cfg.model_fields_set and getattr(cfg, name) is not None]
        if given:
            words = "MODEL" if given[0] == "model" else "--" + given[0].replace("_", "-")
            raise UserError(f"{words} and --server: a server has loaded its model", "leave one of them out")
    else:
        given = [name for name in ("server_model", "concurrency") if name in cfg.model_fields_set]
        if given:
            raise UserError(f"--{given[0].replace('_', '-')} goes with --server")


def source_of(cfg: Config) -> tuple[str, dict[str, Any] | None]:
    """The model to load, and what the adapter says about its base; "" where a server needs none."""
    from moesmith.jobs.chat import recorded_base

    base = recorded_base(cfg.adapter)
    source = cfg.model or (base or {}).get("path") or ""
    if not source and cfg.server is None:
        raise UserError(
            "missing MODEL", "moesmith eval MODEL, or --adapter with a folder that names its base"
        )
    return source, base


def name_of(cfg: Config, source: str) -> str:
    """A short name: run1/best of an adapter, the folder's of a model."""
    parts = (cfg.adapter.resolve() if cfg.adapter is not None else Path(source)).parts
    return "/".join(parts[-2:] if cfg.adapter is not None else parts[-1:])


def read_tokenizer(folder: Path, cfg: Config) -> tuple[Any, int | None]:
    """The tokenizer, an adapter's if it brings one, and how many tokens the model sees: no weight is read."""
    from transformers import AutoTokenizer

    from moesmith.models.checkpoint import check_architecture, has_tokenizer, read_config

    config = read_config(folder)
    check_architecture(config)
    words = cfg.adapter if cfg.adapter is not None and has_tokenizer(cfg.adapter) else folder
    if not has_tokenizer(words):
        raise UserError(
            f"{folder} has no tokenizer", "copy tokenizer.json and tokenizer_config.json of the model there"
        )
    room = (config.get("text_config") or config).get("max_position_embeddings")
    return AutoTokenizer.from_pretrained(words), room


def adapter_digest(folder: Path) -> str:
    """A hash of an adapter's settings and weights."""
    digest = hashlib.sha256()
    for path in sorted([folder / "adapter_config.json", *folder.glob("adapter_model.*")]):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def load(source: str, base: dict[str, Any] | None, cfg: Config) -> Any:
    """The model with its adapter, ready to answer."""
    from moesmith.jobs import chat

    started = time.perf_counter()
    same = {name: getattr(cfg, name) for name in ("model", "adapter", "scheme", "dtype", "device")}
    folder, model, _ = chat.load(source, chat.Config(**same), base)
    if cfg.adapter is not None:
        model = chat.put_adapter(model, cfg.adapter, base, source)
    console.note(f"{folder.name} loaded in {console.duration(time.perf_counter() - started)}")
    return model.eval()


def machine(cfg: Config) -> str:
    """What the model runs on."""
    import torch

    if torch.cuda.is_available() and cfg.device != "cpu":
        return torch.cuda.get_device_name()
    return f"{platform.machine()}, {torch.get_num_threads()} threads"


def command(cfg: Config) -> str:
    """The command line that these options are."""
    words = ["moesmith", "eval", *([cfg.model] if cfg.model else [])]
    for name in type(cfg).model_fields:
        value = getattr(cfg, name)
        if name in POSITIONAL or name not in cfg.model_fields_set or value is None:
            continue
        flag = "--" + name.replace("_", "-")
        text = ",".join(value) if isinstance(value, list) else str(value)
        words += ([flag] if value else []) if isinstance(value, bool) else [flag, text]
    return shlex.join(words)
