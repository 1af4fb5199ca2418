"""The program of a unit: `python -m fanfold.engine._worker FD`, started by the supervisor, never by hand.

Two roles. A *zygote* imports once what the job names, stays at one thread, and forks workers on request; it
ends them all when the parent goes. A *worker* carries out assignments until told to close.
Signals that a terminal sends to the whole group are left to the parent.
"""

from __future__ import annotations

import gc
import importlib
import os
import select
import signal
import socket
import sys
import traceback
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanfold.engine.wire import Channel, Closed

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """The first message to a new process."""

    role: str  # zygote or worker
    sys_path: tuple[str, ...]
    imports: tuple[str, ...] = ()
    unit: Any = None
    threads: int = 1
    memory_bytes: int | None = None  # what a worker may hold beyond what the imports hold


def main() -> None:
    channel = Channel(socket.socket(fileno=int(sys.argv[1])))
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    try:
        hello: Hello = channel.receive()
    except Closed:
        return
    sys.path[:] = hello.sys_path
    if hello.role == "zygote":
        _zygote(channel, hello)
    else:
        _watch_parent()
        _worker(channel, hello)


# -- zygote -------------------------------------------------------------------------------------------


def num_threads() -> int:
    """Threads of this process, also those that Python does not know of."""
    try:
        return len(os.listdir("/proc/self/task"))
    except OSError:
        import threading

        return threading.active_count()


def import_all(names: tuple[str, ...]) -> None:
    """Import what can be imported."""
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError:
            pass  # the worker that needs it says so, with the pip line


class _orphan_guard:
    """While this process does not look at its channel, it leaves as soon as its parent has ended."""

    def __enter__(self) -> None:
        parent = os.getppid()

        def look(*_: object) -> None:
            if os.getppid() != parent:
                os._exit(1)

        signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, 0.5, 0.5)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, signal.SIG_DFL)


def _zygote(channel: Channel, hello: Hello) -> None:
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    with _orphan_guard():
        import_all(hello.imports)
    children: set[int] = set()
    channel.send(("ready", num_threads()))
    gc.collect()
    gc.freeze()
    try:
        while True:
            select.select([channel.fileno(), wake_read], [], [])
            while select.select([wake_read], [], [], 0)[0]:
                os.read(wake_read, 512)
            for pid in list(children):
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    children.discard(pid)
                    channel.send(("exited", pid, os.waitstatus_to_exitcode(status)))
            for message in channel.drain():
                match message:
                    case ("import", names):
                        with _orphan_guard():
                            import_all(names)
                        channel.send(("ready", num_threads()))
                    case ("fork", ticket, child_hello):
                        sock_fd, stderr_fd = channel.fds[:2]
                        del channel.fds[:2]
                        pid = os.fork()
                        if pid == 0:
                            _become_worker(channel, wake_read, wake_write, sock_fd, stderr_fd, child_hello)
                        os.close(sock_fd)
                        os.close(stderr_fd)
                        children.add(pid)
                        channel.send(("forked", ticket, pid))
    except Closed:
        pass  # the parent is gone: nothing of it stays behind
    finally:
        for pid in children:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass


def _become_worker(
    zygote: Channel, wake_read: int, wake_write: int, sock_fd: int, stderr_fd: int, hello: Hello
) -> None:
    """In the fork: cut the ties to the zygote, work, and leave without returning."""

    def cut() -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        die_with_parent()
        zygote.close()
        for fd in zygote.fds:  # of forks asked for together: a copy here would hide the other worker's death
            os.close(fd)
        os.close(wake_read)
        os.close(wake_write)

    work_in_fork(cut, sock_fd, stderr_fd, hello)


def work_in_fork(cut: Callable[[], None], sock_fd: int, stderr_fd: int, hello: Hello) -> None:
    """In a fork: `cut` the ties to the parent, be a worker on the socket, and leave without returning."""
    code = 1
    try:
        cut()
        os.dup2(stderr_fd, 2)
        os.dup2(stderr_fd, 1)
        os.close(stderr_fd)
        sys.path[:] = hello.sys_path
        _worker(Channel(socket.socket(fileno=sock_fd)), hello)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def die_with_parent() -> None:
    """The kernel ends this process when its parent ends (Linux), even while it is stuck in C code."""
    if sys.platform != "linux":
        return
    import ctypes

    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


# -- worker -------------------------------------------------------------------------------------------


def _worker(channel: Channel, hello: Hello) -> None:
    import faulthandler

    from fanfold.engine.engine import Desk

    if hello.memory_bytes is not None:
        limit_memory(hello.memory_bytes)
    faulthandler.enable()  # a crash leaves its stack on stderr, which the parent keeps
    stop = False

    def stopping() -> bool:
        nonlocal stop
        if not stop:
            for message in channel.drain():
                stop = stop or message == ("stop",)
        return stop

    desk = Desk(
        hello.unit,
        beat=lambda rows, tokens: channel.send(("beat", rows, tokens)),
        at=lambda piece, batch: channel.send(("at", piece, batch)),
        stopping=stopping,
    )
    work: Any = None
    channel.send(("up", os.getpid()))
    try:
        while True:
            match channel.receive():
                case ("work", body):
                    import pickle

                    work = pickle.loads(body)
                    stop = False
                case ("do", assignment):
                    _do(channel, work, assignment, desk)
                case ("run", body, rank, size):
                    _run_program(channel, body, rank, size)
                case ("stop",):
                    stop = True
                case ("close",):
                    return
    except Closed:
        return


def limit_memory(allowed_bytes: int) -> None:
    """Writable private memory may grow by this much from here; more is a MemoryError in this process (Linux)."""
    try:
        import resource

        with open("/proc/self/status") as status:
            held = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmData:"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = held + allowed_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard < 0 else min(wanted, hard), hard))
    except (ImportError, OSError, StopIteration, ValueError):
        pass  # the parent still watches what each worker holds


def _do(channel: Channel, work: Any, assignment: Any, desk: Any) -> None:
    from fanfold.engine.engine import Failure

    try:
        result = work.carry_out(assignment, desk)
    except Closed:
        raise
    except BaseException as error:
        failure = Failure(error=portable(error), traceback=traceback.format_exc())
        channel.send(("failed", failure, desk.take_spans()))
    else:
        channel.send(("done", result, desk.take_spans()))


def _run_program(channel: Channel, body: bytes, rank: int, size: int) -> None:
    import pickle

    try:
        pickle.loads(body)(rank, size, channel)
    except Closed:
        raise
    except BaseException as error:
        channel.send(("failed", portable(error), traceback.format_exc()))
    else:
        channel.send(("finished",))


def portable(error: BaseException) -> BaseException:
    """The error itself where it survives pickling, else one that says the same."""
    import pickle

    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _watch_parent() -> None:
    """A worker that was not forked from a zygote has a thread that ends it with its parent."""
    import threading
    import time

    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    main()
