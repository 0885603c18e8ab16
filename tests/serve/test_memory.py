"""The size of a cache is known before it is made, and one that does not fit is refused with figures."""

from __future__ import annotations

import pytest
import torch

import served
import tiny
from moesmith.errors import UserError
from moesmith.jobs import serve
from moesmith.serve import memory
from moesmith.serve.engine import Engine, Served


@pytest.fixture(scope="module")
def engine():
    made = served.engine()
    yield made
    made.stop(10)


def test_the_cache_takes_what_was_planned(engine):
    planned = memory.cache_bytes(engine.model, engine.context, engine.slots)
    assert planned == pytest.approx(engine.cache_bytes(), rel=0.15)
    assert memory.cache_bytes(engine.model, 2 * engine.context, engine.slots) > 1.4 * planned


def test_a_cache_that_does_not_fit_is_refused_and_what_is_advised_fits(monkeypatch):
    model = tiny.build("olmoe")
    base = [Served(served.BASE, None, served.tokenizer())]
    monkeypatch.setattr(memory, "free", lambda device: 10**7)
    with pytest.raises(
        UserError, match=r"1,000 answers of 128 tokens: .* GB for each name, 0.0 GB"
    ) as caught:
        Engine(model, base, context=128, slots=1000, serial=None)
    assert "lower --slots" in str(caught.value.hint)
    with pytest.raises(UserError) as caught:
        Engine(model, base, context=100_000, slots=4, serial=None)
    context = int(str(caught.value.hint).split()[1])
    assert 0 < memory.cache_bytes(model, context, 4) <= 10**7


def test_a_class_of_another_shape_has_no_planned_size(engine, monkeypatch):
    config = engine.model.config.get_text_config()
    monkeypatch.setattr(type(config), "get_text_config", lambda self, *_: type("Other", (), {})())
    assert memory.cache_bytes(engine.model, 128, 4) is None


def test_a_container_has_less_than_its_machine(monkeypatch):
    monkeypatch.setattr(memory.ram, "available", lambda: 3_000_000)
    assert memory.free(torch.device("cpu")) == 3_000_000


def test_caches_that_only_fit_one_by_one_are_warned_of(tmp_path, monkeypatch, capsys):
    folder, adapters = served.checkpoint(tmp_path)
    monkeypatch.setattr(serve, "put_adapters", lambda *_: served.model())
    monkeypatch.setattr(serve, "inner_name", lambda number: served.ADAPTERS[number])
    planned = memory.cache_bytes(served.model(), 64, 2)
    monkeypatch.setattr(memory, "free", lambda device: 2 * planned)
    given = [f"{name}={place}" for name, place in adapters.items()]
    engine = serve.make_engine(serve.Config(model=str(folder), adapter=given, context=64, slots=2))
    engine.stop(10)
    assert "if all 3 names are used" in capsys.readouterr().err
