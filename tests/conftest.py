"""One seed for all random tests, printed, so that a failure can be had again: pytest --seed N."""

from __future__ import annotations

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
