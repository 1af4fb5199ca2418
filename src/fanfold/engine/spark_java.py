"""The Java side: what must be there before Spark is started, how it is started, and how it ends."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanfold.data.scratch import scratch_folder
from fanfold.engine.supervisor import child_environment
from fanfold.errors import PlanError, cause_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import ExitStack

LEAST_JAVA = 17
REACH_S = 5.0  # for a connection to a master's port
START_S = 120.0  # for the Java side, once the master's port has answered
REGISTER_S = 20.0  # for a standalone master to take the application, once Java runs; Spark alone tries for 60 s
_CLOSE_S = 20.0
_MOST_SOCKET_FOLDER = 60  # the name of a socket has 107 bytes, Spark adds 42
_LOCAL = re.compile(r"local(\[.*\])?|local-cluster\[.*\]")


class JavaSide:
    """A Java process of our own with a SparkContext in it; everything it needs is undone when `stack` closes."""

    def __init__(
        self,
        master: str,
        *,
        imports: tuple[str, ...],
        threads: int,
        cores: int,
        conf: dict[str, str],
        stack: ExitStack,
    ) -> None:
        from pyspark import SparkContext

        if SparkContext._active_spark_context is not None:
            raise PlanError(
                f"--on {master}",
                found="this process has a SparkContext already",
                allowed="one per process: Fanfold needs its own, with its own Python workers",
                do="use fanfold.spark.embed(df, ...) with your session, or stop it first",
            )
        self.context: Any = None
        self._gateway: Any = None
        self._java_since_s = 0.0  # until it runs
        folder = stack.enter_context(scratch_folder())
        self._log = folder / "java.log"
        settings = {**settings_for(master, imports=imports, threads=threads, cores=cores, folder=folder), **conf}
        stack.callback(self.stop)
        done = threading.Event()
        errors: list[BaseException] = []

        def start() -> None:  # not in the main thread: there pyspark would take SIGINT for itself
            try:
                self._start(master, settings, folder)
            except BaseException as error:
                errors.append(error)
            done.set()

        begun_s = time.monotonic()
        threading.Thread(target=start, name="fanfold-spark", daemon=True).start()
        while not done.wait(0.1):
            now_s = time.monotonic()
            late = now_s - begun_s > START_S
            if master.startswith("spark://") and self._java_since_s:
                late = late or now_s - self._java_since_s > REGISTER_S
            if late:
                break
        if not done.is_set() or errors:
            waited_s = time.monotonic() - begun_s
            words = self._last_words()
            found = f"no answer within {waited_s:.0f} s" if not errors else cause_line(errors[0])
            raise PlanError(
                f"--on {master}",
                found=f"Spark did not start: {found}" + (f"; its last words:\n{words}" if words else ""),
                allowed="a master that takes this application",
                do="look at the last words; is it a Spark master, of pyspark's own version?",
            ) from (errors[0] if errors else None)

    def _start(self, master: str, settings: dict[str, str], folder: Path) -> None:
        from pyspark import SparkConf, SparkContext
        from pyspark.java_gateway import launch_gateway

        conf = SparkConf(loadDefaults=False)
        for key, value in settings.items():
            conf.set(key, value)
        variables = {"PYSPARK_PYTHON": os.environ.get("PYSPARK_PYTHON", sys.executable)}
        if is_local(master):
            variables["SPARK_LOCAL_IP"] = "127.0.0.1"
        if master.startswith("local-cluster"):
            variables["SPARK_HOME"] = str(spark_home(folder))
        with self._log.open("wb") as log, _environment(variables):
            if SparkContext._gateway is None:  # else the caller had a context before: its Java process is used
                self._gateway = launch_gateway(conf, popen_kwargs={"stdout": log, "stderr": log})
            self._java_since_s = time.monotonic()
            self.context = SparkContext(conf=conf, gateway=self._gateway)

    def _last_words(self) -> str:
        try:
            lines = self._log.read_text(errors="replace").splitlines()
        except OSError:
            return ""
        told = [line for line in lines if not re.search(r"\bWARN\b|^Using Spark's|^Setting|^To adjust|^\s+at ", line)]
        return "\n".join(told[-12:])

    def stop(self) -> None:
        from pyspark import SparkContext

        context, self.context = self.context, None
        gateway, self._gateway = self._gateway, None
        if context is not None:
            stopper = threading.Thread(target=quietly, args=(context.stop,), daemon=True)
            stopper.start()
            stopper.join(_CLOSE_S)
        if gateway is not None:
            quietly(gateway.shutdown)
            process = gateway.proc
            if process is not None:
                quietly(process.stdin.close)  # its end is what the Java side waits for
                try:
                    process.wait(_CLOSE_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            with SparkContext._lock:
                SparkContext._gateway = SparkContext._jvm = None
                SparkContext._active_spark_context = None

    def kill(self) -> None:
        if self._gateway is not None and self._gateway.proc is not None:
            self._gateway.proc.kill()


def settings_for(master: str, *, imports: tuple[str, ...], threads: int, cores: int, folder: Path) -> dict[str, str]:
    """Spark's configuration for a context of ours. Executors' Python gets the environment of a local worker."""
    variables = child_environment(threads, {"PYTHONPATH": os.environ.get("PYTHONPATH", "")})
    variables["FANFOLD_IMPORTS"] = ",".join(imports)
    settings = {
        "spark.master": master,
        "spark.app.name": "fanfold",
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": "false",
        "spark.log.level": "WARN",
        "spark.task.cpus": str(cores),
        "spark.dynamicAllocation.enabled": "false",  # a plan counts the slots that there are
        "spark.python.worker.reuse": "true",
        "spark.python.use.daemon": "true",
        "spark.python.daemon.module": "fanfold.engine._spark_daemon",
        "spark.python.worker.faulthandler.enabled": "true",
        # Spark 4.1 and newer; over TCP each task waits some 40 ms for acknowledgements (docs/log.md).
        "spark.python.unix.domain.socket.enabled": "true",
        **{f"spark.executorEnv.{name}": value for name, value in variables.items()},
    }
    if is_local(master):
        settings |= {
            "spark.driver.host": "127.0.0.1",
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.local.dir": str(folder / "spark"),
        }
        if len(str(folder)) < _MOST_SOCKET_FOLDER:
            settings["spark.python.unix.domain.socket.dir"] = str(folder)
    return settings


def spark_home(folder: Path) -> Path:
    """Spark's folder by links, but writable: a local cluster writes its executors' logs into SPARK_HOME/work."""
    from pyspark.find_spark_home import _find_spark_home

    real, home = Path(_find_spark_home()), folder / "home"
    home.mkdir()
    for entry in real.iterdir():
        if entry.name != "work":
            (home / entry.name).symlink_to(entry)
    return home


class _environment:
    """These variables are set for a while: what the Java process is started with."""

    def __init__(self, variables: dict[str, str]) -> None:
        self._variables = variables
        self._before: dict[str, str | None] = {}

    def __enter__(self) -> None:
        self._before = {name: os.environ.get(name) for name in self._variables}
        os.environ.update(self._variables)

    def __exit__(self, *_: object) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def check_java(master: str) -> None:
    """PlanError unless a Java that Spark runs on can be started."""
    home = os.environ.get("JAVA_HOME")
    program = f"{home}/bin/java" if home else shutil.which("java")
    do = f"install Java {LEAST_JAVA}, for example: apt-get install openjdk-{LEAST_JAVA}-jre-headless"
    if home:
        do += "; or unset JAVA_HOME"
    allowed = f"Java {LEAST_JAVA} or newer"
    if program is None:
        raise PlanError(f"--on {master}", found="no Java: no JAVA_HOME, none on the PATH", allowed=allowed, do=do)
    try:
        told = subprocess.run([program, "-version"], capture_output=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise PlanError(
            f"--on {master}", found=f"{program} does not run: {cause_line(error)}", allowed=allowed, do=do
        ) from None
    text = (told.stderr + told.stdout).decode(errors="replace")
    number = re.search(r'version "(?:1\.)?(\d+)', text)
    if number is None or int(number[1]) < LEAST_JAVA:
        first = text.strip().splitlines()[0] if text.strip() else "nothing"
        raise PlanError(f"--on {master}", found=f"{program} says: {first}", allowed=allowed, do=do)


def reach(master: str, timeout_s: float = REACH_S) -> None:
    """PlanError where the master's port takes no connection; says what was tried."""
    addresses = _addresses(master)
    tried = []
    for host, port in addresses:
        try:
            socket.create_connection((host, port), timeout=timeout_s).close()
        except (OSError, OverflowError) as error:
            tried.append(f"{host}:{port}: {error}")
        else:
            return
    if addresses:
        raise PlanError(
            f"--on {master}",
            found="the master cannot be reached; tried " + "; ".join(tried),
            allowed="a master that takes connections from this machine",
            do="check host and port (the master's log names them), and that no firewall is between",
        )
    if master == "yarn" and not (os.environ.get("HADOOP_CONF_DIR") or os.environ.get("YARN_CONF_DIR")):
        raise PlanError(
            "--on yarn",
            found="neither HADOOP_CONF_DIR nor YARN_CONF_DIR is set",
            allowed="a folder with the cluster's configuration in one of them",
            do="export HADOOP_CONF_DIR=/etc/hadoop/conf (or where your cluster keeps it)",
        )


def _addresses(master: str) -> list[tuple[str, int]]:
    if master.startswith("spark://"):
        parts = [part.rpartition(":") for part in master.removeprefix("spark://").split(",")]
        if not all(host and port.isdecimal() for host, _, port in parts):
            raise PlanError(
                f"--on {master}",
                found="a master without its port",
                allowed="spark://HOST:PORT, or spark://HOST:PORT,HOST:PORT for several",
                do="add the port; a standalone master listens on 7077 unless told otherwise",
            )
        return [(host, int(port)) for host, _, port in parts]
    if master.startswith("k8s://"):
        from urllib.parse import urlsplit

        text = master.removeprefix("k8s://")
        found = urlsplit(text if "://" in text else f"https://{text}")
        return [(found.hostname or "", found.port or (80 if found.scheme == "http" else 443))]
    return []


def is_local(master: str) -> bool:
    """Whether everything runs on this machine."""
    return _LOCAL.fullmatch(master) is not None


def num_expected(master: str) -> int:
    """Executors that a local master brings; 0: not known."""
    if found := re.fullmatch(r"local-cluster\[\s*(\d+)\s*,.*\]", master):
        return int(found[1])
    return 1 if is_local(master) else 0


def is_alive_context(context: Any) -> bool:
    """Whether the connection still stands."""
    try:
        return context is not None and not context._jsc.sc().isStopped()
    except Exception:
        return False


def quietly(call: Callable[[], object]) -> None:
    """Call it, whatever it raises."""
    try:
        call()
    except Exception:
        pass  # it is being shut down anyway
