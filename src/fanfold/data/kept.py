"""The kept columns of JSON records as Arrow columns: types fixed by the first records, nothing altered.

A column whose values are all strings, booleans, 64-bit integers, numbers, or lists of one of these gets that
type; any other becomes compact JSON text, marked in the field's metadata with {b"fanfold": b"json"}.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from fanfold.data.failures import Problem, inert

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Scalar = Literal["string", "bool", "int64", "float64"]
JSON_MARK = {b"fanfold": b"json"}
EXACT_INT = 2**53  # every whole number up to here is a float64
_INT64 = range(-(2**63), 2**63)
_ARROW = {"string": pa.string(), "bool": pa.bool_(), "int64": pa.int64(), "float64": pa.float64()}
_TYPES: dict[Scalar, set[type]] = {"string": {str}, "bool": {bool}, "int64": {int}, "float64": {float, int}}
_ADVICE = "name the columns wanted with --keep, or write to .jsonl"


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A kept column; `scalar` None: JSON text."""

    name: str
    scalar: Scalar | None
    is_list: bool = False

    @property
    def words(self) -> str:
        if self.scalar is None:
            return "JSON text"
        return f"list of {self.scalar}" if self.is_list else self.scalar

    @property
    def field(self) -> pa.Field:
        if self.scalar is None:
            return pa.field(self.name, pa.string(), metadata=JSON_MARK)
        kind = _ARROW[self.scalar]
        return pa.field(self.name, pa.list_(kind) if self.is_list else kind)


@dataclass(slots=True)
class _Seen:
    """What kinds of values a column held."""

    plain: set[str] = field(default_factory=set)
    items: set[str] = field(default_factory=set)
    lists: bool = False

    def note(self, value: object) -> None:
        if isinstance(value, list):
            self.lists = True
            self.items.update(_kind(v) for v in value if v is not None)
        elif value is not None:
            self.plain.add(_kind(value))

    def column(self, name: str) -> Column:
        if self.lists:
            return Column(name=name, scalar=None if self.plain else _scalar(self.items), is_list=True)
        return Column(name=name, scalar=_scalar(self.plain))


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if abs(value) <= EXACT_INT else "wide" if value in _INT64 else "huge"
    return "string" if isinstance(value, str) else "float" if isinstance(value, float) else "other"


def _scalar(kinds: set[str]) -> Scalar | None:
    if kinds == {"string"}:
        return "string"
    if kinds == {"bool"}:
        return "bool"
    if not kinds:
        return None
    return "int64" if kinds <= {"int", "wide"} else "float64" if kinds <= {"int", "float"} else None


def infer(records: Iterable[Mapping[str, Any]]) -> list[Column]:
    """The columns of these records in the order in which they are first seen."""
    seen: dict[str, _Seen] = {}
    for record in records:
        for name, value in record.items():
            seen.setdefault(name, _Seen()).note(value)
    return [kinds.column(name) for name, kinds in seen.items()]


def compact(value: object) -> str:
    """JSON text without spaces; Python's NaN and Infinity literals included."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def encodable(text: str) -> bool:
    """Whether the text has no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def batch_of(arrays: Sequence[pa.Array], schema: pa.Schema, num_rows: int) -> pa.RecordBatch:
    """A record batch that knows its number of rows even without columns."""
    if not arrays:
        empty = pa.array([{}] * num_rows, pa.struct([]))
        return pa.RecordBatch.from_struct_array(empty)
    return pa.RecordBatch.from_arrays(list(arrays), schema=schema)


def keep_typed(
    records: Sequence[dict[str, Any] | None], columns: Sequence[Column], schema: pa.Schema
) -> tuple[pa.RecordBatch, dict[int, Problem]]:
    """The kept columns, and the records whose values do not fit: nulls in every column, as for None."""
    problems: dict[int, Problem] = {}
    arrays = []
    for column in columns:
        values = [None if r is None else r.get(column.name) for r in records]
        try:
            arrays.append(_array(column, values))
        except (TypeError, ValueError, OverflowError, pa.ArrowException):
            for i, value in enumerate(values):
                problem = _misfit(column, value)
                if problem is not None:
                    problems.setdefault(i, problem)
    if problems:
        left = [None if i in problems else r for i, r in enumerate(records)]
        arrays = [_array(c, [None if r is None else r.get(c.name) for r in left]) for c in columns]
    return batch_of(arrays, schema, len(records)), problems


def unknown_column(record: Mapping[str, Any], known: frozenset[str]) -> Problem:
    """The failure of a record with a key that the schema lacks."""
    name = next(key for key in record if key not in known)
    return Problem(
        "SchemaMismatch",
        f"column '{inert(name)}' is new: none of the first records has it; {_ADVICE}",
    )


def _array(column: Column, values: list[Any]) -> pa.Array:
    """Raises TypeError, ValueError, OverflowError or ArrowException where a value does not fit exactly."""
    if column.scalar is None:
        return pa.array([None if v is None else compact(v) for v in values], pa.string())
    allowed = _TYPES[column.scalar] | {type(None)}
    parts = [v for v in values if v is not None] if column.is_list else [values]
    for part in parts:
        if type(part) is not list or not set(map(type, part)) <= allowed:
            raise TypeError
        if column.scalar == "float64" and any(type(v) is int and abs(v) > EXACT_INT for v in part):
            raise OverflowError
    return pa.array(values, column.field.type)


def _misfit(column: Column, value: object) -> Problem | None:
    if value is None:
        return None
    if column.scalar is None:
        return None if encodable(compact(value)) else _surrogate(column)
    if isinstance(value, list) != column.is_list:
        return _mismatch(column, words_for(value))
    for v in value if isinstance(value, list) else [value]:
        if v is None:
            continue
        if type(v) not in _TYPES[column.scalar]:
            return _mismatch(column, "a list holding " + words_for(v) if column.is_list else words_for(v))
        if isinstance(v, str) and not encodable(v):
            return _surrogate(column)
        if type(v) is int and column.scalar == "int64" and v not in _INT64:
            return _mismatch(column, "a whole number beyond 64 bits")
        if type(v) is int and column.scalar == "float64" and abs(v) > EXACT_INT:
            return _mismatch(column, "a whole number beyond 2**53, which float64 would round")
    return None


def _mismatch(column: Column, found: str) -> Problem:
    return Problem(
        "SchemaMismatch",
        f"column '{inert(column.name)}' holds {found}, the first records made it {column.words}; {_ADVICE}",
    )


def _surrogate(column: Column) -> Problem:
    return Problem("BadText", f"column '{inert(column.name)}' holds half of a surrogate pair, which is not text")


def words_for(value: object) -> str:
    """What a JSON value is, in words."""
    names = {str: "a string", bool: "true or false", int: "a whole number", float: "a number", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else "null")
