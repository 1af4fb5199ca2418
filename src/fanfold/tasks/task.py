"""What a task is: how a row becomes tokens, and a batch of rows results. It knows no engine, source or sink."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from fanfold.data.reading import Reading
    from fanfold.plan.numerics import Numerics
    from fanfold.plan.plan import Unit
    from fanfold.tasks.chunking import Chunking


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A result column: `vector` is float32[width]; `records` is a list of objects with these fields a row; the others
    are one value a row."""

    name: str
    kind: Literal["vector", "text", "float", "integer", "records"]
    width: int = 0
    fields: tuple[Column, ...] = ()

    @property
    def bytes_per_row(self) -> int:
        return 4 * self.width if self.kind == "vector" else 64 * len(self.fields) if self.fields else 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Texts as token ids. ids: int32 arrays, one a text or as many as `parts` says for each text.

    truncated: which texts lost tokens to the length limit.
    more: whole numbers that `compute` needs beside a row's ids, as many for every row.
    costs: tokens that a row counts for where batches are cut; how many ids it has if None.
    failures: texts that have no tokens, as text -> (error, message); their ids may be anything.
    """

    ids: list[np.ndarray]
    truncated: list[int]
    parts: list[int] | None = None
    more: list[tuple[int, ...]] | None = None
    costs: list[int] | None = None
    failures: dict[int, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelBatch:
    """Rows that are computed together. ids: int32 arrays, one a row; length: the largest cost among the rows.

    more: what `prepare` gave with each row. left_out: rows that stand in for others, with a filler's ids and the row's
    own `more`; their results are not looked at. alive: to be called now and then where a batch takes long; it may end
    the batch by what it raises.
    """

    ids: Sequence[np.ndarray]
    length: int
    more: Sequence[tuple[int, ...]] = ()
    left_out: frozenset[int] = frozenset()
    alive: Callable[[], None] = lambda: None


class BadRows(Exception):
    """Some rows of a batch have no result: row -> (error, message). `results` holds those of all others."""

    def __init__(self, failures: dict[int, tuple[str, str]], results: dict[str, Any]) -> None:
        super().__init__(f"{len(failures)} rows without a result")
        self.failures = failures
        self.results = results


class Opened(Protocol):
    """A task on one unit, with what it has loaded. Where it has a `close`, that is called before it is forgotten."""

    def prepare(self, texts: Sequence[str], rows: Sequence[int]) -> Prepared:
        """Needs the tokenizer only. `rows`: where the texts stand in the input, from 0.

        Where several columns are read, a text is a JSON object of those that the record has.
        """

    def load(self) -> None:
        """The model is loaded; twice is fine."""

    def filler(self) -> np.ndarray:
        """Token ids of a neutral row, short and harmless: it stands in a batch for a row that is left out."""

    def compute(self, batch: ModelBatch) -> dict[str, Any]:
        """One batch -> one array or list [rows, ...] for each result column. Raises BadRows."""


class Task(Protocol):
    """A job's task with its settings; picklable, light, made in the parent."""

    @property
    def name(self) -> str:
        """The verb: embed, classify, ..."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The result columns, in order."""

    def reading(self, column: str) -> Reading:
        """What to read of a record, where `column` is what the user has named (--column)."""

    @property
    def imports(self) -> tuple[str, ...]:
        """Modules every unit needs."""

    @property
    def key(self) -> str:
        """Equal for tasks that can share a loaded model."""

    @property
    def record(self) -> dict[str, Any]:
        """All settings that shape the result, model file hashes included: the task's part of the fingerprint."""

    @property
    def options(self) -> dict[str, Any]:
        """What the maker of the task takes, beside the model, to make it again; plain values."""

    @property
    def numerics(self) -> dict[str, Any]:
        """Fields of the numerics record that this task's defaults set otherwise."""

    @property
    def reference(self) -> str | list[str]:
        """Names the model, or models, again, for a later `verify`."""

    @property
    def weights_bytes(self) -> int:
        """Size of the model's weights, shared by the units of one machine."""

    @property
    def counted(self) -> tuple[str, ...]:
        """Result columns of whole numbers whose sums stand in the summary."""

    @property
    def unit_bytes(self) -> int:
        """What every unit holds for itself beside weights and batches: a cache of keys and values."""

    @property
    def flops_per_token(self) -> float:
        """Of the products with weights, forward: what a GEMM rate bounds. 0 where it is not known."""

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """What the model computes in."""

    @property
    def chunking(self) -> Chunking | None:
        """How texts are cut into parts; None: each is one row."""

    @property
    def shown(self) -> dict[str, str]:
        """What a person wants to know of the task, a line each."""

    def open(self, unit: Unit, numerics: Numerics) -> Opened: ...

    def merge_parts(self, values: dict[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
        """Results of a text's parts, [n, ...] a column, and their numbers of tokens -> one value a column."""

    def compiled_for(self, numerics: Numerics) -> bool:
        """Whether `compile` has nothing left to do."""

    def compile(self, numerics: Numerics) -> None:
        """Make what every unit loads where numerics.compiled, once, before work; PlanError where that fails."""
