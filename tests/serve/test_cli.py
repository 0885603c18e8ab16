"""`moesmith serve`: what it is given, what it refuses early, and how it starts and stops."""

import importlib.util
import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.request

import pytest

import served
from moesmith import cli, console
from moesmith.errors import UserError
from moesmith.jobs import serve as job
from moesmith.jobs.serve import Config, named_adapters, read_size
from moesmith.models.checkpoint import fingerprint
from moesmith.serve.limits import Limits, is_loopback


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return served.checkpoint(tmp_path_factory.mktemp("served"))


def run(*words):
    return cli.main(["serve", *map(str, words)])


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (["a=x/y"], {"a": "x/y"}), (["a=x", "b=y"], {"a": "x", "b": "y"}), (["x/best"], {"best": "x/best"}),
        (["x/a=b"], {"a=b": "x/a=b"}),
    ],
)  # fmt: skip
def test_adapters_have_names(given, wanted):
    assert {name: str(folder) for name, folder in named_adapters(given).items()} == wanted


@pytest.mark.parametrize("given", [["=x"], ["a="], ["a=x", "a=y"], ["x/best", "y/best"]])
def test_adapters_without_a_name_of_their_own_are_refused(given):
    with pytest.raises(UserError):
        named_adapters(given)


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [("500", 500), ("500kB", 500_000), ("1MB", 10**6), ("1.5 mb", 1_500_000), ("1G", 10**9)],
)
def test_sizes_as_people_write_them(text, nbytes):
    assert read_size(text) == nbytes


@pytest.mark.parametrize("text", ["", "0", "MB", "-1MB", "1TBX", "one"])
def test_what_is_no_size(text):
    with pytest.raises(UserError, match="max_body"):
        read_size(text)


@pytest.mark.parametrize(
    ("host", "wanted"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("[::1]", True), ("localhost", True),
     ("0.0.0.0", False), ("::", False), ("192.168.0.2", False), ("example.org", False)],
)  # fmt: skip
def test_which_addresses_stay_on_this_machine(host, wanted):
    assert is_loopback(host) == wanted


@pytest.mark.parametrize(
    ("flags", "word"),
    [
        (["--slots", "0"], "slots=0"), (["--context", "1"], "context=1"), (["--port", "70000"], "port=70000"),
        (["--max-body", "x"], "max_body"), (["--timeout", "0"], "timeout"),
        (["--adapter", "a=/nowhere"], "nowhere"),
        (["--context", "100000"], "256 tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(files, flags, word, capsys):
    assert run(files[0], "--port", "0", *flags) == 2
    assert word in capsys.readouterr().err


def test_no_model_and_packages_that_are_missing(files, capsys, monkeypatch):
    assert run() == 2
    assert "missing MODEL" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert run(files[0]) == 2
    assert 'pip install "moesmith[serve]"' in capsys.readouterr().err


def test_a_port_that_is_taken_shows_before_the_model_is_loaded(files, capsys, monkeypatch):
    monkeypatch.setattr(job, "make_engine", lambda cfg: pytest.fail("the model is loaded"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        assert run(files[0], "--port", other.getsockname()[1]) == 2
    assert "--port 0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "warned", "local"),
    [([], False, True), (["--api-key", "k"], False, False), (["--host", "0.0.0.0"], True, False),
     (["--host", "0.0.0.0", "--api-key", "k"], False, False)],
)  # fmt: skip
def test_an_open_address_without_a_key_is_warned_of(files, flags, warned, local, capsys, monkeypatch):
    seen = []
    monkeypatch.setattr(job, "make_engine", lambda cfg: None)
    monkeypatch.setattr(job, "serve", lambda engine, limits, bound, cfg: seen.append(limits))
    assert run(files[0], "--port", "0", *flags) == 0
    assert ("other machines" in capsys.readouterr().err) == warned
    assert seen[0].local_only == local


def test_an_adapter_of_another_base_is_refused_and_a_matching_one_is_not(files, tmp_path):
    from transformers import AutoModelForCausalLM

    from moesmith import ExpertsConfig

    model, adapters = files
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=ExpertsConfig("nf4"))
    records = {"fits": fingerprint(loaded), "other": "0" * 16}
    for name, digest in records.items():
        shutil.copytree(adapters["first"], tmp_path / name)
        base = {"path": str(model), "fingerprint": digest, "scheme": "nf4"}
        (tmp_path / name / "moesmith.json").write_text(json.dumps({"base": base}))
    engine = job.make_engine(Config(adapter=[f"mine={tmp_path / 'fits'}", f"second={adapters['second']}"]))
    try:
        assert list(engine.served) == ["model", "mine", "second"]
        assert (engine.context, engine.why_serial) == (256, None)
    finally:
        engine.stop(10)
    with pytest.raises(UserError, match="another base"):
        job.make_engine(Config(model=str(model), adapter=[f"a={tmp_path / 'other'}"]))


@pytest.fixture
def when_it_serves(monkeypatch):
    """when_it_serves(work): run in a thread as soon as the server answers; signals are put back."""
    before = {sig: signal.getsignal(sig) for sig in (signal.SIGINT, signal.SIGTERM)}
    threads = [threading.Timer(60, os.kill, (os.getpid(), signal.SIGTERM))]  # no test hangs
    threads[0].start()
    announce = job.announce

    def start(work):
        def announced(*args):
            announce(*args)
            threads.append(threading.Thread(target=work, daemon=True))
            threads[-1].start()

        monkeypatch.setattr(job, "announce", announced)

    yield start
    threads[0].cancel()
    for thread in threads:
        thread.join(10)
    for sig, handler in before.items():
        signal.signal(sig, handler)


def chat_body(**fields):
    ask = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}], "ignore_eos": True}
    return json.dumps(ask | fields).encode()


@pytest.mark.parametrize("sig", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_after_the_answer_that_is_being_written(when_it_serves, capsys, sig):
    engine = served.engine()
    bound = job.listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    lines = []

    def client():
        body, kind = chat_body(stream=True, max_tokens=40), {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/chat/completions", body, kind)
        with urllib.request.urlopen(request, timeout=60) as answer:
            for line in answer:
                lines.append(line)
                if len(lines) == 6:
                    os.kill(os.getpid(), sig)

    when_it_serves(client)
    console.set_json(True)
    try:
        job.serve(engine, Limits(), bound, Config(model="x", grace=20))
    finally:
        console.set_json(False)
    written = capsys.readouterr()
    assert json.loads(written.out)["url"] == url
    assert "1 answer has 20 s" in written.err and "stopped" in written.err
    assert lines[-2] == b"data: [DONE]\n", "the answer was finished"
    assert sum(b'"content": "' in line for line in lines) > 30
    assert engine.active() == 0
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{url}/health", timeout=5)


def test_an_answer_that_outlasts_the_grace_is_cut_and_its_client_is_told(when_it_serves, capsys):
    engine = served.engine()
    bound = job.listen("127.0.0.1", 0)
    body = chat_body(max_tokens=100, stream=True)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    heard = []

    def client():
        with engine.exclusive("tiny"):  # nothing moves
            connection = socket.create_connection(bound.getsockname(), 10)
            connection.sendall((head + "Content-Type: application/json\r\n\r\n").encode() + body)
            while engine.active() == 0:
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)
            heard.extend(iter(lambda: connection.recv(1000), b""))
        connection.close()

    when_it_serves(client)
    job.serve(engine, Limits(), bound, Config(model="x", grace=0.5))
    assert engine.active() == engine.held() == 0
    assert b'"message": "the server stops"' in b"".join(heard)
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.slow  # a process of its own loads the libraries again
def test_the_command_as_a_process(tmp_path):
    with served.process(tmp_path) as server:
        assert server.models == [served.BASE, *served.ADAPTERS]
        assert server.gauges()["queue_used"] == 0
        os.kill(server.pid, signal.SIGTERM)
        assert server.process.wait(60) == 0
