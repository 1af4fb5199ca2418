"""Plain text: each line is a row, blank ones too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pyarrow as pa

from fanfold.data.failures import RowProblem
from fanfold.data.kept import batch_of, compact
from fanfold.data.reading import columns_of
from fanfold.data.records import Decoded, too_long
from fanfold.data.source import RECORD_COLUMN, Form
from fanfold.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fanfold.data.failures import Problem
    from fanfold.data.lines import Rules
    from fanfold.data.reading import Reading

TEXT_COLUMN = "text"


@dataclass(frozen=True, kw_only=True)
class TextDecoder:
    """A line without its line end is the text; invalid UTF-8 is BadUtf8."""

    form: Form
    composes: bool  # a text is a JSON object with the column text; else the line
    keeps: bool  # whether the one column there is, text, is kept

    @property
    def rules(self) -> Rules:
        return "text"

    @property
    def schema(self) -> pa.Schema:
        if self.form == "json":
            return pa.schema([pa.field(RECORD_COLUMN, pa.string())])
        return pa.schema([pa.field(TEXT_COLUMN, pa.string())] if self.keeps else [])

    def decode(self, records: Sequence[bytes | None]) -> Decoded:
        texts: list[str | None] = []
        problems: dict[int, Problem] = {}
        for i, data in enumerate(records):
            text = None
            if data is None:
                problems[i] = too_long("text")
            else:
                try:
                    text = plain_text(data)
                except RowProblem as error:
                    problems[i] = error.problem
            texts.append(text)
        kept = texts
        if self.form == "json":
            kept = [None if t is None else compact({TEXT_COLUMN: t} if self.keeps else {}) for t in texts]
        if self.composes:
            texts = [None if t is None else compact({TEXT_COLUMN: t}) for t in texts]
        schema = self.schema
        arrays = [pa.array(kept, pa.string())] if len(schema) else []
        return Decoded(texts, batch_of(arrays, schema, len(texts)), problems)


def plain_text(data: bytes) -> str:
    """The line without its end. Raises RowProblem (BadUtf8)."""
    try:
        return data.removesuffix(b"\n").removesuffix(b"\r").decode()
    except UnicodeDecodeError as error:
        raise RowProblem("BadUtf8", bad_utf8(error)) from None


def bad_utf8(error: UnicodeDecodeError) -> str:
    """Which byte of the record is not UTF-8."""
    found = error.object[error.start]
    return f"not UTF-8: byte {error.start} of the record is 0x{found:02x} ({error.reason})"


def text_decoder(*, column: Reading, id_column: str | None, keep: str | tuple[str, ...], form: Form) -> TextDecoder:
    """Raises InputError where a column other than `text` is asked for."""
    wanted = [
        *columns_of(column, (TEXT_COLUMN,)),
        *([id_column] if id_column else []),
        *(keep if isinstance(keep, tuple) else ()),
    ]
    for name in wanted:
        if name != TEXT_COLUMN:
            raise InputError(
                f"column '{name}' of plain text",
                found="plain text has one column, text: each line is a row",
                allowed="text",
                do="leave the column out, or convert the input to JSONL, CSV or Parquet",
            )
    return TextDecoder(form=form, composes=not isinstance(column, str), keeps=keep == "all" or TEXT_COLUMN in keep)
