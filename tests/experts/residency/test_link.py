"""Links carry bytes in order, beside the computation, and fail with layer and file."""

from __future__ import annotations

import contextlib
import os
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

from moesmith.errors import UserError
from moesmith.experts.residency.link import PIECE, Copy, CpuLink


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def link(request):
    if request.param == "cuda":
        from moesmith.experts.residency.link import CudaLink

        made = CudaLink("cuda")
    else:
        made = CpuLink()
    yield made
    made.close()


def mapped(tmp_path, **tensors):
    """The tensors, memory-mapped from a file."""
    save_file(tensors, tmp_path / "experts.safetensors")
    return load_file(tmp_path / "experts.safetensors")


def bytes_of(count, seed=0):
    return torch.randint(256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [0, 1, PIECE, 2 * PIECE + 5])
@pytest.mark.parametrize("disk", [False, True])
def test_what_arrives_is_what_was_sent(tmp_path, link, count, disk):
    source = mapped(tmp_path, a=bytes_of(count))["a"] if disk else link.pinned(bytes_of(count))
    target = torch.zeros(count, dtype=torch.uint8, device=link.device)
    ticket = link.start([Copy(source, target, "a", disk)], link.release())
    link.wait(ticket)
    assert torch.equal(target.cpu(), bytes_of(count)) and ticket.nbytes == count


def test_other_dtypes_and_shapes(tmp_path, link):
    home = {"w": torch.randn(6, 5, 3, dtype=torch.bfloat16), "s": torch.randn(6, 7)}
    there = mapped(tmp_path, **home)
    for name, tensor in there.items():
        target = torch.zeros_like(home[name], device=link.device)
        link.wait(link.start([Copy(tensor[i : i + 2], target[i : i + 2], name, True) for i in (0, 2, 4)]))
        assert torch.equal(target.cpu(), home[name])


@pytest.mark.parametrize("disks", [(False, True), (True, False), (True, True), (False, False)])
def test_of_two_copies_to_one_place_the_later_one_stays(tmp_path, link, disks):
    there = mapped(tmp_path, a=bytes_of(PIECE + 1, 1), b=bytes_of(PIECE + 1, 2))
    first, second = (t if disk else link.pinned(t) for t, disk in zip(there.values(), disks, strict=True))
    target = torch.zeros(PIECE + 1, dtype=torch.uint8, device=link.device)
    link.start([Copy(first, target, "a", disks[0])], link.release())
    link.wait(link.start([Copy(second, target, "b", disks[1])], link.release()))
    assert torch.equal(target.cpu(), there["b"])


def test_timed_tickets_know_their_seconds(link):
    link.timed = True
    target = torch.zeros(1 << 20, dtype=torch.uint8, device=link.device)
    ticket = link.start([Copy(link.pinned(bytes_of(1 << 20)), target, "a")])
    assert ticket.lead() is None
    link.wait(ticket)
    if link.device.type == "cuda":
        torch.cuda.synchronize()
    assert ticket.seconds() >= 0 and ticket.lead() is not None


def test_starting_does_not_wait():
    link, gate = CpuLink(), threading.Event()
    link._worker.queue.put(gate.wait)
    target = torch.zeros(8, dtype=torch.uint8)
    ticket = link.start([Copy(bytes_of(8), target)])
    assert not ticket.done.is_set() and not target.any()
    gate.set()
    link.wait(ticket)
    assert torch.equal(target, bytes_of(8))
    link.close()


def test_a_file_cut_short_is_an_error_with_layer_and_file(tmp_path, link):
    """Read through the mapping it would be a SIGBUS."""
    there = mapped(tmp_path, a=bytes_of(1 << 20))["a"]
    os.truncate(tmp_path / "experts.safetensors", 1 << 19)
    target = torch.zeros(1 << 20, dtype=torch.uint8, device=link.device)
    ticket = link.start([Copy(there, target, "layer 3, gate_up_proj, expert 5", True)])
    with pytest.raises(UserError, match=r"layer 3, gate_up_proj, expert 5: .*experts\.safetensors") as caught:
        link.wait(ticket)
    assert "too early" in str(caught.value) and "--verify" in str(caught.value)
    after = link.start([Copy(link.pinned(bytes_of(8)), target[:8], "b")])
    link.wait(after)  # the link goes on
    assert torch.equal(target[:8].cpu(), bytes_of(8))


def test_a_file_replaced_under_its_name_is_still_the_mapped_one(tmp_path, link):
    there = mapped(tmp_path, a=bytes_of(64, 1))["a"]
    save_file({"a": bytes_of(64, 2)}, tmp_path / "other")
    os.replace(tmp_path / "other", tmp_path / "experts.safetensors")
    # how the kernel names the mapped one from now on
    save_file({"a": bytes_of(64, 3)}, tmp_path / "experts.safetensors (deleted)")
    target = torch.zeros(64, dtype=torch.uint8, device=link.device)
    link.wait(link.start([Copy(there, target, "a", True)]))
    assert torch.equal(target.cpu(), bytes_of(64, 1))


def test_closing_drops_what_has_not_begun_and_whoever_waits_is_told():
    link, gate = CpuLink(), threading.Event()
    link._worker.queue.put(gate.wait)
    ticket = link.start([Copy(bytes_of(8), torch.zeros(8, dtype=torch.uint8), "layer 1")])
    link._worker.stopping.set()
    gate.set()
    with pytest.raises(UserError, match="layer 1: .*closed"):
        link.wait(ticket)
    link.close()
    link.close()
    assert not link._worker.thread.is_alive()
    with pytest.raises(RuntimeError, match="closed"):
        link.start([])


def test_work_that_was_taken_is_done_also_when_the_link_is_closed_at_that_moment():
    """Else whoever waits for it waits for ever."""
    link = CpuLink()
    worker, queue = link._worker, link._worker.queue

    class Meanwhile:
        def put(self, work):
            if work is not None:  # somebody closes between the look and the put
                closing.start()
                worker.stopping.wait(0.2)
            queue.put(work)

    closing = threading.Thread(target=link.close)
    worker.queue = Meanwhile()
    ticket = link.start([Copy(bytes_of(8), torch.zeros(8, dtype=torch.uint8), "a")])
    closing.join(10)
    assert ticket.done.wait(10) and not worker.thread.is_alive()


def test_a_link_that_is_forgotten_ends_its_thread():
    link = CpuLink()
    thread = link._worker.thread
    del link
    thread.join(10)
    assert not thread.is_alive()


@pytest.mark.gpu
def test_pinned_memory_is_page_locked_and_of_its_own_size():
    from moesmith.experts.residency.link import CudaLink

    link = CudaLink("cuda")
    for shape, dtype in (
        ((3, 700, 1024), torch.uint8),
        ((3, 700, 256), torch.float32),
        ((8,), torch.float32),
    ):
        tensor = torch.ones(shape, dtype=dtype)
        home = link.pinned(tensor)
        assert home.is_pinned() and home.data_ptr() != tensor.data_ptr() and torch.equal(home, tensor)
    link.close()


# ---------------------------------------------------------------- the CUDA link's calls, without a GPU


class FakeCuda:
    """Stands in for the parts of torch.cuda that a link uses; copies happen at once, calls are in `log`."""

    def __init__(self, monkeypatch):
        self.log: list[str] = []
        self.locked: set[int] = set()
        fake, names = self, iter(range(1000))

        class Stream:
            def __init__(self, device=None):
                self.name = "side"

            def wait_event(self, event):
                fake.log.append(f"{self.name} waits for {event.name}")

            def synchronize(self):
                fake.log.append(f"{self.name} ends")

        class Event:
            def __init__(self, enable_timing=False):
                self.name, self.time, self.timing = f"event {next(names)}", None, enable_timing

            def record(self, stream):
                self.time = len(fake.log)
                fake.log.append(f"{self.name} on {stream.name}")

            def query(self):
                return self.time is not None

            def synchronize(self):
                fake.log.append(f"host waits for {self.name}")

            def elapsed_time(self, later):
                assert self.timing and later.timing
                return float(later.time - self.time)

        class Runtime:
            @staticmethod
            def cudaHostRegister(pointer, nbytes, flags):  # noqa: N802
                fake.locked.add(pointer)
                return fake.refusal

            @staticmethod
            def cudaHostUnregister(pointer):  # noqa: N802
                fake.locked.remove(pointer)

        self.refusal = 0
        compute = Stream()
        compute.name = "compute"
        empty = torch.empty
        for name, value in {
            "Stream": Stream,
            "Event": Event,
            "stream": lambda stream: contextlib.nullcontext(),
            "device": lambda device: contextlib.nullcontext(),
            "current_stream": lambda device=None: compute,
            "current_device": lambda: 0,
            "cudart": lambda: Runtime,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **words: empty(*size, **words))
        monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor.clone())


@pytest.fixture
def cuda(monkeypatch):
    from moesmith.experts.residency.link import CudaLink

    fake = FakeCuda(monkeypatch)
    fake.link = CudaLink("cuda")
    yield fake
    fake.link.close()


def test_copies_on_a_gpu_come_after_the_last_use_and_before_the_next(cuda):
    target = torch.zeros(8, dtype=torch.uint8)
    mark = cuda.link.release()
    ticket = cuda.link.start([Copy(bytes_of(8), target, "a")], mark)
    cuda.link.wait(ticket)
    assert cuda.log == [
        "event 0 on compute",
        "side waits for event 0",
        "event 1 on side",
        "compute waits for event 1",
    ]
    assert torch.equal(target, bytes_of(8))


def test_timing_on_a_gpu(cuda):
    cuda.link.timed = True
    ticket = cuda.link.start([Copy(bytes_of(8), torch.zeros(8, dtype=torch.uint8), "a")])
    assert ticket.seconds() > 0 and ticket.lead() is None
    cuda.link.wait(ticket)
    assert ticket.lead() > 0


def test_from_disk_to_a_gpu_through_bounce_buffers_that_have_left(cuda, tmp_path):
    size = 5 * PIECE + 3
    source = mapped(tmp_path, a=bytes_of(size))["a"]
    target = torch.zeros(size, dtype=torch.uint8)
    first = cuda.link.start([Copy(source, target, "a", True)], cuda.link.release())
    other = torch.zeros(8, dtype=torch.uint8)
    second = cuda.link.start([Copy(bytes_of(8), other, "b")])  # keeps its turn behind the one from disk
    cuda.link.wait(second)
    cuda.link.wait(first)
    assert torch.equal(target, source) and torch.equal(other, bytes_of(8))
    waits = [line for line in cuda.log if line.startswith("host waits")]
    assert len(waits) == 6 and len(set(waits)) == 3  # three buffers in turn
    for line in waits[3:]:  # not read into before its last piece has left
        event = line.removeprefix("host waits for ")
        before = cuda.log[: len(cuda.log) - 1 - cuda.log[::-1].index(line)]
        assert f"{event} on side" in before


def test_a_copy_from_ram_keeps_its_turn_behind_one_from_disk(cuda, tmp_path):
    source, target = mapped(tmp_path, a=bytes_of(64, 1))["a"], torch.zeros(64, dtype=torch.uint8)
    gate, read = threading.Event(), cuda.link.files.read
    cuda.link.files.read = lambda *where: (gate.wait(10), read(*where))
    first = cuda.link.start([Copy(source, target, "a", True)], cuda.link.release())
    second = cuda.link.start([Copy(bytes_of(64, 2), target, "b")], cuda.link.release())
    assert not first.submitted.is_set() and not second.submitted.is_set()
    gate.set()
    cuda.link.wait(second)
    assert torch.equal(target, bytes_of(64, 2))


def test_from_disk_to_a_gpu_a_failure_is_told_to_who_waits(cuda, tmp_path):
    source = mapped(tmp_path, a=bytes_of(1 << 20))["a"]
    os.truncate(tmp_path / "experts.safetensors", 100)
    ticket = cuda.link.start([Copy(source, torch.zeros_like(source), "layer 3", True)])
    with pytest.raises(UserError, match=r"layer 3: .*experts\.safetensors"):
        cuda.link.wait(ticket)


def test_page_locked_homes_are_unlocked_before_they_are_freed(cuda):
    tensor = torch.randn(3, 700, 256)
    home = cuda.link.pinned(tensor)
    small = cuda.link.pinned(torch.ones(4))
    assert torch.equal(home, tensor) and small.tolist() == [1] * 4
    assert cuda.locked == {home.data_ptr()}
    cuda.link.close()
    assert not cuda.locked
    cuda.refusal = 2
    with pytest.raises(UserError, match=r"2,150,400 bytes of experts could not be page-locked .*error 2"):
        cuda.link.pinned(tensor)
    cuda.locked.clear()


def test_page_locked_homes_are_unlocked_after_the_last_copy_from_them(cuda):
    home = cuda.link.pinned(torch.randn(3, 700, 256))
    cuda.link.start([Copy(home, torch.zeros_like(home), "a")])
    locked = []
    unregister = torch.cuda.cudart().cudaHostUnregister
    torch.cuda.cudart().cudaHostUnregister = lambda p: (locked.append(list(cuda.log)), unregister(p))
    link, cuda.link = cuda.link, type("Closed", (), {"close": lambda self: None})()
    del link  # forgotten, not closed
    assert locked and locked[0][-1] == "side ends" and not cuda.locked


def test_a_closed_link_to_a_gpu_takes_nothing_more(cuda):
    cuda.link.close()
    with pytest.raises(RuntimeError, match="closed"):
        cuda.link.start([Copy(bytes_of(8), torch.zeros(8, dtype=torch.uint8), "a")])


def test_a_gpu_that_fails_in_the_reading_thread_is_told_to_who_waits(cuda, tmp_path, monkeypatch):
    source = mapped(tmp_path, a=bytes_of(64))["a"]

    def broken(event):
        raise RuntimeError("CUDA error: an illegal memory access")

    mark = cuda.link.release()
    cuda.link.stream.wait_event = broken
    ticket = cuda.link.start([Copy(source, torch.zeros_like(source), "layer 3", True)], mark)
    assert ticket.submitted.wait(10)
    with pytest.raises(UserError, match="illegal memory access"):
        cuda.link.wait(ticket)
    assert cuda.link._reading == 0
