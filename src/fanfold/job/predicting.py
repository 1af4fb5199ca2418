"""What a local embed job is expected to take, before it starts: a sample of its rows, and the machine's probe.

The sample is the input's first window. Its rows' lengths are counted by the model's own tokenizer, and its batches are
cut as the job will cut them; all other windows are taken to be like it.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from fanfold.data.spool import SpoolSource
from fanfold.errors import FanfoldError, PlanError
from fanfold.machine.memory import pss_bytes
from fanfold.plan.workload import from_config
from fanfold.planner.local import Held, LocalModel, LocalPrediction, Work, local_model, predict_local
from fanfold.quantity import format_bytes, format_duration
from fanfold.split.batch import cut
from fanfold.tasks.lengths import token_lengths

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fanfold.data.source import Source, Window
    from fanfold.machine.rates import Rates
    from fanfold.plan.numerics import Numerics
    from fanfold.plan.plan import Plan
    from fanfold.tasks.embed import Embed

_IDLE = 0.9  # share of a core that a probe should have had; caches shared with others slow what is measured
_SAMPLE_BYTES = 1_000_000  # of text that are tokenised; beyond, every n-th row of the window
_COUNTED_BYTES = 200_000_000  # of an input whose rows are counted; a Parquet file says how many it has
_WORDS = "the of and a to in is that for it as was with be by on not he his but at are this have from or had an they "
_TOKENS_TIMED = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """Lengths of one window's rows, in tokens, and what that says of the input."""

    lengths: tuple[int, ...]
    rows: int  # of the whole input
    windows: int
    token_s: float  # of one core, for one token of the tokenizer

    @property
    def tokens(self) -> int:
        return round(self.scale * sum(self.lengths))

    @property
    def scale(self) -> float:
        """How often the sample goes into the input."""
        return self.rows / max(1, len(self.lengths))


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted:
    """The prediction of a job, with what it rests on."""

    sample: Sample
    work: Work
    units: int
    prediction: LocalPrediction
    one_unit: LocalPrediction
    advice: tuple[str, ...]

    @property
    def padding_share(self) -> float:
        padded = sum(rows * length for rows, length in self.work.batches)
        return 1 - sum(self.sample.lengths) / padded if padded else 0.0

    def record(self) -> dict[str, Any]:
        """run.json's `prediction`; summary.json has what it was: elapsed_s, and memory as peak_pss_bytes."""
        return {
            **self.prediction.record(),
            "rows": self.sample.rows,
            "tokens": self.sample.tokens,
            "padding_share": round(self.padding_share, 4),
            "units": self.units,
            "one_unit_elapsed_s": round(self.one_unit.elapsed_s, 3),
            "advice": list(self.advice),
        }

    @property
    def reasons(self) -> list[str]:
        """Lines for a person: the prediction, what one unit would take, what bounds it, advice."""
        found = self.prediction
        parts = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in found.terms.items())
        shares = sorted(found.operators.items(), key=lambda item: -item[1])
        bound = ", ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.01)
        lines = [
            f"expected: {format_duration(found.elapsed_s)} ({parts}); memory {format_bytes(found.memory_bytes)}",
            f"computing is {bound}",
        ]
        if self.units > 1:
            lines.append(f"one unit would take {format_duration(self.one_unit.elapsed_s)}")
        return lines + [f"advice: {line}" for line in self.advice]


def why_not(task: Any, source: Source | None, plan: Plan) -> str | None:
    """Why there is no prediction for a job; None where there is one."""
    numerics = plan.numerics
    if task.name != "embed":
        return f"{task.name} is not predicted, embed is"
    if plan.engine not in ("local", "inline") or numerics.device != "cpu":
        return "jobs on this machine's cores are predicted"
    if numerics.compiled or numerics.dtype != "float32" or numerics.layout != "whole" or task.chunking is not None:
        return "jobs in float32, uncompiled, of whole models and texts are predicted"
    if source is not None and (source.total_bytes is None or isinstance(source, SpoolSource)):
        return "streams and compressed files are not looked at before they are read"
    return None


def predict_job(task: Embed, source: Source, plan: Plan, rates: Rates) -> Predicted | None:
    """The job's prediction; None where the input or the model does not let one be made. Never raises for the data."""
    try:
        sample = sampled(task, source, plan.numerics)
        return None if sample is None else predicted(task, sample, plan, rates)
    except (FanfoldError, OSError, ValueError, KeyError):
        return None


def predicted(task: Embed, sample: Sample, plan: Plan, rates: Rates) -> Predicted:
    """From lengths, wherever they come from. Raises: PlanError for a family that the planner does not know."""
    numerics = plan.numerics
    config = task.checkpoint.config
    local = local_model(from_config(config), config, task.weights_bytes)
    work = work_of(sample, numerics)
    held = Held(
        parent_bytes=pss_bytes(os.getpid()),
        zygote_bytes=rates.zygote_bytes,
        unit_bytes=rates.unit_bytes,
    )
    units, threads = len(plan.units), numerics.threads_per_unit
    found = predict_local(rates, local, work, held, units=units, threads=threads)
    alone = predict_local(rates, local, work, held, units=1, threads=threads)
    return Predicted(
        sample=sample,
        work=work,
        units=units,
        prediction=found,
        one_unit=alone,
        advice=tuple(_advice(rates, local, work, held, units, threads, found)),
    )


def work_of(sample: Sample, numerics: Numerics) -> Work:
    """The batches that the job would cut of such a window, by its own cutter."""
    lengths = sample.lengths
    pieces = cut(range(len(lengths)), lengths, batch_tokens=numerics.batch_tokens).pieces
    prepare_s = sample.token_s * sample.tokens
    return Work(
        batches=tuple((batch.rows, batch.length) for piece in pieces for batch in piece),
        scale=sample.scale,
        rows=sample.rows,
        prepare_s=prepare_s,
        first_prepare_s=prepare_s / max(1, sample.windows),
        windows=sample.windows,
    )


def sampled(task: Embed, source: Source, numerics: Numerics) -> Sample | None:
    """The first window; the number of rows of a large input from the bytes a row has there. None: no fast tokenizer."""
    windows = iter(source.windows(numerics.window_rows))
    window = next(windows, None)
    if window is None:
        return Sample(lengths=(), rows=0, windows=0, token_s=0.0)
    texts = [task.prompt + text for chunk in source.chunks(window) for text in chunk.texts if isinstance(text, str)]
    step = max(1, sum(map(len, texts)) // _SAMPLE_BYTES)
    before_s = time.process_time()
    lengths = token_lengths(task.checkpoint, texts[::step], task.max_length)
    if lengths is None:
        return None
    token_s = (time.process_time() - before_s) / max(1, sum(lengths))
    whole = [length for length in lengths for _ in range(step)][: len(texts)]
    rows = _rows_of(source, window, windows)
    return Sample(lengths=tuple(whole), rows=rows, windows=max(1, -(-rows // numerics.window_rows)), token_s=token_s)


def _rows_of(source: Source, first: Window, others: Iterator[Window]) -> int:
    """All rows: counted, or from the bytes of the first window where counting would read very much."""
    of_window = sum(span.stop - span.start for span in first.spans)  # bytes of a line format, else rows
    if (source.total_bytes or 0) > _COUNTED_BYTES and of_window > 4 * first.num_rows:
        return round(first.num_rows * (source.total_bytes or 0) / of_window)
    return first.num_rows + sum(other.num_rows for other in others)


def drawn(task: Embed, text: str, rows: int | None, numerics: Numerics) -> Sample:
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
    normal = NormalDist(math.log(median), max(spread, 1e-9))
    lengths = [math.exp(normal.inv_cdf((index + 0.5) / count)) for index in range(count)]
    before_s = time.process_time()
    timed = token_lengths(task.checkpoint, [_WORDS * 4] * (_TOKENS_TIMED // 120), 1 << 30)
    token_s = (time.process_time() - before_s) / sum(timed) if timed else 0.0
    return Sample(
        lengths=tuple(max(1, min(task.max_length, round(length))) for length in lengths),
        rows=rows,
        windows=-(-rows // numerics.window_rows),
        token_s=token_s,
    )


def _advice(
    rates: Rates, local: LocalModel, work: Work, held: Held, units: int, threads: int, found: LocalPrediction
) -> list[str]:
    """Recommendations for what is not chosen, because it shapes bytes: threads and compilation."""
    lines = []
    options = {
        count: predict_local(rates, local, work, held, units=max(1, rates.cores // count), threads=count).elapsed_s
        for count in range(1, rates.cores + 1)
        if rates.cores % count == 0
    }
    best = min(options, key=lambda count: options[count])
    if best != threads and options[best] < 0.95 * found.elapsed_s:
        lines.append(
            f"--threads {best}: {max(1, rates.cores // best)} unit(s) of {best} thread(s) would take "
            f"{format_duration(options[best])}; bytes then differ from those of 1 thread"
        )
    else:
        lines.append(f"threads: {threads} a unit is as fast as any; units share nothing, threads wait for each other")
    if rates.own_share < _IDLE:
        lines.append(
            f"this machine was measured while other programs took {1 - rates.own_share:.0%} of a core: "
            "fanfold machine --probe measures it again"
        )
    fused = (found.operators["elementwise"] + found.operators["host"]) * found.terms["compute"]
    lines.append(
        f"--compile on: fuses operators that take up to {format_duration(fused)}, after half a minute of compiling"
        if fused > 30
        else f"no --compile: it could save {format_duration(fused)} at the most, and takes half a minute once"
    )
    return lines
