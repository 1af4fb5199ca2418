"""How much later than a fresh start a resume reaches its first new row, with ten million rows in the job.

scripts/bench resume [ROWS]      (10,000,000 rows take about ten minutes and 3 GB of disk)
"""

from __future__ import annotations

import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

JOB = """
import os, sys, time
from pathlib import Path
from fanfold.events import Batch
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.testing.fakes import FakeTask

inputs, out, stop_at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
rows = 0

class Ears:
    def __call__(self, event):
        global rows
        if isinstance(event, Batch):
            rows += event.rows
            if rows >= stop_at:
                print(rows, flush=True)
                time.sleep(60)
    def start(self, rows_done): pass
    def say(self, text): pass
    def stop(self): pass

run_job(FakeTask(), Request(inputs=(inputs,), out=out, on="cpu:2"), Ears())
"""


def until(inputs: Path, out: Path, rows: int) -> float:
    """Seconds from the start of the command until so many rows are computed; then kill -9."""
    start_s = time.monotonic()
    command = [sys.executable, "-c", JOB, str(inputs), str(out), str(rows)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    assert process.stdout.readline(), f"the job ended before {rows:,} rows"
    elapsed_s = time.monotonic() - start_s
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    return elapsed_s


def main() -> None:
    num_rows = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000_000
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = folder / "in.jsonl"
        with inputs.open("w") as file:
            for start in range(0, num_rows, 10_000):
                file.write(
                    "".join(
                        f'{{"id": {i}, "text": "row {i} {"x" * (i % 23)}"}}\n' for i in range(start, start + 10_000)
                    )
                )
        out = folder / "out"
        elapsed_s = until(inputs, out, int(num_rows * 0.98))
        log = (out / "commits.log").read_bytes()
        num_lines = log.count(b"\n")
        print(
            f"{num_rows:,} rows, {inputs.stat().st_size / 1e6:,.0f} MB; killed at 98 % after {elapsed_s:,.0f} s; "
            f"commits.log: {num_lines:,} lines, {len(log) / 1e6:.1f} MB",
            flush=True,
        )
        fresh, resumed = [], []
        for turn in range(5):
            fresh.append(until(inputs, folder / f"fresh-{turn}", 1))
            shutil.rmtree(folder / f"fresh-{turn}")
            resumed.append(until(inputs, out, 1))
        later_s = statistics.median(resumed) - statistics.median(fresh)
        print(
            f"first new row: fresh start {statistics.median(fresh):.2f} s, resume {statistics.median(resumed):.2f} s, "
            f"{later_s:+.2f} s (target <= 5 s)"
        )


if __name__ == "__main__":
    main()
