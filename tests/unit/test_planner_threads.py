"""Units x threads: what was measured decides, and the default where options are about the same."""

from __future__ import annotations

from fanfold.planner.threads import Rates, Step, options, recommend

RATES = Rates(cores=8, gemm_one_flop_per_s=1e11, gemm_all_flop_per_s=6e11, copy_bytes_per_s=2e10)


def test_products_that_gain_more_than_cores_by_threads_want_fewer_units():
    shared = Rates(cores=8, gemm_one_flop_per_s=5e10, gemm_all_flop_per_s=9e11, copy_bytes_per_s=2e10)
    chosen, reasons = recommend(shared, Step(weights_bytes=10**9, own_bytes=0, rows=64, flops_per_row=1e9))
    assert chosen.threads > 1
    assert reasons[0].startswith(f"recommended: {chosen.units} x {chosen.threads} thread(s)")


def test_reading_alone_makes_no_option_better():
    step = Step(weights_bytes=14_000_000_000, own_bytes=0, rows=4, flops_per_row=1.0)
    assert recommend(RATES, step)[0].threads == 1


def test_a_step_that_only_computes_wants_one_thread_a_unit():
    step = Step(weights_bytes=1_000_000, own_bytes=0, rows=2048, flops_per_row=1e9)
    chosen, _ = recommend(RATES, step)
    assert (chosen.units, chosen.threads) == (8, 1)


def test_options_that_are_about_the_same_take_the_default():
    even = Rates(cores=2, gemm_one_flop_per_s=1e11, gemm_all_flop_per_s=2e11, copy_bytes_per_s=1e15)
    assert recommend(even, Step(weights_bytes=1, own_bytes=0, rows=64, flops_per_row=1e9))[0].threads == 1


def test_every_option_keeps_to_the_cores_and_to_the_units_asked_for():
    step = Step(weights_bytes=10**9, own_bytes=10**9, rows=64, flops_per_row=1e9)
    assert [(option.units, option.threads) for option in options(RATES, step)] == [(8, 1), (4, 2), (2, 4), (1, 8)]
    assert all(option.units == 2 and option.threads <= 4 for option in options(RATES, step, units=2))
    one = Rates(cores=1, gemm_one_flop_per_s=1e11, gemm_all_flop_per_s=1e11, copy_bytes_per_s=1e10)
    assert [(option.units, option.threads) for option in options(one, step)] == [(1, 1)]
