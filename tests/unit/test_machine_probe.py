import contextlib

import numpy as np
import pytest

from fanfold.machine import probe as probe_module
from fanfold.machine.probe import median_run_s, numpy_matmul, numpy_threads, probe


class FakeLibrary:
    """A matmul of known rate on a clock of its own: each thread gives `flop_per_s`."""

    def __init__(self, flop_per_s, copy_s=0.01):
        self.now_s, self.flop_per_s, self.copy_s = 0.0, flop_per_s, copy_s
        self.count, self.used, self.products = 8, [], 0

    def clock(self):
        return self.now_s

    def matmul(self, m, k, n):
        def run():
            self.products += 1
            self.now_s += 2 * m * k * n / (self.flop_per_s * self.count)

        return run

    @contextlib.contextmanager
    def threads(self, count):
        before, self.count = self.count, count
        self.used.append(count)
        yield
        self.count = before

    def copy(self, num_bytes):
        def run():
            self.now_s += self.copy_s

        return run


@pytest.fixture
def measure(monkeypatch):
    def measure(library, **settings):
        monkeypatch.setattr(probe_module, "_copy", library.copy)
        return probe(library.matmul, threads=library.threads, clock=library.clock, **settings)

    return measure


def test_rates_are_those_of_the_library(measure):
    library = FakeLibrary(60e9, copy_s=0.01)
    found = measure(library, cores=4)
    assert found.gemm_one_flop_per_s == pytest.approx(60e9)
    assert found.gemm_all_flop_per_s == pytest.approx(240e9)
    assert found.copy_bytes_per_s == pytest.approx(2 * 64 * 2**20 / 0.01)
    assert found.cores == 4
    assert library.used == [1, 4]
    assert library.count == 8  # as before


def test_one_core_is_measured_once(measure):
    library = FakeLibrary(60e9)
    found = measure(library, cores=1)
    assert found.gemm_all_flop_per_s == found.gemm_one_flop_per_s
    assert library.used == [1]


@pytest.mark.parametrize("flop_per_s", [2e9, 20e9, 200e9, 2000e9])
@pytest.mark.parametrize("budget_s", [0.5, 2.0, 10.0])
def test_the_budget_holds_on_slow_and_fast_machines(measure, flop_per_s, budget_s):
    found = measure(FakeLibrary(flop_per_s), cores=2, budget_s=budget_s)
    assert found.elapsed_s <= 1.3 * budget_s


def test_the_product_is_as_large_as_the_budget_lets_it_be(measure):
    sides = [measure(FakeLibrary(rate), cores=2).side for rate in (1e8, 2e9, 60e9, 2000e9)]
    assert sides == [256, 256, 1024, 2048]


def test_very_slow_machines_still_run_each_product_three_times(measure):
    library = FakeLibrary(1e6)
    measure(library, cores=1, budget_s=0.1)
    assert library.products == 2 + 1 + 3  # two to choose the size, one not counted, three


def test_the_median_ignores_one_slow_run():
    times_s = iter([9.0, 0.1, 5.0, 0.1])  # the first run is not counted
    now_s = 0.0

    def run():
        nonlocal now_s
        now_s += next(times_s)

    assert median_run_s(run, 0.0, lambda: now_s) == pytest.approx(0.1)


def test_a_run_too_short_for_the_clock_is_not_a_division_by_zero():
    assert median_run_s(lambda: None, 0.0, lambda: 1.0) == 1e-9


def test_numpy_multiplies_float32_of_the_shape_asked_for():
    product = numpy_matmul(3, 4, 5)()
    assert (product.shape, product.dtype) == ((3, 5), np.float32)
    assert product.any()


def test_numpy_threads_are_set_inside_and_restored_after():
    import threadpoolctl

    def counts():
        return [pool["num_threads"] for pool in threadpoolctl.threadpool_info() if pool["user_api"] == "blas"]

    before = counts()
    if not before:
        pytest.skip("numpy's BLAS here is not one that threadpoolctl can count")
    with numpy_threads(1):
        assert set(counts()) == {1}
    assert counts() == before


@pytest.mark.slow
def test_numpy_on_this_machine_gives_rates_a_computer_can_have():
    found = probe(numpy_matmul, threads=numpy_threads, cores=2, budget_s=0.5)
    assert 1e8 < found.gemm_one_flop_per_s < 1e13
    assert 1e8 < found.copy_bytes_per_s < 1e13
    assert found.elapsed_s < 10
