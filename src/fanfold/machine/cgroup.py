"""What the control groups of Linux allow a process: cores and memory; v1, v2, and both at once.

A limit holds for a group and for everything below it, so every group from the process's own up to the top
of the mount is read, and the smallest limit wins. All paths hang below `root`: tests read a made-up tree.
A file that is missing, empty or nonsense sets no limit.
Source: cgroups(7), proc_pid_mountinfo(5), Linux Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

_SYSTEM_ROOT = Path("/")
_DEFAULT_PERIOD_US = 100_000
# v1 writes "no limit" as 2^63 rounded down to a page: 9223372036854771712 for pages of 4 KiB.
_UNLIMITED_BYTES = 2**60
_LARGEST_CORE = 2**16
_V1_CONTROLLERS = ("cpu", "cpuset", "memory")


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuQuota:
    """CPU seconds per second, and the file that says so."""

    cores: float
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuSet:
    """The cores, by number, that may be used, and the file that says so."""

    cores: frozenset[int]
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryLimit:
    """Bytes that all processes of the group together may hold, and the file that says so."""

    limit_bytes: int
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The smallest limit of each kind over all groups the process is in; None where there is none."""

    quota: CpuQuota | None = None
    cpuset: CpuSet | None = None
    memory: MemoryLimit | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryUse:
    """Bytes charged to a group; `reclaimable_bytes` of them are file cache, dropped when memory is short."""

    usage_bytes: int
    reclaimable_bytes: int
    file: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mount:
    point: str
    group: str  # the group that stands at the mount point
    controllers: frozenset[str] | None  # None: v2


def read_limits(root: Path = _SYSTEM_ROOT, *, pid: int | None = None) -> Limits:
    """What the groups of the process (default: this one) allow; nothing is set where there are no groups."""
    quotas = [quota for path in _groups(root, pid, "cpu") for quota in _quotas(root, path)]
    memories = [memory for path in _groups(root, pid, "memory") for memory in _memory_limits(root, path)]
    return Limits(
        quota=min(quotas, key=lambda quota: quota.cores, default=None),
        cpuset=_smallest_set([found for path in _groups(root, pid, "cpuset") for found in _sets(root, path)]),
        memory=min(memories, key=lambda memory: memory.limit_bytes, default=None),
    )


def read_memory_use(root: Path = _SYSTEM_ROOT, *, pid: int | None = None) -> MemoryUse | None:
    """Use of the group with the smallest limit (limit - use is the room left), else of the own group."""
    groups = _groups(root, pid, "memory")
    limit = read_limits(root, pid=pid).memory
    if limit is not None:
        groups.sort(key=lambda path: _shown(root, path) != str(PurePosixPath(limit.file).parent))  # stable
    for path in groups:
        for name, reclaimable in (
            ("memory.current", "inactive_file"),
            ("memory.usage_in_bytes", "total_inactive_file"),
        ):
            usage_bytes = _whole(_text(path / name))
            if usage_bytes is not None and usage_bytes >= 0:
                cache_bytes = _whole(_fields(path / "memory.stat").get(reclaimable, "")) or 0
                return MemoryUse(
                    usage_bytes=usage_bytes,
                    reclaimable_bytes=min(max(cache_bytes, 0), usage_bytes),
                    file=_shown(root, path / name),
                )
    return None


def read_oom_kills(root: Path = _SYSTEM_ROOT, *, pid: int | None = None) -> int | None:
    """How many processes of the own group the kernel has killed for memory; None where it does not count.

    v2 counts the groups below too; v1 only the group itself.
    """
    for path in _groups(root, pid, "memory"):
        for name in ("memory.events", "memory.oom_control"):
            kills = _whole(_fields(path / name).get("oom_kill", ""))
            if kills is not None:
                return kills
    return None


def _quotas(root: Path, path: Path) -> list[CpuQuota]:
    """v2 'cpu.max' holds '150000 100000' or 'max 100000'; v1 two files, quota -1 for no limit."""
    v2 = _text(path / "cpu.max").split()
    v1 = [_text(path / "cpu.cfs_quota_us"), _text(path / "cpu.cfs_period_us")]
    found = []
    for name, parts in (("cpu.max", v2), ("cpu.cfs_quota_us", v1)):
        quota_us = _whole(parts[0]) if parts else None
        period_us = (_whole(parts[1]) if len(parts) > 1 else None) or _DEFAULT_PERIOD_US
        if quota_us is not None and quota_us > 0 and period_us > 0:
            found.append(CpuQuota(cores=quota_us / period_us, file=_shown(root, path / name)))
    return found


def _sets(root: Path, path: Path) -> list[CpuSet]:
    names = ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus")
    parsed = ((name, _core_numbers(_text(path / name))) for name in names)
    return [CpuSet(cores=cores, file=_shown(root, path / name)) for name, cores in parsed if cores]


def _smallest_set(sets: list[CpuSet]) -> CpuSet | None:
    """The smallest set, less what another forbids; the smallest as it is where they share no core."""
    if not sets:
        return None
    smallest = min(sets, key=lambda found: len(found.cores))
    shared = frozenset.intersection(*(found.cores for found in sets))
    return CpuSet(cores=shared or smallest.cores, file=smallest.file)


def _memory_limits(root: Path, path: Path) -> list[MemoryLimit]:
    texts = {name: _text(path / name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes")}
    # v1 tells here what the groups above allow, even those that a container does not see.
    texts["memory.stat"] = _fields(path / "memory.stat").get("hierarchical_memory_limit", "")
    found = []
    for name, text in texts.items():
        limit_bytes = _whole(text)
        if limit_bytes is not None and 0 < limit_bytes < _UNLIMITED_BYTES:
            found.append(MemoryLimit(limit_bytes=limit_bytes, file=_shown(root, path / name)))
    return found


def _groups(root: Path, pid: int | None, controller: str) -> list[Path]:
    """Folders of the process's groups for a controller: its own, then each parent up to the mount point."""
    process = root / "proc" / ("self" if pid is None else str(pid))
    own = _own_groups(_text(process / "cgroup"))
    mounts = _mounts(_text(process / "mountinfo")) or _usual_mounts(root)
    folders: list[Path] = []
    for hierarchy in ("", controller):  # "" is v2
        fitting = [mount for mount in mounts if controller in (mount.controllers or {controller})]
        fitting = [mount for mount in fitting if (mount.controllers is None) == (hierarchy == "")]
        parts = [(mount, _below(own.get(hierarchy, "/"), mount.group)) for mount in fitting]
        if all(below is None for _, below in parts):
            # The own group is outside of what is mounted (cgroup namespaces): the mount point is the nearest.
            parts = [(mount, ()) for mount in fitting]
        for mount, below in parts:
            if below is not None:
                top = root / mount.point.lstrip("/")
                folders += [top.joinpath(*below[:depth]) for depth in range(len(below), -1, -1)]
    return list(dict.fromkeys(folders))


def _own_groups(text: str) -> dict[str, str]:
    """Path of the process's group by controller; v2 under ''. A line is 'id:controllers:path'."""
    own: dict[str, str] = {}
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3 and parts[2].startswith("/"):
            own.update(dict.fromkeys(parts[1].split(","), parts[2].removesuffix(" (deleted)")))
    return own


def _mounts(text: str) -> list[_Mount]:
    """Mounted hierarchies, the later one where two share a mount point (it hides the earlier)."""
    found: dict[tuple[str, bool], _Mount] = {}
    for line in text.splitlines():
        before, dash, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if not dash or len(left) < 5 or not right or right[0] not in ("cgroup", "cgroup2"):
            continue
        group, point = (re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), part) for part in left[3:5])
        controllers = None if right[0] == "cgroup2" else frozenset(right[-1].split(","))
        found[point, controllers is None] = _Mount(point=point, group=group, controllers=controllers)
    return list(found.values())


def _usual_mounts(root: Path) -> list[_Mount]:
    """Where hierarchies stand on nearly every system, for a /proc without mountinfo."""
    top = "/sys/fs/cgroup"
    v1 = [
        _Mount(point=f"{top}/{controller}", group="/", controllers=frozenset({controller}))
        for controller in _V1_CONTROLLERS
        if (root / top.lstrip("/") / controller / "tasks").exists()
    ]
    return [*v1, _Mount(point=top, group="/", controllers=None)]


def _below(path: str, group: str) -> tuple[str, ...] | None:
    """Parts of `path` below `group`; None if it is not below, or outside of the namespace ('/..')."""
    own, top = PurePosixPath(path), PurePosixPath(group)
    if ".." in own.parts or not own.is_relative_to(top):
        return None
    return own.relative_to(top).parts


def _core_numbers(text: str) -> frozenset[int]:
    """'0-2,8' is {0, 1, 2, 8}; empty if any of it is not a list of cores."""
    cores: set[int] = set()
    for part in text.strip().split(","):
        found = re.fullmatch(r"([0-9]{1,6})(?:-([0-9]{1,6}))?", part.strip())
        if not found or int(found[2] or found[1]) > _LARGEST_CORE:
            return frozenset()
        cores.update(range(int(found[1]), int(found[2] or found[1]) + 1))
    return frozenset(cores)


def _fields(path: Path) -> dict[str, str]:
    """Lines of 'key value'."""
    pairs = (line.split() for line in _text(path).splitlines())
    return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}


def _whole(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,30}", text := text.strip()) else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return ""


def _shown(root: Path, path: Path) -> str:
    """The path as the process itself would write it."""
    return "/" + path.relative_to(root).as_posix()
