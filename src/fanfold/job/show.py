"""`fanfold show`: what a run was asked, what it chose, how far it is, what failed."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fanfold.data.folder import QUARANTINE, SUCCESS, SUMMARY, read_json
from fanfold.job.opened import open_existing
from fanfold.quantity import format_bytes, format_count, format_duration, printable

if TYPE_CHECKING:
    from pathlib import Path

_MAX_FAILURES = 10


def show(out: str | Path) -> str:
    """A page of text; what comes from the data is escaped."""
    opened = open_existing(out)
    run = opened.run
    summary = read_json(opened.store, SUMMARY)
    plan = run["plan"]
    lines = [f"{opened.output.shown}: {_state(opened, summary)}", ""]
    for key, value in run["task"].items():
        if isinstance(value, str) and key not in ("name", "reference"):
            lines.append(f"{key + ':':<9}{printable(value)}")
    lines.append(f"{'inputs:':<9}{printable(', '.join(run['request']['inputs']))}")
    lines.append(f"{'started:':<9}{run['started']} on {printable(run['machine']['cpu'])}")
    lines.append(f"{'plan:':<9}{plan['layout']} on {', '.join(plan['units'])}, level {run['level']}")
    lines += [f"{'':<9}- {printable(reason)}" for reason in plan["reasons"]]
    numerics = plan["numerics"]
    lines.append(
        f"{'cut:':<9}windows of {numerics['window_rows']:,} rows, batches of {numerics['batch_tokens']:,} tokens, "
        f"{numerics['dtype']}, {numerics['threads_per_unit']} thread(s) a unit"
    )
    if summary is not None:
        lines += ["", *summary_lines(summary)]
        lines += _expected(run.get("prediction"), summary)
    lines += _failures(opened)
    return "\n".join(lines)


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """What a person wants to know when a job has ended."""
    if not summary:
        return []
    rows = f"{format_count(summary['rows_ok'])} of {format_count(summary['rows_in'])} rows"
    if summary["rows_failed"]:
        rows += f", {format_count(summary['rows_failed'])} failed (quarantine.jsonl)"
    if summary["rows_resumed"]:
        rows += f", {format_count(summary['rows_resumed'])} of them computed before"
    lines = [f"{'rows:':<9}{rows}"]
    lines.append(
        f"{'time:':<9}{format_duration(summary['elapsed_s'])} in all, {format_duration(summary['load_s'])} loading; "
        f"{summary['rows_per_s']:,.0f} rows/s, {_rates(summary)}"
    )
    idle = summary["idle_share"]
    lines.append(
        f"{'units:':<9}{summary['units_used']} used, idle {idle:.1%}, padding {summary['padding_share']:.1%}, "
        f"memory at most {format_bytes(summary['peak_pss_bytes'])}"
        if idle is not None
        else f"{'units:':<9}{summary['units_used']} used, padding {summary['padding_share']:.1%}"
    )
    if summary["truncated"]:
        lines.append(f"{'cut off:':<9}{format_count(summary['truncated'])} texts were longer than the model's limit")
    if summary["retries"]:
        lines.append(f"{'retries:':<9}" + ", ".join(f"{kind} {count}" for kind, count in summary["retries"].items()))
    return lines


def _expected(told: dict[str, Any] | None, summary: dict[str, Any]) -> list[str]:
    """What was expected before the job began, against what it took; nothing for a job that was resumed."""
    if told is None or summary["rows_resumed"] or not summary["elapsed_s"] or not summary["peak_pss_bytes"]:
        return []
    time_off = told["elapsed_s"] / summary["elapsed_s"] - 1
    memory_off = told["memory_bytes"] / summary["peak_pss_bytes"] - 1
    return [
        f"{'expected:':<9} {format_duration(told['elapsed_s'])} ({time_off:+.0%}), "
        f"memory {format_bytes(told['memory_bytes'])} ({memory_off:+.0%})"
    ]


def _rates(summary: dict[str, Any]) -> str:
    if "completion_tokens" not in summary:
        return f"{summary['tokens_per_s']:,.0f} tokens/s"
    prompt, completion = summary["prompt_tokens_per_s"], summary["completion_tokens_per_s"]
    return f"{prompt:,.0f} prompt and {completion:,.0f} completion tokens/s"


def _state(opened: Any, summary: dict[str, Any] | None) -> str:
    if opened.store.read(SUCCESS) is not None and summary is not None:
        return "finished"
    windows = opened.windows
    done = sum(entry["rows"] for entries in opened.leases.values() for entry in entries)
    prepared = sum(entry["num_rows"] for entry in windows.values())
    return f"not finished: {done:,} rows computed of {prepared:,} prepared; the same command goes on"


def _failures(opened: Any) -> list[str]:
    data = opened.store.read(QUARANTINE)
    if not data:
        return []
    rows = [json.loads(line) for line in data.splitlines()]
    lines = ["", f"failed rows ({len(rows):,}):"]
    for row in rows[:_MAX_FAILURES]:
        part = f" part {row['part']}" if "part" in row else ""
        lines.append(f"  row {row['row']}{part}: {row['error']}: {printable(row['message'])}")
    if len(rows) > _MAX_FAILURES:
        lines.append(f"  and {len(rows) - _MAX_FAILURES:,} more in {opened.store.path(QUARANTINE)}")
    return lines
