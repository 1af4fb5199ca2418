"""What a process holds and has used."""

from __future__ import annotations

import os


def pss_bytes(pid: int) -> int:
    """Memory of a process with shared pages counted by share; its resident set where the system has no PSS."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Pss:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    try:
        import psutil

        return int(psutil.Process(pid).memory_info().rss)
    except Exception:  # the process has just ended
        return 0


def private_bytes(pid: int) -> int:
    """Memory of the process that is its own: anonymous pages, not the files it has mapped. 0 if it has ended."""
    try:
        with open(f"/proc/{pid}/status") as file:
            for line in file:
                if line.startswith("RssAnon:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        return 0
    return pss_bytes(pid)


def own_bytes(pid: int) -> int:
    """Pages that the process alone has written: what goes when it ends, but for what its parent had before the fork."""
    try:
        with open(f"/proc/{pid}/smaps_rollup") as file:
            for line in file:
                if line.startswith("Private_Dirty:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return private_bytes(pid)


def processor_s(pid: int) -> float:
    """Processor time that the process has used; 0 where the system does not tell."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return 0.0
