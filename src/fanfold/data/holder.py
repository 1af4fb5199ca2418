"""Who holds a run folder: the stamp in its claim, and whether that process is known to be dead."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any


def holder_stamp() -> dict[str, Any]:
    """Who this process is, so that a person can find it."""
    return {
        "host": socket.gethostname(),
        "boot_id": _boot_id(),
        "pid": os.getpid(),
        "since": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def life_stamp() -> dict[str, Any]:
    """And what its own machine needs to say whether it lives."""
    return {"pids": _pid_space(), "begun": _begun(os.getpid())}


def is_dead(stamp: dict[str, Any]) -> bool:
    """True only where this machine can tell: it has not been started again, sees the same processes, and that one
    is not among them. Another machine, or a container beside this one, cannot tell: False."""
    pid, begun = stamp.get("pid"), stamp.get("begun")
    ours = (socket.gethostname(), _boot_id(), _pid_space())
    theirs = (stamp.get("host"), stamp.get("boot_id"), stamp.get("pids"))
    if not (isinstance(pid, int) and begun and all(ours)) or ours != theirs:
        return False
    return bool(_begun(pid) != begun)


def _boot_id() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _pid_space() -> str:
    """The namespace that process numbers count in: containers of one machine differ here."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _begun(pid: int) -> str | None:
    """When the process began, in ticks since the machine did; None where there is none, or only its remains."""
    try:
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in ("Z", "X") else rest[18]
