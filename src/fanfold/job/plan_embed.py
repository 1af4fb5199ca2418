"""`fanfold plan embed`: what the local job will do, from a few seconds of the model itself on this machine.

Lengths of the rows come from the input's first window, or from a median and a 90th percentile (lognormal). The
batches are then cut as the job will cut them, and each costs what a batch of its length has just taken.
"""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import dataclass
from functools import partial
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from fanfold.data.opening import open_source
from fanfold.data.scratch import scratch_folder
from fanfold.errors import PlanError
from fanfold.job.machine import machine_record
from fanfold.machine.discover import discover
from fanfold.machine.probe import median_run_s
from fanfold.machine.threads import held_threads
from fanfold.plan.numerics import Numerics
from fanfold.planner.units import UNIT_BYTES, Job, check_slots, choose, parse_where
from fanfold.quantity import format_bytes, format_count, format_duration, format_rate
from fanfold.split.batch import cut
from fanfold.tasks.embed import make_embed
from fanfold.tasks.task import ModelBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.tasks.task import Opened, Task

_TIMED_LENGTHS = 5  # batches are timed at so many lengths, evenly spread over those that occur
_TIMED_S = 0.6  # for each of them
_PARENT_BYTES = 400_000_000  # the command's process and the zygote, with torch and transformers imported
_PRIVATE_BYTES = 80_000_000  # of a forked worker (docs/log.md)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedPlan:
    """What the job is expected to take."""

    model: str
    rows: int
    tokens: int
    padding_share: float
    units: tuple[str, ...]
    reasons: tuple[str, ...]
    advice: tuple[str, ...]
    elapsed_s: float
    terms: dict[str, float]
    memory_bytes: int
    memory_limit_bytes: int

    def record(self) -> dict[str, Any]:
        """Plain values for --json."""
        busy = max(self.elapsed_s, 1e-9)
        return {
            "model": self.model,
            "rows": self.rows,
            "tokens": self.tokens,
            "padding_share": self.padding_share,
            "units": list(self.units),
            "reasons": list(self.reasons),
            "advice": list(self.advice),
            "elapsed_s": self.elapsed_s,
            "rows_per_s": self.rows / busy,
            "tokens_per_s": self.tokens / busy,
            "terms": self.terms,
            "memory_bytes": self.memory_bytes,
            "memory_limit_bytes": self.memory_limit_bytes,
            "fits": self.memory_bytes <= self.memory_limit_bytes,
        }

    @property
    def text(self) -> str:
        lines = [
            f"{self.model}: {format_count(self.rows)} rows, about {format_count(self.tokens)} tokens,"
            f" in {format_duration(self.elapsed_s)} on {', '.join(self.units)}.",
            "",
        ]
        lines += [f"  - {reason}" for reason in self.reasons]
        lines.append(f"rate        {format_rate(self.tokens / self.elapsed_s, 'tokens')}")
        lines.append(f"padding     {self.padding_share:.1%} of the computed tokens")
        lines.append(
            f"memory      {format_bytes(self.memory_bytes)} of {format_bytes(self.memory_limit_bytes)} allowed"
        )
        lines += [f"{name:<11} {format_duration(seconds)}" for name, seconds in self.terms.items()]
        lines += [f"recommended {line}" for line in self.advice]
        return "\n".join(lines)


def plan_embed(
    inputs: Sequence[str] = (),
    *,
    tokens_per_row: str | None = None,
    rows: int | None = None,
    model: str | None = None,
    column: str = "text",
    on: str = "cpu",
) -> EmbedPlan:
    """The job's time and memory; the model is loaded and runs for a few seconds on one core."""
    if bool(inputs) == (tokens_per_row is not None):
        raise PlanError(
            "fanfold plan embed",
            found="both INPUT and --tokens-per-row" if inputs else "neither INPUT nor --tokens-per-row",
            allowed="one of the two",
            do="name the input, or write --tokens-per-row MEDIAN,P90 --rows N",
        )
    where, machine = parse_where(on), discover()
    if where.kind not in ("cpu", "inline"):
        raise PlanError(f"--on {on[:60]}", found="not this machine's cores", allowed="inline, cpu, cpu:N", do="use one")
    check_slots(where, machine)
    task, numerics = make_embed(model=model), Numerics()
    started_s = time.perf_counter()
    opened = task.open(choose(where, machine, Job(weights_bytes=0, input_bytes=None), numerics).units[0], numerics)
    with held_threads(1):
        opened.load()
    load_s = time.perf_counter() - started_s
    if inputs:
        lengths, rows_all, prepare_s, size = _sampled(task, opened, inputs, column, numerics)
    else:
        assert tokens_per_row is not None
        lengths, rows_all = _drawn(tokens_per_row, rows, numerics, int(getattr(task, "max_length", 512)))
        prepare_s, size = 0.0, None
    plan = choose(where, machine, Job(weights_bytes=task.weights_bytes, input_bytes=size), numerics)
    scale = rows_all / max(1, len(lengths))
    pieces = cut(range(len(lengths)), lengths, batch_tokens=numerics.batch_tokens).pieces
    batches = [batch for piece in pieces for batch in piece]
    with held_threads(1):
        compute_s = scale * _compute_s(opened, [(batch.rows, batch.length) for batch in batches], numerics)
    units = len(plan.units)
    together = _together(units)
    padded = sum(batch.padded_tokens for batch in batches)
    tokens = round(scale * sum(lengths))
    terms = {
        "start": load_s,
        "compute": compute_s / (units * together),
        "prepare": scale * prepare_s / (units * together),
    }
    held = task.weights_bytes + _PARENT_BYTES + units * (_PRIVATE_BYTES + UNIT_BYTES // 3)
    return EmbedPlan(
        model=task.reference,
        rows=rows_all,
        tokens=tokens,
        padding_share=1 - sum(lengths) / padded if padded else 0.0,
        units=tuple(unit.name for unit in plan.units),
        reasons=(*plan.reasons, f"{units} unit(s) together reach {together:.0%} of as many alone"),
        advice=tuple(_advice(terms)),
        elapsed_s=sum(terms.values()),
        terms=terms,
        memory_bytes=held,
        memory_limit_bytes=machine.memory_bytes,
    )


def _sampled(
    task: Task, opened: Opened, inputs: Sequence[str], column: str, numerics: Numerics
) -> tuple[list[int], int, float, int | None]:
    """(lengths in tokens of the first window, rows in all, seconds to prepare that window, bytes of the input)."""
    with scratch_folder() as folder:
        source = open_source(
            tuple(inputs), column=column, id_column=None, keep=(), form="typed", spool=folder, limit=None
        )
        window = next(iter(source.windows(numerics.window_rows)), None)
        if window is None:
            return [], 0, 0.0, source.total_bytes
        before_s = time.perf_counter()
        lengths: list[int] = []
        for chunk in source.chunks(window):
            texts = [text for text in chunk.texts if text is not None]
            lengths += [len(ids) for ids in opened.prepare(texts, range(len(texts))).ids] if texts else []
        prepare_s = time.perf_counter() - before_s
        rows = window.num_rows
        if window.num_rows == numerics.window_rows:
            rows = sum(one.num_rows for one in source.windows(numerics.window_rows))
        return lengths, rows, prepare_s, source.total_bytes


def _drawn(text: str, rows: int | None, numerics: Numerics, longest: int) -> tuple[list[int], int]:
    """A window of lengths with that median and 90th percentile, lognormal, at even quantiles."""
    parts = text.split(",")
    try:
        median, high = (float(part) for part in parts)
        if not 0 < median <= high < 1e7 or rows is None or rows < 1:
            raise ValueError
    except ValueError:
        raise PlanError(
            f"--tokens-per-row {text[:40]} --rows {rows}",
            found="not a median, a 90th percentile above it, and a number of rows",
            allowed="positive numbers, MEDIAN <= P90",
            do="write for example --tokens-per-row 23,120 --rows 100000",
        ) from None
    assert rows is not None
    spread = math.log(high / median) / NormalDist().inv_cdf(0.9)
    count = min(rows, numerics.window_rows)
    drawn = NormalDist(math.log(median), max(spread, 1e-9))
    lengths = [math.exp(drawn.inv_cdf((index + 0.5) / count)) for index in range(count)]
    return [max(1, min(longest, round(length))) for length in lengths], rows


def _compute_s(opened: Opened, shapes: list[tuple[int, int]], numerics: Numerics) -> float:
    """Seconds of all batches on one core: timed at a few lengths, linear in between per padded token."""
    if not shapes:
        return 0.0
    lengths = sorted({length for _, length in shapes})
    steps = max(1, len(lengths) - 1)
    timed = sorted({lengths[round(index * steps / (_TIMED_LENGTHS - 1))] for index in range(_TIMED_LENGTHS) if lengths}
                   if len(lengths) > 1 else {lengths[0]})  # fmt: skip
    filler = opened.filler()
    points = []
    for length in timed:
        rows = max(1, numerics.batch_tokens // length)
        row = [filler[index % len(filler)] for index in range(length)]
        ids = [_array(filler, row)] * rows
        seconds = median_run_s(partial(opened.compute, ModelBatch(ids=ids, length=length)), _TIMED_S)
        points.append((length, seconds / (rows * length)))
    return sum(rows * length * _between(points, length) for rows, length in shapes)


def _array(like: Any, values: list[Any]) -> Any:
    import numpy as np

    return np.asarray(values, dtype=like.dtype)


def _between(points: list[tuple[int, float]], length: int) -> float:
    for (left, low), (right, high) in itertools.pairwise(points):
        if left <= length <= right:
            return low + (high - low) * (length - left) / (right - left)
    return points[0][1] if length < points[0][0] else points[-1][1]


def _together(units: int) -> float:
    """What units that run at the same time reach of as many alone: matrix products on all cores against one."""
    if units == 1:
        return 1.0
    probe = machine_record(measure=True)["probe"]
    cores = discover().cores
    share: float = probe["gemm_all_cores_flop_per_s"] / (cores * probe["gemm_one_thread_flop_per_s"])
    return min(1.0, share) * min(1.0, cores / units)


def _advice(terms: dict[str, float]) -> list[str]:
    lines = ["threads: 1 a unit (units share nothing, threads would wait for each other)"]
    compute = terms["compute"]
    lines.append(
        "--compile on: 20 to 50 % faster computing, after about 25 s of compiling (docs/log.md)"
        if compute > 120
        else "no --compile: compiling takes about as long as it would save here"
    )
    return lines
