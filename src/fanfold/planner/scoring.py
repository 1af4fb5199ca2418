"""A table of measurements, predicted row by row: what can be scored, and the value predicted for it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fanfold.errors import FanfoldError, PlanError
from fanfold.planner.memory import Memory, fits, memory
from fanfold.planner.published import Row, Unresolved, real, training_case, usable
from fanfold.planner.published_inference import METRICS as SERVING
from fanfold.planner.published_inference import RATES, offered, predict_row
from fanfold.planner.training import Step, Training, step

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fanfold.planner.cluster import Cluster
    from fanfold.planner.degrees import Degrees

# In the order in which one stands for a configuration that has several.
TRAINING = (
    "step_time", "tokens_per_s", "tokens_per_s_per_device", "seq_per_s", "model_tflops_per_device",
    "hw_tflops_per_device",
)  # fmt: skip
_SECONDS = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "ms": 1e-3, "us": 1e-6, "min": 60.0, "h": 3600.0}
_RATES = re.compile(
    r"(k|K|M)?\s*(tok|tokens?|seq|seqs|sequences?|samples?|req|requests?)(/s|/sec|ps)?(/(gpu|device|s/gpu))?", re.I
)
_FLOPS = {"tflop/s": 1.0, "tflops": 1.0, "tflop/s/gpu": 1.0, "pflop/s": 1e3, "gflop/s": 1e-3}
_BYTES = {"b": 1.0, "mb": 1e6, "mib": 2.0**20, "gb": 1e9, "gib": 2.0**30}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    """One measured value, and the value predicted for it; `cost` is measured seconds for ranking."""

    row: Row
    kind: str  # train, infer
    measured: float
    predicted: float
    ideal: float  # seconds at the datasheet's peak: what the null model scales
    layout: str = ""
    is_rate: bool = False
    unpublished: bool = False  # a knob was open, and the best value was taken

    @property
    def error(self) -> float:
        """Signed, as a share of what was measured."""
        return self.predicted / self.measured - 1

    @property
    def seconds(self) -> tuple[float, float]:
        """(measured, predicted) per unit of work."""
        if self.is_rate:
            return 1 / self.measured, 1 / self.predicted
        return self.measured, self.predicted


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed:
    """One measured memory, and the bytes predicted for it."""

    row: Row
    measured: float
    predicted: float

    @property
    def error(self) -> float:
        return self.predicted / self.measured - 1


def not_scored(row: Row) -> str | None:
    """Why a row is no measurement to be scored against; None if it is one."""
    metric, confidence = row["metric"], row.get("confidence", "").lower()
    if metric.startswith("peer_"):
        return "another tool's prediction"
    if "derived" in confidence or "digitised" in confidence or metric.endswith("_derived"):
        return "not measured directly"
    if "mfu" in metric or "hfu" in metric:
        return "a utilisation"
    if metric in TRAINING:
        return "forward only, no step" if re.search(r"\bforward only\b", row.get("notes", ""), re.I) else None
    if metric in SERVING:
        rate = offered(row)
        if rate is not None and math.isfinite(rate) and SERVING[metric] in RATES:
            return "follows the offered rate"
        return None
    return "not a time or a rate"


def chosen(rows: Iterable[Row]) -> list[Row]:
    """The rows to score: of training one a configuration, of inference one a metric of it."""
    best: dict[tuple[str, str, str], Row] = {}
    for row in rows:
        if not_scored(row):
            continue
        metric = row["metric"]
        key = (row["source"], row["config_id"], "" if metric in TRAINING else metric)
        held = best.get(key)
        if held is None or (metric in TRAINING and TRAINING.index(metric) < TRAINING.index(held["metric"])):
            best[key] = row
    return list(best.values())


def check_unit(row: Row) -> float:
    """What the unit is of seconds, of one a second, or of TFLOP/s; PlanError where it cannot be the metric's."""
    unit, metric = row.get("unit", "").strip(), row["metric"]
    lowered = unit.lower()
    if metric in ("step_time",) or SERVING.get(metric) in ("ttft", "itl", "latency", "prefill", "decode"):
        factor = _SECONDS.get(lowered)
    elif "tflops" in metric:
        factor = _FLOPS.get(lowered)
    else:
        found = _RATES.fullmatch(unit)
        factor = {"": 1.0, "k": 1e3, "m": 1e6}[(found[1] or "").lower()] if found else None
    if factor is None:
        raise PlanError(
            f"plan validate, row {row.get('config_id', '')[:60]!r}",
            found=f"{metric} in {unit[:30]!r}",
            allowed="s or ms for times, tok/s, seq/s or req/s for rates, TFLOP/s",
            do="correct the unit",
        )
    return factor


def measured(row: Row) -> float:
    """The value in seconds, in units a second, or in TFLOP/s."""
    factor, value = check_unit(row), real(row, "value")
    if value is None or not math.isfinite(value) or value <= 0:
        raise Unresolved("row", found=f"value {row.get('value', '')[:20]!r}", allowed="", do="")
    return value * factor


def score(row: Row) -> Scored:
    """The row predicted; Unresolved says what it leaves out."""
    value = measured(row)
    if row["metric"] in SERVING:
        is_rate = SERVING[row["metric"]] in RATES
        return Scored(
            row=row,
            kind="infer",
            measured=value,
            predicted=predict_row(row),
            ideal=_ideal_serving(row),
            is_rate=is_rate,
        )
    training, cluster, degrees, found, is_open = best_step(row)
    per_sequence = found.seconds / training.global_batch
    metric, devices, length = row["metric"], cluster.devices, training.length
    flops = 3 * training.model.forward_flops_per_token(length, masked=False) * length
    peak = devices * cluster.accelerator.peak(training.precision)
    batch = real(row, "global_batch") or training.global_batch
    predicted = {
        "step_time": per_sequence * batch,
        "tokens_per_s": length / per_sequence,
        "tokens_per_s_per_device": length / per_sequence / devices,
        "seq_per_s": 1 / per_sequence,
        "model_tflops_per_device": flops / per_sequence / devices / 1e12,
        "hw_tflops_per_device": flops * (4 / 3 if degrees.recompute == "full" else 1) / per_sequence / devices / 1e12,
    }[metric]
    return Scored(
        row=row,
        kind="train",
        measured=value,
        predicted=predicted,
        ideal=flops / peak * (batch if metric == "step_time" else 1),
        layout=str(degrees),
        is_rate=metric != "step_time",
        unpublished=is_open,
    )


def best_step(row: Row) -> tuple[Training, Cluster, Degrees, Step, bool]:
    """The quickest step that the row's open knobs allow, of those that fit."""
    case = training_case(row)
    best: tuple[float, Training, Degrees, Step] | None = None
    layouts = usable(case)
    for degrees in layouts:
        batch = case.training.global_batch or _usual_batch(degrees)
        training = replace(case.training, global_batch=batch)
        found = step(training, case.cluster, degrees)
        if best is None or found.seconds / batch < best[0]:
            best = (found.seconds / batch, training, degrees, found)
    if best is None:
        raise Unresolved("row", found="no layout", allowed="", do="")
    return best[1], case.cluster, best[2], best[3], len(case.layouts) > 1


def _usual_batch(degrees: Degrees) -> int:
    """Where a table has no batch: one micro-batch, or enough of them to fill the pipeline."""
    return degrees.data * degrees.micro_batch * (1 if degrees.pipeline == 1 else 8 * degrees.pipeline)


def _ideal_serving(row: Row) -> float:
    """Seconds at the datasheet's rates, per step, request or batch."""
    from fanfold.planner.published import cluster_of, model_of, precision_of, whole

    model, devices = model_of(row), whole(row, "n_devices") or 1
    device = cluster_of(row, devices).accelerator
    kind = SERVING[row["metric"]]
    inputs, outputs = whole(row, "isl") or 512, round(real(row, "osl") or 1)
    batch = whole(row, "concurrency") or 1
    flops = inputs * model.forward_flops_per_token(inputs) / (devices * device.peak(precision_of(row)))
    read = model.active_params * 2 / (devices * device.memory_bytes_per_s)
    if kind in ("ttft", "prefill"):
        return flops * batch
    if kind == "itl":
        return read
    if kind in RATES:
        if kind == "prefill_rate":
            return flops / inputs
        if kind == "decode_rate":
            return read / batch
        size = {"output": outputs, "total": inputs + outputs, "requests": 1}[kind.removesuffix("_each")]
        return flops * (inputs + outputs) / inputs / size
    return flops * batch + outputs * read


def weigh(row: Row) -> Weighed | None:
    """A memory row predicted; None where it is none or says too little."""
    metric, unit = row["metric"].lower(), row.get("unit", "").strip().lower()
    if "mem" not in metric or metric.startswith("peer_") or unit not in _BYTES:
        return None
    value = real(row, "value")
    if not value:
        return None
    try:
        case = training_case(row)
    except FanfoldError:
        return None
    batch = case.training.global_batch or _usual_batch(case.layouts[0])
    training = replace(case.training, global_batch=batch)
    if "baseline" in metric:
        layouts = [replace(one, recompute="none", recompute_share=1.0, sequence_parallel=False) for one in case.layouts]
    else:
        layouts = [one for one in usable(case)]
    sizes = [_part(memory(training, case.cluster, one), metric) for one in layouts]
    return Weighed(row=row, measured=value * _BYTES[unit], predicted=min(sizes))


def _part(found: Memory, metric: str) -> float:
    if "activation" in metric:
        return found.activations
    if "param" in metric or "state" in metric:
        return found.weights + found.gradients + found.optimizer
    if "smi" in metric or "device_used" in metric:
        return found.total
    if "reserved" in metric:
        return found.total - 1.5e9
    return found.allocated


def ran_out(row: Row) -> bool:
    """Whether the row says that the configuration did not fit."""
    text = " ".join(row.get(name, "") for name in ("metric", "value", "unit", "notes")).lower()
    return bool(re.search(r"\boom\b|out of memory", text))


def said_to_fit(row: Row) -> bool:
    """Whether the planner would have let it run."""
    try:
        case = training_case(row)
    except FanfoldError:
        return False
    batch = case.training.global_batch or _usual_batch(case.layouts[0])
    training = replace(case.training, global_batch=batch)
    return any(fits(training, case.cluster, one) for one in case.layouts)
