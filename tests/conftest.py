"""What all tests share: one seed, printed, so that a failure can be had again (pytest --seed N); an S3 server."""

from __future__ import annotations

import functools
import importlib.util
import os
import random
import socket
import subprocess
import time
import uuid
from types import SimpleNamespace

import pytest


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=None, help="seed of the random tests (default: drawn and printed)")


def pytest_configure(config):
    config.seed = config.getoption("--seed")
    if hasattr(config, "workerinput"):  # one of several processes that share the tests: they share the seed, too
        config.seed = config.workerinput["seed"]
    if config.seed is None:
        config.seed = random.SystemRandom().randrange(10**6)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    node.workerinput["seed"] = node.config.seed


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


@pytest.fixture(scope="session")
def standalone(tmp_path_factory):
    """A Spark master with two workers of one core, which it takes for two hosts; all on loopback."""
    from fanfold.engine.spark_java import spark_home

    folder = tmp_path_factory.mktemp("standalone")
    spark_class = [str(spark_home(folder) / "bin" / "spark-class")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    master = f"spark://127.0.0.1:{port}"
    log = (folder / "log").open("wb")
    processes = []

    def start(host, *words):
        variables = {**os.environ, "SPARK_HOME": str(folder / "home"), "SPARK_LOCAL_IP": host}
        command = [*spark_class, *words, "--host", host, "--webui-port", "0"]
        processes.append(subprocess.Popen(command, env=variables, stdout=log, stderr=log))

    deploy = "org.apache.spark.deploy"
    try:
        start("127.0.0.1", f"{deploy}.master.Master", "--port", str(port))
        for host in ("127.0.0.1", "127.0.0.2"):
            work = ["-c", "1", "-m", "2g", "-d", str(folder / host)]
            start(host, f"{deploy}.worker.Worker", master, *work)
        deadline_s = time.monotonic() + 90
        while (folder / "log").read_bytes().count(b"Successfully registered with master") < 2:
            assert time.monotonic() < deadline_s, (folder / "log").read_text()
            time.sleep(0.2)
        yield master
    finally:
        for process in reversed(processes):
            process.terminate()
            process.wait(20)
        log.close()


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
