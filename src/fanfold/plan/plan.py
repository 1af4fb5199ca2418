"""A plan: where the job runs, laid out how, with which numerics, and why."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fanfold.plan.layout import Layout
    from fanfold.plan.numerics import Numerics


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One thing that computes. `device` is what torch calls it."""

    name: str
    device: str = "cpu"


@dataclass(frozen=True, slots=True, kw_only=True)
class Executor:
    """One executor of a Spark cluster; memory is that of its Java side, not of the Python beside it."""

    name: str
    host: str
    cores: int
    memory_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """A Spark cluster as it was when it was asked; a slot computes one unit's work."""

    master: str
    slots: int
    executors: tuple[Executor, ...]
    unsafe: str = ""  # why others could use it, too


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was chosen and why; saved in run.json."""

    engine: str
    units: tuple[Unit, ...]
    layout: Layout
    numerics: Numerics
    unit_memory_bytes: int  # what a unit may hold of its own, weights not counted
    reasons: tuple[str, ...] = ()
    warnings: tuple[str, ...] = field(default=())

    def record(self) -> dict[str, Any]:
        """Plain values, as run.json stores them."""
        return {
            "engine": self.engine,
            "units": [unit.name for unit in self.units],
            "layout": str(self.layout),
            "numerics": self.numerics.record(),
            "unit_memory_bytes": self.unit_memory_bytes,
            "reasons": list(self.reasons),
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Where:
    """What `--on` says: a kind of engine, and the units asked for (None: as many as there are)."""

    kind: str  # inline, cpu, cuda, spark
    count: int | None = None
    devices: tuple[int, ...] = ()
    master: str = ""  # of Spark

    def record(self) -> dict[str, Any]:
        return asdict(self)
