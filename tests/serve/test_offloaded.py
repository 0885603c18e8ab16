"""A server whose experts lie in RAM or on disk: the answers of resident ones, faults, counters, the page."""

import json
import os
import queue
import signal
import threading
import urllib.request

import pytest

import served
import tiny
from moesmith import console
from moesmith.errors import UserError
from moesmith.experts.residency.attach import attach, detach
from moesmith.experts.residency.policy import Policy
from moesmith.jobs import serve as job
from moesmith.jobs._transfers import Transfers
from moesmith.jobs.serve import Config
from moesmith.serve.engine import Engine, Served
from moesmith.serve.limits import Limits
from moesmith.serve.sampling import Sampling
from serve.test_cli import when_it_serves  # noqa: F401

NAMES = (served.BASE, *served.ADAPTERS)
PROMPTS = [[5 + (7 * i * j + 3 * i) % 90 for j in range(4 + 3 * i)] for i in range(1, 3)]
POLICIES = {
    "ram": Policy("ram", cache=4),
    "no cache, one slot": Policy("ram", slots=1, prefetch=False),
    "kept, mixed homes": Policy(("ram", "device", "ram"), kept=3, cache=1, slots=1),
    "cold on CPU": Policy("ram", cache=2, cold_on_cpu=True),
}


def begin(engine, name, prompt, how):
    events = queue.Queue()
    engine.submit(name, prompt, how, events.put)
    return events


def end(events):
    tokens, finish = [], None
    while finish is None:
        event = events.get(timeout=60)
        tokens += event.tokens
        finish = event.finish
    return [(token.id, token.logprob, token.top) for token in tokens], finish, event.error


def one_by_one(engine, how):
    """Every name's answer to every prompt, alone, with its log-probabilities."""
    return [end(begin(engine, name, prompt, how)) for name in NAMES for prompt in PROMPTS]


def ids(answers):
    return [[token[0] for token in tokens] for tokens, _, _ in answers]


@pytest.fixture(scope="module")
def model():
    return served.model()


def engine_of(model, policy=None, **options):
    lender = attach(model, policy, "cpu") if policy is not None else None
    words = served.tokenizer()
    names = [Served(served.BASE, None, words), *(Served(name, name, words) for name in served.ADAPTERS)]
    made = Engine(model, names, context=128, slots=4, **options)
    if lender is not None:
        lender.reset_statistics()
        made.transfers = Transfers(lender)
    return made


GREEDY = Sampling(8, top_logprobs=2)
SAMPLED = Sampling(8, temperature=1.3, seed=4, top_logprobs=2)


@pytest.fixture(scope="module")
def resident(model):
    """Answers without offload."""
    engine = engine_of(model)
    try:
        return one_by_one(engine, GREEDY), one_by_one(engine, SAMPLED)
    finally:
        engine.stop(10)


@pytest.fixture
def offloaded(model, request):
    """An engine over experts that are placed as `request.param` says."""
    engine = engine_of(model, POLICIES[request.param])
    yield engine
    engine.stop(10)
    detach(model)


@pytest.mark.parametrize("offloaded", POLICIES, indirect=True)
def test_batched_answers_are_those_of_resident_experts_bit_for_bit(offloaded, resident):
    assert offloaded.why_serial is None
    assert one_by_one(offloaded, GREEDY) == resident[0]
    assert one_by_one(offloaded, SAMPLED) == resident[1]
    moved = offloaded.transfers.lender.statistics()
    assert moved["bytes"] > 0 and moved["hits"] + moved["misses"] > 0


@pytest.mark.parametrize("offloaded", ["ram", "kept, mixed homes"], indirect=True)
def test_names_and_requests_at_once_get_their_own_answers(offloaded, resident):
    events = [begin(offloaded, name, prompt, GREEDY) for name in NAMES for prompt in PROMPTS]
    assert ids([end(one) for one in events]) == ids(resident[0])


def test_one_after_the_other_too(model):
    found = []
    for policy in (None, POLICIES["no cache, one slot"]):
        engine = engine_of(model, policy, serial=True)
        try:
            found.append(one_by_one(engine, GREEDY))
        finally:
            engine.stop(10)
            detach(model)
    assert found[0] == found[1]


@pytest.mark.parametrize("offloaded", ["ram"], indirect=True)
def test_scoring_and_the_picture_of_experts_are_those_of_resident_ones(offloaded, model):
    from moesmith.serve import experts

    def look():
        with offloaded.exclusive(served.ADAPTERS[0]) as inner:
            return experts.picture(inner, PROMPTS[1] + PROMPTS[0], len(PROMPTS[1]))

    scored, picture = offloaded.score(served.ADAPTERS[0], PROMPTS[1], 2), look()
    detach(model)
    assert offloaded.score(served.ADAPTERS[0], PROMPTS[1], 2) == scored and look() == picture


@pytest.mark.parametrize("offloaded", ["ram"], indirect=True)
def test_a_transfer_that_fails_ends_its_answer_with_its_words_and_the_next_is_whole(
    offloaded, resident, monkeypatch
):
    lender = offloaded.transfers.lender
    lend, calls = lender.lend, []

    def failing(layer, *args, **more):
        calls.append(layer)
        if len(calls) == 3 * tiny.LAYERS + 2:
            raise UserError(f"layer {layer}: model.safetensors could not be read")
        return lend(layer, *args, **more)

    monkeypatch.setattr(lender, "lend", failing)
    tokens, finish, error = end(begin(offloaded, served.BASE, PROMPTS[0], GREEDY))
    assert finish == "error" and "model.safetensors could not be read" in error and len(tokens) < 8
    assert end(begin(offloaded, served.BASE, PROMPTS[0], GREEDY)) == resident[0][0]
    assert offloaded.active() == offloaded.held() == 0


def gauges(url):
    with urllib.request.urlopen(f"{url}/metrics", timeout=30) as answer:
        lines = answer.read().decode().splitlines()
    kinds = dict(line.split()[2:] for line in lines if line.startswith("# TYPE"))
    values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name.removeprefix("moesmith_"): float(value) for name, value in values.items()}, kinds


def test_the_command_serves_counts_and_leaves_a_page(when_it_serves, tmp_path, capsys):  # noqa: F811
    folder, adapters = served.checkpoint(tmp_path)
    cfg = Config(
        model=str(folder), adapter=[f"first={adapters['first']}"], context=64, slots=2, dtype="float32",
        experts="ram", cache=2, transfers=tmp_path / "page", grace=5, device="cpu",
    )  # fmt: skip
    engine = job.make_engine(cfg)
    bound = job.listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    seen = []

    def client():
        try:
            for name in ("model", "first"):
                seen.append(gauges(url))
                body = json.dumps({"model": name, "prompt": [5, 6, 7], "max_tokens": 8, "ignore_eos": True})
                request = urllib.request.Request(
                    f"{url}/v1/completions", body.encode(), {"Content-Type": "application/json"}
                )
                assert (
                    json.load(urllib.request.urlopen(request, timeout=60))["usage"]["completion_tokens"] == 8
                )
            seen.append(gauges(url))
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    before = set(threading.enumerate())
    when_it_serves(client)
    console.set_json(True)
    try:
        job.serve(engine, Limits(), bound, cfg)
    finally:
        console.set_json(False)
    assert len(seen) == 3
    growing = [name for name in seen[0][0] if name.startswith("expert_")]
    assert len(growing) == 6 and all(seen[0][1][f"moesmith_{name}"] == "counter" for name in growing)
    for (earlier, _), (later, _) in zip(seen, seen[1:], strict=False):
        assert later["expert_bytes_total"] > earlier["expert_bytes_total"]
        assert all(later[name] >= earlier[name] for name in growing)
        asked = sum(
            later[f"expert_{key}_total"] - earlier[f"expert_{key}_total"] for key in ("hits", "misses")
        )
        assert asked >= 7 * tiny.LAYERS * tiny.TOP_K, "seven tokens were written one by one"
    page = json.loads((tmp_path / "page" / "report.json").read_text())
    assert page["transfers"]["bytes"] == seen[-1][0]["expert_bytes_total"]
    assert page["how"]["command"].startswith("moesmith serve ") and "--experts ram" in page["how"]["command"]
    assert "transfers: " in capsys.readouterr().err
    left = set(threading.enumerate()) - before
    assert not [thread for thread in left if "moesmith" in thread.name and thread.is_alive()]


def test_resident_experts_have_no_counters_and_a_plan_goes_to_the_model(tmp_path, monkeypatch):
    from moesmith.jobs import _experts_place as place

    folder, adapters = served.checkpoint(tmp_path)
    engine = job.make_engine(Config(model=str(folder), context=64, slots=2, device="cpu"))
    assert engine.transfers is None and engine.stop(10)
    planned = []

    def plan(cfg, checkpoint, base, work, scheme, on_gpu):
        planned.append((work, scheme))
        return place.Place("ram", kept=1, cache=2, packing={"scheme": "int8", "double_quant": False})

    monkeypatch.setattr(place, "plan_place", plan)
    given = [f"{name}={path}" for name, path in adapters.items()]
    engine = job.make_engine(
        Config(model=str(folder), adapter=given, context=64, slots=2, fit="auto", device="cpu")
    )
    assert engine.transfers is not None and engine.stop(10)
    engine.transfers.lender.close()
    assert {m.experts_scheme for m in engine.model.modules() if "experts_scheme" in m.__dict__} == {"int8"}
    [(work, scheme)] = planned
    assert (work.kind, work.streams, work.context, scheme) == ("serve", 2, 64, None) and work.trained > 0


def test_flags_are_checked_before_the_model_is_loaded(tmp_path, monkeypatch, capsys):
    from moesmith import cli

    monkeypatch.setattr(job, "make_engine", lambda cfg: pytest.fail("the model is loaded"))
    folder = tmp_path / "m"
    tiny.save("olmoe", folder)
    assert cli.main(["serve", str(folder), "--kept", "3", "--port", "0"]) == 2
    assert "--kept is about experts that do not lie on the device" in capsys.readouterr().err
