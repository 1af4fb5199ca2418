"""JSONL: one JSON object a line; the text is one of its values, the others can be kept."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from fanfold.data.failures import Problem, RowProblem, column_list, inert, place, usable_id
from fanfold.data.kept import Column, compact, encodable, infer, keep_typed, unknown_column, words_for
from fanfold.data.reading import columns_of
from fanfold.data.records import Decoded, Record, too_long
from fanfold.data.source import RECORD_COLUMN, Form, InputFile
from fanfold.data.text import bad_utf8
from fanfold.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from fanfold.data.lines import Rules
    from fanfold.data.reading import Reading

INFERRED_RECORDS = 4096
INFERRED_BYTES = 64 << 20
MAX_DEPTH = 200  # well under Python's recursion limit, so that the outcome does not depend on the caller's stack
_SPACE = " \t\r\n"
_DEPTH_TOKENS = re.compile(r'"(?:[^"\\]|\\.)*+"|[\[{]|[\]}]', re.DOTALL)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key '{inert(twice)}' stands twice in one object")
    return record


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)


def _depth(text: str) -> int:
    depth = deepest = 0
    for token in _DEPTH_TOKENS.finditer(text):
        first = token.group()[0]
        depth += (first in "[{") - (first in "]}")
        deepest = max(deepest, depth)
    return deepest


def parse(data: bytes) -> tuple[str, dict[str, Any]]:
    """The record as stripped JSON text and as a dict. Raises RowProblem (BadUtf8, BadRecord)."""
    try:
        text = data.decode().strip(_SPACE)
    except UnicodeDecodeError as error:
        raise RowProblem("BadUtf8", bad_utf8(error)) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise RowProblem("BadRecord", f"not readable JSON: nested deeper than {MAX_DEPTH} levels")
    try:
        record = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        raise RowProblem("BadRecord", f"not JSON: {error.msg} at character {error.pos}") from None
    except (ValueError, RecursionError) as error:
        raise RowProblem("BadRecord", f"not readable JSON: {error}") from None
    if not isinstance(record, dict):
        raise RowProblem("BadRecord", f"the line holds {words_for(record)}, not an object")
    return text, record


@dataclass(frozen=True, kw_only=True)
class JsonlDecoder:
    """Texts and kept columns of JSON objects; `columns` None in form `json` with everything kept."""

    reads: tuple[str, ...]
    composes: bool  # a text is the JSON object of what `reads` names; else it is the one column's value
    id_column: str | None
    form: Form
    columns: tuple[Column, ...] | None
    refuses_unknown: bool  # keep="all", typed: a key without a column is a SchemaMismatch
    seen: tuple[str, ...] = ()  # keys of the records looked at to begin with, as far as they are kept
    reserved: frozenset[str] = frozenset()  # names of result columns, which a kept key must not have

    @property
    def rules(self) -> Rules:
        return "jsonl"

    @property
    def schema(self) -> pa.Schema:
        if self.form == "json":
            return pa.schema([pa.field(RECORD_COLUMN, pa.string())])
        return pa.schema([column.field for column in self.columns or ()])

    def decode(self, records: Sequence[bytes | None]) -> Decoded:
        parsed: list[dict[str, Any] | None] = []
        raw: list[str | None] = []
        problems: dict[int, Problem] = {}
        known = frozenset(column.name for column in self.columns or ())
        for i, data in enumerate(records):
            record = text = None
            if data is None:
                problems[i] = too_long("jsonl")
            else:
                try:
                    text, record = parse(data)
                except RowProblem as error:
                    problems[i] = error.problem
            if record is not None:
                problem = self._text_problem(record, b"\\u" in (data or b""))
                if problem is None and self.refuses_unknown and not record.keys() <= known:
                    problem = unknown_column(record, known)
                if problem is None and self.columns is None and not self.reserved.isdisjoint(record):
                    problem = self._clash(record)
                if problem is not None:
                    problems[i] = problem._replace(id=self._id(record))
                    record = None
            parsed.append(record)
            raw.append(text)
        kept = self._kept_json(parsed, raw, problems) if self.form == "json" else self._kept(parsed, problems)
        texts = [None if r is None or i in problems else self._text(r) for i, r in enumerate(parsed)]
        ids = [self._id(record) if record else None for record in parsed] if self.id_column else None
        return Decoded(texts, kept, problems, ids)

    def _text(self, record: dict[str, Any]) -> str:
        if self.composes:
            return compact({name: record[name] for name in self.reads if name in record})
        text: str = record[self.reads[0]]
        return text

    def _text_problem(self, record: dict[str, Any], has_escapes: bool) -> Problem | None:
        column = self.reads[0]
        if self.composes:
            if has_escapes and not encodable(self._text(record)):
                return Problem("BadText", "a column that is read holds half of a surrogate pair, which is not text")
            return None
        text = record.get(column)
        shown = f"column '{inert(column)}'"
        if isinstance(text, str):
            if has_escapes and not encodable(text):
                return Problem("BadText", f"{shown} holds half of a surrogate pair, which is not text")
            return None
        if text is not None:
            return Problem("NotText", f"{shown} holds {words_for(text)}, not a string")
        if column in record:
            return Problem("NullText", f"{shown} is null")
        return Problem("MissingColumn", f"no {shown}; the record has {column_list(list(record), most=8)}")

    def _clash(self, record: dict[str, Any]) -> Problem:
        clash = ", ".join(sorted(self.reserved & record.keys()))
        return Problem("SchemaMismatch", f"its key {inert(clash)} is the name of a result column; use --prefix")

    def _id(self, record: dict[str, Any]) -> str | int | float | None:
        return usable_id(record.get(self.id_column)) if self.id_column else None

    def _kept(self, parsed: list[dict[str, Any] | None], problems: dict[int, Problem]) -> pa.RecordBatch:
        batch, misfits = keep_typed(parsed, self.columns or (), self.schema)
        for i, problem in misfits.items():
            record = parsed[i]
            problems[i] = problem._replace(id=self._id(record) if record else None)
        return batch

    def _kept_json(
        self, parsed: list[dict[str, Any] | None], raw: list[str | None], problems: dict[int, Problem]
    ) -> pa.RecordBatch:
        texts: list[str | None] = []
        for i, record in enumerate(parsed):
            text = None
            if record is not None and self.columns is None:
                text = raw[i]
            elif record is not None:
                text = compact({c.name: record[c.name] for c in self.columns or () if c.name in record})
                if not encodable(text):
                    reason = "a kept column holds half of a surrogate pair, which is not text"
                    problems[i], text = Problem("BadText", reason, self._id(record)), None
            texts.append(text)
        return pa.RecordBatch.from_arrays([pa.array(texts, pa.string())], schema=self.schema)


def jsonl_decoder(
    heads: Iterable[Record],
    files: Sequence[InputFile],
    *,
    column: Reading,
    id_column: str | None,
    keep: str | tuple[str, ...],
    form: Form,
    reserved: frozenset[str] = frozenset(),
) -> JsonlDecoder:
    """The decoder for files that begin with the records `heads`, of which only as many as needed are taken.

    Raises: InputError where the first record lacks the text column or no record has a named one.
    """
    names = (*((id_column,) if id_column else ()), *(keep if isinstance(keep, tuple) else ()))
    reads = columns_of(column, ())
    only_first = not names and (form == "json" or keep == "none")
    records: list[dict[str, Any]] = []
    num_bytes = 0
    for head in heads:
        num_bytes += len(head.data or b"")
        try:
            record = parse(head.data)[1] if head.data is not None else None
        except RowProblem:
            record = None
        if record is not None:
            if not records:
                reads = columns_of(column, record)
                for name in reads:
                    if name not in record:
                        raise _no_column(name, place(files[head.file].path, head.line), list(record))
            records.append(record)
        if num_bytes >= INFERRED_BYTES or len(records) >= (1 if only_first else INFERRED_RECORDS):
            break
    inferred = {c.name: c for c in infer(records)}
    for name in names:
        if records and name not in inferred:
            raise _no_column(name, f"the first {len(records)} records", list(inferred))
    columns: tuple[Column, ...] | None = ()
    if keep == "all":
        columns = None if form == "json" else tuple(inferred.values())
    elif isinstance(keep, tuple):
        columns = tuple(inferred[name] for name in keep if name in inferred)
    refuses_unknown = keep == "all" and form == "typed"
    return JsonlDecoder(
        reads=reads,
        composes=not isinstance(column, str),
        id_column=id_column,
        form=form,
        columns=columns,
        refuses_unknown=refuses_unknown,
        seen=tuple(inferred) if columns is None else tuple(c.name for c in columns),
        reserved=reserved,
    )


def _no_column(name: str, where: str, there: list[str]) -> InputError:
    return InputError(
        f"column '{inert(name)}' of the input",
        found=f"{where}: no such column",
        allowed=column_list(there),
        do="name one of these columns (--column for the text, --id, --keep)",
    )
