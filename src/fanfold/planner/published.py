"""A row of a published table as a workload, a cluster and a layout; what is not published stays open."""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any

from fanfold.errors import FanfoldError, PlanError
from fanfold.machine.catalogue import table
from fanfold.plan.workload import DIMENSIONS, catalogue_name, from_dimensions
from fanfold.planner.cluster import Cluster, from_words
from fanfold.planner.degrees import Degrees
from fanfold.planner.framework import Framework, framework
from fanfold.planner.memory import just_enough, memory
from fanfold.planner.training import Training

if TYPE_CHECKING:
    from fanfold.plan.model import Model

COLUMNS = (
    "source", "row", "config_id", "accelerator", "n_devices", "model", "n_params", "layers", "hidden", "heads",
    "kv_heads", "ffn", "vocab", "seq", "global_batch", "micro_batch", "tp", "pp", "vpp", "cp", "ep", "dp",
    "zero_stage", "recompute", "precision", "framework", "isl", "osl", "concurrency", "metric", "value", "unit",
    "confidence", "notes",
)  # fmt: skip
Row = dict[str, str]
OPEN = "open"  # recomputation not published: as few layers as fit


class Unresolved(FanfoldError):
    """A row that does not say enough; the message says what is missing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A training row: what ran, on what, and the layouts that its open knobs allow."""

    training: Training
    cluster: Cluster
    layouts: tuple[Degrees, ...]


def whole(row: Row, name: str) -> int | None:
    """A column's leading whole number; None where it has none."""
    found = re.match(r"\s*(\d+)(?:\.0*)?(?:\s|$|[(,-])", row.get(name, "") + " ")
    return int(found[1]) if found else None


def real(row: Row, name: str) -> float | None:
    try:
        return float(row.get(name, ""))
    except ValueError:
        return None


def model_of(row: Row) -> Model:
    """The row's model: its own dimensions, and the catalogue's for what they leave open."""
    name = row["model"]
    found = catalogue_name(name)
    values: dict[str, Any] = {}
    if found:
        entry = table("models")[found]
        values = {key: entry[key] for key in DIMENSIONS if key in entry}
    for key in ("layers", "hidden", "heads", "kv_heads", "ffn", "vocab"):
        number = whole(row, key)
        if number:
            values[key] = number
    missing = [key for key in ("layers", "hidden") if not values.get(key)]
    if missing:
        raise Unresolved(f"model {name!r}", found=f"no {', '.join(missing)}", allowed="", do="")
    if re.search(r"hybrid|mamba|nemotron-h", name.lower() + row.get("notes", "").lower()) and not found:
        raise Unresolved(f"model {name!r}", found="layers that are not transformers", allowed="", do="")
    hidden = values["hidden"]
    values.setdefault("vocab", 50304)
    values.setdefault("heads", hidden // 128 if hidden % 128 == 0 else max(1, hidden // 64))
    if found:
        if values["layers"] != table("models")[found]["layers"]:
            values["dense_layers"] = min(values.get("dense_layers", 0), values["layers"])
        return from_dimensions(name, **values)
    values.update(_experts(row, values))
    params = real(row, "n_params")
    options = _kinds(values, row, params)
    if params:
        return min(options, key=lambda one: abs(one.num_params - params))
    return options[0]


def _kinds(values: dict[str, Any], row: Row, params: float | None) -> list[Model]:
    """With and without a gate: the plain one first where the feed-forward part is four times as wide."""
    hidden, ffn = values["hidden"], values.get("ffn")
    plain_first = not ffn or ffn == 4 * hidden
    kinds = (False, True) if plain_first else (True, False)
    models = []
    for gated in kinds:
        heads, kv = values["heads"], values.get("kv_heads") or values["heads"]
        if values["vocab"] and gated and kv == heads and plain_first and not params:
            continue
        more = dict(values)
        if gated and not ffn:
            more["ffn"] = 8 * hidden // 3
        models.append(from_dimensions(row["model"], **more, gated=gated, bias=not gated, tied=not gated))
    return models


def _experts(row: Row, values: dict[str, Any]) -> dict[str, Any]:
    """What notes say of experts: `MoE: 128 experts top-8, moe_ffn 768`."""
    found = re.search(r"(\d+)\s*(?:routed )?experts top-(\d+)(.*)", row.get("notes", ""))
    if not found:
        return {}
    experts: dict[str, Any] = {"experts": int(found[1]), "chosen": int(found[2])}
    if width := re.search(r"moe_ffn (\d+)", found[3]):
        experts["expert_ffn"] = int(width[1])
    if shared := re.search(r"\+ (\d*)\s*shared", found[3]):
        experts["shared_ffn"] = int(shared[1] or 1) * experts.get("expert_ffn", values.get("ffn") or 0)
    if first := re.search(r"first (\d+) layers? dense", found[3]):
        experts["dense_layers"] = int(first[1])
    if width := re.search(r"head_dim (\d+)", found[3]):
        experts["head_dim"] = int(width[1])
    return experts


def precision_of(row: Row) -> str:
    text = row.get("precision", "").lower()
    for name in ("fp8", "tf32", "bf16", "fp16", "fp32", "int8"):
        if name in text:
            return "bf16" if name == "fp16" and "bf16" in text else name
    return "bf16"


def cluster_of(row: Row, devices: int) -> Cluster:
    cluster = from_words(row["accelerator"], devices)
    if cluster is None:
        raise Unresolved(f"accelerator {row['accelerator']!r}", found="not in the catalogue", allowed="", do="")
    return cluster


def training_case(row: Row) -> Case:
    """A training row ready to be predicted."""
    model = model_of(row)
    devices, length = whole(row, "n_devices"), whole(row, "seq")
    if not devices or not length:
        raise Unresolved("row", found="no n_devices or seq", allowed="", do="")
    cluster = cluster_of(row, devices)
    work = framework(row.get("framework", ""))
    tensors = _known(row, "tp") or _powers(min(devices, cluster.devices_per_node))
    pipes = _known(row, "pp") or ([1] if work.name in ("PyTorch FSDP", "JAX") else _powers(min(devices, model.layers)))
    contexts = _known(row, "cp") or [1]
    layouts = []
    batch = whole(row, "global_batch")
    for t, p, c in product(tensors, pipes, contexts):
        if devices % (t * p * c) or (model.heads % t and t > 1):
            continue
        d = devices // (t * p * c)
        layouts += _knobs(row, model, work, d, t, p, c, batch)
    if not layouts:
        raise Unresolved("row", found="no layout of that many devices", allowed="", do="")
    training = Training(
        model=model,
        global_batch=batch or 0,
        length=length,
        precision=precision_of(row),
        framework=work,
        frozen="lora" in (row.get("notes", "") + row["model"] + row["config_id"]).lower(),
    )
    return Case(training=training, cluster=cluster, layouts=tuple(layouts))


def _known(row: Row, name: str) -> list[int]:
    number = whole(row, name)
    return [number] if number else []


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]


def _knobs(row: Row, model: Model, work: Framework, d: int, t: int, p: int, c: int, batch: int | None) -> list[Degrees]:
    micros = _known(row, "micro_batch") or [m for m in (1, 2, 4, 8, 16, 32) if not batch or batch >= m * d]
    zeros = _zeros(row, work)
    recomputes = _recomputes(row)
    experts = _known(row, "ep") or [_expert_degree(model, d * c * t)]
    vpps = _known(row, "vpp") or (_interleaves(row, model, p) if work.interleaves else [1])
    return [
        Degrees(
            data=d, tensor=t, pipeline=p, context=c, expert=e, micro_batch=m, interleave=v, zero=z,
            recompute="selective" if r == OPEN else r, recompute_share=0.0 if r == OPEN else 1.0,
            sequence_parallel=work.sequence_parallel,
        )
        for m, z, r, e, v in product(micros or [1], zeros, recomputes, experts, vpps)
    ]  # fmt: skip


def _expert_degree(model: Model, most: int) -> int:
    experts = model.experts
    return max((e for e in _powers(most) if experts and experts % e == 0), default=1)


def _interleaves(row: Row, model: Model, p: int) -> list[int]:
    if p == 1:
        return [1]
    layers = -(-model.layers // p)
    return [v for v in (1, 2, 3, 4, 6, 8, 12) if layers % v == 0]


def _zeros(row: Row, work: Framework) -> list[int]:
    text = row.get("zero_stage", "").strip()
    if text[:1].isdigit():
        return [int(text[0])]
    if work.name == "PyTorch FSDP" or work.name == "JAX":
        return [3]
    return [1] if work.data_overlap else [0, 1]


def _recomputes(row: Row) -> list[Any]:
    text = row.get("recompute", "").lower()
    if text.startswith("none"):
        return ["none"]
    if "select" in text:
        return ["selective"]
    if "full" in text or text.startswith("yes"):
        return ["full"]
    return [OPEN]


def usable(case: Case) -> list[Degrees]:
    """Layouts that fit, or where none does, those that need the least: the row did run."""
    layouts = [one if one.recompute_share else just_enough(case.training, case.cluster, one) for one in case.layouts]
    sized = [(memory(case.training, case.cluster, one).total, one) for one in layouts]
    good = [one for size, one in sized if size <= case.cluster.memory_bytes]
    if good:
        return good
    least = min(size for size, _ in sized)
    return [one for size, one in sized if size <= 1.001 * least]


def check_columns(header: list[str], path: str) -> None:
    """PlanError where a table lacks the columns that a prediction needs."""
    needed = ("source", "config_id", "accelerator", "n_devices", "model", "metric", "value", "unit")
    missing = [name for name in needed if name not in header]
    if missing:
        raise PlanError(
            f"plan validate {path}",
            found=f"no column {', '.join(missing)}",
            allowed=", ".join(COLUMNS),
            do="name the columns as the tables under validation/ do",
        )
