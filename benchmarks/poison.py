"""One poison row in 100,000: what it costs. A cheap task; interleaved, medians, ratios.

scripts/bench poison
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from pathlib import Path

import pyarrow.compute as pc

from fanfold.job import engines
from fanfold.job.request import Request
from fanfold.job.run import run_job
from fanfold.testing.fakes import FakeTask

NUM_ROWS, POISON = 100_000, 61_803
FAULTS = {"raise": {}, "segfault": {}, "memory": {"memory_per_unit": "300MB"}}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = folder / "in.jsonl"
        with inputs.open("w") as file:
            for i in range(NUM_ROWS):
                text = "poison" if i == POISON else f"row {i} " + "x" * (i % 50)
                file.write(json.dumps({"id": i, "text": text}) + "\n")

        def run(fault: str | None, turn: int):
            task = FakeTask(token_s=1e-5, faults={"poison": fault} if fault else {})
            options = FAULTS.get(fault or "", {})
            start_s = time.monotonic()
            done = run_job(task, Request(inputs=(str(inputs),), out=folder / f"{fault}-{turn}", on="cpu:2", **options))
            return done, time.monotonic() - start_s

        whole, _ = run(None, 0)
        expected = whole.table().filter(pc.not_equal(whole.table()["row"], POISON))
        times: dict[str | None, list[float]] = {fault: [] for fault in (None, *FAULTS)}
        for turn in range(1, 4):
            for fault in (None, *FAULTS):
                engines.shutdown()
                done, elapsed_s = run(fault, turn)
                times[fault].append(elapsed_s)
                if fault:
                    assert done.exit_code == 3
                    assert done.summary["rows_failed"] == 1
                    assert done.table().equals(expected)
        base_s = statistics.median(times[None])
        print(f"{NUM_ROWS:,} rows without poison: {base_s:.1f} s")
        for fault in FAULTS:
            median_s = statistics.median(times[fault])
            print(f"  one row that does '{fault}': {median_s:.1f} s, {median_s / base_s - 1:+.1%} (target <= 1 %)")


if __name__ == "__main__":
    main()
