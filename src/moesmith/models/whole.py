"""Safetensors files that are whole or not there: what a later run trusts is on the disk first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from moesmith.errors import UserError
from moesmith.models.ranges import full_disk

if TYPE_CHECKING:
    from torch import Tensor


def save_whole(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write tensors under a temporary name, wait until they are on the disk, then give the file its name.

    Raises:
        UserError: the disk is full or refuses; the file that stood there stays, and nothing half-written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(path.name + ".tmp")
    try:
        with full_disk(path.parent):
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)
            temporary.chmod(0o644)  # safetensors makes files only their owner can read
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise UserError(
            f"writing {path} failed: {error}", "free some space, or give --out on another disk"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
