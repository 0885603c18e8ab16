"""Start a function in several processes that find each other as those of `torchrun` do.

The processes come from a fork server that has imported torch, transformers and TRL once: a start takes
moments instead of ten seconds.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import socket
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["rank_runs"])


def together(
    function: Callable[..., Any], *args: Any, world: int = 2, timeout: float = 300, **options: Any
) -> list[Any]:
    """What `function(*args, **options)` returns on every rank.

    The function has to be importable by its name, and what it returns can be pickled.

    Raises:
        AssertionError: a rank raised; with its traceback. Or one that is still running after `timeout`.
    """
    _start_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes: list[Any] = []
    processes = []
    for rank in range(world):
        mine, theirs = _context.Pipe(duplex=False)
        settings: dict[str, Any] = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world}
        settings |= {
            "LOCAL_WORLD_SIZE": world,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
            "OMP_NUM_THREADS": 1,
        }
        process = _context.Process(
            target=_run,
            args=({k: str(v) for k, v in settings.items()}, theirs, function, args, options),
            daemon=True,
        )
        process.start()
        theirs.close()
        pipes.append(mine)
        processes.append(process)
    try:
        found: dict[int, Any] = {}
        while len(found) < world:
            ready = wait([pipe for i, pipe in enumerate(pipes) if i not in found], timeout)
            assert ready, f"ranks {sorted(set(range(world)) - found.keys())} are still running"
            for rank in (pipes.index(pipe) for pipe in ready):
                try:
                    fine, value = pickle.loads(pipes[rank].recv_bytes())
                except EOFError:
                    fine, value = False, "it died"
                assert fine, f"rank {rank}: {value}"
                found[rank] = value
        return [found[rank] for rank in range(world)]
    finally:
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _start_server() -> None:
    """It is a new interpreter, which finds what it is to import by PYTHONPATH only."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, [before])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _run(settings: dict[str, str], pipe: Any, function: Callable[..., Any], args: Any, options: Any) -> None:
    os.environ.update(settings)
    import torch

    from moesmith import console, ranks

    torch.set_num_threads(1)
    console.set_silent(not ranks.is_main())
    try:
        ranks.join()
        result = function(*args, **options)
        pipe.send_bytes(pickle.dumps((True, result)))  # tensors by value
        with contextlib.suppress(Exception):
            ranks.leave()
    except BaseException:  # noqa: BLE001  (the other side raises it)
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
        os._exit(1)
