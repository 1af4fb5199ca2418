"""`fanfold plan train|infer`: the layout, the time, the memory, and why; nothing is run and no model is loaded."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fanfold.errors import PlanError
from fanfold.job.plan_tables import nearest
from fanfold.plan.workload import from_catalogue, from_config
from fanfold.planner import cluster as clusters
from fanfold.planner.inference import Load, Serving
from fanfold.planner.prediction import Prediction, meaning
from fanfold.planner.search import FIXABLE, Found, best_serving, best_training, fewer_is_faster, why_worse
from fanfold.planner.training import Training
from fanfold.quantity import format_bytes, format_duration, format_rate

if TYPE_CHECKING:
    from fanfold.plan.model import Model
    from fanfold.planner.cluster import Cluster

PRECISIONS = ("bf16", "fp16", "fp8", "tf32", "fp32")
_BAR = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What `fanfold plan` found: the best layout, the next ones, and what would change the answer."""

    model: Model
    cluster: Cluster
    found: Found
    changes: tuple[str, ...]
    scaling: tuple[tuple[int, float], ...]  # devices, tokens/s of the best layout
    warning: str | None
    near: str | None

    @property
    def best(self) -> Prediction:
        return self.found.best

    def record(self) -> dict[str, Any]:
        """Plain values for --json."""
        others = [{**other.record(), "why_worse": why_worse(self.best, other)} for other in self.found.others]
        return {
            **self.best.record(),
            "memory_limit_bytes": round(self.cluster.memory_bytes),
            "memory_terms": {name: round(value) for name, value in self.best.memory_terms.items()},
            "alternatives": others,
            "changes": list(self.changes),
            "warning": self.warning,
            "nearest_published": self.near,
            "model": self.model.name,
            "num_params": self.model.num_params,
            "devices": self.cluster.devices,
            "accelerator": self.cluster.accelerator.name,
            "layouts_considered": self.found.considered,
        }

    def csv(self) -> str:
        """The best and the next layouts, a line each."""
        names = ("layout", "step_time_s", "tokens_per_s", "ttft_s", "itl_s", "memory_bytes_per_device", "fits", "mfu")
        lines = [",".join((*names, "bound"))]
        for one in (self.best, *self.found.others):
            record = {**one.record(), "layout": one.named}
            values = ["" if record[name] is None else str(record[name]) for name in (*names, "bound")]
            lines.append(",".join(f'"{value}"' if "," in value else value for value in values))
        return "\n".join(lines)

    @property
    def text(self) -> str:
        """For people."""
        best, limit = self.best, self.cluster.memory_bytes
        size = best.memory_bytes_per_device
        lines = [self.verdict, ""]
        if self.warning:
            lines += [f"warning     {self.warning}", ""]
        lines.append(f"layout      {best.named}")
        if best.step_time_s is not None:
            low, high = best.interval
            lines.append(
                f"step        {_seconds(best.step_time_s)} (four of five between {_seconds(low)} and {_seconds(high)})"
            )
            lines.append(f"rate        {format_rate(best.tokens_per_s, 'tokens')}, MFU {best.mfu:.1%}")
        else:
            low, high = best.interval
            lines.append(
                f"rate        {format_rate(best.tokens_per_s, 'output tokens')}"
                f" (four of five between {low:,.0f} and {high:,.0f}), MFU {best.mfu:.1%}"
            )
            lines.append(
                f"latency     first token {_seconds(best.ttft_s or 0)}, then {_seconds(best.itl_s or 0)} a token"
            )
        share = size / limit
        lines.append(f"memory      {format_bytes(size)} of {format_bytes(limit)} a device ({share:.0%})")
        held = sorted(best.memory_terms.items(), key=lambda one: -one[1])
        lines.append("            " + ", ".join(f"{name} {format_bytes(value)}" for name, value in held if value))
        lines.append(f"bound by    {best.bound}")
        lines += ["", "where a step's time goes"]
        lines += bars(best.terms)
        if self.found.others:
            lines += ["", "next best"]
            lines += [f"  {other.named}: {why_worse(best, other)}" for other in self.found.others]
        if self.changes:
            lines += ["", "what would change the answer"]
            lines += [f"  {change}" for change in self.changes]
        if self.near:
            lines += ["", f"nearest published: {self.near}"]
        return "\n".join(lines)

    @property
    def verdict(self) -> str:
        best = self.best
        where = f"{self.cluster.devices} x {self.cluster.accelerator.name}"
        if best.step_time_s is not None:
            return (
                f"{self.model.name} on {where}: {best.named}; {_seconds(best.step_time_s)} a step,"
                f" bound by {best.bound}."
            )
        return (
            f"{self.model.name} on {where}: {best.named}; {best.tokens_per_s:,.0f} output tokens/s,"
            f" bound by {best.bound}."
        )


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 60 else format_duration(seconds)


def bars(terms: dict[str, float]) -> list[str]:
    """A line a term: its share as a bar."""
    total = sum(terms.values())
    ordered = sorted(terms.items(), key=lambda one: -one[1])
    shown = [(name, value) for name, value in ordered if value / total >= 0.005]
    return [
        f"  {name:<10} {'#' * max(1, round(_BAR * value / total)):<{_BAR}} {value / total:>4.0%}"
        f"  {_seconds(value)}  {meaning(name)}"
        for name, value in shown
    ]


def model_named(name: str) -> Model:
    """A model of the catalogue, or that of a config.json (its path, or its folder's)."""
    path = Path(name)
    if path.is_dir():
        path = path / "config.json"
    if not (path.suffix == ".json" or path.is_file()):
        return from_catalogue(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise PlanError(
            f"--model {name[:80]}",
            found=f"{type(error).__name__}: {error}",
            allowed="a name of the catalogue, a config.json, or a folder that holds one",
            do="check the path",
        ) from None
    return from_config(config, name=path.parent.name or None)


def cluster_named(on: str, file: str | None) -> Cluster:
    base = clusters.cluster(on)
    if file is None:
        return base
    import tomllib

    try:
        values = tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PlanError(
            f"--cluster {file[:80]}",
            found=f"{type(error).__name__}: {error}",
            allowed="a TOML file with devices_per_node, network_cards_per_node, network_card_gbit_per_s, ...",
            do="check the file",
        ) from None
    return clusters.with_file(base, values, path=file)


def fixed(text: str | None, allowed: tuple[str, ...] = FIXABLE) -> dict[str, int]:
    """`tensor=8,pipeline=16` as numbers."""
    values: dict[str, int] = {}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, number = part.partition("=")
        name = name.strip().replace("-", "_")
        if name not in allowed or not number.strip().isdigit() or int(number) < (name != "zero"):
            raise PlanError(
                f"--fix {part.strip()[:60]}",
                found="no such degree" if name not in allowed else "not a positive whole number",
                allowed=", ".join(f"{one}=N" for one in allowed),
                do="write for example --fix tensor=8,pipeline=16",
            )
        values[name] = int(number)
    return values


def _positive(name: str, value: int) -> int:
    if value < 1:
        raise PlanError(name, found=str(value), allowed="a positive whole number", do="correct it")
    return value


def _precision(name: str) -> str:
    if name not in PRECISIONS:
        raise PlanError(
            f"--precision {name[:40]}", found="no such precision", allowed=", ".join(PRECISIONS), do="use one"
        )
    return name


def plan_train(
    model: str,
    on: str,
    *,
    global_batch: int,
    seq: int = 2048,
    fix: str | None = None,
    precision: str = "bf16",
    cluster: str | None = None,
) -> Choice:
    """The best layout to train the model in."""
    chosen, where = model_named(model), cluster_named(on, cluster)
    training = Training(
        model=chosen,
        global_batch=_positive("--global-batch", global_batch),
        length=_positive("--seq", seq),
        precision=_precision(precision),
    )
    held = fixed(fix)
    found = best_training(training, where, held)
    changes = _training_changes(training, where, found, held)
    return Choice(
        model=chosen,
        cluster=where,
        found=found,
        changes=tuple(changes),
        scaling=tuple(_training_scaling(training, where)),
        warning=None if held else fewer_is_faster(training, where, found),
        near=nearest("train", chosen.num_params, where, seq),
    )


def _training_changes(training: Training, cluster: Cluster, found: Found, held: dict[str, int]) -> list[str]:
    changes = []
    now = found.best.tokens_per_s
    node = cluster.accelerator.devices_per_node
    larger = replace(cluster, devices=2 * cluster.devices, devices_per_node=min(node, 2 * cluster.devices))
    trials = [
        (f"twice the devices ({larger.devices})", training, larger),
        (
            f"twice the batch ({2 * training.global_batch})",
            replace(training, global_batch=2 * training.global_batch),
            cluster,
        ),
    ]
    if cluster.accelerator.has("fp8") and training.precision != "fp8":
        trials.append(("--precision fp8", replace(training, precision="fp8"), cluster))
    network = replace(cluster, network_bytes_per_s=2 * cluster.network_bytes_per_s)
    trials.append(("twice the network", training, network))
    free = {name: value for name, value in held.items() if name != "data"}
    for name, other, where in trials:
        try:
            best = best_training(other, where, free, runners=0).best
        except PlanError:
            continue
        layout = "" if best.named == found.best.named else f", with {best.named}"
        changes.append(f"{name}: {best.tokens_per_s / now:.2f} x the tokens/s{layout}")
    return changes


def _training_scaling(training: Training, cluster: Cluster) -> list[tuple[int, float]]:
    points = []
    devices = 1
    while devices <= cluster.devices:
        node = min(devices, cluster.devices_per_node)
        try:
            best = best_training(training, replace(cluster, devices=devices, devices_per_node=node), runners=0).best
            points.append((devices, best.tokens_per_s))
        except PlanError:
            pass
        devices *= 2
    return points


def plan_infer(
    model: str,
    on: str,
    *,
    input_tokens: int,
    output_tokens: int,
    concurrency: int,
    fix: str | None = None,
    precision: str = "bf16",
    cluster: str | None = None,
) -> Choice:
    """The best layout to serve the model in."""
    chosen, where = model_named(model), cluster_named(on, cluster)
    if not any(block.side == "decoder" for block in chosen.blocks):
        raise PlanError(
            f"plan infer --model {model[:60]}",
            found="an encoder, which generates nothing",
            allowed="models that generate text",
            do="use: fanfold plan embed",
        )
    serving = Serving(
        model=chosen, precision=_precision(precision), cache_precision="fp8" if precision == "fp8" else "bf16"
    )
    load = Load(
        input_tokens=_positive("--input-tokens", input_tokens),
        output_tokens=_positive("--output-tokens", output_tokens),
        concurrency=_positive("--concurrency", concurrency),
    )
    found = best_serving(serving, load, where, fixed(fix, ("data", "tensor")))
    changes = []
    for name, other_load, other in (
        (f"twice the concurrency ({2 * concurrency})", replace(load, concurrency=2 * concurrency), serving),
        (
            f"half the concurrency ({max(1, concurrency // 2)})",
            replace(load, concurrency=max(1, concurrency // 2)),
            serving,
        ),
        ("--precision fp8", load, replace(serving, precision="fp8", cache_precision="fp8")),
    ):
        if name.startswith("--") and (precision == "fp8" or not where.accelerator.has("fp8")):
            continue
        try:
            best = best_serving(other, other_load, where, runners=0).best
        except PlanError:
            continue
        ratio = best.tokens_per_s / found.best.tokens_per_s
        changes.append(f"{name}: {ratio:.2f} x the tokens/s, {(best.itl_s or 0) * 1e3:.1f} ms a token, {best.named}")
    scaling = []
    devices = 1
    while devices <= where.devices:
        try:
            node = min(devices, where.devices_per_node)
            less = replace(where, devices=devices, devices_per_node=node)
            scaling.append((devices, best_serving(serving, load, less, runners=0).best.tokens_per_s))
        except PlanError:
            pass
        devices *= 2
    warning = None
    slower = [n for n, rate in scaling if n < where.devices and rate >= found.best.tokens_per_s]
    if slower:
        warning = f"{slower[0]} devices are predicted to give as many tokens/s"
    return Choice(
        model=chosen,
        cluster=where,
        found=found,
        changes=tuple(changes),
        scaling=tuple(scaling),
        warning=warning,
        near=nearest("infer", chosen.num_params, where, input_tokens),
    )


def plan(
    model: str,
    on: str,
    *,
    global_batch: int | None = None,
    seq: int = 2048,
    input_tokens: int | None = None,
    output_tokens: int = 200,
    concurrency: int = 1,
    fix: str | None = None,
    precision: str = "bf16",
    cluster: str | None = None,
) -> Choice:
    """The best layout for a model on a cluster, its time and memory, the next-best and why they are worse.

    With `global_batch` (sequences of `seq` tokens a step) to train, with `input_tokens` to serve. `on` is a number
    and a catalogue name, `8xH100-80GB-SXM`; `fix` holds degrees, `tensor=8,pipeline=16`; `cluster` is a TOML file.
    Returns a Choice: `.best`, `.found.others`, `.text`, `.record()`. Raises PlanError where nothing fits.
    """
    if (global_batch is None) == (input_tokens is None):
        raise PlanError(
            "ff.plan(model, on)",
            found="both global_batch and input_tokens" if global_batch else "neither global_batch nor input_tokens",
            allowed="one: global_batch to train, input_tokens to serve",
            do="write ff.plan('gpt3-175b', '1024xA100-80GB-SXM', global_batch=1536)",
        )
    if global_batch is not None:
        return plan_train(model, on, global_batch=global_batch, seq=seq, fix=fix, precision=precision, cluster=cluster)
    assert input_tokens is not None
    return plan_infer(
        model,
        on,
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        concurrency=concurrency,
        fix=fix,
        precision=precision,
        cluster=cluster,
    )
