"""Which of a run's processes this one is, who of them writes, and what ended another one.

`torchrun` and `accelerate launch` start the same command several times and say in the environment which one
it is: its rank, of how many. Started without them there is one rank, and nothing here does anything. Rank 0
alone prints and writes. A rank that fails leaves its reason in the launcher's store, where the others find
it: what they see themselves is only a broken connection. torch is imported when it is needed.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from moesmith.errors import UserError

if TYPE_CHECKING:
    import torch

PATIENCE = 3.0  # seconds to wait for a reason before the rank counts as killed
# What gloo, NCCL and the store say when the other side is gone.
BROKEN = (
    "Connection closed by peer", "Connection reset by peer", "Connection was likely closed", "Broken pipe",
    "Socket Timeout", "recvValue failed", "sendValue failed", "failed to recv", "remote process exited",
    "application timeout caused pair closure", "Timed out waiting", "NCCL communicator was aborted",
)  # fmt: skip


def world() -> int:
    """How many processes the run has."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def rank() -> int:
    """Number of this process, from 0."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def is_main() -> bool:
    """Whether this process prints and writes."""
    return rank() == 0


def join() -> None:
    """Meet the other processes: gloo between CPUs, NCCL between GPUs, of which each process takes its own."""
    if world() == 1:
        return
    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        backend = "cpu:gloo,cuda:nccl"
    if not distributed.is_initialized():
        # A process that dies is noticed at once; this is for one that is busy, or hangs.
        distributed.init_process_group(backend, timeout=timedelta(hours=2))
        with contextlib.suppress(Exception):
            _store().set(_key("process", rank()), f"{socket.gethostname()} {os.getpid()}")


def leave() -> None:
    """End what `join` began."""
    if world() > 1:
        from torch import distributed

        if distributed.is_initialized():
            distributed.destroy_process_group()


def barrier() -> None:
    """Wait until every rank is here."""
    gather(None)


def gather(value: Any) -> list[Any]:
    """What every rank gives, in the order of the ranks, on every rank. The values are pickled."""
    if world() == 1:
        return [value]
    from torch import distributed

    join()
    found: list[Any] = [None] * world()
    distributed.all_gather_object(found, value)
    return found


def add(tensor: torch.Tensor, largest: bool = False) -> torch.Tensor:
    """The sum over the ranks (or their largest value) of a CPU tensor, in place, the same on every rank."""
    if world() > 1:
        from torch import distributed

        join()
        kind = distributed.ReduceOp.MAX if largest else distributed.ReduceOp.SUM
        distributed.all_reduce(tensor, op=kind)
    return tensor


def share(items: Sequence[Any]) -> list[Any]:
    """This rank's part of a sequence: every world()-th, from its own number on."""
    return list(items[rank() :: world()])


def in_order(parts: Sequence[Sequence[Any]]) -> list[Any]:
    """The sequence whose `share`s these are."""
    longest = max(map(len, parts), default=0)
    return [part[i] for i in range(longest) for part in parts if i < len(part)]


def main_first(work: Callable[[], Any]) -> Any:
    """Do something on rank 0, then on the others: what rank 0 leaves on the disk they find there."""
    if is_main():
        try:
            return work()
        finally:
            barrier()
    barrier()
    return work()


# ---------------------------------------------------------------- when one of them fails


class Terminated(BaseException):
    """SIGTERM: the launcher stops this process, because another one has died or someone asked."""


def listen() -> None:
    """From now on SIGTERM raises `Terminated`, so that there is time to say why the run ended."""
    if world() > 1 and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise Terminated


def tell(reason: str) -> bool:
    """Leave the reason why this rank ends. False if another rank has left the same one before."""
    if world() == 1:
        return True
    with contextlib.suppress(Exception):
        store = _store()
        mine = f"{rank()}\n{reason}"
        first = store.compare_set(_key("ended"), "", mine).decode()
        return first == mine or first.partition("\n")[2] != reason
    return is_main()


def lost(error: BaseException) -> bool:
    """Whether an exception says that another rank is gone."""
    if world() == 1 or not isinstance(error, RuntimeError):
        return False
    text = str(error)
    return type(error).__name__ in ("DistBackendError", "DistNetworkError") or any(
        word in text for word in BROKEN
    )


def ended(hint: str | None = None) -> UserError:
    """What to say of a run that another rank has left.

    Args:
        hint: how to go on.
    """
    # The launcher is stopping the others: first this is said.
    with contextlib.suppress(ValueError):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gone, reason = why()
    if not gone:
        return UserError("the run was told to stop", hint)
    who = f"rank {' and '.join(map(str, gone))} of this run ended"
    return UserError(
        f"{who}: {reason}" if reason else f"{who} without a word: killed, or out of memory", hint
    )


def why() -> tuple[list[int], str | None]:
    """Which ranks are gone, and the reason the first of them left; None when it left none: it was killed."""
    deadline = time.monotonic() + PATIENCE
    gone = [number for number in range(world()) if number != rank()]
    with contextlib.suppress(Exception):
        store = _store()
        store.set(_key("asks", rank()), "")
        while time.monotonic() < deadline:
            if store.check([_key("ended")]):
                number, _, reason = store.get(_key("ended")).decode().partition("\n")
                return [int(number)], reason
            time.sleep(0.1)
            # Who asks is there, and so is who has not noticed yet: what is left are those that were killed.
            gone = [number for number in gone if not store.check([_key("asks", number)])]
        gone = [number for number in gone if not _seen_running(store, number)] or gone
    return gone, None


def _seen_running(store: Any, number: int) -> bool:
    """Whether a rank's process is there. Those of other machines cannot be seen."""
    import psutil

    if not store.check([_key("process", number)]):
        return False
    host, pid = store.get(_key("process", number)).decode().split()
    with contextlib.suppress(psutil.NoSuchProcess):
        return host == socket.gethostname() and psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE
    return False


def _key(*words: str | int) -> str:
    """A name in the store; a launcher that starts a failed run anew (--max-restarts) keeps its store."""
    return "/".join(map(str, ("moesmith", os.environ.get("TORCHELASTIC_RESTART_COUNT", 0), *words)))


def _store() -> Any:
    """The launcher's store: it outlives every rank."""
    from torch import distributed

    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return distributed.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=5))
    return distributed.distributed_c10d._get_default_store()
