"""The engine: answers of many requests and names at once are the answers that each would get alone."""

import queue
import threading
import time
from dataclasses import replace

import pytest
import torch
from transformers import GenerationConfig

import chats
import served
import tiny
from moesmith.errors import UserError
from moesmith.serve import batching
from moesmith.serve import engine as room
from moesmith.serve.engine import Engine, Served, Turns
from moesmith.serve.sampling import Sampling

NAMES = (served.BASE, *served.ADAPTERS)
PROMPTS = [[5 + (7 * i * j + 3 * i) % 90 for j in range(4 + 3 * i)] for i in range(1, 5)]


@pytest.fixture(scope="module")
def engine():
    made = served.engine()
    yield made
    made.stop(10)


class Heard:
    """What was told about a request."""

    def __init__(self, engine, name, prompt, how):
        self.events = queue.Queue()
        self.id = engine.submit(name, prompt, how, self.events.put)

    def end(self):
        tokens, finish = [], None
        while finish is None:
            event = self.events.get(timeout=60)
            tokens += event.tokens
            finish = event.finish
        return tokens, finish, event.error

    def ids(self):
        return [token.id for token in self.end()[0]]


def alone(engine, name, prompt, tokens):
    """The greedy answer by transformers' generate."""
    with engine.exclusive(name) as model:
        ids = torch.tensor([prompt])
        greedy = GenerationConfig(do_sample=False, max_new_tokens=tokens, pad_token_id=0)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)
    return out[0, len(prompt) :].tolist()


def test_the_model_is_batched(engine):
    assert engine.why_serial is None


def test_names_and_requests_served_together_get_the_answers_they_get_alone(engine):
    asked = [(name, prompt) for prompt in PROMPTS for name in NAMES]
    heard = [Heard(engine, name, prompt, Sampling(12)) for name, prompt in asked]
    found = [one.ids() for one in heard]
    assert found == [alone(engine, name, prompt, 12) for name, prompt in asked]
    by_name = [found[i :: len(NAMES)] for i in range(len(NAMES))]
    assert by_name[0] != by_name[1] != by_name[2] != by_name[0], "the adapters say something else"
    assert engine.active() == engine.held() == 0


def test_a_seed_gives_one_answer_alone_and_in_a_crowd(engine):
    how = Sampling(16, temperature=1.0, seed=5)
    single = Heard(engine, NAMES[1], PROMPTS[0], how).ids()
    crowd = [Heard(engine, NAMES[1], prompt, Sampling(16, temperature=2.0, seed=9)) for prompt in PROMPTS]
    again = Heard(engine, NAMES[1], PROMPTS[0], how).ids()
    other = Heard(engine, NAMES[1], PROMPTS[0], Sampling(16, temperature=1.0, seed=6)).ids()
    assert [one.ids() for one in crowd]
    assert single == again != other


@pytest.mark.parametrize("name", NAMES)
def test_log_probabilities_while_writing_are_those_of_scoring(engine, name, monkeypatch):
    monkeypatch.setattr(room, "CHUNK", 7)  # the text is scored in several parts
    prompt = PROMPTS[2]
    tokens, _, _ = Heard(engine, name, prompt, Sampling(10, temperature=1.5, top_logprobs=3)).end()
    scored = engine.score(name, prompt + [token.id for token in tokens], 3)
    assert scored[0].logprob is None
    for token, again in zip(tokens, scored[len(prompt) :], strict=True):
        assert token.id == again.id
        assert token.logprob == pytest.approx(again.logprob, abs=1e-4)
        assert dict(token.top) == pytest.approx(dict(again.top), abs=1e-4)
    with engine.exclusive(name) as model:
        whole = model(torch.tensor([prompt])).logits[0].float().log_softmax(-1)
    wanted = [float(whole[i, token]) for i, token in enumerate(prompt[1:])]
    assert [token.logprob for token in scored[1 : len(prompt)]] == pytest.approx(wanted, abs=1e-4)


def test_an_answer_ends_at_its_stop_token_and_at_its_length(engine):
    how = Sampling(12, temperature=1.5, seed=1)
    full = Heard(engine, served.BASE, PROMPTS[1], how).ids()
    at = next(i for i in range(1, 12) if full[i] not in full[:i])
    stops = replace(how, stop_ids=frozenset([full[at]]))
    tokens, finish, _ = Heard(engine, served.BASE, PROMPTS[1], stops).end()
    assert ([token.id for token in tokens], finish) == (full[: at + 1], "stop")
    tokens, finish, _ = Heard(engine, served.BASE, PROMPTS[1], replace(how, max_new_tokens=3)).end()
    assert ([token.id for token in tokens], finish) == (full[:3], "length")


def test_a_context_full_of_text_is_answered_up_to_its_last_token(engine):
    prompt = [5 + i % 90 for i in range(engine.context - 1)]
    heard = [Heard(engine, served.BASE, prompt, Sampling(1)) for _ in range(engine.slots + 1)]
    assert {len(one.ids()) for one in heard} == {1}


def test_a_cancelled_request_is_forgotten_and_the_others_go_on(engine):
    wanted = alone(engine, served.BASE, PROMPTS[0], 20)
    gone = Heard(engine, served.BASE, PROMPTS[1], Sampling(100))
    stays = Heard(engine, served.BASE, PROMPTS[0], Sampling(20))
    gone.events.get(timeout=60)
    engine.cancel(gone.id)
    told = gone.events.qsize()
    assert stays.ids() == wanted
    assert gone.events.qsize() == told
    assert engine.active() == engine.held() == 0
    engine.cancel(gone.id)  # twice does no harm


def test_nobody_runs_the_model_while_it_is_held(engine):
    heard = Heard(engine, served.BASE, PROMPTS[0], Sampling(60))
    heard.events.get(timeout=60)
    with engine.exclusive(served.ADAPTERS[0]) as model:
        wanted = model(torch.tensor([PROMPTS[0]])).logits
        time.sleep(0.1)  # whatever was under way has been told
        before = heard.events.qsize()
        for _ in range(5):
            assert torch.equal(model(torch.tensor([PROMPTS[0]])).logits, wanted)
            time.sleep(0.02)
        assert heard.events.qsize() == before
    assert heard.end()[1] == "length"


def test_a_forward_that_fails_ends_its_answers_and_the_next_ones_work(engine, monkeypatch):
    wanted = alone(engine, served.BASE, PROMPTS[0], 5)
    plain, left = batching.Voice.__call__, [1]

    def fails_once(self, **batch):
        if left and left.pop():
            raise RuntimeError("the disk is on fire")
        return plain(self, **batch)

    monkeypatch.setattr(batching.Voice, "__call__", fails_once)
    _, finish, error = Heard(engine, served.BASE, PROMPTS[0], Sampling(5)).end()
    assert finish == "error"
    assert "the disk is on fire" in error
    assert Heard(engine, served.BASE, PROMPTS[0], Sampling(5)).ids() == wanted
    assert engine.active() == engine.held() == 0


def test_the_last_answers_are_kept(engine):
    for i in range(room.KEPT + 3):
        engine.keep(f"reply{i}", served.BASE, [5], [40 + i % 50, 41])
    name, prompt, answer, pieces = engine.kept(f"reply{room.KEPT + 2}")
    assert (name, prompt, len(answer)) == (served.BASE, [5], 2)
    assert "".join(pieces) == served.tokenizer().decode(answer)
    assert engine.kept_count() == room.KEPT
    with pytest.raises(KeyError):
        engine.kept("reply2")


def test_stopping_ends_what_is_being_written_and_takes_nothing_new():
    before = set(threading.enumerate())
    made = Engine(tiny.build("olmoe"), [Served("m", None, chats.tokenizer())], context=2000, slots=2)
    heard = [Heard(made, "m", PROMPTS[0], Sampling(1900)) for _ in range(4)]
    heard[0].events.get(timeout=60)
    made.stop(10)
    assert {one.end()[1] for one in heard} == {"error"}
    with pytest.raises(RuntimeError, match="stops"):
        made.submit("m", PROMPTS[0], Sampling(4), print)
    assert set(threading.enumerate()) <= before, "its loop has ended"


# ---------------------------------------------------------------- other attention, other caches


def tiny_engine(family, **options):
    return Engine(tiny.build(family), [Served("m", None, chats.tokenizer())], context=96, slots=2, **options)


@pytest.mark.parametrize(
    ("family", "batched"),
    [("gpt_oss", True), ("gemma4", True), ("qwen3_next", False), ("deepseek_v3", False)],
)
def test_classes_that_cannot_be_batched_are_found_and_answer_one_by_one(family, batched):
    made = tiny_engine(family)
    try:
        assert (made.why_serial is None) == batched
        wanted = [alone(made, "m", prompt, 8) for prompt in PROMPTS[:3]]
        heard = [Heard(made, "m", prompt, Sampling(8)) for prompt in PROMPTS[:3]]
        assert [one.ids() for one in heard] == wanted
        # gpt_oss has no sdpa: its loop reads a paged cache, and whoever takes the model finds plain attention
        assert [alone(made, "m", prompt, 8) for prompt in PROMPTS[:1]] == wanted[:1]
        assert made.active() == made.held() == 0
    finally:
        made.stop(10)


def test_a_model_that_batches_wrongly_is_found(monkeypatch):
    plain = batching.Voice.__call__

    def wrong(self, **batch):
        batch["input_ids"] = (batch["input_ids"] + 1) % tiny.VOCAB
        return plain(self, **batch)

    monkeypatch.setattr(batching.Voice, "__call__", wrong)
    made = tiny_engine("olmoe")
    made.stop(10)
    assert "log-probabilities differ" in made.why_serial


def test_no_memory_for_the_cache_is_no_reason_to_go_on_without_it(monkeypatch):
    def full(self, **batch):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 GiB")

    monkeypatch.setattr(batching.Voice, "__call__", full)
    with pytest.raises(UserError, match="no memory for 2 answers of 96 tokens"):
        tiny_engine("olmoe")


def test_one_by_one_is_the_same_answer_and_can_be_cancelled():
    made = tiny_engine("olmoe", serial=True)
    try:
        wanted = alone(made, "m", PROMPTS[0], 10)
        first = Heard(made, "m", PROMPTS[1], Sampling(80))
        waits = Heard(made, "m", PROMPTS[2], Sampling(80))
        last = Heard(made, "m", PROMPTS[0], Sampling(10, top_logprobs=1))
        first.events.get(timeout=60)
        made.cancel(waits.id)
        made.cancel(first.id)
        tokens, finish, _ = last.end()
        assert ([token.id for token in tokens], finish) == (wanted, "length")
        assert tokens[0].logprob is not None
        assert waits.events.empty()
        assert made.active() == made.held() == 0
    finally:
        made.stop(10)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"slots": 0}, "slots=0"), ({"context": 1}, "context=1"), ({"names": ("a", "a")}, "one name")],
)
def test_what_cannot_be_served_is_refused(options, message):
    names = options.pop("names", ("a",))
    words = chats.tokenizer()
    with pytest.raises(UserError, match=message):
        Engine(tiny.build("olmoe"), [Served(name, None, words) for name in names], serial=True, **options)


# ---------------------------------------------------------------- turns


def test_turns_are_given_in_the_order_of_asking():
    turns, order, threads = Turns(), [], []

    def take(number):
        with turns:
            order.append(number)

    with turns:
        for number in range(8):
            threads.append(threading.Thread(target=take, args=(number,)))
            threads[-1].start()
            while turns._last < number + 2:  # it stands in line
                time.sleep(0.001)
    for thread in threads:
        thread.join(10)
    assert order == list(range(8))


def test_a_thread_that_has_its_turn_may_take_it_again():
    turns = Turns()
    with turns, turns:
        pass
    with turns:
        assert turns._depth == 1
