"""What this process may use of this machine: cores, memory, GPUs; and which limit was the smallest."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fanfold.errors import PlanError
from fanfold.extras import has
from fanfold.machine.cgroup import Limits, read_limits
from fanfold.quantity import format_bytes

_SYSTEM_ROOT = Path("/")
_COMMAND_TIMEOUT_S = 5.0
# What an instruction set needs, the widest first. Feature names as in Linux /proc/cpuinfo.
_ISA_FEATURES: tuple[tuple[str, frozenset[str]], ...] = (
    ("amx", frozenset({"amx_tile", "amx_bf16", "avx512f"})),
    ("avx512", frozenset({"avx512f", "avx512bw", "avx512dq", "avx512vl"})),
    ("avx2", frozenset({"avx2", "fma"})),
    ("avx", frozenset({"avx"})),
    ("sse2", frozenset({"sse2"})),
    ("sve2", frozenset({"sve2"})),
    ("sve", frozenset({"sve"})),
    ("neon", frozenset({"asimd"})),
)
# Source: Arm, Main ID Register MIDR_EL1, field Implementer (read 2026).
_ARM_VENDORS = {
    0x41: "Arm", 0x42: "Broadcom", 0x43: "Cavium", 0x46: "Fujitsu", 0x48: "HiSilicon", 0x4E: "NVIDIA",
    0x50: "Applied Micro", 0x51: "Qualcomm", 0x61: "Apple", 0x6D: "Microsoft", 0xC0: "Ampere",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One GPU; `index` is the number that CUDA gives it in this process (after CUDA_VISIBLE_DEVICES)."""

    index: int
    name: str
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cores:
    """How many cores may be kept busy, on which core numbers they may run, and why not more.

    `count` can be below `len(numbers)`: a quota limits time, not places.
    """

    count: int
    numbers: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes this process and its children may hold, and why not more."""

    allowed_bytes: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpu:
    """Model name, vendor and widest instruction set, '' where the system does not tell."""

    name: str
    vendor: str
    isa: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What there is and what is allowed, as it was when asked."""

    cores: int
    core_numbers: tuple[int, ...]
    cores_reason: str
    total_cores: int
    cpu_name: str
    cpu_vendor: str
    isa: str
    total_memory_bytes: int
    memory_bytes: int  # allowed
    memory_reason: str
    gpus: tuple[Gpu, ...]
    shm_free_bytes: int | None  # None: there is no /dev/shm
    system: str
    python_version: str


def discover(root: Path = _SYSTEM_ROOT) -> Machine:
    """This machine as this process may use it; reads files and asks the driver for GPUs, at most about 5 s.

    /proc, /sys and /dev are read below `root`; affinity, RLIMIT_AS and GPUs are those of this process.
    Raises: PlanError on a system other than Linux and macOS.
    """
    system = platform.system()
    check_system(system)
    limits = read_limits(root)
    total_cores = os.cpu_count() or 1
    total_memory_bytes = physical_memory_bytes(root)
    cores = allowed_cores(limits, affinity=_affinity(total_cores), total_cores=total_cores)
    memory = allowed_memory(limits, physical_bytes=total_memory_bytes, address_space_bytes=_address_space_bytes())
    cpu = _mac_cpu() if system == "Darwin" else read_cpu(_text(root / "proc/cpuinfo"), platform.machine())
    return Machine(
        cores=cores.count,
        core_numbers=cores.numbers,
        cores_reason=cores.reason,
        total_cores=total_cores,
        cpu_name=cpu.name,
        cpu_vendor=cpu.vendor,
        isa=cpu.isa,
        total_memory_bytes=total_memory_bytes,
        memory_bytes=memory.allowed_bytes,
        memory_reason=memory.reason,
        gpus=find_gpus(os.environ.get("CUDA_VISIBLE_DEVICES")),
        shm_free_bytes=_free_bytes(root / "dev/shm"),
        system=system,
        python_version=platform.python_version(),
    )


def check_system(system: str) -> None:
    """Nothing, on Linux and macOS (`platform.system()`: 'Linux', 'Darwin'); else PlanError."""
    if system not in ("Linux", "Darwin"):
        raise PlanError(
            "Fanfold runs on Linux or macOS only",
            found=f"the system is {system or 'unknown'}",
            allowed="Linux, macOS",
            do="on Windows, run the same command inside WSL 2" if system == "Windows" else "use a Linux machine",
        )


def allowed_cores(limits: Limits, *, affinity: frozenset[int], total_cores: int) -> Cores:
    """The smallest of affinity, cpuset and quota; a quota counts whole cores, at least one.

    An affinity and a cpuset that share no core contradict each other: the affinity, which the kernel obeys.
    """
    numbers, reason = affinity, f"all {total_cores} cores of the machine"
    if len(affinity) < total_cores:
        reason = f"the CPU affinity of the process allows {_of(len(affinity), total_cores)}"
    if limits.cpuset is not None and len(limits.cpuset.cores) < total_cores:
        both = affinity & limits.cpuset.cores
        # The kernel narrows the affinity to the cpuset, so where both say the same the cpuset is the cause.
        if both and limits.cpuset.cores <= affinity:
            reason = f"the cpuset allows {_of(len(both), total_cores)} ({limits.cpuset.file})"
        elif both and both != affinity:
            reason = f"affinity and cpuset together allow {_of(len(both), total_cores)} ({limits.cpuset.file})"
        numbers = both or affinity
    count = max(len(numbers), 1)
    if limits.quota is not None and max(int(limits.quota.cores), 1) < count:
        count = max(int(limits.quota.cores), 1)
        reason = f"the CPU quota is {limits.quota.cores:.4g} cores of {total_cores} ({limits.quota.file})"
    return Cores(count=count, numbers=tuple(sorted(numbers)), reason=reason)


def allowed_memory(limits: Limits, *, physical_bytes: int, address_space_bytes: int | None) -> Memory:
    """The smallest of physical memory, cgroup limit and RLIMIT_AS (`address_space_bytes`; None: no limit)."""
    found = [Memory(allowed_bytes=physical_bytes, reason=f"all {format_bytes(physical_bytes)} of the machine")]
    if limits.memory is not None:
        shown = format_bytes(limits.memory.limit_bytes)
        reason = f"the cgroup allows {shown} of {format_bytes(physical_bytes)} ({limits.memory.file})"
        found.append(Memory(allowed_bytes=limits.memory.limit_bytes, reason=reason))
    if address_space_bytes is not None:
        reason = f"RLIMIT_AS (ulimit -v) allows {format_bytes(address_space_bytes)} per process"
        found.append(Memory(allowed_bytes=address_space_bytes, reason=reason))
    return min(found, key=lambda memory: memory.allowed_bytes)


def read_cpu(cpuinfo: str, architecture: str) -> Cpu:
    """The CPU as /proc/cpuinfo describes it (first core); `architecture` if it names no instruction set."""
    first: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        key, colon, value = line.partition(":")
        if colon:
            first.setdefault(key.strip().lower(), value.strip())
    vendor = first.get("vendor_id", "")
    implementer = first.get("cpu implementer", "")
    if not vendor and re.fullmatch(r"0x[0-9a-fA-F]{1,4}", implementer):
        vendor = _ARM_VENDORS.get(int(implementer, 16), f"implementer {implementer}")
    name = first.get("model name", "")
    if not name and "cpu part" in first:
        name = f"{vendor} part {first['cpu part']}".strip()
    return Cpu(name=name, vendor=vendor, isa=_isa(first.get("flags", first.get("features", "")), architecture))


def physical_memory_bytes(root: Path = _SYSTEM_ROOT) -> int:
    """Memory of the machine: MemTotal of /proc/meminfo, elsewhere what psutil says."""
    found = re.search(r"^MemTotal:\s*([0-9]{1,18}) kB", _text(root / "proc/meminfo"), re.MULTILINE)
    if found and int(found[1]) > 0:
        return int(found[1]) * 1024
    import psutil

    return int(psutil.virtual_memory().total)


def find_gpus(visible: str | None = None) -> tuple[Gpu, ...]:
    """NVIDIA GPUs in the order of `visible` (the text of CUDA_VISIBLE_DEVICES; None: all); () if none.

    Asks the driver's library if nvidia-ml-py is installed, else the program nvidia-smi. Never imports torch.
    """
    wanted = None if visible is None else [part.strip() for part in visible.split(",")]
    if wanted in ([""], ["-1"]):
        return ()
    if has("pynvml"):
        try:
            return _gpus_by_library(wanted)
        except Exception:  # no driver, a driver without permission, a driver of another version
            pass
    return _gpus_by_program(wanted)


def _gpus_by_library(wanted: list[str] | None) -> tuple[Gpu, ...]:
    import pynvml

    pynvml.nvmlInit()
    try:
        num_gpus = int(pynvml.nvmlDeviceGetCount())
        found: list[Gpu] = []
        for entry in wanted if wanted is not None else [str(index) for index in range(num_gpus)]:
            if entry.isdecimal() and int(entry) < num_gpus:
                handle: Any = pynvml.nvmlDeviceGetHandleByIndex(int(entry))
            elif entry.startswith(("GPU-", "MIG-")):
                handle = pynvml.nvmlDeviceGetHandleByUUID(entry)
            else:
                break  # CUDA ignores everything after the first entry that it does not know
            name = pynvml.nvmlDeviceGetName(handle)
            found.append(
                Gpu(
                    index=len(found),
                    name=name.decode(errors="replace") if isinstance(name, bytes) else str(name),
                    memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                )
            )
        return tuple(found)
    finally:
        pynvml.nvmlShutdown()


def _gpus_by_program(wanted: list[str] | None) -> tuple[Gpu, ...]:
    text = _output("nvidia-smi", "--query-gpu=index,uuid,memory.total,name", "--format=csv,noheader,nounits")
    rows = [[part.strip() for part in line.split(",", 3)] for line in text.splitlines()]
    # Memory is in MiB; a GPU that tells none ("[N/A]": memory shared with the CPU) counts as 0.
    known = [
        (row[0], row[1], row[3], int(row[2]) * 2**20 if row[2].isdecimal() else 0) for row in rows if len(row) == 4
    ]
    found: list[Gpu] = []
    for entry in wanted if wanted is not None else [index for index, *_ in known]:
        match = [row for row in known if row[0] == entry or (entry.startswith("GPU-") and row[1].startswith(entry))]
        if len(match) != 1:
            break
        found.append(Gpu(index=len(found), name=match[0][2], memory_bytes=match[0][3]))
    return tuple(found)


def _mac_cpu() -> Cpu:
    keys = ("machdep.cpu.brand_string", "machdep.cpu.features", "machdep.cpu.leaf7_features")
    name, *features = (_output("sysctl", "-n", key).strip() for key in keys)
    flags = " ".join(features).lower().replace("avx1.0", "avx")
    vendor = "Apple" if name.startswith("Apple") else _output("sysctl", "-n", "machdep.cpu.vendor").strip()
    return Cpu(name=name, vendor=vendor, isa=_isa(flags, platform.machine()))


def _isa(flags: str, architecture: str) -> str:
    have = set(flags.lower().split())
    for isa, needed in _ISA_FEATURES:
        if needed <= have:
            return isa
    return "neon" if architecture.lower() in ("arm64", "aarch64") else architecture


def _affinity(total_cores: int) -> frozenset[int]:
    if sys.platform == "linux":
        return frozenset(os.sched_getaffinity(0))
    else:
        return frozenset(range(total_cores))  # macOS has no affinity


def _address_space_bytes() -> int | None:
    import resource

    soft = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if soft == resource.RLIM_INFINITY or soft <= 0 else soft


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def _output(program: str, *arguments: str) -> str:
    """What the program printed; '' if it is not there, fails, or takes longer than 5 s."""
    path = shutil.which(program)
    if path is None:
        return ""
    try:
        done = subprocess.run([path, *arguments], capture_output=True, timeout=_COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode(errors="replace")


def _of(count: int, total: int) -> str:
    return f"{count} of {total} cores"


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
