"""Every engine passes the shipped suite; what only local processes can do is tested here."""

from __future__ import annotations

import os
import select
import signal
import time

import pytest

from fanfold.engine.inline import Inline
from fanfold.engine.local import Local
from fanfold.engine.threads import Threads
from fanfold.engine.wire import Closed
from fanfold.errors import PlanError, UnitLost
from fanfold.plan.plan import Unit
from fanfold.testing.engines import CountingAgenda, CountingWork, EngineSuite


class TestInline(EngineSuite):
    forks = False

    @pytest.fixture
    def engine(self):
        engine = Inline()
        yield engine
        engine.close()

    def test_a_group_is_refused_with_what_to_do(self, engine):
        with pytest.raises(PlanError) as caught:
            engine.start_group(echo, 2)
        assert "use --on cpu:2" in str(caught.value)


class TestThreads(EngineSuite):
    forks = False

    @pytest.fixture
    def engine(self):
        engine = Threads((Unit(name="threads:0"), Unit(name="threads:1")))
        yield engine
        engine.close()

    def test_a_group_is_refused_with_what_to_do(self, engine):
        with pytest.raises(PlanError) as caught:
            engine.start_group(echo, 2)
        assert "use --on cpu:2" in str(caught.value)


@pytest.fixture(scope="module")
def local():
    engine = Local((Unit(name="cpu:0"), Unit(name="cpu:1")), imports=("fanfold.testing.engines",))
    yield engine
    engine.close()


class TestLocal(EngineSuite):
    @pytest.fixture
    def engine(self, local):
        return local

    def test_both_units_work_in_their_own_processes(self, engine):
        agenda = CountingAgenda(units=2, num_windows=4, num_pieces=20)
        engine.carry_out(CountingWork(seconds=0.005), agenda)
        assert len(agenda.pids) == 2
        assert os.getpid() not in agenda.pids

    def test_a_lambda_from_a_caller_travels_by_value(self, engine):
        work = CountingWork()
        object.__setattr__(work, "seconds", (lambda: 0.0)())
        agenda = CountingAgenda(units=2)
        engine.carry_out(work, agenda)
        assert agenda.found == agenda.expected

    def test_a_group_of_two_echoes_and_ends(self, engine):
        group = engine.start_group(echo, 2)
        try:
            for rank in range(2):
                group.send(rank, f"hello {rank}")
            assert [group.receive(rank, 10) for rank in range(2)] == [(0, 2, "hello 0"), (1, 2, "hello 1")]
            pids = group.pids
            assert len(set(pids)) == 2
        finally:
            group.close()
        assert all(gone(pid) for pid in pids)

    def test_a_group_dies_whole_and_names_the_first_cause(self, engine):
        group = engine.start_group(fails_at_one, 2)
        with pytest.raises(UnitLost) as caught:
            group.receive(0, 10)
        assert "rank 1 failed: ValueError: the first cause" in str(caught.value)
        assert "in fails_at_one" in str(caught.value)
        with pytest.raises(UnitLost):
            group.send(0, "anything")

    def test_a_group_that_is_silent_is_ended(self, engine):
        group = engine.start_group(silent, 2)
        with pytest.raises(UnitLost) as caught:
            group.receive(1, 0.2)
        assert "rank 1 was silent for 0.2 s" in str(caught.value)


def echo(rank, size, channel):
    channel.send((rank, size, channel.receive()))
    channel.receive()


def fails_at_one(rank, size, channel):
    if rank == 1:
        raise ValueError("the first cause")
    channel.receive()


def silent(rank, size, channel):
    time.sleep(60)


def gone(pid, within_s=2.0):
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rsplit(")", 1)[1].split()[0] == "Z":
                    return True
        except OSError:
            return True
        time.sleep(0.01)
    return False


def test_workers_forked_together_hold_no_end_of_each_others_channel(monkeypatch):
    """Else the death of one is not seen before the other's: requests that reach the zygote in one read."""
    from fanfold.engine.supervisor import Supervisor

    supervisor = Supervisor(imports=(), threads=1)
    supervisor.warm_up()
    supervisor._wait_ready()
    os.kill(supervisor.zygote_pid, signal.SIGSTOP)
    try:
        workers = [supervisor.start(Unit(name=f"cpu:{i}")) for i in range(3)]
    finally:
        os.kill(supervisor.zygote_pid, signal.SIGCONT)
    try:
        pids = [worker.channel.receive()[1] for worker in workers]
        for worker, pid in reversed(list(zip(workers, pids, strict=True))):
            os.kill(pid, signal.SIGKILL)
            assert select.select([worker.channel], [], [], 5.0)[0], "the end of the channel was not seen"
            with pytest.raises(Closed):
                worker.channel.receive()
    finally:
        for worker in workers:
            worker.channel.close()
            worker.stderr.close()
        supervisor.close()
