"""Ranks over shared memory: equal bytes everywhere, every disagreement and every death told, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import platform
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fanfold.engine.supervisor import child_environment
from fanfold.errors import InternalError, PlanError, SafetyError, StorageError, UnitLost
from fanfold.parallel import shared_file
from fanfold.parallel.shared import SharedGroup
from fanfold.parallel.shared_file import new_path, process_state, refusal

pytestmark = pytest.mark.skipif(refusal() is not None, reason=f"no shared memory between ranks: {refusal()}")
RANKS = Path(__file__).with_name("shared_ranks.py")


class Ranks:
    """Processes of one group that run a program of shared_ranks.py; killed at the end, whatever happens."""

    def __init__(self, program, size, *, timeout_s=20.0, missing=()):
        self.path = new_path()
        command = [sys.executable, str(RANKS), program, self.path]
        self.processes = [
            subprocess.Popen(
                [*command, str(rank), str(size), str(timeout_s)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=child_environment(threads=1),
                text=True,
            )
            for rank in range(size)
            if rank not in missing
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def wait_until_joined(self):
        for process in self.processes:
            assert process.stdout.readline() == "joined\n"

    def end(self, index, within_s=30.0):
        """Exit code and last words of a process, its stderr if it had none."""
        out, err = self.processes[index].communicate(timeout=within_s)
        lines = out.splitlines()
        return self.processes[index].returncode, json.loads(lines[-1]) if lines[-1:] not in ([], ["joined"]) else err


def results(program, size):
    with Ranks(program, size) as ranks:
        ends = [ranks.end(rank) for rank in range(size)]
        for code, said in ends:
            assert code == 0, said
        assert not Path(ranks.path).exists()
    return [said["result"] for _, said in ends]


SLOW = pytest.mark.slow


@pytest.mark.parametrize("size", [2, pytest.param(3, marks=SLOW), pytest.param(4, marks=SLOW)])
def test_every_rank_gets_the_bytes_that_one_process_would_compute(size):
    first, *others = results("everything", size)
    sums, *rest = first
    assert len(sums) == 64
    assert rest == ["gathered", "exchanged", "sent", "all_reduce"]
    assert others == [first] * (size - 1)


@pytest.mark.parametrize(
    ("program", "mine", "theirs"),
    [
        ("other_name", "all_reduce#4 layers.3.mlp float64 (4,)", "all_reduce#4 layers.3.attention float64 (4,)"),
        ("other_dtype", "all_reduce#4 layers.3.mlp float64 (4,)", "all_reduce#4 layers.3.mlp float32 (4,)"),
        ("other_shape", "all_reduce#4 layers.3.mlp float64 (2, 4)", "all_reduce#4 layers.3.mlp float64 (4, 2)"),
        ("other_kind", "all_gather#4 layers.3.mlp float64 (4,)", "all_reduce#4 layers.3.mlp float64 (4,)"),
        ("forgets_one", "all_reduce#5 layers.3.mlp float64 (4,)", "barrier#5 end"),
    ],
)
def test_ranks_that_call_different_things_are_told_at_once_what_both_called(program, mine, theirs):
    with Ranks(program, 2) as ranks:
        ends = [ranks.end(rank, within_s=10) for rank in (0, 1)]
    for rank, (asked, found) in enumerate([(mine, theirs), (theirs, mine)]):
        code, said = ends[rank]
        assert code == 1, said
        assert said["error"] == "InternalError"
        assert said["asked"] == f"rank {rank} of 2 in {asked}"
        assert said["found"] == f"rank {1 - rank} is in {found}"


def test_a_message_with_another_name_is_not_taken():
    with Ranks("other_message", 2) as ranks:
        ends = [ranks.end(rank, within_s=10)[1] for rank in (0, 1)]
    found = "rank 0 is in send#1 layers.3 to rank 1 float64 (4,)"
    assert (ends[1]["error"], ends[1]["found"]) == ("InternalError", found)
    assert ends[0]["error"] == "UnitLost"
    assert ends[0]["found"] == f"the first cause is rank 1's, in recv#1 layers.4 from rank 0: {found}"


@pytest.mark.faults
@pytest.mark.parametrize("size", [2, 3])
def test_a_killed_rank_is_missed_within_two_seconds_with_its_last_call(size):
    with Ranks("killed", size) as ranks:
        assert ranks.end(1)[0] == -signal.SIGKILL
        died_s = time.monotonic()
        for rank in {0, size - 1} - {1}:
            code, said = ranks.end(rank)
            assert time.monotonic() - died_s < 2.0
            assert code == 1, said
            assert said["error"] == "UnitLost"
            assert said["asked"] == f"rank {rank} of {size} in all_reduce#4 layers.0.mlp.down float32 (1, 8)"
            gone = f"rank 1 is gone (process {ranks.processes[1].pid} has ended); it has done all_reduce#3 layers.2.mlp"
            assert gone in said["found"]
        assert not Path(ranks.path).exists()


@pytest.mark.faults
def test_a_rank_that_dies_inside_a_call_is_named_with_it():
    with Ranks("killed_in_a_call", 3) as ranks:
        assert ranks.end(1)[0] == -signal.SIGALRM
        _, said = ranks.end(0, within_s=2)
    assert "rank 1 is gone" in said["found"]
    assert said["found"].endswith("it is in all_reduce#4 layers.0.mlp.down float32 (1, 8)")


@pytest.mark.faults
@pytest.mark.parametrize(
    ("program", "waits_in", "found"),
    [
        (
            "asleep",
            "all_reduce#4",
            "rank 1 has done all_reduce#3 layers.2.mlp.down float32 (1, 8) and called nothing since",
        ),
        ("stopped", "all_reduce#4", "float32 (1, 8) and called nothing since and is stopped"),
        ("receives_nothing", "recv#1 hidden states of stage 0 from rank 1", "and called nothing since"),
        (
            "both_send",
            "send#1 keys and values to rank 1",
            "rank 1 is in send#1 keys and values to rank 0 float64 (196608,)",
        ),
    ],
)
def test_the_watchdog_says_who_waits_for_whom_and_where_that_one_is(program, waits_in, found):
    with Ranks(program, 2, timeout_s=0.5) as ranks:
        code, said = ranks.end(0, within_s=5)
        if program != "both_send":
            assert ranks.processes[1].poll() is None
    assert code == 1, said
    assert said["error"] == "UnitLost"
    assert said["asked"].startswith(f"rank 0 of 2 in {waits_in}")
    assert said["found"].startswith("rank 1 is waited for since 0.5")
    assert said["found"].endswith(found)


@pytest.mark.faults
def test_a_paused_rank_does_not_blame_the_others_when_it_goes_on():
    with Ranks("steps_with_a_late_rank", 2, timeout_s=1.5) as ranks:
        ranks.wait_until_joined()
        time.sleep(0.2)  # rank 0 waits for rank 1, which comes after 0.7 s
        ranks.processes[0].send_signal(signal.SIGSTOP)
        time.sleep(2.0)
        ranks.processes[0].send_signal(signal.SIGCONT)
        assert [ranks.end(rank, within_s=10) for rank in (0, 1)] == [(0, {"result": None})] * 2


@pytest.mark.faults
def test_an_error_of_one_rank_is_the_first_cause_on_all():
    with Ranks("raises", 3) as ranks:
        ends = [ranks.end(rank, within_s=10)[1] for rank in range(3)]
    assert ends[1]["error"] == "ValueError"
    for rank in (0, 2):
        cause = "after all_reduce#3 layers.2.mlp.down float32 (1, 8): ValueError: a bad weight"
        assert ends[rank]["found"] == f"the first cause is rank 1's, {cause}"


@pytest.mark.faults
def test_a_rank_that_leaves_early_is_named_and_what_it_sent_before_arrives():
    with Ranks("leaves", 3) as ranks:
        assert [ranks.end(rank, within_s=10)[1] for rank in (0, 2)] == [{"result": "left"}] * 2
        _, said = ranks.end(1, within_s=10)
    assert said["asked"].startswith("rank 1 of 3 in all_reduce#4 layers.0.mlp.down")
    assert said["found"].startswith("rank 0 has left the group; it has done send#1 last words to rank 1 int64 (3,)")


@pytest.mark.faults
def test_nothing_is_left_when_all_ranks_are_killed():
    with Ranks("waits", 3) as ranks:
        ranks.wait_until_joined()
        assert not Path(ranks.path).exists()
        for process in ranks.processes:
            process.kill()
        for process in ranks.processes:
            process.wait(10)
        assert all(process_state(process.pid) is None for process in ranks.processes)


@pytest.mark.faults
def test_a_rank_that_does_not_come_is_named_and_the_file_is_gone():
    with Ranks("waits", 3, timeout_s=0.5, missing=(1,)) as ranks:
        ends = [ranks.end(index, within_s=5)[1] for index in (0, 1)]
        assert not Path(ranks.path).exists()
    assert any("no rank 1 within 0.5 s" in said["found"] for said in ends)
    assert all(said["error"] == "UnitLost" for said in ends)


@pytest.mark.faults
@pytest.mark.parametrize("how", ["joined", "swept"])
def test_what_a_killed_first_rank_has_left_is_removed(how):
    with Ranks("waits", 2, missing=(1,)) as ranks:
        path, process = Path(ranks.path), ranks.processes[0]
        deadline_s = time.monotonic() + 10
        while not (path.exists() and pid_of_rank_0(path)):
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        new_path()
        assert path.exists()  # its rank lives
        process.kill()
        process.wait(10)
        if how == "joined":
            with pytest.raises(UnitLost) as caught:
                SharedGroup(str(path), 1, 2, timeout_s=10.0)
            assert f"rank 0 (process {process.pid}) is gone" in str(caught.value)
        else:
            new_path()
        assert not path.exists()


def pid_of_rank_0(path):
    return int.from_bytes(path.read_bytes()[4096:4104], "little")


@pytest.mark.faults
@pytest.mark.nightly
def test_a_rank_killed_at_any_time_ends_its_group_and_is_named(seed):
    rng = random.Random(seed)
    for _ in range(20):
        size = rng.choice([2, 3, 4])
        victim = rng.randrange(size)
        with Ranks("for_ever", size, timeout_s=5.0) as ranks:
            if rng.random() < 0.7:
                ranks.wait_until_joined()
            time.sleep(rng.uniform(0.0, 0.5))
            pid = ranks.processes[victim].pid
            ranks.processes[victim].kill()
            for rank in set(range(size)) - {victim}:
                code, said = ranks.end(rank, within_s=10)
                assert code == 1, said
                assert said["error"] == "UnitLost"
                causes = [
                    f"rank {victim} is gone (process {pid} has ended)",
                    f"rank {victim} (process {pid}) is gone",  # while the others were joining
                    f"no rank {victim} within 5 s",  # before it joined
                ]
                assert any(cause in said["found"] for cause in causes), said
            assert not Path(ranks.path).exists()


@pytest.fixture
def alone():
    with SharedGroup(new_path(), 0, 1, timeout_s=0.2) as group:
        yield group


def test_a_group_of_one_is_its_own_sum(alone):
    array = np.arange(5.0)
    assert alone.all_reduce(array, "x") is array
    assert array.tolist() == [0, 1, 2, 3, 4]
    assert [part.tolist() for part in alone.all_gather(array, "y")] == [[0, 1, 2, 3, 4]]
    alone.barrier("z")
    assert alone.calls(0) == ["all_reduce#1 x float64 (5,)", "all_gather#2 y float64 (5,)", "barrier#3 z"]


def test_the_ring_holds_the_last_calls_and_long_names_by_their_end(alone):
    for number in range(40):
        alone.barrier(f"{'layers.' * 40}{number}")
    assert len(alone.calls(0)) == shared_file.RING_CALLS - 1
    assert alone.calls(0)[-1].startswith("barrier#40 ")
    assert alone.calls(0)[-1].endswith("layers.layers.39")


@pytest.mark.parametrize(
    ("call", "found"),
    [
        (lambda group: group.all_reduce(np.array([object()]), "x"), "dtype object"),
        (lambda group: group.all_reduce(np.array([True]), "x"), "a sum of booleans"),
        (lambda group: group.all_reduce(np.zeros(3, np.longdouble), "x"), f"dtype {np.dtype(np.longdouble)}"),
        (lambda group: group.all_gather(np.array(1.0), "x"), "an array without axes"),
        (lambda group: group.broadcast(np.zeros(3), 1, "x"), "rank 1"),
        (lambda group: group.send(np.zeros(3), 0, "x"), "rank 0"),
        (lambda group: group.recv(0, "x"), "rank 0"),
        (lambda group: group.all_reduce(np.broadcast_to(1.0, 3), "x"), "a read-only array"),
    ],
)
def test_a_call_that_cannot_be_is_refused_before_the_others_see_it(alone, call, found):
    with pytest.raises(InternalError) as caught:
        call(alone)
    assert caught.value.found == found
    assert alone.calls(0) == []
    alone.barrier("goes on")


def test_a_closed_group_says_so():
    group = SharedGroup(new_path(), 0, 1)
    group.close()
    group.close()
    with pytest.raises(InternalError) as caught:
        group.barrier("x")
    assert caught.value.found == "the group is closed"


@pytest.mark.parametrize(("rank", "size"), [(2, 2), (-1, 2), (0, 0)])
def test_a_rank_outside_of_the_group_is_refused(rank, size):
    with pytest.raises(InternalError) as caught:
        SharedGroup(new_path(), rank, size)
    assert caught.value.found == f"rank {rank} of {size}"


def test_a_file_of_another_size_a_taken_rank_and_open_permissions_are_refused():
    path = Path(new_path())
    try:
        path.write_bytes(b"something else")
        path.chmod(0o600)
        with pytest.raises(InternalError) as caught:
            SharedGroup(str(path), 0, 2)
        assert "a file of 14 bytes" in caught.value.found
        path.chmod(0o666)
        with pytest.raises(SafetyError) as unsafe:
            SharedGroup(str(path), 0, 2)
        assert unsafe.value.found.endswith("with mode 666")
        assert path.read_bytes() == b"something else"
    finally:
        path.unlink()
    with Ranks("waits", 2, missing=(1,)) as ranks:
        path = Path(ranks.path)
        while not (path.exists() and pid_of_rank_0(path)):
            time.sleep(0.01)
        with pytest.raises(InternalError) as taken:
            SharedGroup(ranks.path, 0, 2)
        assert taken.value.found == f"rank 0 is process {ranks.processes[0].pid} already"
        assert path.exists()  # the others may still come
        SharedGroup(ranks.path, 1, 2).close()
        assert not path.exists()


def test_full_shared_memory_is_an_error_with_what_to_do_and_leaves_no_file(monkeypatch):
    def full(fd, at, length):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    path = new_path()
    with pytest.raises(StorageError) as caught:
        SharedGroup(path, 0, 2)
    assert "No space left" in caught.value.found
    assert "--shm-size" in caught.value.do
    assert not Path(path).exists()


def test_processors_that_reorder_stores_are_refused(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    path = new_path()
    with pytest.raises(PlanError) as caught:
        SharedGroup(path, 0, 1)
    assert "aarch64" in caught.value.found
    assert "gloo" in caught.value.do
    assert not Path(path).exists()
