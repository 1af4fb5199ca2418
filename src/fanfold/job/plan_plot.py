"""`fanfold plan --plot FILE.svg`: time and memory over layouts, and scaling from one device to all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fanfold.errors import PlanError
from fanfold.quantity import format_bytes
from fanfold.report import plot

if TYPE_CHECKING:
    from fanfold.job.plan import Choice


def write_plot(choice: Choice, path: str) -> None:
    """Write the file; PlanError where it is no .svg or cannot be written."""
    shown = [choice.best, *choice.found.others]
    if choice.best.step_time_s is not None:
        rows = [(one.named, one.step_time_s or 0.0, f"{one.step_time_s:.3g} s") for one in shown]
        charts = [plot.bars("Seconds a step", rows)]
    else:
        rates = [(one.named, one.tokens_per_s, f"{one.tokens_per_s:,.0f}") for one in shown]
        charts = [plot.bars("Output tokens a second", rates)]
    held = [(one.named, one.memory_bytes_per_device, format_bytes(one.memory_bytes_per_device)) for one in shown]
    charts.append(plot.bars("Memory of a device, and its limit", held, choice.cluster.memory_bytes))
    if len(choice.scaling) > 1:
        charts.append(plot.scaling("Tokens a second, best layout for each number of devices", list(choice.scaling)))
    target = Path(path)
    try:
        if target.suffix != ".svg":
            raise ValueError("not an .svg file")
        target.write_text(plot.page(charts), encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PlanError(
            f"--plot {path[:80]}", found=str(error), allowed="a file name ending in .svg", do="correct the path"
        ) from None
