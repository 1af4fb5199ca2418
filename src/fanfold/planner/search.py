"""The best layout and the runners-up: every one that divides and fits is predicted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fanfold.errors import PlanError
from fanfold.planner.degrees import Degrees
from fanfold.planner.memory import just_enough, memory
from fanfold.planner.prediction import Prediction, check, predict, too_big
from fanfold.planner.training import Training, step

if TYPE_CHECKING:
    from fanfold.planner.cluster import Cluster
    from fanfold.planner.inference import Load, Serving

FIXABLE = ("data", "tensor", "pipeline", "context", "expert", "micro_batch", "interleave", "zero")
Fixed = Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """Predictions, best first; `considered` layouts were looked at."""

    best: Prediction
    others: tuple[Prediction, ...]
    considered: int


def best_training(training: Training, cluster: Cluster, fixed: Fixed | None = None, *, runners: int = 3) -> Found:
    """The quickest layouts that fit; PlanError where none does."""
    fixed = fixed or {}
    timed: list[tuple[float, Degrees]] = []
    considered, least = 0, (float("inf"), Degrees())
    for degrees in layouts(training, cluster, fixed):
        considered += 1
        chosen = just_enough(training, cluster, degrees)
        size = memory(training, cluster, chosen).total
        least = min(least, (size, chosen), key=lambda one: one[0])
        if size <= cluster.memory_bytes:
            timed.append((step(training, cluster, chosen).seconds, chosen))
    if not considered:
        raise _none(training, cluster, fixed)
    if not timed:
        if set(fixed) >= {"tensor", "pipeline", "micro_batch"} or cluster.devices >= 1_000_000:
            hint = "fix less, or use more devices"
        else:
            hint = _enough(training, cluster, fixed)
        raise too_big(f"{training.model.name} on {cluster.devices} devices", least[0], cluster.memory_bytes, hint)
    timed.sort(key=lambda one: (one[0], one[1].tensor, one[1].pipeline, one[1].micro_batch))
    picked = _different(timed, 1 + runners)
    predictions = [predict(training, cluster, degrees) for degrees in picked]
    return Found(best=predictions[0], others=tuple(predictions[1:]), considered=considered)


def _different(timed: list[tuple[float, Degrees]], count: int) -> list[Degrees]:
    """The first of every split of devices, so that runners-up are other ways and not other micro-batches."""
    picked: list[Degrees] = []
    seen: set[tuple[int, ...]] = set()
    for _, degrees in timed:
        split = (degrees.tensor, degrees.pipeline, degrees.context, degrees.expert)
        if split not in seen:
            seen.add(split)
            picked.append(degrees)
        if len(picked) == count:
            return picked
    rest = [degrees for _, degrees in timed if degrees not in picked]
    return picked + rest[: count - len(picked)]


def layouts(training: Training, cluster: Cluster, fixed: Fixed) -> Iterator[Degrees]:
    """Layouts whose numbers divide: heads by tensor, layers by pipeline, the batch by data x micro-batch."""
    model, n, batch = training.model, cluster.devices, training.global_batch
    node = cluster.devices_per_node
    for t in _options(fixed, "tensor", [t for t in _powers(min(node, 64)) if model.heads % t == 0]):
        for p in _options(fixed, "pipeline", [p for p in _divisors(n, model.layers) if model.layers % p == 0]):
            for c in _options(
                fixed, "context", [c for c in (1, 2, 4, 8, 16) if training.length // c >= 4096 or c == 1]
            ):
                if n % (t * p * c):
                    continue
                d = n // (t * p * c)
                if fixed.get("data", d) != d or batch % d:
                    continue
                yield from _knobs(training, fixed, d, t, p, c)


def _knobs(training: Training, fixed: Fixed, d: int, t: int, p: int, c: int) -> Iterator[Degrees]:
    model, batch = training.model, training.global_batch
    per_stage = model.layers // p
    copies = [e for e in _powers(d * c * t) if model.experts and model.experts % e == 0] or [1]
    default_zero = [0] if d * c == 1 else [1, 3] if p == 1 else [1]
    for m in _options(fixed, "micro_batch", [m for m in (1, 2, 4, 8, 16) if batch % (d * m) == 0]):
        if batch < d * m:
            continue
        chunks = [v for v in (1, 2, 4, 6, 8) if (per_stage % v == 0 and batch // (d * m) % p == 0) or v == 1]
        for v in _options(fixed, "interleave", chunks if p > 1 else [1]):
            for z in _options(fixed, "zero", default_zero):
                for e in _options(fixed, "expert", copies):
                    yield Degrees(
                        data=d, tensor=t, pipeline=p, context=c, expert=e, micro_batch=m, interleave=v, zero=z
                    )


def _options(fixed: Fixed, name: str, choices: list[int]) -> list[int]:
    return [fixed[name]] if name in fixed else choices


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _divisors(n: int, most: int) -> list[int]:
    return [p for p in range(1, most + 1) if n % p == 0]


def _none(training: Training, cluster: Cluster, fixed: Fixed) -> PlanError:
    """Why no layout divides: the fixed one's own fault where it has one."""
    n = cluster.devices
    split = {name: fixed.get(name, 1) for name in ("tensor", "pipeline", "context")}
    product = split["tensor"] * split["pipeline"] * split["context"]
    if n % product == 0 and fixed.get("data", n // product) == n // product:
        whole = Degrees(
            data=n // product,
            tensor=split["tensor"],
            pipeline=split["pipeline"],
            context=split["context"],
            micro_batch=fixed.get("micro_batch", 1),
        )
        check(training, cluster, whole)
    elif fixed:
        arithmetic = " x ".join(f"{name} {fixed[name]}" for name in (*split, "data") if name in fixed)
        return PlanError(
            "--fix " + ",".join(f"{name}={value}" for name, value in fixed.items()),
            found=f"{arithmetic} = {product * fixed.get('data', 1)}, and {n} devices",
            allowed=f"a product that divides {n}" if "data" not in fixed else f"a product of {n}",
            do="change one of them, or leave one away",
        )
    return PlanError(
        f"{training.model.name} with a batch of {training.global_batch} on {n} devices",
        found="no layout whose numbers divide",
        allowed="a batch that the data degree divides; heads by tensor; layers by pipeline",
        do=f"use a batch that is a multiple of {n}, or a number of devices that divides it",
    )


def _enough(training: Training, cluster: Cluster, fixed: Fixed) -> str:
    """The smallest number of devices, doubled from here, on which a layout fits."""
    devices = cluster.devices
    free = {name: value for name, value in fixed.items() if name != "data"}
    for _ in range(14):
        devices *= 2
        more = replace(cluster, devices=devices, devices_per_node=cluster.accelerator.devices_per_node)
        batch = training.global_batch if training.global_batch % devices == 0 else devices
        larger = replace(training, global_batch=max(batch, training.global_batch))
        for degrees in layouts(larger, more, free):
            chosen = just_enough(larger, more, degrees)
            if memory(larger, more, chosen).total <= more.memory_bytes:
                return f"use at least {devices} x {cluster.accelerator.name} ({chosen})"
    return "use devices with more memory"


def fewer_is_faster(training: Training, cluster: Cluster, found: Found) -> str | None:
    """A sentence where half, a quarter or an eighth of the devices is predicted to be at least as quick."""
    assert found.best.step_time_s is not None
    devices = cluster.devices
    for _ in range(3):
        devices //= 2
        if not devices:
            break
        smaller = replace(cluster, devices=devices, devices_per_node=min(devices, cluster.devices_per_node))
        try:
            less = best_training(training, smaller, runners=0).best
        except PlanError:
            continue
        if less.step_time_s is not None and less.step_time_s <= found.best.step_time_s:
            return f"{devices} devices are predicted to be as fast: {less.named}"
    return None


def best_serving(
    serving: Serving, load: Load, cluster: Cluster, fixed: Fixed | None = None, *, runners: int = 3
) -> Found:
    """The layouts with the most tokens a second; of those within 2 %, the one with the shortest latency first."""
    fixed = fixed or {}
    model, n = serving.model, cluster.devices
    most = min(n, cluster.devices_per_node)
    predictions = []
    least = float("inf")
    for t in _options(fixed, "tensor", [t for t in _powers(most) if n % t == 0 and model.heads % t == 0]):
        d = n // t
        if n % t or fixed.get("data", d) != d:
            raise PlanError(
                f"--fix tensor={t}",
                found=f"{n} devices, which {t} does not divide" if n % t else f"data {fixed.get('data')} x tensor {t}",
                allowed=f"data x tensor = {n}",
                do="change one of them, or leave one away",
            )
        found = predict((serving, load), cluster, Degrees(data=d, tensor=t))
        least = min(least, found.memory_bytes_per_device)
        if found.fits:
            predictions.append(found)
    if not predictions:
        weights = model.num_params * 2.0
        devices = 1
        while devices < 4096 and weights / devices > 0.8 * cluster.memory_bytes:
            devices *= 2
        hint = f"use at least {max(devices, 2 * n)} x {cluster.accelerator.name}, or --precision fp8"
        raise too_big(f"{model.name} on {n} devices", least, cluster.memory_bytes, hint)
    predictions.sort(key=lambda one: (-round(one.tokens_per_s, -1), one.itl_s or 0.0))
    return Found(best=predictions[0], others=tuple(predictions[1 : 1 + runners]), considered=len(predictions))


def why_worse(best: Prediction, other: Prediction) -> str:
    """The term that costs the other layout most more than the best."""
    from fanfold.planner.prediction import meaning

    if best.step_time_s is None or other.step_time_s is None:
        share = 1 - other.tokens_per_s / best.tokens_per_s
        first = f"{share:.0%} fewer tokens/s" if share >= 0.005 else "as many tokens/s"
        later = (other.itl_s or 0) * 1e3
        return f"{first}, {later:.1f} ms between tokens"
    more = other.step_time_s / best.step_time_s - 1
    gap = {name: other.terms.get(name, 0.0) - best.terms.get(name, 0.0) for name in {*best.terms, *other.terms}}
    name = max(gap, key=gap.__getitem__)
    return f"{more:+.1%}: {gap[name]:+.2f} s of {meaning(name)}"
