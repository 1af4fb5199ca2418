"""How good predictions are on tables of measurements, beside a model that has nothing in it but one efficiency."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from fanfold.errors import FanfoldError
from fanfold.planner.published_inference import METRICS as SERVING
from fanfold.planner.scoring import Scored, Weighed, check_unit, chosen, ran_out, said_to_fit, score, weigh

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fanfold.planner.published import Row

# Sources that constants were taken from: never counted as zero-shot.
CALIBRATION = (
    "FlashAttention-2", "Llama 3 Herd", "PaLM", "MT-NLG", "LLaMA, arXiv", "OPT, arXiv", "Nemotron-4", "DeepSeek-V3",
    "MLPerf Training v3.1 NVIDIA Eos", "PyTorch blog", "nv-adlr", "GPT-NeoX",
)  # fmt: skip
COVERAGE = 0.8  # of the rows that can be scored


def is_calibration(source: str) -> bool:
    return any(source.lstrip('"').startswith(name) for name in CALIBRATION)


def validate(rows: Iterable[Row], others: list[Scored] | None = None) -> list[dict[str, Any]]:
    """One record per source, kind and metric; `others` are what the null model may look at: the rows' own, if None."""
    rows = list(rows)
    scored, skipped = score_all(rows)
    others = scored if others is None else others
    groups: dict[tuple[str, str, str], list[Scored]] = defaultdict(list)
    for one in scored:
        groups[one.row["source"], one.kind, one.row["metric"]].append(one)
    missed: dict[tuple[str, str, str], list[dict[str, str]]] = defaultdict(list)
    for key, config, why in skipped:
        missed[key].append({"config_id": config, "why": why})
    weighed: dict[str, list[Weighed]] = defaultdict(list)
    wrong: dict[str, int] = defaultdict(int)
    for row in rows:
        if found := weigh(row):
            weighed[row["source"]].append(found)
        if ran_out(row) and said_to_fit(row):
            wrong[row["source"]] += 1
    keys = sorted({*groups, *missed, *((source, "train", "memory") for source in weighed if not _has(groups, source))})
    return [
        _record(key, groups.get(key, []), missed.get(key, []), weighed.get(key[0], []), wrong.get(key[0], 0), others)
        for key in keys
    ]


def _has(groups: dict[tuple[str, str, str], list[Scored]], source: str) -> bool:
    return any(key[0] == source and key[1] == "train" for key in groups)


def score_all(rows: list[Row]) -> tuple[list[Scored], list[tuple[tuple[str, str, str], str, str]]]:
    """Rows predicted, and rows skipped: ((source, kind, metric), config_id, why)."""
    scored, skipped = [], []
    for row in chosen(rows):
        check_unit(row)
        try:
            scored.append(score(row))
        except FanfoldError as error:
            why = f"{error.asked}: {error.found}"
        except (ArithmeticError, LookupError, TypeError, ValueError) as error:  # a table can hold anything
            why = f"numbers that cannot be: {type(error).__name__}: {error}"
        else:
            continue
        kind = "infer" if row["metric"] in SERVING else "train"
        skipped.append(((row["source"], kind, row["metric"]), row["config_id"], why))
    return scored, skipped


def coverage(records: list[dict[str, Any]]) -> float:
    rows = sum(record["n_rows"] for record in records)
    return sum(record["n_predicted"] for record in records) / rows if rows else 1.0


def _record(
    key: tuple[str, str, str],
    scored: list[Scored],
    missed: list[dict[str, str]],
    weighed: list[Weighed],
    wrong: int,
    others: list[Scored],
) -> dict[str, Any]:
    source, kind, metric = key
    errors = [one.error for one in scored]
    sizes = sorted(abs(error) for error in errors)
    spearman, regrets = ranking(scored)
    training = kind == "train"
    return {
        "source": source,
        "kind": kind,
        "metric": metric,
        "calibration": is_calibration(source),
        "n_rows": len(scored) + len(missed),
        "n_predicted": len(scored),
        "skipped": missed,
        "median_ape": statistics.median(sizes) if sizes else None,
        "mape": statistics.fmean(sizes) if sizes else None,
        "p90_ape": quantile(sizes, 0.9),
        "bias": statistics.fmean(errors) if errors else None,
        "null_mape": null_mape(scored, scored),
        "null_loso_mape": null_mape(scored, [one for one in others if one.row["source"] != source]),
        "memory_mape": statistics.fmean(abs(one.error) for one in weighed) if training and weighed else None,
        "memory_worst_under": max(0.0, *(-one.error for one in weighed)) if training and weighed else None,
        "false_fits": wrong if training else None,
        "spearman": spearman,
        "regret_median": statistics.median(regrets) if regrets else None,
        "regret_max": max(regrets) if regrets else None,
    }


def quantile(values: list[float], share: float) -> float | None:
    """Linear between the neighbours, of sorted values."""
    if not values:
        return None
    place = share * (len(values) - 1)
    low = int(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (place - low) * (values[high] - values[low])


def null_mape(scored: list[Scored], known: list[Scored]) -> float | None:
    """Error of one constant efficiency per accelerator and precision, the median of what is known."""
    ratios: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for one in known:
        for key in _null_keys(one):
            ratios[key].append(one.seconds[0] / one.ideal)
    errors = []
    for one in scored:
        known_keys = [key for key in _null_keys(one) if key in ratios]
        if not known_keys:
            continue
        seconds = one.ideal * statistics.median(ratios[known_keys[0]])
        errors.append(abs((1 / seconds if one.is_rate else seconds) / one.measured - 1))
    return statistics.fmean(errors) if errors else None


def _null_keys(one: Scored) -> tuple[tuple[str, ...], ...]:
    device = one.row["accelerator"].split(" ")[0]
    precision = one.row.get("precision", "")[:4]
    metric = one.row["metric"] if one.kind == "infer" else ""
    return (
        (one.kind, metric, device, precision),
        (one.kind, metric, device.split("-")[0], precision),
        (one.kind, metric, device.split("-")[0]),
        (one.kind, metric),
    )


def ranking(scored: list[Scored]) -> tuple[float | None, list[float]]:
    """(mean Spearman, regret of every group) over groups that share model and cluster.

    Regret: measured time of the layout predicted best, over the measured best, less one.
    """
    groups: dict[tuple[str, ...], list[Scored]] = defaultdict(list)
    for one in scored:
        if one.kind == "train":
            row = one.row
            key = ("model", "accelerator", "n_devices", "precision", "global_batch", "seq")
            group = tuple(row.get(name, "") for name in key)
            groups[group if row["metric"] == "step_time" else group[:4]].append(one)
    correlations, regrets = [], []
    for members in groups.values():
        if len(members) < 2:
            continue
        real = [one.seconds[0] for one in members]
        guessed = [one.seconds[1] for one in members]
        pick = min(range(len(members)), key=guessed.__getitem__)
        regrets.append(real[pick] / min(real) - 1)
        if len(members) >= 4:
            value = spearman(real, guessed)
            if value is not None:
                correlations.append(value)
    return (statistics.fmean(correlations) if correlations else None), regrets


def spearman(left: list[float], right: list[float]) -> float | None:
    """Rank correlation; equal values share their ranks' mean. None where one side is constant."""
    a, b = _ranks(left), _ranks(right)
    mean = (len(a) + 1) / 2
    top = sum((x - mean) * (y - mean) for x, y in zip(a, b, strict=True))
    below = (sum((x - mean) ** 2 for x in a) * sum((y - mean) ** 2 for y in b)) ** 0.5
    return top / below if below else None


def _ranks(values: list[float]) -> list[float]:
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for index in order[start : end + 1]:
            ranks[index] = (start + end) / 2 + 1
        start = end + 1
    return ranks


def one_scalar(scored: list[Scored]) -> list[float]:
    """Errors left when a cluster's rows share one factor, the median of the others' (leave one out)."""
    clusters: dict[tuple[str, ...], list[Scored]] = defaultdict(list)
    for one in scored:
        clusters[one.row["source"], one.row["accelerator"], one.row.get("precision", "")[:4]].append(one)
    errors = []
    for members in clusters.values():
        ratios = [one.measured / one.predicted for one in members]
        for index, one in enumerate(members):
            rest = ratios[:index] + ratios[index + 1 :]
            factor = statistics.median(rest) if rest else 1.0
            errors.append(one.predicted * factor / one.measured - 1)
    return errors


def in_sample(scored: list[Scored]) -> list[float]:
    """Errors left when every source, model and cluster has a factor of its own, its rows' own median."""
    groups: dict[tuple[str, ...], list[Scored]] = defaultdict(list)
    for one in scored:
        row = one.row
        groups[row["source"], row["model"], row["accelerator"], row.get("precision", "")[:4]].append(one)
    errors = []
    for members in groups.values():
        factor = statistics.median(one.measured / one.predicted for one in members)
        errors += [one.predicted * factor / one.measured - 1 for one in members]
    return errors
