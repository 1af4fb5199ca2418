"""What a task is: how a row becomes tokens, and a batch of rows results. It knows no engine, source or sink."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np

    from fanfold.plan.numerics import Numerics
    from fanfold.plan.plan import Unit
    from fanfold.tasks.chunking import Chunking


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A result column: `vector` is float32[width], the others are one value a row."""

    name: str
    kind: Literal["vector", "text", "float", "integer"]
    width: int = 0

    @property
    def bytes_per_row(self) -> int:
        return 4 * self.width if self.kind == "vector" else 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """Texts as token ids. ids: int32 arrays, one a text or as many as `parts` says for each text.

    truncated: which texts lost tokens to the length limit. failed: texts that cannot be computed -> (error,
    message); their ids are not looked at. extras: what else `compute` must know of each text; costs: what it costs
    up to a factor, where that is not its length.
    """

    ids: list[np.ndarray]
    truncated: list[int]
    parts: list[int] | None = None
    failed: dict[int, tuple[str, str]] = field(default_factory=dict)
    extras: list[str] | None = None
    costs: list[int] | None = None


class Row(NamedTuple):
    """A row of a piece that is computed as a whole. `number`: its position in the input, from 0."""

    ids: np.ndarray
    extra: str
    number: int
    filler: bool  # its result is not wanted; it must cost what the row would have cost


class Opened(Protocol):
    """A task on one unit, with what it has loaded."""

    def prepare(self, texts: Sequence[str]) -> Prepared:
        """Needs the tokenizer only."""

    def load(self) -> None:
        """The model is loaded; twice is fine."""

    def filler(self) -> np.ndarray:
        """Token ids of a neutral row, short and harmless: it stands in a batch for a row that is left out."""

    def compute(self, ids: Sequence[np.ndarray], length: int) -> dict[str, Any]:
        """One batch padded to `length` -> one array [rows, ...] for each result column."""

    def compute_piece(
        self, rows: Sequence[Row], beat: Callable[[int], None]
    ) -> tuple[dict[str, Any], dict[int, tuple[str, str]]]:
        """For tasks with `piece_cost`: a piece -> its result columns, and rows that failed: place -> (error, message).

        `beat` is told of tokens computed, often; what it raises ends the piece.
        """


class Task(Protocol):
    """A job's task with its settings; picklable, light, made in the parent."""

    @property
    def name(self) -> str:
        """The verb: embed, classify, ..."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The result columns, in order."""

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
    def reference(self) -> str:
        """Names the model again, for a later `verify`."""

    @property
    def weights_bytes(self) -> int:
        """Size of the model's weights, shared by the units of one machine."""

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
    def inputs(self) -> tuple[str, ...] | None:
        """The columns that `prepare` gets as JSON objects; None: one column of texts, which the request names."""

    @property
    def unit_bytes(self) -> int:
        """What every unit holds beside weights and batches: a cache, for example."""

    @property
    def piece_cost(self) -> int | None:
        """What a piece should cost, where pieces are computed as a whole; None: pieces are batches, padded."""

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
