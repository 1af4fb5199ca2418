"""Starts, watches and ends processes; knows nothing of what they do.

A process that has threads is never forked: workers come from a zygote, a clean process that has only
imported. Where it finds more than one thread in itself, or on macOS, workers are started one by one instead.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from fanfold.engine._worker import Hello
from fanfold.engine.wire import Channel, Closed, pair
from fanfold.errors import UnitLost
from fanfold.machine.memory import processor_s

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fanfold.plan.plan import Unit

START_TIMEOUT_S = 60.0
IN_WORKER = "FANFOLD_IN_WORKER"  # set in the environment of every process that we start
_STDERR_LINES = 50
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",
)


def child_environment(threads: int, base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Our own environment (or `base`) as a worker needs it.

    Thread counts are set before anything is imported: some libraries read them only then.
    """
    environment = dict(os.environ if base is None else base)
    environment.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    environment[IN_WORKER] = "1"
    environment["TOKENIZERS_PARALLELISM"] = "false"
    environment["TRANSFORMERS_VERBOSITY"] = environment.get("TRANSFORMERS_VERBOSITY", "error")
    environment["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    # Arrow's allocator would start a thread at import, and a process with threads must not be forked.
    environment["JE_ARROW_MALLOC_CONF"] = "background_thread:false"
    # Large blocks go back to the system when they are freed; else a unit keeps what batches of every shape needed.
    environment.setdefault("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=4194304:glibc.malloc.hugetlb=1")
    root = str(Path(__file__).resolve().parents[2])
    paths = [root, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    environment["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
    return environment


class StderrTail:
    """The last lines that a process wrote to stderr, read without blocking."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        os.set_blocking(fd, False)
        self._lines: deque[str] = deque(maxlen=_STDERR_LINES)
        self._rest = b""
        self.open = True

    def read(self) -> None:
        while self.open:
            try:
                data = os.read(self.fd, 1 << 16)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self.close()
                return
            *lines, self._rest = (self._rest + data).split(b"\n")
            self._rest = self._rest[-4096:]
            self._lines.extend(line.decode("utf-8", "replace") for line in lines)

    def text(self) -> str:
        """The lines, oldest first, whatever the process left unfinished included."""
        rest = [self._rest.decode("utf-8", "replace")] if self._rest else []
        return "\n".join([*self._lines, *rest])

    def close(self) -> None:
        if self.open:
            self.open = False
            os.close(self.fd)


@dataclass(slots=True)
class Process:
    """One worker as the parent sees it."""

    unit: Unit
    channel: Channel
    stderr: StderrTail
    pid: int | None = None
    popen: subprocess.Popen[bytes] | None = None
    exit_code: int | None = None
    up: bool = False
    started_s: float = field(default_factory=time.monotonic)

    def kill(self) -> None:
        """End this process, by its own id only."""
        if self.pid is not None and self.exit_code is None:
            try:
                os.kill(self.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


class Supervisor:
    """Owns a zygote and the workers forked from it."""

    def __init__(self, *, imports: tuple[str, ...], threads: int) -> None:
        self.imports = imports
        self.threads = threads
        self._zygote: subprocess.Popen[bytes] | None = None
        self._zygote_channel: Channel | None = None
        self._zygote_stderr: StderrTail | None = None
        self._zygote_ready = False
        self._zygote_threads = 0
        self._forks: dict[int, Process] = {}  # ticket -> worker waiting for its pid
        self._by_pid: dict[int, Process] = {}
        self._ticket = 0

    # -- starting -------------------------------------------------------------------------------------

    def warm_up(self) -> None:
        """Start the zygote; it imports while the caller goes on."""
        if sys.platform == "linux" and self._zygote is None:
            self._zygote, self._zygote_channel, self._zygote_stderr = self._launch(
                Hello(role="zygote", sys_path=tuple(sys.path), imports=self.imports)
            )
            self._zygote_ready = False

    def start(self, unit: Unit, *, memory_bytes: int | None = None) -> Process:
        """A new worker; it says ("up", pid) on its channel once it runs."""
        hello = Hello(
            role="worker", sys_path=tuple(sys.path), unit=unit, threads=self.threads, memory_bytes=memory_bytes
        )
        if sys.platform == "linux" and self._zygote_threads <= 1:
            process = self._fork(hello)
            if process is not None:
                return process
        popen, channel, stderr = self._launch(hello)
        return Process(unit=unit, channel=channel, stderr=stderr, pid=popen.pid, popen=popen)

    def _fork(self, hello: Hello) -> Process | None:
        self.warm_up()
        self._wait_ready()
        if self._zygote_threads > 1 or self._zygote_channel is None:
            return None
        ours, theirs = pair()
        stderr_read, stderr_write = os.pipe()
        process = Process(unit=hello.unit, channel=Channel(ours), stderr=StderrTail(stderr_read))
        self._ticket += 1
        try:
            self._zygote_channel.send(("fork", self._ticket, hello), [theirs.fileno(), stderr_write])
        except Closed:
            self._forget_zygote()
            process.channel.close()
            process.stderr.close()
            return self._fork(hello)
        finally:
            theirs.close()
            os.close(stderr_write)
        self._forks[self._ticket] = process
        return process

    def _launch(self, hello: Hello) -> tuple[subprocess.Popen[bytes], Channel, StderrTail]:
        ours, theirs = pair()
        stderr_read, stderr_write = os.pipe()
        popen = subprocess.Popen(
            [sys.executable, "-P", "-m", "fanfold.engine._worker", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=stderr_write,
            stderr=stderr_write,
            env=child_environment(self.threads),
        )
        theirs.close()
        os.close(stderr_write)
        channel = Channel(ours)
        channel.send(hello)
        return popen, channel, StderrTail(stderr_read)

    def _wait_ready(self) -> None:
        """Until the zygote has imported; UnitLost with its last words if it does not get there.

        On a busy machine imports take long: as long as it computes, it is waited for.
        """
        deadline_s = time.monotonic() + START_TIMEOUT_S
        worked_s = 0.0
        while not self._zygote_ready:
            channel = self._zygote_channel
            assert channel is not None
            assert self._zygote is not None
            now_worked_s = processor_s(self._zygote.pid)
            if now_worked_s > worked_s:
                worked_s, deadline_s = now_worked_s, time.monotonic() + START_TIMEOUT_S
            left_s = deadline_s - time.monotonic()
            with selectors.DefaultSelector() as selector:
                selector.register(channel, selectors.EVENT_READ)
                ready = selector.select(max(0.0, min(left_s, 0.5)))
            if ready and not self._read_zygote():
                self._start_failed("it ended while it was importing")
            if left_s <= 0:
                self._start_failed(f"no answer and no work within {START_TIMEOUT_S:.0f} s")

    def _start_failed(self, found: str) -> None:
        last_words = ""
        if self._zygote_stderr is not None:
            self._zygote_stderr.read()
            last_words = self._zygote_stderr.text()
        self._forget_zygote()
        raise UnitLost(
            f"starting worker processes with {sys.executable}",
            found=found + (f"; its last words:\n{last_words}" if last_words else ""),
            allowed=f"imports that end within {START_TIMEOUT_S:.0f} s",
            do="run the same imports in a fresh Python to see what holds them: " + ", ".join(self.imports),
        )

    # -- watching -------------------------------------------------------------------------------------

    @property
    def zygote_pid(self) -> int | None:
        """The process that workers are forked from, None where there is none."""
        return None if self._zygote is None else self._zygote.pid

    @property
    def watched(self) -> Channel | None:
        """The channel on which news of forks and exits arrive."""
        return self._zygote_channel

    def read_news(self) -> None:
        """Take in what the zygote reports: pids and exit codes. A dead zygote is replaced at the next start."""
        if self._zygote_channel is not None and not self._read_zygote():
            self._forget_zygote()

    def exit_cause(self, process: Process, wait_s: float = 1.0) -> str:
        """Why a process that closed its channel ended, in words."""
        deadline_s = time.monotonic() + wait_s
        while process.exit_code is None and time.monotonic() < deadline_s:
            if process.popen is not None:
                process.exit_code = process.popen.poll()
            elif self._zygote_channel is None:
                break
            else:
                self.read_news()
            if process.exit_code is None:
                time.sleep(0.005)
        process.stderr.read()
        return describe_exit(process.exit_code)

    def _read_zygote(self) -> bool:
        assert self._zygote_channel is not None
        if self._zygote_stderr is not None:
            self._zygote_stderr.read()
        try:
            messages = self._zygote_channel.drain()
        except Closed:
            return False
        for message in messages:
            match message:
                case ("ready", threads):
                    self._zygote_ready, self._zygote_threads = True, threads
                case ("forked", ticket, pid):
                    process = self._forks.pop(ticket)
                    process.pid = pid
                    self._by_pid[pid] = process
                case ("exited", pid, code):
                    ended = self._by_pid.pop(pid, None)
                    if ended is not None:
                        ended.exit_code = code
        return True

    def forget(self) -> None:
        """In a forked child: our ends are closed here, the zygote goes on serving the parent."""
        if self._zygote is not None:
            self._zygote.returncode = 0  # nothing to wait for, and nothing to warn of
            self._zygote = None
        self._forget_zygote()

    def _forget_zygote(self) -> None:
        if self._zygote_channel is not None:
            self._zygote_channel.close()
        if self._zygote_stderr is not None:
            self._zygote_stderr.close()
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote.wait()
        self._zygote = self._zygote_channel = self._zygote_stderr = None
        self._zygote_ready = False
        self._forks.clear()
        self._by_pid.clear()

    def close(self) -> None:
        """End the zygote; it takes its workers along."""
        self._forget_zygote()


def describe_exit(code: int | None) -> str:
    """An exit code in words: `killed by SIGKILL`, `exit code 3`."""
    if code is None:
        return "ended for an unknown reason"
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"ended with exit code {code}"
