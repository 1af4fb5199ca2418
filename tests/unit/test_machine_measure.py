"""Measuring within a time that is given, on made-up operators and clocks."""

from __future__ import annotations

import contextlib

import pytest

from fanfold.machine.measure import BUSY_GEMMS, Measuring, all_shapes, copy_bytes_per_s, core_shapes, run_s
from fanfold.machine.rates import work


class FakeOperators:
    """Every operator works at one rate; the wall's clock runs `load` times as fast as the processor's."""

    name = "fake"

    def __init__(self, rate, load=1.0):
        self.rate, self.load, self.cpu_s, self.count = rate, load, 0.0, 1

    def clock(self):
        return self.cpu_s

    def wall(self):
        return self.cpu_s * self.load

    def operator(self, kind, shape):
        def run():
            self.cpu_s += work(kind, shape) / (self.rate * self.count)

        return run

    def copy(self, num_bytes):
        def run():
            self.cpu_s += num_bytes / self.rate

        return run

    @contextlib.contextmanager
    def threads(self, count):
        before, self.count = self.count, count
        yield
        self.count = before


def measuring(operators, seconds):
    return Measuring(operators, operators.wall() + seconds, clock=operators.clock, wall=operators.wall)


def test_every_shape_is_measured_where_there_is_time():
    found = measuring(FakeOperators(1e13), 60.0)
    found.alone()
    assert {(point.kind, point.shape) for point in found.points} == set(all_shapes()) | set(core_shapes())
    assert all(point.rate == pytest.approx(1e13) for point in found.points)


def test_products_are_measured_on_all_cores_too():
    found = measuring(FakeOperators(1e13), 60.0)
    found.on_all(4)
    on_all = [point for point in found.points if point.threads == 4]
    assert [point.shape for point in on_all] == list(BUSY_GEMMS)
    assert all(point.rate == pytest.approx(4e13) for point in on_all)


@pytest.mark.parametrize("rate", [2e10, 1e11, 1e12])
def test_the_time_given_is_kept(rate):
    operators = FakeOperators(rate)
    found = measuring(operators, 3.0)
    found.alone(0.55)
    found.on_all(2, 0.3)
    found.together(2, lambda name: None)
    assert operators.wall() < 4.5
    assert {kind for kind, _ in core_shapes()} <= {point.kind for point in found.points}


def test_other_programs_do_not_count():
    quiet, busy = FakeOperators(1e12), FakeOperators(1e12, load=3.0)
    for operators in (quiet, busy):
        operators.found = measuring(operators, 5.0)
        operators.found.alone()
    assert busy.found.points[0].seconds == pytest.approx(quiet.found.points[0].seconds)


def test_processes_meet_before_every_operator():
    found, met = measuring(FakeOperators(1e12), 5.0), []
    found.together(3, met.append)
    assert len(met) == len(set(met)) == len(core_shapes()) == len(found.points)
    assert {point.busy for point in found.points} == {3}


def test_a_copy_counts_what_it_reads_and_writes():
    operators = FakeOperators(1e9)
    assert copy_bytes_per_s(operators, operators.clock) == pytest.approx(2e9)


def test_short_runs_are_repeated_until_the_clock_can_tell_them():
    operators = FakeOperators(1e12)
    runs = []
    inner = operators.operator("gemm", (1, 256, 256))
    seconds = run_s(lambda: (runs.append(1), inner()), 0.0, operators.clock)
    assert seconds == pytest.approx(2 * 256 * 256 / 1e12)
    assert len(runs) > 1000
