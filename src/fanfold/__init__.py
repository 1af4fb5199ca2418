"""Fanfold runs models in parallel on the compute units there are, with the result one unit would give.

import fanfold as ff
vectors = ff.embed(["a text", "another"])             # ndarray [2, d]
run = ff.embed("docs.jsonl", "out/", column="text")   # run.summary, run.table(), run.report
ff.fold(lambda x: np.exp(-x**2), x, ff.Mean())        # split -> compute -> merge
ff.map(f, rows, on="cpu:2")
"""

from __future__ import annotations

import sys
import types
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from fanfold.job.classify import classify as classify
    from fanfold.job.embed import embed as embed
    from fanfold.job.engines import shutdown as shutdown
    from fanfold.job.fold import fold as fold
    from fanfold.job.fold import map as map
    from fanfold.job.generate import generate as generate
    from fanfold.job.parallel import parallel as parallel
    from fanfold.job.plan import plan as plan
    from fanfold.job.verify import verify as verify
    from fanfold.merge import ArgMax as ArgMax
    from fanfold.merge import Concat as Concat
    from fanfold.merge import Count as Count
    from fanfold.merge import Distinct as Distinct
    from fanfold.merge import EnsembleMean as EnsembleMean
    from fanfold.merge import Histogram as Histogram
    from fanfold.merge import Mean as Mean
    from fanfold.merge import MinMax as MinMax
    from fanfold.merge import Moments as Moments
    from fanfold.merge import Quantiles as Quantiles
    from fanfold.merge import Record as Record
    from fanfold.merge import SoftmaxParts as SoftmaxParts
    from fanfold.merge import Sum as Sum
    from fanfold.merge import TopK as TopK
    from fanfold.merge import Vote as Vote
    from fanfold.merge import Weighted as Weighted

_PUBLIC = {
    "classify": "fanfold.job.classify",
    "embed": "fanfold.job.embed",
    "fold": "fanfold.job.fold",
    "generate": "fanfold.job.generate",
    "map": "fanfold.job.fold",
    "parallel": "fanfold.job.parallel",
    "plan": "fanfold.job.plan",
    "verify": "fanfold.job.verify",
    "shutdown": "fanfold.job.engines",
    "ArgMax": "fanfold.merge",
    "Concat": "fanfold.merge",
    "Count": "fanfold.merge",
    "Distinct": "fanfold.merge",
    "EnsembleMean": "fanfold.merge",
    "Histogram": "fanfold.merge",
    "Mean": "fanfold.merge",
    "MinMax": "fanfold.merge",
    "Moments": "fanfold.merge",
    "Quantiles": "fanfold.merge",
    "Record": "fanfold.merge",
    "SoftmaxParts": "fanfold.merge",
    "Sum": "fanfold.merge",
    "TopK": "fanfold.merge",
    "Vote": "fanfold.merge",
    "Weighted": "fanfold.merge",
}

__all__ = [
    "ArgMax",
    "Concat",
    "Count",
    "Distinct",
    "EnsembleMean",
    "Histogram",
    "Mean",
    "MinMax",
    "Moments",
    "Quantiles",
    "Record",
    "SoftmaxParts",
    "Sum",
    "TopK",
    "Vote",
    "Weighted",
    "classify",
    "embed",
    "fold",
    "generate",
    "map",
    "parallel",
    "plan",
    "shutdown",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when they are first used: `import fanfold` stays light."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'fanfold' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    if name not in ("parallel", "plan"):  # names of packages, too
        globals()[name] = value
    return value


class _Front(types.ModuleType):
    """`ff.plan` and `ff.parallel` are functions; the packages of these names are still there to import from."""

    @property
    def plan(self) -> Any:
        return __getattr__("plan")

    @plan.setter
    def plan(self, value: object) -> None:
        """The import system sets submodules here."""

    @property
    def parallel(self) -> Any:
        return __getattr__("parallel")

    @parallel.setter
    def parallel(self, value: object) -> None:
        """The import system sets submodules here."""

    def __reduce__(self) -> tuple[Any, ...]:
        """A function that names `ff` travels to another process; a subclass of modules needs telling how."""
        import importlib

        return importlib.import_module, (__name__,)


sys.modules[__name__].__class__ = _Front


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC])
