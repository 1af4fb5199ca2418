"""One model over several units: `ff.parallel` and `fanfold equal`."""

from __future__ import annotations

import warnings
from typing import Any

from fanfold import extras
from fanfold.data.scratch import scratch_folder
from fanfold.errors import DifferenceFound, PlanError
from fanfold.parallel.mesh import Split, parse_split
from fanfold.plan.layout import product_of
from fanfold.quantity import parse_bytes
from fanfold.tasks.checkpoint import find_checkpoint
from fanfold.tasks.derived import PROMISE, with_table
from fanfold.tasks.parallel_model import ANSWER_S, ParallelModel, start

_DTYPES = ("float64", "float32", "bfloat16")


def parallel(
    model: str | None = None,
    *,
    layout: str,
    on: str = "cpu",
    dtype: str = "float32",
    revision: str | None = None,
    timeout_s: float = 60.0,
    memory_per_unit: str | None = None,
) -> ParallelModel:
    """The model split over several units of this machine, for example layout="tensor=2".

    `model`: a folder or a Hugging Face id with safetensors weights; each unit reads and holds its share only.
    `memory_per_unit`: what each may hold, weights included, for example "2GB"; a unit that wants more fails.
    Raises: PlanError for a layout that cannot be, before any weight is read; InputError for unusable files.
    """
    split = parse_split(layout)
    if on != "cpu" and not on.startswith("cpu:"):
        raise PlanError(f"ff.parallel(..., on={on!r})", found="another place", allowed="cpu", do="leave on= away")
    if on != "cpu" and on != f"cpu:{split.units}":
        raise PlanError(
            f"ff.parallel(..., layout={layout!r}, on={on!r})",
            found=f"{product_of(str(split))} units for the model, and {on.removeprefix('cpu:')} to run it on",
            allowed=f"cpu:{split.units}",
            do=f"use on='cpu:{split.units}', leave on= away, or choose a layout whose product is that number",
        )
    for module in ("torch", "transformers"):
        extras.need(module, extra="torch", purpose="ff.parallel")
    folder = str(find_checkpoint(model, revision=revision, tokenizer=False).path)
    _check(folder, split, dtype)
    split = with_table(folder, split)
    if split.table is not None:
        warnings.warn(f"ff.parallel uses {split.shown_check}", stacklevel=2)
    memory_bytes = parse_bytes(memory_per_unit, name="memory_per_unit") if memory_per_unit else None
    return ParallelModel(folder, split, dtype=dtype, timeout_s=timeout_s, memory_bytes=memory_bytes)


def equal(
    model: str | None = None,
    *,
    layout: str,
    dtype: str = "float32",
    revision: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Whether the split model is the whole one: a tiny copy in float64 with every gradient, then the checkpoint.

    Raises: DifferenceFound outside of the promise, with the record in its `record`; PlanError, InputError.
    """
    split = parse_split(layout)
    for module in ("torch", "transformers"):
        extras.need(module, extra="torch", purpose="fanfold equal")
    from fanfold.parallel import equal as check
    from fanfold.parallel.split import config_of
    from fanfold.parallel.tiny import save_tiny

    checkpoint = find_checkpoint(model, revision=revision, tokenizer=False)
    config = config_of(checkpoint.path)
    _check(str(checkpoint.path), split, dtype)
    split = with_table(checkpoint.path, split)
    ranks = start(split, timeout_s=60.0)
    try:
        with scratch_folder() as folder:
            ways = split.tensor * (split.context if split.context_method == "ulysses" else 1)  # that share heads
            save_tiny(config, folder / "tiny", ways, split.pipeline, seed, split.expert)
            values = {"folder": str(folder / "tiny"), "dtype": "float64", "gradients": True}
            ranks.ask("compare", values)
            of_tiny = ranks.answers(ANSWER_S)
        ranks.ask("compare", {"folder": str(checkpoint.path), "dtype": dtype, "gradients": False})
        of_checkpoint = ranks.answers(ANSWER_S)
    finally:
        ranks.close()
    tiny_worst, checkpoint_worst = check.worst_of(of_tiny), check.worst_of(of_checkpoint)
    allowed = PROMISE if split.table else check.promise_of(config.model_type, "float64", context=split.context)
    allowed_checkpoint = check.promise_of(config.model_type, dtype)
    record = {
        "units": split.units,
        "world_pids": [answer["pid"] for answer in of_tiny],
        "reference": tiny_worst["reference"],
        "max_rel_logits": tiny_worst["max_rel_logits"],
        "max_rel_loss": tiny_worst["max_rel_loss"],
        "max_rel_grad": tiny_worst["max_rel_grad"],
        "worst_grad_name": tiny_worst["worst_grad_name"],
        "num_grads": tiny_worst["num_grads"],
        "collectives": tiny_worst["collectives"],
        "collective_bytes": tiny_worst["bytes"],
        "expert_load": tiny_worst["expert_load"],
        "level": "B"
        if split.units == split.pipeline and tiny_worst["bitwise"] and checkpoint_worst["bitwise"]
        else "T",
        "layout": str(split),
        "table": "derived" if split.table else "of the family",
        "promise": allowed,
        "checkpoint": {
            "dtype": dtype,
            "max_rel_logits": checkpoint_worst["max_rel_logits"],
            "max_rel_loss": checkpoint_worst["max_rel_loss"],
            "promise": allowed_checkpoint,
        },
    }
    errors = [tiny_worst[key] for key in ("max_rel_logits", "max_rel_loss", "max_rel_grad")]
    if not (check.largest_error(tiny_worst) <= allowed and checkpoint_worst["max_rel_logits"] <= allowed_checkpoint):
        error = DifferenceFound(
            f"{checkpoint.shown} with --layout {split}",
            found=f"relative errors {errors[0]:.2g} (logits), {errors[1]:.2g} (loss), {errors[2]:.2g} (gradient of "
            f"{tiny_worst['worst_grad_name'] or '-'}); the checkpoint in {dtype}: "
            f"{checkpoint_worst['max_rel_logits']:.2g}",
            allowed=f"{allowed:g} in float64, {allowed_checkpoint:g} in {dtype}",
            do="report this with the model's name",
        )
        error.record = record  # type: ignore[attr-defined]
        raise error
    return record


def certificate(record: dict[str, Any], shown: str) -> str:
    """What `fanfold equal` prints."""
    of, derived = record["checkpoint"], record["table"] == "derived"
    calls = ", ".join(f"{count} {kind}" for kind, count in record["collectives"].items()) or "none"
    return (
        f"{shown}, {record['layout']} on {record['units']} processes: equal to the whole {record['reference']}\n"
        f"  a tiny copy in float64: logits {record['max_rel_logits']:.1e}, loss {record['max_rel_loss']:.1e}, "
        f"{record['num_grads']} gradients at most {record['max_rel_grad']:.1e} ({record['worst_grad_name'] or '-'}); "
        f"allowed {record['promise']:.0e}\n"
        f"  the checkpoint in {of['dtype']}: outputs {of['max_rel_logits']:.1e}; allowed {of['promise']:.0e}\n"
        + ("  the family has no table: one was derived from its layers, and this check accepts it\n" if derived else "")
        + f"  collectives of one step forward and back: {calls}"
    )


def _check(folder: str, split: Split, dtype: str) -> None:
    """PlanError for what cannot be, before any weight is read."""
    if dtype not in _DTYPES:
        raise PlanError(f"--dtype {dtype}", found="an unknown type", allowed=", ".join(_DTYPES), do="choose one")
    from fanfold.parallel.families import check_split
    from fanfold.parallel.split import config_of

    check_split(config_of(folder), split)
