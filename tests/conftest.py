"""What all tests share: one seed, printed, so that a failure can be had again (pytest --seed N); an S3 server."""

from __future__ import annotations

import random
import uuid
from types import SimpleNamespace

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


@pytest.fixture(scope="session")
def _s3_server():
    pytest.importorskip("moto", reason="the extra 'test' is not installed: no S3-compatible server (moto)")
    from fanfold.testing.s3 import S3Server

    with S3Server() as server:
        yield server


@pytest.fixture
def s3(_s3_server, monkeypatch):
    """A server on loopback that speaks S3, to which this process's environment points."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CA_BUNDLE", "HTTP_PROXY", "HTTPS_PROXY", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in _s3_server.environment.items():
        monkeypatch.setenv(name, value)
    return _s3_server


@pytest.fixture
def s3_bucket(s3):
    """A new bucket: its name, and a client for looking into it and doing damage."""
    name = f"bucket-{uuid.uuid4().hex}"
    return SimpleNamespace(name=name, client=s3.make_bucket(name))
