"""What every test shares: quiet libraries, one thread, and tiny checkpoints saved once per session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Read by the libraries when they are first imported, hence here and not in a fixture.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models: a second thread only waits


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """checkpoint(family) -> folder of that family's tiny model, fp32, made once; do not write to it."""
    import tiny  # here, so that tests of the command line do not wait for torch

    root = tmp_path_factory.mktemp("checkpoints")

    def get(family: str) -> Path:
        if not (root / family / "config.json").exists():
            tiny.save(family, root / family)
        return root / family

    return get
