"""Rates between and beyond measured points, and their record."""

from __future__ import annotations

import json
import math

import pytest

from fanfold.machine.rates import Link, Point, Rates, from_record, work


def gemm(m, k, n, rate, threads=1, busy=1):
    shape = (m, k, n)
    return Point(kind="gemm", shape=shape, threads=threads, busy=busy, seconds=work("gemm", shape) / rate)


def rates(*points, cores=4):
    return Rates(
        cores=cores,
        by="test",
        points=points,
        copy_bytes_per_s=1e10,
        copy_all_bytes_per_s=2e10,
        issue_s=1e-5,
        own_share=1.0,
        zygote_bytes=300_000_000,
        unit_bytes=80_000_000,
        import_s=5.0,
        links={"pipe": Link(start_s=1e-5, bytes_per_s=1e9)},
    )


CORNERS = [gemm(m, k, n, rate * 1e9) for m, k, n, rate in [
    (64, 256, 256, 20), (64, 256, 1024, 40), (64, 1024, 256, 40), (64, 1024, 1024, 80),
    (256, 256, 256, 40), (256, 256, 1024, 80), (256, 1024, 256, 80), (256, 1024, 1024, 160),
]]  # fmt: skip


def test_a_measured_shape_takes_what_was_measured():
    for point in CORNERS:
        assert rates(*CORNERS).seconds("gemm", point.shape) == pytest.approx(point.seconds)


def test_a_rate_that_grows_with_a_power_of_the_sides_is_met_in_between():
    # the corners are 20 GFLOP/s times the square roots of the sides over the smallest
    expected = 20e9 * math.sqrt(100 / 64 * 512 / 256 * 300 / 256)
    assert rates(*CORNERS).rate("gemm", (100, 512, 300)) == pytest.approx(expected)


def test_outside_the_nearest_rate_holds():
    found = rates(*CORNERS)
    assert found.rate("gemm", (4096, 8192, 8192)) == pytest.approx(160e9)
    assert found.rate("gemm", (1, 1, 1)) == pytest.approx(20e9)


def test_a_corner_that_was_not_measured_is_left_out():
    found = rates(*CORNERS[:-1])
    assert 40e9 < found.rate("gemm", (200, 1000, 1000)) < 160e9


def test_units_that_compute_together_are_slowed_as_measured():
    found = rates(*CORNERS, gemm(256, 1024, 1024, 80e9, busy=4))
    assert found.rate("gemm", (256, 1024, 1024), busy=4) == pytest.approx(80e9)
    assert found.rate("gemm", (256, 1024, 1024), busy=16) == pytest.approx(80e9)
    assert found.rate("gemm", (256, 1024, 1024), busy=2) == pytest.approx(160e9 * (1 - 0.5 / 3))
    assert found.rate("gemm", (64, 256, 256), busy=4) == pytest.approx(10e9)


def test_threads_gain_as_measured():
    found = rates(*CORNERS, gemm(256, 1024, 1024, 480e9, threads=4))
    assert found.rate("gemm", (256, 1024, 1024), threads=4) == pytest.approx(480e9)
    assert found.rate("gemm", (256, 1024, 1024), busy=4) == pytest.approx(160e9)


def test_attention_depends_on_length_and_head_width_only():
    points = [
        Point(kind="attention", shape=(8, 4, length, 64), seconds=8 * 4 * length**2 / rate)
        for length, rate in ((64, 1e8), (256, 4e8))
    ]
    found = rates(*points)
    assert found.seconds("attention", (2, 12, 128, 64)) == pytest.approx(2 * 12 * 128**2 / 2e8)


def test_what_was_not_measured_is_no_number():
    with pytest.raises(ValueError, match="no attention was measured"):
        rates(*CORNERS).seconds("attention", (1, 1, 16, 64))


def test_the_record_travels_as_json():
    found = rates(*CORNERS, gemm(256, 1024, 1024, 80e9, busy=4))
    assert from_record(json.loads(json.dumps(found.record()))) == found


@pytest.mark.parametrize("change", [{"version": 0}, {"points": []}, {"more": 1}, {"points": [{"kind": "gemm"}]}])
def test_a_damaged_record_or_one_of_another_version_is_refused(change):
    record = {**rates(*CORNERS).record(), **change}
    with pytest.raises((ValueError, KeyError, TypeError)):
        from_record(record)
