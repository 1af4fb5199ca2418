"""The steady state: one unit and two, eager and compiled, from the first computation to the last; interleaved.

    scripts/bench steady [--rows 3000] [--turns 3]

Start-up is not counted. The GEMM rate is measured in the same run, between the jobs.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from docstrings import docstrings

from fanfold.job import engines
from fanfold.job.machine import machine_record
from fanfold.job.verbs import run_files


def measured(inputs: Path, out: Path, on: str, compile: str) -> dict[str, float]:
    """Padded tokens a second of the whole machine, and of one unit while it computes; idle share, peak memory."""
    engines.shutdown()
    run = run_files("embed", [str(inputs)], out, on=on, compile=compile)
    events = json.loads(gzip.decompress((out / "trace.json.gz").read_bytes()))["traceEvents"]
    compute = [(event["ts"], event["dur"]) for event in events if event.get("name") == "compute"]
    padded_tokens = run.summary["tokens"] / (1 - run.summary["padding_share"])
    span_s = (max(ts + dur for ts, dur in compute) - min(ts for ts, _ in compute)) / 1e6
    flops = json.loads((out / "run.json").read_text())["task"]["flops_per_token"]
    return {
        "tokens_per_s": padded_tokens / span_s,
        "unit_flop_per_s": padded_tokens * flops / (sum(dur for _, dur in compute) / 1e6),
        "idle": run.summary["idle_share"],
        "peak_bytes": run.summary["peak_pss_bytes"],
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=3000)
    parser.add_argument("--turns", type=int, default=3)
    asked = parser.parse_args()
    texts = [text for _, text in docstrings(Path(sysconfig.get_path("stdlib")))][: asked.rows]
    cases = [(compile, on) for compile in ("off", "on") for on in ("cpu:1", "cpu:2")]
    found: dict[tuple[str, str], list[dict[str, float]]] = {case: [] for case in cases}
    rates = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs = folder / "docs.jsonl"
        inputs.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        warm = folder / "warm.jsonl"
        warm.write_text(json.dumps({"text": "the library is made here, not in a measured job"}) + "\n")
        run_files("embed", [str(warm)], folder / "warm", compile="on")
        for turn in range(asked.turns):
            for compile, on in cases:
                rates.append(machine_record(measure=True)["probe"]["gemm_one_thread_flop_per_s"])
                out = folder / f"out-{turn}-{compile}-{on.replace(':', '')}"
                found[compile, on].append(measured(inputs, out, on, compile))
                print(
                    f"  {turn + 1}: compile {compile}, {on}: {found[compile, on][-1]['tokens_per_s']:,.0f} tokens/s",
                    flush=True,
                )
    engines.shutdown()

    def median(case: tuple[str, str], key: str) -> float:
        return statistics.median(run[key] for run in found[case])

    rate = statistics.median(rates)
    print(f"\n{len(texts):,} docstrings; GEMM {rate / 1e9:.0f} GFLOP/s on one thread (median of {len(rates)})")
    print(
        "| compile | units | tokens/s | of the GEMM rate, a unit while computing | idle | peak memory |\n"
        "|---|---|---|---|---|---|"
    )
    for case in cases:
        print(
            f"| {case[0]} | {case[1]} | {median(case, 'tokens_per_s'):,.0f} "
            f"| {median(case, 'unit_flop_per_s') / rate:.0%} | {median(case, 'idle'):.1%} "
            f"| {median(case, 'peak_bytes') / 1e9:.2f} GB |"
        )
    for compile in ("off", "on"):
        ratio = median((compile, "cpu:2"), "tokens_per_s") / median((compile, "cpu:1"), "tokens_per_s")
        print(f"two units against one, compile {compile}: {ratio:.2f} (target >= 1.9)")
    for on in ("cpu:1", "cpu:2"):
        ratio = median(("on", on), "tokens_per_s") / median(("off", on), "tokens_per_s")
        print(f"compiled against eager, {on}: {ratio:.2f} (target >= 1.15)")


if __name__ == "__main__":
    main()
