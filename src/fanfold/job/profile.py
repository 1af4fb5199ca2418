"""`fanfold show OUT --profile`: where each unit's time went, against what bounds it, and what to change."""

from __future__ import annotations

import gzip
import json
from typing import TYPE_CHECKING, Any

from fanfold.data.folder import SUMMARY, TRACE, read_json
from fanfold.errors import ResumeError
from fanfold.job.machine import machine_record
from fanfold.job.opened import open_existing
from fanfold.quantity import format_duration, format_rate

if TYPE_CHECKING:
    from pathlib import Path

    from fanfold.job.opened import OpenedRun

_KINDS = ("load", "prepare", "compute", "write", "assemble")
# Shares above or below which a line says what to change.
_MUCH_WAITING, _MUCH_LOADING, _MUCH_PREPARING, _MUCH_PADDING, _LITTLE_GEMM = 0.15, 0.25, 0.2, 0.05, 0.6


def profile(out: str | Path) -> str:
    """A page of text about a finished run; compared with this machine's GEMM rate (`fanfold machine --probe`)."""
    opened = open_existing(out)
    summary, data = read_json(opened.store, SUMMARY), opened.store.read(TRACE)
    if summary is None or data is None:
        raise ResumeError(
            f"the profile of {opened.output.shown}",
            found="the job is not finished",
            allowed="finished jobs",
            do="run the same command again to finish it",
        )
    totals = json.loads(gzip.decompress(data)).get("otherData", {})
    shares = unit_shares(totals)
    header = f"{'unit':<10}" + "".join(f"{kind:>10}" for kind in (*_KINDS, "wait"))
    lines = [f"{opened.output.shown}: {format_duration(totals.get('elapsed_s', 0.0))} in all", "", header]
    for unit, share in sorted(shares.items()):
        lines.append(f"{unit:<10}" + "".join(f"{share[kind]:>10.1%}" for kind in (*_KINDS, "wait")))
    lines += ["", f"padding:  {summary['padding_share']:.1%} of the computed tokens"]
    gemm = _gemm_share(opened, summary, totals)
    if gemm is not None:
        reached, rate = gemm
        lines.append(
            f"bound:    while computing, {reached:.0%} of {format_rate(rate, 'FLOP')} a unit, the rate of a matrix"
        )
        lines.append("          product alone, measured on this machine; the rest is what is not a product")
    advice = advise(shares, summary, None if gemm is None else gemm[0], opened.run["plan"]["numerics"])
    return "\n".join([*lines, "", *(advice or ["nothing stands out: the units computed nearly all of the time"])])


def unit_shares(totals: dict[str, Any]) -> dict[str, dict[str, float]]:
    """unit -> kind of work -> share of the job's time; what is left is `wait`."""
    elapsed_s = totals.get("elapsed_s") or 1.0
    found: dict[str, dict[str, float]] = {}
    for unit, seconds in totals.get("seconds", {}).items():
        share = {kind: seconds.get(kind, 0.0) / elapsed_s for kind in _KINDS}
        found[unit] = {**share, "wait": max(0.0, 1 - sum(share.values()))}
    return found


def _gemm_share(opened: OpenedRun, summary: dict[str, Any], totals: dict[str, Any]) -> tuple[float, float] | None:
    """(share of the GEMM rate reached while computing, that rate in FLOP/s of one unit); None where unknown."""
    flops = opened.run["task"].get("flops_per_token")
    numerics = opened.run["plan"]["numerics"]
    compute_s = sum(seconds.get("compute", 0.0) for seconds in totals.get("seconds", {}).values())
    known = flops and compute_s and not summary["rows_resumed"] and numerics["device"] == "cpu"
    if not known or numerics["threads_per_unit"] != 1:
        return None
    rate: float = machine_record(measure=True)["probe"]["gemm_one_thread_flop_per_s"]
    padded_tokens = summary["tokens"] / (1 - summary["padding_share"])
    return padded_tokens * flops / compute_s / rate, rate


def advise(
    shares: dict[str, dict[str, float]], summary: dict[str, Any], gemm: float | None, numerics: dict[str, Any]
) -> list[str]:
    """What to change, a line each, the largest loss first; empty where nothing stands out."""
    if not shares:
        return []
    mean = {kind: sum(share[kind] for share in shares.values()) / len(shares) for kind in (*_KINDS, "wait")}
    found: list[tuple[float, str]] = []
    if mean["wait"] > _MUCH_WAITING:
        found.append(
            (mean["wait"], "waiting: start-up, the first window and the last pieces; larger jobs wait relatively less")
        )
    if mean["load"] > _MUCH_LOADING:
        found.append((mean["load"], "loading: put several inputs into one job, or call ff.embed in one process"))
    if mean["prepare"] > _MUCH_PREPARING:
        found.append((mean["prepare"], "preparing: reading and tokenising; is the tokenizer a fast one?"))
    if summary["padding_share"] > _MUCH_PADDING:
        found.append((summary["padding_share"], "padding: few rows, or lengths that differ much within a window"))
    if gemm is not None and gemm < _LITTLE_GEMM and not numerics["compiled"]:
        found.append((1 - gemm, "computing: much is not a matrix product; --compile on fuses it (long jobs)"))
    return [f"- {line} ({loss:.0%})" for loss, line in sorted(found, reverse=True)]
