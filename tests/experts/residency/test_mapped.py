"""Experts on disk, computed with where they are mapped."""

from __future__ import annotations

import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesmith.experts.residency import mapped as module
from moesmith.experts.residency.mapped import Mapped
from moesmith.experts.residency.policy import Policy
from moesmith.ops.stack import PackedStack
from recording_link import homes

ALL = list(range(8))


@pytest.fixture
def there(tmp_path):
    """Homes that are memory-mapped; 64 x 512 and 512 x 64, so that an expert has pages of its own."""
    torch.manual_seed(0)
    made = {}
    for i in range(4):
        stacks = {
            name: PackedStack.quantize(torch.randn(8, n, d), "nf4", 64)
            for name, n, d in (("gate_up_proj", 128, 512), ("down_proj", 512, 128))
        }
        tensors = {
            f"{name}{part}": getattr(s, part) for name, s in stacks.items() for part in ("codes", "absmax")
        }
        save_file(tensors, tmp_path / f"{i}.safetensors")
        again = load_file(tmp_path / f"{i}.safetensors")
        made[f"layer {i}"] = {n: PackedStack(again[n + "codes"], again[n + "absmax"]) for n in stacks}
    return made


@pytest.fixture
def asked(monkeypatch):
    """Every span that the kernel is asked to read ahead, nothing being in memory."""
    spans = []
    monkeypatch.setattr(module.pages, "seems_in_memory", lambda start, nbytes: False)
    monkeypatch.setattr(module.pages, "will_need", lambda start, nbytes: spans.append((start, nbytes)))
    return spans


def span(there, layer, expert, name="gate_up_proj", part="codes"):
    tensor = getattr(there[f"layer {layer}"][name], part)[expert]
    return tensor.data_ptr(), tensor.numel() * tensor.element_size()


def flush(made):
    """Everything in the thread's queue is done."""
    made.close()


def test_the_stacks_are_lent_as_they_are(there):
    made = Mapped(there, Policy("disk"))
    with made.lend(1, [2], 1, False) as stacks:
        assert stacks["down_proj"] is there["layer 1"]["down_proj"]
    with made.again(1) as stacks, made.again(2, [1]):
        assert stacks["down_proj"] is there["layer 1"]["down_proj"]
    assert made.there(0) == ALL and made.there(0, [3]) == [3]
    made.close()
    made.close()


def test_the_experts_asked_for_are_read_ahead_and_no_others(there, asked):
    made = Mapped(there, Policy("disk"))
    with made.lend(1, [2, 5], 2, False):
        assert set(asked) == {
            span(there, 1, e, name, part)
            for e in (2, 5)
            for name in ("gate_up_proj", "down_proj")
            for part in ("codes", "absmax")
        }
    flush(made)
    assert len(asked) == 8


def test_what_is_in_memory_is_not_asked_for(there, asked, monkeypatch):
    monkeypatch.setattr(module.pages, "seems_in_memory", lambda start, nbytes: True)
    made = Mapped(there, Policy("disk"))
    with made.lend(1, ALL, 8, True):
        pass
    flush(made)
    assert asked == []


def test_while_all_is_in_memory_few_calls_look_and_a_cold_page_ends_that(there, monkeypatch):
    looked, cold = [], []

    def seems(start, nbytes):
        looked.append(start)
        return not cold

    monkeypatch.setattr(module.pages, "seems_in_memory", seems)
    monkeypatch.setattr(module.pages, "will_need", lambda start, nbytes: None)
    made = Mapped(there, Policy("disk"))

    def probes(count):
        found = []
        for i in range(count):
            before = len(looked)
            with made.lend(i % 4, [1, 2], 2, False):
                found.append(len(looked) > before)
        return found

    assert made.wants_prediction(1)
    assert all(probes(module.WARM)) and not made.wants_prediction(1)
    rare = probes(4 * module.PROBE)
    assert sum(rare) == 4
    cold.append(True)
    assert all(probes(2 * module.PROBE)[module.PROBE :]) and made.wants_prediction(1)
    made.close()


def test_where_the_kernel_does_not_tell_everything_is_asked_for(there, asked, monkeypatch):
    monkeypatch.setattr(module.pages, "seems_in_memory", lambda start, nbytes: True)
    monkeypatch.setattr(module.pages, "tells_residency", lambda paths: False)
    made = Mapped(there, Policy("disk"))
    with made.lend(1, [2], 1, False):
        pass
    flush(made)
    assert len(asked) == 4


def order(there, asked):
    """Layers in the order their first span was asked for."""
    where = {span(there, layer, e)[0]: layer for layer in range(4) for e in ALL}
    return list(dict.fromkeys(where[start] for start, _ in asked if start in where))


def test_training_reads_the_next_layer_and_on_the_way_back_the_one_before(there, asked):
    made = Mapped(there, Policy("disk"))
    done = threading.Event()
    for layer, following in ((0, 1), (1, 2), (2, 3), (3, 2), (3, 2), (2, 1), (1, 0)):
        asked.clear()
        with made.lend(layer, ALL, 8, True):
            done.clear()
            made._requests.put([])  # what comes before it in the queue is done when this is
        while not made._requests.empty():
            done.wait(0.001)
        if (layer, following) == (3, 2) and order(there, asked) == [3]:
            continue  # asked for already
        assert order(there, asked) == [layer, following]
    made.close()


def test_expected_experts_are_read_ahead(there, asked):
    made = Mapped(there, Policy("disk"), statistics=True)
    made.expect(2, [4])
    flush(made)
    assert span(there, 2, 4) in asked and len(asked) == 4
    with made.lend(2, [4, 5], 2, False):
        pass
    record = made.statistics()
    assert (record["predicted"], record["predicted_right"]) == (1, 1)
    off = Mapped(there, Policy("disk", prefetch=False))
    off.expect(1, [0])
    flush(off)
    assert len(asked) == 4 + 8


def test_statistics_count_bytes_and_what_was_in_memory(there, tmp_path):
    made = Mapped(there, Policy("disk"))
    assert made.statistics() == {}
    made.reset_statistics()
    for i in range(4):
        (tmp_path / f"{i}.safetensors").read_bytes()
    for layer in range(4):
        with made.lend(layer, [1, 3], 2, False, tokens=1):
            pass
    record = made.statistics()
    each = sum(stack.nbytes // 8 for stack in there["layer 0"].values())
    assert record["bytes"] == 8 * each == record["bytes_per_token"]
    assert record["in_memory"] == 1 and record["hit_rate"] == 1
    assert record["tokens"] == 1
    made.close()


def test_statistics_of_experts_that_were_not_in_memory(there, monkeypatch):
    cold = {span(there, 0, 3, name, part)[0] for name in there["layer 0"] for part in ("codes", "absmax")}
    monkeypatch.setattr(module.pages, "bytes_in_memory", lambda start, n: 0 if start in cold else n)
    made = Mapped(there, Policy("disk", prefetch=False), statistics=True)
    with made.lend(0, [1, 3], 2, False):
        pass
    record = made.statistics()
    assert (record["in_memory"], record["hits"], record["misses"]) == (0.5, 1, 1)
    made.close()


def test_experts_in_ordinary_memory_are_simply_there(asked):
    made = Mapped(homes(), Policy("disk"), statistics=True)
    with made.lend(0, ALL, 8, True):
        pass
    flush(made)
    assert asked == [] and made.statistics()["bytes"] == 0


def test_forgotten_it_ends_its_thread(there):
    before = set(threading.enumerate())
    made = Mapped(there, Policy("disk"))
    (thread,) = set(threading.enumerate()) - before
    del made
    thread.join(10)
    assert not thread.is_alive()
