"""Talk to a model: packed, packed on the way in, or packed with an adapter on it.

An adapter runs over the exact packed base it was trained on: what the adapter's moesmith.json says about its
base is checked against the model that was loaded. In the conversation /reset starts over and /exit leaves;
Ctrl-C stops an answer, not the program. Answers go to stdout, everything else to stderr. With --tools the
calls in an answer are shown, and never made: /result gives the model what they would return. /experts shows
which experts the last answer went through; /transfers what was fetched for it, when experts lie in RAM or on
disk. With --server the model is one that a server has loaded.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesmith import console
from moesmith.config import JobConfig, flag
from moesmith.errors import UserError
from moesmith.jobs._chat_model import Chat, end_of_turn
from moesmith.jobs._conversation import converse
from moesmith.jobs._experts_place import Place, PlaceFlags, check_place

if TYPE_CHECKING:
    from torch import nn

    from moesmith.data.tools import ToolSpec
    from moesmith.jobs._chat_server import ServerChat
    from moesmith.jobs._transfers import Transfers
    from moesmith.models.checkpoint import Checkpoint

__all__ = ["Chat", "Config", "end_of_turn", "load", "put_adapter", "recorded_base", "run"]

POSITIONAL = ("model",)
JSON = True
EXAMPLE = 'moesmith chat qwen3-nf4 --adapter out/best --prompt "What is 12 + 30?"'
OUT_OF_MEMORY = (
    "shorten the conversation (/reset), lower --max-new-tokens, load it in fewer bits (--scheme nf4), or "
    "leave experts in RAM or on disk: --fit auto"
)


class TalkFlags(JobConfig):
    """Who answers, and how."""

    model: str | None = None
    """Model folder or hub name, else the base that the adapter names; with --server, a name it serves."""
    adapter: Path | None = None
    """Folder of an adapter trained by `moesmith sft` or `moesmith dpo`."""
    server: str | None = None
    """Talk to a model of this OpenAI-compatible server (http://127.0.0.1:8000); nothing is loaded here."""
    api_key: str | None = None
    """What --server wants for a key, or a file that holds it."""
    scheme: Literal["nf4", "fp4", "int8", "fp8", "bf16", "none"] | None = None
    """How to pack a model that is not: as the adapter's base was, else nf4; none leaves it alone."""
    system: str | None = None
    """System message."""
    tools: Path | None = None
    """JSON list of tools the model may call; calls are shown, not made: /result TEXT answers one."""
    prompt: str | None = None
    """Answer this one message and leave; - reads it from stdin."""
    max_new_tokens: int = 512
    """Longest answer, in tokens."""
    temperature: float | None = None
    """0 is greedy; without it, the model's own generation settings hold."""
    top_p: float | None = None
    """Sample from the most likely tokens that make up this probability."""
    seed: int | None = None
    """Makes sampled answers repeatable."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of everything that is not packed; auto takes the checkpoint's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU if there is one."""


class Config(PlaceFlags, TalkFlags):
    """Keys of `moesmith chat`; the order of the bases puts where the experts lie last."""


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused: no model named, no such folder, no adapter in it."""
    from moesmith.models.checkpoint import local_folder

    if cfg.server is not None:
        check_server(cfg)
        return
    if cfg.api_key is not None:
        raise UserError("--api-key goes with --server")
    check_place(cfg)
    local_folder(named_model(cfg, recorded_base(cfg.adapter)))
    read_spec(cfg)
    if cfg.prompt is None and console.is_json():
        raise UserError("--json goes with --prompt")


def check_server(cfg: Config) -> None:
    """What says how to load a model means nothing for one that a server has loaded."""
    for name in ("adapter", "scheme", "dtype", "device", *PlaceFlags.model_fields):
        if name in cfg.model_fields_set:
            raise UserError(
                f"{flag(name)} does not go with --server: the server has loaded its model",
                "an adapter is served under a name of its own; MODEL picks one"
                if name == "adapter"
                else None,
            )
    read_spec(cfg)
    if cfg.prompt is None and console.is_json():
        raise UserError("--json goes with --prompt")


def run(cfg: Config) -> None:
    if cfg.server is not None:
        talk(cfg, join_server(cfg, cfg.server))
        return
    from moesmith.jobs._experts_place import put_experts
    from moesmith.jobs._transfers import watch

    base = recorded_base(cfg.adapter)
    source = named_model(cfg, base)
    place = find_place(cfg, source, base)
    started = time.perf_counter()
    folder, model, tokenizer = load(source, cfg, base, place)
    if cfg.adapter is not None:
        model = put_adapter(model, cfg.adapter, base, source)
    model.eval()
    on_gpu = uses_gpu(cfg.device)
    lender = put_experts(model, place, "cuda:0" if on_gpu else "cpu")
    transfers = watch(lender, model, place, on_gpu)
    console.note(f"{folder.name} loaded in {console.duration(time.perf_counter() - started)}")

    chat = Chat(model, tokenizer, settings(cfg, model), cfg.system, read_spec(cfg), transfers=transfers)
    if tokenizer.chat_template is None:
        console.note("no chat template: the model continues the text you give it")
    try:
        talk(cfg, chat)
    finally:
        if transfers is not None:
            transfers.lender.close()
    if transfers is not None and cfg.transfers is not None:
        write_transfers(cfg, cfg.transfers, transfers, folder.name)


def talk(cfg: Config, chat: Chat | ServerChat) -> None:
    """One answer, or a conversation."""
    if cfg.prompt is not None:
        prompt = sys.stdin.read().strip() if cfg.prompt == "-" else cfg.prompt
        answer = chat.answer(prompt, show=not console.is_json())
        console.emit({"prompt": prompt, **answer.facts()})
        return
    converse(chat)


def write_transfers(cfg: Config, folder: Path, transfers: Transfers, name: str) -> None:
    """The page of --transfers."""
    from moesmith.jobs import _transfers
    from moesmith.jobs._loop_words import command_line

    _transfers.page(folder, transfers.all(), name, command_line("chat", cfg, POSITIONAL))


def join_server(cfg: Config, url: str) -> ServerChat:
    """A conversation with a model of a server."""
    from moesmith.jobs._api_key import read_key
    from moesmith.jobs._chat_server import Server, ServerChat, pick_model

    check_settings(cfg)
    server = Server(url, read_key(cfg.api_key))
    name = pick_model(server, cfg.model)
    console.note(f"{name} at {server.url}")
    asked = {
        "max_tokens": cfg.max_new_tokens, "temperature": cfg.temperature, "top_p": cfg.top_p, "seed": cfg.seed
    }  # fmt: skip
    options = {key: value for key, value in asked.items() if value is not None}
    return ServerChat(server, name, options, cfg.system, read_spec(cfg))


def read_spec(cfg: Config) -> ToolSpec | None:
    """The tools of --tools."""
    from moesmith.data.tools import read_tools

    return read_tools(cfg.tools) if cfg.tools is not None else None


# ---------------------------------------------------------------- loading


def recorded_base(adapter: Path | None) -> dict[str, Any] | None:
    """What an adapter's moesmith.json says about the model it was trained on; None when nothing says it."""
    if adapter is None:
        return None
    from moesmith.config import no_such_file
    from moesmith.models.checkpoint import RECORD, read_json

    if not adapter.is_dir():
        raise no_such_file(adapter, "adapter")
    if not (adapter / "adapter_config.json").is_file():
        inner = sorted(path.parent for path in adapter.glob("*/adapter_config.json"))
        hint = f"did you mean {inner[0]}?" if inner else "an adapter folder holds adapter_config.json"
        raise UserError(f"adapter: {adapter} holds no adapter", hint)
    return read_json(adapter / RECORD).get("base") if (adapter / RECORD).is_file() else None


def named_model(cfg: Config, base: dict[str, Any] | None) -> str:
    """The model asked for, else the one the adapter was trained on."""
    source = cfg.model or (base or {}).get("path")
    if source is None:
        raise UserError(
            "missing MODEL", "moesmith chat MODEL, or --adapter with a folder that names its base"
        )
    return source


def uses_gpu(device: str) -> bool:
    """Whether --device comes to a GPU."""
    import torch

    return torch.cuda.is_available() if device == "auto" else device == "cuda"


def find_place(cfg: Config, source: str, base: dict[str, Any] | None) -> Place:
    """Where the experts go: as the flags say, or as the planner does."""
    from moesmith.jobs._experts_place import PROMPT, decode_work, settle
    from moesmith.models.checkpoint import Checkpoint, resolve

    if not {*PlaceFlags.model_fields} & cfg.model_fields_set:
        return Place()
    checkpoint = Checkpoint.open(resolve(source))
    adapters = [cfg.adapter] if cfg.adapter is not None else []
    work = decode_work(checkpoint, adapters, cfg.dtype, PROMPT + cfg.max_new_tokens)
    return settle(cfg, checkpoint, base, work, cfg.scheme, uses_gpu(cfg.device))


def load(
    source: str, cfg: Config, base: dict[str, Any] | None, place: Place | None = None
) -> tuple[Path, Any, Any]:
    """(folder, model, tokenizer); packed as asked, as the adapter remembers, or as it lies on disk.

    A model whose experts are going to lie elsewhere than on the device is loaded on the CPU.
    """
    import torch
    from transformers import AutoTokenizer, GenerationMixin

    from moesmith.models.checkpoint import Checkpoint, check_architecture, has_tokenizer, model_class, resolve

    folder = resolve(source)
    checkpoint = Checkpoint.open(folder)
    check_architecture(checkpoint.config)
    kind = model_class(checkpoint.config)
    if not issubclass(kind, GenerationMixin):
        raise UserError(f"{kind.__name__} cannot answer: it does not write a text token by token")
    # an adapter brings the tokenizer and the chat template it was trained with
    words = cfg.adapter if cfg.adapter is not None and has_tokenizer(cfg.adapter) else folder
    if not has_tokenizer(words):
        raise UserError(
            f"{folder} has no tokenizer", "copy tokenizer.json and tokenizer_config.json of the model there"
        )
    place = place or Place()
    if not console.stderr().is_terminal:
        from transformers.utils import logging

        logging.disable_progress_bar()
    model = kind.from_pretrained(
        folder,
        quantization_config=packing(checkpoint, cfg, place.packing or base),
        dtype=cfg.dtype if cfg.dtype == "auto" else getattr(torch, cfg.dtype),
        device_map={"": 0} if uses_gpu(cfg.device) and not place.offloaded else None,
    )
    return folder, model, AutoTokenizer.from_pretrained(words)


def packing(checkpoint: Checkpoint, cfg: Config, base: dict[str, Any] | None) -> Any:
    """The ExpertsConfig to load with; None for a checkpoint that is quantised already, or has no experts."""
    from moesmith.experts.quantizer import ExpertsConfig

    if checkpoint.quantization is not None:
        if cfg.scheme is not None:
            method = checkpoint.quantization.get("quant_method")
            raise UserError(
                f"--scheme {cfg.scheme}: {checkpoint.name} is quantised already ({method})",
                "leave --scheme out",
            )
        return None
    if cfg.scheme == "none":
        return None
    if not any("expert" in name for name in checkpoint.tensors):
        if cfg.scheme is not None:
            raise UserError(f"--scheme {cfg.scheme}: {checkpoint.name} has no experts", "leave --scheme out")
        console.note("no experts: loaded as it is")
        return None
    recorded = (
        {key: base[key] for key in ("linears", "double_quant", "blocksize") if base.get(key) is not None}
        if base
        else {}
    )
    return ExpertsConfig(cfg.scheme or (base or {}).get("scheme") or "nf4", **recorded)


def put_adapter(model: nn.Module, adapter: Path, base: dict[str, Any] | None, source: str) -> nn.Module:
    """The model with the adapter on it. Raises UserError if the adapter was trained on another base."""
    import warnings

    from peft import PeftModel

    from moesmith.models.checkpoint import fingerprint

    if base is None or not base.get("fingerprint"):
        console.warn(f"{adapter} does not say which model it was trained on: nothing checks that it fits")
    elif fingerprint(model) != base["fingerprint"]:
        words = [base.get("scheme"), "double quant" if base.get("double_quant") else None]
        how = ", ".join(word for word in words if word)
        raise UserError(
            f"{adapter} was trained on another base than {source}",
            f"its base: {base['path']}" + (f" ({how})" if how else "") + "; leave MODEL out to use that",
        )
    with warnings.catch_warnings():
        # PEFT only warns, and answers as if there were no adapter
        warnings.filterwarnings("error", message=".*missing adapter keys")
        try:
            return PeftModel.from_pretrained(model, adapter)
        except (UserWarning, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{adapter} does not fit {source}: {reason}") from None


def check_settings(cfg: Config) -> None:
    """Refuse what no model can be asked for."""
    if cfg.max_new_tokens < 1:
        raise UserError(f"max_new_tokens={cfg.max_new_tokens} must be at least 1")
    if cfg.temperature is not None and cfg.temperature < 0:
        raise UserError(f"temperature={cfg.temperature} must be 0 (greedy) or more")
    if cfg.top_p is not None and not 0 < cfg.top_p <= 1:
        raise UserError(f"top_p={cfg.top_p} must be above 0 and at most 1")


def settings(cfg: Config, model: Any) -> dict[str, Any]:
    """What `generate` is told beyond the model's own generation settings."""
    check_settings(cfg)
    if cfg.seed is not None:
        import torch

        torch.manual_seed(cfg.seed)
    chosen: dict[str, Any] = {"max_new_tokens": cfg.max_new_tokens}
    if cfg.temperature == 0:
        return chosen | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    if cfg.temperature is not None:
        chosen |= {"do_sample": True, "temperature": cfg.temperature}
    if cfg.top_p is not None:
        chosen |= {"do_sample": True, "top_p": cfg.top_p}
    return chosen
