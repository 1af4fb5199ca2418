"""`fanfold plan embed`: what the local job will do, from its lengths and the machine's probe; no model is loaded.

Lengths of the rows come from the input's first window, or from a median and a 90th percentile (lognormal).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fanfold.data.opening import open_source
from fanfold.data.scratch import scratch_folder
from fanfold.errors import PlanError
from fanfold.job.predicting import Predicted, drawn, predicted, sampled
from fanfold.job.probing import rates_for
from fanfold.machine.discover import discover
from fanfold.plan.numerics import Numerics
from fanfold.planner.units import Job, check_slots, choose, parse_where
from fanfold.quantity import format_bytes, format_count, format_duration, format_rate
from fanfold.tasks.embed import make_embed

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.job.predicting import Sample
    from fanfold.tasks.embed import Embed


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedPlan:
    """What the job is expected to take."""

    model: str
    units: tuple[str, ...]
    reasons: tuple[str, ...]
    found: Predicted
    memory_limit_bytes: int

    def record(self) -> dict[str, Any]:
        """Plain values for --json: run.json's `prediction`, and the choice it is for."""
        found = self.found.prediction
        busy = max(found.elapsed_s, 1e-9)
        return {
            "model": self.model,
            **self.found.record(),
            "units": list(self.units),
            "reasons": [*self.reasons, *self.found.reasons],
            "rows_per_s": self.found.sample.rows / busy,
            "tokens_per_s": self.found.sample.tokens / busy,
            "memory_limit_bytes": self.memory_limit_bytes,
            "fits": found.memory_bytes <= self.memory_limit_bytes,
        }

    @property
    def text(self) -> str:
        found, sample = self.found.prediction, self.found.sample
        lines = [
            f"{self.model}: {format_count(sample.rows)} rows, about {format_count(sample.tokens)} tokens,"
            f" in {format_duration(found.elapsed_s)} on {', '.join(self.units)}.",
            "",
        ]
        lines += [f"  - {reason}" for reason in (*self.reasons, *self.found.reasons)]
        lines.append(f"rate        {format_rate(sample.tokens / max(found.elapsed_s, 1e-9), 'tokens')}")
        lines.append(f"padding     {self.found.padding_share:.1%} of the computed tokens")
        lines.append(
            f"memory      {format_bytes(found.memory_bytes)} of {format_bytes(self.memory_limit_bytes)} allowed"
        )
        lines += [f"{name:<11} {format_duration(seconds)}" for name, seconds in found.terms.items()]
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
    """The job's time and memory. The machine is measured once, for ten seconds, where it was not before."""
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
    if tokens_per_row is not None:
        sample, size = drawn(task, tokens_per_row, rows, numerics), None
    else:
        sample, size = _of_input(task, inputs, column, numerics)
    plan = choose(where, machine, Job(weights_bytes=task.weights_bytes, input_bytes=size), numerics)
    rates = rates_for(machine)
    if rates is None:
        raise PlanError(
            "fanfold plan embed",
            found="no torch in this Python, so this machine cannot be measured",
            allowed="an environment that can run the job",
            do="pip install 'fanfold[torch]'",
        )
    return EmbedPlan(
        model=task.reference,
        units=tuple(unit.name for unit in plan.units),
        reasons=plan.reasons,
        found=predicted(task, sample, plan, rates),
        memory_limit_bytes=machine.memory_bytes,
    )


def _of_input(task: Embed, inputs: Sequence[str], column: str, numerics: Numerics) -> tuple[Sample, int | None]:
    """What the first window says of the input; and its bytes."""
    with scratch_folder() as folder:
        source = open_source(
            tuple(inputs), column=column, id_column=None, keep=(), form="typed", spool=folder, limit=None
        )
        sample = sampled(task, source, numerics)
        if sample is None:
            raise PlanError(
                f"planning {task.checkpoint.shown}",
                found="no tokenizer.json in the model's folder, so lengths cannot be counted here",
                allowed="a model with a fast tokenizer; or --tokens-per-row MEDIAN,P90 --rows N",
                do="save its tokenizer again with transformers, or give the lengths",
            )
        return sample, source.total_bytes
