"""Faults that only the system can cause: calls that fail or kill (strace), small or odd file systems (mount), limits.

A test whose tool is missing or forbidden here is skipped, and says so.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from fanfold.job import run as job_run
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.testing.fakes import FakeTask

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]

SCRIPT = """
import sys, json
from dataclasses import replace
from pathlib import Path
from fanfold.errors import FanfoldError
from fanfold.job import run as job_run
from fanfold.job.request import Request
from fanfold.testing.fakes import FakeTask
real = job_run._numerics
job_run._numerics = lambda task, kind: replace(real(task, kind), window_rows=512, windows_per_part=1)
inputs, out, on = sys.argv[1:4]
try:
    run = job_run.run_job(FakeTask(), Request(inputs=(inputs,), out=Path(out), on=on))
except FanfoldError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
print(json.dumps(run.summary))
"""
NUM_ROWS = 1500  # three windows, each its own part


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "job.py"
    path.write_text(SCRIPT)
    return path


@pytest.fixture(scope="module")
def docs(tmp_path_factory):
    path = tmp_path_factory.mktemp("docs") / "docs.jsonl"
    path.write_text(
        "".join(json.dumps({"id": i, "text": f"row {i} " + "x" * (i % 30)}) + "\n" for i in range(NUM_ROWS))
    )
    return path


@pytest.fixture(scope="module")
def expected(script, docs, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "out"
    done = job(script, docs, out)
    assert done.returncode == 0, done.stderr
    return bytes_of(out)


def job(script, docs, out, *, on="inline", before=()):
    """The job in a process of its own, the words of `before` in front of it."""
    command = [*before, sys.executable, str(script), str(docs), str(out), on]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def bytes_of(out):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted((out / "data").iterdir())}


def check_goes_on(docs, out, expected):
    """The same command ends with the bytes of an undisturbed run, and nothing is left beside them."""
    with pytest.MonkeyPatch.context() as patch:  # in this process: a start costs a second
        real = job_run._numerics
        small = {"window_rows": 512, "windows_per_part": 1}
        patch.setattr(job_run, "_numerics", lambda task, kind: replace(real(task, kind), **small))
        job_run.run_job(FakeTask(), Request(inputs=(str(docs),), out=out, on="inline"))
    assert bytes_of(out) == expected
    for folder in ("tmp", "pieces", "windows", "spool"):
        assert not list((out / folder).glob("*"))


# -- system calls that fail or kill -------------------------------------------------------------------


@pytest.fixture(scope="module")
def strace():
    """The words in front of a command that make its system calls fail."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed: system calls that fail are not tested")
    words = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "signal=none"]
    tried = subprocess.run([*words, "-e", "trace=fsync", "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"strace is forbidden here: {tried.stderr.strip()[:200]}")
    return words


def inject(strace, calls, fault, path=None):
    return [*strace, *(["-P", str(path)] if path else []), "-e", f"trace={calls}", "-e", f"inject={calls}:{fault}"]


LINK, RENAME, UNLINK = "link,linkat", "rename,renameat,renameat2", "unlink,unlinkat"


@pytest.mark.parametrize(
    ("calls", "when"),
    [
        *(("fsync", when) for when in (1, 7, 12, 15)),
        *((LINK, when) for when in (1, 4)),
        *((RENAME, when) for when in (1, 4, 8)),
        *((UNLINK, when) for when in (1, 9)),
    ],
)
def test_a_job_killed_in_a_system_call_goes_on(script, docs, expected, tmp_path, strace, calls, when):
    """SIGKILL at the entry of the call: the steps of the commit protocol, on the real file system."""
    out = tmp_path / "out"
    done = job(script, docs, out, before=inject(strace, calls, f"signal=KILL:when={when}"))
    assert done.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL), f"not killed: {done.stderr}"
    assert not (out / "_SUCCESS").exists()
    check_goes_on(docs, out, expected)


@pytest.mark.parametrize("when", [1, 2, 5, 9, 14])
def test_a_flush_that_fails_once_is_never_taken_for_done(script, docs, expected, tmp_path, strace, when):
    """EIO on one fsync: the kernel may have dropped the pages, and the next fsync would not say so."""
    out = tmp_path / "out"
    done = job(script, docs, out, before=inject(strace, "fsync", f"error=EIO:when={when}"))
    assert done.returncode in (1, 2), done.stderr
    assert "Input/output error" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (out / "_SUCCESS").exists()
    check_goes_on(docs, out, expected)


@pytest.mark.parametrize("name", ["commits.log", "_SUCCESS", "run.json"])
def test_a_disk_that_is_full_when_a_record_is_written_keeps_the_old_state(
    script, docs, expected, tmp_path, strace, name
):
    out = tmp_path / "out"
    if name == "commits.log":
        fault = inject(strace, "write", "error=ENOSPC:when=3+", out / name)
    else:  # written beside and renamed
        fault = inject(strace, RENAME, f"error=ENOSPC:when={1 if name == 'run.json' else 9}+")
    done = job(script, docs, out, before=fault)
    assert done.returncode in (1, 2), done.stderr
    assert "disk full" in done.stderr
    assert "bytes are free" in done.stderr
    assert not (out / "_SUCCESS").exists()
    check_goes_on(docs, out, expected)


@pytest.mark.parametrize("calls", ["link,linkat", "link,linkat,renameat2"])
def test_a_file_system_without_hard_links(script, docs, expected, tmp_path, strace, calls):
    """renameat2 publishes instead; where there is neither, the job ends with a clear error before any work."""
    out = tmp_path / "out"
    done = job(script, docs, out, before=inject(strace, calls, "error=EPERM"))
    if "renameat2" not in calls:
        assert done.returncode == 0, done.stderr
        assert bytes_of(out) == expected
        return
    assert done.returncode in (1, 2), done.stderr
    assert "publishing" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((out / "data").iterdir())
    check_goes_on(docs, out, expected)


# -- file systems -------------------------------------------------------------------------------------


def in_own_mounts(*lines):
    """The words that run these lines of shell where mounts are nobody else's; skips where that is forbidden."""
    if not shutil.which("unshare"):
        pytest.skip("unshare is not installed: small file systems are not tested")
    words = ["unshare", *([] if os.geteuid() == 0 else ["--map-root-user"]), "--mount", "sh", "-c"]
    tried = subprocess.run([*words, lines[0]], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"mounts of our own are forbidden here: {tried.stderr.strip()[:200]}")
    return [*words, " && ".join([*lines, 'exec "$@"']), "sh"]


@pytest.mark.parametrize(
    "mount", ["mount -t tmpfs -o size=1m tmpfs /dev/shm", "mount -t tmpfs -o size=4k,ro t /dev/shm"]
)
def test_shared_memory_that_is_tiny_or_read_only_is_not_needed(script, docs, expected, tmp_path, mount):
    before = in_own_mounts(mount)
    done = job(script, docs, tmp_path / "out", on="cpu:2", before=before)
    assert done.returncode == 0, done.stderr
    assert bytes_of(tmp_path / "out") == expected


# -- limits -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_files", [24, 40, 64])
def test_few_open_files_are_enough_or_said(script, docs, expected, tmp_path, num_files):
    out = tmp_path / "out"
    before = ["sh", "-c", f'ulimit -n {num_files} && exec "$@"', "sh"]
    done = job(script, docs, out, on="cpu:2", before=before)
    if done.returncode:
        assert done.returncode in (1, 2), done.stderr
        assert "Too many open files" in done.stderr
        assert "Traceback" not in done.stderr
        assert num_files < 64, "64 open files must be enough for two units"
        check_goes_on(docs, out, expected)
    else:
        assert bytes_of(out) == expected


@pytest.mark.nightly
@pytest.mark.parametrize("extra_mb", [10, 30, 60, 100])
def test_a_parent_without_memory_leaves_a_state_that_recovers(script, docs, expected, tmp_path, extra_mb):
    """RLIMIT_DATA on the parent, at several heights: it dies sooner or later, and the same command goes on."""
    limited = tmp_path / "limited.py"
    limited.write_text(
        "import numpy, pyarrow, resource\n"
        "held = next(int(l.split()[1]) << 10 for l in open('/proc/self/status') if l.startswith('VmData'))\n"
        f"resource.setrlimit(resource.RLIMIT_DATA, (held + ({extra_mb} << 20),) * 2)\n" + script.read_text()
    )
    done = job(limited, docs, tmp_path / "out")
    print(f"{extra_mb} MB more than the imports hold: exit {done.returncode}")
    check_goes_on(docs, tmp_path / "out", expected)


# -- other people's folders ---------------------------------------------------------------------------

AS_NOBODY = f"""
import os, sys
first, source, out = sys.argv[1:4]
job = {SCRIPT!r}
sys.argv[1:4] = [source, first, "inline"]
exec(job, {{}})  # once as it should be: everything is imported
os.setgid(65534)
os.setuid(65534)
sys.argv[1:4] = [source, out, "inline"]
exec(job, {{}})
"""


def test_a_run_folder_of_another_user_is_left_as_it_is(docs, tmp_path):
    if os.geteuid() != 0:
        pytest.skip("only root can become another user: folders of other users are not tested")
    with tempfile.TemporaryDirectory() as name:
        public = Path(name)
        public.chmod(0o755)
        source, out = public / "docs.jsonl", public / "out"
        shutil.copy(docs, source)
        run_job(FakeTask(), Request(inputs=(str(source),), out=out, on="inline"))
        (out / "_SUCCESS").unlink()
        before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in out.rglob("*")}
        command = [sys.executable, "-c", AS_NOBODY, str(tmp_path / "first"), str(source), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2, done.stderr
        assert "Permission denied" in done.stderr
        assert "Traceback" not in done.stderr
        assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in out.rglob("*")} == before
