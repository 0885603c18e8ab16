"""A server to test against: a tiny OLMoE with a chat tokenizer and two adapters, on a free loopback port.

    with served.running() as server:
        server.client().chat.completions.create(model="tiny", ...)

It runs in a thread of this process, so that `server.engine` can be looked into. `served.checkpoint(folder)`
writes the same model and adapters to disk, for tests that start `moesmith serve` as a process.
"""

from __future__ import annotations

import contextlib
import functools
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model

import chats
import moesmith
import tiny
from moesmith.serve.app import make_app
from moesmith.serve.engine import Engine, Served
from moesmith.serve.limits import Limits

BASE, ADAPTERS = "tiny", ("first", "second")
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {
    "type": "object", "properties": {"a": {"type": "integer"}}}}}]  # fmt: skip


def tokenizer() -> Any:
    return chats.tokenizer()


def _randomise(model: Any, adapter: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if adapter in name.split(".") and "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def model(scheme: str | None = "nf4") -> Any:
    """A tiny packed OLMoE under PEFT, with both adapters, each on attention and experts."""
    moesmith.register()
    made = tiny.build("olmoe")
    if scheme is not None:
        import tempfile

        from moesmith.experts.quantizer import ExpertsConfig

        with tempfile.TemporaryDirectory() as folder:
            made.save_pretrained(folder)
            made = type(made).from_pretrained(
                folder, quantization_config=ExpertsConfig(scheme), dtype=torch.float32
            )
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for number, name in enumerate(ADAPTERS):
            lora = LoraConfig(
                r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], target_parameters=targets
            )
            if number == 0:
                made = get_peft_model(made, lora, adapter_name=name)
            else:
                made.add_adapter(name, lora)
            _randomise(made, name, number)
    return made.eval()


def engine(context: int = 128, slots: int = 4, **options: Any) -> Engine:
    words = tokenizer()
    served = [Served(BASE, None, words), *(Served(name, name, words) for name in ADAPTERS)]
    return Engine(model(), served, context=context, slots=slots, **options)


def checkpoint(folder: Path) -> tuple[Path, dict[str, Path]]:
    """(model folder, {adapter name: its folder}): the 16-bit model and both adapters as files."""
    made = model(scheme=None)
    adapters = {}
    for name in ADAPTERS:
        made.save_pretrained(folder / "adapters", selected_adapters=[name])
        adapters[name] = folder / "adapters" / name
    tiny.save("olmoe", folder / "model")
    tokenizer().save_pretrained(folder / "model")
    return folder / "model", adapters


@dataclass
class Running:
    """A server that answers at `url`."""

    engine: Engine
    app: Any
    uvicorn: Any
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def server(self) -> Any:
        """The app's `Server`: gate, metrics, limits."""
        return self.app.state.server

    def client(self, key: str = "none", **options: Any) -> Any:
        """The real OpenAI client, without retries; one for the same arguments."""
        return _client(self.url, key, **{"max_retries": 0, "timeout": 60} | options)


def ask(client: Any, name: str = BASE, text: str = "hi", **options: Any) -> Any:
    """A short greedy answer."""
    options = {"max_tokens": 12, "temperature": 0} | options
    return client.chat.completions.create(model=name, messages=[{"role": "user", "content": text}], **options)


@functools.cache
def _client(url: str, key: str, **options: Any) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{url}/v1", api_key=key, **options)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running(made: Engine | None = None, limits: Limits | None = None, **options: Any) -> Iterator[Running]:
    """The server, in a thread, until the block ends; `options` are the engine's."""
    import uvicorn

    made = made or engine(**options)
    app = make_app(made, limits)
    port = free_port()
    server = uvicorn.Server(
        uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error", timeout_graceful_shutdown=2)
    )
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 60
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline, "the server did not start"
        time.sleep(0.01)
    try:
        yield Running(made, app, server, port)
    finally:
        server.should_exit = True
        thread.join(20)
        made.stop(10)


@dataclass
class Process:
    """`moesmith serve` as a process of its own."""

    url: str
    pid: int
    process: Any
    models: list[str]

    def gauges(self) -> dict[str, float]:
        """What /metrics measures now, by name without the prefix."""
        import urllib.request

        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as answer:
            rows = [line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[:1] != "#"]
        return {name.removeprefix("moesmith_"): float(value) for name, value in rows}


@contextlib.contextmanager
def process(folder: Path, *flags: str) -> Iterator[Process]:
    """`moesmith serve` over `checkpoint(folder)`, on a free port; killed at the end if it still runs."""
    import json
    import subprocess
    import sys

    model, adapters = checkpoint(folder)
    words = [f"--adapter={name}={place}" for name, place in adapters.items()]
    started = subprocess.Popen(
        [sys.executable, "-m", "moesmith", "serve", str(model), "--name", BASE, *words, "--port", "0",
         "--json", "--context", "128", "--dtype", "float32", *flags],
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert started.stdout is not None
        text = ""
        while not text.endswith("}\n"):
            line = started.stdout.readline()
            assert line, f"the server did not start: {started.wait(60)}"
            text += line
        facts = json.loads(text)
        yield Process(facts["url"], facts["pid"], started, facts["models"])
    finally:
        started.kill()
        started.wait(60)
        started.stdout.close()
