"""The suite on Spark: slots of one Java process, and of two executors that are Java processes of their own."""

from __future__ import annotations

import os

import pytest

from fanfold.engine.spark import Spark
from fanfold.errors import PlanError
from fanfold.events import UnitReady
from fanfold.testing.engines import CountingAgenda, CountingWork, EngineSuite

pytestmark = [pytest.mark.spark, pytest.mark.timeout(240)]


@pytest.fixture(scope="module", params=["local[2]", "local-cluster[2,1,1024]"])
def spark(request):
    engine = Spark(request.param, imports=("fanfold.testing.engines",))
    yield engine
    engine.close()


class TestSpark(EngineSuite):
    @pytest.fixture
    def engine(self, spark):
        return spark

    def test_both_units_work_in_their_own_processes(self, engine):
        agenda = CountingAgenda(units=2, num_windows=4, num_pieces=20)
        engine.carry_out(CountingWork(seconds=0.02), agenda)
        assert len(agenda.pids) == 2
        assert os.getpid() not in agenda.pids
        assert len({event.unit for event in agenda.events if isinstance(event, UnitReady)}) == 2

    def test_the_python_workers_had_one_thread_when_they_forked_their_units(self, engine):
        assert {member.threads_before_fork for member in engine.roll_call()} == {1}

    def test_a_group_is_refused_with_what_to_do(self, engine):
        with pytest.raises(PlanError) as caught:
            engine.start_group(print, 2)
        assert "use --on cpu:2" in str(caught.value)
