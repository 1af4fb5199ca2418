import dataclasses
import os
import platform
import subprocess
import sys
import types

import pytest

from fanfold.errors import PlanError
from fanfold.machine import discover as module
from fanfold.machine.cgroup import CpuQuota, CpuSet, Limits, MemoryLimit
from fanfold.machine.discover import (
    Cpu,
    Gpu,
    allowed_cores,
    allowed_memory,
    check_system,
    discover,
    find_gpus,
    physical_memory_bytes,
    read_cpu,
)

EIGHT = frozenset(range(8))


def cores(*, quota=None, cpuset=None, affinity=EIGHT, total=8):
    limits = Limits(
        quota=None if quota is None else CpuQuota(cores=quota, file="/q/cpu.max"),
        cpuset=None if cpuset is None else CpuSet(cores=frozenset(cpuset), file="/s/cpuset.cpus"),
    )
    return allowed_cores(limits, affinity=frozenset(affinity), total_cores=total)


def test_without_limits_all_cores_are_allowed():
    found = cores()
    assert (found.count, found.numbers, found.reason) == (8, tuple(range(8)), "all 8 cores of the machine")


@pytest.mark.parametrize(("quota", "count"), [(0.2, 1), (1.0, 1), (1.5, 1), (2.0, 2), (2.9, 2), (7.99, 7)])
def test_a_quota_counts_whole_cores_and_at_least_one(quota, count):
    found = cores(quota=quota)
    assert found.count == count
    assert found.numbers == tuple(range(8))  # a quota limits time, not places
    assert found.reason == f"the CPU quota is {quota:.4g} cores of 8 (/q/cpu.max)"


def test_a_quota_above_the_other_limits_changes_nothing():
    assert cores(quota=64.0).reason == "all 8 cores of the machine"
    assert cores(quota=2.5, affinity={0, 1}).reason == "the CPU affinity of the process allows 2 of 8 cores"


def test_a_cpuset_of_one_core_wins_over_a_quota_of_one_and_a_half():
    found = cores(quota=1.5, cpuset={3})
    assert (found.count, found.numbers) == (1, (3,))
    assert found.reason == "the cpuset allows 1 of 8 cores (/s/cpuset.cpus)"


def test_an_affinity_that_the_cpuset_caused_is_called_a_cpuset():
    assert cores(cpuset={0, 1}, affinity={0, 1}).reason == "the cpuset allows 2 of 8 cores (/s/cpuset.cpus)"


def test_affinity_and_cpuset_are_intersected():
    found = cores(cpuset={0, 1, 2}, affinity={2, 3, 4})
    assert (found.count, found.numbers) == (1, (2,))
    assert found.reason == "affinity and cpuset together allow 1 of 8 cores (/s/cpuset.cpus)"


def test_an_affinity_smaller_than_the_cpuset_is_the_reason():
    assert cores(cpuset={0, 1, 2}, affinity={2}).reason == "the CPU affinity of the process allows 1 of 8 cores"


def test_affinity_wins_where_the_cpuset_contradicts_it():
    found = cores(cpuset={6, 7}, affinity={0, 1})
    assert found.numbers == (0, 1)
    assert found.reason == "the CPU affinity of the process allows 2 of 8 cores"


def test_memory_is_the_smallest_of_three():
    limits = Limits(memory=MemoryLimit(limit_bytes=2 * 10**9, file="/m/memory.max"))

    def found(limits, address_space_bytes):
        memory = allowed_memory(limits, physical_bytes=8 * 10**9, address_space_bytes=address_space_bytes)
        return memory.allowed_bytes, memory.reason

    assert found(Limits(), None) == (8 * 10**9, "all 8.00 GB of the machine")
    assert found(limits, None) == (2 * 10**9, "the cgroup allows 2.00 GB of 8.00 GB (/m/memory.max)")
    assert found(limits, 10**9) == (10**9, "RLIMIT_AS (ulimit -v) allows 1.00 GB per process")
    larger = Limits(memory=MemoryLimit(limit_bytes=9 * 10**9, file="/m/memory.max"))
    assert found(larger, None) == (8 * 10**9, "all 8.00 GB of the machine")


@pytest.mark.parametrize(
    ("flags", "isa"),
    [
        ("sse2 avx avx2 fma", "avx2"),
        ("sse2 avx avx2", "avx"),
        ("sse2 avx avx2 fma avx512f avx512bw avx512dq avx512vl", "avx512"),
        ("sse2 avx avx2 fma avx512f", "avx2"),
        ("sse2 avx2 fma avx512f avx512bw avx512dq avx512vl amx_tile amx_bf16", "amx"),
        ("fpu sse2", "sse2"),
        ("", "x86_64"),
    ],
)
def test_isa_is_the_widest_complete_instruction_set(flags, isa):
    text = f"processor : 0\nvendor_id : GenuineIntel\nmodel name : Xeon: 6\nflags : {flags}\n\nmodel name : b\n"
    assert read_cpu(text, "x86_64") == Cpu(name="Xeon: 6", vendor="GenuineIntel", isa=isa)


def test_arm_is_named_by_implementer_and_part():
    text = "processor\t: 0\nFeatures\t: fp asimd crc32\nCPU implementer\t: 0x41\nCPU part\t: 0xd0c\n"
    assert read_cpu(text, "aarch64") == Cpu(name="Arm part 0xd0c", vendor="Arm", isa="neon")
    assert read_cpu("CPU implementer : 0xff\n", "aarch64") == Cpu(name="", vendor="implementer 0xff", isa="neon")


def test_cpuinfo_of_nonsense_is_a_cpu_without_a_name():
    assert read_cpu("\x00\n::::\nno colon\n", "riscv64") == Cpu(name="", vendor="", isa="riscv64")


def test_physical_memory_comes_from_meminfo_and_else_from_psutil(tmp_path):
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemFree: 1 kB\nMemTotal:       16384 kB\n")
    assert physical_memory_bytes(tmp_path) == 16 * 2**20
    assert physical_memory_bytes(tmp_path / "nothing") > 16 * 2**20


@pytest.mark.parametrize("system", ["Linux", "Darwin"])
def test_linux_and_macos_are_accepted(system):
    check_system(system)


def test_windows_is_refused_with_a_way_out():
    with pytest.raises(PlanError) as refused:
        check_system("Windows")
    assert refused.value.asked == "Fanfold runs on Linux or macOS only"
    assert refused.value.found == "the system is Windows"
    assert "WSL 2" in refused.value.do
    with pytest.raises(PlanError, match="the system is unknown"):
        check_system("")


def test_discover_obeys_the_tree_it_is_given(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "find_gpus", lambda visible: ())
    monkeypatch.setattr(module, "_affinity", lambda total_cores: EIGHT)
    monkeypatch.setattr(module, "_address_space_bytes", lambda: None)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    texts = {
        "proc/self/cgroup": "0::/box\n",
        "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "proc/meminfo": "MemTotal: 8000000 kB\n",
        "proc/cpuinfo": "vendor_id : AuthenticAMD\nmodel name : AMD EPYC\nflags : avx2 fma\n",
        "sys/fs/cgroup/box/cpu.max": "150000 100000\n",
        "sys/fs/cgroup/box/memory.max": "2000000000\n",
    }
    for path, text in texts.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    machine = discover(tmp_path)
    assert (machine.cores, machine.total_cores) == (1, 8)
    assert machine.cores_reason == "the CPU quota is 1.5 cores of 8 (/sys/fs/cgroup/box/cpu.max)"
    assert (machine.memory_bytes, machine.total_memory_bytes) == (2 * 10**9, 8_000_000 * 1024)
    assert machine.memory_reason == "the cgroup allows 2.00 GB of 8.19 GB (/sys/fs/cgroup/box/memory.max)"
    assert machine.shm_free_bytes is None
    (tmp_path / "dev/shm").mkdir(parents=True)
    free_bytes = discover(tmp_path).shm_free_bytes
    assert free_bytes is not None
    assert free_bytes > 0


def test_macos_without_proc_is_described_by_sysctl_and_psutil(tmp_path, monkeypatch):
    answers = {"machdep.cpu.brand_string": "Apple M3\n"}
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(module, "_output", lambda program, *arguments: answers.get(arguments[-1], ""))
    machine = discover(tmp_path)
    assert (machine.cpu_name, machine.cpu_vendor, machine.isa) == ("Apple M3", "Apple", "neon")
    assert machine.total_memory_bytes > 0
    assert machine.system == "Darwin"


def test_intel_mac_flags_are_read_like_those_of_linux(monkeypatch):
    answers = {
        "machdep.cpu.brand_string": "Intel(R) Core(TM) i7",
        "machdep.cpu.features": "FPU SSE2 FMA AVX1.0",
        "machdep.cpu.leaf7_features": "BMI1 AVX2",
        "machdep.cpu.vendor": "GenuineIntel\n",
    }
    monkeypatch.setattr(module, "_output", lambda program, *arguments: answers[arguments[-1]])
    assert module._mac_cpu() == Cpu(name="Intel(R) Core(TM) i7", vendor="GenuineIntel", isa="avx2")


def fake_pynvml(uuids=("GPU-aa", "GPU-bb"), error=None):
    library = types.ModuleType("pynvml")
    library.closed = 0

    def start():
        if error:
            raise error

    def stop():
        library.closed += 1

    def by_uuid(uuid):
        return uuids.index(uuid)

    library.nvmlInit, library.nvmlShutdown = start, stop
    library.nvmlDeviceGetCount = lambda: len(uuids)
    library.nvmlDeviceGetHandleByIndex = lambda index: index
    library.nvmlDeviceGetHandleByUUID = by_uuid
    library.nvmlDeviceGetName = lambda handle: f"H{handle}".encode() if handle else f"H{handle}"
    library.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(total=1000 + handle)
    return library


@pytest.fixture
def program(monkeypatch):
    """nvidia-smi prints what is put here; the library is not installed."""
    printed = {"text": ""}
    monkeypatch.setattr(module, "has", lambda name: False)
    monkeypatch.setattr(module, "_output", lambda name, *arguments: printed["text"])
    return printed


H0, H1 = Gpu(index=0, name="H0", memory_bytes=1000), Gpu(index=1, name="H1", memory_bytes=1001)


@pytest.mark.parametrize(
    ("visible", "found"),
    [
        (None, (H0, H1)),
        ("", ()),
        ("-1", ()),
        ("1", (dataclasses.replace(H1, index=0),)),
        ("1,0", (dataclasses.replace(H1, index=0), dataclasses.replace(H0, index=1))),
        ("GPU-bb", (dataclasses.replace(H1, index=0),)),
        ("0,7,1", (H0,)),
        ("0,-1,1", (H0,)),
    ],
)
def test_gpus_are_numbered_as_cuda_numbers_them(monkeypatch, visible, found):
    library = fake_pynvml()
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(module, "has", lambda name: True)
    assert find_gpus(visible) == found
    assert library.closed == (1 if visible not in ("", "-1") else 0)


def test_a_library_without_a_driver_falls_back_to_the_program(monkeypatch, program):
    monkeypatch.setitem(sys.modules, "pynvml", fake_pynvml(error=RuntimeError("Driver Not Loaded")))
    monkeypatch.setattr(module, "has", lambda name: True)
    assert find_gpus() == ()
    program["text"] = "0, GPU-aa, 143771, NVIDIA H200\n"
    assert find_gpus() == (Gpu(index=0, name="NVIDIA H200", memory_bytes=143771 * 2**20),)


def test_the_program_is_read_line_by_line(program):
    program["text"] = "0, GPU-aa, 10, NVIDIA H200, rev 2\n1, GPU-bb, [N/A], GB10\n"
    assert find_gpus() == (
        Gpu(index=0, name="NVIDIA H200, rev 2", memory_bytes=10 * 2**20),
        Gpu(index=1, name="GB10", memory_bytes=0),
    )
    assert [gpu.name for gpu in find_gpus("GPU-b,0")] == ["GB10", "NVIDIA H200, rev 2"]
    assert find_gpus("GPU-,0") == ()  # fits two: CUDA refuses it


@pytest.mark.parametrize("text", ["", "No devices were found\n", "a,b\n", "\x00"])
def test_a_program_that_prints_nonsense_means_no_gpu(program, text):
    program["text"] = text
    assert find_gpus() == ()


def test_a_program_that_is_missing_fails_or_hangs_prints_nothing(monkeypatch, tmp_path):
    assert module._output("no-such-program-here") == ""
    (tmp_path / "fails").write_text("#!/bin/sh\necho text\nexit 9\n")
    (tmp_path / "hangs").write_text("#!/bin/sh\nexec sleep 60\n")
    for name in ("fails", "hangs"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setattr(module, "_COMMAND_TIMEOUT_S", 0.05)
    assert module._output(str(tmp_path / "fails")) == ""
    assert module._output(str(tmp_path / "hangs")) == ""


def test_discover_imports_nothing_heavy():
    code = (
        "import sys, fanfold.machine.discover, fanfold.machine.probe; "
        "heavy = ('torch', 'numpy', 'psutil', 'pynvml', 'threadpoolctl'); "
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_this_machine_has_a_core_and_memory():
    machine = discover()
    assert 1 <= machine.cores <= machine.total_cores
    assert 0 < machine.memory_bytes <= machine.total_memory_bytes
    assert machine.python_version == platform.python_version()
