"""Published tables: the ones that are shipped, and `fanfold plan validate` on any."""

from __future__ import annotations

import csv
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from fanfold.errors import PlanError
from fanfold.planner.cluster import Cluster, from_words
from fanfold.planner.published import Row, check_columns, real, whole
from fanfold.planner.scoring import Scored, chosen
from fanfold.planner.validate import COVERAGE as COVERAGE
from fanfold.planner.validate import coverage, score_all, validate


def shipped_folder() -> Path | None:
    """`validation/` beside the package in a wheel, or at the root of a checkout."""
    package = Path(__file__).parents[1]
    for folder in (package / "validation", package.parents[1] / "validation"):
        if any(folder.glob("*.csv")):
            return folder
    return None


@lru_cache(maxsize=1)
def shipped() -> tuple[Row, ...]:
    folder = shipped_folder()
    files = sorted(folder.glob("*.csv")) if folder else []
    return tuple(row for file in files for row in read(str(file)))


@lru_cache(maxsize=1)
def _shipped_scored() -> list[Scored]:
    return score_all(list(shipped()))[0]


def read(path: str) -> list[Row]:
    """The rows of a table; PlanError where it cannot be read or lacks a column."""
    try:
        with Path(path).open(encoding="utf-8", newline="") as lines:
            table = csv.DictReader(lines)
            check_columns(list(table.fieldnames or []), path)
            return [{name: value or "" for name, value in row.items() if name} for row in table]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise PlanError(
            f"plan validate {path[:80]}",
            found=f"{type(error).__name__}: {error}",
            allowed="CSV files in UTF-8 with the columns of validation/",
            do="check the path",
        ) from None


def validate_files(paths: tuple[str, ...]) -> tuple[list[dict[str, Any]], float]:
    """Records and the share of scorable rows that were predicted."""
    rows = [row for path in paths for row in read(path)]
    records = validate(rows, _shipped_scored())
    return records, coverage(records)


def validation_text(records: list[dict[str, Any]], covered: float) -> str:
    """A line a record, errors as shares; then what was skipped and why."""
    names = ("median", "mean", "p90", "bias", "null", "null*", "regret", "rank")
    lines = [f"{'rows':>9}  " + "".join(f"{name:>8}" for name in names) + "  source, metric"]
    skipped: dict[str, int] = {}
    for record in records:
        for one in record["skipped"]:
            skipped[one["why"]] = skipped.get(one["why"], 0) + 1
        keys = ("median_ape", "mape", "p90_ape", "bias", "null_mape", "null_loso_mape", "regret_max")
        cells = "".join(f"{_share(record[key]):>8}" for key in keys)
        rank = "-" if record["spearman"] is None else f"{record['spearman']:.2f}"
        rows = f"{record['n_predicted']}/{record['n_rows']}"
        lines.append(f"{rows:>9}  {cells}{rank:>8}  {record['source'][-60:]}, {record['metric']}")
        if record["memory_mape"] is not None:
            lines.append(
                f"{'':>9}  memory: mean {_share(record['memory_mape'])}, worst under "
                f"{_share(record['memory_worst_under'])}, false fits {record['false_fits']}"
            )
    lines.append(f"predicted {covered:.0%} of the rows that can be scored (at least {COVERAGE:.0%} are needed)")
    lines += [f"skipped {count}: {why}" for why, count in sorted(skipped.items(), key=lambda one: -one[1])]
    lines.append("null: one efficiency per accelerator, from the source itself; null*: from the other sources")
    return "\n".join(lines)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def nearest(kind: str, params: float, cluster: Cluster, length: int) -> str | None:
    """The published row most like it: size, devices, length, accelerator."""
    from fanfold.planner.published_inference import METRICS

    best: tuple[float, Row] | None = None
    for row in chosen(shipped()):
        if (row["metric"] in METRICS) != (kind == "infer"):
            continue
        size, devices = real(row, "n_params"), whole(row, "n_devices")
        if not size or not devices:
            continue
        where = from_words(row["accelerator"], devices)
        if where is None:
            continue
        other = whole(row, "seq") or whole(row, "isl") or length
        far = abs(math.log(size / params)) + 0.5 * abs(math.log(devices / cluster.devices))
        far += 0.3 * abs(math.log(other / length))
        if where.accelerator.name != cluster.accelerator.name:
            far += 0.7 if where.accelerator.architecture == cluster.accelerator.architecture else 2.0
        if best is None or far < best[0]:
            best = (far, row)
    if best is None:
        return None
    row = best[1]
    layout = " ".join(f"{name}={row[name]}" for name in ("tp", "pp", "dp") if row.get(name))
    return (
        f"{row['model']} on {row['n_devices']} x {row['accelerator']} {layout}: "
        f"{row['metric']} {row['value']} {row['unit']} ({row['source'][:80]})"
    )
