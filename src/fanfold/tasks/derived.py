"""Families without a table: one is derived, and accepted where a tiny copy in float64, split, is the whole one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from fanfold.data.scratch import scratch_folder
from fanfold.errors import FanfoldError, PlanError, UnitLost
from fanfold.parallel.families import check_heads, has_table
from fanfold.tasks.parallel_model import ANSWER_S, start

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from fanfold.parallel.mesh import Split

PROMISE = 1e-6  # of every relative error: its norms may cast to float32 inside
_accepted: dict[tuple[str, str], Split] = {}  # config as JSON, layout -> with its table


def with_table(folder: str | Path, split: Split) -> Split:
    """The layout, with a derived table where the model's family has none. Raises PlanError where no table passes.

    The check takes some seconds and processes; what has passed is remembered while this process lives.
    """
    from fanfold.parallel.split import config_of

    config = config_of(folder)
    if split.units == 1 or has_table(config):
        return split
    key = (config.to_json_string(), str(split))
    if key not in _accepted:
        _accepted[key] = _derived(config, split)
    return _accepted[key]


def _derived(config: Any, split: Split) -> Split:
    from fanfold.parallel.derive import derived_tables, no_table
    from fanfold.parallel.split import architecture
    from fanfold.parallel.tiny import tiny_model

    if split.tensor > 1:
        check_heads(config, split)
    causes = []
    try:
        tiny = tiny_model(config, architecture(config), split.tensor, split.pipeline)
        tables: Sequence[Any] = [*derived_tables(tiny)] if split.tensor > 1 else [no_table(config)]
    except FanfoldError:
        raise
    except Exception as error:  # an architecture that cannot be made small may fail in any way
        causes.append(f"{type(error).__name__}: {error}")
        tables = []
    for table in tables:
        found = replace(split, table=table)
        try:
            worst = _worst(config, found)
        except (UnitLost, PlanError) as error:
            causes.append(str(error.found).strip().splitlines()[0])
            continue
        if worst <= PROMISE:
            return replace(
                found,
                shown_check=f"a table derived for {config.model_type}; a tiny copy in float64, "
                f"gradients included, differs by {worst:.1e} (allowed {PROMISE:.0e})",
            )
        causes.append(f"a tiny copy in float64, split, differs by {worst:.1e}")
    raise PlanError(
        f"splitting a {config.model_type} by {split}",
        found=f"no table for its family, and none derived from its layers passes the check: {'; '.join(causes)}",
        allowed=f"a relative error of at most {PROMISE:.0e} in outputs, loss and every gradient",
        do="leave --layout away, or add a table in parallel/families.py",
    )


def _worst(config: Any, split: Split) -> float:
    """The largest relative error of the tiny copy; not a number is infinite."""
    from fanfold.parallel import equal
    from fanfold.parallel.tiny import save_tiny

    ranks = start(split, timeout_s=30.0)
    try:
        with scratch_folder() as folder:
            save_tiny(config, folder / "tiny", split.tensor, split.pipeline)
            ranks.ask("compare", {"folder": str(folder / "tiny"), "dtype": "float64", "gradients": True})
            record = equal.worst_of(ranks.answers(ANSWER_S))
    finally:
        ranks.close()
    return equal.largest_error(record)
