"""Serve a model and its adapters to OpenAI's clients.

Every adapter runs over the one packed model, under a name of its own; the base answers under its folder's
name. There is a page to talk to it at /, /metrics for Prometheus and /health. Ctrl-C or SIGTERM stops it:
nothing new is taken, what is being written is finished within --grace seconds.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from moesmith import console
from moesmith.config import JobConfig
from moesmith.errors import UserError
from moesmith.jobs._experts_place import PlaceFlags, check_place

if TYPE_CHECKING:
    from moesmith.jobs._transfers import Transfers
    from moesmith.serve.engine import Engine
    from moesmith.serve.limits import Limits

POSITIONAL = ("model",)
JSON = True
EXAMPLE = "moesmith serve qwen3-nf4 --adapter tools=out/best --port 8000"
TELLING = 3  # seconds for telling clients that their answers have ended with the grace
OUT_OF_MEMORY = (
    "lower --context or --slots: both size the cache; load it in fewer bits (--scheme nf4), or leave "
    "experts in RAM or on disk: --fit auto"
)


class ServeFlags(JobConfig):
    """What is served, where, and how much of it."""

    model: str | None = None
    """Model folder or hub name; without it, the base that the first adapter names."""
    adapter: list[str] = []
    """NAME=DIR of an adapter trained on this model; repeat it for several. Clients ask for it by NAME."""
    name: str | None = None
    """What clients call the model without an adapter; its folder's name by default."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 is every network of this machine and wants --api-key."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """What clients must send, or a file that holds it: a file does not show in the list of processes."""
    context: int | None = None
    """Longest prompt and answer together, in tokens; 4,096 or what the model can, whichever is less."""
    slots: int = 8
    """Answers of one name that are written at once; more of them wait."""
    max_queue: int = 64
    """Answers that may wait; beyond that a client is told to come back later (429)."""
    max_new_tokens: int = 4096
    """Longest answer, also when a client asks for more."""
    max_body: str = "1MB"
    """Largest request."""
    timeout: float = 600
    """Seconds that one answer may take, waiting included."""
    grace: float = 30
    """Seconds that answers have to end when the server is stopped."""
    serial: bool = False
    """Write one answer after the other, without continuous batching."""
    scheme: Literal["nf4", "fp4", "int8", "fp8", "bf16", "none"] | None = None
    """How to pack a model that is not: as the first adapter's base was, else nf4; none leaves it alone."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Dtype of everything that is not packed; auto takes the checkpoint's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto uses the GPU if there is one."""


class Config(PlaceFlags, ServeFlags):
    """Keys of `moesmith serve`; the order of the bases puts where the experts lie last."""


def check(cfg: Config) -> None:
    """Refuse what needs no model to be refused."""
    from moesmith.jobs._api_key import read_key
    from moesmith.jobs.chat import recorded_base
    from moesmith.models.checkpoint import local_folder

    need_packages()
    check_place(cfg)
    adapters = named_adapters(cfg.adapter)
    for folder in adapters.values():
        recorded_base(folder)
    local_folder(source_of(cfg, adapters))
    for key, least in (("slots", 1), ("max_queue", 0), ("max_new_tokens", 1), ("timeout", 0.1), ("grace", 0)):
        if getattr(cfg, key) < least:
            raise UserError(f"{key}={getattr(cfg, key)} must be at least {least}")
    if cfg.context is not None and cfg.context < 2:
        raise UserError(f"context={cfg.context} must be at least 2 tokens")
    if not 0 <= cfg.port < 65536:
        raise UserError(f"port={cfg.port} must be 0 to 65535")
    read_size(cfg.max_body)
    read_key(cfg.api_key, slash=False)


def run(cfg: Config) -> None:
    from moesmith.jobs._api_key import read_key
    from moesmith.serve.limits import Limits, is_loopback

    key = read_key(cfg.api_key, slash=False)
    bound = listen(cfg.host, cfg.port)  # before the model is loaded: a port that is taken shows at once
    limits = Limits(
        api_key=key,
        max_body=read_size(cfg.max_body),
        max_queue=cfg.max_queue,
        max_new_tokens=cfg.max_new_tokens,
        timeout=cfg.timeout,
        local_only=key is None and is_loopback(cfg.host),
    )
    if key is None and not is_loopback(cfg.host):
        console.warn(
            f"{cfg.host} can be reached from other machines and there is no --api-key: whoever reaches port "
            f"{bound.getsockname()[1]} can use the model and read its last answers"
        )
    with bound:
        serve(make_engine(cfg), limits, bound, cfg)


# ---------------------------------------------------------------- what was given


def need_packages() -> None:
    """Refuse to go on without the packages of the server."""
    import importlib.util

    missing = [name for name in ("fastapi", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"not installed: {', '.join(missing)}", 'pip install "moesmith[serve]"')


def named_adapters(given: list[str]) -> dict[str, Path]:
    """NAME=DIR words as {name: folder}; without NAME= the folder's own name is taken."""
    found: dict[str, Path] = {}
    for word in given:
        name, equals, folder = word.partition("=")
        if not equals or "/" in name:  # a path may hold an equals sign
            name, folder = Path(word).resolve().name, word
        if not name or not folder:
            raise UserError(f"adapter: {word!r}", "wanted NAME=DIR, or DIR")
        if name in found:
            raise UserError(f"adapter: two are named {name}", "give each a name of its own: NAME=DIR")
        found[name] = Path(folder).expanduser()
    return found


def source_of(cfg: Config, adapters: dict[str, Path]) -> str:
    """The model asked for, else the one the first adapter was trained on."""
    from moesmith.jobs.chat import recorded_base

    base = recorded_base(next(iter(adapters.values()), None)) or {}
    source = cfg.model or base.get("path")
    if source is None:
        raise UserError(
            "missing MODEL", "moesmith serve MODEL, or --adapter with a folder that names its base"
        )
    return str(source)


def read_size(text: str) -> int:
    """Bytes of a size as people write it: 500000, 500kB, 1MB."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKmMgG]?)[bB]?\s*", text)
    scale = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
    nbytes = int(float(found[1]) * scale[found[2].lower()]) if found else 0
    if nbytes < 1:
        raise UserError(f"max_body={text!r} is no size", "wanted for example 500kB or 4MB")
    return nbytes


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises UserError if the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        made.bind((host.strip("[]"), port))
    except OSError as error:
        made.close()
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"cannot listen on {host}:{port}: {reason}", "--port 0 takes a free port") from None
    return made


# ---------------------------------------------------------------- the model


def make_engine(cfg: Config) -> Engine:
    """The model with its adapters, packed and ready to answer."""
    from transformers import AutoTokenizer

    from moesmith.jobs import chat
    from moesmith.jobs._experts_place import Place, decode_work, put_experts, settle
    from moesmith.jobs._transfers import watch
    from moesmith.models.checkpoint import Checkpoint, has_tokenizer, read_config, resolve
    from moesmith.serve.engine import Engine, Served

    adapters = named_adapters(cfg.adapter)
    bases = {name: chat.recorded_base(folder) for name, folder in adapters.items()}
    source = source_of(cfg, adapters)
    started = time.perf_counter()
    config = read_config(resolve(source))
    check_context(cfg.context, (config.get("text_config") or config).get("max_position_embeddings"))
    how = chat.Config(model=source, scheme=cfg.scheme, dtype=cfg.dtype, device=cfg.device)
    base, on_gpu, place = next(iter(bases.values()), None), chat.uses_gpu(cfg.device), Place()
    if {*PlaceFlags.model_fields} & cfg.model_fields_set:
        checkpoint = Checkpoint.open(resolve(source))
        work = decode_work(checkpoint, list(adapters.values()), cfg.dtype, cfg.context, cfg.slots)
        place = settle(cfg, checkpoint, base, work, cfg.scheme, on_gpu)
    folder, model, tokenizer = chat.load(source, how, base, place)
    name = cfg.name or Path(source).expanduser().resolve().name
    served = [Served(name, None, tokenizer)]
    if adapters:
        model = put_adapters(model, adapters, bases, source)
        for number, (word, beside) in enumerate(adapters.items()):
            words = AutoTokenizer.from_pretrained(beside) if has_tokenizer(beside) else tokenizer
            served.append(Served(word, inner_name(number), words))
    model.eval()
    lender = put_experts(model, place, "cuda:0" if on_gpu else "cpu")
    transfers = watch(lender, model, place, on_gpu)
    console.note(f"{folder.name} loaded in {console.duration(time.perf_counter() - started)}")
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 4096
    check_context(cfg.context, longest)
    engine = Engine(
        model,
        served,
        context=cfg.context or min(4096, longest),
        slots=cfg.slots,
        serial=True if cfg.serial else None,
    )
    if engine.why_serial is not None and not cfg.serial:
        console.warn(
            f"continuous batching does not work with {type(engine.model).__name__}: one answer is written "
            f"after the other ({engine.why_serial})"
        )
    together = len(served) * engine.cache_bytes()
    if together > engine.free:
        console.warn(
            f"if all {len(served)} names are used, their caches take {console.size(together)}, and "
            f"{console.size(engine.free)} are free: lower --context or --slots"
        )
    engine.transfers = transfers
    return engine


def check_context(context: int | None, longest: int | None) -> None:
    """Refuse a context that is longer than the model's."""
    if context is not None and longest is not None and context > longest:
        raise UserError(f"context={context}: the model takes {longest:,} tokens at most")


def inner_name(number: int) -> str:
    """PEFT's name of an adapter: names of modules are made of it, so it holds no dot."""
    return f"adapter{number}"


def put_adapters(
    model: Any, adapters: dict[str, Path], bases: dict[str, dict[str, Any] | None], source: str
) -> Any:
    """The model with every adapter on it, none active yet. Raises UserError if one is of another base."""
    import warnings

    from peft import PeftModel

    from moesmith.models.checkpoint import fingerprint

    mine = fingerprint(model)
    for name, base in bases.items():
        if base is None or not base.get("fingerprint"):
            console.warn(
                f"{adapters[name]} does not say which model it was trained on: nothing checks that it fits"
            )
        elif base["fingerprint"] != mine:
            words = [base.get("scheme"), "double quant" if base.get("double_quant") else None]
            how = ", ".join(word for word in words if word)
            raise UserError(
                f"{adapters[name]} was trained on another base than {source}",
                f"its base: {base['path']}" + (f" ({how})" if how else ""),
            )
    with warnings.catch_warnings():
        # PEFT only warns, and answers as if there were no adapter
        warnings.filterwarnings("error", message=".*missing adapter keys")
        for number, (name, folder) in enumerate(adapters.items()):
            try:
                if number == 0:
                    model = PeftModel.from_pretrained(model, folder, adapter_name=inner_name(number))
                else:
                    model.load_adapter(folder, adapter_name=inner_name(number))
            except (UserWarning, ValueError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"adapter {name}: {folder} does not fit {source}: {reason}") from None
    return model


# ---------------------------------------------------------------- the server


def serve(engine: Engine, limits: Limits, bound: socket.socket, cfg: Config) -> None:
    """Answer until a signal comes; then end what is being written, within the grace."""
    import logging
    import signal
    import threading

    import uvicorn

    from moesmith.serve.app import make_app

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                announce(engine, bound, cfg)

        def handle_exit(self, sig: int, frame: Any) -> None:
            engine.stopping = True
            if self.should_exit:
                self.force_exit = True  # asked twice
            else:
                if active := engine.active():
                    answers = "1 answer has" if active == 1 else f"{active} answers have"
                    console.note(f"stopping: {answers} {cfg.grace:.0f} s to end")
                # What is cut short from now on is meant to be: no tracebacks about it.
                logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
                late = threading.Timer(cfg.grace, engine.abandon)
                late.daemon = True
                late.start()
            super().handle_exit(sig, frame)

    # The server restores these when it is done, and raises the signal again for them.
    for sig in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sig, lambda *_: None)
    app = make_app(engine, limits)
    transfers: Transfers | None = engine.transfers
    if transfers is not None:
        app.state.server.metrics.also = transfers.totals
    settings = uvicorn.Config(
        app,
        log_level="error",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=round(cfg.grace) + TELLING,
        limit_concurrency=1024,
    )
    ended = False
    try:
        Server(settings).run(sockets=[bound])
    finally:
        ended = engine.stop(timeout=5)
    if transfers is not None and cfg.transfers is not None:
        write_transfers(cfg, cfg.transfers, transfers, next(iter(engine.served)))
    if transfers is not None and ended:
        transfers.lender.close()
    console.note("stopped")
    if not ended:
        # A forward that does not end would keep the process, and nothing of it is wanted any longer.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def write_transfers(cfg: Config, folder: Path, transfers: Transfers, name: str) -> None:
    """The page of --transfers."""
    from moesmith.jobs import _transfers
    from moesmith.jobs._loop_words import command_line

    _transfers.page(folder, transfers.all(), name, command_line("serve", cfg, POSITIONAL))


def announce(engine: Engine, bound: socket.socket, cfg: Config) -> None:
    """Where the server is and what it answers to."""
    host, port = bound.getsockname()[:2]
    shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{shown}:{port}"
    names = list(engine.served)
    cache = engine.cache_bytes()
    per_name = " for each name that is used" if len(names) > 1 else ""
    held = f", cache {console.size(cache)}{per_name}" if cache else ""
    console.row("models", ", ".join(names))
    console.row(
        "answers", f"{engine.slots} at once, {cfg.max_queue} waiting · {engine.context:,} tokens{held}"
    )
    console.row("serving", f"{url}/v1 · page {url}/ · {url}/metrics")
    console.next_command(f"moesmith chat --server {url}")
    console.emit(
        {
            "url": url, "pid": os.getpid(), "models": names, "context": engine.context, "slots": engine.slots,
            "cache_bytes": cache, "serial": engine.why_serial,
        }
    )  # fmt: skip
