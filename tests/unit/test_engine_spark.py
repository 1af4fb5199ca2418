"""What is refused before Spark is started, and what the roll call refuses: no Java is needed here."""

from __future__ import annotations

import socket
import time

import pytest

from fanfold import extras
from fanfold.engine import post, spark
from fanfold.engine.post import Member, Place, Software, differences
from fanfold.errors import MissingExtra, PlanError

OURS = Software(python="3.11.7", packages=(("fanfold", "0.1.0"), ("numpy", "2.4.6")))


def member(**changed):
    values = {
        "place": Place(host="host-a", executor=10, worker=11, pid=12),
        "software": OURS,
        "cpu_name": "a CPU",
        "cpu_vendor": "GenuineIntel",
        "isa": "avx512",
        "cores": 4,
        "memory_bytes": 10**10,
        "threads_before_fork": 1,
        "seen": True,
        "why_not": "",
        "missing": (),
    }
    return Member(**{**values, **changed})


def refused(*members, folder=None):
    with pytest.raises(PlanError) as caught:
        spark.check_members("spark://m:7077", OURS, members, folder)
    assert caught.value.exit_code == 2
    return caught.value


def test_slots_that_are_alike_pass():
    spark.check_members("spark://m:7077", OURS, (member(), member()), None)


def test_another_python_or_package_on_an_executor_is_named():
    other = Software(python="3.12.1", packages=(("fanfold", "0.1.0"), ("numpy", "1.26.4")))
    error = refused(member(), member(software=other, place=Place(host="host-b", executor=1, worker=2, pid=3)))
    assert "host-b" in error.asked
    assert error.found == "Python 3.12.1, the driver has 3.11.7; numpy 1.26.4, the driver has 2.4.6"
    assert "PYSPARK_PYTHON" in error.do


def test_another_patch_of_python_is_the_same():
    assert differences(OURS, Software(python="3.11.9", packages=OURS.packages)) == []


def test_a_mixed_cluster_is_refused():
    error = refused(member(), member(isa="avx2"))
    assert error.found == "executors with different CPUs: GenuineIntel avx2, GenuineIntel avx512"


def test_a_folder_that_is_not_shared_is_refused(tmp_path):
    error = refused(member(), member(seen=False, why_not="FileNotFoundError: ..."), folder=tmp_path)
    assert str(tmp_path) in error.asked
    assert "1 of 2 slots do not share it with the driver (on host-a): FileNotFoundError" in error.found


def test_a_model_that_an_executor_does_not_see_is_refused():
    error = refused(member(missing=("/models/small",)))
    assert error.found == "/models/small is not there on host-a"


def test_the_roll_call_names_only_the_model_libraries_that_the_job_needs():
    assert "torch" not in dict(post.software(("numpy",)).packages)
    assert "torch" in dict(post.software(("torch",)).packages)


# -- before anything is started ---------------------------------------------------------------------------


def start(master="local[2]"):
    with pytest.raises(PlanError) as caught:
        spark.Spark(master)
    return caught.value


@pytest.fixture
def pyspark(monkeypatch):
    monkeypatch.setattr(extras, "need", lambda *_, **__: None)


def test_without_pyspark_the_pip_line_is_given(monkeypatch):
    monkeypatch.setattr(extras, "has", lambda module: False)
    with pytest.raises(MissingExtra) as caught:
        spark.Spark("local[2]")
    assert "pip install 'fanfold[spark]'" in caught.value.do


def test_without_java_the_package_is_named(monkeypatch, tmp_path, pyspark):
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    error = start()
    assert error.found == "no Java: no JAVA_HOME, none on the PATH"
    assert "apt-get install openjdk-17-jre-headless" in error.do


@pytest.mark.parametrize(
    ("told", "found"),
    [
        ('openjdk version "1.8.0_392"', 'says: openjdk version "1.8.0_392"'),
        ('openjdk version "11.0.21" 2023-10-17', 'says: openjdk version "11.0.21"'),
        ("", "says: nothing"),
    ],
)
def test_an_old_java_is_refused_with_what_it_says(monkeypatch, tmp_path, pyspark, told, found):
    java = tmp_path / "bin" / "java"
    java.parent.mkdir()
    java.write_text(f"#!/bin/sh\necho '{told}' >&2\n")
    java.chmod(0o755)
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    error = start()
    assert found in error.found
    assert error.allowed == "Java 17 or newer"
    assert "unset JAVA_HOME" in error.do


def test_a_java_home_without_java_is_refused(monkeypatch, tmp_path, pyspark):
    monkeypatch.setenv("JAVA_HOME", str(tmp_path))
    assert "does not run: FileNotFoundError" in start().found


@pytest.fixture
def java(monkeypatch, pyspark):
    monkeypatch.setattr(spark, "check_java", lambda master: None)


def test_a_master_that_cannot_be_reached_is_refused_at_once_with_what_was_tried(java):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    begun_s = time.monotonic()
    error = start(f"spark://127.0.0.1:{port},127.0.0.1:{port}")
    assert time.monotonic() - begun_s < 2
    assert error.found.count(f"127.0.0.1:{port}: ") == 2
    assert "refused" in error.found


def test_a_name_that_nobody_knows_is_refused(java):
    assert "no-such-host.invalid:7077" in start("spark://no-such-host.invalid:7077").found


def test_a_port_that_cannot_be_is_refused(java):
    assert "127.0.0.1:99999: " in start("spark://127.0.0.1:99999").found


@pytest.mark.parametrize("master", ["spark://host", "spark://:7077", "spark://a:7077,b"])
def test_a_master_without_its_port_is_refused(java, master):
    assert "7077" in start(master).do


def test_yarn_without_its_configuration_is_refused(monkeypatch, java):
    monkeypatch.delenv("HADOOP_CONF_DIR", raising=False)
    monkeypatch.delenv("YARN_CONF_DIR", raising=False)
    assert "HADOOP_CONF_DIR" in start("yarn").found


def test_the_words_of_a_lost_task_are_what_happened_last():
    words = (
        "Job aborted due to stage failure: Task 0 in stage 5.0 failed 4 times, most recent failure: Lost task 0.3 in "
        "stage 5.0 (TID 9) (127.0.0.1 executor 1): ExecutorLostFailure (executor 1 exited) Reason: Command exited with "
        "code 137\n\tat org.apache.spark.A.b(C.scala:1)\nDriver stacktrace:\n\tat x"
    )
    assert spark.reason_in(words).startswith("Lost task 0.3 in stage 5.0")
    assert spark.reason_in(words).endswith("code 137")
