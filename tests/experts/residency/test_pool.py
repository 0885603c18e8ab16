"""The scheduling of residency, with a link that brings bytes as late and overwrites as early as it may."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesmith.errors import UserError
from moesmith.experts.residency import arena
from moesmith.experts.residency.link import CpuLink
from moesmith.experts.residency.policy import Policy
from moesmith.experts.residency.pool import Residency
from recording_link import RecordingLink, expert_bytes, homes, same, staged

E = 8
ALL = list(range(E))


def residency(there=None, link=None, **policy):
    """(residency in RAM behind a recording link, the link, the homes)."""
    there = homes() if there is None else there
    link = RecordingLink() if link is None else link
    made = Residency(there, Policy(**{"homes": "ram", "slots": 2, **policy}), link)
    link.log.clear()
    return made, link, there


def lend(made, layer, experts=ALL, training=True, link=None):
    """One call of a layer: what is lent is what lies at home, and is read until the end."""
    with made.lend(layer, experts, len(experts), training) as stacks:
        same(stacks, made.at_home(layer), experts)
        if link is not None:
            use(link, stacks, experts)


def use(link, stacks, experts):
    """Tell the link that these experts are read until the next mark."""
    for stack in stacks.values():
        for tensor in (stack.codes, stack.absmax, stack.scale, stack.offset):
            for place in [] if tensor is None else stack.where[list(experts)].tolist():
                part = tensor[place]
                first = part.data_ptr()
                link.used.append((first, first + part.numel() * part.element_size(), link.marks + 1))


def training_step(made, layers=4, experts=ALL, link=None):
    """Forward and backward with gradient checkpointing: recompute, then the two projections' backward."""
    for layer in range(layers):
        lend(made, layer, experts, link=link)
    for layer in reversed(range(layers)):
        lend(made, layer, experts, link=link)
        for _ in range(2):
            with made.again(layer) as stacks:
                same(stacks, made.at_home(layer), experts)


# ---------------------------------------------------------------- order of staging


def test_training_stages_up_then_down():
    made, link, _ = residency()
    training_step(made)
    assert staged(link) == [0, 1, 2, 3, 1, 0]  # on top 3 and 2 are there; at the bottom 1 and 0 are
    link.log.clear()
    training_step(made)
    assert staged(link) == [2, 3, 1, 0]


def test_the_next_layer_is_sent_for_before_this_one_is_computed():
    made, link, _ = residency()
    with made.lend(0, ALL, E, True):
        assert staged(link) == [0, 1]
    with made.lend(1, ALL, E, True):
        assert staged(link) == [0, 1, 2]


def test_a_guess_that_was_right_is_not_sent_for_again():
    made, link, _ = residency()
    lend(made, 0)
    assert [event for event, layer, _ in link.log if layer == "layer 1"] == ["start"]
    lend(made, 1)
    assert [event for event, layer, _ in link.log if layer == "layer 1"] == ["start", "wait"]


@pytest.mark.parametrize(
    ("slots", "wanted"),
    [(1, [0, 1, 2, 3, 2, 1, 0]), (2, [0, 1, 2, 3, 1, 0]), (3, [0, 1, 2, 3, 0]), (4, [0, 1, 2, 3])],
)
def test_what_still_lies_there_is_not_fetched_again_in_backward(slots, wanted):
    made, link, _ = residency(slots=slots)
    training_step(made)
    assert staged(link) == wanted


def test_without_training_a_pass_goes_up_and_ends():
    made, link, _ = residency()
    for _ in range(2):
        for layer in range(4):
            lend(made, layer, training=False)
    assert staged(link) == [0, 1, 2, 3, 0, 1, 2, 3]


def test_without_prefetch_a_layer_comes_when_asked_for():
    made, link, _ = residency(prefetch=False)
    with made.lend(0, ALL, E, True):
        assert staged(link) == [0]
    made.expect(1, ALL)
    assert staged(link) == [0]


def test_one_layer_lent_in_slices_is_staged_once():
    """Layer-major accumulation: each layer's forward runs several times in a row."""
    made, link, _ = residency()
    for layer in range(4):
        for part in ([0, 1, 2, 3], [2, 5], ALL):
            lend(made, layer, part)
    for layer in reversed(range(4)):
        for part in (ALL, [0, 1, 2, 3], [2, 5]):
            lend(made, layer, part)
            with made.again(layer, part) as stacks:
                same(stacks, made.at_home(layer), part)
    assert link.moved <= 6 * E * expert_bytes(made.at_home(0))


def test_a_layer_that_is_skipped_or_started_over_is_only_slower():
    made, _, _ = residency()
    for layer in (0, 1, 3, 0, 1, 2, 3, 3, 2, 0, 1, 1, 2, 3, 3, 1):
        lend(made, layer)


def test_half_of_the_experts_are_flow_and_fewer_are_not():
    made, link, _ = residency(cache=4)
    lend(made, 0, [0, 1, 2], training=False)
    assert link.log == [("start", "layer 0", 3), ("wait", "layer 0", 3)]
    lend(made, 1, [0, 1, 2, 3], training=False)
    assert ("start", "layer 2", E) in link.log


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("slots", [1, 2, 3, 9])
@pytest.mark.parametrize("kept", [0, 3])
def test_never_more_on_the_device_than_the_policy_allows(slots, kept):
    made, link, there = residency(slots=slots, kept=kept, cache=1)
    each = expert_bytes(there["layer 0"])
    most = 4 * (kept + 1) + min(slots, 4) * (E - kept)
    assert made.device_bytes == most * each == arena.device_bytes(there, made.policy)
    rng = random.Random(0)
    for _ in range(3):
        training_step(made)
        for layer in range(4):
            lend(made, layer, rng.sample(ALL, 2), training=False)
            places = [p for i in range(4) for p in made._at[i].where.tolist() if p >= 0]
            assert len(set(places)) == len(places) <= most  # no two experts in one place


def test_every_copy_goes_to_the_arena():
    made, link, _ = residency()
    tensors = {id(t): t for it in made._at.values() for t in it.arena.tensors.values()}.values()
    spans = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size()) for t in tensors]
    start = link.start

    def checked(copies, after=None):
        for copy in copies:
            first = copy.target.data_ptr()
            assert any(a <= first and first + copy.nbytes <= b for a, b in spans)
        return start(copies, after)

    link.start = checked
    training_step(made)


def test_kept_experts_never_move_again():
    made, link, there = residency(kept=3, hot={0: [5, 1, 7], 1: [2]})
    moved = link.moved
    assert moved == 12 * expert_bytes(there["layer 0"])
    for layer, kept in ((0, [1, 5, 7]), (1, [0, 1, 2]), (2, [0, 1, 2])):
        lend(made, layer, kept, training=False)
    assert link.moved == moved
    lend(made, 0, training=True)
    assert link.moved == moved + 2 * 5 * expert_bytes(there["layer 0"])  # this layer and the next


def test_all_experts_kept_need_no_slot():
    made, link, _ = residency(kept=E, slots=0)
    training_step(made)
    assert link.log == []


def test_no_slot_is_an_error():
    with pytest.raises(UserError, match="slots=0"):
        residency(slots=0, kept=2)


def test_layers_of_different_shapes_get_memory_of_their_own():
    there = homes(2, 8) | {f"layer {i + 2}": s for i, s in enumerate(homes(2, 4, "int8").values())}
    there |= {"layer 4": homes(1, 6)["layer 0"]}
    made, _, _ = residency(there)
    counts = (8, 8, 4, 4, 6)
    for order in (range(5), reversed(range(5)), range(5)):
        for layer in order:
            lend(made, layer, list(range(counts[layer])))
    each = expert_bytes(there["layer 0"]), expert_bytes(there["layer 2"])
    assert made.device_bytes == 2 * 8 * each[0] + 2 * 4 * each[1]


def test_layers_at_home_on_the_device_are_lent_as_they_are():
    made, link, there = residency(homes=("device", "ram", "device", "disk"))
    with made.lend(0, [1], 1, False) as stacks:
        assert stacks["down_proj"] is there["layer 0"]["down_proj"]
        assert stacks["down_proj"].where is None
    training_step(made)
    assert set(staged(link)) == {1, 3}
    assert made.there(0) == ALL


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("scheme", ["nf4", "int8", "bf16"])
def test_every_scheme(scheme, double_quant):
    made, _, _ = residency(homes(3, scheme=scheme, double_quant=double_quant), kept=1, cache=2)
    training_step(made, 3)
    lend(made, 1, [3, 6], training=False)


# ---------------------------------------------------------------- decoding


def test_decoding_moves_the_experts_asked_for_and_no_other():
    made, link, there = residency(cache=4)
    lend(made, 2, [1, 6], training=False)
    assert link.moved == 2 * expert_bytes(there["layer 2"])
    lend(made, 2, [1, 6], training=False)
    lend(made, 2, [6], training=False)
    assert link.moved == 2 * expert_bytes(there["layer 2"])


def test_the_cache_drops_what_was_used_longest_ago():
    made, _, _ = residency(cache=3)
    for experts in ([0], [1], [2], [0], [3]):  # 1 is the oldest when 3 comes
        lend(made, 0, experts, training=False)
    assert made.there(0) == [0, 2, 3]


def test_more_experts_than_the_cache_holds_come_through_a_slot():
    made, link, _ = residency(cache=1, slots=1)
    for _ in range(2):
        for layer in range(4):
            lend(made, layer, [1, 4, 6], training=False, link=link)


def test_an_expected_expert_is_there_when_asked_for():
    made, link, _ = residency(cache=4)
    made.expect(1, [2, 5])
    assert link.log == [("start", "layer 1", 2)]
    lend(made, 1, [2, 5], training=False)
    assert [event for event, _, _ in link.log] == ["start", "wait"]


def test_a_guess_does_not_push_out_what_the_last_call_used():
    made, _, _ = residency(cache=2, slots=1)
    lend(made, 0, [0, 1], training=False)
    made.expect(0, [5, 6, 7])
    assert {0, 1} <= set(made.there(0))
    made, _, _ = residency(cache=3, slots=1)
    lend(made, 0, [4], training=False)
    lend(made, 0, [0, 1], training=False)
    made.expect(0, [5])
    assert made._at[0].cached.keys() == {0, 1, 5}


def test_guesses_that_are_mostly_wrong_are_not_fetched_until_they_are_right_again():
    made, link, _ = residency(cache=4)

    def guess(right):
        link.log.clear()
        fresh = [e for e in ALL if e not in made.there(1)][:2]
        made.expect(1, fresh)
        fetched = bool(link.log)
        lend(made, 1, fresh if right else [e for e in ALL if e not in fresh][:2], training=False)
        return fetched

    assert guess(True)
    wrong = [guess(False) for _ in range(8)]
    assert wrong[0] and not wrong[-1]
    right = [guess(True) for _ in range(8)]
    assert not right[0] and right[-1]


def test_who_is_asked_for_a_guess():
    made, _, _ = residency(cache=2, homes=("ram", "device", "ram", "ram"), kept=2)
    assert made.wants_prediction(0) and not made.wants_prediction(1)
    lend(made, 0)  # all of it is in a slot
    assert not made.wants_prediction(0)
    made._at[3].trust = 0.1
    assert [made.wants_prediction(3) for _ in range(32)] == ([False] * 15 + [True]) * 2
    assert not residency(slots=1)[0].wants_prediction(0)  # the layer computed before it has the slot
    assert residency(slots=2)[0].wants_prediction(0)
    assert not residency(cache=2, prefetch=False)[0].wants_prediction(0)
    assert not residency(kept=E)[0].wants_prediction(0)


def test_a_guess_finds_no_room_while_all_is_in_use():
    made, link, _ = residency(cache=0, slots=1)
    with made.lend(0, [0, 1], 2, False):
        log = list(link.log)
        made.expect(1, [3])
        assert link.log == log
    lend(made, 1, [3], training=False)


# ---------------------------------------------------------------- in use


def test_what_is_lent_is_not_overwritten():
    made, link, there = residency(slots=1, cache=0)
    with made.lend(0, [0, 1], 2, False) as stacks:
        with pytest.raises(UserError, match="slots are in use"), made.lend(1, [0], 1, False):
            pass
        same(stacks, there["layer 0"], [0, 1])
        with made.lend(0, [0, 5], 2, False) as more:  # the same layer's slot has room for it
            same(more, there["layer 0"], [0, 5])
        same(stacks, there["layer 0"], [0, 1])
    lend(made, 1)


def test_looking_ahead_does_not_push_out_what_comes_sooner():
    made, link, _ = residency(slots=3)
    with made.lend(3, ALL, E, True):  # one slot is in use, so there is none for layer 2
        lend(made, 0)
        assert [made.there(layer) for layer in range(4)] == [ALL, ALL, [], ALL]


def test_the_layer_that_is_wanted_last_makes_room():
    made, link, _ = residency(slots=3)
    for layer in (0, 1, 2, 3, 3):
        lend(made, layer)
    link.log.clear()
    lend(made, 0)  # a forward starts over before its backward: 3 goes, 1 and 2 stay
    assert staged(link) == [0] and made.there(3) == []


def test_a_copy_waits_for_the_mark_of_the_last_use():
    """The link refuses a copy into memory that is read until a later mark (see RecordingLink.start)."""
    for policy in ({"slots": 1}, {"slots": 2}, {"slots": 3, "kept": 2}):
        made, link, _ = residency(**policy)
        for _ in range(2):
            training_step(made, link=link)
    made, link, _ = residency(cache=2, slots=1)
    for i in range(12):
        for layer in range(4):
            lend(made, layer, [i % E, (i + 3) % E, (i + 4) % E], training=False, link=link)


@pytest.mark.parametrize("seed", range(12))
def test_any_walk_through_the_layers_gives_the_bits_of_home(seed):
    """Random calls, nested ones, guesses, training and decoding mixed."""
    rng = random.Random(seed)
    made, link, there = residency(
        homes(3), slots=rng.choice([1, 2, 3]), kept=rng.choice([0, 2]), cache=rng.choice([0, 1, 3, 5])
    )
    for _ in range(60):
        layer, count = rng.randrange(3), rng.randint(1, E)
        experts = sorted(rng.sample(ALL, count))
        if rng.random() < 0.3:
            made.expect(rng.randrange(3), rng.sample(ALL, 3))
        try:
            with made.lend(layer, experts, count, rng.random() < 0.5) as stacks:
                use(link, stacks, experts)
                if rng.random() < 0.3:
                    inner = rng.randrange(3)
                    try:
                        lend(made, inner, sorted(rng.sample(ALL, 2)), training=False, link=link)
                    except UserError as error:
                        assert "in use" in str(error)
                made.expect(rng.randrange(3), rng.sample(ALL, 2))
                same(stacks, there[f"layer {layer}"], experts)
            with made.again(layer) as stacks:
                same(stacks, there[f"layer {layer}"], experts)
        except UserError as error:
            assert "evicted" in str(error)
    assert not any(it.lent for it in made._at.values())


def test_backward_of_evicted_experts_fails_loudly():
    made, _, _ = residency()
    for layer in range(4):
        lend(made, layer)
    with made.again(3):
        pass
    with pytest.raises(UserError, match="layer 0: 8 of 8 experts were evicted before their backward"):
        with made.again(0):
            pass
    with pytest.raises(UserError, match="gradient checkpointing"), made.again(0):
        pass


def test_an_exception_inside_the_block_gives_back_what_was_lent():
    made, _, _ = residency(slots=1)
    with pytest.raises(KeyError), made.lend(0, ALL, E, True):
        raise KeyError
    lend(made, 1)


# ---------------------------------------------------------------- faults


def test_a_copy_that_fails_is_one_error_and_can_be_tried_again():
    made, link, _ = residency()
    link.fail = "layer 2, down_proj"
    lend(made, 1, training=False)  # sends for layer 2, which nobody waits for yet
    with pytest.raises(UserError, match=r"layer 2, down_proj, experts 0 to 7: the disk is gone"):
        lend(made, 2)
    with pytest.raises(UserError, match="the disk is gone"):
        lend(made, 2, [3], training=False)
    link.fail = ""
    for _ in range(2):
        training_step(made)


def test_a_copy_that_cannot_be_started_leaves_the_cache_its_room():
    made, link, _ = residency(cache=3)
    start, link.start = link.start, None  # not even callable
    with pytest.raises(TypeError):
        lend(made, 0, [1, 4, 6], training=False)
    link.start = start
    lend(made, 0, [1, 4, 6], training=False)
    assert made._at[0].cached.keys() == {1, 4, 6}


def test_the_first_copies_come_after_what_used_the_memory_before():
    """On a GPU the arena may be memory that earlier work has not finished with."""

    class Watching(RecordingLink):
        def start(self, copies, after=None):
            assert after is not None
            return super().start(copies, after)

    made, link, _ = residency(link=Watching(), kept=1, cache=2)
    lend(made, 0, [3], training=False)
    training_step(made)
    assert link.log


def test_a_kept_expert_that_cannot_be_read_is_an_error_at_once():
    link = RecordingLink(fail="layer 1, gate_up_proj, experts 0 to 1")
    with pytest.raises(UserError, match="layer 1, gate_up_proj"):
        residency(link=link, kept=2)
    assert link.closed


def on_file(there, folder):
    """The homes, their tensors memory-mapped."""
    for layer, stacks in there.items():
        for name, _, tensor in arena.tensors_of(stacks):
            file = folder / f"{layer} {name} {tensor.data_ptr()}.safetensors"
            save_file({"t": tensor}, file)
            tensor.data = load_file(file)["t"]
    return there


def test_homes_larger_than_the_ram_are_refused_before_anything_is_pinned(tmp_path, monkeypatch):
    there = on_file(homes(), tmp_path)
    nbytes = sum(stack.nbytes for stacks in there.values() for stack in stacks.values())
    monkeypatch.setattr(arena.ram, "available", lambda: nbytes - 1)
    link = RecordingLink(pins=True)
    with pytest.raises(UserError, match=r"GB of experts \(4 MoE layers\).*GB are available"):
        Residency(there, Policy("ram"), link)
    assert link.pinned_bytes == 0 and link.closed
    link = RecordingLink(pins=True)
    before = [stack.codes for stacks in there.values() for stack in stacks.values()]
    pointers = [codes.data_ptr() for codes in before]
    Residency(there, Policy(("ram", "ram", "disk", "device")), link)
    assert 2 * link.pinned_bytes == nbytes
    # the tensors are the same objects, so the model's parameters follow
    moved = [codes.data_ptr() != pointer for codes, pointer in zip(before, pointers, strict=True)]
    assert moved == [True] * 4 + [False] * 4


def test_homes_that_lie_in_ram_of_their_own_are_swapped_a_layer_at_a_time(monkeypatch):
    there = homes()
    layer = sum(stack.nbytes for stack in there["layer 0"].values())
    monkeypatch.setattr(arena.ram, "available", lambda: layer)
    link = RecordingLink(pins=True)
    Residency(there, Policy("ram"), link)
    assert link.pinned_bytes == 4 * layer
    monkeypatch.setattr(arena.ram, "available", lambda: layer - 1)
    with pytest.raises(UserError, match="page-locked"):
        Residency(there, Policy("ram"), RecordingLink(pins=True))


class SlowLink(CpuLink):
    """Every copy waits for the test's leave."""

    def __init__(self):
        super().__init__()
        self.leave = threading.Semaphore(0)

    def start(self, copies, after=None):
        self._worker.queue.put(self.leave.acquire)
        return super().start(copies, after)


def test_a_slow_disk_holds_up_only_who_needs_it():
    link = SlowLink()
    made = Residency(homes(), Policy("disk", slots=2), link)
    link.leave.release()
    lend(made, 0)  # layer 1 is on its way and does not arrive
    assert not next(iter(made._at[1].on_the_way.values())).done.is_set()
    lend(made, 0, [3])
    threading.Timer(0.05, link.leave.release, [2]).start()
    lend(made, 1)
    link.leave.release(99)
    made.close()


def test_closing_while_copies_are_under_way_ends_the_thread():
    link = SlowLink()
    made = Residency(homes(), Policy("disk", slots=2), link)
    link.leave.release()
    lend(made, 0)
    link.leave.release(99)
    made.close()
    made.close()
    assert not link._worker.thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        lend(made, 3)


def stage(seconds, report, then):
    """Lends layer 0 while layer 1 is under way for some seconds."""
    link = CpuLink()
    made = Residency(homes(), Policy("disk", slots=2), link)
    link._worker.queue.put(lambda: time.sleep(seconds))
    with made.lend(0, [], 0, True):
        report()
        then()


def test_killed_while_staging_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    staging, report = os.pipe()
    child = os.fork()
    if child == 0:  # pragma: no cover
        stage(60, lambda: os.write(report, b"!"), lambda: time.sleep(60))
        os._exit(1)
    assert os.read(staging, 1) == b"!"
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert list(tmp_path.iterdir()) == []
    assert not list(Path("/dev/shm").glob(f"*{child}*"))


@pytest.mark.slow  # a Python of its own
def test_an_interpreter_that_ends_while_staging_ends():
    script = "import sys; from test_pool import stage; stage(0.3, lambda: None, lambda: sys.exit(3))"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, timeout=120)
    assert done.returncode == 3


# ---------------------------------------------------------------- statistics


def test_counters_are_off_until_asked_for_and_then_add_up():
    made, link, there = residency(kept=1, cache=3)
    lend(made, 0, [0, 1], training=False)
    assert made.statistics() == {} and not link.timed
    made.reset_statistics()
    link.moved = 0
    made.expect(1, [2, 5])
    for layer in range(4):
        with made.lend(layer, [0, 1, 2], 3, False, tokens=1):
            pass
    record = made.statistics()
    assert link.timed
    assert record["link"] == "recorder" and [r["layer"] for r in record["layers"]] == list(there)
    assert record["bytes"] == link.moved == sum(r["bytes"] for r in record["layers"])
    # kept 0 everywhere; 1 of layer 0 is in its cache; 2 of layer 1 was expected
    assert (record["hits"], record["misses"]) == (4 + 1 + 1, 6) and record["hit_rate"] == 0.5
    assert (record["predicted"], record["predicted_right"]) == (2, 1)
    assert (record["tokens"], record["bytes_per_token"]) == (1, link.moved)
    assert record["bandwidth"] == pytest.approx(1e9)
    made.reset_statistics()
    assert made.statistics()["bytes"] == 0


def test_on_a_real_link_the_bits_are_the_same_too():
    made = Residency(homes(), Policy("ram", kept=2, cache=2, slots=2), CpuLink(), statistics=True)
    for _ in range(5):
        training_step(made)
        for layer in range(4):
            lend(made, layer, [layer, 7], training=False)
            made.expect((layer + 1) % 4, [1, 6])
    record = made.statistics()
    assert record["seconds"] > 0 and record["stall_s"] >= 0
    assert torch.tensor([r["stall_s"] for r in record["layers"]]).isfinite().all()
    made.close()
