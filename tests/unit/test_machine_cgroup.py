import pytest

from fanfold.machine.cgroup import (
    CpuQuota,
    CpuSet,
    Limits,
    MemoryLimit,
    read_limits,
    read_memory_use,
    read_oom_kills,
)

V2_MOUNT = "31 23 0:28 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def v1_mounts(group="/"):
    pairs = [("cpu", "cpu,cpuacct"), ("cpuset", "cpuset"), ("memory", "memory")]
    lines = (
        f"3{index} 31 0:3{index} {group} /sys/fs/cgroup/{folder} rw shared:1 - cgroup cgroup rw,{names}\n"
        for index, (folder, names) in enumerate(pairs)
    )
    return "".join(lines)


def make_tree(root, files, *, cgroup="0::/\n", mountinfo=V2_MOUNT):
    """A root folder with /proc/self and, below /sys/fs/cgroup, the given files."""
    texts = {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mountinfo}
    texts |= {f"sys/fs/cgroup/{path}": text for path, text in files.items()}
    for path, text in texts.items():
        if text is not None:
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(text if isinstance(text, bytes) else text.encode())
    return root


def v1_own(path):
    return f"4:cpu,cpuacct:{path}\n3:cpuset:{path}\n2:memory:{path}\n1:name=systemd:/\n"


def test_no_proc_and_no_cgroups_is_no_limit(tmp_path):
    assert read_limits(tmp_path) == Limits()
    assert read_memory_use(tmp_path) is None
    assert read_oom_kills(tmp_path) is None


def test_v1_quota_of_one_and_a_half_cores(tmp_path):
    files = {"cpu/box/cpu.cfs_quota_us": "150000\n", "cpu/box/cpu.cfs_period_us": "100000\n"}
    make_tree(tmp_path, files, cgroup=v1_own("/box"), mountinfo=v1_mounts())
    assert read_limits(tmp_path).quota == CpuQuota(cores=1.5, file="/sys/fs/cgroup/cpu/box/cpu.cfs_quota_us")


def test_v1_quota_of_minus_one_is_no_limit(tmp_path):
    files = {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}
    make_tree(tmp_path, files, cgroup=v1_own("/"), mountinfo=v1_mounts())
    assert read_limits(tmp_path).quota is None


@pytest.mark.parametrize("written", ["9223372036854771712", "9223372036854710272", "9223372036854775807"])
def test_v1_unlimited_memory_is_no_limit_for_any_page_size(tmp_path, written):
    files = {
        "memory/memory.limit_in_bytes": written,
        "memory/memory.stat": f"hierarchical_memory_limit {written}\n",
    }
    make_tree(tmp_path, files, cgroup=v1_own("/"), mountinfo=v1_mounts())
    assert read_limits(tmp_path).memory is None


def test_v1_limit_of_a_parent_the_container_cannot_see_is_found_in_memory_stat(tmp_path):
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.stat": "cache 5\nhierarchical_memory_limit 2147483648\nhierarchical_memsw_limit 99\n",
    }
    make_tree(tmp_path, files, cgroup=v1_own("/docker/abc"), mountinfo=v1_mounts("/docker/abc"))
    assert read_limits(tmp_path).memory == MemoryLimit(limit_bytes=2**31, file="/sys/fs/cgroup/memory/memory.stat")


def test_v2_parent_wins_where_it_is_smaller(tmp_path):
    files = {
        "pod/cpu.max": "150000 100000\n",
        "pod/memory.max": "2000000000\n",
        "pod/box/cpu.max": "400000 100000\n",
        "pod/box/memory.max": "8000000000\n",
    }
    make_tree(tmp_path, files, cgroup="0::/pod/box\n")
    limits = read_limits(tmp_path)
    assert limits.quota == CpuQuota(cores=1.5, file="/sys/fs/cgroup/pod/cpu.max")
    assert limits.memory == MemoryLimit(limit_bytes=2_000_000_000, file="/sys/fs/cgroup/pod/memory.max")


def test_memory_high_counts_where_it_is_below_memory_max(tmp_path):
    make_tree(tmp_path, {"box/memory.max": "2000", "box/memory.high": "1500"}, cgroup="0::/box\n")
    assert read_limits(tmp_path).memory == MemoryLimit(limit_bytes=1500, file="/sys/fs/cgroup/box/memory.high")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "max 100000\n",
        "max",
        "-1 100000",
        "0 100000",
        "150000 -5",
        "many 100",
        "1e5 100",
        "٣ 1",
        b"\xff\x00",
    ],
)
def test_cpu_max_that_is_empty_or_nonsense_is_no_limit(tmp_path, text):
    make_tree(tmp_path, {"cpu.max": text})
    assert read_limits(tmp_path).quota is None


@pytest.mark.parametrize("text", ["50000", "50000 0", "50000 100000 7", " 50000   100000\n\n"])
def test_cpu_max_without_a_usable_period_means_100_ms(tmp_path, text):
    make_tree(tmp_path, {"cpu.max": text})
    assert read_limits(tmp_path).quota == CpuQuota(cores=0.5, file="/sys/fs/cgroup/cpu.max")


@pytest.mark.parametrize("text", ["", "max\n", "0", "-1", "12 GB", "9" * 400, b"\xff"])
def test_memory_max_that_is_empty_or_nonsense_is_no_limit(tmp_path, text):
    make_tree(tmp_path, {"memory.max": text, "memory.high": text, "memory.stat": text})
    assert read_limits(tmp_path).memory is None


def test_cpuset_of_one_core(tmp_path):
    make_tree(tmp_path, {"box/cpuset.cpus.effective": "3\n"}, cgroup="0::/box\n")
    expected = CpuSet(cores=frozenset({3}), file="/sys/fs/cgroup/box/cpuset.cpus.effective")
    assert read_limits(tmp_path).cpuset == expected


def test_empty_cpuset_takes_the_one_of_the_parent(tmp_path):
    files = {"pod/cpuset.cpus.effective": "0-1,4\n", "pod/box/cpuset.cpus.effective": "\n"}
    make_tree(tmp_path, files, cgroup="0::/pod/box\n")
    assert read_limits(tmp_path).cpuset == CpuSet(
        cores=frozenset({0, 1, 4}), file="/sys/fs/cgroup/pod/cpuset.cpus.effective"
    )


def test_v1_cpuset_is_read_from_either_file(tmp_path):
    files = {
        "cpuset/cpuset.cpus": "0-7\n",
        "cpuset/box/cpuset.cpus": "2-3\n",
        "cpuset/box/cpuset.effective_cpus": "",
    }
    make_tree(tmp_path, files, cgroup=v1_own("/box"), mountinfo=v1_mounts())
    limit = read_limits(tmp_path).cpuset
    assert limit == CpuSet(cores=frozenset({2, 3}), file="/sys/fs/cgroup/cpuset/box/cpuset.cpus")


@pytest.mark.parametrize("text", ["a-b", "0-", "-3", "0-999999999999", "0,,1", "0-3/2", "65537"])
def test_cpuset_that_is_nonsense_is_no_limit(tmp_path, text):
    make_tree(tmp_path, {"cpuset.cpus.effective": text})
    assert read_limits(tmp_path).cpuset is None


def test_v1_and_v2_mixed_take_the_smallest_of_each(tmp_path):
    """systemd's hybrid layout: memory on v1, cpu on v2."""
    mountinfo = v1_mounts() + "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n"
    files = {
        "unified/app/cpu.max": "200000 100000",
        "cpu/app/cpu.cfs_quota_us": "300000",
        "cpu/app/cpu.cfs_period_us": "100000",
        "memory/app/memory.limit_in_bytes": "1073741824",
    }
    make_tree(tmp_path, files, cgroup=v1_own("/app") + "0::/app\n", mountinfo=mountinfo)
    limits = read_limits(tmp_path)
    assert limits.quota == CpuQuota(cores=2.0, file="/sys/fs/cgroup/unified/app/cpu.max")
    assert limits.memory is not None
    assert limits.memory.limit_bytes == 2**30


def test_container_in_a_container_finds_itself_below_the_mounted_group(tmp_path):
    """The mount shows /docker/abc at its top; the process is in /docker/abc/docker/def."""
    files = {"memory/docker/def/memory.limit_in_bytes": "3000", "memory/memory.limit_in_bytes": "5000"}
    own = v1_own("/docker/abc/docker/def")
    make_tree(tmp_path, files, cgroup=own, mountinfo=v1_mounts("/docker/abc"))
    limit = read_limits(tmp_path).memory
    assert limit == MemoryLimit(limit_bytes=3000, file="/sys/fs/cgroup/memory/docker/def/memory.limit_in_bytes")


@pytest.mark.parametrize(
    ("own", "mounted"),
    [("/docker/abc", "/docker/other"), ("/../../elsewhere", "/"), ("/", "/../.."), ("/ab", "/a")],
)
def test_group_outside_of_the_mount_takes_what_stands_at_the_mount_point(tmp_path, own, mounted):
    mountinfo = f"31 23 0:28 {mounted} /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n"
    make_tree(tmp_path, {"memory.max": "4096"}, cgroup=f"0::{own}\n", mountinfo=mountinfo)
    assert read_limits(tmp_path).memory == MemoryLimit(limit_bytes=4096, file="/sys/fs/cgroup/memory.max")


def test_host_path_that_the_container_does_not_see_takes_the_nearest_group_above(tmp_path):
    make_tree(tmp_path, {"memory.max": "4096"}, cgroup="0::/kubepods/pod1/box\n")
    assert read_limits(tmp_path).memory == MemoryLimit(limit_bytes=4096, file="/sys/fs/cgroup/memory.max")


def test_mount_point_with_a_space_and_a_path_with_a_colon(tmp_path):
    mountinfo = "31 23 0:28 / /sys/fs/cgroup/my\\040groups rw - cgroup2 cgroup2 rw\n"
    make_tree(tmp_path, {"my groups/a:b/memory.max": "4096"}, cgroup="0::/a:b (deleted)\n", mountinfo=mountinfo)
    limit = read_limits(tmp_path).memory
    assert limit == MemoryLimit(limit_bytes=4096, file="/sys/fs/cgroup/my groups/a:b/memory.max")


def test_no_mountinfo_looks_where_groups_usually_stand(tmp_path):
    files = {"memory/tasks": "", "memory/box/memory.limit_in_bytes": "4096", "cpu.max": "100000 100000"}
    make_tree(tmp_path, files, cgroup=v1_own("/box"), mountinfo=None)
    limits = read_limits(tmp_path)
    assert limits.memory is not None
    assert limits.memory.limit_bytes == 4096
    assert limits.quota == CpuQuota(cores=1.0, file="/sys/fs/cgroup/cpu.max")


@pytest.mark.parametrize("text", ["", "nonsense", "- - -\n", " - cgroup2", "1 2 3 / - cgroup2\n", b"\xff\xfe - \x00"])
def test_proc_files_of_nonsense_are_no_limit(tmp_path, text):
    make_tree(tmp_path, {}, cgroup=text, mountinfo=text)
    assert read_limits(tmp_path) == Limits()


def test_another_process_is_read_by_its_number(tmp_path):
    make_tree(tmp_path, {"box/memory.max": "4096"})
    (tmp_path / "proc/17").mkdir()
    (tmp_path / "proc/17/cgroup").write_text("0::/box\n")
    (tmp_path / "proc/17/mountinfo").write_text(V2_MOUNT)
    assert read_limits(tmp_path).memory is None
    assert read_limits(tmp_path, pid=17).memory is not None


def test_memory_use_is_that_of_the_group_with_the_smallest_limit(tmp_path):
    files = {
        "pod/memory.max": "2000",
        "pod/memory.current": "1500\n",
        "pod/memory.stat": "anon 900\ninactive_file 400\n",
        "pod/box/memory.max": "max",
        "pod/box/memory.current": "100\n",
    }
    make_tree(tmp_path, files, cgroup="0::/pod/box\n")
    use = read_memory_use(tmp_path)
    assert use is not None
    assert (use.usage_bytes, use.reclaimable_bytes) == (1500, 400)
    assert use.file == "/sys/fs/cgroup/pod/memory.current"


def test_memory_use_without_a_limit_is_that_of_the_own_group(tmp_path):
    files = {"memory/box/memory.usage_in_bytes": "700", "memory/box/memory.stat": "total_inactive_file 900\n"}
    make_tree(tmp_path, files, cgroup=v1_own("/box"), mountinfo=v1_mounts())
    use = read_memory_use(tmp_path)
    assert use is not None
    assert (use.usage_bytes, use.reclaimable_bytes) == (700, 700)  # cache never above use


def test_oom_kills_are_read_from_v2_and_v1(tmp_path):
    v2 = make_tree(tmp_path / "v2", {"memory.events": "low 0\noom 3\noom_kill 2\n"})
    files = {"memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 5\n"}
    v1 = make_tree(tmp_path / "v1", files, cgroup=v1_own("/"), mountinfo=v1_mounts())
    assert (read_oom_kills(v2), read_oom_kills(v1)) == (2, 5)


def test_old_kernel_without_the_counter_has_no_oom_kills(tmp_path):
    files = {"memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\n"}
    make_tree(tmp_path, files, cgroup=v1_own("/"), mountinfo=v1_mounts())
    assert read_oom_kills(tmp_path) is None
