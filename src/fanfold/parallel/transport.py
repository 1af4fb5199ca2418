"""How ranks of one host talk: over shared memory where they can, else over gloo on the loopback address."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, cast

from fanfold.parallel.shared_file import new_path, refusal

if TYPE_CHECKING:
    from fanfold.parallel.tensors import TensorGroup

FORCED = "FANFOLD_TRANSPORT"  # "gloo": also where shared memory would do
_GLOO = "gloo:"


def new_place() -> str:
    """Where the ranks of a new group meet."""
    if refusal() is None and os.environ.get(FORCED) != "gloo":
        return new_path()
    return f"{_GLOO}{tempfile.mkdtemp(prefix='fanfold-gloo-')}/store"


def open_group(place: str, rank: int, size: int, timeout_s: float, *, names: list[int] | None = None) -> TensorGroup:
    """One rank's end; returns when all ranks are there. Both kinds have the same verbs. Raises what they raise.

    `names`: what errors of shared memory call the ranks, where the group is a part of another.
    """
    from fanfold.parallel.tensors import GlooTensorGroup, TensorGroup

    if place.startswith(_GLOO):
        return cast("TensorGroup", GlooTensorGroup(place.removeprefix(_GLOO), rank, size, timeout_s))
    return TensorGroup(place, rank, size, timeout_s, names=names)


def remove(place: str) -> None:
    """What the ranks may have left of it."""
    if place.startswith(_GLOO):
        shutil.rmtree(Path(place.removeprefix(_GLOO)).parent, ignore_errors=True)
    else:
        with suppress(FileNotFoundError):
            os.unlink(place)
