"""One seed for all random tests, printed, so that a failure can be had again: pytest --seed N."""

from __future__ import annotations

import functools
import importlib.util
import random

import pytest


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="seed of the random tests (default: drawn and printed)")


def pytest_configure(config):
    config.seed = config.getoption("--seed")
    if config.seed is None:
        config.seed = random.SystemRandom().randrange(10**6)


def pytest_report_header(config):
    return f"seed of the random tests: {config.seed}"


@pytest.fixture
def seed(request):
    """The run's seed."""
    return request.config.seed


@functools.cache
def _why_no_spark():
    """Why Spark cannot run here; None where it can."""
    if importlib.util.find_spec("pyspark") is None:
        return "pyspark is not installed: pip install 'fanfold[spark]'"
    from fanfold.engine.spark_java import check_java
    from fanfold.errors import PlanError

    try:
        check_java("local[1]")
    except PlanError as error:
        return f"SPARK IS NOT TESTED: {error.found}; {error.do}"
    return None


def pytest_runtest_setup(item):
    if item.get_closest_marker("spark") and (why := _why_no_spark()):
        pytest.skip(why)
